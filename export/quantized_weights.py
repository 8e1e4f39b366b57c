"""The quantised weights of a finished graph, read back from its file: what they stand for, and if they are the checkpoint's.

How codes and scales lie in the file is written here a second time, and not shared with the writer (``quantized_graph``), so
that one finds the other's faults.
"""

from collections.abc import Mapping
from pathlib import Path

import onnx
import torch
from torch import Tensor

from motrt.errors import BundleError
from motrt.export.quantize import BlockScales, choose_scales, codes_under, dequantize, squared_errors
from motrt.export.stored_weights import stored_tensor
from motrt.model_def.config import ModelConfig
from motrt.model_def.head_surgery import Read
from motrt.model_def.parameters import Parameter, parameters
from motrt.model_def.quantization import Quantization, WeightFormat, codes_of, scales_of, zero_points_of

# Scales found by ``search`` lose no more than those of ``absmax``, but for the order in which squares are summed.
_SUMMATION_ROOM = 1.0 + 1e-5


class QuantizedWeights:
    """The weights that a quantised graph holds.

    Args:
        model_file: the graph, its external data beside it.
        config: what it computes.
        quantization: the format of every weight.
    """

    def __init__(self, model_file: Path, config: ModelConfig, quantization: Quantization) -> None:
        self._folder, self._signed = model_file.parent, quantization.signed
        self._stored = {one.name: one for one in onnx.load(model_file, load_external_data=False).graph.initializer}
        self.formats = {one.name: (one, how) for one in parameters(config) if (how := quantization.format_of(one)) is not None}

    def read(self, name: str) -> Tensor:
        """What a weight is in the graph, in the checkpoint's layout: float32 where it is coded, as it lies elsewhere.

        Raises:
            BundleError: where the graph does not hold it.
        """
        if name not in self.formats or not self.formats[name][1].is_coded:
            return self._tensor(name)
        one, how = self.formats[name]
        return dequantize(self._codes(one), how, self._scales(one, how))

    def problem(self, name: str, read: Read) -> str | None:
        """How the codes and scales of one weight are not what its format makes of the checkpoint's; None where they are.

        Every code must be the nearest under its scale, and no block may lose more than with the usual scale: both follow from
        the checkpoint and the file alone, however the scales were found.
        """
        one, how = self.formats[name]
        weight = read(name)
        if not how.is_coded:
            return (
                None if torch.equal(weight.to(torch.float16), self._tensor(name)) else "it is not the checkpoint's in float16"
            )
        codes, scales = self._codes(one), self._scales(one, how)
        sizes = scales.scales.abs() if self._signed else scales.scales
        if not bool(torch.isfinite(sizes.float()).all()) or bool((sizes <= 0).any()):
            return f"scales that are {'zero or no' if self._signed else 'not positive'} numbers"
        wanted = codes_under(weight, how, scales)
        wrong = (wanted.view(torch.uint8) != codes.view(torch.uint8)).any(1)  # bytes: fp8 compares no other way
        if bool(wrong.any()):
            return f"codes of {int(wrong.sum())} outputs are not the nearest, first of output {int(wrong.nonzero()[0])}"
        usual = choose_scales(weight, how, "absmax", scales.scales.dtype)
        lost, most = (squared_errors(weight, how, codes_under(weight, how, some), some) for some in (scales, usual))
        worse = (lost > most * _SUMMATION_ROOM).any(1)
        if bool(worse.any()):
            return (
                f"scales of {int(worse.sum())} outputs lose more than the usual ones, first of output {int(worse.nonzero()[0])}"
            )
        return None

    def coded_names(self) -> Mapping[str, tuple[str, ...]]:
        """Each coded weight with the initializers that hold it."""
        return {
            name: (codes_of(name), scales_of(name), *(() if how.symmetric else (zero_points_of(name),)))
            for name, (_, how) in self.formats.items()
            if how.is_coded
        }

    def _tensor(self, name: str) -> Tensor:
        if name not in self._stored:
            raise BundleError(f"the graph in {self._folder} lacks {name}: export it again")
        return stored_tensor(self._stored[name], self._folder)

    def _codes(self, one: Parameter) -> Tensor:
        codes = self._tensor(codes_of(one.name))
        return codes if one.part == "embedding" else codes.T.contiguous()

    def _scales(self, one: Parameter, how: WeightFormat) -> BlockScales:
        """[out, blocks], however they lie."""
        zero = None if how.symmetric else self._laid(zero_points_of(one.name), one)
        return BlockScales(self._laid(scales_of(one.name), one), zero)

    def _laid(self, name: str, one: Parameter) -> Tensor:
        found = self._tensor(name)
        if one.part == "embedding":
            return found
        return found[:, None] if found.ndim == 1 else found.T.contiguous()
