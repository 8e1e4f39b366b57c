"""What the gate allows, in one place: how far logits may be apart (``runtime.tolerances``), and what a near-tie is."""

from motrt.runtime.tolerances import (
    ACCUMULATION,
    SAFETY,
    UNIT_ROUNDOFF,
    limit_of,
    relative_l2_limit,
    rounded_activations_limit,
)

__all__ = [
    "ACCUMULATION",
    "LARGEST_FLOAT32_ERROR",
    "LARGEST_RELATIVE_L2_P95",
    "NEAR_TIE_DEVIATIONS",
    "SAFETY",
    "SMALLEST_COSINE_P5",
    "SMALLEST_STABLE_AGREEMENT",
    "STABLE_MARGIN",
    "TOP_K",
    "UNIT_ROUNDOFF",
    "limit_of",
    "relative_l2_limit",
    "rounded_activations_limit",
]


# An argmax that differs is a near-tie while the reference's margin is below this many standard deviations of the
# measured error: two logits, each within three of their own.
NEAR_TIE_DEVIATIONS = 6.0

TOP_K = 10

# What other gates publish, asked besides: TensorRT-Model-Connect takes logits within 1e-3 in float32, 95 in 100 relative L2
# errors within 0.05, 95 in 100 cosines at 0.99 or more, and nine in ten of the best ids where the reference
# leads by more than 0.1. Ours is far stricter in float32; in half precision and with 8-bit activations these bind.
STABLE_MARGIN = 0.1
LARGEST_FLOAT32_ERROR = 1e-3
LARGEST_RELATIVE_L2_P95, SMALLEST_COSINE_P5, SMALLEST_STABLE_AGREEMENT = 0.05, 0.99, 0.9
