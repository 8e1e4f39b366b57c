"""P3: laws that hold for any routed decoder, whatever its weights.

An absent modality's weights are never read (they are poisoned with NaN to see); experts swapped and masks flipped give
the same; a later token changes no earlier logit; filtered ids never leave their range.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from motrt.export.parity.findings import Finding, Outcome, judged
from motrt.export.parity.metrics import compare_rows
from motrt.export.parity.row_noise import RowLimits
from motrt.export.parity.scenarios import Observation, Scenario, observe, scenarios
from motrt.model_def.config import ModelConfig
from motrt.model_def.parameters import Parameter, parameters
from motrt.runtime.session import Logits, Session
from motrt.runtime.step_inputs import StepInputs, modality_of_ids

RUNG = "P3"
NUM_POSITIONS = 12


class Replacement(Protocol):
    """Sessions over the same model with some of its weights replaced."""

    def with_poison(self, poisoned: Iterable[Parameter]) -> Session:
        """NaN for every one of ``poisoned``."""

    def can_exchange(self, pairs: Mapping[str, str]) -> bool:
        """Whether every weight is stored as its counterpart is."""

    def with_exchanged(self, pairs: Mapping[str, str]) -> Session:
        """The value of ``pairs[name]`` for every ``name``."""


def law_findings(session: Session, limits: RowLimits | None = None) -> list[Finding]:
    """Ask the laws that need nothing but the session: causality, and ranges.

    Args:
        session: what answers.
        limits: of the relative L2 error; None: what the formula says of a session that nobody measured.
    """
    return [_causality(session, limits or RowLimits.of_formula(session)), _ranges(session)]


def _causality(session: Session, limits: RowLimits) -> Finding:
    """Two sequences with the same beginning: nothing before the difference may differ, its very neighbour included."""
    config, question = session.config, "a later token changes no earlier logit"
    row = scenarios(config, seed=7)[-2].rows[0][: min(NUM_POSITIONS, config.max_seq_len)]
    changed_at = len(row) // 2
    if changed_at == 0 or config.vocab_size == 1:
        return Finding(RUNG, question, Outcome.SKIPPED, "there is room for one position, or but one id")
    # Half a vocabulary further: other ids, and of other modalities too, so that routing of later positions changes.
    other = row.copy()
    other[changed_at:] = (row[changed_at:] + max(1, config.vocab_size // 2)) % config.vocab_size
    ids, limit = config.id_ranges[0], limits.worst
    before, after = (_all_predicting(session, one, modality_of_ids(one, config), 0) for one in (row, other))
    worst = max(
        compare_rows(before[at, ids.start : ids.stop], after[at, ids.start : ids.stop]).relative_l2 for at in range(changed_at)
    )
    problems = [f"relative L2 {worst:.3g} over {limit:.3g} before the change"] if not worst <= limit else []
    return judged(RUNG, question, problems, relative_l2_max=worst, limit=limit)


def _ranges(session: Session) -> Finding:
    """Every modality predicted at every position, whatever stands there."""
    config = session.config
    row = scenarios(config, seed=8)[-2].rows[0][: min(NUM_POSITIONS, config.max_seq_len)]
    problems = []
    for modality, ids in enumerate(config.id_ranges):
        logits = _all_predicting(session, row, modality_of_ids(row, config), modality)
        inside = logits[:, ids.start : ids.stop]
        outside = np.delete(logits, np.arange(ids.start, ids.stop), axis=1)
        if not np.isfinite(inside).all():
            problems.append(f"{config.modality_names[modality]}: an id inside its range is not finite")
        if not np.isneginf(outside).all():
            problems.append(f"{config.modality_names[modality]}: an id outside its range is not -inf")
    return judged(RUNG, "filtered ids never leave their range", problems)


def _all_predicting(session: Session, row: np.ndarray[Any, Any], mask: np.ndarray[Any, Any], modality: int) -> Logits:
    """Logits of every position of one row, all predicting ``modality``; unchecked, for laws that bend the mask."""
    count = len(row)
    inputs = StepInputs(
        input_ids=row[None].astype(np.int64),
        modality_mask=mask[None].astype(np.int64),
        cache_position=np.zeros(1, np.int64),
        logits_index=np.arange(count, dtype=np.int64),
        head_mask=np.full(count, modality, np.int64),
    )
    return session.execute(inputs, session.new_cache(1, count))


def absence_finding(session: Session, replacement: Replacement, modality: int) -> Finding:
    """With every other modality's weights NaN, a row of ``modality`` alone must come out bit for bit the same.

    Args:
        session: the graph as it is.
        replacement: gives the graph with some weights replaced.
        modality: the one that is present.
    """
    return absence_of(answers_of(session), replacement, modality)


def absence_of(answers: "PlainAnswers", replacement: Replacement, modality: int) -> Finding:
    """The same, of what the graph said as it is."""
    config = answers.config
    name = config.modality_names[modality]
    others = [one for one in parameters(config) if one.modality not in (None, name)]
    with replacement.with_poison(others) as poisoned:
        came = observe(poisoned, _alone(config, modality))
    same = all(np.array_equal(a.logits, b.logits) for a, b in zip(answers.alone[modality], came, strict=True))
    problems = [] if same else [f"logits changed when the weights of {', '.join(_names(others))} were NaN"]
    return judged(RUNG, f"{name} alone never reads another modality's weights", problems, poisoned=len(others))


def _alone(config: ModelConfig, modality: int) -> Scenario:
    return scenarios(config, seed=9)[modality]


def _names(others: list[Parameter]) -> list[str]:
    return sorted({str(one.modality) for one in others})


def swap_finding(session: Session, replacement: Replacement) -> Finding:
    """Two modalities' projections and experts swapped, and the mask flipped: the same logits.

    Args:
        session: the graph as it is.
        replacement: gives the graph with some weights replaced.
    """
    return swap_of(answers_of(session), replacement)


def swap_of(answers: "PlainAnswers", replacement: Replacement) -> Finding:
    """The same, of what the graph said as it is."""
    question = "experts swapped and mask flipped give the same"
    config = answers.config
    first, second = config.modality_names[:2]
    swapped = _swapped_names(config, first, second)
    if swapped is None:
        return Finding(RUNG, question, Outcome.SKIPPED, f"the experts of {first} and {second} differ in kind or size")
    if not replacement.can_exchange(swapped):
        return Finding(RUNG, question, Outcome.SKIPPED, f"the weights of {first} and {second} are stored in different formats")
    row, mask = _runs(config)
    flipped = np.where(mask == 0, 1, np.where(mask == 1, 0, mask))
    with replacement.with_exchanged(swapped) as other_session:
        came = _all_predicting(other_session, row, flipped, 0)
    ids = config.id_ranges[0]
    worst = max(
        compare_rows(a[ids.start : ids.stop], b[ids.start : ids.stop]).relative_l2
        for a, b in zip(answers.runs, came, strict=True)
    )
    problems = [f"relative L2 {worst:.3g} over {answers.limit:.3g}"] if not worst <= answers.limit else []
    return judged(RUNG, question, problems, relative_l2_max=worst, limit=answers.limit)


def _runs(config: ModelConfig) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """The scenario behind those of one modality each, runs of all, both swapped ones first: its ids, and their modalities."""
    row = scenarios(config, seed=10)[len(config.modalities)].rows[0][: min(NUM_POSITIONS, config.max_seq_len)]
    return row, modality_of_ids(row, config)


@dataclass(frozen=True)
class PlainAnswers:
    """What a graph says as it is to what it will be asked with weights replaced: it need not be open any more then.

    Attributes:
        config: the model's.
        limit: of relative L2, between ways to compute it.
        alone: by modality, what it says to rows of that one alone.
        runs: logits [positions, v] of runs of all.
    """

    config: ModelConfig
    limit: float
    alone: tuple[list[Observation], ...]
    runs: Logits


def answers_of(session: Session, limits: RowLimits | None = None) -> PlainAnswers:
    """Ask a session all of it; ``limits`` as for ``law_findings``."""
    config = session.config
    alone = tuple(observe(session, _alone(config, modality)) for modality in range(len(config.modalities)))
    return PlainAnswers(
        config, (limits or RowLimits.of_formula(session)).worst, alone, _all_predicting(session, *_runs(config), 0)
    )


def _swapped_names(config: ModelConfig, first: str, second: str) -> dict[str, str] | None:
    """Each routed weight's counterpart in the other modality; None where shapes differ. Heads stay: ids do."""
    routed = [one for one in parameters(config) if one.part in ("attention", "expert")]
    shapes = {one.name: one.shape for one in routed}
    pairs = {}
    for one in routed:
        if one.modality in (first, second):
            other = second if one.modality == first else first
            counterpart = one.name.replace(f".{one.modality}.", f".{other}.")
            if shapes.get(counterpart) != one.shape:
                return None
            pairs[one.name] = counterpart
    return pairs
