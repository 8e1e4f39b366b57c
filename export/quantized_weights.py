"""The quantised weights of a finished graph, read back from its file: what they stand for, and if they are the checkpoint's.

How codes and scales lie in the file is written here a second time, and not shared with the writer (``quantized_graph``), so
that one finds the other's faults.
"""

from pathlib import Path

import torch
from torch import Tensor

from motrt.errors import BundleError
from motrt.export.quantize import MOST_LOST, BlockScales, choose_scales, codes_under, dequantize, squared_errors
from motrt.export.stored_weights import read_graph, stored_tensor
from motrt.model_def.config import ModelConfig
from motrt.model_def.head_surgery import Read
from motrt.model_def.parameters import parameters
from motrt.model_def.quantization import CODE_RANGE, CodedWeight, Quantization, codes_of, scales_of, zero_points_of

# Scales found by ``search`` lose no more than those of ``absmax``, but for the order in which squares are summed.
_SUMMATION_ROOM = 1.0 + 1e-5

_ROWS = 512  # outputs that are looked at together


class QuantizedWeights:
    """The weights that a quantised graph holds.

    Args:
        model_file: the graph, its external data beside it.
        config: what it computes.
        quantization: the format of every weight.
    """

    def __init__(self, model_file: Path, config: ModelConfig, quantization: Quantization) -> None:
        self.model_file, self.quantization = model_file, quantization
        self._folder, self._signed = model_file.parent, quantization.signed
        self._stored = {one.name: one for one in read_graph(model_file).graph.initializer}
        self.coded = quantization.coded_weights(parameters(config))
        self.halves = [one.name for one in parameters(config) if (how := quantization.format_of(one)) and not how.is_coded]
        self._holder = {part.name: one for one in self.coded for part in one.parts}

    def read(self, name: str) -> Tensor:
        """What a weight is in the graph, in the checkpoint's layout: float32 where it is coded, as it lies elsewhere.

        Raises:
            BundleError: where the graph does not hold it.
        """
        one = self._holder.get(name)
        if one is None:
            return self._tensor(name)
        return dequantize(self._codes(one), one.how, self._scales(one))[one.rows_of(name)]

    def problem(self, one: CodedWeight, read: Read) -> str | None:
        """How codes and scales are not what their format makes of the checkpoint's weights; None where they are.

        Every code must be the nearest under its scale, and no block may lose more than with the usual scale, or, where errors
        were weighed, ``MOST_LOST`` times as much: both follow from the checkpoint and the file alone, however the scales were
        found.
        """
        how, weight = one.how, torch.cat([read(part.name) for part in one.parts])
        codes, scales = self._codes(one), self._scales(one)
        sizes = scales.scales.abs() if self._signed else scales.scales
        if not bool(torch.isfinite(sizes.float()).all()) or bool((sizes <= 0).any()):
            return f"scales that are {'zero or no' if self._signed else 'not positive'} numbers"
        if not self._is_within_a_step(one, weight, codes, scales):
            return "codes that stand for numbers more than half a step from the weights"
        wanted = codes_under(weight, how, scales)
        wrong = (wanted.view(torch.uint8) != codes.view(torch.uint8)).any(1)  # bytes: fp8 compares no other way
        if bool(wrong.any()):
            return f"codes of {int(wrong.sum())} outputs are not the nearest, first of output {int(wrong.nonzero()[0])}"
        usual = choose_scales(weight, how, "absmax", scales.scales.dtype)
        lost, most = (squared_errors(weight, how, codes_under(weight, how, some), some) for some in (scales, usual))
        times = MOST_LOST if self.quantization.weighs_errors_of(how) else 1.0
        worse = (lost > most * times * _SUMMATION_ROOM).any(1)
        if bool(worse.any()):
            told = "more than" if times == 1.0 else f"more than {times:g} times what is lost under"
            return f"scales of {int(worse.sum())} outputs lose {told} the usual ones, first of output {int(worse.nonzero()[0])}"
        return None

    @staticmethod
    def _is_within_a_step(one: CodedWeight, weight: Tensor, codes: Tensor, scales: BlockScales) -> bool:
        """What rounding means, said without the quantiser: half a step from the weight, unless the code is an end of its range.

        An e4m3 number keeps three bits behind the first, so half its step is a sixteenth of it, or half the least number, 2^-9.
        """
        size, (low, high) = one.how.block_size or one.shape[1], CODE_RANGE[one.how.stored]
        for start in range(0, one.shape[0], _ROWS):
            rows = slice(start, start + _ROWS)
            code, step = codes[rows].float(), scales.scales[rows].float().repeat_interleave(size, 1)
            zero = 0.0 if scales.zero_points is None else scales.zero_points[rows].float().repeat_interleave(size, 1)
            half = 0.5 if one.how.stored != "fp8" else (code.abs() / 16).clamp(min=2.0**-10)
            far = (weight[rows].float() / step - (code - zero)).abs() > half * (1 + 1e-3)
            outwards = torch.where(
                code >= high, weight[rows].float() / step + zero >= high, weight[rows].float() / step + zero <= low
            )
            if bool((far & ~(((code >= high) | (code <= low)) & outwards)).any()):
                return False
        return True

    def half_problem(self, name: str, read: Read) -> str | None:
        """The same of a table that is stored in float16."""
        return (
            None if torch.equal(read(name).to(torch.float16), self._tensor(name)) else "it is not the checkpoint's in float16"
        )

    def _tensor(self, name: str) -> Tensor:
        if name not in self._stored:
            raise BundleError(f"the graph in {self._folder} lacks {name}: export it again")
        return stored_tensor(self._stored[name], self._folder)

    def _codes(self, one: CodedWeight) -> Tensor:
        codes = self._tensor(codes_of(one.name))
        return codes if one.is_table else codes.T.contiguous()

    def _scales(self, one: CodedWeight) -> BlockScales:
        """[out, blocks], however they lie."""
        zero = None if one.how.symmetric else self._laid(zero_points_of(one.name), one)
        return BlockScales(self._laid(scales_of(one.name), one), zero)

    def _laid(self, name: str, one: CodedWeight) -> Tensor:
        found = self._tensor(name)
        if one.is_table:
            return found
        return found[:, None] if found.ndim == 1 else found.T.contiguous()
