"""Output heads: from hidden states to logits over the unified vocabulary, filtered to the predicted modality.

A head is routed by the modality *predicted* at a position (``head_mask``), an expert by the modality *at* it. Both
heads give the same result: token filtering after a shared head equals computing only the wanted rows of it.
"""

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from motrt.model_def.config import ModelConfig
from motrt.model_def.operators import cast
from motrt.model_def.routing import Routing

NEVER = float("-inf")


def at_least_float32(logits: Tensor) -> Tensor:
    return logits if logits.dtype == torch.float64 else cast(logits, torch.float32)


class SplitHead(nn.ModuleDict):
    """One output layer per modality; each row goes through the predicted modality's.

    Shapes: hidden [n, m] -> logits [n, v], -inf outside the predicted modality's range.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__({one.name: nn.Linear(config.model_width, one.vocab_size, bias=False) for one in config.modalities})
        self.id_ranges, self.vocab_size = config.id_ranges, config.vocab_size

    def forward(self, hidden: Tensor, routing: Routing) -> Tensor:
        return routing.combine(
            {
                modality: self._widened(self.range_logits(rows, modality), self.id_ranges[modality])
                for modality, rows in routing.dispatch(hidden).items()
            }
        )

    def range_logits(self, hidden: Tensor, modality: int) -> Tensor:
        """The logits of one modality's own ids alone. Shapes: [n, m] -> [n, ids of the modality]."""
        layers = list(self.values())
        return at_least_float32(layers[modality](hidden))

    def _widened(self, logits: Tensor, ids: range) -> Tensor:
        return F.pad(logits, (ids.start, self.vocab_size - ids.stop), value=NEVER)


def filter_shared(logits: Tensor, head_mask: Tensor, config: ModelConfig) -> Tensor:
    """-inf on every id outside the predicted modality's range. Shapes: logits [n, v], head_mask [n]."""
    if len(config.modalities) == 1:
        return at_least_float32(logits)
    ids = torch.arange(config.vocab_size, device=logits.device)
    owner = torch.stack([cast(ids >= owned.start, torch.int64) for owned in config.id_ranges[1:]]).sum(0)  # [v]
    return at_least_float32(logits).masked_fill(owner != head_mask[:, None], NEVER)
