"""What products of 8-bit activations cost a model, told apart from a fault: PyTorch rounds in the same way, and says the same.

onnxruntime's fast kernels on a CPU round activations to 8 bits, a block under one scale. Where a few channels stand out, as
they do in trained models, they take most of a block's codes and their neighbours get what is left. That is no fault of any
graph: the same file, opened so that it does not round, agrees with the reference. How much it moves the logits does not follow
from a formula, but can be computed, by the PyTorch decoder with its activations rounded before the same products.

Only asked where the graph as it is deployed has gone over its limits, and the graph as it is has not.
"""

from collections.abc import Callable, Mapping, Sequence
from math import isfinite

import torch
from torch import Tensor, nn

from motrt.export.parity.findings import LOSS, Finding, Outcome
from motrt.export.parity.metrics import compare_rows
from motrt.export.parity.scenarios import Observation, Scenario, observe_together
from motrt.export.quantize import rounded_to_8_bits
from motrt.export.quantized_weights import QuantizedWeights
from motrt.model_def.config import ModelConfig
from motrt.model_def.decoder import Decoder
from motrt.model_def.parameters import SHARED_HEAD
from motrt.runtime.tolerances import SAFETY
from motrt.runtime.torch_session import TorchSession


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


def largest_rounding_error(
    config: ModelConfig,
    weights: QuantizedWeights,
    blocks: Mapping[str, int],
    references: Sequence[tuple[Scenario, Sequence[Observation]]],
) -> float:
    """The largest relative L2 error of a row of logits that rounding alone makes, in PyTorch.

    Args:
        config: what the graph computes.
        weights: what its codes stand for.
        blocks: by weight, how many activations before it share a scale.
        references: what was asked, and what the same decoder said without rounding.
    """
    decoder = RoundingDecoder.from_tensors(config, weights.read, torch.float32)
    assert isinstance(decoder, RoundingDecoder)
    decoder.round_before(blocks)
    with TorchSession(decoder) as session:
        came = observe_together(session, [scenario for scenario, _ in references])
    pairs = (pair for (_, said), rounded in zip(references, came, strict=True) for pair in zip(said, rounded, strict=True))
    return max(compare_rows(expected.logits, rounded.logits).relative_l2 for expected, rounded in pairs)


def explained_limit(error: float) -> float | None:
    """How far apart logits may be where rounding alone is seen to move them by ``error``; None where that says nothing."""
    return SAFETY * error if isfinite(error) else None


def told_apart(found: Sequence[Finding], explained: Sequence[Finding], error: float, block: int) -> list[Finding]:
    """Findings in which what rounding explains is one loss, and everything else is what it was.

    Args:
        found: under the usual limits.
        explained: the same questions, with no more allowed than ``explained_limit``.
        error: that PyTorch's rounding makes.
        block: activations that share a scale, where most do.
    """
    settled = {(one.rung, one.question) for one in explained if one.outcome is not Outcome.FAIL}
    lost = [one for one in found if one.outcome is Outcome.FAIL and (one.rung, one.question) in settled]
    if not lost:
        return list(found)
    again = {(one.rung, one.question): one for one in explained}
    kept = [again[one.rung, one.question] if one in lost else one for one in found]
    return [*kept, _loss(lost, error, block)]


def _loss(lost: Sequence[Finding], error: float, block: int) -> Finding:
    worst = max((one for one in lost), key=lambda one: float(one.figures.get("relative_l2_max", 0.0)))
    came = float(worst.figures.get("relative_l2_max", 0.0))
    detail = (
        f"{worst.rung} {worst.question}: {worst.detail}. The graph is right: it agrees with the reference where its products "
        f"take activations as they are. As deployed they round them to 8 bits, {block} under one scale, and this model does "
        f"not bear that (a few channels that stand out are enough): PyTorch with the same rounding loses up to {error:.3g}. "
        "Keep the parts that read them in the graph's precision (--part attention=none --part expert=none), or take "
        "--precision fp16 or fp32, which round no activations"
    )
    figures = {"relative_l2_max": came, "limit": float(worst.figures.get("limit", 0.0)), "rounding_error": error}
    figures["questions"] = len(lost)
    return Finding(LOSS, "activations rounded to 8 bits lose little", Outcome.FAIL, detail, figures)
