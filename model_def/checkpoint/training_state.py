"""A state as a training run saved it: under a key, beside an optimizer, in one file or in a distributed checkpoint's folder."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from motrt.errors import CheckpointError
from motrt.model_def.checkpoint.distributed import is_distributed, open_distributed
from motrt.model_def.checkpoint.pickle_file import SHARDED, load_pickle
from motrt.model_def.checkpoint.raw_state import RawState, renamed, state_from_mapping, state_from_safetensors

STATE_KEYS = ("model_state_dict", "state_dict", "model", "module")
"""Where training runs put the weights (``module``: DeepSpeed). Nested keys are followed, as Lightning nests them."""

_MOST_NESTING = 4


def open_training_state(path: Path, is_known: Callable[[str], bool]) -> RawState:
    """Open the state in ``path``, mapped and not read.

    Args:
        path: a file that torch.save wrote, a safetensors file, or a folder of torch.distributed.checkpoint.
        is_known: whether a name is one of the format's, by which a prefix (``model.``) is told from a part of the name.

    Raises:
        CheckpointError: when it is damaged, foreign, ambiguous, or would run code.
    """
    if is_distributed(path):
        return without_prefix(open_distributed(path), is_known)
    if path.suffix == ".safetensors":
        return without_prefix(state_from_safetensors(path.name, [path]), is_known)
    inner, beside = inner_state(load_pickle(path), path)
    raw = state_from_mapping(path.name, inner, str(path))
    flat = [name for name in raw.tensors if name.endswith("flat_param")]
    if flat:
        raise CheckpointError(f"{path} holds FSDP's flat parameters ({flat[0]}), which are {SHARDED}")
    return without_prefix(replace(raw, others={**beside, **raw.others}), is_known)


def inner_state(loaded: Any, where: Path) -> tuple[Any, dict[str, str]]:
    """Return the mapping of names to tensors inside ``loaded``, and why each entry beside it gives no weight.

    Raises:
        CheckpointError: when two entries could be the state.
    """
    beside: dict[str, str] = {}
    for _ in range(_MOST_NESTING):
        found = [key for key in STATE_KEYS if isinstance(loaded, Mapping) and _holds_tensors(loaded.get(key))]
        if len(found) > 1:
            raise CheckpointError(
                f"{where} holds {' and '.join(found)}: which is meant cannot be told, so save one of them alone"
            )
        if not found:
            break
        beside |= {str(name): f"beside {found[0]}, no weight of the model" for name in loaded if name != found[0]}
        loaded = loaded[found[0]]
    return loaded, beside


def _holds_tensors(value: Any, depth: int = _MOST_NESTING) -> bool:
    """Whether ``value`` is a state, or holds one under one of the usual keys."""
    if not isinstance(value, Mapping) or not depth:
        return False
    is_state = any(isinstance(one, torch.Tensor) for one in value.values())
    return is_state or any(_holds_tensors(value.get(key), depth - 1) for key in STATE_KEYS)


def without_prefix(raw: RawState, is_known: Callable[[str], bool]) -> RawState:
    """Return ``raw`` without a prefix that a trainer's module (Lightning) or a distributed checkpoint gave its names."""
    if any(is_known(name) for name in raw.tensors):
        return raw
    for key in STATE_KEYS:
        prefix = f"{key}."
        if any(is_known(name.removeprefix(prefix)) for name in raw.tensors if name.startswith(prefix)):
            note = f"{raw.source}: the model's weights are those under {prefix}"
            return renamed(raw, lambda name: name.removeprefix(prefix) if name.startswith(prefix) else None, note)  # noqa: B023
    return raw
