"""The models that the tests of exporting share, and what they need again and again. Knows no test."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import torch
from numpy.typing import NDArray

from motrt.model_def.checkpoint.native import open_checkpoint, write_checkpoint
from motrt.model_def.config import Modality, ModelConfig, SwigluExpert
from motrt.model_def.initialize import random_tensors
from motrt.runtime.bundle import MODEL_FILE, WEIGHTS_FILE
from motrt.runtime.torch_session import TorchSession

TINY = ModelConfig.tiny()
ONE = TINY.replace(modalities=TINY.modalities[:1], head="shared")
TIED = TINY.replace(head="shared", tied_embeddings=True, routed_attention=False, qk_norm=True)
THREE = TINY.replace(modalities=(*TINY.modalities, Modality("picture", 17, SwigluExpert(24, bias=True))))

# Two experts of one shape, so that they can be swapped; with biases, so that one can be dropped.
EQUAL = TINY.replace(
    modalities=(Modality("text", 96, SwigluExpert(96, bias=True)), Modality("audio", 32, SwigluExpert(96, bias=True)))
)

Weight = NDArray[np.float32]


def load_whole(bundle: Path) -> onnx.ModelProto:
    """A bundle's graph with its weights in it."""
    return onnx.load(bundle / MODEL_FILE)


def save_whole(model: onnx.ModelProto, folder: Path) -> Path:
    """Written as the exporter writes it: one data file beside the graph. Returns the graph's path."""
    folder.mkdir(exist_ok=True)
    onnx.save(
        model,
        folder / MODEL_FILE,
        save_as_external_data=True,
        location=WEIGHTS_FILE,
        size_threshold=1024,
        convert_attribute=False,
    )
    return folder / MODEL_FILE


def weight(model: onnx.ModelProto, name: str) -> Weight:
    value: Weight = onnx.numpy_helper.to_array(next(one for one in model.graph.initializer if one.name == name)).copy()
    return value


def set_weight(model: onnx.ModelProto, name: str, value: Weight) -> None:
    tensor = next(one for one in model.graph.initializer if one.name == name)
    tensor.CopyFrom(onnx.numpy_helper.from_array(np.ascontiguousarray(value), name))


def swap_weights(model: onnx.ModelProto, one: str, other: str) -> None:
    first, second = weight(model, one), weight(model, other)
    set_weight(model, one, second)
    set_weight(model, other, first)


def nodes(model: onnx.ModelProto, op_type: str) -> list[onnx.NodeProto]:
    return [node for node in model.graph.node if node.op_type == op_type]


def torch_session(checkpoint: Path, precision: str = "fp32", kind: type[TorchSession] = TorchSession) -> TorchSession:
    return kind(TorchSession.open(open_checkpoint(checkpoint), precision).decoder)


def with_changed_weights(checkpoint: Path, out: Path, change: Callable[[str, torch.Tensor], torch.Tensor]) -> Path:
    """A copy of a native checkpoint, each weight as ``change(name, value)`` gives it."""
    opened = open_checkpoint(checkpoint)
    write_checkpoint(out, opened.config, ((name, change(name, value)) for name, value in opened.tensors()), opened.dtype)
    return out


def write_random(out: Path, config: ModelConfig, seed: int) -> Path:
    write_checkpoint(out, config, random_tensors(config, seed), "float32")
    return out
