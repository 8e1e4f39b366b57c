"""How far rounding alone moves the logits of each position that is compared, and so how far a right graph may be from them.

A trained model is steep at a few positions and flat at the rest: a few channels and the first tokens carry magnitudes hundreds
of times the others', and a softmax over large scores nearly ties there. One limit for all positions is too tight for the steep
ones and so loose for the flat ones that a fault could hide. So the reference is asked about every position once more, several
times over, each time with independent relative errors of the dtype's rounding in the inputs and outputs of every product, norm
and lookup (``relative_errors``), and computing in float32, whose own sums round as a backend's do. The root mean square of what
that does to a row's logits is the row's *noise*.

What a row depends on is the ids up to its position, so the noise is kept by those, and whoever asks the same sequence in
another way (chunks, steps, a batch) finds it again. A row that was never measured is taken to be as steep as the steepest.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import sqrt
from typing import Any

import numpy as np
from numpy.typing import NDArray

from motrt.export.parity.scenarios import MOST_TOGETHER, Observation, Scenario
from motrt.export.relative_errors import relative_errors_in
from motrt.model_def.config import ModelConfig
from motrt.runtime.session import Session
from motrt.runtime.step_inputs import StepInputs, modality_of_ids
from motrt.runtime.tolerances import (
    NOISE_SAFETY,
    UNIT_ROUNDOFF,
    bounded_noise,
    expected_noise,
    explain_limit,
    limit_of,
    row_limit,
)
from motrt.runtime.torch_session import TorchSession

Int64 = NDArray[np.int64]
Floats = NDArray[np.floating[Any]]

# A steep row's noise comes from one direction: of four squares of one normal error the mean is under a sixteenth of its
# expectation once in a hundred and fifty rows, of eight once in six thousand.
NUM_SAMPLES = 8

# A part's budget grows with the steepest row's noise. Beyond this a budget would excuse a fault of the part.
LARGEST_CONDITIONING = 100.0


@dataclass(frozen=True)
class Key:
    """What the logits of one position depend on.

    Attributes:
        ids: of the row up to the position and with it, as bytes.
        start: positions before the row, which hold zeros.
        predicted: the modality predicted there.
    """

    ids: bytes
    start: int
    predicted: int


def key_of(scenario: Scenario, observation: Observation) -> Key:
    """Return what the logits of ``observation`` depend on."""
    row = scenario.rows[observation.row]
    return Key(row[: observation.position - scenario.start + 1].tobytes(), scenario.start, observation.predicted)


@dataclass(frozen=True)
class RowLimits:
    """How far from the reference a right graph's logits may be, row by row.

    Attributes:
        config: of the model.
        precision: that the graph computes in.
        noise: of each row that was measured, a relative L2 error.
        worst: the widest limit, and that of any other row.
        steepest: the largest noise.
        safety: how many times its noise a row may be off.
    """

    config: ModelConfig
    precision: str
    noise: Mapping[Key, float]
    worst: float
    steepest: float = 0.0
    safety: float = NOISE_SAFETY

    @classmethod
    def of_noise(
        cls, config: ModelConfig, precision: str, noise: Mapping[Key, float], safety: float = NOISE_SAFETY
    ) -> "RowLimits":
        """Return the limits that measured noise sets; a row that is not in ``noise`` is taken to be the steepest."""
        steepest = max(noise.values(), default=0.0)
        return cls(config, precision, noise, row_limit(config, precision, steepest, safety), steepest, safety)

    @classmethod
    def of_formula(cls, session: Session) -> "RowLimits":
        """Return the limits of a session whose model's noise nobody has measured."""
        return cls(session.config, session.precision, {}, limit_of(session))

    @property
    def conditioning(self) -> float:
        """How many times more than a well-behaved model this one amplifies rounding at its steepest row: 1 to 100."""
        found = max(1.0, self.steepest / expected_noise(self.config, self.precision))
        return min(found, LARGEST_CONDITIONING)

    def noise_of(self, key: Key) -> float:
        """Return the relative L2 error that rounding alone makes at a row; 0 where nothing is known."""
        return self.noise.get(key, self.steepest)

    def of(self, key: Key) -> float:
        """Return the largest relative L2 error that a row may have."""
        return row_limit(self.config, self.precision, self.noise[key], self.safety) if key in self.noise else self.worst

    def to_dict(self) -> dict[str, float | int | str]:
        """Return how the noise is spread, as plain JSON values."""
        found = np.array(sorted(self.noise.values()) or [0.0])
        return {
            "precision": self.precision,
            "rows": len(self.noise),
            "expected": expected_noise(self.config, self.precision),
            "median": float(np.median(found)),
            "p95": float(np.quantile(found, 0.95)),
            "largest": float(found[-1]),
            "conditioning": self.conditioning,
        }

    def explanation(self) -> list[str]:
        """Return where the limits come from, with this model's numbers, as sentences."""
        spread = self.to_dict()
        lines = explain_limit(self.config, self.precision)
        if self.noise:
            lines.append(
                f"measured: the reference with such errors in every product, norm and lookup, {NUM_SAMPLES} times over: its "
                f"logits move by {spread['median']:.2g} in the median of {spread['rows']} rows, {spread['p95']:.2g} at the "
                f"95th percentile, {spread['largest']:.2g} at the steepest; each row is held against its own figure"
            )
        return lines


@dataclass(frozen=True)
class _Row:
    """Ids whose noise is wanted from one place on, predicting what comes next."""

    ids: Int64
    start: int
    watched_from: int


def logits_by_row(session: TorchSession, scenarios: Iterable[Scenario]) -> dict[Key, Floats]:
    """Return the logits of every watched position of some scenarios, by one pass over whole rows; no step by step.

    Several rows share a pass. Within the range of what comes next, in float32 where the session computes in more.
    """
    return {
        key: logits.astype(np.float32)
        for batch in _batches(_distinct(scenarios))
        for key, logits in _logits(session, batch).items()
    }


def measure_limits(
    expected: Mapping[Key, Floats],
    noisy: TorchSession,
    precision: str,
    scenarios: Iterable[Scenario],
    error: float | None = None,
    safety: float = NOISE_SAFETY,
) -> RowLimits:
    """Measure the noise of every watched position of some scenarios.

    Args:
        expected: the reference's logits of them, which ``logits_by_row`` gave.
        noisy: the reference in float32, which is given errors and is itself again behind that.
        precision: that the graph computes in.
        scenarios: what will be asked of the graph.
        error: root mean square of the relative errors; None: unit roundoff of ``precision``.
        safety: how many times its noise a row may be off.
    """
    squares = dict.fromkeys(expected, 0.0)
    for batch in _batches(_distinct(scenarios)):
        for seed in range(NUM_SAMPLES):
            with relative_errors_in(noisy.decoder, error or UNIT_ROUNDOFF[precision], seed):
                for key, logits in _logits(noisy, batch).items():
                    squares[key] += _squared_error(expected[key], logits)
    noise = {key: bounded_noise(sqrt(total / NUM_SAMPLES)) for key, total in squares.items()}
    return RowLimits.of_noise(noisy.config, precision, noise, safety)


def observations_of(scenario: Scenario, logits: Mapping[Key, Floats], config: ModelConfig) -> list[Observation]:
    """Return what ``logits_by_row`` gave for one scenario in the form and order of ``observe``."""
    return [
        replace(one, logits=logits[key_of(scenario, one)])
        for number, row in enumerate(scenario.rows)
        for at in range(scenario.watched_from, len(row) - 1)
        for one in (Observation(number, scenario.start + at, config.modality_of(int(row[at + 1])), "one pass", _NOTHING, 0),)
    ]


_NOTHING = np.empty(0, np.float32)


def _squared_error(expected: Floats, actual: Floats) -> float:
    """Return the square of the relative L2 error of one row."""
    wanted = expected.astype(np.float64)
    difference = actual.astype(np.float64) - wanted
    return float(difference @ difference) / max(float(wanted @ wanted), 1e-60)


def _distinct(scenarios: Iterable[Scenario]) -> list[_Row]:
    """Every row once, those that begin another left out; rows of equal length stand together."""
    rows: dict[tuple[bytes, int], _Row] = {}
    for scenario in scenarios:
        for ids in scenario.rows:
            key, row = (ids.tobytes(), scenario.start), _Row(ids, scenario.start, scenario.watched_from)
            if key not in rows or row.watched_from < rows[key].watched_from:
                rows[key] = row
    return sorted(rows.values(), key=lambda row: (row.start, len(row.ids)))


def _batches(rows: Sequence[_Row]) -> Iterator[list[_Row]]:
    """Yield rows that are read in one pass: of one start, and ``MOST_TOGETHER`` positions together, or one alone."""
    batch: list[_Row] = []
    for row in rows:
        if batch and (row.start != batch[0].start or (len(batch) + 1) * (len(row.ids) - 1) > MOST_TOGETHER):
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch


def _logits(session: TorchSession, batch: Sequence[_Row]) -> dict[Key, Floats]:
    """Return the logits of every watched position, within the range of what comes next, by one pass over whole rows."""
    config, width, start = session.config, max(len(row.ids) for row in batch) - 1, batch[0].start
    ids = np.stack([np.pad(row.ids[:-1], (0, width - len(row.ids) + 1), mode="edge") for row in batch])
    places = [(number, at) for number, row in enumerate(batch) for at in range(row.watched_from, len(row.ids) - 1)]
    predicted = np.array([config.modality_of(int(batch[number].ids[at + 1])) for number, at in places], np.int64)
    inputs = StepInputs(
        input_ids=ids,
        modality_mask=modality_of_ids(ids, config),
        cache_position=np.full(len(batch), start, np.int64),
        logits_index=np.array([number * width + at for number, at in places], np.int64),
        head_mask=predicted,
    )
    logits = session.run(inputs, session.new_cache(len(batch), start + width))
    found = {}
    for (number, at), modality, values in zip(places, predicted, logits, strict=True):
        owned = config.id_ranges[modality]
        found[Key(batch[number].ids[: at + 1].tobytes(), start, int(modality))] = values[owned.start : owned.stop]
    return found
