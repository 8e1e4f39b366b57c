"""A traced graph whose weights are stored as codes and scales: the same products, each weight turned back where it is used.

Standard operators only. ``Gemm`` by a weight becomes ``DequantizeLinear`` and ``MatMul``, which onnxruntime makes into one
product over the codes themselves when it loads the graph (``MatMulNBits``), and TensorRT into one over packed weights. Codes
lie [in, out], blocks along the inputs: the only layout that onnxruntime takes. The embedding's rows are turned back after they
are gathered, a row of codes and a row of scales for each token.
"""

from collections.abc import Callable
from functools import partial

import ml_dtypes
import numpy as np
import onnx_ir as ir
import torch
from onnx_ir import tensor_adapters
from torch import Tensor

from motrt.errors import ExportError
from motrt.export.quantize import BlockScales, choose_scales, codes_under
from motrt.export.steps import Advance
from motrt.model_def.checkpoint.container import TORCH_DTYPES
from motrt.model_def.config import ModelConfig
from motrt.model_def.graph import CANONICAL, Graph
from motrt.model_def.head_surgery import Read
from motrt.model_def.parameters import Parameter, parameters
from motrt.model_def.quantization import Quantization, WeightFormat, codes_of, scales_of, zero_points_of

Specs = dict[str, tuple[ir.DataType, tuple[int, ...]]]
"""Initializers by name: element type and dims."""

CODE_TYPES = {
    "int8": ir.DataType.INT8,
    "int4": ir.DataType.INT4,
    "fp8": ir.DataType.FLOAT8E4M3FN,
    "fp16": ir.DataType.FLOAT16,
}


def stored_specs(config: ModelConfig, quantization: Quantization | None, dtype: str, graph: Graph = CANONICAL) -> Specs:
    """Name -> element type and dims of every initializer that holds a weight of ``graph``."""
    plain = _ir_type(dtype)
    found: Specs = {}
    for one in graph.parameters(config):
        how = None if quantization is None else quantization.format_of(one)
        if how is None:
            found[one.name] = (plain, one.shape)
        elif not how.is_coded:
            found[one.name] = (CODE_TYPES[how.stored], one.shape)
        else:
            found |= _coded_specs(one, how, plain)
    return found


def _coded_specs(one: Parameter, how: WeightFormat, plain: ir.DataType) -> Specs:
    out, width = one.shape
    blocks = how.num_blocks(width)
    codes, scales = (width, out), (out,) if how.block_size is None else (blocks, out)
    if one.part == "embedding":
        codes, scales = (out, width), (out, blocks)
    specs: Specs = {codes_of(one.name): (CODE_TYPES[how.stored], codes), scales_of(one.name): (plain, scales)}
    return specs if how.symmetric else specs | {zero_points_of(one.name): (CODE_TYPES[how.stored], scales)}


def quantize_graph(model: ir.Model, config: ModelConfig, quantization: Quantization, dtype: str) -> None:
    """Rewrite ``model``, as ``trace`` gave it, in place: its quantised weights become codes and scales without values.

    Args:
        model: the traced graph.
        config: what it computes.
        quantization: the format of every weight; ``quantization.problems(config)`` is empty.
        dtype: of activations, and so of scales.

    Raises:
        ExportError: for a quantised weight that is used in any other way than the decoder uses it.
    """
    for one in parameters(config):
        how = quantization.format_of(one)
        value = model.graph.initializers.get(one.name)
        if how is None or value is None:
            continue
        if not how.is_coded:
            _cast_behind_gather(model, value, how, dtype)
            continue
        stored = {
            name: _without_value(model, name, kind, dims)
            for name, (kind, dims) in _coded_specs(one, how, _ir_type(dtype)).items()
        }
        for use in tuple(value.uses()):
            if use.node.op_type == "Gather" and use.idx == 0:
                _dequantize_behind_gather(model, use.node, one, how, stored, dtype)
            elif use.node.op_type == "Gemm" and use.idx == 1 and use.node.attributes.get_int("transB", 0) == 1:
                _multiply_codes(model, use.node, one, how, stored, dtype)
            else:
                raise ExportError(f"{one.name} can not be quantised: {use.node.op_type} ({use.node.name}) reads it")
        del model.graph.initializers[one.name]


def _multiply_codes(
    model: ir.Model, gemm: ir.Node, one: Parameter, how: WeightFormat, stored: dict[str, ir.Value], dtype: str
) -> None:
    """``Gemm(x, w, bias)`` -> ``MatMul(x, DequantizeLinear(codes, scales))`` and, where there is a bias, ``Add``."""
    module = str(gemm.name).rpartition("/")[0]
    whole = _dequantize(module, [*stored.values()], how, 1 if how.block_size is None else 0, one.shape[::-1], dtype)
    rows, bias = gemm.inputs[0], gemm.inputs[2] if len(gemm.inputs) > 2 else None
    assert rows is not None
    product = ir.node("MatMul", [rows, whole.outputs[0]], name=f"{module}/MatMul")
    _typed(product, gemm.outputs[0])
    new = [whole, product]
    if bias is not None:
        new.append(ir.node("Add", [product.outputs[0], bias], name=f"{module}/Add"))
        _typed(new[-1], gemm.outputs[0])
    _replace(model, gemm, new)


def _dequantize_behind_gather(
    model: ir.Model, gather: ir.Node, one: Parameter, how: WeightFormat, stored: dict[str, ir.Value], dtype: str
) -> None:
    """``Gather(table, ids)`` -> ``DequantizeLinear`` of the gathered rows of codes and of scales."""
    module, ids = str(gather.name).rpartition("/")[0], gather.inputs[1]
    assert ids is not None
    picked = []
    for name, kept in stored.items():
        picked.append(ir.node("Gather", [kept, ids], {"axis": 0}, name=f"{module}/Gather.{name.rpartition('.')[2]}"))
        picked[-1].outputs[0].type = kept.type
    # In blocks even where a row has one scale: without, the operator takes constants alone.
    size = how.block_size or one.shape[1]
    node = ir.node(
        "DequantizeLinear",
        [node.outputs[0] for node in picked],
        {"axis": 1, "block_size": size},
        name=f"{module}/DequantizeLinear",
    )
    _typed(node, gather.outputs[0])
    _replace(model, gather, [*picked, node])


def _cast_behind_gather(model: ir.Model, value: ir.Value, how: WeightFormat, dtype: str) -> None:
    """A table in another floating type: its gathered rows are cast."""
    assert value.const_value is not None and value.name is not None
    dims = tuple(value.const_value.shape.numpy())
    kind = CODE_TYPES[how.stored]
    value.type = ir.TensorType(kind)
    value.const_value = _placeholder(value.name, kind, dims)
    for use in tuple(value.uses()):
        if use.node.op_type != "Gather" or use.idx != 0:
            raise ExportError(f"{value.name} can not be stored as {how}: {use.node.op_type} ({use.node.name}) reads it")
        module = str(use.node.name).rpartition("/")[0]
        gather = ir.node("Gather", list(use.node.inputs), {"axis": 0}, name=f"{module}/Gather")
        gather.outputs[0].dtype = kind
        cast = ir.node("Cast", [gather.outputs[0]], {"to": _ir_type(dtype).value}, name=f"{module}/Cast")
        _typed(cast, use.node.outputs[0])
        _replace(model, use.node, [gather, cast])


def _dequantize(
    module: str, inputs: list[ir.Value], how: WeightFormat, axis: int, dims: tuple[int, ...], dtype: str
) -> ir.Node:
    attributes: dict[str, int] = {"axis": axis} | ({} if how.block_size is None else {"block_size": how.block_size})
    node = ir.node("DequantizeLinear", inputs, attributes, name=f"{module}/DequantizeLinear")
    node.outputs[0].dtype, node.outputs[0].shape = _ir_type(dtype), ir.Shape(dims)
    return node


def _typed(node: ir.Node, like: ir.Value) -> None:
    node.outputs[0].type, node.outputs[0].shape = like.type, like.shape


def _replace(model: ir.Model, old: ir.Node, new: list[ir.Node]) -> None:
    """``new`` in the place of ``old``, the last one's output under the name that ``old``'s had."""
    result, before = new[-1].outputs[0], old.outputs[0]
    model.graph.insert_before(old, new)
    name = before.name
    before.replace_all_uses_with(result, replace_graph_outputs=True)
    model.graph.remove(old, safe=True)
    result.name = name


def _without_value(model: ir.Model, name: str, kind: ir.DataType, dims: tuple[int, ...]) -> ir.Value:
    value = ir.Value(name=name, shape=ir.Shape(dims), type=ir.TensorType(kind), const_value=_placeholder(name, kind, dims))
    model.graph.initializers[name] = value
    return value


def _placeholder(name: str, kind: ir.DataType, dims: tuple[int, ...]) -> ir.LazyTensor:
    def missing() -> ir.TensorProtocol:
        raise ExportError(f"{name} was written before it had values")

    return ir.LazyTensor(missing, dtype=kind, shape=ir.Shape(dims), name=name)


class CodeSource:
    """Gives the values of a quantised graph's initializers, one weight at a time.

    Scales are chosen for all weights beforehand and kept (a hundredth of the weights); codes follow from weight and scales when
    they are written, so that no more than one weight is ever in memory.

    Args:
        config: of the model.
        quantization: the format of every weight.
        dtype: of the scales.
        read: a weight, by name.
    """

    def __init__(self, config: ModelConfig, quantization: Quantization, dtype: str, read: Read) -> None:
        self._read, self._dtype = read, TORCH_DTYPES[dtype]
        self._method, self._signed = quantization.scales, quantization.signed
        self._formats = {one.name: (one, how) for one in parameters(config) if (how := quantization.format_of(one)) is not None}
        self._chosen: dict[str, BlockScales] = {}

    def choose(self, advance: Advance) -> None:
        """Choose all scales; ``advance`` is told the elements of each weight."""
        for name, (one, how) in self._formats.items():
            if how.is_coded:
                self._chosen[name] = choose_scales(self._read(name), how, self._method, self._dtype, self._signed)
                if not bool(self._chosen[name].scales.isfinite().all()):
                    raise ExportError(
                        f"the scales of {name} do not fit {str(self._dtype).removeprefix('torch.')}: compute in another "
                        "precision, with --activations bf16 or fp32"
                    )
            advance(one.numel)

    def attach(self, model: ir.Model) -> None:
        """Let the initializers of ``model`` fetch their values here when they are written."""
        for one, how in self._formats.values():
            if not how.is_coded:
                self._lazily(model, one.name, partial(self._half, one.name))
                continue
            is_table = one.part == "embedding"
            self._lazily(model, codes_of(one.name), partial(self._codes, one.name, how, is_table))
            self._lazily(model, scales_of(one.name), partial(self._scales, one.name, how, is_table))
            if not how.symmetric:
                self._lazily(model, zero_points_of(one.name), partial(self._zero_points, one.name, how))

    def _lazily(self, model: ir.Model, name: str, make: Callable[[], ir.TensorProtocol]) -> None:
        value = model.graph.initializers[name]
        assert value.dtype is not None and value.shape is not None
        value.const_value = ir.LazyTensor(make, dtype=value.dtype, shape=ir.Shape(value.shape.numpy()), name=name)

    def _half(self, name: str) -> ir.TensorProtocol:
        value = self._read(name).to(torch.float16)
        if value.isinf().any():
            raise ExportError(f"{name} does not fit float16: store it as int8, or in the graph's precision")
        return tensor_adapters.TorchTensor(value.contiguous(), name=name)

    def _codes(self, name: str, how: WeightFormat, is_table: bool) -> ir.TensorProtocol:
        codes = codes_under(self._read(name), how, self._chosen[name])
        return coded_tensor(codes if is_table else codes.T.contiguous(), how, codes_of(name))

    def _scales(self, name: str, how: WeightFormat, is_table: bool) -> ir.TensorProtocol:
        scales = self._chosen[name].scales  # [out, blocks]
        laid = scales if is_table else scales.reshape(-1) if how.block_size is None else scales.T
        return tensor_adapters.TorchTensor(laid.contiguous(), name=scales_of(name))

    def _zero_points(self, name: str, how: WeightFormat) -> ir.TensorProtocol:
        zero = self._chosen[name].zero_points
        assert zero is not None
        laid = zero.reshape(-1) if how.block_size is None else zero.T
        return coded_tensor(laid.to(torch.int8).contiguous(), how, zero_points_of(name))


def coded_tensor(codes: Tensor, how: WeightFormat, name: str) -> ir.TensorProtocol:
    """Codes in ONNX's own packing: 4-bit ones two to a byte, the first in the low half."""
    if how.stored == "fp8":
        values = codes.view(torch.uint8).numpy().view(ml_dtypes.float8_e4m3fn)
        return ir.Tensor(values, dtype=ir.DataType.FLOAT8E4M3FN, name=name)
    if how.stored == "int8":
        return ir.Tensor(codes.numpy(), name=name)
    flat = codes.flatten().view(torch.uint8)
    if flat.numel() % 2:
        flat = torch.cat([flat, flat.new_zeros(1)])
    packed = (flat[0::2] & 15) | (flat[1::2] << 4)
    return ir.PackedTensor(packed.numpy(), ir.DataType.INT4, shape=ir.Shape(codes.shape), name=name)


def _ir_type(dtype: str) -> ir.DataType:
    return ir.DataType.from_numpy(np.dtype(dtype if dtype != "bfloat16" else ml_dtypes.bfloat16))
