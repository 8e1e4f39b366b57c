"""The two flavours of TensorRT: which module is which, and what to say where one is not to be had. The one place that chooses.

``tensorrt`` is the datacentre library: it builds on the GPU that will run the engine. ``tensorrt-rtx`` is for RTX GPUs, and
builds without one. Their Python modules have the same names inside.
"""

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from motrt.errors import BackendError
from motrt.model_def.signature import Signature, TensorSpec
from motrt.runtime.gpu import find_gpus
from motrt.runtime.versions import refuse_older


@dataclass(frozen=True)
class Flavour:
    """One of the two.

    Attributes:
        name: the target's name.
        module: what is imported.
        needs_gpu: whether building needs a GPU.
    """

    name: str
    module: str
    needs_gpu: bool


FLAVOURS = {
    "tensorrt": Flavour("tensorrt", "tensorrt", needs_gpu=True),
    "tensorrt-rtx": Flavour("tensorrt-rtx", "tensorrt_rtx", needs_gpu=False),
}


def tensorrt_module(flavour: str) -> Any:
    """The module of ``flavour``.

    Raises:
        BackendError: when it can not be imported, saying what is missing and what works without it, or is too old.
    """
    chosen = FLAVOURS[flavour]
    try:
        module = importlib.import_module(chosen.module)
    except (ImportError, OSError) as missing:  # a wheel whose own libraries are not there raises either
        other = "" if flavour == "tensorrt-rtx" else "; --target tensorrt-rtx builds on any machine, for RTX GPUs"
        raise BackendError(
            f"{chosen.module} can not be imported ({missing}): install it with `pip install 'motrt[{flavour}]'` "
            f"(its libraries are packages of their own, and can be missing after an install that looked well){other}"
        ) from None
    refuse_older(**{chosen.module: str(module.__version__)})
    return module


def tensorrt_for_building(flavour: str) -> Any:
    """The module, where it can build engines here.

    Raises:
        BackendError: when it can not be imported, or needs a GPU and there is none.
    """
    module = tensorrt_module(flavour)
    gpus = find_gpus()
    if FLAVOURS[flavour].needs_gpu and gpus.first is None:
        raise BackendError(
            f"--target {flavour} builds on the GPU that will run the engines, and {gpus.reason}: export on a machine with one, "
            "or choose --target tensorrt-rtx, which builds anywhere (for RTX GPUs)"
        )
    return module


def spec_of(module: Any, signature: Signature, name: str, dtype: Any, shape: Sequence[int]) -> TensorSpec:
    """One input or output as TensorRT has it; a dynamic dim has no name there, and is taken for the symbol that is expected."""
    names = {
        module.DataType.INT64: "int64",
        module.DataType.FLOAT: "float32",
        module.DataType.HALF: "float16",
        module.DataType.BF16: "bfloat16",
    }
    wanted = next((spec.dims for spec in (*signature.inputs, *signature.outputs) if spec.name == name), ())
    dims = tuple(
        wanted[axis] if size == -1 and axis < len(wanted) and isinstance(wanted[axis], str) else int(size)
        for axis, size in enumerate(shape)
    )
    return TensorSpec(name, names.get(dtype, str(dtype)), dims)
