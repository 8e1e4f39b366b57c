"""One trace for each configuration: tests that differ in their weights alone share it."""

from collections.abc import Callable, Iterator

import onnx_ir as ir
import pytest

from motrt.export import bundle_from_checkpoint, onnx_from_module
from motrt.export.quantized_graph import quantize_graph
from motrt.model_def.config import ModelConfig
from motrt.model_def.graph import CANONICAL, Graph
from motrt.model_def.quantization import Quantization

Trace = Callable[..., ir.Model]


@pytest.fixture(scope="session", autouse=True)
def trace() -> Iterator[Trace]:
    """``trace`` with a memory, which ``export_bundle`` uses too."""
    real, made = onnx_from_module.trace, dict[tuple[str, str, Graph], ir.Model]()

    def remembered(
        config: ModelConfig, dtype: str, graph: Graph = CANONICAL, quantization: Quantization | None = None
    ) -> ir.Model:
        key = (config.to_json(), dtype, graph)
        if key not in made:
            made[key] = real(config, dtype, graph)
        model = made[key].clone()  # what was traced stays without weights
        if quantization is not None:
            quantize_graph(model, config, quantization, dtype)
        return model

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bundle_from_checkpoint, "trace", remembered)
        yield remembered
