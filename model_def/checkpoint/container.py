"""The safetensors container, read and written one tensor at a time with plain file calls.

The container is eight bytes of header length, a JSON header (name -> dtype, shape, byte range) and the tensors' bytes. It
is read here rather than through the library's mapping because mapped pages count as resident memory until the file is
closed: a reader that streams a model would look as large as the model. This file knows nothing of models or folders.

Source of the layout: the format section of the safetensors documentation.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import torch

from motrt.errors import CheckpointError, raise_all

# The names this project writes (as torch spells them) and the container's codes for them.
TORCH_DTYPES: dict[str, torch.dtype] = {
    "float64": torch.float64,
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}
_FLOAT_CODES = {"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16"}
_CODES: dict[str, tuple[str, int]] = {  # code -> (torch's spelling, bytes of one element)
    "F64": ("float64", 8),
    "F32": ("float32", 4),
    "F16": ("float16", 2),
    "BF16": ("bfloat16", 2),
    "I64": ("int64", 8),
    "I32": ("int32", 4),
    "I16": ("int16", 2),
    "I8": ("int8", 1),
    "U8": ("uint8", 1),
    "BOOL": ("bool", 1),
    "F8_E4M3": ("float8_e4m3fn", 1),
    "F8_E5M2": ("float8_e5m2", 1),
    "F8_E8M0": ("float8_e8m0fnu", 1),
    "U16": ("uint16", 2),
    "U32": ("uint32", 4),
    "U64": ("uint64", 8),
    "C64": ("complex64", 8),
}
_LENGTH_BYTES = 8
_MOST_HEADER_BYTES = 100_000_000  # the library's own limit


@dataclass(frozen=True)
class StoredTensor:
    """Where one tensor lies.

    Attributes:
        name: its name in the container.
        dtype: torch's spelling (``bfloat16``).
        shape: its dims.
        file: the container.
        start: position of its first byte in the file.
        numbytes: how many bytes it takes.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    start: int
    numbytes: int


def dtype_name(dtype: torch.dtype) -> str:
    """``torch.bfloat16`` -> ``bfloat16``."""
    return str(dtype).removeprefix("torch.")


def read_header(file: Path) -> dict[str, StoredTensor]:
    """Where every tensor of ``file`` lies, its byte ranges checked against the file's size.

    Raises:
        CheckpointError: when the file can not be read, is no safetensors file, or is truncated.
    """
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            header, data_start = _header_json(file, stream, size)
    except OSError as failure:
        raise CheckpointError(f"{file} can not be read ({failure.strerror}): check the path and its permissions") from failure
    entries = {name: entry for name, entry in header.items() if name != "__metadata__"}
    _refuse_unknown_dtypes(file, entries)
    found: dict[str, StoredTensor] = {}
    problems: list[str] = []
    for name, entry in entries.items():
        stored = _stored_or_problem(name, entry, file, data_start)
        if isinstance(stored, str):
            problems.append(stored)
        else:
            found[name] = stored
    end = max((stored.start + stored.numbytes for stored in found.values()), default=data_start)
    if size != end and not problems:
        what = "truncated" if size < end else "longer than its header says"
        problems.append(f"the file is {what}: {end} bytes were expected, {size} came")
    problems = problems or _gaps(list(found.values()), data_start)
    raise_all(CheckpointError, f"{file} is damaged: fetch or write it again", problems)
    return found


def read_tensor(stored: StoredTensor) -> torch.Tensor:
    """The tensor's own bytes, in memory of its own: nothing stays mapped or open.

    Raises:
        CheckpointError: when the file shrank or vanished since its header was read.
    """
    buffer = torch.empty(stored.numbytes, dtype=torch.uint8)
    view = buffer.numpy().data
    try:
        with stored.file.open("rb", buffering=0) as stream:
            stream.seek(stored.start)
            done = 0
            while done < stored.numbytes:  # one read gives 2 GB at most
                count = stream.readinto(view[done:])
                if not count:
                    raise CheckpointError(f"{stored.file} ended inside {stored.name!r}: it changed while it was read")
                done += count
    except OSError as failure:
        raise CheckpointError(
            f"{stored.file} can not be read ({failure.strerror}): it changed since it was opened"
        ) from failure
    return buffer.view(getattr(torch, stored.dtype)).reshape(stored.shape)


def plan_container(file: Path, shapes: Mapping[str, tuple[int, ...]], dtype: str) -> tuple[bytes, dict[str, StoredTensor]]:
    """The bytes that a container of ``shapes`` begins with, and where each tensor's bytes then belong."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    item, offset = _CODES[_FLOAT_CODES[dtype]][1], 0
    for name, shape in shapes.items():
        end = offset + prod(shape) * item
        header[name] = {"dtype": _FLOAT_CODES[dtype], "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # so that the first tensor is aligned
    start = _LENGTH_BYTES + len(text)
    slots = {name: _stored(name, entry, file, start) for name, entry in header.items() if name != "__metadata__"}
    return len(text).to_bytes(_LENGTH_BYTES, "little") + text, slots


def begin_container(file: Path, opening: bytes, slots: Iterable[StoredTensor]) -> None:
    """Write ``opening`` and stretch the file to hold every slot, so that tensors may come in any order."""
    with file.open("wb") as stream:
        stream.write(opening)
        stream.truncate(max((slot.start + slot.numbytes for slot in slots), default=len(opening)))


def write_tensor(slot: StoredTensor, tensor: torch.Tensor) -> None:
    """Put ``tensor``, already of the slot's dtype and shape, into its slot."""
    flat = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    with slot.file.open("r+b") as stream:
        stream.seek(slot.start)
        stream.write(flat.numpy().data)


def _header_json(file: Path, stream: BinaryIO, size: int) -> tuple[dict[str, Any], int]:
    length = int.from_bytes(stream.read(_LENGTH_BYTES), "little")
    if size < _LENGTH_BYTES or not 2 <= length <= min(_MOST_HEADER_BYTES, size - _LENGTH_BYTES):
        raise CheckpointError(f"{file} is not a safetensors file, or is truncated inside its header: fetch or write it again")
    try:
        header = json.loads(stream.read(length).decode())
    except (ValueError, RecursionError):
        header = None
    if not isinstance(header, dict):
        raise CheckpointError(f"{file} is not a safetensors file: its header is no JSON object")
    return header, _LENGTH_BYTES + length


def _refuse_unknown_dtypes(file: Path, entries: Mapping[str, Any]) -> None:
    """Raise where a tensor is of a dtype that is not known here: its bytes cannot even be counted."""
    dtypes = {name: entry["dtype"] for name, entry in entries.items() if isinstance(entry, dict) and "dtype" in entry}
    unknown = [f"{name} ({code})" for name, code in dtypes.items() if isinstance(code, str) and code not in _CODES]
    raise_all(CheckpointError, f"{file} holds tensors of a dtype that is not read; convert weights of floating point:", unknown)


def _stored_or_problem(name: str, entry: Any, file: Path, data_start: int) -> StoredTensor | str:
    try:
        return _stored(name, entry, file, data_start)
    except (KeyError, TypeError, ValueError) as failure:
        return f"{name!r} is described wrongly ({failure})"


def _stored(name: str, entry: Any, file: Path, data_start: int) -> StoredTensor:
    code, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
    if code not in _CODES:
        raise ValueError(f"dtype {code!r} is not known")
    if not all(type(number) is int and 0 <= number < 1 << 63 for number in (*shape, begin, end)):
        raise ValueError("its dims and offsets must be whole numbers of 63 bits")
    dtype, item = _CODES[code]
    if end - begin != prod(shape) * item:
        raise ValueError(f"{end - begin} bytes for {code}{shape}, which takes {prod(shape) * item}")
    return StoredTensor(name, dtype, tuple(shape), file, data_start + begin, end - begin)


def _gaps(stored: list[StoredTensor], data_start: int) -> list[str]:
    """Byte ranges that leave a gap or share bytes: the format has neither."""
    problems, position = [], data_start
    for one in sorted(stored, key=lambda tensor: (tensor.start, tensor.numbytes)):
        if one.start != position:
            problems.append(f"{one.name!r} begins at byte {one.start}, where {position} was expected")
        position = one.start + one.numbytes
    return problems
