"""Foreign weights as they lie: names, shapes and dtypes at once, values one at a time. No format's names are known here.

What wraps a module during training (torch.compile, DistributedDataParallel, activation checkpointing, FSDP) leaves a word in
the names of its weights; such words are taken off, and the report says so.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from math import prod
from pathlib import Path
from typing import Any

import torch

from motrt.errors import CheckpointError, raise_all
from motrt.model_def.checkpoint.container import StoredTensor, dtype_name, read_header, read_tensor

# Words in a name -> what put it there.
WRAPPERS = {
    "_orig_mod": "torch.compile",
    "module": "DistributedDataParallel",
    "_checkpoint_wrapped_module": "activation checkpointing",
    "_fsdp_wrapped_module": "FSDP",
    "_forward_module": "Lightning Fabric",
}


@dataclass(frozen=True)
class RawTensor:
    """One tensor of a foreign file, not loaded.

    Attributes:
        name: its name there, without what a wrapper added.
        shape: its dims.
        dtype: torch's spelling (``bfloat16``) of what reading it gives.
        stored: the type of the blocks that it is dequantized from; None where its numbers are stored as they are.
        stored_bytes: what those blocks take.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    stored: str | None = None
    stored_bytes: int = 0

    @property
    def num_bytes(self) -> int:
        """Bytes in the file."""
        return self.stored_bytes if self.stored else prod(self.shape) * int(getattr(torch, self.dtype).itemsize)

    @property
    def is_float(self) -> bool:
        return self.dtype in ("float64", "float32", "float16", "bfloat16")


@dataclass(frozen=True)
class RawState:
    """A foreign state: what it holds, and how to read one of them.

    Attributes:
        source: what reports call it, usually the file's or folder's name.
        tensors: by name.
        read: a name -> its value.
        others: entries that give no weight: name -> why.
        notes: what the report should say of how it was read.
    """

    source: str
    tensors: Mapping[str, RawTensor]
    read: Callable[[str], torch.Tensor]
    others: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def state_from_mapping(source: str, values: Any, where: str) -> RawState:
    """Return the state that a loaded ``{name: tensor}`` is.

    Args:
        source: what reports call it.
        values: what was loaded.
        where: the file, for the error.

    Raises:
        CheckpointError: when it is no mapping from names to tensors, or tensors in it have no values.
    """
    if not isinstance(values, Mapping) or not all(isinstance(name, str) for name in values):
        raise CheckpointError(f"{where} should hold a mapping from names to tensors ({type(values).__name__} came)")
    # A file can give a tensor attributes that hide its methods; what is detached has none.
    values = {name: torch.Tensor.detach(value) if isinstance(value, torch.Tensor) else value for name, value in values.items()}
    empty = [name for name, value in values.items() if isinstance(value, torch.Tensor) and value.is_meta]
    advice = "these are on the meta device and have no values: load the model before it is saved"
    raise_all(CheckpointError, f"{where} should hold tensors with values; {advice}:", empty)
    others = {name: why for name, value in values.items() if (why := _why_not_dense(value))}
    dense = {name: value for name, value in values.items() if name not in others}
    if not dense:
        raise CheckpointError(f"{where} should hold tensors by name, and holds none: is it the right file?")
    tensors = {name: RawTensor(name, tuple(value.shape), dtype_name(value.dtype)) for name, value in dense.items()}
    return unwrapped(RawState(source, tensors, lambda name: dense[name].resolve_neg(), others))


def state_from_safetensors(source: str, files: Iterable[Path]) -> RawState:
    """Return the state that one or several safetensors files hold together.

    Raises:
        CheckpointError: when one is damaged, or a name stands in two of them.
    """
    stored: dict[str, StoredTensor] = {}
    problems: list[str] = []
    for file in files:
        header = read_header(file)
        problems += [f"{name} is in {stored[name].file.name} and in {file.name}" for name in header if name in stored]
        stored.update(header)
    raise_all(CheckpointError, f"{source} holds a tensor twice:", problems)
    tensors = {name: RawTensor(name, one.shape, one.dtype) for name, one in stored.items()}
    return unwrapped(RawState(source, tensors, lambda name: read_tensor(stored[name])))


def joined(source: str, states: Iterable[RawState]) -> RawState:
    """Return several files' states as one.

    Raises:
        CheckpointError: when a name stands in two of them.
    """
    owners: dict[str, RawState] = {}
    others: dict[str, str] = {}
    problems: list[str] = []
    notes: dict[str, None] = {}
    for state in states:
        problems += [f"{name} is in {owners[name].source} and in {state.source}" for name in state.tensors if name in owners]
        owners |= dict.fromkeys(state.tensors, state)
        others |= state.others
        notes |= dict.fromkeys(state.notes)
    raise_all(CheckpointError, f"{source} holds a tensor twice:", problems)
    tensors = {name: state.tensors[name] for name, state in owners.items()}
    return RawState(source, tensors, lambda name: owners[name].read(name), others, tuple(notes))


def unwrapped(raw: RawState) -> RawState:
    """Return ``raw`` without the words that wrappers left in its names.

    Raises:
        CheckpointError: when two names are then the same.
    """
    found = {word for name in raw.tensors for word in name.split(".") if word in WRAPPERS}
    if not found:
        return raw
    note = ", ".join(f"{word}. ({WRAPPERS[word]})" for word in sorted(found))
    return renamed(raw, without_wrappers, f"{raw.source}: taken off its names: {note}")


def renamed(raw: RawState, new_name: Callable[[str], str | None], note: str) -> RawState:
    """Return ``raw`` under other names; a name that becomes None joins what gives no weight.

    Raises:
        CheckpointError: when two names become the same.
    """
    originals: dict[str, str] = {}
    others, problems = dict(raw.others), []
    for name in raw.tensors:
        new = new_name(name)
        if new is None:
            others[name] = f"beside the model's weights: {note}"
        elif new in originals:
            problems.append(f"{originals[new]} and {name} are both {new}")
        else:
            originals[new] = name
    raise_all(CheckpointError, f"{raw.source}: {note}, and these would be one:", problems)
    tensors = {new: replace(raw.tensors[name], name=new) for new, name in originals.items()}
    return replace(raw, tensors=tensors, read=lambda name: raw.read(originals[name]), others=others, notes=(*raw.notes, note))


def without_wrappers(name: str) -> str:
    """Return ``name`` without the words that wrappers left in it."""
    return ".".join(word for word in name.split(".") if word not in WRAPPERS)


def _why_not_dense(value: Any) -> str | None:
    """Why ``value`` gives no weight; None where it is a dense tensor with storage of its own for each element."""
    if not isinstance(value, torch.Tensor):
        return f"not a tensor ({type(value).__name__})"
    if value.is_nested or value.layout != torch.strided or value.is_quantized:
        kind = "nested" if value.is_nested else "quantized" if value.is_quantized else str(value.layout).removeprefix("torch.")
        return f"not a dense tensor ({kind})"
    reach = 1 + sum((size - 1) * stride for size, stride in zip(value.shape, value.stride(), strict=True))
    if value.numel() > reach:
        return f"not a dense tensor (its {value.numel()} elements share {reach} places)"
    return None
