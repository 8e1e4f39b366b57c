"""What the runtime's tests share: sessions of the tiny bundle, opened once. No test may close them.

Property tests here have no deadline: how long an example takes is the machine's affair.
"""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

from motrt.model_def.checkpoint.native import open_checkpoint
from motrt.runtime.load import load
from motrt.runtime.session import Session
from motrt.runtime.torch_session import TorchSession

settings.register_profile("no_deadline", deadline=None)
settings.load_profile("no_deadline")


@pytest.fixture(scope="session")
def onnx(tiny_bundle: Path) -> Iterator[Session]:
    with load(tiny_bundle, num_threads=1) as session:
        yield session


@pytest.fixture(scope="session")
def reference(tiny_checkpoint: Path) -> Iterator[Session]:
    """The decoder itself, in float64: the oracle."""
    with TorchSession.open(open_checkpoint(tiny_checkpoint), "fp64") as session:
        yield session


@pytest.fixture
def bundle_copy(tiny_bundle: Path, tmp_path: Path) -> Path:
    """A bundle of one's own, to do harm to."""
    return Path(shutil.copytree(tiny_bundle, tmp_path / "copy"))
