"""Random relative errors of a given size: what rounding does to a computation, without rounding (Monte Carlo arithmetic).

Each value x becomes x (1 + e), e independent and uniform with a given root mean square. Inputs as well as outputs of a product
are given such errors: then its result is off by u sqrt(sum of (w x)^2), and not only by u of what is left of a sum that cancels
(Parker, Monte Carlo Arithmetic, 1997; Higham, Accuracy and Stability of Numerical Algorithms, section 2.8).
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from math import sqrt
from random import Random
from typing import Any

import torch
from torch import Tensor, nn

MOST_AT_ONCE, _PLACES = 1 << 20, 1 << 20


class RelativeErrors:
    """A source of relative errors, the same in every run.

    Args:
        size: their root mean square.
        seed: of the errors; other seeds give independent ones.
    """

    def __init__(self, size: float, seed: int = 0) -> None:
        self._size, self._pool = size, _unit_errors(seed)
        self._chance = Random(seed)

    def apply(self, x: Tensor) -> Tensor:
        """Return ``x``, of any shape, with an error in each element."""
        flat = x.reshape(-1)
        pieces = [flat[start : start + MOST_AT_ONCE] for start in range(0, len(flat), MOST_AT_ONCE)]
        disturbed = [piece + piece * self._errors(len(piece)).to(piece) for piece in pieces]
        return torch.cat(disturbed).view(x.shape) if disturbed else x

    def _errors(self, count: int) -> Tensor:
        start = self._chance.randrange(len(self._pool) - count)
        return self._pool[start : start + count] * self._size


@lru_cache(maxsize=8)
def _unit_errors(seed: int) -> Tensor:
    """Return errors of root mean square 1, to be read from any place: drawing anew costs more than what they disturb."""
    drawn = torch.rand(MOST_AT_ONCE + _PLACES, generator=torch.Generator().manual_seed(seed), dtype=torch.float32)
    return (2.0 * drawn - 1.0) * sqrt(3.0)


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
