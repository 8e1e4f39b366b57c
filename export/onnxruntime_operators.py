"""Steps in onnxruntime's own operators: one for rotation, cache and attention, one for a sum and its norm.

Every operator of a step is a kernel on a GPU, and a step has little to do in each: fewer kernels are a faster step. These are
in every build of onnxruntime and in nothing else, so they are for the target that nothing else runs, where they are asked for.
The graph is traced as any other and rewritten here; it means the same, and climbs the same ladder.
"""

from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from motrt.errors import ExportError
from motrt.model_def.config import ModelConfig
from motrt.model_def.graph import Graph
from motrt.model_def.signature import CACHE_POSITION, present_key, present_value

DOMAIN = "com.microsoft"
ATTENTION, NORM = "GroupQueryAttention", "SkipSimplifiedLayerNormalization"


def use_onnxruntime_operators(model: ir.Model, config: ModelConfig, graph: Graph) -> None:
    """Rewrite a step in place.

    Args:
        model: the traced graph, its inputs and outputs named as the contract has them.
        config: what it computes.
        graph: which one it is: of one token per row, its attention told the number of keys.

    Raises:
        ExportError: where a part is not what the trace makes of it.
    """
    _Rewriter(model, config, graph).rewrite()
    model.opset_imports[DOMAIN] = 1


class _Rewriter:
    def __init__(self, model: ir.Model, config: ModelConfig, graph: Graph) -> None:
        self._graph, self._config, self._plan = model.graph, config, graph
        self._outputs = {value.name: value for value in model.graph.outputs}

    def rewrite(self) -> None:
        num_past = self._added("decoder/num_past", "Cast", [self._input(CACHE_POSITION)], to=int(ir.DataType.INT32))
        assert self._plan.capacity is not None
        # The whole cache's size: what a row holds is told by ``num_past``, and this must not change where steps are recorded.
        whole = self._constant("cache_capacity", np.array(self._plan.capacity, np.int32))
        flat = self._constant("one_token_flat", np.array([-1, 1, self._config.num_heads * self._config.head_size], np.int64))
        narrow = self._constant(
            "one_token_flat_keys", np.array([-1, 1, self._config.num_kv_heads * self._config.head_size], np.int64)
        )
        for layer in range(self._config.num_layers):
            self._attend(layer, num_past, whole, flat, narrow)
        for node in list(self._graph):
            if node.op_type == "RMSNormalization":
                self._norm(node)

    def _attend(self, layer: int, num_past: ir.Value, whole: ir.Value, flat: ir.Value, narrow: ir.Value) -> None:
        """Rotation of queries and keys, both writes and attention of one layer."""
        keys, values = self._outputs[present_key(layer)], self._outputs[present_value(layer)]
        write_key, write_value = _made_by(keys, "TensorScatter"), _made_by(values, "TensorScatter")
        turn_key = _made_by(write_key.inputs[1], "RotaryEmbedding")
        readers = [node for node, _ in keys.uses() if node.op_type == "Attention"]
        if len(readers) != 1:
            raise ExportError(f"{keys.name} is read by {len(readers)} Attention operators, and should be by one")
        (attention,) = readers
        turn_query = _made_by(attention.inputs[0], "RotaryEmbedding")
        heads = [_made_by(value, "Reshape") for value in (turn_query.inputs[0], turn_key.inputs[0], write_value.inputs[1])]
        name = (attention.name or "").removesuffix("/Attention")
        rows = [
            self._added(f"{name}/{what}", "Reshape", [node.inputs[0], shape], attention)
            for what, node, shape in zip(("query", "key", "value"), heads, (flat, narrow, narrow), strict=True)
        ]
        fused = ir.Node(
            DOMAIN,
            ATTENTION,
            [*rows, write_key.inputs[0], write_value.inputs[0], num_past, whole, *turn_key.inputs[1:3]],
            [
                ir.AttrInt64("num_heads", self._config.num_heads),
                ir.AttrInt64("kv_num_heads", self._config.num_kv_heads),
                ir.AttrInt64("do_rotary", 1),
                ir.AttrInt64("rotary_interleaved", int(self._config.rope.style == "interleaved")),
                ir.AttrFloat32("scale", self._config.head_size**-0.5),
            ],
            num_outputs=3,
            name=f"{name}/{ATTENTION}",
        )
        mixed, *present = fused.outputs
        self._graph.insert_before(attention, fused)
        mixed.name, mixed.type = f"{name}/mixed", keys.type
        for new, old in zip(present, (keys, values), strict=True):
            wanted, old.name = old.name, f"{old.name}/before"
            new.name, new.type, new.shape = wanted, old.type, old.shape
            ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)
        ir.convenience.replace_all_uses_with(attention.outputs[0], mixed)
        self._graph.remove([attention, write_key, write_value, turn_query, turn_key, *heads], safe=True)

    def _norm(self, norm: ir.Node) -> None:
        """A norm of a sum, and the sum, which goes on as the residual stream."""
        total = norm.inputs[0]
        assert total is not None
        add = total.producer()
        if add is None or add.op_type not in ("Add", "Sum"):
            return
        epsilon = norm.attributes.get_float("epsilon", 1e-5)
        fused = ir.Node(
            DOMAIN,
            NORM,
            [*add.inputs, norm.inputs[1]],
            [ir.AttrFloat32("epsilon", epsilon)],
            num_outputs=4,
            name=f"{(norm.name or '').removesuffix('/RMSNormalization')}/{NORM}",
        )
        self._graph.insert_before(add, fused)
        normed, mean, scale, summed = fused.outputs
        mean.name = scale.name = ""  # not asked for
        for new, old in ((normed, norm.outputs[0]), (summed, total)):
            new.name, new.type, new.shape = old.name, old.type, old.shape
            old.name = f"{old.name}/before"
            ir.convenience.replace_all_uses_with(old, new)
        self._graph.remove([norm, add], safe=True)

    def _input(self, name: str) -> ir.Value:
        return next(value for value in self._graph.inputs if value.name == name)

    def _constant(self, name: str, array: NDArray[Any]) -> ir.Value:
        value = ir.Value(name=name, const_value=ir.tensor(array, name=name))
        value.dtype, value.shape = ir.DataType.from_numpy(array.dtype), ir.Shape(array.shape)
        self._graph.initializers[name] = value
        return value

    def _added(
        self, name: str, op_type: str, inputs: list[ir.Value | None], before: ir.Node | None = None, **attributes: int
    ) -> ir.Value:
        listed = [ir.AttrInt64(key, value) for key, value in attributes.items()]
        node = ir.Node("", op_type, inputs, listed, num_outputs=1, name=name)
        self._graph.insert_before(before or self._graph[0], node)
        node.outputs[0].name = name
        return node.outputs[0]


def _made_by(value: ir.Value | None, op_type: str) -> ir.Node:
    node = None if value is None else value.producer()
    if node is None or node.op_type != op_type:
        came = "nothing" if node is None else node.op_type
        raise ExportError(f"{value and value.name} should be made by {op_type}, and {came} makes it")
    return node
