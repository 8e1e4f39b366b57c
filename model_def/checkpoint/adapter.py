"""The adapter file: ``{"adapter_state_dict": {name: tensor}, "step": n, "loss": x}``, laid over the assembled model.

Names are the Mixture-of-Transformers state's or the native ones. A table (embedding, shared head) may come whole, or as the
audio rows alone.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from motrt.errors import CheckpointError
from motrt.model_def.checkpoint import mot
from motrt.model_def.checkpoint.name_table import NameTable
from motrt.model_def.checkpoint.pickle_file import load_pickle
from motrt.model_def.checkpoint.raw_state import RawState, state_from_mapping
from motrt.model_def.checkpoint.training_state import without_prefix
from motrt.model_def.config import RopeConfig

STATE_KEY = "adapter_state_dict"

# A native name is its own translation.
_NATIVE = NameTable(
    names=(
        ("layers.{i}.attention.{w:wq|wk|wv|wo|q_norm|k_norm}.{modality}.weight",) * 2,
        ("layers.{i}.feed_forward.{modality}.{w:w1|w2|w3|down_proj|fc1|fc2|up_proj}.{p:weight|bias}",) * 2,
        ("output.{modality}.weight",) * 2,
    )
)

_ROTATED = ("attention.wq.", "attention.wk.", "attention.q_norm.", "attention.k_norm.")


@dataclass(frozen=True)
class Adapter:
    """An opened adapter file.

    Attributes:
        raw: its weights.
        note: the step and loss it was saved at, for the report.
    """

    raw: RawState
    note: str

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Native name -> dims of every key that has one."""
        named = ((native_name(key), tensor.shape) for key, tensor in self.raw.tensors.items())
        return {name: shape for name, shape in named if name is not None}


def native_name(key: str) -> str | None:
    """The native name of an adapter's key, which follows either naming."""
    return mot.TABLE.native(key) or _NATIVE.native(key)


def open_adapter(path: Path) -> Adapter:
    """Open an adapter file.

    Raises:
        CheckpointError: when it is damaged, would run code, or holds no ``adapter_state_dict``.
    """
    loaded = load_pickle(path)
    if not isinstance(loaded, Mapping) or STATE_KEY not in loaded:
        raise CheckpointError(f"{path} is no adapter file: expected a mapping with {STATE_KEY!r} in it")
    raw = state_from_mapping(path.name, loaded[STATE_KEY], f"{path}, {STATE_KEY}")
    beside = {str(name): f"beside {STATE_KEY}, no weight of the model" for name in loaded if name != STATE_KEY}
    raw = without_prefix(replace(raw, others={**beside, **raw.others}), lambda name: native_name(name) is not None)
    return Adapter(raw, f"{path.name}: {_told(loaded, 'step')}, {_told(loaded, 'loss')}")


def refuse_other_rotation(adapter: Adapter, rope: RopeConfig) -> None:
    """Raise where the adapter's query and key rows are in another order than the base model's.

    Raises:
        CheckpointError: when it brings wq, wk or their norms in the training state's naming, which is interleaved, and the
            base rotates halves.
    """
    rotated = [key for key in adapter.raw.tensors if any(part in (mot.TABLE.native(key) or "") for part in _ROTATED)]
    if rope.style == "half" and rotated:
        raise CheckpointError(
            f"{adapter.raw.source} brings {rotated[0]} ({len(rotated)} such keys), whose rows are in Meta's interleaved order, "
            "and the base is a Hugging Face folder, whose rows are in half-rotation order: convert with Meta's folder instead"
        )


def rope_note(is_scaled: bool) -> str:
    """Return the sentence that says with which RoPE an adapter is taken to have been trained."""
    if is_scaled:
        return (
            "the adapter is taken to be trained with scaled RoPE, as the base is; the public Mixture-of-Transformers code "
            "never scales, whatever params.json says: convert what it trained with --no-rope-scaling"
        )
    return "the adapter is taken to be trained with RoPE that is not scaled, as the public Mixture-of-Transformers code trains"


def _told(loaded: Mapping[str, Any], name: str) -> str:
    value = loaded.get(name)
    return f"{name} {float(value):g}" if isinstance(value, int | float | np.number) else f"{name} not told"
