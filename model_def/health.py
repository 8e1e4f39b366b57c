"""What weights tell of themselves: values that are no numbers, rows that were never trained.

A table that was grown for a new modality by zero rows looks like any other checkpoint, exports, runs and says nothing. So
the rows of the embedding and of the head are looked at, by modality, in unified ids.

The rule. A row is *flat* when all its values are equal (zero is the usual case): nothing ever moved them apart. A few flat
rows are reported and accepted, since published checkpoints hold reserved ids that no text contains. When *every* row of a
modality is flat in the embedding or in the head, that modality is dead there and ``refuse_untrained`` refuses the model. This
file reads one tensor at a time and knows no file format.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch

from motrt.errors import CheckpointError, UntrainedRowsError, raise_all
from motrt.model_def.config import ModelConfig
from motrt.model_def.head_surgery import Read
from motrt.model_def.parameters import Parameter, parameters

_CHUNK = 1 << 24  # elements looked at together, so that the intermediate masks stay small

REMEDY = (
    "train them (policy adapters+new-rows for both tables, adapters+audio-head for a split head: see "
    "motrt.model_def.trainable) and convert with the trained rows, or pass --allow-untrained to go on all the same"
)


@dataclass(frozen=True)
class NonFinite:
    """How many values of one tensor are NaN or infinite."""

    name: str
    num_nan: int
    num_inf: int

    def __str__(self) -> str:
        return f"{self.name} holds {self.num_nan} NaN and {self.num_inf} infinite values"


@dataclass(frozen=True)
class FlatRows:
    """Rows of one table, of one modality, whose values are all equal.

    Attributes:
        table: the tensor's name.
        part: ``embedding`` or ``head``.
        modality: whose ids these are.
        ids: the rows as unified ids, in ranges that do not touch.
        num_zero: how many of them are zero throughout.
        is_whole_modality: whether every row of the modality is among them.
    """

    table: str
    part: str
    modality: str
    ids: tuple[range, ...]
    num_zero: int
    is_whole_modality: bool

    @property
    def num_rows(self) -> int:
        return sum(map(len, self.ids))

    def __str__(self) -> str:
        what = "zero" if self.num_zero == self.num_rows else "constant"
        rows = ", ".join(f"{ids.start} to {ids.stop - 1}" if len(ids) > 1 else str(ids.start) for ids in self.ids)
        extent = f"all {self.num_rows}" if self.is_whole_modality else str(self.num_rows)
        return f"{self.modality} rows {rows} of {self.table} ({extent} of that modality) are {what}"


@dataclass(frozen=True)
class Health:
    """What ``diagnose`` found.

    Attributes:
        non_finite: tensors with NaN or infinite values.
        flat_rows: embedding and head rows that are zero or constant, by table and modality.
        zero_weights: matrices that are zero throughout (a product that does nothing), tables excepted.
    """

    non_finite: tuple[NonFinite, ...]
    flat_rows: tuple[FlatRows, ...]
    zero_weights: tuple[str, ...]

    @property
    def untrained(self) -> tuple[FlatRows, ...]:
        """The tables in which a whole modality is flat: what is refused."""
        return tuple(rows for rows in self.flat_rows if rows.is_whole_modality)

    @property
    def problems(self) -> tuple[str, ...]:
        """Everything found, as sentences; none in a healthy model."""
        zero = [f"{name} is zero throughout" for name in self.zero_weights]
        return (*map(str, self.non_finite), *map(str, self.flat_rows), *zero)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; ranges are [first, last] ids."""
        return {
            "non_finite": [{"name": one.name, "nan": one.num_nan, "inf": one.num_inf} for one in self.non_finite],
            "flat_rows": [
                {
                    "table": rows.table,
                    "part": rows.part,
                    "modality": rows.modality,
                    "ids": [[ids.start, ids.stop - 1] for ids in rows.ids],
                    "rows": rows.num_rows,
                    "zero_rows": rows.num_zero,
                    "whole_modality": rows.is_whole_modality,
                }
                for rows in self.flat_rows
            ],
            "zero_weights": list(self.zero_weights),
            "problems": list(self.problems),
        }


def diagnose(config: ModelConfig, read: Read) -> Health:
    """Look at every weight, one tensor in memory at a time.

    Args:
        config: what the weights are a model of.
        read: a weight's name -> its value.
    """
    non_finite: list[NonFinite] = []
    flat_rows: list[FlatRows] = []
    zero_weights: list[str] = []
    for parameter in parameters(config):
        tensor = read(parameter.name)
        num_nan, num_inf = _count_non_finite(tensor)
        if num_nan or num_inf:
            non_finite.append(NonFinite(parameter.name, num_nan, num_inf))
        if parameter.part in ("embedding", "head"):
            flat_rows += _flat_rows(config, parameter, tensor)
        elif _is_zero_matrix(tensor):
            zero_weights.append(parameter.name)
    return Health(tuple(non_finite), tuple(flat_rows), tuple(zero_weights))


def scan(values: Iterable[tuple[str, torch.Tensor]], advance: Callable[[int], None]) -> Health:
    """Look at weights where nothing says what they are a model of: values that are no numbers, matrices of zeros.

    Args:
        values: name and value, one in memory at a time.
        advance: told the bytes of each.
    """
    non_finite: list[NonFinite] = []
    zero_weights: list[str] = []
    for name, tensor in values:
        num_nan, num_inf = _count_non_finite(tensor) if tensor.numel() else (0, 0)
        if num_nan or num_inf:
            non_finite.append(NonFinite(name, num_nan, num_inf))
        if _is_zero_matrix(tensor):
            zero_weights.append(name)
        advance(tensor.nbytes)
    return Health(tuple(non_finite), (), tuple(zero_weights))


def refuse_untrained(health: Health, allow_untrained: bool = False) -> None:
    """Raise where the model can not be used: always for values that are no numbers, for dead modalities unless allowed.

    Raises:
        CheckpointError: when any weight is NaN or infinite, naming every such tensor.
        UntrainedRowsError: when every embedding or head row of a modality is zero or constant, naming rows and remedy.
    """
    raise_all(
        CheckpointError,
        "weights that are no finite numbers (check the training run, or a conversion to float16 that overflowed):",
        [str(one) for one in health.non_finite],
    )
    if allow_untrained or not health.untrained:
        return
    rows = "\n  - ".join(map(str, health.untrained))
    raise UntrainedRowsError(f"untrained rows, the model can not use these ids:\n  - {rows}\n{REMEDY}")


def _is_zero_matrix(tensor: torch.Tensor) -> bool:
    return tensor.ndim == 2 and tensor.numel() > 0 and bool(tensor.amin() == tensor.amax() == 0)  # NaN is neither


def _count_non_finite(tensor: torch.Tensor) -> tuple[int, int]:
    num_nan = num_inf = 0
    for chunk in torch.split(tensor.reshape(-1), _CHUNK):
        low, high = chunk.aminmax()  # one quick pass, and NaN wins it: isfinite() takes twenty times as long
        if not (low.isfinite() and high.isfinite()):
            num_nan += int(chunk.isnan().sum())
            num_inf += int(chunk.isinf().sum())
    return num_nan, num_inf


def _flat_rows(config: ModelConfig, parameter: Parameter, table: torch.Tensor) -> list[FlatRows]:
    is_flat, is_zero = _row_flags(table)
    found = []
    # A table of one modality begins at that modality's first id, every other one at id 0.
    first_id = config.id_ranges[config.modality_index(parameter.modality)].start if parameter.modality else 0
    for modality, ids in zip(config.modalities, config.id_ranges, strict=True):
        if parameter.modality not in (None, modality.name):
            continue
        rows = slice(ids.start - first_id, ids.stop - first_id)
        flat = is_flat[rows].nonzero().flatten().tolist()
        if flat:
            ranges = tuple(range(ids.start + run.start, ids.start + run.stop) for run in _runs(flat))
            num_zero = int(is_zero[rows].sum())
            found.append(FlatRows(parameter.name, parameter.part, modality.name, ranges, num_zero, len(flat) == len(ids)))
    return found


def _row_flags(table: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """For each row, whether its values are all equal and whether they are all zero: two bool tensors [rows]."""
    flat, zero = [], []
    for chunk in torch.split(table, max(1, _CHUNK // table.shape[1])):
        low, high = chunk.amin(dim=1), chunk.amax(dim=1)  # a NaN in a row is both, and equals nothing
        flat.append(low == high)
        zero.append((low == 0) & (high == 0))
    return torch.cat(flat), torch.cat(zero)


def _runs(numbers: Iterable[int]) -> list[range]:
    """Ascending whole numbers as ranges that do not touch: 1 2 3 7 -> range(1, 4), range(7, 8)."""
    runs: list[range] = []
    for number in numbers:
        if runs and runs[-1].stop == number:
            runs[-1] = range(runs[-1].start, number + 1)
        else:
            runs.append(range(number, number + 1))
    return runs
