"""A graph cut into its parts: where each part's values stand in the file, and the graph between some of them.

Cutting is not marking. A value that is marked as an output changes what a runtime fuses, and may hide the very fault that is
looked for; a cut graph begins and ends at the value, and is a model of its own that anyone can run.

Places are found by what the exporter promises: norms by their weights' names, rotations by the caches that they feed, caches
by the contract's names. Knows nothing of values and of budgets.
"""

from collections.abc import Mapping, Sequence

import onnx
from onnx import TensorProto, helper

from motrt.errors import ParityError
from motrt.export.parity.part_values import HIDDEN, LOGITS, of_layer, stream
from motrt.export.stored_weights import dtype_name
from motrt.model_def.config import ModelConfig
from motrt.model_def.signature import past_key, past_value, present_key, present_value


class CutGraph:
    """One ONNX graph, and how to cut it.

    Args:
        model: the graph, its external data not loaded.
        config: what it computes.
        logits: the name of its logits.

    Attributes:
        places: the name in the file, by the name of the value (see ``part_values``).
        dtype: of every value but the logits.

    Raises:
        ParityError: where a part is not where the exporter puts it: that is the fault, then.
    """

    def __init__(self, model: onnx.ModelProto, config: ModelConfig, logits: str) -> None:
        self._model, self._config = model, config
        self._producers = {name: node for node in model.graph.node for name in node.output}
        self._inputs = {one.name: one for one in model.graph.input}
        self._initializers = {one.name: one for one in model.graph.initializer}
        self.places = self._find_places(logits)
        self._element = int(self._inputs[past_key(0)].type.tensor_type.elem_type)
        self.dtype = dtype_name(self._element)

    def _find_places(self, logits: str) -> dict[str, str]:
        norms = {
            node.input[1]: node for node in self._model.graph.node if node.op_type == "RMSNormalization" and len(node.input) > 1
        }
        final = _found(norms, "norm.weight", "the final norm")
        places = {LOGITS: logits, HIDDEN: final.output[0]}
        for layer in range(self._config.num_layers):
            before = _found(norms, f"layers.{layer}.attention_norm.weight", f"the attention norm of layer {layer}")
            behind = _found(norms, f"layers.{layer}.ffn_norm.weight", f"the ffn norm of layer {layer}")
            places |= {stream(layer): before.input[0], of_layer("normed", layer): before.output[0]}
            places |= {of_layer("attended", layer): behind.input[0], of_layer("ffn_normed", layer): behind.output[0]}
            places |= self._places_of_attention(layer)
        places[stream(self._config.num_layers)] = self._before_rows_are_picked(final.input[0])
        return places

    def _places_of_attention(self, layer: int) -> dict[str, str]:
        keys, values = present_key(layer), present_value(layer)
        turned_key = self._made_by(self._made_by(keys, "TensorScatter", layer).input[1], "RotaryEmbedding", layer)
        value = self._made_by(values, "TensorScatter", layer).input[1]
        attends = [node for node in self._model.graph.node if node.op_type == "Attention" and keys in node.input]
        if len(attends) != 1:
            raise ParityError(f"layer {layer}, attention: {len(attends)} operators read {keys}, and one should")
        turned_query = self._made_by(attends[0].input[0], "RotaryEmbedding", layer)
        return {
            past_key(layer): past_key(layer),
            past_value(layer): past_value(layer),
            keys: keys,
            values: values,
            of_layer("query", layer): turned_query.input[0],
            of_layer("key", layer): turned_key.input[0],
            of_layer("value", layer): value,
            of_layer("rotated_query", layer): turned_query.output[0],
            of_layer("rotated_key", layer): turned_key.output[0],
            of_layer("mixed", layer): attends[0].output[0],
        }

    def _made_by(self, name: str, op_type: str, layer: int) -> onnx.NodeProto:
        node: onnx.NodeProto | None = self._producers.get(name)
        if node is None or node.op_type != op_type:
            came = "nothing" if node is None else node.op_type
            raise ParityError(f"layer {layer}: {name} should be made by {op_type}, and {came} makes it")
        return node

    def _before_rows_are_picked(self, name: str) -> str:
        """The stream of all positions, where only the wanted ones are normed; the same where all are."""
        node = self._producers.get(name)
        return node.input[0] if node is not None and node.op_type == "Gather" else name

    def between(self, inputs: Sequence[str], outputs: Sequence[str]) -> onnx.ModelProto:
        """The graph that makes ``outputs`` of ``inputs``, and of whatever else of the whole graph's inputs it needs.

        Args:
            inputs: names of values that are given.
            outputs: names of values that are wanted.

        Returns:
            A model whose initializers still lie where the whole graph's do.
        """
        given = {self.places[name] for name in inputs}
        wanted = [self.places[name] for name in outputs]
        nodes, read = self._needed(given, wanted)
        taken = [
            helper.make_tensor_value_info(name, self._element, None) for name in sorted(given & read - self._inputs.keys())
        ]
        taken += [one for name, one in self._inputs.items() if name in read]
        made = [helper.make_tensor_value_info(name, self._element_of(name), None) for name in wanted]
        kept = [one for name, one in self._initializers.items() if name in read]
        graph = helper.make_graph(nodes, "part", taken, made, kept)
        return helper.make_model(graph, opset_imports=list(self._model.opset_import), ir_version=self._model.ir_version)

    def _needed(self, given: set[str], wanted: Sequence[str]) -> tuple[list[onnx.NodeProto], set[str]]:
        """The nodes on the way, in the graph's order, and the names that they read."""
        chosen: set[int] = set()
        read: set[str] = set()
        open_names = list(wanted)
        while open_names:
            node = self._producers.get(open_names.pop())
            if node is None or id(node) in chosen:
                continue
            chosen.add(id(node))
            read.update(node.input)
            open_names += [name for name in node.input if name not in given]
        return [node for node in self._model.graph.node if id(node) in chosen], read

    def _element_of(self, name: str) -> int:
        return TensorProto.FLOAT if name == self.places[LOGITS] else self._element


def _found(norms: Mapping[str, onnx.NodeProto], weight: str, what: str) -> onnx.NodeProto:
    if weight not in norms:
        raise ParityError(f"{what} is not in the graph: no RMSNormalization reads {weight}")
    return norms[weight]
