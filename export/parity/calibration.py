"""How much rounding alone moves this model's logits: the reference against itself, computed in other orders.

The limit of the gate follows from the arithmetic of a well-behaved model (``runtime.tolerances``). A model may amplify rounding
more than that: large norms before a softmax do. So the reference is asked the same in several ways that are equal in real
arithmetic (a token at a time, in chunks, beside other rows, on one thread), and the worst difference is held against what the
formula expects of it. The quotient has no unit and does not depend on the dtype: it is a property of the model. Where it is
above one, the gate's limit is that much wider, and says so; beyond ``LARGEST_CONDITIONING`` nothing could be proven any more.

It is a property of single positions, too: a softmax over large scores is steep at the few positions where two of them nearly
tie, and flat elsewhere. One row of some fifty positions misses those that several hundred others hold (models with norms and
embeddings up to thirty times as large in a few channels came out up to 14 times over a limit that one row had set). So every
row of the usual scenarios is asked, once as it is compared and once more in chunks.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from math import sqrt

import torch

from motrt.export.parity.metrics import compare_rows
from motrt.export.parity.scenarios import Observation, Scenario, observe
from motrt.model_def.config import ModelConfig
from motrt.runtime.session import Session
from motrt.runtime.tolerances import ACCUMULATION, ROUNDINGS_OUTSIDE, ROUNDINGS_PER_LAYER, SAFETY, UNIT_ROUNDOFF

# A model that turns roundings into errors a hundred times the usual is not told from a fault by comparing logits.
LARGEST_CONDITIONING = 100.0

CHUNK = 7


@dataclass(frozen=True)
class Calibration:
    """What the reference says of itself.

    Attributes:
        precision: what the reference computed in.
        differences: the worst relative L2 error of a row of logits, by what was done otherwise.
        expected: what roundings in this precision come to: unit roundoff, times the root of their number, times accumulation.
    """

    precision: str
    expected: float
    differences: Mapping[str, float] = field(default_factory=dict)

    @property
    def worst(self) -> float:
        return max(self.differences.values(), default=0.0)

    @property
    def conditioning(self) -> float:
        """By what the gate's limit is multiplied: at least 1, which is a model like any other."""
        return min(max(1.0, self.worst / self.expected), LARGEST_CONDITIONING)

    def to_dict(self) -> dict[str, float | str | dict[str, float]]:
        """Plain JSON values."""
        return {
            "precision": self.precision,
            "expected": self.expected,
            "conditioning": self.conditioning,
            "differences": dict(self.differences),
        }


def expected_difference(config: ModelConfig, precision: str) -> float:
    """The gate's limit without its safety factor."""
    roundings = ROUNDINGS_PER_LAYER * config.num_layers + ROUNDINGS_OUTSIDE
    return UNIT_ROUNDOFF[precision] * sqrt(roundings) * ACCUMULATION[precision]


def calibrate(
    reference: Session, scenario: Scenario, said: Sequence[tuple[Scenario, Sequence[Observation]]] = ()
) -> Calibration:
    """Ask ``reference`` the same in ways that are equal in real arithmetic.

    Args:
        reference: what the gate believes.
        scenario: whose first row is asked in every way.
        said: other scenarios and what was said to them; every row of theirs is asked once more, in chunks.
    """
    row = scenario.rows[0]
    count = len(row) - 1
    whole = observe(reference, Scenario("whole", (row,), (count,)))
    ways = {
        "a token at a time": Scenario("steps", (row,), (1,)),
        f"in chunks of {CHUNK}": Scenario("chunks", (row,), (count,), CHUNK),
        "beside two other rows": Scenario("batch", (row, row[::-1].copy(), row), (count,) * 3),
    }
    if reference.most_rows is not None and reference.most_rows < 3:
        del ways["beside two other rows"]
    found = {name: _worst(whole, observe(reference, way)) for name, way in ways.items()}
    with on_one_thread():
        found["on one thread"] = _worst(whole, observe(reference, Scenario("whole", (row,), (count,))))
    if said:
        found[f"every row in chunks of {CHUNK}"] = _worst_in_chunks(reference, said)
    return Calibration(reference.precision, expected_difference(reference.config, reference.precision), found)


def _worst_in_chunks(reference: Session, said: Sequence[tuple[Scenario, Sequence[Observation]]]) -> float:
    """What was said to the scenarios, against all of their rows read in chunks to their ends."""
    rows = [row for scenario, _ in said for row in scenario.rows]
    in_chunks = Scenario("in chunks", tuple(rows), tuple(len(row) - 1 for row in rows), CHUNK)
    places, first = [], 0
    for scenario, observations in said:
        places += [replace(one, row=one.row + first) for one in observations]
        first += len(scenario.rows)
    return _worst(places, observe(reference, in_chunks))


def _worst(said: Sequence[Observation], other: Sequence[Observation]) -> float:
    by_place = {(one.row, one.position): one for one in other}
    return max(compare_rows(one.logits, by_place[one.row, one.position].logits).relative_l2 for one in said)


@contextmanager
def on_one_thread() -> Iterator[None]:
    """PyTorch on one thread, for as long as this is open."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def explanation(
    config: ModelConfig, precision: str, limit: float, calibration: Calibration, rounded: float | None
) -> list[str]:
    """Where the gate's limit comes from, with this model's numbers.

    Args:
        config: of the model.
        precision: of what was examined.
        limit: of the relative L2 error, as it was used.
        calibration: of the reference.
        rounded: what 8-bit activations are allowed besides; None: products do not round them.
    """
    roundings = ROUNDINGS_PER_LAYER * config.num_layers + ROUNDINGS_OUTSIDE
    own = SAFETY * expected_difference(config, precision)
    lines = [
        f"unit roundoff of {precision}: {UNIT_ROUNDOFF[precision]:.3g} (half the distance of neighbours around 1)",
        f"roundings one after another: {ROUNDINGS_PER_LAYER} x {config.num_layers} layers + {ROUNDINGS_OUTSIDE} = {roundings}; "
        f"independent ones add up as the root of their number: {sqrt(roundings):.1f}",
        f"partial sums of products: {ACCUMULATION[precision]:g} times ({precision} adds up in "
        f"{precision if precision in ('fp32', 'fp64') else 'fp32, and rounds once'})",
        f"safety: {SAFETY:g} times, for other processors and thread counts",
        f"so: {UNIT_ROUNDOFF[precision]:.3g} x {sqrt(roundings):.1f} x {ACCUMULATION[precision]:g} x {SAFETY:g} = {own:.3g}",
    ]
    if calibration.differences:
        told = ", ".join(f"{name} {value:.2g}" for name, value in calibration.differences.items())
        lines.append(
            f"calibration: the {calibration.precision} reference against itself, computed otherwise: {told}; expected up to "
            f"{calibration.expected:.2g}, so the model is taken at {calibration.conditioning:.3g} times"
        )
    lines.append(f"limit: {limit:.3g}")
    if rounded is not None:
        lines.append(f"as deployed, products round activations to 8 bits: {rounded:.3g} more, the most that it adds there")
    return lines
