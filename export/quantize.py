"""From a weight to codes and scales, and back: the arithmetic of ``model_def.quantization``, on tensors in [out, in] layout.

Scales are chosen first, then every code is the nearest one under its block's scale. So codes follow from weight and scales
alone, which is what the parity gate asks of a finished file, however the scales were found.

Two ways to choose scales:

- ``absmax``: the largest magnitude of a block becomes the largest code (round to nearest, as onnxruntime's quantiser).
- ``search``: the same and several smaller ones; the scale whose codes lose least of the block, in squares, is kept. Clipping
  the few largest weights leaves finer steps for all others. Scales that may be negative are tried with both signs: -8 is one
  code further from zero than 7, and the sign says whose end that is. Then the scale is fitted to its codes, a few times in
  turn. For normally distributed weights in blocks of 128 all together save a third of the squared error at 4 bits
  (``tests/export/test_quantize.py`` asks for 0.72).

``search`` can be told how much each input matters: the mean of its squares, over sequences (``importance``; as llama.cpp's
imatrix has it). What is made small then is the error of the product, and not that of the weights: in trained models a few
channels are a hundred times as large as others. So that the file still proves itself, no block may lose more than
``MOST_LOST`` times what the usual scale would lose in plain squares.

The quantiser of ``onnxruntime.quantization`` rewrites whole models that are in memory, with ``absmax`` alone; it is the oracle
of the tests here.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from motrt.model_def.quantization import CODE_RANGE, Scales, WeightFormat

# Shares of the absmax scale that ``search`` tries, and how often the best is fitted to its codes: of normally distributed
# weights ten shares and three fittings lose 0.2% less (blocks of 32 to 128), and take half as long again.
SEARCHED_SHARES: tuple[float, ...] = (0.95, 0.9, 0.85, 0.8, 0.75)
NUM_REFINEMENTS = 2

# The most that a block loses under weighed scales, in plain squares, as a multiple of what it loses under the usual one.
MOST_LOST = 4.0

# Weights of so many elements are worked on at once: their temporaries stay in the cores' caches.
_CHUNK = 1 << 18


@dataclass(frozen=True)
class BlockScales:
    """What turns the codes of one weight back.

    Attributes:
        scales: [out, blocks], already rounded to the dtype that is stored.
        zero_points: [out, blocks] whole numbers; None where symmetric.
    """

    scales: Tensor
    zero_points: Tensor | None = None


def choose_scales(
    weight: Tensor,
    how: WeightFormat,
    method: Scales,
    dtype: torch.dtype,
    signed: bool = False,
    importance: Tensor | None = None,
) -> BlockScales:
    """The scales of ``weight``.

    Args:
        weight: [out, in], of any floating dtype.
        how: its format.
        method: see the top of this file.
        dtype: that the scales are stored in, the graph's.
        signed: whether scales may be negative.
        importance: [in], what the square of an error of each input's weights counts; None: all the same.
    """
    out, width = weight.shape
    blocks = how.num_blocks(width)
    scales = torch.empty(out, blocks, dtype=dtype)
    zero_points = None if how.symmetric else torch.empty(out, blocks, dtype=torch.int16)
    by_block = None if importance is None else importance.float().reshape(blocks, width // blocks)
    for rows in _row_chunks(out, width):
        cut = weight[rows].float().reshape(-1, width // blocks)  # [rows, in] -> [rows * blocks, block]
        counts = None if by_block is None else by_block.repeat(len(cut) // blocks, 1)
        chosen, zero = _chosen(cut, how, method, dtype, signed, counts)
        scales[rows] = chosen.reshape(-1, blocks)
        if zero_points is not None and zero is not None:
            zero_points[rows] = zero.reshape(-1, blocks).to(torch.int16)
    return BlockScales(scales, zero_points)


def codes_under(weight: Tensor, how: WeightFormat, chosen: BlockScales) -> Tensor:
    """The nearest codes of ``weight``, [out, in]: int8 (whatever the bits), or float8_e4m3fn."""
    out, width = weight.shape
    blocks = how.num_blocks(width)
    codes = torch.empty(out, width, dtype=torch.float8_e4m3fn if how.stored == "fp8" else torch.int8)
    for rows in _row_chunks(out, width):
        cut = weight[rows].float().reshape(-1, width // blocks)
        zero = None if chosen.zero_points is None else chosen.zero_points[rows].reshape(-1, 1).float()
        found = _nearest(cut, how, chosen.scales[rows].reshape(-1, 1).float(), zero)
        codes[rows] = found.reshape(-1, width).to(codes.dtype)
    return codes


def dequantize(codes: Tensor, how: WeightFormat, chosen: BlockScales, dtype: torch.dtype = torch.float32) -> Tensor:
    """The weight that codes stand for, [out, in], as a graph computes it: in ``dtype``."""
    out, width = codes.shape
    blocks = how.num_blocks(width)
    whole = torch.empty(out, width, dtype=dtype)
    for rows in _row_chunks(out, width):
        cut = codes[rows].float().reshape(-1, blocks, width // blocks)
        if chosen.zero_points is not None:
            cut = cut - chosen.zero_points[rows].float()[:, :, None]
        whole[rows] = (cut * chosen.scales[rows].float()[:, :, None]).reshape(-1, width).to(dtype)
    return whole


def squared_errors(weight: Tensor, how: WeightFormat, codes: Tensor, chosen: BlockScales) -> Tensor:
    """What each block loses, [out, blocks]: the sum of the squares of weight less dequantised weight."""
    out, width = weight.shape
    blocks = how.num_blocks(width)
    lost = torch.empty(out, blocks)
    for rows in _row_chunks(out, width):
        zero = None if chosen.zero_points is None else chosen.zero_points[rows]
        found = dequantize(codes[rows], how, BlockScales(chosen.scales[rows], zero))
        lost[rows] = (found - weight[rows].float()).square_().reshape(-1, blocks, width // blocks).sum(2)
    return lost


def rounded_to_8_bits(x: Tensor, block: int) -> Tensor:
    """Activations [rows, width] as onnxruntime's fast products with codes take them on a CPU: ``block`` under one scale."""
    cut = F.pad(x, (0, -x.shape[1] % block)).view(-1, block)  # [rows, width] -> [rows * blocks, block]
    scales = (cut.abs().amax(1, keepdim=True) / 127).clamp(min=torch.finfo(x.dtype).tiny)
    # [rows * blocks, block] -> [rows, width], whole sizes and no -1: there may be no rows to infer one from
    return ((cut / scales).round() * scales).view(len(x), x.shape[1] + -x.shape[1] % block)[:, : x.shape[1]]


def _row_chunks(out: int, width: int) -> Iterator[slice]:
    count = max(1, _CHUNK // width)
    return (slice(start, min(start + count, out)) for start in range(0, out, count))


def _chosen(
    cut: Tensor, how: WeightFormat, method: Scales, dtype: torch.dtype, signed: bool, counts: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Scale and zero point of each row of ``cut`` [blocks, block size]: two of [blocks, 1]."""
    make = _symmetric(cut, how, dtype) if how.symmetric else _ranged(cut, how, dtype)
    if method == "absmax" or how.stored == "fp8":  # finer steps near zero are fp8's own: clipping wins it nothing
        return make(1.0)
    search = _Search(cut, how, counts, *make(1.0))
    shares = SEARCHED_SHARES
    if signed and how.symmetric and how.stored == "int4":  # at 8 bits one code more or less is nothing
        shares = (*shares, *(-share for share in (1.0, *shares)))
    for share in shares:
        search.consider(*make(share))
    for _ in range(NUM_REFINEMENTS):
        search.refine(dtype)
    return search.scale, search.zero


class _Search:
    """The scale and zero point of each block that lose least so far, the usual ones to begin with."""

    def __init__(self, cut: Tensor, how: WeightFormat, counts: Tensor | None, scale: Tensor, zero: Tensor | None) -> None:
        self.cut, self.how, self.counts = cut, how, counts
        self.scale, self.zero = scale, zero
        self.least, usual = self._losses(scale, zero)
        self._most = usual * MOST_LOST

    def consider(self, scale: Tensor, zero: Tensor | None) -> None:
        """Keep ``scale`` and ``zero`` where they lose less."""
        loss, plain = self._losses(scale, zero)
        is_better = (loss < self.least) & (plain <= self._most)
        self.least = torch.where(is_better, loss, self.least)
        self.scale = torch.where(is_better, scale, self.scale)
        if self.zero is not None and zero is not None:
            self.zero = torch.where(is_better, zero, self.zero)

    def refine(self, dtype: torch.dtype) -> None:
        """Consider the scale that the codes under the present one would have: the least squares of ``cut = scale * codes``."""
        steps = self._steps(self.scale, self.zero)
        counted = steps if self.counts is None else steps * self.counts
        above, below = (counted * self.cut).sum(1, keepdim=True), (counted * steps).sum(1, keepdim=True)
        fitted = torch.where(below > 0, above / below.clamp(min=torch.finfo(torch.float32).tiny), self.scale)
        self.consider(_storable(fitted, dtype), self.zero)

    def _steps(self, scale: Tensor, zero: Tensor | None) -> Tensor:
        """The nearest codes less the zero points."""
        found = _nearest(self.cut, self.how, scale, zero)
        return found if zero is None else found.sub_(zero)

    def _losses(self, scale: Tensor, zero: Tensor | None) -> tuple[Tensor, Tensor]:
        """Squared error of each block, [blocks, 1]: each square as often as it counts, and plain."""
        squares = self._steps(scale, zero).mul_(scale).sub_(self.cut).square_()
        plain = squares.sum(1, keepdim=True)
        return (plain if self.counts is None else squares.mul_(self.counts).sum(1, keepdim=True)), plain


def _symmetric(cut: Tensor, how: WeightFormat, dtype: torch.dtype) -> Callable[[float], tuple[Tensor, Tensor | None]]:
    """The largest magnitude becomes the largest code."""
    largest = cut.abs().amax(1, keepdim=True) / CODE_RANGE[how.stored][1]
    return lambda share: (_storable(largest * share, dtype), None)


def _ranged(cut: Tensor, how: WeightFormat, dtype: torch.dtype) -> Callable[[float], tuple[Tensor, Tensor | None]]:
    """From the least to the greatest weight, zero among them, so that zero stays exactly zero."""
    low, high = CODE_RANGE[how.stored]
    least, greatest = cut.amin(1, keepdim=True).clamp(max=0), cut.amax(1, keepdim=True).clamp(min=0)

    def make(share: float) -> tuple[Tensor, Tensor | None]:
        scale = _storable((greatest - least) * share / (high - low), dtype)
        return scale, (low - least * share / scale).round().clamp(low, high)

    return make


def _storable(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Rounded to the dtype that is stored; never zero, which would make a block of zeros into NaN."""
    limits = torch.finfo(dtype)
    # The least number that there is, below the normal ones: 2^-24 in float16, where weights of a thousandth need it.
    sized = scale.abs().clamp(min=limits.smallest_normal * limits.eps)
    return torch.copysign(sized, scale).to(dtype).float()


def _nearest(cut: Tensor, how: WeightFormat, scale: Tensor, zero: Tensor | None) -> Tensor:
    low, high = CODE_RANGE[how.stored]
    scaled = cut / scale
    if how.stored == "fp8":
        return scaled.clamp_(low, high).to(torch.float8_e4m3fn)
    scaled.round_()
    if zero is not None:
        scaled += zero
    return scaled.clamp_(low, high)
