"""Inputs that bite: what random sequences seldom are, and what real ones are.

- the same id over and over, as padding and silence are;
- rows of a single token, of every modality, predicting every modality;
- every pattern of modalities up to six tokens long, in one ragged batch;
- the ids whose embeddings stand out: the longest, the shortest, and those with the largest single channel, because what
  overflows in a trained model begins at such a token;
- a long context, over several buckets of the cache;
- the last positions that the model knows;
- sequences that the reference sampled itself, and those that a user brings (``token_file``).

Everything is a ``Scenario``, and is judged as all others are.
"""

from collections.abc import Iterable, Mapping, Sequence
from itertools import product

import numpy as np
import torch
from numpy.typing import NDArray

from motrt.export.parity.scenarios import Scenario
from motrt.model_def.config import ModelConfig
from motrt.model_def.head_surgery import Read
from motrt.runtime.sampling import Sampling
from motrt.runtime.schedule import Progress
from motrt.runtime.session import Session

Int64 = NDArray[np.int64]
Remarkable = Mapping[int, Sequence[int]]  # modality -> ids of its range

LONGEST_PATTERN = 6
NUM_REPEATS, NUM_STEPS = 16, 8
NUM_REMARKABLE = 4  # ids of each kind
LONG_CONTEXT, WATCHED = 600, 24  # tokens of the long row, and how many of its last positions are looked at

# A cache that reaches the model's last position may be large: beyond this the furthest that fits is taken.
MOST_CACHE_BYTES = 1 << 30

_ROWS_CHUNK = 1 << 14


def remarkable_ids(config: ModelConfig, read: Read) -> dict[int, list[int]]:
    """Per modality the ids whose embeddings are longest, shortest, and have the largest channel."""
    table = read("tok_embeddings.weight")
    lengths, peaks = torch.empty(len(table)), torch.empty(len(table))
    for start in range(0, len(table), _ROWS_CHUNK):
        rows = table[start : start + _ROWS_CHUNK].float()
        lengths[start : start + _ROWS_CHUNK], peaks[start : start + _ROWS_CHUNK] = rows.norm(dim=1), rows.abs().amax(dim=1)
    found = {}
    for modality, ids in enumerate(config.id_ranges):
        count = min(NUM_REMARKABLE, len(ids))
        own, own_peaks = lengths[ids.start : ids.stop], peaks[ids.start : ids.stop]
        kinds = (own.topk(count), own.topk(count, largest=False), own_peaks.topk(count))
        found[modality] = [ids.start + int(place) for kind in kinds for place in kind.indices]
    return found


def hostile_scenarios(config: ModelConfig, remarkable: Remarkable, itemsize: int = 4) -> tuple[Scenario, ...]:
    """Everything above that needs neither a model nor a file.

    Args:
        config: of the model.
        remarkable: what ``remarkable_ids`` found.
        itemsize: bytes of a number in the cache.
    """
    found = [_single_tokens(config)]
    if config.max_seq_len > 1:
        found += [_repeats(config), _remarkable(config, remarkable), *_patterns(config), *_last_positions(config, itemsize)]
    if config.max_seq_len > LONG_CONTEXT // 4:
        found.append(_long_context(config))
    return tuple(found)


def _single_tokens(config: ModelConfig) -> Scenario:
    rows = [
        np.array([here.start, there.stop - 1], np.int64) for here in config.id_ranges for there in config.id_ranges
    ]  # the second is only predicted
    return Scenario("rows of one token", tuple(rows), (1,) * len(rows))


def _repeats(config: ModelConfig) -> Scenario:
    prompt, steps = _lengths(config, NUM_REPEATS)
    rows = [np.full(prompt + steps + 1, ids.stop - 1, np.int64) for ids in config.id_ranges]
    return Scenario("the same id over and over", tuple(rows), (prompt,) * len(rows))


def _remarkable(config: ModelConfig, remarkable: Remarkable) -> Scenario:
    mixed = [one for ids in zip(*remarkable.values(), strict=False) for one in ids]
    prompt, steps = _lengths(config, max(len(mixed), 2))
    rows = [np.resize(np.array(list(ids), np.int64), prompt + steps + 1) for ids in (*remarkable.values(), mixed)]
    return Scenario("ids with outlying embeddings", tuple(rows), (prompt,) * len(rows))


def _lengths(config: ModelConfig, wanted: int) -> tuple[int, int]:
    """Ids of a prompt and decode steps behind it, within the model's positions."""
    prompt = min(wanted, max(1, config.max_seq_len // 2))
    return prompt, min(NUM_STEPS, config.max_seq_len - prompt)


def _patterns(config: ModelConfig) -> list[Scenario]:
    """Every pattern of two to six modalities; what comes after the last is the first again. One modality has none."""
    count = len(config.modalities)
    if count == 1:
        return []
    longest = min(LONGEST_PATTERN, config.max_seq_len)
    chance = np.random.default_rng(12)
    rows = []
    for length in range(2, longest + 1):
        for pattern in product(range(count), repeat=length):
            ranges = [config.id_ranges[modality] for modality in (*pattern, pattern[0])]
            rows.append(np.array([chance.integers(ids.start, ids.stop) for ids in ranges], np.int64))
    return [Scenario(f"every pattern of up to {longest}", tuple(rows), tuple(len(row) - 1 for row in rows))]


def _long_context(config: ModelConfig) -> Scenario:
    length = min(LONG_CONTEXT, config.max_seq_len - 1)
    prompt = length - WATCHED // 2
    row = _drawn(config, length + 1, seed=13, run=40)
    return Scenario("a long context", (row,), (prompt,), chunk_size=256, watched_from=length - WATCHED)


def _last_positions(config: ModelConfig, itemsize: int) -> list[Scenario]:
    """A few tokens at the very end of a cache that holds zeros before them."""
    per_position = 2 * config.num_layers * config.num_kv_heads * config.head_size * itemsize
    last = min(config.max_seq_len, MOST_CACHE_BYTES // per_position)
    length = min(NUM_STEPS, last)
    if last - length < 1:
        return []
    row = _drawn(config, length + 1, seed=14, run=2)
    return [Scenario("the last positions", (row,), (max(1, length // 2),), start=last - length)]


def _drawn(config: ModelConfig, length: int, seed: int, run: int) -> Int64:
    chance = np.random.default_rng(seed)
    ranges = [config.id_ranges[place // run % len(config.modalities)] for place in range(length)]
    return np.array([chance.integers(ids.start, ids.stop) for ids in ranges], np.int64)


def sampled_scenario(session: Session, seed: int = 15) -> Scenario | None:
    """Two sequences that ``session`` says itself, at temperature 1: what it will be asked to go on with when it serves."""
    config = session.config
    length = min(32, config.max_seq_len - 1)
    if length < 2:
        return None
    names = config.modality_names

    def turns(progress: Progress) -> str | None:
        done = len(progress.tokens)
        first = config.modality_of(progress.prompt[0])
        return names[(first + done // 8) % len(names)] if done < length else None

    rows = [[config.id_ranges[number % len(names)].start] for number in range(min(2, session.most_rows or 2))]
    samplings = [Sampling(temperature=1.0, seed=seed + number) for number in range(len(rows))]
    for step in session.generate([list(row) for row in rows], schedule=turns, sampling=samplings):
        rows[step.row].append(step.token_id)
    return Scenario("sampled from the model", tuple(np.array(row, np.int64) for row in rows), (length // 2,) * len(rows))


def brought_scenarios(config: ModelConfig, rows: Iterable[Int64]) -> list[Scenario]:
    """Sequences that a user brings: read as prompts, the last few tokens fed one at a time.

    Of long ones the last positions are looked at.
    """
    found = []
    for number, row in enumerate(rows, 1):
        fed = len(row) - 1
        steps = min(NUM_STEPS, fed - 1)
        name = f"your sequence {number}"
        found.append(Scenario(name, (row,), (fed - steps,), chunk_size=256, watched_from=max(0, fed - 4 * WATCHED)))
    return found
