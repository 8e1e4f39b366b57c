"""The KV cache as everybody but the backends sees it: how many tokens each row holds, and how many would fit.

The buffers themselves belong to the backend that made them. Capacity grows by buckets, because attention over a
fixed-capacity buffer costs what the capacity costs, not what is filled (16 layers, one token, 2 cores: 12 ms at 2048,
1.6 ms at 256). Small buckets double; from 256 on they grow by 256, which wastes less of every step and still copies seldom.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from motrt.errors import CapacityError

SMALLEST_CAPACITY = 64

# The largest bucket that is doubled, and what the next ones grow by.
LARGEST_DOUBLED = 256


@dataclass
class KVCache:
    """The state of a batch. An argument and a result of every call; no session keeps one.

    Attributes:
        lengths: [b] int64, tokens that each row holds.
        capacity: t, positions that the buffers have room for.
        buffers: the backend's own keys and values, per layer [b, k, t, d].
        maker: the session that made them, the only one that can read them.
    """

    lengths: NDArray[np.int64]
    capacity: int
    buffers: Any
    maker: Any

    @property
    def batch_size(self) -> int:
        return len(self.lengths)


def capacity_for(num_positions: int, max_seq_len: int, smallest: int = SMALLEST_CAPACITY) -> int:
    """The smallest bucket that holds ``num_positions``: ``smallest`` doubled up to 256, then multiples of it.

    At most ``max_seq_len``.

    Raises:
        CapacityError: when ``num_positions`` is more than ``max_seq_len``.
    """
    if num_positions > max_seq_len:
        raise CapacityError(
            f"{num_positions} positions are more than the {max_seq_len} that this model holds per row: shorten the prompt, "
            "ask for fewer tokens, or export with a larger --max-seq-len"
        )
    capacity = smallest
    while capacity < num_positions:
        capacity += min(capacity, LARGEST_DOUBLED)
    return min(capacity, max_seq_len)
