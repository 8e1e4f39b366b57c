"""What the gate allows beside each row's own limit (``runtime.tolerances``, ``row_noise``), and what a near-tie is."""

# An argmax that differs is a near-tie while the reference's margin is below this many standard deviations of the
# measured error: two logits, each within three of their own.
NEAR_TIE_DEVIATIONS = 6.0

TOP_K = 10

# TensorRT-Model-Connect's gate takes logits within 1e-3 in float32. That is for logits of order one: it grows with them, and
# with what rounding alone does to the row.
LARGEST_FLOAT32_ERROR = 1e-3

# Rows with a margin above this count as sure of their best id, in figures.
STABLE_MARGIN = 0.1

# Where rounding alone moves logits by so much of their size, a fault need not move them further, and nothing can be said.
LARGEST_LIMIT = 0.5

# What the errors of hundreds of rows may come to, as a root mean square in units of each row's noise.
LARGEST_TYPICAL_SHARE = 1.5
