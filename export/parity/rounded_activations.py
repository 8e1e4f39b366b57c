"""The decoder with activations rounded to 8 bits before products with quantized weights, as onnxruntime's CPU kernels do it.

A block of activations shares one scale. Where a few channels stand out, as they do in trained models, they take most of a
block's codes and their neighbours get what is left. That is a loss and no fault: a graph as it is deployed is compared with
this decoder, and how far this decoder is from the model is part of what quantization loses (``quantization_loss``).
"""

from collections.abc import Callable, Mapping

from torch import Tensor, nn

from motrt.export.quantize import rounded_to_8_bits
from motrt.model_def.decoder import Decoder
from motrt.model_def.parameters import SHARED_HEAD


class RoundingDecoder(Decoder):
    """The decoder with its activations rounded to 8 bits before some products."""

    blocks: Mapping[str, int]

    def round_before(self, blocks: Mapping[str, int]) -> None:
        """Round what is multiplied by each weight of ``blocks``, so many activations under one scale."""
        self.blocks = blocks
        for name, module in self.named_modules():
            if (block := blocks.get(f"{name}.weight")) is not None:
                module.register_forward_pre_hook(_rounding(block))

    def logits(self, hidden: Tensor, head_mask: Tensor) -> Tensor:
        block = self.blocks.get(SHARED_HEAD)  # used as a matrix and not as a module, so no hook sees it
        return super().logits(hidden if block is None else rounded_to_8_bits(hidden, block), head_mask)


def _rounding(block: int) -> Callable[[nn.Module, tuple[Tensor]], tuple[Tensor]]:
    return lambda module, arguments: (rounded_to_8_bits(arguments[0], block),)
