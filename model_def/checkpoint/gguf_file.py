"""The GGUF container: a header of typed values by key, a table of tensors, and their bytes, many of them in quantized blocks.

The header is read here and not by the ``gguf`` library, whose reader follows whatever counts a file gives: one that says 2^60
elements keeps it busy for ever. Here every count and length is held against the bytes that are left in the file before it is
believed. Values are not read until they are asked for, one tensor at a time; blocks are dequantized by that library, which this
file alone imports, and only when a tensor has blocks. This file knows no architecture and no names.

Source of the layout: ``docs/gguf.md`` of ggml; sizes of blocks: ``GGML_QUANT_SIZES`` of the library.
"""

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import torch

from motrt.errors import BackendError, CheckpointError, raise_all
from motrt.model_def.checkpoint.container import StoredTensor, read_tensor
from motrt.model_def.file_problem import file_problem

MAGIC = b"GGUF"
VERSIONS = (2, 3)

PLAIN = {"F32": "float32", "F16": "float16", "BF16": "bfloat16", "F64": "float64"}
"""Types whose numbers are stored as they are -> torch's spelling."""

BLOCKS: Mapping[str, tuple[int, int]] = {
    "Q4_0": (32, 18),
    "Q4_1": (32, 20),
    "Q5_0": (32, 22),
    "Q5_1": (32, 24),
    "Q8_0": (32, 34),
    "Q2_K": (256, 84),
    "Q3_K": (256, 110),
    "Q4_K": (256, 144),
    "Q5_K": (256, 176),
    "Q6_K": (256, 210),
}
"""Types that are dequantized -> (elements, bytes) of a block; blocks lie along a row."""

# fmt: off
_TYPES = {
    0: "F32", 1: "F16", 2: "Q4_0", 3: "Q4_1", 6: "Q5_0", 7: "Q5_1", 8: "Q8_0", 9: "Q8_1", 10: "Q2_K", 11: "Q3_K", 12: "Q4_K",
    13: "Q5_K", 14: "Q6_K", 15: "Q8_K", 16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S", 20: "IQ4_NL", 21: "IQ3_S",
    22: "IQ2_S", 23: "IQ4_XS", 24: "I8", 25: "I16", 26: "I32", 27: "I64", 28: "F64", 29: "IQ1_M", 30: "BF16", 34: "TQ1_0",
    35: "TQ2_0", 39: "MXFP4", 40: "NVFP4", 41: "Q1_0",
}
# fmt: on
_ITEM_BYTES = {"F32": 4, "F16": 2, "BF16": 2, "F64": 8}

# Of values in the header: number of the type -> struct's code.
_SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<B", 10: "<Q", 11: "<q", 12: "<d"}
_BOOL, _STRING, _ARRAY = 7, 8, 9

# Beyond what any model has: a vocabulary of a million tokens with its merges takes 40 MB and 4 million elements.
_MOST_HEADER_BYTES = 1 << 27
_MOST_ELEMENTS = 1 << 23
_MOST_DIMS = 4
_LARGEST_DIM = (1 << 31) - 1
_MOST_ALIGNMENT = 1 << 20

_CHUNK_ELEMENTS = 1 << 22  # dequantized at once: the library holds several copies of what it works on


@dataclass(frozen=True)
class GgufTensor:
    """Where one tensor lies.

    Attributes:
        name: its name.
        type: ggml's name of how it is stored: ``F32``, ``Q4_1``.
        shape: its dims as torch has them; the file lists them in the opposite order.
        start: position of its first byte in the file.
        num_bytes: how many bytes it takes.
    """

    name: str
    type: str
    shape: tuple[int, ...]
    start: int
    num_bytes: int


@dataclass(frozen=True)
class GgufFile:
    """An opened file: everything but the weights' values is checked.

    Attributes:
        path: the file.
        metadata: every value of the header by its key: numbers, truth values, strings, and lists of those.
        tensors: by name.
    """

    path: Path
    metadata: Mapping[str, Any]
    tensors: Mapping[str, GgufTensor]

    def read(self, name: str) -> torch.Tensor:
        """One tensor: as it is stored where its type is plain, and dequantized to float32 where it has blocks.

        Raises:
            CheckpointError: when the file changed since it was opened.
            BackendError: when the tensor has blocks and the ``gguf`` package is not installed.
        """
        tensor = self.tensors[name]
        if tensor.type in PLAIN:
            return read_tensor(StoredTensor(name, PLAIN[tensor.type], tensor.shape, self.path, tensor.start, tensor.num_bytes))
        elements, num_bytes = BLOCKS[tensor.type]
        # [..., in] -> [blocks, bytes of one]: blocks lie along rows, and rows one after another.
        blocks = (tensor.num_bytes // num_bytes, num_bytes)
        stored = read_tensor(StoredTensor(name, "uint8", blocks, self.path, tensor.start, tensor.num_bytes))
        values = torch.empty(blocks[0], elements)
        step = _CHUNK_ELEMENTS // elements
        for at in range(0, blocks[0], step):
            values[at : at + step] = dequantized(stored[at : at + step], tensor.type)
        return values.reshape(tensor.shape)


def dequantized(blocks: torch.Tensor, kind: str) -> torch.Tensor:
    """Return the numbers that ``blocks`` stand for, as ggml's reference does it.

    Args:
        blocks: uint8 [n, bytes of a block].
        kind: their type, ``Q4_1`` say.

    Returns:
        float32 [n, elements of a block].

    Raises:
        BackendError: when the ``gguf`` package is not installed.
    """
    try:
        from gguf import GGMLQuantizationType, dequantize
    except ImportError as missing:
        raise BackendError(
            f"dequantizing {kind} blocks of a GGUF file needs the gguf package ({missing}): pip install 'motrt[gguf]'"
        ) from None
    return torch.from_numpy(dequantize(blocks.numpy(), GGMLQuantizationType[kind]))


def is_gguf(path: Path) -> bool:
    """Tell whether ``path`` is a file that begins as GGUF does."""
    if file_problem(path):
        return False
    try:
        with path.open("rb") as stream:
            return stream.read(len(MAGIC)) == MAGIC
    except OSError:
        return False


def open_gguf_file(path: Path) -> GgufFile:
    """Read the header of a GGUF file and check all of it.

    Raises:
        CheckpointError: when it is missing, no GGUF file, of another version or byte order, truncated, or says what cannot be;
            naming at once every tensor that cannot be read.
    """
    if problem := file_problem(path):
        raise CheckpointError(f"{path} {problem}: --gguf takes one GGUF file")
    try:
        with path.open("rb") as stream:
            header = _Header(path, stream, path.stat().st_size)
            metadata, infos = header.read()
    except OSError as failure:
        raise CheckpointError(f"{path} can not be read ({failure.strerror}): check the path and its permissions") from failure
    return GgufFile(path, metadata, _tensors(path, infos, _data_start(path, metadata, header.position), header.size))


@dataclass(frozen=True)
class _Info:
    """A tensor as the header describes it: dims in the file's order, offset from where the data begin."""

    name: str
    dims: tuple[int, ...]
    type: int
    offset: int


class _Header:
    """The header while it is read: every length is held against the bytes that are left before it is believed."""

    def __init__(self, path: Path, stream: BinaryIO, size: int) -> None:
        self.path, self.stream, self.size = path, stream, size
        self.position = self.elements = 0

    def read(self) -> tuple[dict[str, Any], list[_Info]]:
        """The values by key, and the tensors."""
        self._check_version()
        num_tensors, num_keys = self._number("<Q"), self._number("<Q")
        self._expect(num_keys, 13, "keys")  # a length, an empty name, a type and one byte
        metadata: dict[str, Any] = {}
        for _ in range(num_keys):
            key = self._string()
            if key in metadata:
                raise self._damaged(f"the key {key!r} stands there twice")
            metadata[key] = self._value(self._number("<I"))
        self._expect(num_tensors, 24, "tensors")
        return metadata, [self._info() for _ in range(num_tensors)]

    def _check_version(self) -> None:
        if self._take(len(MAGIC)) != MAGIC:
            raise CheckpointError(f"{self.path} is no GGUF file: it does not begin with {MAGIC.decode()!r}")
        version = self._number("<I")
        if version & 0xFFFF == 0:
            raise CheckpointError(
                f"{self.path} is a GGUF file of big-endian numbers, which is not read: convert it on a "
                "big-endian machine, or get the little-endian file"
            )
        if version not in VERSIONS:
            raise CheckpointError(
                f"{self.path} is a GGUF file of version {version}: {' and '.join(map(str, VERSIONS))} are read; make it again "
                "with a llama.cpp that writes one of these"
            )

    def _info(self) -> _Info:
        name, num_dims = self._string(), self._number("<I")
        if not 1 <= num_dims <= _MOST_DIMS:
            raise self._damaged(f"{name!r} has {num_dims} dims, 1 to {_MOST_DIMS} were expected")
        dims = tuple(self._number("<Q") for _ in range(num_dims))
        return _Info(name, dims, self._number("<I"), self._number("<Q"))

    def _value(self, kind: int) -> Any:
        if kind == _ARRAY:
            return self._array()
        if kind == _STRING:
            return self._string()
        if kind not in _SCALARS:
            raise self._damaged(f"a value is of type {kind}, which GGUF does not have")
        value = self._number(_SCALARS[kind])
        return self._truth(value) if kind == _BOOL else value

    def _array(self) -> list[Any]:
        kind, count = self._number("<I"), self._number("<Q")
        if kind != _STRING and kind not in _SCALARS:
            raise self._damaged(f"an array holds elements of type {kind}: numbers and strings are read")
        self._expect(count, 8 if kind == _STRING else struct.calcsize(_SCALARS[kind]), "elements of an array")
        if kind == _STRING:
            return [self._string() for _ in range(count)]
        code = _SCALARS[kind]
        values = struct.unpack(f"<{count}{code[1]}", self._take(count * struct.calcsize(code)))
        return [self._truth(value) for value in values] if kind == _BOOL else list(values)

    def _truth(self, value: int) -> bool:
        if value not in (0, 1):
            raise self._damaged(f"a truth value is {value}")
        return bool(value)

    def _string(self) -> str:
        try:
            return self._take(self._number("<Q")).decode()
        except UnicodeDecodeError:
            raise self._damaged("a string is not UTF-8") from None

    def _number(self, code: str) -> Any:
        return struct.unpack(code, self._take(struct.calcsize(code)))[0]

    def _take(self, count: int) -> bytes:
        if count > self.size - self.position:
            raise CheckpointError(
                f"{self.path} is truncated or damaged: {count} bytes were expected at byte {self.position} of its header, "
                f"{self.size - self.position} came. Fetch it again"
            )
        if self.position + count > _MOST_HEADER_BYTES:
            raise self._damaged(f"the header goes on beyond {_MOST_HEADER_BYTES} bytes")
        taken = self.stream.read(count)
        if len(taken) != count:
            raise self._damaged("it became shorter while it was read")
        self.position += count
        return taken

    def _expect(self, count: int, least_bytes: int, what: str) -> None:
        """Refuse a count that the file is too short for, or that no model has."""
        self.elements += count
        if count * least_bytes > self.size - self.position or self.elements > _MOST_ELEMENTS:
            raise self._damaged(f"the header announces {count} {what}, more than can be")

    def _damaged(self, why: str) -> CheckpointError:
        return CheckpointError(f"{self.path} is damaged near byte {self.position} of its header: {why}. Fetch it again")


def _data_start(path: Path, metadata: Mapping[str, Any], header_bytes: int) -> int:
    """Where the tensors' bytes begin: after the header, aligned as the file says (32 where it says nothing)."""
    alignment = metadata.get("general.alignment", 32)
    is_power = isinstance(alignment, int) and 0 < alignment <= _MOST_ALIGNMENT and not alignment & (alignment - 1)
    if not is_power or alignment is True:
        raise CheckpointError(f"{path}: general.alignment must be a power of two ({alignment!r} came)")
    return header_bytes + -header_bytes % int(alignment)


def _tensors(path: Path, infos: list[_Info], data_start: int, size: int) -> dict[str, GgufTensor]:
    problems: list[str] = []
    tensors: dict[str, GgufTensor] = {}
    for info in infos:
        found = _tensor_or_problem(info, data_start, size)
        if isinstance(found, str):
            problems.append(f"{info.name!r} {found}")
        elif info.name in tensors:
            problems.append(f"{info.name!r} stands there twice")
        else:
            tensors[info.name] = found
    problems += _overlaps(list(tensors.values()))
    raise_all(CheckpointError, f"{path} holds tensors that cannot be read:", problems)
    return tensors


def _tensor_or_problem(info: _Info, data_start: int, size: int) -> GgufTensor | str:
    kind = _TYPES.get(info.type, f"number {info.type}")
    if kind not in PLAIN and kind not in BLOCKS:
        return f"is of type {kind}, which is not read: {', '.join((*PLAIN, *BLOCKS))} are"
    if not all(0 < dim <= _LARGEST_DIM for dim in info.dims):
        return f"has dims {list(info.dims)}, which no tensor has"
    elements, num_bytes = BLOCKS.get(kind, (1, _ITEM_BYTES.get(kind, 0)))
    if info.dims[0] % elements:
        return f"has rows of {info.dims[0]}, which blocks of {elements} do not fill"
    start, length = data_start + info.offset, prod(info.dims) // elements * num_bytes
    if start + length > size:
        return f"ends at byte {start + length} of a file of {size}: the file is truncated or damaged, fetch it again"
    return GgufTensor(info.name, kind, tuple(reversed(info.dims)), start, length)


def _overlaps(tensors: list[GgufTensor]) -> list[str]:
    """Tensors that share bytes, which no writer leaves."""
    ordered = sorted(tensors, key=lambda one: one.start)
    return [
        f"{later.name!r} begins inside {earlier.name!r}: the file is damaged"
        for earlier, later in pairwise(ordered)
        if later.start < earlier.start + earlier.num_bytes
    ]
