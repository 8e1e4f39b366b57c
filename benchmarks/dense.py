"""The usual export of a routed model: every row through every expert, the wanted result kept with ``Where``.

The same decoder, the same weights in the same format, another routing: what the others' exports of such models compute.
"""

import json
from pathlib import Path
from typing import Any

from motrt.export.onnx_from_module import attach_weights, trace, write_onnx
from motrt.export.quantized_graph import CodeSource
from motrt.model_def.checkpoint.native import open_checkpoint
from motrt.model_def.config import ModelConfig
from motrt.model_def.graph import Graph
from motrt.model_def.quantization import Quantization
from motrt.model_def.signature import DTYPE_OF_PRECISION
from motrt.runtime.bundle import MODEL_FILE, Bundle
from motrt.runtime.load import source_of
from motrt.runtime.onnx_session import OnnxSession

DENSE = Graph("dense", "select")
TOLD = "dense.json"


def write_dense(bundle: Bundle, folder: Path) -> None:
    """The graph for ``bundle``'s model and format, in a new folder."""
    manifest = bundle.manifest
    dtype, checkpoint = DTYPE_OF_PRECISION[manifest.precision], open_checkpoint(source_of(bundle))
    folder.mkdir(parents=True)
    model = trace(manifest.config, dtype, DENSE, manifest.quantization)
    attach_weights(model, manifest.config, dtype, checkpoint.read)
    if manifest.quantization is not None:
        source = CodeSource(manifest.config, manifest.quantization, dtype, checkpoint.read)
        source.choose(lambda count: None)
        source.attach(model)
    write_onnx(model, folder)
    quantization = None if manifest.quantization is None else manifest.quantization.to_dict()
    (folder / TOLD).write_text(json.dumps({"config": manifest.config.to_dict(), "quantization": quantization}), "utf-8")


def dense_session(path: str) -> OnnxSession:
    """What ``write_dense`` wrote, ready to run."""
    told: dict[str, Any] = json.loads(Path(path, TOLD).read_text("utf-8"))
    quantization = None if told["quantization"] is None else Quantization.from_dict(told["quantization"])
    return OnnxSession(Path(path) / MODEL_FILE, ModelConfig.from_dict(told["config"]), quantization=quantization)
