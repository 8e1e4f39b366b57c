"""A ``.pt``, ``.pth`` or ``.bin`` file: unpickled with ``weights_only=True``, its tensors mapped and not read.

Tensors, plain containers, and the few kinds of data in ``_DATA_TYPES`` come in; code does not.
"""

import argparse
import pathlib
import re
import zipfile
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import numpy as np
import torch

from motrt.errors import CheckpointError

# What training runs save beside their weights: the loss as a numpy scalar, the state of a random generator, the arguments.
# Each only holds data. numpy 1 and 2 name the two functions differently.
_MAKERS: tuple[Any, ...] = (np.float64(0).__reduce__()[0], np.zeros(1).__reduce__()[0])
_DATA_TYPES: list[Any] = [
    *((made, f"numpy.{package}.multiarray.{made.__name__}") for made in _MAKERS for package in ("core", "_core")),
    *(np.ndarray, np.dtype, *(type(np.dtype(code)) for code in "?bBhHiIlLqQefdFDSU")),
    *(argparse.Namespace, pathlib.PosixPath, pathlib.PurePosixPath),
]

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
        with torch.serialization.safe_globals(_DATA_TYPES):
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
