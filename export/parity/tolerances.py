"""How much two computations of the same logits may differ, in one place, each number with its reason.

The gate is the relative L2 error of a row of logits: it has no unit, and one wrong weight moves it while one unlucky
rounding does not. Its limit follows from the arithmetic::

    limit = SAFETY * unit roundoff * sqrt(roundings in a row) * sqrt(terms in a sum)

- unit roundoff: half the spacing of the dtype's numbers around 1 (IEEE 754; Higham, Accuracy and Stability of Numerical
  Algorithms, section 2.1): float32 2^-24, float16 2^-11, bfloat16 2^-8.
- roundings in a row: about twelve per layer (two norms, seven products, rotation, softmax, two residual sums) and four
  outside them. Rounding errors are independent, so they grow with the root of their number (Higham, section 2.8).
- terms in a sum: a product over K inputs rounds K times where it accumulates in the dtype itself, as float32 does. Half
  precisions accumulate in float32 and round once, so the factor is 1 for them.
"""

from math import sqrt

from motrt.model_def.config import AdapterExpert, ModelConfig

UNIT_ROUNDOFF = {"fp64": 2.0**-53, "fp32": 2.0**-24, "fp16": 2.0**-11, "bf16": 2.0**-8}

# Errors of one row against their root mean square: measured over seeds and sizes the largest was below 1.5 times the
# formula without it (`motrt verify` prints both); the smallest planted fault in the tests is above 20 times.
SAFETY = 4.0

ROUNDINGS_PER_LAYER, ROUNDINGS_OUTSIDE = 12, 4

# An argmax that differs is a near-tie while the reference's margin is below this many standard deviations of the
# measured error: two logits, each within three of their own.
NEAR_TIE_DEVIATIONS = 6.0

TOP_K = 10


def relative_l2_limit(config: ModelConfig, precision: str) -> float:
    """The largest relative L2 error that a row of logits may have against the reference."""
    roundings = ROUNDINGS_PER_LAYER * config.num_layers + ROUNDINGS_OUTSIDE
    terms = _longest_sum(config) if precision in ("fp32", "fp64") else 1
    return SAFETY * UNIT_ROUNDOFF[precision] * sqrt(roundings) * sqrt(terms)


def _longest_sum(config: ModelConfig) -> int:
    """The most inputs that any product adds up."""
    hidden = [modality.expert.hidden_size for modality in config.modalities]
    widths = [modality.expert.width for modality in config.modalities if isinstance(modality.expert, AdapterExpert)]
    return max([config.model_width, config.num_heads * config.head_size, *hidden, *widths])
