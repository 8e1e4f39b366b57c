"""What every room's tests share: tiny models, made, traced and exported once."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import onnx_ir as ir
import pytest
import torch

from motrt.benchmarks.builds import traces_shared
from motrt.export.bundle_from_checkpoint import export_bundle
from motrt.model_def.config import ModelConfig
from motrt.model_def.initialize import init_checkpoint

# Products of this size are no work: a second thread only waits for the first.
torch.set_num_threads(1)

# For the same reason each of pytest's workers keeps to a core: onnxruntime then makes no threads that wait for each other.
if (worker := os.environ.get("PYTEST_XDIST_WORKER", "")) and hasattr(os, "sched_setaffinity"):
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[int(worker.removeprefix("gw")) % len(cores)]})

MakeBundle = Callable[..., Path]
Trace = Callable[..., ir.Model]


@pytest.fixture(scope="session", autouse=True)
def trace() -> Iterator[Trace]:
    """``trace`` with a memory, which ``export_bundle`` uses too: tests that differ in their weights alone share one."""
    with traces_shared() as remembered:
        yield remembered


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
