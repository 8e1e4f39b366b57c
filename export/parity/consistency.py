"""P2: does a backend agree with itself?

Steps with a cache against one full pass, chunks against the whole, a row alone against the row in a batch, a grown cache
against a large one, streaming against the batch. No reference is needed.
"""

from collections.abc import Sequence

import numpy as np

from motrt.errors import BackendError
from motrt.export.parity.findings import Finding, Outcome, judged
from motrt.export.parity.generation import greedy, near_tie_margin
from motrt.export.parity.metrics import RowDifference, compare_rows
from motrt.export.parity.scenarios import Observation, Scenario, observe, scenarios, with_fewer_rows
from motrt.export.parity.tolerances import limit_of
from motrt.runtime.kv_cache import SMALLEST_CAPACITY
from motrt.runtime.session import Session

RUNG = "P2"
NUM_POSITIONS = 20
CHUNK = 7


def consistency_findings(session: Session, one_row: Scenario | None = None, batch: Scenario | None = None) -> list[Finding]:
    """Ask every question of ``session``.

    Args:
        session: what answers.
        one_row: where the row that is read in every way comes from; None: one that changes at every position.
        batch: rows that are read together and alone; None: ragged, of all modalities.
    """
    batch = with_fewer_rows(batch or scenarios(session.config, seed=2)[-1], session.most_rows)
    row = (one_row or scenarios(session.config, seed=3)[-2]).rows[0]
    row = row[: min(len(row), NUM_POSITIONS + 1)]
    whole = observe(session, _read(row, len(row) - 1))
    findings = [
        _compared(session, "decode steps equal one full pass", whole, observe(session, _read(row, 1))),
        _compared(session, "chunked prefill equals whole", whole, observe(session, _read(row, len(row) - 1, CHUNK))),
        _alone_and_together(session, batch),
    ]
    if session.config.max_seq_len > session.smallest_capacity:
        findings.append(_grown(session, row))
    findings.append(_streamed(session, batch))
    return findings


def _read(row: np.ndarray, num_prompt: int, chunk_size: int | None = None) -> Scenario:
    return Scenario("one row", (row,), (num_prompt,), chunk_size)


def _compared(session: Session, question: str, expected: Sequence[Observation], came: Sequence[Observation]) -> Finding:
    by_place = {(one.row, one.position): one for one in came}
    limit = limit_of(session)
    differences = {
        (one.row, one.position): compare_rows(one.logits, by_place[one.row, one.position].logits) for one in expected
    }
    return _within(question, differences, limit)


def _within(question: str, differences: dict[tuple[int, int], RowDifference], limit: float) -> Finding:
    wrong = [place for place, one in differences.items() if not one.relative_l2 <= limit]
    worst = max(one.relative_l2 for one in differences.values())
    problems = []
    if wrong:
        problems = [f"relative L2 {worst:.3g} over {limit:.3g}, first in row {wrong[0][0]} at position {wrong[0][1]}"]
    return judged(RUNG, question, problems, positions=len(differences), relative_l2_max=worst, limit=limit)


def _alone_and_together(session: Session, batch: Scenario) -> Finding:
    together = observe(session, batch)
    limit = limit_of(session)
    differences = {}
    for number, (row, num_prompt) in enumerate(zip(batch.rows, batch.num_prompt, strict=True)):
        alone = {one.position: one for one in observe(session, Scenario("alone", (row,), (num_prompt,)))}
        for one in together:
            if one.row == number:
                differences[number, one.position] = compare_rows(alone[one.position].logits, one.logits)
    return _within("a row alone equals the row in a mixed batch", differences, limit)


def _grown(session: Session, row: np.ndarray) -> Finding:
    """From just below a bucket's end to just beyond it."""
    reach = min(SMALLEST_CAPACITY + 4, session.config.max_seq_len - 1)
    ids = np.resize(row, reach + 1)
    scenario = _read(ids, SMALLEST_CAPACITY - 2)
    large = observe(session, scenario, reserve=reach)
    return _compared(session, "a cache that grew equals one that was large", large, observe(session, scenario))


def _streamed(session: Session, batch: Scenario) -> Finding:
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
        near = alone.margins[at] <= near_tie_margin(alone.rms[at] * limit_of(session))
        detail = f"row {number} differs from token {at} on (margin {alone.margins[at]:.3g})"
        if not near:
            return Finding(RUNG, question, Outcome.FAIL, detail)
        outcome = Outcome.AMBIGUOUS
    return Finding(RUNG, question, outcome, detail, {"rows": len(prompts), "tokens": count})
