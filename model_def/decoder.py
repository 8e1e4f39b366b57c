"""The routed-expert decoder in PyTorch: the reference that every exported graph must equal.

Readable before fast. Runs in float64, float32, float16 and bfloat16, on CPU and CUDA. State is an argument and a
result: the cache goes in and comes out, and nothing is kept between calls. Shape letters: see ``config``.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import cast

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from motrt.model_def.config import ModelConfig
from motrt.model_def.heads import SplitHead, at_least_float32, filter_shared
from motrt.model_def.layers import Layer, LayerCache, Positions
from motrt.model_def.operators import rope_tables
from motrt.model_def.parameters import parameters
from motrt.model_def.routing import Gathered, OneRoute, Routing

Cache = list[LayerCache]


class Decoder(nn.Module):
    """Embedding, layers, norm, head.

    Args:
        config: what to build. The state's names are exactly those of ``parameters(config)``.

    Attributes:
        masked: whether attention is told the keys that it sees by a mask, or, of one token per row, by their number.
        cuts_table: whether a step names its own modality's rows of the embedding alone.
    """

    masked = True
    cuts_table = True
    route: Callable[[Tensor, int], Routing] = staticmethod(Gathered.by)

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.tok_embeddings = nn.Embedding(config.vocab_size, config.model_width)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_layers))
        self.norm = nn.RMSNorm(config.model_width, eps=config.norm_eps)
        if config.head == "split":
            self.output: nn.Module | None = SplitHead(config)
        elif not config.tied_embeddings:
            self.output = nn.Linear(config.model_width, config.vocab_size, bias=False)
        else:
            self.output = None
        self.rope_cos: Tensor
        self.rope_sin: Tensor
        self._make_rope_tables(torch.get_default_dtype())

    def _make_rope_tables(self, dtype: torch.dtype) -> None:
        """Derived from the configuration, so not part of the state; made in the weights' dtype from float64."""
        cos, sin = rope_tables(self.config.rope, self.config.head_size, self.config.max_seq_len, dtype)
        self.register_buffer("rope_cos", cos.to(self.tok_embeddings.weight.device), persistent=False)
        self.register_buffer("rope_sin", sin.to(self.tok_embeddings.weight.device), persistent=False)

    @property
    def dtype(self) -> torch.dtype:
        return self.tok_embeddings.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.tok_embeddings.weight.device

    def forward(
        self,
        input_ids: Tensor,
        modality_mask: Tensor,
        cache_position: Tensor,
        logits_index: Tensor,
        head_mask: Tensor,
        cache: Sequence[LayerCache],
    ) -> tuple[Tensor, Cache]:
        """The graph contract: see ``signature`` for every argument.

        Shapes: input_ids, modality_mask [b, s]; cache_position [b]; logits_index, head_mask [n]; cache per layer two
        of [b, k, t, d]. Returns logits [n, v] (float32, or float64 from a float64 model) and the new cache.
        """
        experts = self.route(modality_mask.flatten(), len(self.config.modalities))
        x = self.tok_embeddings(input_ids.flatten())  # [b, s] -> [T, m]
        x, present = self._through_layers(x, input_ids.shape[1], experts, cache_position, cache)
        return self.logits(self.norm(x.index_select(0, logits_index)), head_mask), present

    def step(
        self, input_ids: Tensor, cache_position: Tensor, cache: Sequence[LayerCache], tokens: int, predicts: int
    ) -> tuple[Tensor, Cache]:
        """One token per row, all of modality ``tokens``, all predicting modality ``predicts``: no other's weights are named.

        Shapes: input_ids [b, 1]; cache_position [b]. Returns the logits of the predicted modality's ids alone, [b, ids of the
        modality], and the new cache.
        """
        own, ids, table = self.config.id_ranges[tokens], input_ids.flatten(), self.tok_embeddings.weight
        x = F.embedding(ids - own.start, table[own.start : own.stop]) if self.cuts_table else F.embedding(ids, table)
        x, present = self._through_layers(x, 1, OneRoute(tokens), cache_position, cache)
        return self._range_logits(self.norm(x), predicts), present

    def _through_layers(
        self, x: Tensor, s: int, experts: Routing, cache_position: Tensor, cache: Sequence[LayerCache]
    ) -> tuple[Tensor, Cache]:
        at = self.positions(s, experts, cache_position, cache)
        present: Cache = []
        for layer, past in zip(self.layers, cache, strict=True):
            x, new = layer(x, at, past)
            present.append(new)
        return x, present

    def positions(self, s: int, experts: Routing, cache_position: Tensor, cache: Sequence[LayerCache]) -> Positions:
        """What every layer needs to know of ``s`` new tokens per row, behind what the cache holds."""
        columns = cache_position[:, None] + torch.arange(s, device=cache_position.device)
        keys = torch.arange(cache[0][0].shape[2], device=cache_position.device)
        return Positions(
            experts=experts,
            projections=experts if self.config.routed_attention else OneRoute(),
            columns=columns,
            cache_position=cache_position,
            visible=keys <= columns[:, None, :, None] if self.masked else None,  # [t] against [b, 1, s, 1]
            num_keys=cache_position + s,
            rope=(self.rope_cos, self.rope_sin),
        )

    def logits(self, hidden: Tensor, head_mask: Tensor) -> Tensor:
        """Normed hidden states [n, m] and the modality that each predicts [n] -> logits [n, v]."""
        if isinstance(self.output, SplitHead):
            split: Tensor = self.output(hidden, self.route(head_mask, len(self.config.modalities)))
            return split
        return filter_shared(F.linear(hidden, self._shared_head()), head_mask, self.config)

    def _range_logits(self, hidden: Tensor, modality: int) -> Tensor:
        if isinstance(self.output, SplitHead):
            return self.output.range_logits(hidden, modality)
        ids = self.config.id_ranges[modality]
        return at_least_float32(F.linear(hidden, self._shared_head()[ids.start : ids.stop]))

    def _shared_head(self) -> Tensor:
        whole: nn.Module = self.tok_embeddings if self.output is None else self.output
        return cast(Tensor, whole.weight)

    def new_cache(self, batch_size: int, capacity: int) -> Cache:
        """Zeros for ``capacity`` positions: per layer two of [b, k, t, d]."""
        shape = (batch_size, self.config.num_kv_heads, capacity, self.config.head_size)

        def empty() -> Tensor:
            return torch.zeros(shape, dtype=self.dtype, device=self.device)

        return [(empty(), empty()) for _ in self.layers]

    @classmethod
    def from_tensors(
        cls,
        config: ModelConfig,
        read: Callable[[str], Tensor],
        dtype: torch.dtype = torch.float32,
        device: str | torch.device = "cpu",
        on_tensor: Callable[[int], None] = lambda num_bytes: None,
    ) -> "Decoder":
        """A decoder whose parameters come one at a time from ``read(name)``, converted to ``dtype``.

        Args:
            config: what to build.
            read: gives the tensor of a name of ``parameters(config)``.
            dtype: of weights, activations and cache.
            device: where it runs.
            on_tensor: called with each tensor's bytes, for progress bars.
        """
        with torch.device("meta"):
            decoder = cls(config)
        for parameter in parameters(config):
            value = read(parameter.name).to(device=device, dtype=dtype)
            owner, _, leaf = parameter.name.rpartition(".")
            setattr(decoder.get_submodule(owner), leaf, nn.Parameter(value, requires_grad=False))
            on_tensor(value.nbytes)
        decoder._make_rope_tables(dtype)
        return decoder.eval()


def prefill(
    decoder: Decoder, input_ids: Tensor, modality_mask: Tensor, next_modality: Tensor, cache: Cache
) -> tuple[Tensor, Cache]:
    """Read whole prompts of equal length into an empty cache.

    Shapes: input_ids, modality_mask [b, s]; next_modality [b]. Returns the last positions' logits [b, v], the cache.
    """
    b, s = input_ids.shape
    last = torch.arange(1, b + 1, device=input_ids.device) * s - 1
    start = torch.zeros(b, dtype=torch.int64, device=input_ids.device)
    logits, cache = decoder(input_ids, modality_mask, start, last, next_modality, cache)
    return logits, cache


def decode(
    decoder: Decoder, token_ids: Tensor, modality: Tensor, position: Tensor, next_modality: Tensor, cache: Cache
) -> tuple[Tensor, Cache]:
    """One token per row, behind what the cache holds. Shapes: all [b]. Returns logits [b, v] and the cache."""
    rows = torch.arange(token_ids.shape[0], device=token_ids.device)
    logits, cache = decoder(token_ids[:, None], modality[:, None], position, rows, next_modality, cache)
    return logits, cache


def state_of(decoder: Decoder) -> Iterable[tuple[str, Tensor]]:
    """The decoder's parameters by name, in the order of ``parameters(config)``."""
    state = decoder.state_dict()
    return ((parameter.name, state[parameter.name]) for parameter in parameters(decoder.config))
