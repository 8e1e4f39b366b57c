"""One trace for each configuration: tests that differ in their weights alone share it."""

from collections.abc import Callable, Iterator

import onnx_ir as ir
import pytest

from motrt.export import bundle_from_checkpoint, onnx_from_module
from motrt.model_def.config import ModelConfig
from motrt.model_def.graph import CANONICAL, Graph

Trace = Callable[[ModelConfig, str], ir.Model]


@pytest.fixture(scope="session", autouse=True)
def trace() -> Iterator[Trace]:
    """``trace`` with a memory, which ``export_bundle`` uses too: attaching weights replaces those attached before."""
    real, made = onnx_from_module.trace, dict[tuple[str, str, Graph], ir.Model]()

    def remembered(config: ModelConfig, dtype: str, graph: Graph = CANONICAL) -> ir.Model:
        key = (config.to_json(), dtype, graph)
        if key not in made:
            made[key] = real(config, dtype, graph)
        return made[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bundle_from_checkpoint, "trace", remembered)
        yield remembered
