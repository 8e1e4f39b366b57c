"""How much two computations of the same logits may differ, in one place, each number with its reason.

The gate is the relative L2 error of a row of logits: it has no unit, and one wrong weight moves it while one unlucky
rounding does not. Where a row's *noise* was measured (how far rounding alone moves it: ``export/parity/row_noise.py``)::

    limit = max(NOISE_SAFETY * noise, FLOOR * expected noise)

Where nobody has measured it, the arithmetic of a well-behaved model speaks::

    expected noise = unit roundoff * sqrt(roundings in a row) * accumulation
    limit = SAFETY * expected noise

- unit roundoff: half the spacing of the dtype's numbers around 1 (IEEE 754; Higham, Accuracy and Stability of Numerical
  Algorithms, section 2.1): float32 2^-24, float16 2^-11, bfloat16 2^-8.
- roundings in a row: about twelve per layer (two norms, seven products, rotation, softmax, two residual sums) and four
  outside them. Rounding errors are independent, so they grow with the root of their number (Higham, section 2.8).
- accumulation: a product rounds once more per partial sum where it accumulates in the dtype itself, as float32 does.
  Kernels add in blocks of vectors, so that is a few roundings whatever the width, not one per term. Half precisions
  accumulate in float32 and round once: 1 for them.
"""

from math import isfinite, sqrt

from motrt.model_def.config import ModelConfig
from motrt.runtime.session import Session

UNIT_ROUNDOFF = {"fp64": 2.0**-53, "fp32": 2.0**-24, "fp16": 2.0**-11, "bf16": 2.0**-8}

# On random models of 2 to 16 layers the worst row came to between 0.3 and 1.2 times the formula without the two factors
# below, in float32 and float16 alike (`motrt verify` prints error and limit side by side). What is left is room for other
# processors and thread counts. The tests plant faults down to one bias of one layer: all are far above.
SAFETY = 4.0
# Of measured noise. On a trained model (SmolLM2-135M, docs/gate.md) the largest error of onnxruntime's rows came to 3.3 times
# their noise in float32, its median to 0.8; the rest is room for other processors, thread counts and GPUs.
NOISE_SAFETY = 8.0

# Where products round activations to 8 bits, an activation between two codes falls either way for the least of reasons, and
# moves a row by a code's worth. In a deep model that happens in every row, in a shallow one in a few, which no few samples of
# float32's own errors would show. So errors of 2^-14 are drawn there: of a thousand activations some five then fall the other
# way.
CODE_ERROR = 2.0**-14

# Of the expected noise: a row whose few samples happened to come out near zero is still rounded.
FLOOR = 0.5

# A row whose logits rounding alone moves by all of their size says nothing: more is no noise of ours.
LARGEST_NOISE = 1.0

ACCUMULATION = {"fp64": 4.0, "fp32": 4.0, "fp16": 1.0, "bf16": 1.0}

ROUNDINGS_PER_LAYER, ROUNDINGS_OUTSIDE = 12, 4

# Products of one layer that a row goes through one after another: q/k/v, output, and two of the expert (four of an adapter).
ROUNDED_PRODUCTS_PER_LAYER, ROUNDED_PRODUCTS_OUTSIDE = 6, 1


def expected_noise(config: ModelConfig, precision: str) -> float:
    """Return the relative L2 error of a row of logits that roundings come to in a well-behaved model."""
    return UNIT_ROUNDOFF[precision] * sqrt(roundings_in_a_row(config)) * ACCUMULATION[precision]


def roundings_in_a_row(config: ModelConfig) -> int:
    """Return how many roundings a row of logits goes through, one after another."""
    return ROUNDINGS_PER_LAYER * config.num_layers + ROUNDINGS_OUTSIDE


def row_limit(config: ModelConfig, precision: str, noise: float, safety: float = NOISE_SAFETY) -> float:
    """Return the largest relative L2 error that a row of logits may have whose measured noise is ``noise``."""
    return max(FLOOR * expected_noise(config, precision), safety * noise)


def bounded_noise(noise: float) -> float:
    """Return a measured noise, or the largest there is where it was more, or float32 overflowed and it is no number."""
    return min(noise, LARGEST_NOISE) if isfinite(noise) else LARGEST_NOISE


def relative_l2_limit(config: ModelConfig, precision: str) -> float:
    """Return the largest relative L2 error of a row of a model whose noise nobody has measured."""
    return SAFETY * expected_noise(config, precision)


def rounded_activations_limit(config: ModelConfig, block: int) -> float:
    """The same where products round their activations to 8 bits, ``block`` of them sharing a scale.

    A block's largest magnitude is code 127, and an error of a step is spread evenly over it: its standard deviation is
    1 / sqrt(12) of the step. So the errors of a block come to at most sqrt(block) / (127 sqrt(12)) of its norm, which at worst
    is its largest magnitude alone. Normally distributed activations stay four times below that; those of trained models, where
    a few channels stand out, come close. No SAFETY: it bounds what one product adds. What the rest of a model makes of that it
    does not bound (an outlying channel that few weights read is an error that many do): there the gate asks PyTorch.
    """
    products = ROUNDED_PRODUCTS_PER_LAYER * config.num_layers + ROUNDED_PRODUCTS_OUTSIDE
    return sqrt(block) / (127.0 * sqrt(12.0)) * sqrt(products)


def limit_of(session: Session) -> float:
    """Return the limit of a row of a session whose noise nobody has measured."""
    limit = relative_l2_limit(session.config, session.precision)
    if session.activation_block is not None:
        limit += rounded_activations_limit(session.config, session.activation_block)
    return limit


def explain_limit(config: ModelConfig, precision: str) -> list[str]:
    """Return how the limits of a model's rows are made, with its numbers, as sentences."""
    roundings, expected = roundings_in_a_row(config), expected_noise(config, precision)
    adds_up_in = precision if precision in ("fp32", "fp64") else "fp32, and rounds once"
    return [
        f"unit roundoff of {precision}: {UNIT_ROUNDOFF[precision]:.3g} (half the distance of neighbours around 1)",
        f"roundings one after another: {ROUNDINGS_PER_LAYER} x {config.num_layers} layers + {ROUNDINGS_OUTSIDE} = {roundings}; "
        f"independent ones add up as the root of their number: {sqrt(roundings):.1f}",
        f"partial sums of products: {ACCUMULATION[precision]:g} times ({precision} adds up in {adds_up_in})",
        f"a well-behaved model's noise: {UNIT_ROUNDOFF[precision]:.3g} x {sqrt(roundings):.1f} x {ACCUMULATION[precision]:g} = "
        f"{expected:.3g}",
        f"the limit of a row: {NOISE_SAFETY:g} times its own noise, for other processors and thread counts, and at least "
        f"{FLOOR:g} times that figure: {FLOOR * expected:.3g}",
    ]
