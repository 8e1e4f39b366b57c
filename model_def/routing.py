"""Which positions go through which weights: gather rows by route, multiply, scatter back.

A route without rows costs next to nothing (a product of zero rows: 2 microseconds in onnxruntime on a CPU), so one
graph without branches serves every mix of modalities, and an absent modality's weights are never read.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Routing:
    """The rows of each route, found once per forward pass and used by every layer.

    Attributes:
        rows: per route, the flat positions [rows of the route] that take it; None where all rows take the only route.
        inverse: [T], where each position's row stands once the routes' rows are laid one after another.
    """

    rows: tuple[Tensor, ...] | None = None
    inverse: Tensor | None = None

    @classmethod
    def by(cls, mask: Tensor, num_routes: int) -> "Routing":
        """Route position i by ``mask[i]``, each in 0..num_routes-1. Shape: mask [T]."""
        if num_routes == 1:
            return cls()
        rows = tuple(torch.nonzero(mask == route).squeeze(1) for route in range(num_routes))
        places = torch.arange(mask.shape[0], dtype=torch.int64, device=mask.device)
        inverse = torch.zeros_like(places).index_copy(0, torch.cat(rows), places)
        return cls(rows, inverse)

    def dispatch(self, x: Tensor) -> list[Tensor]:
        """[T, width] -> per route [rows of the route, width]."""
        if self.rows is None:
            return [x]
        return [x.index_select(0, rows) for rows in self.rows]

    def combine(self, parts: Sequence[Tensor]) -> Tensor:
        """Per route [rows of the route, width] -> [T, width], each row back in its place."""
        if self.inverse is None:
            return parts[0]
        return torch.cat(list(parts)).index_select(0, self.inverse)
