"""A decode step as PyTorch is made fast at it, to be raced: caches of fixed size written in place, q, k and v as one product.

The way of gpt-fast (https://github.com/meta-pytorch/gpt-fast): the whole step is compiled, and recorded as a CUDA graph.
Written out here of the reference's own modules and weights, because the reference itself is made to be read, and gives a new
cache.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from motrt.model_def import operators
from motrt.model_def.decoder import Cache, Decoder
from motrt.model_def.heads import NEVER
from motrt.model_def.layers import Attention, Layer

How = Literal["gather", "select"]


class TorchStep(nn.Module):
    """One token per row, over caches that stay where they are.

    Args:
        decoder: whose weights it uses; routed projections, a split head, no norms of queries and keys.
        modalities: of each row, which predict their own.
        cache: per layer keys and values, each [b, k, t, d]; written in place.
        how: how rows of several modalities find their weights: gathered by places that are known beforehand, or computed by
            every expert and selected, which a CUDA graph for any mix needs.
    """

    rows_of: Tensor

    def __init__(self, decoder: Decoder, modalities: Sequence[int], cache: Cache, how: How) -> None:
        super().__init__()
        config = decoder.config
        if config.qk_norm or not config.routed_attention or config.head != "split":
            raise ValueError("the race is for models with routed projections, a split head and no norms of queries and keys")
        self.decoder, self.config, self.how = decoder, config, how
        self.modalities = sorted(set(modalities))
        self.cache = cache
        self.places = {m: torch.tensor([p for p, one in enumerate(modalities) if one == m]) for m in self.modalities}
        self.places = {m: places.to(decoder.device) for m, places in self.places.items()}
        self.register_buffer("rows_of", torch.tensor(modalities, device=decoder.device))
        # Plain lists: the weights are the decoder's, and a module would own them twice.
        self.packed = [
            {m: torch.cat([_weights(one, m) for one in (a.wq, a.wk, a.wv)]) for m in self.modalities}
            for a in (cast(Attention, layer.attention) for layer in decoder.layers)
        ]

    def forward(self, ids: Tensor, position: Tensor) -> Tensor:
        """Shapes: ids, position [b] -> logits [b, ids of the modality], or [b, v] where rows are of several."""
        decoder, config = self.decoder, self.config
        x = F.embedding(ids, decoder.tok_embeddings.weight)
        keys = torch.arange(self.cache[0][0].shape[2], device=x.device)
        visible = (keys <= position[:, None])[:, None, None]  # [b, 1, 1, t]
        for layer, packed, past in zip(decoder.layers, self.packed, self.cache, strict=True):
            x = x + self._attended(cast(Layer, layer), packed, past, x, position, visible)
            x = x + self._routed(
                cast(Layer, layer).ffn_norm(x), partial(_through, list(cast(Layer, layer).feed_forward.values()))
            )
        hidden = decoder.norm(x)
        heads = list(cast(nn.ModuleDict, decoder.output).values())
        if len(self.modalities) == 1:
            return cast(Tensor, heads[self.modalities[0]](hidden).float())

        def widened(m: int, rows: Tensor) -> Tensor:
            ids = config.id_ranges[m]
            return F.pad(heads[m](rows).float(), (ids.start, config.vocab_size - ids.stop), value=NEVER)

        return self._routed(hidden, widened)

    def _attended(
        self, layer: Layer, packed: dict[int, Tensor], past: tuple[Tensor, Tensor], x: Tensor, position: Tensor, visible: Tensor
    ) -> Tensor:
        config, attention = self.config, layer.attention
        h, k, d, b = config.num_heads, config.num_kv_heads, config.head_size, x.shape[0]
        mixed = self._routed(layer.attention_norm(x), lambda m, rows: F.linear(rows, packed[m])).view(b, h + 2 * k, 1, d)
        query, key, value = torch.split(mixed, [h, k, k], dim=1)
        tables = self.decoder.rope_cos, self.decoder.rope_sin
        turned = operators.rotate(torch.cat((query, key), dim=1), *tables, position[:, None], config.rope.style)
        query, key = torch.split(turned, [h, k], dim=1)
        rows = torch.arange(b, device=x.device)
        past[0][rows, :, position] = key[:, :, 0]
        past[1][rows, :, position] = value[:, :, 0]
        # The queries of a group stand in the place of new tokens, which share their keys: no head of the cache is copied.
        grouped = F.scaled_dot_product_attention(query.reshape(b, k, h // k, d), *past, attn_mask=visible)
        return self._routed(grouped.reshape(b, h * d), lambda m, rows: F.linear(rows, _weights(attention.wo, m)))

    def _routed(self, x: Tensor, compute: Callable[[int, Tensor], Tensor]) -> Tensor:
        """[b, width] -> [b, other width], each row through its modality's."""
        if len(self.modalities) == 1:
            return compute(self.modalities[0], x)
        if self.how == "select":
            chosen = compute(self.modalities[0], x)
            for m in self.modalities[1:]:
                chosen = torch.where((self.rows_of == m)[:, None], compute(m, x), chosen)
            return chosen
        parts = {m: compute(m, x[places]) for m, places in self.places.items()}
        first = next(iter(parts.values()))
        whole = first.new_empty((x.shape[0], first.shape[1]))
        for m, places in self.places.items():
            whole[places] = parts[m]
        return whole


def _through(modules: Sequence[nn.Module], modality: int, rows: Tensor) -> Tensor:
    return cast(Tensor, modules[modality](rows))


def _weights(module: nn.Module, modality: int) -> Tensor:
    return cast(nn.Linear, list(cast(nn.ModuleDict, module).values())[modality]).weight


def compiled(step: TorchStep, tunes: bool) -> Any:
    """The whole step compiled, without breaks.

    Args:
        step: what to compile.
        tunes: let the compiler write products of one row itself, and tune them: what makes gpt-fast fast at one row.
    """
    import torch._inductor.config as inductor

    torch._dynamo.reset()  # each is compiled for its own rows and modalities: none is a recompilation of another
    inductor.coordinate_descent_tuning = tunes
    return torch.compile(step, fullgraph=True, dynamic=False)


def captured(step: Callable[[Tensor, Tensor], Tensor], ids: Tensor, position: Tensor) -> tuple[Callable[[], None], Tensor]:
    """``step`` over these very inputs as one CUDA graph: what does it again, and where its logits are."""
    for _ in range(3):
        step(ids, position)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        logits = step(ids, position)
    return graph.replay, logits
