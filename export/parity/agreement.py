"""P4: does a backend's file compute the reference's logits, per modality and per kind of position, over many steps?"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import sqrt
from typing import Any

import numpy as np

from motrt.export.parity.findings import Finding, Outcome, json_number
from motrt.export.parity.generation import near_tie_margin
from motrt.export.parity.metrics import RowDifference, compare_rows, summary
from motrt.export.parity.scenarios import Observation, Scenario, observe
from motrt.export.parity.tolerances import (
    LARGEST_FLOAT32_ERROR,
    LARGEST_RELATIVE_L2_P95,
    SMALLEST_COSINE_P5,
    SMALLEST_STABLE_AGREEMENT,
    STABLE_MARGIN,
    limit_of,
)
from motrt.runtime.session import Session

RUNG = "P4"


@dataclass(frozen=True)
class Compared:
    """One position of one scenario, both answers compared."""

    scenario: str
    observation: Observation
    difference: RowDifference


def compare(session: Session, references: Sequence[tuple[Scenario, Sequence[Observation]]]) -> list[Compared]:
    """Feed every scenario to ``session`` and compare with what the reference said."""
    found = []
    for scenario, expected in references:
        for reference, came in zip(expected, observe(session, scenario), strict=True):
            found.append(Compared(scenario.name, came, compare_rows(reference.logits, came.logits)))
    return found


def evidence_of(session: Session, compared: Sequence[Compared], graph: str = "model") -> list[dict[str, Any]]:
    """Every position as plain JSON values, for people to look at."""
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
            "max_abs": json_number(one.difference.max_abs),
            "kl": json_number(one.difference.kl),
            "margin": json_number(one.difference.margin),
            "same_top_1": one.difference.same_top_1,
        }
        for one in compared
    ]


def noise_of(compared: Sequence[Compared]) -> float:
    """The measured error of a logit, as a standard deviation, over everything that was compared."""
    return sqrt(float(np.mean([one.difference.mean_square for one in compared]))) if compared else 0.0


def agreement_findings(
    session: Session, compared: Sequence[Compared], limit: float | None = None, limit_alone: bool = False
) -> list[Finding]:
    """One finding per predicted modality and kind of position.

    Args:
        session: what answered.
        compared: its answers.
        limit: of a row's relative L2 error; None: what the session's precision allows.
        limit_alone: ask nothing beside it of how large errors are.
    """
    groups: dict[tuple[int, str], list[Compared]] = defaultdict(list)
    for one in compared:
        groups[one.observation.predicted, one.observation.phase].append(one)
    limit = limit_of(session) if limit is None else limit
    noise = noise_of(compared)
    is_float32 = session.precision in ("fp32", "fp64") and session.activation_block is None
    return [
        _judge(f"{session.config.modality_names[modality]}, {phase}", group, limit, noise, is_float32, limit_alone)
        for (modality, phase), group in sorted(groups.items())
    ]


def _judge(
    question: str, group: Sequence[Compared], limit: float, noise: float, is_float32: bool, limit_alone: bool
) -> Finding:
    differences = [one.difference for one in group]
    figures = {**summary(differences), "limit": limit, "noise": noise}
    worst = max(group, key=lambda one: one.difference.relative_l2)
    if not worst.difference.relative_l2 <= limit:
        detail = f"relative L2 {worst.difference.relative_l2:.3g} over {limit:.3g}, {_place(worst)}"
        return Finding(RUNG, question, Outcome.FAIL, detail, figures)
    leaks = [one for one in group if one.observation.leaked]
    if leaks:
        detail = f"{leaks[0].observation.leaked} ids outside the range are not -inf, {_place(leaks[0])}"
        return Finding(RUNG, question, Outcome.FAIL, detail, figures)
    loose = [] if limit_alone else _published_problems(figures, is_float32)
    if loose:
        return Finding(RUNG, question, Outcome.FAIL, "; ".join(loose), figures)
    flips = [one for one in group if not one.difference.same_top_1]
    clear = [one for one in flips if one.difference.margin > near_tie_margin(noise) and not limit_alone]
    if clear:
        detail = f"another best id in spite of a margin of {clear[0].difference.margin:.3g}, {_place(clear[0])}"
        return Finding(RUNG, question, Outcome.FAIL, detail, figures)
    if flips:
        detail = f"{len(flips)} near-ties fell the other way (margins up to {max(o.difference.margin for o in flips):.3g})"
        return Finding(RUNG, question, Outcome.AMBIGUOUS, detail, figures)
    return Finding(RUNG, question, Outcome.PASS, "", figures)


def _published_problems(figures: Mapping[str, float | int], is_float32: bool) -> list[str]:
    """Where the error is within what rounding explains, and yet more than other gates allow."""
    problems = []
    if figures["relative_l2_p95"] > LARGEST_RELATIVE_L2_P95:
        problems.append(f"relative L2 at the 95th percentile {figures['relative_l2_p95']:.3g} over {LARGEST_RELATIVE_L2_P95}")
    if figures["cosine_p5"] < SMALLEST_COSINE_P5:
        problems.append(f"cosine at the 5th percentile {figures['cosine_p5']:.4g} under {SMALLEST_COSINE_P5}")
    if figures["stable_top_1_agreement"] < SMALLEST_STABLE_AGREEMENT:
        share = figures["stable_top_1_agreement"]
        problems.append(f"the best id agrees in {share:.0%} of rows with a margin over {STABLE_MARGIN}")
    if is_float32 and figures["max_abs"] > LARGEST_FLOAT32_ERROR:
        problems.append(f"a logit is off by {figures['max_abs']:.3g}, over {LARGEST_FLOAT32_ERROR}")
    return problems


def _place(one: Compared) -> str:
    return f"in '{one.scenario}', row {one.observation.row}, position {one.observation.position}"
