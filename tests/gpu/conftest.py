"""One small model with the head size of real ones, and its bundles: other head sizes take other kernels on a GPU."""

from collections.abc import Callable
from pathlib import Path

import pytest

from motrt.model_def.config import ModelConfig


@pytest.fixture(scope="session")
def tiny64_checkpoint(make_checkpoint: Callable[[ModelConfig], Path]) -> Path:
    return make_checkpoint(ModelConfig.preset("tiny64"))
