"""Checkpoints whose weights are already quantized: recognised and refused by what they are.

Unpacking them would hand a rounded model to the reference, against which the export is then proven: what is exported would be
the rounded one. Convert what was quantized, and let ``motrt export --precision`` quantize.
"""

from collections.abc import Iterable, Mapping
from typing import Any

from motrt.errors import CheckpointError

_REMEDY = "convert the checkpoint that was quantized, and quantize with `motrt export --precision int4` or int8"

# Ends of names -> the method that writes them; the first that matches all its ends counts.
_SIGNS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("GPTQ", (".qweight", ".g_idx")),
    ("AWQ", (".qweight", ".qzeros")),
    ("packed integers", (".qweight",)),
    ("compressed-tensors", (".weight_packed",)),
    ("bitsandbytes, 4 bits", (".absmax",)),
    ("bitsandbytes, 8 bits", (".SCB",)),
    ("FP8 with a scale", (".weight_scale_inv",)),
    ("quantized weights with a scale", (".weight_scale",)),
    ("MLX, packed", (".scales", ".biases")),
    ("HQQ", (".W_q",)),
)


def quantized_config_problem(settings: Any) -> str:
    """Return what a ``quantization_config`` says is wrong."""
    method = settings.get("quant_method") if isinstance(settings, Mapping) else None
    return f"the weights are quantized ({method or 'by a method it does not name'}): {_REMEDY}"


def refuse_quantized(names: Iterable[str], where: str) -> None:
    """Raise where names are those of quantized weights.

    Raises:
        CheckpointError: naming the method and one of the names.
    """
    names = list(names)
    for method, ends in _SIGNS:
        found = [next((name for name in names if name.endswith(end)), None) for end in ends]
        if all(found):
            raise CheckpointError(f"{where} holds quantized weights ({method}; {found[0]}): {_REMEDY}")
