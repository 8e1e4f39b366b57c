"""What the ladder finds, and the verdict that follows from it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from math import isfinite
from typing import Any

from motrt.errors import LossError, ParityError, raise_all

# Of the report as JSON; the number grows when a reader of the old one could misread the new one.
SCHEMA = "motrt.parity/2"

# The rung of what a format costs a model: no fault of what runs, which is the model as it was stored.
LOSS = "loss"


class Outcome(str, Enum):
    """PASS, AMBIGUOUS (a near-tie that noise may decide), FAIL, or SKIPPED (with the reason)."""

    PASS = "PASS"
    AMBIGUOUS = "AMBIGUOUS"
    FAIL = "FAIL"
    SKIPPED = "SKIPPED"


@dataclass(frozen=True)
class Finding:
    """One question and its answer.

    Attributes:
        rung: ``P1`` to ``P5``, or ``loss``.
        question: what was asked.
        outcome: the answer.
        detail: the sentence that goes with it: what differs and where, or why it was not asked.
        figures: numbers behind it, by name.
        graph: the graph of the plan that was asked.
    """

    rung: str
    question: str
    outcome: Outcome
    detail: str = ""
    figures: Mapping[str, float | int | str] = field(default_factory=dict)
    graph: str = "model"

    def __str__(self) -> str:
        return f"{self.rung} {self.question}{'' if self.graph == 'model' else f' ({self.graph})'}: {self.detail}"

    def to_dict(self) -> dict[str, Any]:
        return {
            "rung": self.rung,
            "graph": self.graph,
            "question": self.question,
            "outcome": self.outcome.value,
            "detail": self.detail,
            "figures": {name: json_number(value) for name, value in self.figures.items()},
        }


def json_number(value: float | int | str) -> float | int | str:
    """``value`` for JSON, which has no word for infinity and NaN: strict readers would refuse the whole report."""
    return str(value) if isinstance(value, float) and not isfinite(value) else value


def judged(rung: str, question: str, problems: Sequence[str], good: str = "", **figures: float | int | str) -> Finding:
    """PASS where there is no problem, FAIL naming them otherwise."""
    if problems:
        return Finding(rung, question, Outcome.FAIL, "; ".join(problems), figures)
    return Finding(rung, question, Outcome.PASS, good, figures)


@dataclass(frozen=True)
class Report:
    """Every finding of one climb.

    Attributes:
        backend: what was examined.
        reference: what it was compared with.
        findings: in the order they were made.
        seconds: of wall time.
        files: sha256 by name, of the very files that were examined.
        evidence: what a report for people shows beside the findings (positions, greedy tokens, where the limit comes from), as
            plain JSON values; too much for a manifest.
    """

    backend: str
    reference: str
    findings: tuple[Finding, ...]
    seconds: float
    files: Mapping[str, str] = field(default_factory=dict)
    evidence: Mapping[str, Any] = field(default_factory=dict)

    @property
    def verdict(self) -> Outcome:
        """Of the graph: FAIL if anything failed, else AMBIGUOUS if anything was, else PASS. What a format loses is ``loss``."""
        outcomes = {finding.outcome for finding in self.findings if finding.rung != LOSS}
        for worst in (Outcome.FAIL, Outcome.AMBIGUOUS):
            if worst in outcomes:
                return worst
        return Outcome.PASS

    @property
    def loss(self) -> str | None:
        """``within`` or ``over`` its budget; None where nothing is quantised."""
        lost = [finding.outcome for finding in self.findings if finding.rung == LOSS]
        return None if not lost else "over" if Outcome.FAIL in lost else "within"

    @property
    def failed(self) -> tuple[Finding, ...]:
        return tuple(one for one in self.findings if one.outcome is Outcome.FAIL)

    @property
    def only_loses(self) -> bool:
        """Whether the graph is right and its format is over the budget of what it may lose."""
        return self.verdict is not Outcome.FAIL and self.loss == "over"

    def raise_on_failure(self) -> None:
        """Raise ParityError where the graph is wrong, and LossError where it is right and loses more than its budget."""
        error, said, end = ParityError, "is not", ":"
        if self.only_loses:
            error, said, end = LossError, "computes what", " says, in a format that loses more of this model than its budget:"
        raise_all(error, f"{self.backend} {said} {self.reference}{end}", [str(one) for one in self.failed])

    def to_dict(self) -> dict[str, Any]:
        """The verdict and its findings: what a manifest keeps."""
        return {
            "schema": SCHEMA,
            "verdict": self.verdict.value,
            "loss": self.loss,
            "backend": self.backend,
            "reference": self.reference,
            "seconds": round(self.seconds, 2),
            "files": dict(self.files),
            "findings": [finding.to_dict() for finding in self.findings],
        }

    def to_page(self) -> dict[str, Any]:
        """The same with all evidence: what ``report.json`` holds."""
        return {**self.to_dict(), **self.evidence}
