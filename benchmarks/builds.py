"""Real bundles of small models, made by the exporter itself; a configuration is traced once, however many builds share it.

Knows no fault and no verdict.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from unittest.mock import patch

import onnx_ir as ir
import torch
from torch.onnx._internal.exporter._registration import ONNXRegistry

from motrt.export import bundle_from_checkpoint, onnx_from_module
from motrt.export.bundle_from_checkpoint import QuantizeOptions, export_bundle
from motrt.export.quantized_graph import quantize_graph
from motrt.model_def.checkpoint.native import write_checkpoint
from motrt.model_def.config import ModelConfig
from motrt.model_def.graph import CANONICAL, Graph, Target
from motrt.model_def.initialize import random_tensors
from motrt.model_def.quantization import Quantization


@dataclass(frozen=True)
class Build:
    """One bundle.

    Attributes:
        config: the model.
        precision: as ``motrt export --precision``.
        target: as ``--target``.
        options: of quantised weights.
        seed: of the random weights.
        scaled: weights by the beginning of their name, and what they are multiplied by.
        outliers: channels of norms and of the embedding, and what they are multiplied by; see ``_with_outliers``.
    """

    config: ModelConfig
    precision: str = "fp32"
    target: Target = "onnx"
    options: QuantizeOptions | None = None
    seed: int = 0
    scaled: tuple[tuple[str, float], ...] = ()
    outliers: float = 1.0

    def make(self, folder: Path) -> Path:
        """Write checkpoint and bundle into ``folder``; returns the bundle. Nothing is verified."""
        self.write_checkpoint(folder / "checkpoint")
        export_bundle(
            folder / "checkpoint",
            folder / "bundle",
            self.precision,
            verify=False,
            target=self.target,
            quantize_options=self.options,
        )
        return folder / "bundle"

    def write_checkpoint(self, out: Path) -> None:
        write_checkpoint(
            out,
            self.config,
            ((name, self._value(name, one)) for name, one in random_tensors(self.config, self.seed)),
            "float32",
        )

    def _value(self, name: str, value: torch.Tensor) -> torch.Tensor:
        for start, factor in self.scaled:
            value = value * factor if name.startswith(start) else value
        is_stream = name.endswith("norm.weight") and value.shape == (self.config.model_width,)
        if self.outliers == 1.0 or not (is_stream or name == "tok_embeddings.weight"):
            return value
        value = value.clone()
        value[..., :: max(1, self.config.model_width // 3)] *= self.outliers  # three or four channels, the same everywhere
        return value


@contextmanager
def traces_shared() -> Iterator[Callable[..., ir.Model]]:
    """Let ``export_bundle`` trace each configuration, dtype and graph once: the values of weights are in no trace.

    PyTorch's registry of operators is made once, too. Gives ``trace`` with that memory.
    """
    made: dict[tuple[str, str, Graph], ir.Model] = {}

    def remembered(
        config: ModelConfig, dtype: str, graph: Graph = CANONICAL, quantization: Quantization | None = None
    ) -> ir.Model:
        key = (config.to_json(), dtype, graph)
        if key not in made:
            made[key] = onnx_from_module.trace(config, dtype, graph)
        model = made[key].clone()
        if quantization is not None:
            quantize_graph(model, config, quantization, dtype)
        return model

    # The exporter parses the source of its operators for every trace, a quarter of the time of a small one; none changes them.
    operators = cache(ONNXRegistry.from_torchlib)
    with (
        patch.object(bundle_from_checkpoint, "trace", remembered),
        patch.object(ONNXRegistry, "from_torchlib", staticmethod(operators)),
    ):
        yield remembered
