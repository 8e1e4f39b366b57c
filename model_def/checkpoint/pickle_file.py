"""A ``.pt``, ``.pth`` or ``.bin`` file: unpickled with ``weights_only=True``, its tensors mapped and not read.

Tensors and plain containers come in. Of other data that training runs save beside their weights (numpy's scalars and arrays,
arguments, paths) a stand-in comes in, which is nothing but the number where it is one. Anything else is refused by name, unless
the process itself has allowed it with ``torch.serialization.add_safe_globals``.
"""

import re
import struct
import threading
import zipfile
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch

from motrt.errors import CheckpointError


class Inert:
    """Stands in for data that training runs save beside their weights and that is not needed: takes anything, keeps nothing."""

    def __new__(cls, *_: Any, **__: Any) -> "Inert":
        return super().__new__(cls)

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def __setstate__(self, _: Any) -> None:
        pass


class NumberType(Inert):
    """Stands in for a numpy dtype: knows the code of a number, as in ``f8``, and nothing else that the file says of it."""

    def __init__(self, code: Any = "", *_: Any, **__: Any) -> None:
        self.code = code if isinstance(code, str) else ""


def number_of(kind: Any = None, data: Any = b"") -> Any:
    """Return the number that a numpy scalar is (a loss, a step); of another scalar, nothing."""
    layout = _LAYOUTS.get(kind.code) if isinstance(kind, NumberType) else None
    if layout is None or not isinstance(data, bytes) or len(data) != struct.calcsize(layout):
        return Inert()
    return struct.unpack(layout, data)[0]


_LAYOUTS = {
    "f8": "<d",
    "f4": "<f",
    "f2": "<e",
    "i8": "<q",
    "i4": "<i",
    "i2": "<h",
    "i1": "<b",
    "u8": "<Q",
    "u4": "<I",
    "b1": "<?",
}

# What is taken for each name. None of the named things themselves come in: numpy's can be told to write anywhere.
_STAND_INS: list[Any] = [
    *((number_of, f"numpy.{package}.multiarray.scalar") for package in ("core", "_core")),
    *((Inert, f"numpy.{package}.multiarray._reconstruct") for package in ("core", "_core")),
    *((NumberType, "numpy.dtype"), (Inert, "numpy.ndarray"), (Inert, "argparse.Namespace")),
    *((Inert, f"{module}.{kind}") for module in ("pathlib", "pathlib._local") for kind in ("PosixPath", "PurePosixPath")),
]

# torch keeps what it allows for the whole process: two threads would take it from each other.
_ALLOWING = threading.Lock()

# The beginning of a refused type's name -> what such a file is, and what to do.
SHARDED = (
    "shards of a distributed run, which one process cannot put together: gather them first, "
    "torch.distributed.checkpoint.state_dict.get_model_state_dict(model, "
    "options=StateDictOptions(full_state_dict=True, cpu_offload=True)), and save that"
)
_QUANTIZED = "quantized weights, which are not read: convert the checkpoint that was quantized, and quantize at export"
_KNOWN_CODE = {
    "torch.distributed.": SHARDED,
    "torchao.": _QUANTIZED,
    "bitsandbytes.": _QUANTIZED,
    "torch.ao.": _QUANTIZED,
}


def load_pickle(path: Path) -> Any:
    """Return what a PyTorch file holds, its tensors mapped and not yet read.

    Raises:
        CheckpointError: when it is missing, truncated, compressed, of another kind, or would run code.
    """
    if path.is_dir():
        raise CheckpointError(f"{path} is a folder: expected a file that torch.save wrote")
    _refuse_compressed(path)
    try:
        with _ALLOWING, torch.serialization.safe_globals(_STAND_INS):
            return torch.load(path, mmap=True, weights_only=True, map_location="cpu")
    except OSError as failure:
        raise CheckpointError(f"{path} can not be read ({failure.strerror}): check the path and its permissions") from None
    except UnpicklingError as failure:
        raise CheckpointError(_pickled_code(path, str(failure))) from None
    except Exception as failure:  # torch's readers raise RuntimeError, EOFError, KeyError, struct.error... for damaged files
        raise CheckpointError(_unreadable(path, failure)) from None


def _refuse_compressed(path: Path) -> None:
    """Raise where a member of the zip is compressed: mapping it would take compressed bytes for weights."""
    try:
        with zipfile.ZipFile(path) as archive:
            compressed = [one.filename for one in archive.infolist() if one.compress_type != zipfile.ZIP_STORED]
    except OSError:
        return  # torch.load meets it again, and its error is told
    except Exception as failure:  # BadZipFile, NotImplementedError, struct.error...: what is no zip cannot be mapped
        raise CheckpointError(_unreadable(path, failure)) from None
    if compressed:
        again = f"torch.save(torch.load({path.name!r}, weights_only=True), 'plain.pt')"
        raise CheckpointError(
            f"{path} is a zip whose members are compressed ({compressed[0]}, {len(compressed)} in all), which torch.save never "
            f"writes and which cannot be mapped: write it again, {again}"
        )


def _pickled_code(path: Path, message: str) -> str:
    found = re.search(r"GLOBAL ([\w.]+)|got <class '([\w.]+)'>", message)
    if found is None:
        return _unreadable(path, message.rpartition("WeightsUnpickler error: ")[2].strip())
    name = found[1] or found[2]
    for beginning, meaning in _KNOWN_CODE.items():
        if name.startswith(beginning):
            return f"{path} holds {name}: {meaning}"
    return (
        f"{path} holds pickled code ({name}), which is refused because unpickling it would run it: "
        "save the tensors alone, torch.save(model.state_dict(), path), where the file came from"
    )


def _unreadable(path: Path, why: Exception | str) -> str:
    with path.open("rb") as stream:
        is_zip = stream.read(2) == b"PK"
    if is_zip:
        first_line = next(iter(str(why).splitlines()), "") or type(why).__name__
        return f"{path} is truncated or damaged ({first_line[:160]}): fetch or save it again"
    return (
        f"{path} is not a PyTorch file of the zip format (or is truncated at its very beginning): "
        "save it with torch.save of PyTorch 1.6 or later"
    )
