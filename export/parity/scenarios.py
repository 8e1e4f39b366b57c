"""What the ladder feeds: sequences of all modalities, read and then decoded step by step, and what comes out.

A scenario is a batch of known sequences. Each row's beginning is prefilled (whole, or in chunks), the rest is fed one
token at a time, and the logits of every real position are kept: of each, it is known which modality it predicts. Sequences
that are chosen to hurt stand in ``hostile``.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from motrt.model_def.config import ModelConfig
from motrt.runtime.kv_cache import KVCache
from motrt.runtime.session import Session
from motrt.runtime.step_inputs import StepInputs, modality_of_ids

Int64 = NDArray[np.int64]

NUM_PROMPT, NUM_DECODE_STEPS = 16, 32
RUN_LENGTH = 5  # positions of one modality before a change-over
EARLY_STEPS = 8

# Positions of several rows in one pass: each has logits over the vocabulary, 0.5 MB in float32 at full size.
MOST_TOGETHER = 512


@dataclass(frozen=True)
class Scenario:
    """A batch of known sequences.

    Attributes:
        name: for people.
        rows: per row its ids; the last id is only predicted, never fed.
        num_prompt: per row how many ids are prefilled.
        chunk_size: most columns per prefill pass; None: all at once.
        start: positions that every row is taken to hold already: what a new cache has there, zeros.
        watched_from: the first place in a row whose logits are kept; those before it only fill the cache.
    """

    name: str
    rows: tuple[Int64, ...]
    num_prompt: tuple[int, ...]
    chunk_size: int | None = None
    start: int = 0
    watched_from: int = 0

    @property
    def num_steps(self) -> int:
        return len(self.rows[0]) - self.num_prompt[0] - 1


@dataclass(frozen=True)
class Observation:
    """The logits of one position, cut to the predicted modality's range.

    Attributes:
        row: of the batch.
        position: of the token that was read.
        predicted: the modality predicted there.
        phase: ``change-over`` where another modality is predicted than the token's own, ``after change-over`` where the token
            is the first of its modality; else ``prefill``, ``chunked prefill``, ``early decode`` or ``late decode``.
        logits: within the range.
        leaked: ids outside the range that are not -inf.
    """

    row: int
    position: int
    predicted: int
    phase: str
    logits: NDArray[np.floating[Any]]
    leaked: int


def scenarios(config: ModelConfig, seed: int = 0, num_steps: int = NUM_DECODE_STEPS) -> tuple[Scenario, ...]:
    """Each modality alone, runs of all with change-overs, every position another, chunks, and a ragged mixed batch."""
    make = SequenceMaker(config, seed, num_steps)
    count = len(config.modalities)
    found = [make.scenario(f"{one.name} alone", [[index]]) for index, one in enumerate(config.modalities)]
    if count == 1:
        found.append(make.scenario("in chunks", [[0]], chunk_size=5))
        found.append(make.scenario("ragged batch", [[0]] * 3, ragged=True))
        return tuple(found)
    there = [index for index in range(count) for _ in range(RUN_LENGTH)]
    found.append(make.scenario("runs, in order", [there]))
    found.append(make.scenario("runs, in reverse", [there[::-1]]))
    found.append(make.scenario("runs, in chunks", [there], chunk_size=7))
    found.append(make.scenario("changing at every position, in chunks", [list(range(count))], chunk_size=5))
    mixed = [[index] for index in range(count)] + [there, there[::-1]]
    found.append(make.scenario("ragged mixed batch", mixed, ragged=True))
    return tuple(found)


def pattern_scenarios(config: ModelConfig, pattern: Sequence[int], seed: int = 3) -> tuple[Scenario, Scenario]:
    """One row, and a ragged batch, whose modalities follow ``pattern`` over and over."""
    make = SequenceMaker(config, seed)
    return make.scenario("one row", [pattern]), make.scenario("ragged batch", [pattern] * 3, ragged=True)


def with_fewer_rows(scenario: Scenario, most: int | None) -> Scenario:
    """The first ``most`` rows, for a backend that takes no more; all of them where None."""
    return replace(scenario, rows=scenario.rows[:most], num_prompt=scenario.num_prompt[:most])


def in_batches(scenario: Scenario, most: int) -> list[Scenario]:
    """The same rows, at most ``most`` at once."""
    return [
        replace(scenario, rows=scenario.rows[at : at + most], num_prompt=scenario.num_prompt[at : at + most])
        for at in range(0, len(scenario.rows), most)
    ]


class SequenceMaker:
    """Draws ids of given modalities, the first and last id of each range among them."""

    def __init__(self, config: ModelConfig, seed: int, num_steps: int = NUM_DECODE_STEPS) -> None:
        self.config = config
        self.chance = np.random.default_rng(seed)
        self.num_prompt = min(NUM_PROMPT, max(1, config.max_seq_len // 4))
        self.num_steps = max(0, min(num_steps, config.max_seq_len - self.num_prompt - 4))

    def scenario(
        self, name: str, patterns: Sequence[Sequence[int]], chunk_size: int | None = None, ragged: bool = False
    ) -> Scenario:
        prompts = [max(1, self.num_prompt - 3 * number) if ragged else self.num_prompt for number in range(len(patterns))]
        rows = [self.row(pattern, length + self.num_steps + 1) for pattern, length in zip(patterns, prompts, strict=True)]
        return Scenario(name, tuple(rows), tuple(prompts), chunk_size)

    def row(self, pattern: Sequence[int], length: int) -> Int64:
        """Ids whose modalities follow ``pattern`` over and over."""
        ranges = self.config.id_ranges
        ids = [self._id(ranges[pattern[position % len(pattern)]]) for position in range(length)]
        return np.array(ids, dtype=np.int64)

    def _id(self, owned: range) -> int:
        if self.chance.random() < 0.1:
            return owned.start if self.chance.random() < 0.5 else owned.stop - 1
        return int(self.chance.integers(owned.start, owned.stop))


def observe(session: Session, scenario: Scenario, reserve: int = 0) -> list[Observation]:
    """Feed ``scenario`` to ``session`` and keep every real position's logits.

    Args:
        session: what answers.
        scenario: what is fed.
        reserve: positions that the cache has room for from the start; it grows by buckets as it fills.

    Returns:
        Sorted by row and position, however many passes ``session`` takes for a prompt.
    """
    cache = session.new_cache(len(scenario.rows), max(scenario.start + max(scenario.num_prompt), reserve))
    found = _observe_prefill(session, scenario, cache)
    cache.lengths[:] = scenario.start + np.array(scenario.num_prompt)
    for step in range(scenario.num_steps):
        session.reserve(cache, int(cache.lengths.max()) + 1)
        columns = np.array(scenario.num_prompt) + step
        ids = np.stack([row[column : column + 1] for row, column in zip(scenario.rows, columns, strict=True)])
        found += _observe_pass(session, scenario, cache, ids, "early decode" if step < EARLY_STEPS else "late decode")
        cache.lengths += 1
    return sorted(found, key=lambda one: (one.row, one.position))


def _observe_prefill(session: Session, scenario: Scenario, cache: KVCache) -> list[Observation]:
    longest = max(scenario.num_prompt)
    width = min(scenario.chunk_size or longest, session.longest_pass)
    phase = "prefill" if scenario.chunk_size is None else "chunked prefill"
    found = []
    for start in range(0, longest, width):
        stop = min(start + width, longest)
        cache.lengths[:] = scenario.start + np.minimum(scenario.num_prompt, start)
        ids = np.stack([_padded(row[:end], start, stop) for row, end in zip(scenario.rows, scenario.num_prompt, strict=True)])
        found += _observe_pass(session, scenario, cache, ids, phase)
    return found


def _padded(prompt: Int64, start: int, stop: int) -> Int64:
    part = prompt[start:stop]
    return np.concatenate([part, np.full(stop - start - len(part), prompt[-1])])


def _observe_pass(session: Session, scenario: Scenario, cache: KVCache, ids: Int64, phase: str) -> list[Observation]:
    """One pass; logits wanted wherever a real token stands that is watched."""
    config, width = session.config, ids.shape[1]
    places = cache.lengths - scenario.start  # of each row's first new token, in its row
    wanted = [
        (row, column, int(places[row]) + column)
        for row in range(len(ids))
        for column in range(width)
        if places[row] + column >= scenario.watched_from
        and ("decode" in phase or places[row] + column < scenario.num_prompt[row])
    ]
    predicted = np.array([config.modality_of(int(scenario.rows[row][place + 1])) for row, _, place in wanted], dtype=np.int64)
    index = np.array([row * width + column for row, column, _ in wanted], dtype=np.int64)
    inputs = StepInputs(ids, modality_of_ids(ids, config), cache.lengths.copy(), index, predicted)
    logits = session.run(inputs, cache)
    return [
        _observation(
            config, row, scenario.start + place, int(modality), _phase(config, scenario.rows[row], place, phase), values
        )
        for (row, _, place), modality, values in zip(wanted, predicted, logits, strict=True)
    ]


def _phase(config: ModelConfig, row: Int64, place: int, phase: str) -> str:
    here = config.modality_of(int(row[place]))
    if config.modality_of(int(row[place + 1])) != here:
        return "change-over"
    if place > 0 and config.modality_of(int(row[place - 1])) != here:
        return "after change-over"
    return phase


def _observation(
    config: ModelConfig, row: int, position: int, predicted: int, phase: str, values: NDArray[np.floating[Any]]
) -> Observation:
    ids = config.id_ranges[predicted]
    inside = values[ids.start : ids.stop].copy()
    leaked = int(np.count_nonzero(values != -np.inf)) - int(np.count_nonzero(inside != -np.inf))
    return Observation(row, position, predicted, phase, inside, leaked)
