"""How one id is chosen from one row of logits. Knows numpy alone: no session, no cache, no tokenizer.

A draw is a function of its arguments. Chance comes in as a number between 0 and 1 that ``uniform`` makes from a row's seed
and step, so what a row says never depends on which other rows share its batch, nor on how many.

The steps, in order, each on what the one before left:

1. repetition penalty: the logit of an id that occurred before is divided by the penalty where positive, multiplied where
   negative (Keskar et al. 2019, CTRL, section 4.1);
2. temperature: logits are divided by it; 0 means greedy, and ends here with the greatest logit, lowest id first;
3. top-k: the k greatest logits stay, ties by lowest id;
4. min-p: ids stay whose probability is at least min_p times the likeliest one's;
5. top-p: the shortest list of the likeliest ids stays whose probabilities, of those left, sum to at least top_p
   (Holtzman et al. 2020, nucleus sampling);
6. the inverse of the cumulative distribution, ids in rising order.

Nothing puts ids in order: that would cost many times what the rest does. Weights are float32, whose rounding is far below what
a model knows of its logits; sums are float64, of blocks first, because a running sum over 128256 values takes longest of all.
"""

import math
import os
import sys
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from motrt.errors import BackendError, InputError, raise_all
from motrt.model_def.config import ModelConfig

MAX_SEED = 2**63 - 1

# Values that are summed at once.
_BLOCK = 256

_UNIT_53 = 2.0**-53  # random bits that a float64 between 0 and 1 can hold


@dataclass(frozen=True)
class Sampling:
    """How the ids of one modality are chosen.

    Attributes:
        temperature: divides the logits; 0 is greedy, and the other values are then without effect, but for the penalty.
        top_k: keep the k likeliest ids; None keeps all.
        top_p: keep the likeliest ids that together reach this probability, in (0, 1]; None keeps all.
        min_p: keep ids at least this likely relative to the likeliest, in [0, 1); None keeps all.
        repetition_penalty: above 1 makes ids that occurred before less likely, below 1 more; 1 leaves them be.
        seed: where chance starts, 0..2**63-1; None takes a fresh one from the operating system.

    Raises:
        InputError: naming every value that is out of range or of the wrong type.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        raise_all(InputError, "sampling values out of range:", self.problems())

    def problems(self) -> list[str]:
        """Every value out of range, as sentences; none in a ``Sampling`` that exists."""
        wanted = {
            "temperature": "a number of at least 0, 0 being greedy",
            "top_k": "a whole number of at least 1, or None",
            "top_p": "a number above 0 and at most 1, or None",
            "min_p": "a number of at least 0 and below 1, or None",
            "repetition_penalty": "a number above 0, 1 being no penalty",
            "seed": "a whole number in 0..2**63-1, or None",
        }
        is_right = {
            "temperature": _is_number(self.temperature) and self.temperature >= 0,
            "top_k": self.top_k is None or (_is_whole(self.top_k) and self.top_k >= 1),
            "top_p": self.top_p is None or (_is_number(self.top_p) and 0 < self.top_p <= 1),
            "min_p": self.min_p is None or (_is_number(self.min_p) and 0 <= self.min_p < 1),
            "repetition_penalty": _is_number(self.repetition_penalty) and self.repetition_penalty > 0,
            "seed": self.seed is None or (_is_whole(self.seed) and 0 <= self.seed <= MAX_SEED),
        }
        return [f"{name} must be {wanted[name]} ({getattr(self, name)!r} came)" for name in wanted if not is_right[name]]

    @property
    def is_greedy(self) -> bool:
        return self.temperature == 0


SamplingByModality = Sampling | Mapping[str, Sampling]


def sampling_for(sampling: SamplingByModality | None, config: ModelConfig) -> dict[str, Sampling]:
    """One ``Sampling`` for every modality of ``config``, in its order.

    Args:
        sampling: one for all, or one by modality name, those left out being greedy; None is greedy throughout.
        config: the model's, for the names there are.

    Raises:
        InputError: for names that the model does not have, and for values that are no ``Sampling``.
    """
    if sampling is None:
        sampling = Sampling()
    if isinstance(sampling, Sampling):
        return dict.fromkeys(config.modality_names, sampling)
    if not isinstance(sampling, Mapping):
        raise InputError(f"sampling must be a Sampling, or one by modality name ({type(sampling).__name__} came)")
    names = ", ".join(config.modality_names)
    problems = [f"no modality {name!r}: this model has {names}" for name in sampling if name not in config.modality_names]
    problems += [
        f"the value for {name!r} must be a Sampling ({type(value).__name__} came)"
        for name, value in sampling.items()
        if not isinstance(value, Sampling)
    ]
    raise_all(InputError, "sampling by modality:", problems)
    return {name: sampling.get(name, Sampling()) for name in config.modality_names}


def uniform(seed: int, step: int) -> float:
    """The random number in [0, 1) that belongs to ``step`` of a row whose seed is ``seed``.

    Counter-based (Philox 4x64-10; Salmon et al. 2011): the seed is the key and the step the counter, so any step's number
    is had without those before it. Taken from the raw bits, which numpy keeps stable between versions.

    Raises:
        InputError: for a seed outside 0..2**63-1 or a negative step.
    """
    if not (_is_whole(seed) and 0 <= seed <= MAX_SEED):
        raise InputError(f"seed must be in 0..2**63-1 ({seed!r} came)")
    if not (_is_whole(step) and 0 <= step <= MAX_SEED):
        raise InputError(f"step must be a whole number of at least 0 ({step!r} came)")
    bits = np.random.Philox(key=int(seed), counter=int(step)).random_raw()
    return float(int(bits) >> 11) * _UNIT_53


def fresh_seed() -> int:
    """A seed that nobody can foresee, from the operating system's entropy."""
    return int.from_bytes(os.urandom(8), "little") >> 1


def draw(
    logits: NDArray[np.floating[Any]],
    sampling: Sampling,
    *,
    uniform: float = 0.0,
    seen: NDArray[np.integer[Any]] | Collection[int] = (),
) -> int:
    """Choose one id.

    Args:
        logits: [ids of one modality's range] of one row. -inf excludes an id. Left as it came.
        sampling: see ``Sampling``.
        uniform: chance, in [0, 1); greedy needs none.
        seen: ids that occurred before, counted from the start of the range, in any order and as often as may be.

    Returns:
        The chosen id, counted from the start of the range.

    Raises:
        BackendError: for logits that no model in order gives: NaN, +inf, or all -inf.
        InputError: for a wrong shape, a ``uniform`` outside [0, 1), or ``seen`` outside the range.
    """
    if not 0 <= uniform < 1:
        raise InputError(f"uniform must be in [0, 1) ({uniform!r} came)")
    row = _penalised(_checked(logits), seen, sampling.repetition_penalty)
    best = int(np.argmax(row))
    if sampling.is_greedy:
        return best
    ids = _largest(row, sampling.top_k) if sampling.top_k is not None and sampling.top_k < len(row) else None
    scaled = _scaled(row if ids is None else row[ids], float(row[best]), sampling.temperature)
    weights = np.exp(scaled)  # the likeliest one's is exactly 1
    if sampling.min_p:
        weights[scaled < math.log(sampling.min_p)] = 0
    if sampling.top_p is not None and sampling.top_p < 1:
        weights[~_nucleus(weights, sampling.top_p)] = 0
    chosen = _where_sum_passes(weights, uniform, "right")
    return chosen if ids is None else int(ids[chosen])


def _checked(logits: NDArray[np.floating[Any]]) -> NDArray[np.floating[Any]]:
    row = np.asarray(logits)
    if row.ndim != 1 or row.size == 0 or row.dtype.kind != "f":
        raise InputError(f"logits must be one row of floating-point numbers ({row.dtype}{list(row.shape)} came)")
    greatest = float(row[np.argmax(row)])  # NaN counts as the greatest, so one pass finds every fault
    if not np.isfinite(greatest):
        what = "are all -inf" if greatest == -np.inf else f"contain {'NaN' if np.isnan(greatest) else '+inf'}"
        raise BackendError(
            f"the model's logits {what}: no id can be chosen. Look for NaN or Inf in its weights with 'motrt inspect', or "
            "for an overflow of its precision by running it in fp32 or bf16"
        )
    return row


def _penalised(
    row: NDArray[np.floating[Any]], seen: NDArray[np.integer[Any]] | Collection[int], penalty: float
) -> NDArray[np.floating[Any]]:
    if penalty == 1 or len(seen) == 0:
        return row
    ids = np.unique(np.asarray(seen if isinstance(seen, np.ndarray) else list(seen)))
    if ids.dtype.kind not in "iu" or ids[0] < 0 or ids[-1] >= len(row):
        raise InputError(f"seen must hold whole numbers in 0..{len(row) - 1} ({ids[0]}..{ids[-1]} came)")
    ids = ids[np.isfinite(row[ids])]  # an excluded id stays excluded
    before = row[ids].astype(np.float64)
    limits = np.finfo(row.dtype)
    with np.errstate(over="ignore"):  # clipped below: an extreme penalty makes a logit extreme, not infinite
        after = np.where(before > 0, before / penalty, before * penalty)
    penalised: NDArray[np.floating[Any]] = row.copy()
    penalised[ids] = np.clip(after, limits.min, limits.max)
    return penalised


def _scaled(values: NDArray[np.floating[Any]], greatest: float, temperature: float) -> NDArray[np.float32]:
    """Logarithms of the probabilities relative to the likeliest one's, which is exactly 0."""
    limits = np.finfo(np.float32)
    with np.errstate(over="ignore", under="ignore"):  # to -inf at a tiny temperature, to 0 at a huge one: both right
        below = np.subtract(values, values.dtype.type(greatest)).astype(np.float32, copy=False)
        scaled: NDArray[np.float32] = below / np.float32(min(max(float(temperature), float(limits.tiny)), float(limits.max)))
        return scaled


def _nucleus(weights: NDArray[np.float32], share: float) -> NDArray[np.bool_]:
    """Which of ``weights`` are the fewest of the greatest that together reach ``share`` of all; equal ones by lowest place."""
    falling = np.sort(weights)[::-1]
    count = 1 + _where_sum_passes(falling, share, "left")
    threshold = falling[count - 1]
    kept: NDArray[np.bool_] = weights > threshold
    ties = np.flatnonzero(weights == threshold)
    kept[ties[: count - int(np.count_nonzero(kept))]] = True
    return kept


def _where_sum_passes(weights: NDArray[np.float32], share: float, side: Literal["left", "right"]) -> int:
    """Where the running sum of ``weights`` reaches ``share`` of all ("left") or exceeds it ("right"); a weight above 0."""
    sums = np.cumsum(np.add.reduceat(weights, np.arange(0, len(weights), _BLOCK)), dtype=np.float64)
    target = share * sums[-1]
    block = _first_beyond(sums, target, side)
    within = np.cumsum(weights[block * _BLOCK : (block + 1) * _BLOCK], dtype=np.float64)
    return block * _BLOCK + _first_beyond(within, target - (sums[block - 1] if block else 0.0), side)


def _first_beyond(sums: NDArray[np.float64], target: float, side: Literal["left", "right"]) -> int:
    """The last place that adds anything where rounding would put it behind all."""
    return int(min(np.searchsorted(sums, target, side), np.searchsorted(sums, sums[-1], "left")))


def _largest(values: NDArray[np.floating[Any]], count: int) -> NDArray[np.intp]:
    """Where the ``count`` greatest stand, ties by lowest place, in rising order of place."""
    edge = len(values) - int(count)
    threshold = np.partition(values, edge)[edge]
    above = np.flatnonzero(values > threshold)
    ties = np.flatnonzero(values == threshold)[: int(count) - len(above)]
    return np.sort(np.concatenate([above, ties]))


def _is_number(value: Any) -> bool:
    plain = value.item() if isinstance(value, np.number) else value
    if isinstance(plain, bool) or not isinstance(plain, int | float):
        return False
    return -sys.float_info.max <= plain <= sys.float_info.max  # false for NaN


def _is_whole(value: object) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool)
