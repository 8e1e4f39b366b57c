"""Which positions go through which weights, and the three ways a graph can arrange that.

- ``Gathered``: rows by route, multiply, scatter back. A route without rows costs next to nothing (a product of zero rows:
  2 microseconds in onnxruntime on a CPU), so one graph without branches serves every mix of modalities, and an absent
  modality's weights are never read. The canonical graph.
- ``Selected``: every route computes every row, and each row keeps its own route's. For compilers that can not gather by
  value (``NonZero``), where arithmetic is cheap: prompts.
- ``OneRoute``: all rows are known to take one route; the others are not in the graph at all.

All three mean the same: the parity ladder proves it of every graph.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

Parts = Mapping[int, Tensor]  # route -> the rows that it computes; a route that is not there is not computed


class Routing(ABC):
    """Found once per forward pass and used by every layer."""

    @abstractmethod
    def dispatch(self, x: Tensor) -> Parts:
        """[T, width] -> per route [rows of the route, width]."""

    @abstractmethod
    def combine(self, parts: Parts) -> Tensor:
        """Per route [rows of the route, width] -> [T, width], each row back in its place."""


@dataclass(frozen=True)
class OneRoute(Routing):
    """All rows take ``route``."""

    route: int = 0

    def dispatch(self, x: Tensor) -> Parts:
        return {self.route: x}

    def combine(self, parts: Parts) -> Tensor:
        return parts[self.route]


@dataclass(frozen=True)
class Gathered(Routing):
    """Each route is given its own rows.

    Attributes:
        rows: per route, the flat positions [rows of the route] that take it.
        inverse: [T], where each position's row stands once the routes' rows are laid one after another.
    """

    rows: tuple[Tensor, ...]
    inverse: Tensor

    @classmethod
    def by(cls, mask: Tensor, num_routes: int) -> "Routing":
        """Route position i by ``mask[i]``, each in 0..num_routes-1. Shape: mask [T]."""
        if num_routes == 1:
            return OneRoute()
        rows = tuple(torch.nonzero(mask == route).squeeze(1) for route in range(num_routes))
        places = torch.arange(mask.shape[0], dtype=torch.int64, device=mask.device)
        inverse = torch.zeros_like(places).index_put((torch.cat(rows),), places)
        return cls(rows, inverse)

    def dispatch(self, x: Tensor) -> Parts:
        return {route: x.index_select(0, rows) for route, rows in enumerate(self.rows)}

    def combine(self, parts: Parts) -> Tensor:
        return torch.cat([parts[route] for route in range(len(self.rows))]).index_select(0, self.inverse)


@dataclass(frozen=True)
class Selected(Routing):
    """Every route is given all rows, and what belongs to other routes is dropped.

    Attributes:
        mask: [T], the route of each position.
        num_routes: how many there are.
    """

    mask: Tensor
    num_routes: int

    @classmethod
    def by(cls, mask: Tensor, num_routes: int) -> "Routing":
        """Route position i by ``mask[i]``, each in 0..num_routes-1. Shape: mask [T]."""
        return OneRoute() if num_routes == 1 else cls(mask, num_routes)

    def dispatch(self, x: Tensor) -> Parts:
        return dict.fromkeys(range(self.num_routes), x)

    def combine(self, parts: Parts) -> Tensor:
        # Chosen, not added: what another route made of a row may be anything, NaN too.
        chosen = parts[0]
        for route in range(1, self.num_routes):
            chosen = torch.where((self.mask == route)[:, None], parts[route], chosen)
        return chosen
