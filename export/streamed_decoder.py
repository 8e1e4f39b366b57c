"""The PyTorch decoder with its weights on the disk: each is read when it is multiplied by, and let go of behind that.

For one pass through a model that memory should not hold: a pass costs what reading all weights costs, so nobody would
generate with it. What it computes is the decoder's own: the same code runs.

On the way it can tell what rounding makes of the model, of a batch that holds the same rows several times, in groups: the last
has its activations rounded to 8 bits before products with codes, as a CPU's fast kernels have it, and the others are given
random relative errors before and behind every product, norm and lookup (``relative_errors``).
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from motrt.export.quantize import rounded_to_8_bits
from motrt.export.relative_errors import RelativeErrors
from motrt.model_def.config import ModelConfig
from motrt.model_def.decoder import Decoder
from motrt.model_def.head_surgery import Read
from motrt.model_def.parameters import SHARED_HEAD


class StreamedDecoder(Decoder):
    """A decoder that holds one module's weights at a time (and the embedding's, where the head is tied to it).

    Args:
        config: what to build.
        read: gives the tensor of a name of ``parameters(config)``.
        dtype: of weights, activations and cache.
        error: root mean square of the relative errors that all groups but the last are given.
        num_groups: of the batch, all of as many rows; 1: nothing is told of rounding.
        blocks: by the weight that they are multiplied by, how many activations of the last group share a scale.
    """

    def __init__(
        self,
        config: ModelConfig,
        read: Read,
        dtype: torch.dtype,
        error: float = 0.0,
        num_groups: int = 1,
        blocks: Mapping[str, int] | None = None,
    ) -> None:
        with torch.device("meta"):
            super().__init__(config)
        self._read, self._dtype, self._num_groups, self._blocks = read, dtype, num_groups, dict(blocks or {})
        self._errors = RelativeErrors(error)
        nothing = nn.Parameter(torch.empty(0, dtype=dtype), requires_grad=False)
        for name, module in list(self.named_modules()):
            leaves = [leaf for leaf, _ in module.named_parameters(recurse=False)]
            for leaf in leaves:
                setattr(module, leaf, nothing)
            if leaves:
                self._watch(name, module, leaves, nothing)
        self._make_rope_tables(dtype)
        self.eval()

    def _watch(self, name: str, module: nn.Module, leaves: list[str], nothing: nn.Parameter) -> None:
        """Have the weights of ``module`` read before it is used, and dropped behind."""
        is_used_again = self.config.tied_embeddings and module is self.tok_embeddings

        def fetch(module: nn.Module, arguments: tuple[Tensor]) -> tuple[Tensor]:
            for leaf in leaves:
                setattr(module, leaf, nn.Parameter(self._weight(f"{name}.{leaf}"), requires_grad=False))
            return (self._with_errors(self._rounded(arguments[0], f"{name}.weight")),)

        def drop(module: nn.Module, arguments: Any, output: Tensor) -> Tensor:
            for leaf in leaves if not is_used_again else ():
                setattr(module, leaf, nothing)
            return self._with_errors(output)

        module.register_forward_pre_hook(fetch)
        module.register_forward_hook(drop)

    def _weight(self, name: str) -> Tensor:
        return self._read(name).to(self._dtype)

    # Rows keep their order on every route, so a group of any module's rows is that group of the batch.

    def _with_errors(self, x: Tensor) -> Tensor:
        """``x`` [rows, width], all its groups but the last with errors; ids have none."""
        if self._num_groups < 2 or not x.is_floating_point():
            return x
        others = len(x) - len(x) // self._num_groups
        return torch.cat([self._errors.apply(x[:others]), x[others:]])

    def _rounded(self, x: Tensor, weight: str) -> Tensor:
        """``x`` [rows, width], its last group as the product with ``weight`` takes it on a CPU."""
        if self._num_groups < 2 or weight not in self._blocks:
            return x
        others = len(x) - len(x) // self._num_groups
        return torch.cat([x[:others], rounded_to_8_bits(x[others:], self._blocks[weight])])

    def logits(self, hidden: Tensor, head_mask: Tensor) -> Tensor:
        return super().logits(self._rounded(hidden, SHARED_HEAD), head_mask)

    def _shared_head(self) -> Tensor:
        """Used as a matrix and not as a module, so no hook reads it."""
        return super()._shared_head() if self.output is None else self._weight(SHARED_HEAD)
