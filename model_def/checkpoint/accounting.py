"""What became of every key: nothing is loaded, dropped or made up without a line that says so. Standard library alone."""

from collections import Counter
from dataclasses import dataclass
from typing import Any, Literal

from motrt.errors import CheckpointError, raise_all

Outcome = Literal["loaded", "dequantized", "ignored", "copied", "initialised", "missing", "unexpected", "misshapen"]
FAULTS: tuple[Outcome, ...] = ("missing", "unexpected", "misshapen")


@dataclass(frozen=True)
class KeyRow:
    """One line of the table.

    Attributes:
        key: the name in the source; of what was copied, initialised or is missing without a source's name, the native one.
        source: which file or folder it came from, or should have.
        outcome: what became of it.
        detail: the shape, the reason, or what it was made from.
    """

    key: str
    source: str
    outcome: Outcome
    detail: str = ""

    def __str__(self) -> str:
        return f"{self.outcome}: {self.key} ({self.source}{'; ' + self.detail if self.detail else ''})"


@dataclass(frozen=True)
class Accounting:
    """Every key of every source, and every weight that has none.

    Attributes:
        rows: in the order in which sources were laid over each other.
        notes: what a reader of the report should know beyond the keys.
    """

    rows: tuple[KeyRow, ...]
    notes: tuple[str, ...] = ()

    @property
    def faults(self) -> tuple[KeyRow, ...]:
        """The keys that are missing, unexpected or misshapen."""
        return tuple(row for row in self.rows if row.outcome in FAULTS)

    @property
    def is_clean(self) -> bool:
        return not self.faults

    def counts(self) -> dict[str, int]:
        """How many keys had each outcome; those that none had are left out."""
        return dict(Counter(row.outcome for row in self.rows))

    def raise_unless_clean(self) -> None:
        """Raise naming every key that is not accounted for.

        Raises:
            CheckpointError: when any key is missing, unexpected or misshapen.
        """
        heading = f"{len(self.faults)} keys do not fit; check that the files belong together and are whole:"
        raise_all(CheckpointError, heading, [str(row) for row in self.faults])

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        rows = [{"key": row.key, "source": row.source, "outcome": row.outcome, "detail": row.detail} for row in self.rows]
        return {"clean": self.is_clean, "counts": self.counts(), "rows": rows, "notes": list(self.notes)}
