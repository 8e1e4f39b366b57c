"""What lies at a path: a checkpoint, a bundle or an ONNX file, told in plain JSON values that a table can be made of."""

from collections import Counter, defaultdict
from collections.abc import Sequence
from math import prod
from pathlib import Path
from typing import Any

import onnx
import torch

from motrt.errors import BundleError, InputError, MotrtError, raise_all
from motrt.export.onnx_check import census, weight_problems
from motrt.export.quantized_weights import QuantizedWeights
from motrt.export.steps import Steps
from motrt.export.stored_weights import TORCH_OF_ONNX, data_files, dtype_name, num_bytes, read_graph, stored_tensor
from motrt.model_def.checkpoint.assemble import Assembly, convert_gguf, convert_llama, convert_mot
from motrt.model_def.checkpoint.container import TORCH_DTYPES
from motrt.model_def.checkpoint.llama import META_PARAMS
from motrt.model_def.checkpoint.native import Checkpoint, open_checkpoint
from motrt.model_def.checkpoint.raw_state import RawState
from motrt.model_def.checkpoint.sniff import kind_of, open_raw, refuse_unreadable, weight_files
from motrt.model_def.config import ModelConfig
from motrt.model_def.file_problem import folder_problem
from motrt.model_def.graph import CANONICAL, Graph
from motrt.model_def.head_surgery import Read
from motrt.model_def.health import diagnose, scan
from motrt.model_def.parameters import Parameter, parameters, parameters_read
from motrt.model_def.quantization import Quantization, stored_bytes_of
from motrt.model_def.signature import DTYPE_OF_PRECISION
from motrt.runtime.bundle import Bundle, Manifest, is_bundle, open_bundle, sha256_of
from motrt.runtime.engine_record import record_of

WHY_NO_CONFIGURATION = {
    "mot": f"no configuration: a training state does not say its own sizes, and no {META_PARAMS} lies beside it",
    "musicgen": "no configuration: MusicGen is the source of an audio expert, and no model of motrt by itself",
    "adapter": "no configuration: an adapter is laid over a model, and is none by itself",
}


def inspect(path: str | Path, steps: Steps | None = None) -> dict[str, Any]:
    """Describe what lies at ``path``.

    Args:
        path: a native checkpoint, a bundle, a folder or file in a foreign format, or an ONNX file.
        steps: told of progress: weights are read through for their health, files for their hashes.

    Returns:
        ``kind`` and, as far as the kind has them: ``config``, ``parameters`` (by part and modality), ``bytes_read_per_step``
        (by modality), ``dtype``, ``health``, ``files`` (with hashes), ``operators``, ``parity``, ``answer``, ``tensors``, and
        ``note``: what could not be told, and why.

    Raises:
        InputError: when nothing is there, or it is nothing that motrt knows.
        MotrtError: when it is damaged.
    """
    steps, where = steps or Steps(), Path(path)
    if not where.exists():
        raise InputError(f"nothing lies at {where}, which {folder_problem(where)}: give a checkpoint, a bundle or an ONNX file")
    kind = "bundle" if is_bundle(where) else kind_of(where)
    if kind == "native":
        return {"kind": "native checkpoint", **_checkpoint(open_checkpoint(where), steps)}
    if kind == "bundle":
        with steps.step("hash the bundle", open_bundle(where).num_bytes) as advance:
            bundle = open_bundle(where, "hash", advance)
        return {"kind": "bundle", **_bundle(bundle, steps)}
    if kind == "onnx":
        return {"kind": "ONNX file", **_onnx(where, steps)}
    if kind == "unknown":
        refuse_unreadable(where)
        raise InputError(
            f"{where} is nothing that motrt knows: a native checkpoint has config.json and model.safetensors, a bundle has "
            f"manifest.json, foreign checkpoints are .pt, .pth, safetensors or .gguf{_told_broken_links(where)}"
        )
    told = {"kind": f"GGUF file: `motrt convert OUT --gguf {where}` reads it"} if kind == "gguf" else {"kind": kind}
    return told | _raw(kind, where, steps)


def _told_broken_links(where: Path) -> str:
    """Why a folder of links may be known as nothing."""
    names = sorted(one.name for one in where.iterdir() if one.is_symlink() and not one.exists()) if where.is_dir() else []
    return f" (links that lead nowhere: {', '.join(names)})" if names else ""


def size_table(config: ModelConfig, bytes_per_weight: int, quantization: Quantization | None = None) -> dict[str, Any]:
    """Parameters by part and modality, and the bytes that one decode step of each modality reads.

    Args:
        config: the model's.
        bytes_per_weight: of a weight that is not quantised, and of a scale.
        quantization: the format of every weight.
    """
    groups: dict[tuple[str, str], list[Parameter]] = defaultdict(list)
    for parameter in parameters(config):
        groups[parameter.part, parameter.modality or "all"].append(parameter)
    rows = [
        {
            "part": part,
            "modality": modality,
            "parameters": sum(one.numel for one in group),
            "bytes": stored_bytes_of(config, quantization, bytes_per_weight, group),
            "stored": _told_formats(group, quantization),
        }
        for (part, modality), group in groups.items()
    ]
    read = {name: parameters_read(config, name) for name in config.modality_names}
    return {
        "parameters": rows,
        "total_parameters": sum(row["parameters"] for row in rows),
        "total_bytes": sum(row["bytes"] for row in rows),
        "parameters_read_per_step": {name: sum(share.numel for share in shares) for name, shares in read.items()},
        "bytes_read_per_step": {
            name: stored_bytes_of(config, quantization, bytes_per_weight, shares) for name, shares in read.items()
        },
    }


def _told_formats(group: Sequence[Parameter], quantization: Quantization | None) -> str:
    """How the quantised weights among ``group`` are stored; empty where there are none."""
    formats = [quantization.format_of(one) for one in group] if quantization else []
    return "; ".join(dict.fromkeys(str(how) for how in formats if how is not None))


def _checkpoint(checkpoint: Checkpoint, steps: Steps) -> dict[str, Any]:
    return {
        "path": str(checkpoint.path),
        "dtype": checkpoint.dtype,
        "config": checkpoint.config.to_dict(),
        **size_table(checkpoint.config, TORCH_DTYPES[checkpoint.dtype].itemsize),
        "health": _health(checkpoint.config, checkpoint.read, checkpoint.num_bytes, steps),
        "files": _hashed(checkpoint.files(), steps),
    }


def _health(config: ModelConfig, read: Read, num_bytes: int, steps: Steps) -> dict[str, Any]:
    with steps.step("look at the weights", num_bytes) as advance:

        def counted(name: str) -> torch.Tensor:
            value = read(name)
            advance(value.nbytes)
            return value

        return diagnose(config, counted).to_dict()


def _hashed(files: Sequence[Path], steps: Steps) -> list[dict[str, Any]]:
    with steps.step("hash the files", sum(file.stat().st_size for file in files)) as advance:
        return [{"name": one.name, "bytes": one.stat().st_size, "sha256": sha256_of(one, advance)} for one in files]


def _bundle(bundle: Bundle, steps: Steps) -> dict[str, Any]:
    manifest = bundle.manifest
    dtype = DTYPE_OF_PRECISION[manifest.precision]
    sizes = size_table(bundle.config, TORCH_DTYPES[dtype].itemsize, manifest.quantization)
    read = _reader(bundle)

    return {
        "path": str(bundle.path),
        "dtype": dtype,
        "config": bundle.config.to_dict(),
        **sizes,
        "weights": manifest.weights,
        "quantization": None if manifest.quantization is None else manifest.quantization.to_dict(),
        "health": _health(bundle.config, read, sizes["total_bytes"], steps),
        "signature": manifest.signature.to_dict(),
        "operators": dict(manifest.operators),
        "target": manifest.target,
        "plan": [_planned(graph, manifest) for graph in (*manifest.graphs, CANONICAL)],
        "engines": [engine.to_dict() for engine in manifest.engines],
        "files": [{"name": name, "bytes": one.num_bytes, "sha256": one.sha256} for name, one in manifest.files.items()],
        "source": dict(manifest.source),
        "versions": dict(manifest.versions),
        "parity": None if manifest.parity is None else dict(manifest.parity),
        "answer": None if manifest.answer is None else manifest.answer.to_dict(),
        "evaluations": [one.to_dict() for one in manifest.evaluations],
    }


def _reader(bundle: Bundle) -> Read:
    """The weights that the canonical graph holds, or what its codes stand for."""
    model, quantization = read_graph(bundle.model_path), bundle.manifest.quantization
    problems = weight_problems(model, bundle.config, DTYPE_OF_PRECISION[bundle.manifest.precision], CANONICAL, quantization)
    raise_all(BundleError, f"{bundle.model_path} does not hold the weights of its model; export it again:", problems)
    if quantization is not None:
        return QuantizedWeights(bundle.model_path, bundle.config, quantization).read
    stored = {one.name: one for one in model.graph.initializer}
    return lambda name: stored_tensor(stored[name], bundle.path)


def _planned(graph: Graph, manifest: Manifest) -> dict[str, Any]:
    """One graph of the plan: what it serves, the weights that it reads, and what was compiled of it."""
    names = manifest.config.modality_names
    engine = record_of(manifest.engines, graph)
    read = sum(one.numel for one in graph.parameters(manifest.config) if one.part != "embedding")
    return {
        **graph.to_dict(),
        "file": graph.file_name,
        "tokens": "any" if graph.tokens is None else names[graph.tokens],
        "predicts": "any" if graph.predicts is None else names[graph.predicts],
        "parameters": read,
        "engine": None if engine is None else engine.file,
        "engine_bytes": None if engine is None else manifest.files[engine.file].num_bytes,
    }


def _raw(kind: str, where: Path, steps: Steps) -> dict[str, Any]:
    raw = open_raw(where)
    numels = {name: prod(one.shape) for name, one in raw.tensors.items()}
    total_bytes = sum(one.num_bytes for one in raw.tensors.values())
    dtypes = dict(Counter(one.stored or one.dtype for one in raw.tensors.values()))
    assembly, note = _assembled(kind, where)
    return {
        "path": str(where),
        **(_model(assembly, steps) if assembly else _no_model(raw, sum(numels.values()), total_bytes, note, steps)),
        "stored": {"parameters": sum(numels.values()), "bytes": total_bytes, "dtypes": dtypes},
        "tensors": [
            {"name": one.name, "dtype": one.stored or one.dtype, "shape": list(one.shape)} for one in raw.tensors.values()
        ],
        "files": _hashed([*weight_files(where), *_configurations_beside(where)], steps),
    }


def _model(assembly: Assembly, steps: Steps) -> dict[str, Any]:
    """What is told of foreign weights that are a whole model."""
    sizes = size_table(assembly.config, TORCH_DTYPES[assembly.dtype].itemsize)
    health = _health(assembly.config, assembly.read, sizes["total_bytes"], steps)
    return {"dtype": assembly.dtype, "config": assembly.config.to_dict(), **sizes, "health": health}


def _no_model(raw: RawState, count: int, total_bytes: int, note: str, steps: Steps) -> dict[str, Any]:
    """What is told of foreign weights that are a part of a model, or of an unknown one."""
    with steps.step("look at the weights", total_bytes) as advance:
        health = scan(((name, raw.read(name)) for name, one in raw.tensors.items() if one.is_float), advance)
    return {"total_parameters": count, "total_bytes": total_bytes, "note": note, "health": health.to_dict()}


def _assembled(kind: str, where: Path) -> tuple[Assembly | None, str]:
    """The model that foreign weights are, or None and why there is none."""
    params = where.parent / META_PARAMS
    try:
        if kind.startswith("llama") and where.is_dir():
            assembly = convert_llama(where)
        elif kind == "gguf":
            assembly = convert_gguf(where)
        elif kind == "mot" and params.is_file():
            assembly = convert_mot(where, params)
        else:
            return None, WHY_NO_CONFIGURATION.get(kind, "no configuration: give the folder that the weights lie in")
        assembly.accounting.raise_unless_clean()
    except MotrtError as failure:  # half a model is looked at too: that is when people ask
        return None, f"no configuration: {failure}"
    return assembly, ""


def _configurations_beside(where: Path) -> list[Path]:
    names = ("config.json", META_PARAMS) if where.is_dir() else (META_PARAMS,)
    folder = where if where.is_dir() else where.parent
    return [folder / name for name in names if (folder / name).is_file()]


def _onnx(file: Path, steps: Steps) -> dict[str, Any]:
    try:
        model = read_graph(file)
    except BundleError as failure:  # the file that was asked for, and no bundle's
        raise InputError(str(failure)) from None
    initializers = list(model.graph.initializer)
    beside, absent = data_files(initializers, file.parent)
    total_bytes = sum(map(num_bytes, initializers))
    with steps.step("look at the weights", total_bytes) as advance:
        weights = (one for one in initializers if _is_weight(one) and not data_files([one], file.parent)[1])
        health = scan(((one.name, stored_tensor(one, file.parent)) for one in weights), advance)
    unseen = f"weights not looked at, their data do not lie beside the graph: {', '.join(map(repr, absent))}"
    return {
        "path": str(file),
        "opsets": {one.domain or "ai.onnx": one.version for one in model.opset_import},
        "inputs": [_value(one) for one in model.graph.input],
        "outputs": [_value(one) for one in model.graph.output],
        "operators": census(model),
        "total_parameters": sum(prod(one.dims) for one in initializers),
        "total_bytes": total_bytes,
        "dtypes": dict(Counter(dtype_name(one.data_type) for one in initializers)),
        "health": health.to_dict(),
        **({"note": unseen} if absent else {}),
        "files": _hashed([file, *beside], steps),
    }


def _is_weight(tensor: onnx.TensorProto) -> bool:
    """Single values are a graph's constants, the infinity of a mask among them."""
    return tensor.data_type in TORCH_OF_ONNX and prod(tensor.dims) > 1


def _value(value: onnx.ValueInfoProto) -> dict[str, Any]:
    tensor = value.type.tensor_type
    return {
        "name": value.name,
        "dtype": dtype_name(tensor.elem_type),
        "dims": [dim.dim_param or dim.dim_value for dim in tensor.shape.dim],
    }
