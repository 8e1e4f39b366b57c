"""What a file or folder is, told by what it holds, and what tensors a foreign one holds, without loading them.

For a person who points at something and asks. Nothing is checked: opening it with the right function does that.
"""

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Literal

from motrt.errors import CheckpointError
from motrt.model_def.checkpoint import adapter, hub_folder, llama, musicgen
from motrt.model_def.checkpoint.distributed import METADATA_FILE, is_distributed, open_distributed
from motrt.model_def.checkpoint.gguf_file import is_gguf, open_gguf_file
from motrt.model_def.checkpoint.gguf_llama import state_of_gguf
from motrt.model_def.checkpoint.pickle_file import load_pickle
from motrt.model_def.checkpoint.raw_state import RawState, RawTensor, joined, state_from_mapping, state_from_safetensors
from motrt.model_def.checkpoint.training_state import inner_state

Kind = Literal["native", "mot", "llama-meta", "llama-hf", "musicgen", "adapter", "gguf", "bundle", "onnx", "unknown"]

PICKLES = (".pt", ".pth", ".bin")


def kind_of(path: str | Path) -> Kind:
    """What ``path`` is; ``unknown`` for what is missing, unreadable or none of the others."""
    path = Path(path)
    if path.is_dir():
        return _kind_of_folder(path)
    if not path.is_file():
        return "unknown"
    if is_gguf(path):
        return "gguf"
    if path.suffix == ".onnx":
        return "onnx"
    return _kind_or_unknown(path)


def describe_raw(path: str | Path) -> tuple[RawTensor, ...]:
    """Name, shape and dtype of every tensor of a foreign checkpoint, in the order of its file.

    Args:
        path: a training state, an adapter file, a safetensors or GGUF file, or a Llama or MusicGen folder.

    Raises:
        CheckpointError: when it is missing, damaged, or would run code.
    """
    path = Path(path)
    return tuple(open_raw(path).tensors.values())


def open_raw(path: Path) -> RawState:
    """A foreign checkpoint's tensors, mapped and not read.

    Raises:
        CheckpointError: when it is missing, damaged, or would run code.
    """
    if is_distributed(path):
        return open_distributed(path)
    if is_gguf(path):
        return state_of_gguf(open_gguf_file(path))
    files = weight_files(path)
    if files[0].suffix == ".safetensors":
        return state_from_safetensors(path.name, files)
    return joined(files[0].name, [state_from_mapping(file.name, _inner(load_pickle(file), file), str(file)) for file in files])


def refuse_unreadable(path: Path) -> None:
    """Raise where ``path`` is told by its name to be a PyTorch or GGUF file or a distributed checkpoint, and cannot be read.

    Raises:
        CheckpointError: why not.
    """
    if path.suffix == ".gguf":
        open_gguf_file(path)
    if path.suffix in PICKLES or is_distributed(path):
        open_raw(path)


def weight_files(path: Path) -> list[Path]:
    """The files that a foreign checkpoint's tensors lie in: safetensors before pickles, as ``convert`` has it.

    Raises:
        CheckpointError: when a folder holds none that is known.
    """
    if not path.is_dir():
        return [path]
    if is_distributed(path):
        return [path / METADATA_FILE, *sorted(path.glob("*.distcp"))]
    meta = llama.meta_weights(path)
    files = hub_folder.weight_files(path) or ([meta] if meta else [])
    if not files:
        expected = f"{hub_folder.SAFETENSORS}, {llama.META_WEIGHTS} or {hub_folder.PICKLE}"
        raise CheckpointError(f"{path} holds no weights that are known here: expected {expected}")
    return files


def _inner(loaded: Any, where: Path) -> Any:
    if isinstance(loaded, Mapping) and adapter.STATE_KEY in loaded:
        return loaded[adapter.STATE_KEY]
    return inner_state(loaded, where)[0]


def _kind_of_folder(folder: Path) -> Kind:
    if (folder / "manifest.json").is_file():
        return "bundle"
    if (folder / llama.META_WEIGHTS).is_file():
        return "llama-meta"
    if is_distributed(folder):
        return _kind_or_unknown(folder)
    values = _json_object(folder / "config.json")
    if "modalities" in values:
        return "native"
    by_type: dict[Any, Kind] = {"llama": "llama-hf", "musicgen": "musicgen"}
    kind = values.get("model_type")
    return by_type.get(kind, "unknown") if isinstance(kind, str) else "unknown"


def _kind_or_unknown(path: Path) -> Kind:
    try:
        return _kind_of_keys(open_raw(path).tensors) if path.is_dir() else _kind_of_file(path)
    except CheckpointError:
        return "unknown"


def _kind_of_file(path: Path) -> Kind:
    if path.suffix != ".safetensors":
        loaded = load_pickle(path) if path.suffix in PICKLES else {}
        if isinstance(loaded, Mapping) and adapter.STATE_KEY in loaded:
            return "adapter"
        inner = _inner(loaded, path)
        return _kind_of_keys([key for key in inner if isinstance(key, str)] if isinstance(inner, Mapping) else [])
    return _kind_of_keys(open_raw(path).tensors)


def _kind_of_keys(keys: Collection[str]) -> Kind:
    if any("local_experts" in key for key in keys):
        return "mot"
    if any(musicgen.TABLE.native(key) for key in keys):
        return "musicgen"
    if any(key.startswith("model.layers.") and ".self_attn." in key for key in keys):
        return "llama-hf"
    if any(key == "layers.0.feed_forward.w1.weight" for key in keys):
        return "llama-meta"
    return "native" if "layers.0.attention_norm.weight" in keys else "unknown"


def _json_object(file: Path) -> dict[str, Any]:
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return values if isinstance(values, dict) else {}
