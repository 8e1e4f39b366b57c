"""Which weight comes from which key of which source, and what became of every other key.

Sources are laid one over the other, the one that prevails first: a weight that has its value keeps it. Nothing is read until
the assembled model is. This file knows neither the formats nor what a missing weight may be replaced by.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch

from motrt.model_def.checkpoint.accounting import KeyRow, Outcome
from motrt.model_def.checkpoint.container import TORCH_DTYPES
from motrt.model_def.checkpoint.raw_state import RawState


@dataclass(frozen=True)
class Target:
    """A weight that a key gives, from these of its rows; from all where ``rows`` is None."""

    name: str
    rows: range | None = None


@dataclass(frozen=True)
class Origin:
    """Where one weight's value comes from."""

    source: str
    key: str
    dtype: str | None
    read: Callable[[], torch.Tensor]


class Placement:
    """The sources laid so far.

    Args:
        shapes: every weight that is wanted, with its dims.
    """

    def __init__(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        self.shapes = dict(shapes)
        self.origins: dict[str, Origin] = {}
        self.rows: list[KeyRow] = []
        self._misshapen: set[str] = set()

    def note(self, raw: RawState, key: str, outcome: Outcome, detail: str) -> None:
        """Say what became of a key that gives no weight."""
        self.rows.append(KeyRow(key, raw.source, outcome, detail))

    def note_others(self, raw: RawState) -> None:
        """Say of every entry that gives no weight why it gives none."""
        for name, why in raw.others.items():
            self.note(raw, name, "ignored", why)

    def put(self, raw: RawState, key: str, targets: Iterable[Target], expected: str | None = None) -> None:
        """Let ``key`` of ``raw`` give ``targets``, as far as they have no value yet and it fits.

        Args:
            raw: the source.
            key: its key.
            targets: the weights it gives.
            expected: the dims to name when it does not fit; those of the first target where None.
        """
        tensor = raw.tensors[key]
        wanted = [target for target in targets if target.name in self.shapes]
        free = [target for target in wanted if target.name not in self.origins]
        if not wanted:
            self.note(raw, key, "unexpected", f"{list(tensor.shape)}, and the model has no such weight")
        elif not free:
            prevailing = self.origins[wanted[0].name]
            is_twice = prevailing.source == raw.source
            self.note(raw, key, "unexpected" if is_twice else "ignored", f"given by {prevailing.key} of {prevailing.source}")
        elif not tensor.is_float or not all(self._fits(tensor.shape, target) for target in free):
            came = f"is {list(tensor.shape)} {tensor.dtype}"
            self.note(raw, key, "misshapen", f"{came}, {expected or list(self.shapes[free[0].name])} floats expected")
            self._misshapen.update(target.name for target in free)
        else:
            for target in free:
                self.origins[target.name] = Origin(raw.source, key, tensor.dtype, _reader(raw, key, target))
            if tensor.stored is not None:
                self.note(raw, key, "dequantized", f"{tensor.stored} to {tensor.dtype}")
            else:
                self.note(raw, key, "loaded", f"{list(tensor.shape)} {tensor.dtype} as {', '.join(one.name for one in free)}")

    def copy(self, name: str, original: str, detail: str) -> None:
        """Let ``name``, which has no value, have that of ``original``, which has."""
        origin = self.origins[original]
        self.origins[name] = origin
        self.rows.append(KeyRow(name, origin.source, "copied", detail))

    def initialise(self, name: str, read: Callable[[], torch.Tensor], detail: str) -> None:
        """Let ``name``, which no source has, be what ``read`` makes."""
        self.origins[name] = Origin("made here", name, None, read)
        self.rows.append(KeyRow(name, "made here", "initialised", detail))

    def without_origin(self) -> list[str]:
        """The weights that have no value and were not given one of the wrong shape."""
        return [name for name in self.shapes if name not in self.origins and name not in self._misshapen]

    def finish(self, foreign: Callable[[str], tuple[str, str | None]]) -> None:
        """Say of every weight that has no value that it is missing.

        Args:
            foreign: a weight -> the source that should have had it, and the key there (None: it has no name there).
        """
        for name in self.without_origin():
            source, key = foreign(name)
            self.rows.append(KeyRow(key or name, source, "missing", f"{list(self.shapes[name])}, for {name}"))

    def dtype(self) -> str:
        """The narrowest dtype that holds every source's values exactly."""
        dtypes = [TORCH_DTYPES[origin.dtype] for origin in self.origins.values() if origin.dtype is not None]
        widest = dtypes[0] if dtypes else torch.float32
        for dtype in dtypes[1:]:
            widest = torch.promote_types(widest, dtype)
        return str(widest).removeprefix("torch.")

    def _fits(self, shape: tuple[int, ...], target: Target) -> bool:
        if target.rows is None:
            return shape == self.shapes[target.name]
        inside = bool(shape) and target.rows.stop <= shape[0]
        return inside and (len(target.rows), *shape[1:]) == self.shapes[target.name]


def _reader(raw: RawState, key: str, target: Target) -> Callable[[], torch.Tensor]:
    if target.rows is None:
        return lambda: raw.read(key)
    start, stop = target.rows.start, target.rows.stop
    return lambda: raw.read(key)[start:stop].clone()
