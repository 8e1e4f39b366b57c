"""A folder of ``torch.distributed.checkpoint``: a table of contents (``.metadata``) and the ranks' ``.distcp`` files.

The library unpickles its table of contents without restriction. Here only the library's own records and plain data come in, and
the files that the table names must lie in the folder; the tensors themselves are read by the library, with ``weights_only``.
"""

import pickle
import warnings
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load

from motrt.errors import CheckpointError, raise_all
from motrt.model_def.checkpoint.container import dtype_name
from motrt.model_def.checkpoint.native import is_plain_name
from motrt.model_def.checkpoint.raw_state import RawState, RawTensor, unwrapped

METADATA_FILE = ".metadata"

# The types of a table of contents, by module; torch's dtypes, layouts and memory formats come as functions of these names.
_RECORDS = {
    "torch.distributed.checkpoint.metadata": {
        *("Metadata", "TensorStorageMetadata", "BytesStorageMetadata", "ChunkStorageMetadata", "TensorProperties"),
        *("MetadataIndex", "StorageMeta", "_MEM_FORMAT_ENCODING"),
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo", "_StoragePrefix"},
    "torch.serialization": {"_get_layout"},
    "torch": {"Size", *(dtype_name(one) for one in vars(torch).values() if isinstance(one, torch.dtype))},
    "collections": {"OrderedDict"},
    "pathlib": {"PosixPath", "PurePosixPath", "Path"},
}


def is_distributed(path: Path) -> bool:
    """Tell whether ``path`` is such a folder."""
    return (path / METADATA_FILE).is_file()


def open_distributed(folder: Path) -> RawState:
    """Open the folder; its tensors are read one at a time, put together from the ranks' parts.

    Raises:
        CheckpointError: when its table of contents is damaged, would run code, or names files that are missing or elsewhere.
    """
    metadata = _read_metadata(folder)
    files = {str(info.relative_path) for info in (metadata.storage_data or {}).values()}
    problems = [f"{name!r} is no plain file name" for name in sorted(files) if not is_plain_name(name)]
    problems += [f"{name} is missing" for name in sorted(files) if is_plain_name(name) and not (folder / name).is_file()]
    raise_all(CheckpointError, f"{folder / METADATA_FILE} names files that cannot be read; fetch the folder again:", problems)
    entries = metadata.state_dict_metadata.items()
    stored = {name: one for name, one in entries if isinstance(one, TensorStorageMetadata)}
    tensors = {name: RawTensor(name, tuple(one.size), dtype_name(one.properties.dtype)) for name, one in stored.items()}
    others = {name: "not a tensor" for name, _ in entries if name not in stored}
    reader = _Reader(folder, metadata)
    return unwrapped(RawState(folder.name, tensors, lambda name: _read(reader, tensors[name]), others))


class _Reader(FileSystemReader):
    """The library's reader, given a table of contents that was read with restrictions."""

    def __init__(self, folder: Path, metadata: Metadata) -> None:
        super().__init__(folder)
        self._checked = metadata

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return self._checked


class _RecordsAlone(pickle.Unpickler):
    """Unpickles the types of ``_RECORDS`` and plain data."""

    def find_class(self, module: str, name: str) -> Any:
        if name not in _RECORDS.get(module, ()):
            raise CheckpointError(
                f"{self.file_name} holds pickled code ({module}.{name}), which is refused because unpickling it would run it"
            )
        return super().find_class(module, name)

    def __init__(self, stream: BinaryIO) -> None:
        super().__init__(stream)
        self.file_name = stream.name


def _read_metadata(folder: Path) -> Metadata:
    file = folder / METADATA_FILE
    try:
        with file.open("rb") as stream:
            found = _RecordsAlone(stream).load()
    except CheckpointError:
        raise
    except Exception as failure:  # pickle raises nearly anything for damaged files
        raise CheckpointError(f"{file} cannot be read ({type(failure).__name__}): fetch or save the folder again") from None
    if not isinstance(found, Metadata) or not isinstance(getattr(found, "state_dict_metadata", None), dict):
        raise CheckpointError(f"{file} is no table of contents of torch.distributed.checkpoint")
    if getattr(found, "storage_meta", None) is None:
        found.storage_meta = StorageMeta()
    return found


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
