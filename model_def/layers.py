"""One decoder layer: global attention and a feed-forward, each through the weights of a position's own modality.

Positions lie flat, [T, m] with T = b * s, all the way through: routing then needs no reshape, and every product is
2-D. Only attention itself looks at rows and columns.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from motrt.model_def import operators
from motrt.model_def.config import ModelConfig
from motrt.model_def.experts import RoutedExperts, build_expert
from motrt.model_def.routing import Parts, Routing

LayerCache = tuple[Tensor, Tensor]  # keys and values, each [b, k, t, d]


@dataclass(frozen=True)
class Positions:
    """What every layer needs to know of where the new tokens stand.

    Attributes:
        experts: which flat positions take which modality's expert.
        projections: the same for attention weights; everything takes one route where attention is not routed.
        columns: [b, s], the position of each new token in its row.
        cache_position: [b], tokens already in the cache.
        visible: [b, 1, s, t] bool, the keys that each new token sees; None where ``num_keys`` says it.
        num_keys: [b], how many keys the one new token of each row sees, from the first on.
        rope: cosines and sines, each [max_seq_len, d/2].
    """

    experts: Routing
    projections: Routing
    columns: Tensor
    cache_position: Tensor
    visible: Tensor | None
    num_keys: Tensor
    rope: tuple[Tensor, Tensor]

    @property
    def has_one_token(self) -> bool:
        """Whether each row has one new token, known to be one: rows and heads then need not be exchanged."""
        return isinstance(self.columns.shape[1], int) and self.columns.shape[1] == 1


class PerRoute(nn.ModuleDict):
    """One module per route, each given its own route's rows; a route that is not asked for does nothing."""

    def __init__(self, routes: Sequence[str], build: Callable[[], nn.Module]) -> None:
        super().__init__({route: build() for route in routes})

    def forward(self, parts: Parts) -> Parts:
        modules = list(self.values())
        return {route: modules[route](rows) for route, rows in parts.items()}


class Attention(nn.Module):
    """Grouped-query attention: projections by route, the attention itself over all positions alike."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        m, d, routes = config.model_width, config.head_size, config.attention_routes
        key_value_width = config.num_kv_heads * d
        self.head_size, self.query_width, self.style = d, config.num_heads * d, config.rope.style
        self.wq = PerRoute(routes, lambda: nn.Linear(m, self.query_width, bias=False))
        self.wk = PerRoute(routes, lambda: nn.Linear(m, key_value_width, bias=False))
        self.wv = PerRoute(routes, lambda: nn.Linear(m, key_value_width, bias=False))
        self.wo = PerRoute(routes, lambda: nn.Linear(self.query_width, m, bias=False))
        self.q_norm = PerRoute(routes, lambda: nn.RMSNorm(d, eps=config.norm_eps)) if config.qk_norm else None
        self.k_norm = PerRoute(routes, lambda: nn.RMSNorm(d, eps=config.norm_eps)) if config.qk_norm else None

    def forward(self, x: Tensor, at: Positions, cache: LayerCache) -> tuple[Tensor, LayerCache]:
        """[T, m] and the layer's cache -> [T, m] and the cache with the new keys and values in it."""
        query, key, value = self.project(x, at)
        query, key = self.rotate(query, at), self.rotate(key, at)
        keys = operators.write_cache(cache[0], key, at.cache_position)
        values = operators.write_cache(cache[1], value, at.cache_position)
        return self.give_out(self.attend(query, keys, values, at), at), (keys, values)

    def project(self, x: Tensor, at: Positions) -> tuple[Tensor, Tensor, Tensor]:
        """[T, m] -> query [b, h, s, d], key and value [b, k, s, d], each row through its own route."""
        parts = at.projections.dispatch(x)
        query = self._heads(self.wq(parts), self.q_norm, at)
        key = self._heads(self.wk(parts), self.k_norm, at)
        return query, key, self._heads(self.wv(parts), None, at)

    def rotate(self, x: Tensor, at: Positions) -> Tensor:
        """Queries or keys [b, heads, s, d], rotated by their positions."""
        return operators.rotate(x, *at.rope, at.columns, self.style)

    def attend(self, query: Tensor, keys: Tensor, values: Tensor, at: Positions) -> Tensor:
        """What the queries [b, h, s, d] take from the cache, each from the keys that it sees."""
        if at.visible is None:
            return operators.attend_to_first(query, keys, values, at.num_keys)
        return operators.attend(query, keys, values, at.visible)

    def give_out(self, mixed: Tensor, at: Positions) -> Tensor:
        """What attention mixed, [b, h, s, d] -> [T, m], each row through its own route."""
        by_position = mixed if at.has_one_token else mixed.transpose(1, 2)  # [b, h, s, d] -> [b, s, h, d]
        flat = by_position.reshape(-1, self.query_width)  # -> [T, h * d]
        return at.projections.combine(self.wo(at.projections.dispatch(flat)))

    def _heads(self, parts: Parts, norm: PerRoute | None, at: Positions) -> Tensor:
        """Per route [rows, heads * d] -> [b, heads, s, d], through the route's norm where there is one."""
        d = self.head_size
        if norm is not None:
            # Whole sizes, no -1: a route without rows has no size to infer one from.
            split = {route: rows.view(rows.shape[0], rows.shape[1] // d, d) for route, rows in parts.items()}
            parts = {route: rows.flatten(1) for route, rows in norm(split).items()}
        b, s = at.columns.shape
        rows = at.projections.combine(parts)
        return rows.view(b, -1, 1, d) if at.has_one_token else rows.view(b, s, -1, d).transpose(1, 2)


class Layer(nn.Module):
    """Attention, then experts, each behind a norm that all modalities share and added to the residual stream."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(config.model_width, eps=config.norm_eps)
        self.attention = Attention(config)
        self.ffn_norm = nn.RMSNorm(config.model_width, eps=config.norm_eps)
        self.feed_forward = RoutedExperts(
            {modality.name: build_expert(modality.expert, config.model_width) for modality in config.modalities}
        )

    def forward(self, x: Tensor, at: Positions, cache: LayerCache) -> tuple[Tensor, LayerCache]:
        attended, cache = self.attention(self.attention_norm(x), at, cache)
        x = x + attended
        return x + self.feed_forward(self.ffn_norm(x), at.experts), cache
