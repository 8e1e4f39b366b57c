"""Foreign weights as they lie: names, shapes and dtypes at once, values one at a time. No format's names are known here.

PyTorch files are mapped and unpickled with ``weights_only=True``: tensors and plain containers come in, code does not.
Safetensors are read through ``container``.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch

from motrt.errors import CheckpointError, raise_all
from motrt.model_def.checkpoint.container import StoredTensor, dtype_name, read_header, read_tensor
from motrt.model_def.checkpoint.native import is_plain_name, read_index


@dataclass(frozen=True)
class RawTensor:
    """One tensor of a foreign file, not loaded.

    Attributes:
        name: its name there.
        shape: its dims.
        dtype: torch's spelling (``bfloat16``).
    """

    name: str
    shape: tuple[int, ...]
    dtype: str

    @property
    def is_float(self) -> bool:
        return self.dtype in ("float64", "float32", "float16", "bfloat16")


@dataclass(frozen=True)
class RawState:
    """A foreign state: what it holds, and how to read one of them.

    Attributes:
        source: what reports call it, usually the file's or folder's name.
        tensors: by name.
        read: a name -> its value.
        others: entries that give no weight: name -> why.
    """

    source: str
    tensors: Mapping[str, RawTensor]
    read: Callable[[str], torch.Tensor]
    others: Mapping[str, str] = field(default_factory=dict)


def load_pickle(path: Path) -> Any:
    """What a ``.pt``, ``.pth`` or ``.bin`` file holds, its tensors mapped and not yet read.

    Raises:
        CheckpointError: when it is missing, truncated, of another kind, or would run code.
    """
    try:
        return torch.load(path, mmap=True, weights_only=True, map_location="cpu")
    except OSError as failure:
        raise CheckpointError(f"{path} can not be read ({failure.strerror}): check the path and its permissions") from None
    except UnpicklingError as failure:
        raise CheckpointError(_pickled_code(path, str(failure))) from None
    except Exception as failure:  # torch's readers raise RuntimeError, EOFError, KeyError, struct.error... for damaged files
        raise CheckpointError(_unreadable(path, str(failure))) from None


def state_from_mapping(source: str, values: Any, where: str) -> RawState:
    """The state that a loaded ``{name: tensor}`` is.

    Args:
        source: what reports call it.
        values: what was loaded.
        where: the file, for the error.

    Raises:
        CheckpointError: when it is no mapping from names to tensors, or tensors in it have no values.
    """
    if not isinstance(values, Mapping) or not all(isinstance(name, str) for name in values):
        raise CheckpointError(f"{where} should hold a mapping from names to tensors ({type(values).__name__} came)")
    empty = [name for name, value in values.items() if isinstance(value, torch.Tensor) and value.is_meta]
    advice = "these are on the meta device and have no values: load the model before it is saved"
    raise_all(CheckpointError, f"{where} should hold tensors with values; {advice}:", empty)
    dense = {name: value for name, value in values.items() if _is_dense(value)}
    if not dense:
        raise CheckpointError(f"{where} should hold tensors by name, and holds none: is it the right file?")
    tensors = {name: RawTensor(name, tuple(value.shape), dtype_name(value.dtype)) for name, value in dense.items()}
    others = {name: f"not a dense tensor ({type(value).__name__})" for name, value in values.items() if name not in dense}
    return RawState(source, tensors, dense.__getitem__, others)


def with_neighbours(raw: RawState, loaded: Mapping[Any, Any], state_key: str) -> RawState:
    """``raw``, which lay under ``state_key`` of ``loaded``, with what a training run saved beside it (step, optimizer)."""
    beside = {str(name): f"beside {state_key}, no weight of the model" for name in loaded if name != state_key}
    return replace(raw, others={**beside, **raw.others})


def state_from_safetensors(source: str, files: Iterable[Path]) -> RawState:
    """The state that one or several safetensors files hold together.

    Raises:
        CheckpointError: when one is damaged, or a name stands in two of them.
    """
    stored: dict[str, StoredTensor] = {}
    problems: list[str] = []
    for file in files:
        header = read_header(file)
        problems += [f"{name} is in {stored[name].file.name} and in {file.name}" for name in header if name in stored]
        stored.update(header)
    raise_all(CheckpointError, f"{source} holds a tensor twice:", problems)
    tensors = {name: RawTensor(name, one.shape, one.dtype) for name, one in stored.items()}
    return RawState(source, tensors, lambda name: read_tensor(stored[name]))


def safetensors_files(folder: Path) -> list[Path]:
    """The weight files of a Hugging Face folder: ``model.safetensors``, or what its index names; none where there is neither.

    Raises:
        CheckpointError: when the index names a file that is missing or outside the folder.
    """
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.is_file():
        return [single]
    if not index.is_file():
        return []
    names = sorted(set(read_index(index).values()))
    problems = [f"{name!r} is no plain file name" for name in names if not is_plain_name(name)]
    problems += [f"{name} is missing" for name in names if is_plain_name(name) and not (folder / name).is_file()]
    raise_all(CheckpointError, f"{index} names files that can not be used; fetch the folder again:", problems)
    return [folder / name for name in names]


def _is_dense(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.layout == torch.strided and not value.is_quantized


def _pickled_code(path: Path, message: str) -> str:
    found = re.search(r"GLOBAL ([\w.]+)", message)
    if found is None:
        return _unreadable(path, message)
    return (
        f"{path} holds pickled code ({found[1]}), which is refused because unpickling it would run it: "
        "save the tensors alone, torch.save(model.state_dict(), path), where the file came from"
    )


def _unreadable(path: Path, message: str) -> str:
    with path.open("rb") as stream:
        is_zip = stream.read(2) == b"PK"
    if is_zip:
        return f"{path} is truncated or damaged ({message.splitlines()[0][:160]}): fetch or save it again"
    return (
        f"{path} is not a PyTorch file of the zip format (or is truncated at its very beginning): "
        "save it with torch.save of PyTorch 1.6 or later"
    )
