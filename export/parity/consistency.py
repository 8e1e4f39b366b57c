"""P2: does a backend agree with itself?

Steps with a cache against one full pass, chunks against the whole, a row alone against the row in a batch, a grown cache
against a large one, streaming against the batch. No reference is needed.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from motrt.errors import BackendError
from motrt.export.parity.findings import Finding, Outcome, judged
from motrt.export.parity.generation import greedy, near_tie_margin
from motrt.export.parity.metrics import compare_rows
from motrt.export.parity.row_noise import RowLimits, key_of
from motrt.export.parity.scenarios import Observation, Scenario, observe, scenarios, with_fewer_rows
from motrt.runtime.kv_cache import SMALLEST_CAPACITY
from motrt.runtime.session import Session

RUNG = "P2"
NUM_POSITIONS = 20
CHUNK = 7


def consistency_findings(
    session: Session, limits: RowLimits | None = None, one_row: Scenario | None = None, batch: Scenario | None = None
) -> list[Finding]:
    """Ask every question of ``session``.

    Args:
        session: what answers.
        limits: of the relative L2 error, row by row; None: what the formula says of a session that nobody measured.
        one_row: where the row that is read in every way comes from; None: one that changes at every position.
        batch: rows that are read together and alone; None: ragged, of all modalities.
    """
    limits = limits or RowLimits.of_formula(session)
    usual = scenarios(session.config)
    batch = with_fewer_rows(batch or usual[-1], session.most_rows)
    row = (one_row or usual[-2]).rows[0]
    row = row[: min(len(row), NUM_POSITIONS + 1)]
    whole = _read(row, len(row) - 1)
    expected = observe(session, whole)
    findings = [
        _compared("decode steps equal one full pass", limits, whole, expected, observe(session, _read(row, 1))),
        _compared("chunked prefill equals whole", limits, whole, expected, observe(session, _read(row, len(row) - 1, CHUNK))),
        _alone_and_together(session, limits, batch),
    ]
    if session.config.max_seq_len > session.smallest_capacity:
        findings.append(_grown(session, limits, row))
    findings.append(_streamed(session, limits, batch))
    return findings


def _read(row: np.ndarray, num_prompt: int, chunk_size: int | None = None) -> Scenario:
    return Scenario("one row", (row,), (num_prompt,), chunk_size)


def _compared(
    question: str, limits: RowLimits, scenario: Scenario, expected: Sequence[Observation], actual: Sequence[Observation]
) -> Finding:
    """Compare two answers to the rows of ``scenario``, however they were asked."""
    by_place = {(one.row, one.position): one for one in actual}
    problems, worst, limit = [], 0.0, limits.worst
    for one in expected:
        error = compare_rows(one.logits, by_place[one.row, one.position].logits).relative_l2
        own = limits.of(key_of(scenario, one))
        if not error <= own:
            problems.append(f"relative L2 {error:.3g} over {own:.3g}, first in row {one.row} at position {one.position}")
        if not error / own <= worst / limit:
            worst, limit = error, own
    return judged(RUNG, question, problems[:1], positions=len(expected), relative_l2_max=worst, limit=limit)


def _alone_and_together(session: Session, limits: RowLimits, batch: Scenario) -> Finding:
    alone = [
        replace(one, row=number)
        for number, (row, num_prompt) in enumerate(zip(batch.rows, batch.num_prompt, strict=True))
        for one in observe(session, Scenario("alone", (row,), (num_prompt,)))
    ]
    return _compared("a row alone equals the row in a mixed batch", limits, batch, alone, observe(session, batch))


def _grown(session: Session, limits: RowLimits, row: np.ndarray) -> Finding:
    """From just below a bucket's end to just beyond it."""
    reach = min(SMALLEST_CAPACITY + 4, session.config.max_seq_len - 1)
    ids = np.resize(row, reach + 1)
    scenario = _read(ids, SMALLEST_CAPACITY - 2)
    large = observe(session, scenario, reserve=reach)
    return _compared("a cache that grew equals one that was large", limits, scenario, large, observe(session, scenario))


def _streamed(session: Session, limits: RowLimits, batch: Scenario) -> Finding:
    """What the generation loop yields for a batch, against each row decoded alone, greedily."""
    question = "streamed generation of a batch equals each row alone"
    prompts = [row[:count].tolist() for row, count in zip(batch.rows, batch.num_prompt, strict=True)]
    count = min(8, session.config.max_seq_len - max(batch.num_prompt))
    if count < 1:
        return Finding(RUNG, question, Outcome.SKIPPED, "a prompt fills such a model")
    plan = [index % len(session.config.modalities) for index in range(count)]
    names = session.config.modality_names
    streamed: dict[int, list[int]] = {row: [] for row in range(len(prompts))}
    steps = session.generate(prompts, schedule=lambda at: names[plan[len(at.tokens)]] if len(at.tokens) < count else None)
    try:
        for step in steps:
            streamed[step.row].append(step.token_id)
    except BackendError as failure:  # logits that no id can be chosen from: a finding, not the end of the climb
        return Finding(RUNG, question, Outcome.FAIL, str(failure))
    outcome, detail = Outcome.PASS, ""
    for number, prompt in enumerate(prompts):
        alone = greedy(session, prompt, plan)
        if streamed[number] == alone.tokens:
            continue
        if len(streamed[number]) != count:
            return Finding(RUNG, question, Outcome.FAIL, f"row {number}: {len(streamed[number])} tokens came, not {count}")
        at = next(index for index in range(count) if streamed[number][index] != alone.tokens[index])
        near = alone.margins[at] <= near_tie_margin(alone.rms[at] * limits.worst)
        detail = f"row {number} differs from token {at} on (margin {alone.margins[at]:.3g})"
        if not near:
            return Finding(RUNG, question, Outcome.FAIL, detail)
        outcome = Outcome.AMBIGUOUS
    return Finding(RUNG, question, outcome, detail, {"rows": len(prompts), "tokens": count})
