"""How much two computations of the same logits may differ, in one place, each number with its reason.

The gate is the relative L2 error of a row of logits: it has no unit, and one wrong weight moves it while one unlucky
rounding does not. Its limit follows from the arithmetic::

    limit = SAFETY * unit roundoff * sqrt(roundings in a row) * accumulation

- unit roundoff: half the spacing of the dtype's numbers around 1 (IEEE 754; Higham, Accuracy and Stability of Numerical
  Algorithms, section 2.1): float32 2^-24, float16 2^-11, bfloat16 2^-8.
- roundings in a row: about twelve per layer (two norms, seven products, rotation, softmax, two residual sums) and four
  outside them. Rounding errors are independent, so they grow with the root of their number (Higham, section 2.8).
- accumulation: a product rounds once more per partial sum where it accumulates in the dtype itself, as float32 does.
  Kernels add in blocks of vectors, so that is a few roundings whatever the width, not one per term. Half precisions
  accumulate in float32 and round once: 1 for them.
"""

from math import sqrt

from motrt.model_def.config import ModelConfig

UNIT_ROUNDOFF = {"fp64": 2.0**-53, "fp32": 2.0**-24, "fp16": 2.0**-11, "bf16": 2.0**-8}

# On random models of 2 to 16 layers the worst row came to between 0.3 and 1.2 times the formula without the two factors
# below, in float32 and float16 alike (`motrt verify` prints error and limit side by side). What is left is room for other
# processors and thread counts. The tests plant faults down to one bias of one layer: all are far above.
SAFETY = 4.0
ACCUMULATION = {"fp64": 4.0, "fp32": 4.0, "fp16": 1.0, "bf16": 1.0}

ROUNDINGS_PER_LAYER, ROUNDINGS_OUTSIDE = 12, 4

# An argmax that differs is a near-tie while the reference's margin is below this many standard deviations of the
# measured error: two logits, each within three of their own.
NEAR_TIE_DEVIATIONS = 6.0

TOP_K = 10


def relative_l2_limit(config: ModelConfig, precision: str) -> float:
    """The largest relative L2 error that a row of logits may have against the reference."""
    roundings = ROUNDINGS_PER_LAYER * config.num_layers + ROUNDINGS_OUTSIDE
    return SAFETY * UNIT_ROUNDOFF[precision] * sqrt(roundings) * ACCUMULATION[precision]
