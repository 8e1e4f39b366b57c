"""A folder of ``torch.distributed.checkpoint``: a table of contents (``.metadata``) and the ranks' ``.distcp`` files.

The library unpickles its table of contents without restriction. Here it is unpickled into records that know nothing, which are
checked and written anew as the library's own: names stay in the folder, and the parts of each tensor cover it exactly. The
library then reads the tensors, with ``weights_only``.
"""

import pickle
import warnings
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader, _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.state_dict_loader import load

from motrt.errors import CheckpointError, raise_all
from motrt.model_def.checkpoint.container import dtype_name
from motrt.model_def.checkpoint.raw_state import RawState, RawTensor, unwrapped
from motrt.model_def.file_problem import named_file_problem

METADATA_FILE = ".metadata"

_LIBRARY = "torch.distributed.checkpoint."
_RECORDS = {
    f"{_LIBRARY}metadata": {
        *("Metadata", "TensorStorageMetadata", "BytesStorageMetadata", "ChunkStorageMetadata", "TensorProperties"),
        *("MetadataIndex", "StorageMeta", "_MEM_FORMAT_ENCODING"),
    },
    f"{_LIBRARY}filesystem": {"_StorageInfo"},
    "torch.serialization": {"_get_layout"},
    "pathlib": {"PosixPath", "PurePosixPath"},
    "pathlib._local": {"PosixPath", "PurePosixPath"},
}
_PLAIN = {("torch", "Size"): tuple, ("collections", "OrderedDict"): dict}
_DTYPES = {dtype_name(one): one for one in vars(torch).values() if isinstance(one, torch.dtype)}
_LARGEST_DIM = 1 << 40


def is_distributed(path: Path) -> bool:
    """Tell whether ``path`` is such a folder."""
    return (path / METADATA_FILE).is_file()


def open_distributed(folder: Path) -> RawState:
    """Open the folder; its tensors are read one at a time, put together from the ranks' parts.

    Raises:
        CheckpointError: when its table of contents is damaged, would run code, names files that are missing or elsewhere, or
            has no part for some of a tensor.
    """
    stored, others, storage = _read_table(folder)
    files = sorted({info.relative_path for info in storage.values()})
    problems = [problem for name in files if (problem := named_file_problem(folder, name))]
    raise_all(CheckpointError, f"{folder / METADATA_FILE} names files that cannot be read; fetch the folder again:", problems)
    num_bytes = sum((folder / name).stat().st_size for name in files)
    problems = [f"{name}: {why}" for name, one in stored.items() if (why := _not_covered(name, one, storage, num_bytes))]
    raise_all(CheckpointError, f"{folder} does not hold what its table of contents says; fetch it again:", problems)
    tensors = {name: RawTensor(name, tuple(one.size), dtype_name(one.properties.dtype)) for name, one in stored.items()}
    reader = _Reader(folder, Metadata({**stored}, storage_data=storage, storage_meta=StorageMeta()))
    return unwrapped(RawState(folder.name, tensors, lambda name: _read(reader, tensors[name]), others))


class _Reader(FileSystemReader):
    """The library's reader, given a table of contents that was written anew."""

    def __init__(self, folder: Path, metadata: Metadata) -> None:
        super().__init__(folder)
        self._checked = metadata

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return self._checked


class _Records(pickle.Unpickler):
    """Unpickles the library's records as records of this load, whose class nobody else has, and plain data."""

    def __init__(self, stream: BinaryIO) -> None:
        super().__init__(stream)
        self.file_name = stream.name
        self.classes: dict[str, type] = {}

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _PLAIN:
            return _PLAIN[module, name]
        if module == "torch" and name in _DTYPES:
            return _DTYPES[name]
        if name in _RECORDS.get(module, ()):
            return self.classes.setdefault(name, _new_record(name))
        raise CheckpointError(
            f"{self.file_name} holds pickled code ({module}.{name}), which is refused because unpickling it would run it"
        )


def _new_record(name: str) -> type:
    """A class of objects that hold the state which a pickle gives them, and nothing else."""

    def new(cls: type, *_: Any) -> Any:
        return object.__new__(cls)

    def set_state(self: Any, state: Any) -> None:
        self.state = state

    members = {"__new__": new, "__init__": lambda self, *_: None, "__setstate__": set_state, "state": None, "kind": name}
    return type(name, (), members)


_Table = tuple[dict[str, TensorStorageMetadata], dict[str, str], dict[MetadataIndex, _StorageInfo]]


def _read_table(folder: Path) -> _Table:
    """Tensors by name, other entries with why they give none, and where each part of a tensor lies."""
    file = folder / METADATA_FILE
    try:
        with file.open("rb") as stream:
            table = _fields(_Records(stream).load(), "Metadata")
        entries = {_checked(str, name): one for name, one in table["state_dict_metadata"].items()}
        stored = {name: _tensor(one) for name, one in entries.items() if one.kind == "TensorStorageMetadata"}
        places = [(_index(index), _place(info)) for index, info in table["storage_data"].items()]
    except CheckpointError:
        raise
    except Exception as failure:  # pickle raises nearly anything for damaged files, and records may hold anything
        raise CheckpointError(f"{file} cannot be read ({type(failure).__name__}): fetch or save the folder again") from None
    others = {name: "not a tensor" for name in entries if name not in stored}
    return stored, others, {index: place for index, place in places if index.fqn in stored}


def _fields(record: Any, kind: str) -> dict[str, Any]:
    if record.kind != kind or type(record.state) is not dict:
        raise TypeError(f"expected a record of {kind}")
    return dict(record.state)


def _checked(kind: type, value: Any) -> Any:
    if type(value) is not kind:
        raise TypeError(f"expected {kind.__name__}, got {type(value).__name__}")
    return value


def _dims(values: Any) -> torch.Size:
    if type(values) is not tuple or not all(type(one) is int and 0 <= one <= _LARGEST_DIM for one in values):
        raise TypeError("expected dims")
    return torch.Size(values)


def _tensor(record: Any) -> TensorStorageMetadata:
    fields = _fields(record, "TensorStorageMetadata")
    dtype = _checked(torch.dtype, fields["properties"].state[0])
    chunks = [_fields(one, "ChunkStorageMetadata") for one in fields["chunks"]]
    parts = [ChunkStorageMetadata(_dims(one["offsets"]), _dims(one["sizes"])) for one in chunks]
    return TensorStorageMetadata(TensorProperties(dtype=dtype), _dims(fields["size"]), parts)


def _index(record: Any) -> MetadataIndex:
    fields = _fields(record, "MetadataIndex")
    offset = fields.get("offset")
    return MetadataIndex(_checked(str, fields["fqn"]), None if offset is None else _dims(offset), None)


def _place(record: Any) -> _StorageInfo:
    fields = _fields(record, "_StorageInfo")
    if fields.get("transform_descriptors"):
        raise TypeError("compressed or encrypted parts are not read")
    return _StorageInfo(*(_checked(kind, fields[name]) for name, kind in _PLACE_FIELDS.items()))


_PLACE_FIELDS = {"relative_path": str, "offset": int, "length": int}


def _not_covered(
    name: str, one: TensorStorageMetadata, storage: dict[MetadataIndex, _StorageInfo], num_bytes: int
) -> str | None:
    """Why a tensor's parts are not the whole of it: what no part covers would be whatever lay in memory."""
    size, volume = one.size, prod(one.size)
    if volume * one.properties.dtype.itemsize > num_bytes:
        return f"{list(size)} has more bytes than all files together"
    boxes = [list(zip(part.offsets, part.sizes, strict=False)) for part in one.chunks]
    if any(len(part.offsets) != len(size) or len(part.sizes) != len(size) for part in one.chunks):
        return "a part of it has other dims"
    if any(start + length > whole for box in boxes for (start, length), whole in zip(box, size, strict=True)):
        return "a part of it lies outside"
    overlaps = any(_overlap(boxes[i], boxes[j]) for i in range(len(boxes)) for j in range(i))
    if overlaps or sum(prod(part.sizes) for part in one.chunks) != volume:
        return "its parts do not cover it exactly"
    if any(MetadataIndex(name, part.offsets) not in storage for part in one.chunks):
        return "a part of it lies nowhere"
    return None


def _overlap(one: list[tuple[int, int]], other: list[tuple[int, int]]) -> bool:
    return all(max(a, b) < min(a + m, b + n) for (a, m), (b, n) in zip(one, other, strict=True))


def _read(reader: FileSystemReader, wanted: RawTensor) -> torch.Tensor:
    into = torch.empty(wanted.shape, dtype=getattr(torch, wanted.dtype))
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # one process is what is wanted
            load({wanted.name: into}, storage_reader=reader, no_dist=True)
    except (Exception, CheckpointException) as failure:  # the library's own derives from BaseException
        first_line = next(iter(str(failure).splitlines()), "") or type(failure).__name__
        raise CheckpointError(
            f"{reader.path}: {wanted.name} cannot be read ({first_line[:160]}): fetch the folder again"
        ) from None
    return into
