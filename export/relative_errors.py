"""Random relative errors of a given size: what rounding does to a computation, without rounding (Monte Carlo arithmetic).

Each value x becomes x (1 + e), e independent and uniform with a given root mean square. Inputs as well as outputs of a product
are given such errors: then its result is off by u sqrt(sum of (w x)^2), and not only by u of what is left of a sum that cancels
(Parker, Monte Carlo Arithmetic, 1997; Higham, Accuracy and Stability of Numerical Algorithms, section 2.8).
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from math import sqrt
from typing import Any

import torch
from torch import Tensor, nn

# Drawn once and read from a random place each time: drawing anew costs more than the products that it disturbs.
_POOL_SIZE = (1 << 21) + 7


class RelativeErrors:
    """A source of relative errors, the same in every run.

    Args:
        size: their root mean square.
        seed: of the errors; other seeds give independent ones.
    """

    def __init__(self, size: float, seed: int = 0) -> None:
        self._chance = torch.Generator().manual_seed(seed)
        drawn = torch.rand(_POOL_SIZE, generator=self._chance, dtype=torch.float64)
        self._pool = (2.0 * drawn - 1.0) * (size * sqrt(3.0))

    def apply(self, x: Tensor) -> Tensor:
        """Return ``x``, of any shape, with an error in each element."""
        if x.numel() >= _POOL_SIZE:
            return torch.cat([self.apply(half) for half in x.chunk(2)]) if len(x) > 1 else self.apply(x[0])[None]
        start = int(torch.randint(_POOL_SIZE - x.numel(), (1,), generator=self._chance))
        errors = self._pool[start : start + x.numel()].to(x).view(x.shape)
        return x + x * errors


@contextmanager
def relative_errors_in(decoder: nn.Module, size: float, seed: int) -> Iterator[None]:
    """Give the inputs and outputs of every module that holds weights relative errors, for as long as this is open.

    Args:
        decoder: the model; its logits themselves are left alone.
        size: root mean square of the errors.
        seed: of the errors.
    """
    errors = RelativeErrors(size, seed)
    handles = []
    for name, module in decoder.named_modules():
        if next(module.parameters(recurse=False), None) is None:
            continue
        if not isinstance(module, nn.Embedding):  # which is given ids
            handles.append(module.register_forward_pre_hook(_before(errors)))
        if not name.startswith("output"):
            handles.append(module.register_forward_hook(_behind(errors)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _before(errors: RelativeErrors) -> Callable[[nn.Module, tuple[Any, ...]], tuple[Any, ...]]:
    return lambda module, arguments: (errors.apply(arguments[0]), *arguments[1:])


def _behind(errors: RelativeErrors) -> Callable[[nn.Module, tuple[Any, ...], Tensor], Tensor]:
    return lambda module, arguments, output: errors.apply(output)
