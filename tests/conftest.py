"""What every room's tests share: tiny models, made and exported once."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from motrt.export.bundle_from_checkpoint import export_bundle
from motrt.model_def.config import ModelConfig
from motrt.model_def.initialize import init_checkpoint

# Products of this size are no work: a second thread only waits for the first.
torch.set_num_threads(1)

MakeBundle = Callable[..., Path]


@pytest.fixture(scope="session")
def make_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[ModelConfig], Path]:
    """A native checkpoint of random weights, made once for each configuration."""
    made: dict[str, Path] = {}

    def make(config: ModelConfig) -> Path:
        key = config.to_json()
        if key not in made:
            made[key] = tmp_path_factory.mktemp("checkpoint") / "model"
            init_checkpoint(made[key], config)
        return made[key]

    return make


@pytest.fixture(scope="session")
def make_bundle(make_checkpoint: Callable[[ModelConfig], Path], tmp_path_factory: pytest.TempPathFactory) -> MakeBundle:
    """A bundle of a configuration at a precision, not verified, made once for each. Never change what it gives: copy it."""
    made: dict[tuple[str, str], Path] = {}

    def make(config: ModelConfig, precision: str = "fp32") -> Path:
        key = (config.to_json(), precision)
        if key not in made:
            made[key] = tmp_path_factory.mktemp("bundle") / "b"
            export_bundle(make_checkpoint(config), made[key], precision, verify=False)
        return made[key]

    return make


@pytest.fixture(scope="session")
def tiny_checkpoint(make_checkpoint: Callable[[ModelConfig], Path]) -> Path:
    return make_checkpoint(ModelConfig.tiny())


@pytest.fixture(scope="session")
def tiny_bundle(make_bundle: MakeBundle) -> Path:
    return make_bundle(ModelConfig.tiny())
