"""What lies at a path: a checkpoint, a bundle or an ONNX file, told in plain JSON values that a table can be made of."""

from collections import defaultdict
from math import prod
from pathlib import Path
from typing import Any

import onnx
import torch

from motrt.errors import InputError
from motrt.export.onnx_check import census
from motrt.export.steps import Steps
from motrt.model_def.checkpoint.container import TORCH_DTYPES
from motrt.model_def.checkpoint.native import Checkpoint, open_checkpoint
from motrt.model_def.checkpoint.sniff import describe_raw, kind_of
from motrt.model_def.config import ModelConfig
from motrt.model_def.health import diagnose
from motrt.model_def.parameters import num_parameters_read, parameters
from motrt.runtime.bundle import DTYPE_OF_PRECISION, Bundle, open_bundle, sha256_of


def inspect(path: str | Path, steps: Steps | None = None) -> dict[str, Any]:
    """Describe what lies at ``path``.

    Args:
        path: a native checkpoint, a bundle, a folder or file in a foreign format, or an ONNX file.
        steps: told of progress: weights are read through for their health, files for their hashes.

    Returns:
        ``kind`` and, as far as the kind has them: ``config``, ``parameters`` (by part and modality), ``bytes_read_per_step``
        (by modality), ``dtype``, ``health``, ``files`` (with hashes), ``operators``, ``parity``, ``tensors``.

    Raises:
        InputError: when nothing is there, or it is nothing that motrt knows.
        MotrtError: when it is damaged.
    """
    steps, where = steps or Steps(), Path(path)
    if not where.exists():
        raise InputError(f"nothing lies at {where}: give a checkpoint, a bundle or an ONNX file")
    kind = kind_of(where)
    if kind == "native":
        return {"kind": "native checkpoint", **_checkpoint(open_checkpoint(where), steps)}
    if kind == "bundle":
        with steps.step("hash the bundle", sum(one.stat().st_size for one in where.iterdir())) as advance:
            bundle = open_bundle(where, "hash", advance)
        return {"kind": "bundle", **_bundle(bundle)}
    if kind == "onnx":
        return {"kind": "ONNX file", **_onnx(where)}
    if kind == "unknown":
        raise InputError(
            f"{where} is nothing that motrt knows: a native checkpoint has config.json and model.safetensors, a bundle has "
            "manifest.json, foreign checkpoints are .pt, .pth or safetensors"
        )
    return {"kind": kind, **_raw(where)}


def size_table(config: ModelConfig, bytes_per_weight: int) -> dict[str, Any]:
    """Parameters by part and modality, and the bytes that one decode step of each modality reads."""
    counts: dict[tuple[str, str], int] = defaultdict(int)
    for parameter in parameters(config):
        counts[parameter.part, parameter.modality or "all"] += parameter.numel
    rows = [
        {"part": part, "modality": modality, "parameters": count, "bytes": count * bytes_per_weight}
        for (part, modality), count in counts.items()
    ]
    read = {name: num_parameters_read(config, name) for name in config.modality_names}
    return {
        "parameters": rows,
        "total_parameters": sum(counts.values()),
        "total_bytes": sum(counts.values()) * bytes_per_weight,
        "parameters_read_per_step": read,
        "bytes_read_per_step": {name: count * bytes_per_weight for name, count in read.items()},
    }


def _checkpoint(checkpoint: Checkpoint, steps: Steps) -> dict[str, Any]:
    with steps.step("look at the weights", checkpoint.num_bytes) as advance:

        def read(name: str) -> Any:
            value = checkpoint.read(name)
            advance(value.nbytes)
            return value

        health = diagnose(checkpoint.config, read)
    files = checkpoint.files()
    with steps.step("hash the files", sum(file.stat().st_size for file in files)) as advance:
        hashes = {file: sha256_of(file, advance) for file in files}
    return {
        "path": str(checkpoint.path),
        "dtype": checkpoint.dtype,
        "config": checkpoint.config.to_dict(),
        **size_table(checkpoint.config, TORCH_DTYPES[checkpoint.dtype].itemsize),
        "health": health.to_dict(),
        "files": [{"name": file.name, "bytes": file.stat().st_size, "sha256": hashes[file]} for file in files],
    }


def _bundle(bundle: Bundle) -> dict[str, Any]:
    manifest = bundle.manifest
    dtype = DTYPE_OF_PRECISION[manifest.precision]
    return {
        "path": str(bundle.path),
        "dtype": dtype,
        "config": bundle.config.to_dict(),
        **size_table(bundle.config, TORCH_DTYPES[dtype].itemsize),
        "signature": manifest.signature.to_dict(),
        "operators": dict(manifest.operators),
        "files": [{"name": name, "bytes": one.num_bytes, "sha256": one.sha256} for name, one in manifest.files.items()],
        "source": dict(manifest.source),
        "versions": dict(manifest.versions),
        "parity": None if manifest.parity is None else dict(manifest.parity),
    }


def _raw(where: Path) -> dict[str, Any]:
    tensors = describe_raw(where)
    counts = [prod(one.shape) for one in tensors]
    itemsizes = [getattr(torch, one.dtype).itemsize for one in tensors]
    return {
        "path": str(where),
        "total_parameters": sum(counts),
        "total_bytes": sum(count * itemsize for count, itemsize in zip(counts, itemsizes, strict=True)),
        "tensors": [{"name": one.name, "dtype": one.dtype, "shape": list(one.shape)} for one in tensors],
    }


def _onnx(file: Path) -> dict[str, Any]:
    try:
        model = onnx.load(file, load_external_data=False)
    except Exception as failure:  # protobuf's own exceptions
        raise InputError(f"{file} is no ONNX file ({failure})") from None
    if not model.graph.node:
        raise InputError(f"{file} is no ONNX file: it holds no graph")
    initializers = list(model.graph.initializer)
    return {
        "path": str(file),
        "opsets": {one.domain or "ai.onnx": one.version for one in model.opset_import},
        "inputs": [_value(one) for one in model.graph.input],
        "outputs": [_value(one) for one in model.graph.output],
        "operators": census(model),
        "total_parameters": sum(prod(one.dims) for one in initializers),
        "files": [{"name": file.name, "bytes": file.stat().st_size, "sha256": sha256_of(file)}],
    }


def _value(value: onnx.ValueInfoProto) -> dict[str, Any]:
    tensor = value.type.tensor_type
    return {
        "name": value.name,
        "dtype": str(onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type)) if tensor.elem_type else "unknown",
        "dims": [dim.dim_param or dim.dim_value for dim in tensor.shape.dim],
    }
