"""A traced graph whose weights are stored as codes and scales: the same products, each weight turned back where it is used.

Standard operators only. ``Gemm`` by a weight becomes ``DequantizeLinear`` and ``MatMul``, which onnxruntime makes into one
product over the codes themselves when it loads the graph (``MatMulNBits``), and TensorRT into one over packed weights. Codes
lie [in, out], blocks along the inputs: the only layout that onnxruntime takes. The embedding's rows are turned back after they
are gathered, a row of codes and a row of scales for each token. A table that is the head too is stored once, as the head's.
"""

from collections.abc import Callable, Mapping
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
from motrt.model_def.parameters import SHARED_HEAD, parameters
from motrt.model_def.quantization import CodedWeight, Quantization, WeightFormat, codes_of, scales_of, zero_points_of

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
    for coded in quantization.coded_weights(graph.parameters(config)) if quantization else ():
        found |= _coded_specs(coded, ir.DataType.FLOAT16 if quantization and quantization.half_scales else plain)
    return found


def _coded_specs(one: CodedWeight, of_scales: ir.DataType) -> Specs:
    (out, width), how = one.shape, one.how
    blocks = how.num_blocks(width)
    codes, scales = (width, out), (out,) if how.block_size is None else (blocks, out)
    if one.is_table:
        codes, scales = (out, width), (out, blocks)
    specs: Specs = {codes_of(one.name): (CODE_TYPES[how.stored], codes), scales_of(one.name): (of_scales, scales)}
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
    held = [one for one in parameters(config) if one.name in model.graph.initializers]
    for one in held:
        how = quantization.format_of(one)
        if how is not None and not how.is_coded:
            _cast_behind_gather(model, model.graph.initializers[one.name], how, dtype)
    for coded in quantization.coded_weights(held):
        specs = _coded_specs(coded, ir.DataType.FLOAT16 if quantization.half_scales else _ir_type(dtype))
        stored = {name: _without_value(model, name, kind, dims) for name, (kind, dims) in specs.items()}
        if quantization.half_scales:
            stored[scales_of(coded.name)] = _widened(model, stored[scales_of(coded.name)], dtype)
        uses = [(use.node, use.idx) for one in coded.parts for use in model.graph.initializers[one.name].uses()]
        if coded.is_tied:
            lookups = [node for node, place in uses if node.op_type == "Gather" and place == 0]
            uses = [(node, place) for node, place in uses if node not in lookups]
            _gather_columns(model, lookups, coded, stored)
        if coded.is_table and all(node.op_type == "Gather" and place == 0 for node, place in uses):
            for node, _ in uses:
                _dequantize_behind_gather(model, node, coded, stored)
        elif len(uses) == len(coded.parts) and all(_multiplies_by(node, place) for node, place in uses):
            _multiply_codes(model, [node for node, _ in uses], coded, stored, dtype)
        else:
            readers = ", ".join(f"{node.op_type} ({node.name})" for node, _ in uses)
            raise ExportError(f"{coded.name} can not be quantised: {readers} read it")
        for one in coded.parts:
            del model.graph.initializers[one.name]
    if quantization.packed:
        _combine_once(model)


def _widened(model: ir.Model, scales: ir.Value, dtype: str) -> ir.Value:
    """Scales in the type of activations, which ``DequantizeLinear`` gives: cast once, when the graph is loaded."""
    cast = ir.node("Cast", [scales], {"to": _ir_type(dtype).value}, name=f"{scales.name}/Cast")
    cast.outputs[0].type, cast.outputs[0].shape = ir.TensorType(_ir_type(dtype)), scales.shape
    model.graph.insert_before(model.graph[0], [cast])
    return cast.outputs[0]


def _multiplies_by(node: ir.Node, place: int) -> bool:
    """Whether ``node`` multiplies rows by its input at ``place``, a weight in the checkpoint's layout."""
    return bool(node.op_type == "Gemm" and place == 1 and node.attributes.get_int("transB", 0) == 1)


def _multiply_codes(model: ir.Model, gemms: list[ir.Node], coded: CodedWeight, stored: dict[str, ir.Value], dtype: str) -> None:
    """``Gemm(x, w, bias)`` -> ``MatMul(x, DequantizeLinear(codes, scales))`` and, where there is a bias, ``Add``.

    Several products of the same rows become one, and ``Split`` gives each its outputs.
    """
    first, how = gemms[0], coded.how
    module = (SHARED_HEAD if coded.is_tied else coded.name).removesuffix(".weight")
    rows, bias = first.inputs[0], first.inputs[2] if len(first.inputs) > 2 else None
    assert rows is not None
    if len(gemms) > 1 and any(one.inputs[0] is not rows or len(one.inputs) > 2 for one in gemms):
        raise ExportError(f"{coded.name} can not be one product: its parts multiply other rows, or have biases")
    attributes = {"axis": 1} if how.block_size is None else {"axis": 0, "block_size": how.block_size}
    whole = ir.node("DequantizeLinear", [*stored.values()], attributes, name=f"{module}/DequantizeLinear")
    whole.outputs[0].type, whole.outputs[0].shape = ir.TensorType(_ir_type(dtype)), ir.Shape(coded.shape[::-1])
    product = ir.node("MatMul", [rows, whole.outputs[0]], name=f"{module}/MatMul")
    if len(gemms) > 1:
        product.outputs[0].type = first.outputs[0].type
        parts = _split(model, product.outputs[0], [one.shape[0] for one in coded.parts], f"{module}/Split")
        model.graph.insert_before(first, [whole, product, parts])
        for gemm, output in zip(gemms, parts.outputs, strict=True):
            _take_place(model, gemm, output)
        return
    _typed(product, first.outputs[0])
    new = [whole, product]
    if bias is not None:
        new.append(ir.node("Add", [product.outputs[0], bias], name=f"{module}/Add"))
        _typed(new[-1], first.outputs[0])
    _replace(model, first, new)
    if bias is None:
        _sum_behind(model, product)


def _sum_behind(model: ir.Model, product: ir.Node) -> None:
    """``Add`` of the residual stream right behind a product -> ``Sum``, the same numbers.

    onnxruntime's ``MatMulAddFusion``, on by default, makes ``MatMul`` and ``Add`` into ``Gemm`` before it looks for codes, and
    a ``Gemm`` that adds rows is no product of codes any more. One that adds a bias is: those stay ``Add``.
    """
    add = _only_user(product.outputs[0])
    if add is not None and add.op_type == "Add":
        made = ir.node("Sum", list(add.inputs), name=str(add.name).replace("/Add", "/Sum"))
        _replace(model, add, [made])


def _split(model: ir.Model, value: ir.Value, sizes: list[int], name: str) -> ir.Node:
    """``value`` cut along its last axis."""
    told = f"sizes.{'.'.join(map(str, sizes))}"
    if told not in model.graph.initializers:
        tensor = ir.tensor(np.array(sizes, np.int64), name=told)
        constant = ir.Value(name=told, shape=ir.Shape([len(sizes)]), type=ir.TensorType(ir.DataType.INT64), const_value=tensor)
        model.graph.initializers[told] = constant
    return ir.node("Split", [value, model.graph.initializers[told]], {"axis": 1}, num_outputs=len(sizes), name=name)


def _combine_once(model: ir.Model) -> None:
    """Rows of all routes are put back in place before q, k and v are cut apart, and not three times after.

    ``Split`` of each route, then for q, k and v each ``Concat`` of routes and ``Gather`` -> ``Concat``, ``Gather``, ``Split``.
    Where anything else stands between (a norm of q and k, say), all stays as it is.
    """
    for split in [node for node in model.graph if node.op_type == "Split"]:
        concats = [_only_user(output) for output in split.outputs]
        if any(
            one is None or one.op_type != "Concat" or one.inputs[0] is not split.outputs[at] for at, one in enumerate(concats)
        ):
            continue
        gathers = [_only_user(one.outputs[0]) for one in concats if one is not None]
        routes = [value.producer() for value in (concats[0].inputs if concats[0] is not None else ()) if value is not None]
        if not _is_one_combination(concats, gathers, routes):
            continue
        module = str(split.name).rpartition(".")[0]
        packed = [route.inputs[0] for route in routes if route is not None]
        laid = ir.node("Concat", packed, {"axis": 0}, name=f"{module}/Concat")
        first = gathers[0]
        assert first is not None
        placed = ir.node("Gather", [laid.outputs[0], first.inputs[1]], {"axis": 0}, name=f"{module}/Gather")
        cut = ir.node(
            "Split", [placed.outputs[0], split.inputs[1]], {"axis": 1}, num_outputs=len(gathers), name=f"{module}/Split"
        )
        laid.outputs[0].type = placed.outputs[0].type = split.outputs[0].type
        model.graph.insert_before(first, [laid, placed, cut])
        for gather, output in zip(gathers, cut.outputs, strict=True):
            assert gather is not None
            _take_place(model, gather, output)
        for done in (*concats, *routes):
            assert done is not None
            model.graph.remove(done, safe=True)


def _is_one_combination(concats: list[ir.Node | None], gathers: list[ir.Node | None], routes: list[ir.Node | None]) -> bool:
    """Whether output j of every route's Split, and nothing else, goes through concat j and gather j to the same places."""
    if any(one is None or one.op_type != "Gather" for one in gathers) or any(
        one is None or one.op_type != "Split" for one in routes
    ):
        return False
    wanted = [[route.outputs[at] for route in routes if route is not None] for at in range(len(concats))]
    found = [list(one.inputs) for one in concats if one is not None]
    return wanted == found and len({id(one.inputs[1]) for one in gathers if one is not None}) == 1


def _only_user(value: ir.Value) -> ir.Node | None:
    uses = list(value.uses())
    return uses[0].node if len(uses) == 1 and not value.is_graph_output() else None


def _dequantize_behind_gather(model: ir.Model, gather: ir.Node, coded: CodedWeight, stored: dict[str, ir.Value]) -> None:
    """``Gather(table, ids)`` -> ``DequantizeLinear`` of the gathered rows of codes and of scales."""
    module, ids = str(gather.name).rpartition("/")[0], gather.inputs[1]
    assert ids is not None
    picked = []
    for name, kept in stored.items():
        picked.append(ir.node("Gather", [kept, ids], {"axis": 0}, name=f"{module}/Gather.{name.rpartition('.')[2]}"))
        picked[-1].outputs[0].type = kept.type
    # In blocks even where a row has one scale: without, the operator takes constants alone.
    size = coded.how.block_size or coded.shape[1]
    node = ir.node(
        "DequantizeLinear",
        [node.outputs[0] for node in picked],
        {"axis": 1, "block_size": size},
        name=f"{module}/DequantizeLinear",
    )
    _typed(node, gather.outputs[0])
    _replace(model, gather, [*picked, node])


def _gather_columns(model: ir.Model, lookups: list[ir.Node], coded: CodedWeight, stored: dict[str, ir.Value]) -> None:
    """Let lookups of a tied table read the codes that the head multiplies by, which lie [m, rows].

    By way of ``Transpose``, which onnxruntime does once, when it loads the graph: of codes that anything else than the
    product's ``DequantizeLinear`` reads it makes no product of codes (1.32 tried).
    """
    rows_first = {}
    for name, kept in stored.items():
        turned = ir.node("Transpose", [kept], {"perm": [1, 0]}, name=f"{coded.name.removesuffix('.weight')}/Transpose.{name}")
        turned.outputs[0].type = kept.type
        assert kept.shape is not None
        turned.outputs[0].shape = ir.Shape(kept.shape.numpy()[::-1])
        model.graph.insert_before(lookups[0], [turned])
        rows_first[name] = turned.outputs[0]
    for node in lookups:
        _dequantize_behind_gather(model, node, coded, rows_first)


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


def _typed(node: ir.Node, like: ir.Value) -> None:
    node.outputs[0].type, node.outputs[0].shape = like.type, like.shape


def _replace(model: ir.Model, old: ir.Node, new: list[ir.Node]) -> None:
    """``new`` in the place of ``old``, the last one's output under the name that ``old``'s had."""
    model.graph.insert_before(old, new)
    _take_place(model, old, new[-1].outputs[0])


def _take_place(model: ir.Model, old: ir.Node, result: ir.Value) -> None:
    """``result`` wherever the output of ``old`` was, and under its name; ``old`` goes."""
    before = old.outputs[0]
    name = before.name
    result.type, result.shape = before.type, before.shape
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
        importance: of each input of a weight, by its name (see ``choose_scales``).
    """

    def __init__(
        self,
        config: ModelConfig,
        quantization: Quantization,
        dtype: str,
        read: Read,
        importance: Mapping[str, Tensor] | None = None,
    ) -> None:
        self._read, self._importance = read, importance or {}
        self._dtype = torch.float16 if quantization.half_scales else TORCH_DTYPES[dtype]
        self._quantization = quantization
        self._coded = quantization.coded_weights(parameters(config))
        self._halves = [one.name for one in parameters(config) if (how := quantization.format_of(one)) and not how.is_coded]
        self._chosen: dict[str, BlockScales] = {}

    def choose(self, advance: Advance) -> None:
        """Choose all scales; ``advance`` is told the elements of each weight."""
        how = self._quantization
        for one in self._coded:
            # q, k and v read the same rows.
            counts = self._importance.get(one.parts[0].name) if how.weighs_errors_of(one.how) else None
            chosen = choose_scales(self._weight(one), one.how, how.scales, self._dtype, how.signed, counts)
            if not bool(chosen.scales.isfinite().all()):
                raise ExportError(
                    f"the scales of {one.name} do not fit {str(self._dtype).removeprefix('torch.')}: compute in another "
                    "precision, with --activations bf16 or fp32"
                )
            self._chosen[one.name] = chosen
            advance(one.shape[0] * one.shape[1])

    def attach(self, model: ir.Model) -> None:
        """Let the initializers of ``model`` fetch their values here when they are written."""
        for name in self._halves:
            self._lazily(model, name, partial(self._half, name))
        for one in self._coded:
            self._lazily(model, codes_of(one.name), partial(self._codes, one))
            self._lazily(model, scales_of(one.name), partial(self._scales, one))
            if not one.how.symmetric:
                self._lazily(model, zero_points_of(one.name), partial(self._zero_points, one))

    def _weight(self, one: CodedWeight) -> Tensor:
        """All parts, [out, in]."""
        read = [self._read(part.name) for part in one.parts]
        return read[0] if len(read) == 1 else torch.cat(read)

    def _lazily(self, model: ir.Model, name: str, make: Callable[[], ir.TensorProtocol]) -> None:
        value = model.graph.initializers[name]
        assert value.dtype is not None and value.shape is not None
        value.const_value = ir.LazyTensor(make, dtype=value.dtype, shape=ir.Shape(value.shape.numpy()), name=name)

    def _half(self, name: str) -> ir.TensorProtocol:
        value = self._read(name).to(torch.float16)
        if value.isinf().any():
            raise ExportError(f"{name} does not fit float16: store it as int8, or in the graph's precision")
        return tensor_adapters.TorchTensor(value.contiguous(), name=name)

    def _codes(self, one: CodedWeight) -> ir.TensorProtocol:
        codes = codes_under(self._weight(one), one.how, self._chosen[one.name])
        return coded_tensor(codes if one.is_table else codes.T.contiguous(), one.how, codes_of(one.name))

    def _scales(self, one: CodedWeight) -> ir.TensorProtocol:
        scales = self._chosen[one.name].scales  # [out, blocks]
        laid = scales if one.is_table else scales.reshape(-1) if one.how.block_size is None else scales.T
        return tensor_adapters.TorchTensor(laid.contiguous(), name=scales_of(one.name))

    def _zero_points(self, one: CodedWeight) -> ir.TensorProtocol:
        zero = self._chosen[one.name].zero_points
        assert zero is not None
        laid = zero.reshape(-1) if one.how.block_size is None else zero.T
        return coded_tensor(laid.to(torch.int8).contiguous(), one.how, zero_points_of(one.name))


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
