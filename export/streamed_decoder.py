"""The PyTorch decoder with its weights on the disk: each is read when it is multiplied by, and let go of behind that.

For one pass through a model that memory should not hold: a pass costs what reading all weights costs, so nobody would
generate with it. What it computes is the decoder's own: the same code runs.

On the way it can tell how much the model amplifies rounding (Monte Carlo arithmetic; Parker 1997): of a batch whose second half
repeats its first, the second half is given random errors behind every product, norm and lookup. What has become of them at the
end is the difference between the halves.
"""

from typing import Any

import torch
from torch import Tensor, nn

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
        error: the relative error, one way or the other, that values of the second half are given; 0: none.
    """

    def __init__(self, config: ModelConfig, read: Read, dtype: torch.dtype, error: float = 0.0) -> None:
        with torch.device("meta"):
            super().__init__(config)
        self._read, self._dtype, self._error = read, dtype, error
        self._chance = torch.Generator().manual_seed(0)
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

        def fetch(module: nn.Module, arguments: Any) -> None:
            for leaf in leaves:
                setattr(module, leaf, nn.Parameter(self._weight(f"{name}.{leaf}"), requires_grad=False))

        def drop(module: nn.Module, arguments: Any, output: Tensor) -> Tensor:
            for leaf in leaves if not is_used_again else ():
                setattr(module, leaf, nothing)
            return self._with_errors(output)

        module.register_forward_pre_hook(fetch)
        module.register_forward_hook(drop)

    def _weight(self, name: str) -> Tensor:
        return self._read(name).to(self._dtype)

    def _with_errors(self, output: Tensor) -> Tensor:
        """Rows keep their order on every route, so the second half of any module's rows is that of the batch."""
        if self._error:
            half = output[len(output) // 2 :]
            signs = 2 * torch.randint(2, half.shape, generator=self._chance, dtype=half.dtype) - 1
            half *= 1 + self._error * signs
        return output

    def _shared_head(self) -> Tensor:
        """Used as a matrix and not as a module, so no hook reads it."""
        return super()._shared_head() if self.output is None else self._weight(SHARED_HEAD)
