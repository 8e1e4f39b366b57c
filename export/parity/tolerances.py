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
    "NEAR_TIE_DEVIATIONS",
    "SAFETY",
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
