"""How fast a session is, and how near to what memory allows. Knows sessions and numpy; prints nothing.

A decode step reads every weight of its modality once, and the keys and values of what came before: on most machines that, and
not arithmetic, is what it costs. So beside tokens per second stand the bytes of a token, the bandwidth that they came to, and
the share of a bandwidth that is measured in the same run: of reading as many large arrays as there are cores, one thread each.

The bandwidth is the host's, so the share says nothing of a session on a GPU. Peak memory counts the arrays that it is measured
with: 128 MiB a core.

Cases take turns, a few steps each, so that a noisy machine is noisy for all of them; figures are medians with quartiles.
"""

import os
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from motrt.errors import CapacityError, InputError
from motrt.model_def.parameters import Parameter, parameters, parameters_read
from motrt.model_def.quantization import Quantization, stored_bytes_of
from motrt.model_def.signature import DTYPE_OF_PRECISION
from motrt.runtime.kv_cache import KVCache
from motrt.runtime.session import Session

MOST_PROMPT, MOST_TOKENS, MOST_BATCH = 1 << 16, 1 << 16, 1 << 10

NUM_ROUNDS = 6  # turns of every case
NUM_PREFILLS = 3
WARM_UP_STEPS = 2

_ARRAY_BYTES = 1 << 27  # more than any cache holds
_ITEMSIZES = {"float64": 8, "float32": 4, "float16": 2, "bfloat16": 2}


@dataclass
class DecodeCase:
    """Rows that go on in their own modality, a step at a time.

    Attributes:
        name: ``text``, ``audio``, ... or ``mixed``.
        modalities: of each row.
        cache: what they hold.
        seconds: of every timed step.
    """

    name: str
    modalities: tuple[int, ...]
    cache: KVCache
    seconds: list[float] = field(default_factory=list)

    def steps(self, session: Session, count: int) -> None:
        """``count`` timed decode steps of all rows."""
        config = session.config
        names = [config.modality_names[index] for index in self.modalities]
        for step in range(count):
            ids = [_some_id(config.id_ranges[index], step) for index in self.modalities]
            started = time.perf_counter()
            session.decode_step(ids, names, self.cache)
            self.seconds.append(time.perf_counter() - started)


def benchmark(
    session: Session,
    quantization: Quantization | None = None,
    num_prompt: int = 128,
    num_tokens: int = 48,
    batch_size: int = 1,
    on_progress: Callable[[int], None] = lambda count: None,
) -> dict[str, Any]:
    """Prefill and decode of each modality and of a mixed batch.

    Args:
        session: what is measured; it must have its machine for itself.
        quantization: of its weights; None: all are of its precision.
        num_prompt: ids of a prompt.
        num_tokens: decode steps of each case.
        batch_size: rows of each case; the mixed one has at least one of every modality.
        on_progress: told how many of ``num_parts`` are done.

    Returns:
        Plain JSON values: by case tokens/s with quartiles, bytes per step, share of the bandwidth; the same as flat names
        (``text_decode_tokens_per_s``) for machines.

    Raises:
        InputError: for sizes that are out of range.
        CapacityError: for more positions than the model holds.
    """
    _refuse_sizes(num_prompt, num_tokens, batch_size)
    config, most_rows = session.config, session.most_rows or MOST_BATCH
    if batch_size > most_rows:
        raise InputError(f"batch must be at most {most_rows}, the rows that these engines were built for ({batch_size} came)")
    if num_prompt + num_tokens + WARM_UP_STEPS > config.max_seq_len:
        raise CapacityError(
            f"a prompt of {num_prompt} ids, {WARM_UP_STEPS} steps to warm up and {num_tokens} tokens are more than the "
            f"{config.max_seq_len} positions that this model holds per row: ask for fewer"
        )
    everyone = range(len(config.modalities))
    bandwidths = [measure_bandwidth()]
    first = _time_to_first_token(session, num_prompt)
    prefills: dict[str, list[float]] = {name: [] for name in config.modality_names}
    cases = []
    for index in everyone:
        prompts = [_prompt(session, index, num_prompt, row) for row in range(batch_size)]
        seconds, cache = _timed_prefills(session, prompts, config.modality_names[index])
        prefills[config.modality_names[index]] = seconds
        cases.append(DecodeCase(config.modality_names[index], (index,) * batch_size, cache))
        on_progress(1)
    if 1 < len(everyone) <= most_rows:
        mixed = tuple(row % len(everyone) for row in range(max(batch_size, len(everyone))))
        prompts = [_prompt(session, index, num_prompt, row) for row, index in enumerate(mixed)]
        _, cache = session.prefill(prompts, [config.modality_names[index] for index in mixed])
        cases.append(DecodeCase("mixed", mixed, cache))
    for case in cases:
        session.reserve(case.cache, num_prompt + num_tokens + WARM_UP_STEPS)
        case.steps(session, WARM_UP_STEPS)
        case.seconds.clear()
    turn = -(-num_tokens // NUM_ROUNDS)
    for start in range(0, num_tokens, turn):
        for case in cases:
            case.steps(session, min(turn, num_tokens - start))
        on_progress(1)
    bandwidths.append(measure_bandwidth())
    bandwidth = float(np.median(bandwidths))
    decode = {case.name: _decode_figures(session, quantization, case, bandwidth) for case in cases}
    prefill = {name: _figures(seconds, num_prompt * batch_size) for name, seconds in prefills.items()}
    return {
        "backend": session.backend,
        "precision": session.precision,
        "weights": session.weights or session.precision,
        "cores": os.cpu_count(),
        "prompt": num_prompt,
        "tokens": num_tokens,
        "batch": batch_size,
        "prefill": prefill,
        "decode": decode,
        "seconds_to_first_token": first,
        **_flat(session, prefill, decode),
        "memory_bandwidth_bytes_per_s": bandwidth,
        "peak_rss_bytes": peak_rss_bytes(),
    }


def num_parts(session: Session, num_tokens: int) -> int:
    """How often ``benchmark`` tells of progress."""
    turn = -(-num_tokens // NUM_ROUNDS)
    return len(session.config.modalities) + -(-num_tokens // turn)


def measure_bandwidth(num_threads: int = 0) -> float:
    """Bytes per second that all cores together read from memory; the best of a few passes, which is what could be had.

    Args:
        num_threads: how many read; 0: one per core.
    """
    count = num_threads or os.cpu_count() or 1
    arrays = [np.ones(_ARRAY_BYTES // 4, np.float32) for _ in range(count)]
    best = 0.0
    for _ in range(4):
        readers = [threading.Thread(target=one.sum) for one in arrays]
        started = time.perf_counter()
        for reader in readers:
            reader.start()
        for reader in readers:
            reader.join()
        best = max(best, count * _ARRAY_BYTES / (time.perf_counter() - started))
    return best


def peak_rss_bytes() -> int | None:
    """The most memory that this process ever had resident; None where the system does not say."""
    try:
        import resource
    except ImportError:  # not on Windows
        return None
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(most) if sys.platform == "darwin" else int(most) * 1024


def _refuse_sizes(num_prompt: int, num_tokens: int, batch_size: int) -> None:
    limits = {"prompt": (num_prompt, MOST_PROMPT), "tokens": (num_tokens, MOST_TOKENS), "batch": (batch_size, MOST_BATCH)}
    for name, (value, most) in limits.items():
        if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= most:
            raise InputError(f"{name} must be a whole number in 1..{most} ({value!r} came)")


def _some_id(ids: range, number: int) -> int:
    return ids[(7 + 31 * number) % len(ids)]


def _prompt(session: Session, modality: int, count: int, row: int) -> list[int]:
    ids = session.config.id_ranges[modality]
    return [_some_id(ids, row + place) for place in range(count)]


def _time_to_first_token(session: Session, num_prompt: int) -> float:
    """From a prompt of the first modality to the first token of ``generate``, in a warm session."""
    prompt = _prompt(session, 0, num_prompt, 0)
    next(iter(session.generate(prompt[:1], max_tokens=1)))
    started = time.perf_counter()
    next(iter(session.generate(prompt, max_tokens=1)))
    return time.perf_counter() - started


def _timed_prefills(session: Session, prompts: Sequence[Sequence[int]], name: str) -> tuple[list[float], KVCache]:
    seconds = []
    for _ in range(NUM_PREFILLS):
        started = time.perf_counter()
        _, cache = session.prefill(prompts, name)
        seconds.append(time.perf_counter() - started)
    return seconds, cache


def _figures(seconds: Sequence[float], num_tokens: int) -> dict[str, float]:
    """Tokens per second: the median, and the quartiles of what it was over time."""
    slow, middle, fast = (num_tokens / value for value in np.percentile(seconds, [75, 50, 25]))
    return {"tokens_per_s": float(middle), "tokens_per_s_quartile_1": float(slow), "tokens_per_s_quartile_3": float(fast)}


def _decode_figures(
    session: Session, quantization: Quantization | None, case: DecodeCase, bandwidth: float
) -> dict[str, float | int]:
    weights = weight_bytes_per_step(session, quantization, set(case.modalities))
    cache = cache_bytes_per_step(session, case.cache.lengths - len(case.seconds) // 2)
    reached = (weights + cache) / float(np.median(case.seconds))
    return {
        **_figures(case.seconds, len(case.modalities)),
        "rows": len(case.modalities),
        "weight_bytes_per_step": weights,
        "cache_bytes_per_step": cache,
        "bytes_per_s": reached,
        "share_of_limit": reached / bandwidth,
    }


def weight_bytes_per_step(session: Session, quantization: Quantization | None, modalities: set[int]) -> int:
    """Bytes of the weights that a step with rows of ``modalities`` reads, each once."""
    itemsize = _ITEMSIZES[DTYPE_OF_PRECISION[session.precision]]
    read: dict[tuple[str, str | int], Parameter] = {}
    for modality in modalities:
        name = session.config.modality_names[modality]
        whole = {one.name: one.shape for one in parameters(session.config)}
        # What is read in part, a table or a shared head, is another part for each modality.
        read |= {
            (one.name, "all" if one.shape == whole[one.name] else modality): one
            for one in parameters_read(session.config, name)
        }
    return stored_bytes_of(session.config, quantization, itemsize, tuple(read.values()))


def cache_bytes_per_step(session: Session, lengths: NDArray[np.int64]) -> int:
    """Bytes of the keys and values that a step reads of rows that hold ``lengths`` tokens."""
    config, itemsize = session.config, _ITEMSIZES[DTYPE_OF_PRECISION[session.precision]]
    return int(lengths.sum()) * 2 * config.num_layers * config.num_kv_heads * config.head_size * itemsize


def _flat(session: Session, prefill: dict[str, Any], decode: dict[str, Any]) -> dict[str, float]:
    """The figures that people compare, by names that say all."""
    found = {f"{name}_prefill_tokens_per_s": one["tokens_per_s"] for name, one in prefill.items()}
    for name, one in decode.items():
        found |= {f"{name}_decode_tokens_per_s": one["tokens_per_s"], f"{name}_share_of_limit": one["share_of_limit"]}
    for modality in session.config.modalities:
        if modality.frames_per_second:
            per_second = modality.codes_per_frame * modality.frames_per_second
            found[f"{modality.name}_seconds_per_s"] = decode[modality.name]["tokens_per_s"] / per_second
    return found
