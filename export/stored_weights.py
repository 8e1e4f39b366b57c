"""Initializers of an ONNX graph and the files that their values lie in.

A graph may name any file of the machine: only its neighbours are read, which may be links.
"""

from collections.abc import Iterable
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import TensorProto

from motrt.errors import BundleError
from motrt.model_def.file_problem import named_file_problem

TORCH_OF_ONNX: dict[int, torch.dtype] = {
    TensorProto.FLOAT: torch.float32,
    TensorProto.DOUBLE: torch.float64,
    TensorProto.FLOAT16: torch.float16,
    TensorProto.BFLOAT16: torch.bfloat16,
    TensorProto.FLOAT8E4M3FN: torch.float8_e4m3fn,
    TensorProto.INT8: torch.int8,
    TensorProto.INT4: torch.int8,  # unpacked: PyTorch has no number of four bits
}

_HALF_BYTES = (TensorProto.INT4, TensorProto.UINT4, TensorProto.FLOAT4E2M1)


def read_graph(file: Path) -> onnx.ModelProto:
    """The graph in an ONNX file; values that lie elsewhere are left there.

    Raises:
        BundleError: when it is no ONNX file.
    """
    try:
        model = onnx.load(file, load_external_data=False)
    except Exception as failure:  # protobuf's own exceptions
        raise BundleError(f"{file} is no ONNX file ({failure}): fetch or export it again") from None
    if not model.graph.node:
        raise BundleError(f"{file} is no ONNX file: it holds no graph")
    return model


def dtype_name(data_type: int) -> str:
    """The numpy name of an ONNX element type; ``unknown`` for what has none."""
    known = data_type in TensorProto.DataType.values() and data_type != TensorProto.UNDEFINED
    return str(onnx.helper.tensor_dtype_to_np_dtype(data_type)) if known else "unknown"


def num_bytes(tensor: TensorProto) -> int:
    """Bytes of an initializer's values; 0 for strings, and for types without a size."""
    if dtype_name(tensor.data_type) in ("unknown", "object"):
        return 0
    if tensor.data_type in _HALF_BYTES:
        return (prod(map(int, tensor.dims)) + 1) // 2
    itemsize = np.dtype(onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)).itemsize
    return prod(map(int, tensor.dims)) * itemsize


def data_files(tensors: Iterable[TensorProto], folder: Path) -> tuple[list[Path], list[str]]:
    """The files of external data that lie in ``folder``, and the names of those that are missing, or lie elsewhere."""
    names = sorted({_entries(one).get("location", "") for one in tensors if one.data_location == TensorProto.EXTERNAL})
    absent = [name for name in names if not _is_beside(name, folder)]
    return [folder / name for name in names if name not in absent], absent


def data_place(tensor: TensorProto) -> tuple[str, str, str]:
    """File, first byte and number of bytes of an initializer's external data, as the graph writes them."""
    entries = _entries(tensor)
    return entries.get("location", ""), entries.get("offset", "0"), entries.get("length", "")


def weight_places(model_file: Path, names: Iterable[str], dtype: str) -> dict[str, tuple[int, int]]:
    """First byte and number of bytes in the graph's one data file, of those of ``names`` that are stored there as ``dtype``."""
    stored = {one.name: one for one in read_graph(model_file).graph.initializer}
    found = [stored[name] for name in names if name in stored]
    return {
        one.name: (int(data_place(one)[1]), num_bytes(one))
        for one in found
        if one.data_location == TensorProto.EXTERNAL and dtype_name(one.data_type) == dtype
    }


def stored_bytes(tensor: TensorProto, folder: Path) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """The bytes of one initializer, from the graph or from its external data in ``folder``.

    Raises:
        BundleError: when the data are missing, lie outside the folder, or are not as many as dims and type say.
    """
    entries, count = _entries(tensor), num_bytes(tensor)
    if any(dim < 0 for dim in tensor.dims):
        raise BundleError(f"{tensor.name} has the dims {list(tensor.dims)}: fetch or export its file again")
    if tensor.data_location != TensorProto.EXTERNAL:
        return np.frombuffer(bytearray(_in_the_graph(tensor).tobytes()), np.uint8)
    location, offset = entries.get("location", ""), entries.get("offset", "0")
    if not _is_beside(location, folder):
        raise BundleError(f"the values of {tensor.name} should lie in {folder}, not in {location!r}: fetch or export it again")
    file = folder / location
    if not offset.isdecimal() or int(offset) + count > file.stat().st_size:
        raise BundleError(f"{file} is too short for {tensor.name} ({count} bytes from {offset}): fetch or export it again")
    return np.fromfile(file, np.uint8, count=count, offset=int(offset))


def stored_tensor(tensor: TensorProto, folder: Path) -> torch.Tensor:
    """One initializer of a type in ``TORCH_OF_ONNX``, in its dims.

    Raises:
        BundleError: as ``stored_bytes``, and for another type.
    """
    dims = tuple(tensor.dims)
    if tensor.data_type not in TORCH_OF_ONNX:
        raise BundleError(f"{tensor.name} is of type {dtype_name(tensor.data_type)}, which no weight is: export it again")
    if tensor.data_type == TensorProto.INT4 and tensor.data_location != TensorProto.EXTERNAL:
        return torch.from_numpy(_in_the_graph(tensor).astype(np.int8)).reshape(dims)
    values = torch.from_numpy(stored_bytes(tensor, folder))
    if tensor.data_type == TensorProto.INT4:
        return _unpacked(values)[: prod(dims)].reshape(dims)
    return values.view(TORCH_OF_ONNX[tensor.data_type]).reshape(dims)


def _in_the_graph(tensor: TensorProto) -> np.ndarray[Any, Any]:
    try:
        return onnx.numpy_helper.to_array(tensor)
    except Exception as failure:  # of many kinds, one for every way in which type, dims and values can disagree
        raise BundleError(f"{tensor.name} does not hold what it says ({failure}): fetch or export its file again") from None


def _unpacked(pairs: torch.Tensor) -> torch.Tensor:
    """Two codes of four bits from every byte, the low half first, their sign bits carried into int8."""
    low, high = (pairs << 4).view(torch.int8) >> 4, pairs.view(torch.int8) >> 4
    return torch.stack((low, high), dim=1).flatten()


def _entries(tensor: TensorProto) -> dict[str, str]:
    return {_text(item.key): _text(item.value) for item in tensor.external_data}


def _text(value: str | bytes) -> str:
    """Protobuf gives bytes for what is no UTF-8."""
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else value


def _is_beside(name: str, folder: Path) -> bool:
    return named_file_problem(folder, name) is None
