"""P4: does a backend's file compute the reference's logits, per modality and per kind of position, over many steps?

Every row of logits is held against its own limit (``row_noise``): how far rounding alone moves it.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from math import inf, sqrt
from typing import Any

import numpy as np

from motrt.export.parity.findings import Finding, Outcome, json_number, judged
from motrt.export.parity.generation import near_tie_margin
from motrt.export.parity.metrics import RowDifference, compare_rows, summary
from motrt.export.parity.row_noise import RowLimits, key_of
from motrt.export.parity.scenarios import Observation, Scenario, observe
from motrt.export.parity.tolerances import LARGEST_FLOAT32_ERROR, LARGEST_LIMIT, LARGEST_TYPICAL_SHARE, NEAR_TIE_DEVIATIONS
from motrt.runtime.session import Session

RUNG = "P4"


@dataclass(frozen=True)
class Compared:
    """One position of one scenario, both answers compared.

    Attributes:
        scenario: its name.
        observation: what the examined session gave.
        difference: from the reference.
        rms: root mean square of the reference's logits.
        noise: relative L2 error that rounding alone makes at this row.
        limit: of the relative L2 error.
    """

    scenario: str
    observation: Observation
    difference: RowDifference
    rms: float
    noise: float
    limit: float

    @property
    def share(self) -> float:
        """The error as a share of its limit."""
        error = self.difference.relative_l2
        return error / self.limit if error < inf else inf

    @property
    def error_of_a_logit(self) -> float:
        """The standard deviation of the row's errors: what was measured, or what rounding alone makes."""
        return max(sqrt(self.difference.mean_square), self.noise * self.rms)

    @property
    def is_undecided(self) -> bool:
        """Whether the error is within the row's limit, and that so wide that a fault could be no larger."""
        return LARGEST_LIMIT < self.difference.relative_l2 <= self.limit


def compare(
    session: Session, references: Sequence[tuple[Scenario, Sequence[Observation]]], limits: RowLimits
) -> list[Compared]:
    """Feed every scenario to ``session`` and compare with what the reference gave, each row beside its limit."""
    found = []
    for scenario, expected in references:
        for reference, actual in zip(expected, observe(session, scenario), strict=True):
            key = key_of(scenario, reference)
            rms = float(np.sqrt(np.mean(np.square(reference.logits, dtype=np.float64))))
            difference = compare_rows(reference.logits, actual.logits)
            found.append(Compared(scenario.name, actual, difference, rms, limits.noise_of(key), limits.of(key)))
    return found


def evidence_of(session: Session, compared: Sequence[Compared], graph: str = "model") -> list[dict[str, Any]]:
    """Return every position as plain JSON values, for people to look at."""
    names = session.config.modality_names
    return [
        {
            "graph": graph,
            "scenario": one.scenario,
            "row": one.observation.row,
            "position": one.observation.position,
            "predicted": names[one.observation.predicted],
            "phase": one.observation.phase,
            "relative_l2": json_number(one.difference.relative_l2),
            "limit": json_number(one.limit),
            "noise": json_number(one.noise),
            "max_abs": json_number(one.difference.max_abs),
            "kl": json_number(one.difference.kl),
            "margin": json_number(one.difference.margin),
            "same_top_1": one.difference.same_top_1,
        }
        for one in compared
    ]


def noise_of(compared: Sequence[Compared]) -> float:
    """Return the measured error of a logit, as a standard deviation, over everything that was compared."""
    return sqrt(float(np.mean([one.difference.mean_square for one in compared]))) if compared else 0.0


def agreement_findings(session: Session, compared: Sequence[Compared]) -> list[Finding]:
    """Judge what ``compare`` found: one finding per predicted modality and kind of position.

    Args:
        session: what answered.
        compared: its answers.
    """
    groups: dict[tuple[int, str], list[Compared]] = defaultdict(list)
    for one in compared:
        groups[one.observation.predicted, one.observation.phase].append(one)
    noise = noise_of(compared)
    is_float32 = session.precision in ("fp32", "fp64") and session.activation_block is None
    return [
        _judge(f"{session.config.modality_names[modality]}, {phase}", group, noise, is_float32)
        for (modality, phase), group in sorted(groups.items())
    ]


def typical_finding(compared: Sequence[Compared]) -> Finding:
    """Judge the rows together: their errors are no larger than their noise foretells, as a root mean square over all of them.

    For rounding to codes, which a single row may amplify to all that the rounding itself does: what no limit of one row tells
    from a fault of twice the noise, hundreds of rows do.
    """
    shares = [one.difference.relative_l2 / one.noise for one in compared if one.noise > 0]
    typical = sqrt(float(np.mean(np.square(shares)))) if shares else 0.0
    problems = (
        []
        if typical <= LARGEST_TYPICAL_SHARE
        else [f"errors are {typical:.3g} times the noise of their rows, over {LARGEST_TYPICAL_SHARE:g}"]
    )
    return judged(RUNG, "all rows together", problems, rows=len(shares), share=typical)


def _judge(question: str, group: Sequence[Compared], noise: float, is_float32: bool) -> Finding:
    worst = max(group, key=lambda one: one.share)
    figures = {
        **summary([one.difference for one in group]),
        "limit": worst.limit,
        "limit_median": float(np.median([one.limit for one in group])),
        "share": worst.share,
        "noise": noise,
    }
    problems = _problems(group, worst, noise, is_float32)
    if problems:
        return Finding(RUNG, question, Outcome.FAIL, problems[0], figures)
    if undecided := [one for one in group if one.is_undecided]:
        detail = (
            f"{len(undecided)} of {len(group)} rows are so steep that rounding alone moves their logits by up to "
            f"{max(one.noise for one in undecided):.2g} of their size: nothing can be said there, first {_place(undecided[0])}"
        )
        return Finding(RUNG, question, Outcome.AMBIGUOUS, detail, figures)
    if flips := [one for one in group if not one.difference.same_top_1]:
        detail = f"{len(flips)} near-ties fell the other way (margins up to {max(o.difference.margin for o in flips):.3g})"
        return Finding(RUNG, question, Outcome.AMBIGUOUS, detail, figures)
    return Finding(RUNG, question, Outcome.PASS, "", figures)


def _problems(group: Sequence[Compared], worst: Compared, noise: float, is_float32: bool) -> list[str]:
    """Return why a group fails, the gravest first; none where it does not."""
    problems = []
    if not worst.share <= 1.0:
        error, limit = worst.difference.relative_l2, worst.limit
        problems.append(
            f"relative L2 {error:.3g} over {limit:.3g}, {_place(worst)} (rounding alone moves this row by {worst.noise:.2g})"
        )
    if leaks := [one for one in group if one.observation.leaked]:
        problems.append(f"{leaks[0].observation.leaked} ids outside the range are not -inf, {_place(leaks[0])}")
    if is_float32 and (off := [one for one in group if one.difference.max_abs > _largest_float32_error(one)]):
        problems.append(
            f"a logit is off by {off[0].difference.max_abs:.3g}, over {_largest_float32_error(off[0]):.3g}, {_place(off[0])}"
        )
    flips = [one for one in group if not one.difference.same_top_1]
    if clear := [one for one in flips if one.difference.margin > near_tie_margin(max(noise, one.error_of_a_logit))]:
        problems.append(f"another best id in spite of a margin of {clear[0].difference.margin:.3g}, {_place(clear[0])}")
    return problems


def _largest_float32_error(one: Compared) -> float:
    """What a logit may be off in float32: the published anchor at logits of order one, or what the row's own limit explains."""
    return max(LARGEST_FLOAT32_ERROR * max(1.0, one.rms), NEAR_TIE_DEVIATIONS * one.limit * one.rms)


def _place(one: Compared) -> str:
    return f"in '{one.scenario}', row {one.observation.row}, position {one.observation.position}"
