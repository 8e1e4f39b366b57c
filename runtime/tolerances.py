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
from motrt.runtime.session import Session

UNIT_ROUNDOFF = {"fp64": 2.0**-53, "fp32": 2.0**-24, "fp16": 2.0**-11, "bf16": 2.0**-8}

# On random models of 2 to 16 layers the worst row came to between 0.3 and 1.2 times the formula without the two factors
# below, in float32 and float16 alike (`motrt verify` prints error and limit side by side). What is left is room for other
# processors and thread counts. The tests plant faults down to one bias of one layer: all are far above.
SAFETY = 4.0
ACCUMULATION = {"fp64": 4.0, "fp32": 4.0, "fp16": 1.0, "bf16": 1.0}

ROUNDINGS_PER_LAYER, ROUNDINGS_OUTSIDE = 12, 4

# Products of one layer that a row goes through one after another: q/k/v, output, and two of the expert (four of an adapter).
ROUNDED_PRODUCTS_PER_LAYER, ROUNDED_PRODUCTS_OUTSIDE = 6, 1


def relative_l2_limit(config: ModelConfig, precision: str) -> float:
    """The largest relative L2 error that a row of logits may have against the reference."""
    roundings = ROUNDINGS_PER_LAYER * config.num_layers + ROUNDINGS_OUTSIDE
    return SAFETY * UNIT_ROUNDOFF[precision] * sqrt(roundings) * ACCUMULATION[precision]


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
    """The limit for what ``session`` computes with, and for how much its model amplifies rounding."""
    limit = relative_l2_limit(session.config, session.precision)
    if session.activation_block is not None:
        limit += rounded_activations_limit(session.config, session.activation_block)
    return limit * session.conditioning
