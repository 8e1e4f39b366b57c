"""One graph with some of its weights replaced, for the laws that are seen by replacing them. Files stay as they are.

Plain float32 weights are given to onnxruntime beside the file. Of others it makes something else while it loads the graph, one
operator of codes, scales and product, or float32 of half precision, and looks at what is stored in the graph alone: what is
given beside it would be passed over without a word. So there the graph itself is changed, in memory.
"""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto

from motrt.export.stored_weights import read_graph, stored_bytes
from motrt.model_def.config import ModelConfig
from motrt.model_def.graph import CANONICAL, Graph
from motrt.model_def.parameters import Parameter, parameters
from motrt.model_def.quantization import Quantization, codes_of, scales_of, zero_points_of
from motrt.runtime.onnx_session import OnnxSession

Weight = np.ndarray[Any, Any]
Open = Callable[..., OnnxSession]


class OnnxReplacement:
    """What the laws need of a graph.

    Args:
        model_file: the canonical graph, its external data beside it.
        config: what it computes.
        dtype: of plain weights.
        open_graphs: opens the graphs, with ``overrides`` or ``replaced`` (see ``OnnxSession``).
        quantization: of its weights.
        graphs: the graphs that are opened.
    """

    def __init__(
        self,
        model_file: Path,
        config: ModelConfig,
        dtype: str,
        open_graphs: Open,
        quantization: Quantization | None = None,
        graphs: Sequence[Graph] = (CANONICAL,),
    ) -> None:
        self._file, self._config, self._dtype, self._open = model_file, config, np.dtype(dtype), open_graphs
        self._quantization, self._graphs = quantization, graphs

    def with_poison(self, poisoned: Iterable[Parameter]) -> OnnxSession:
        """The graph with NaN for every one of ``poisoned``: of coded weights, for their scales."""
        if self._quantization is not None:
            names = {scales_of(self._holder[one.name]) if one.name in self._holder else one.name for one in poisoned}
            return self._with_tensors({name: _nothing(self._stored[name]) for name in names})
        whole = list(poisoned)
        if not self._can_override:
            return self._with_nothing({one.name for one in whole})
        # All views of one buffer: poison costs one weight's memory, not all.
        nothing = np.full(max(one.numel for one in whole), np.nan, self._dtype)
        return self._open(overrides={one.name: nothing[: one.numel].reshape(one.shape) for one in whole})

    def can_exchange(self, pairs: Mapping[str, str]) -> bool:
        """Whether every weight is stored as its counterpart is: else one can not stand in the other's place."""
        return all(self._forms(name) == self._forms(other) for name, other in pairs.items())

    def _forms(self, name: str) -> list[tuple[int, tuple[int, ...]] | None]:
        found = [self._stored.get(part(self._holder.get(name, name))) for part in (str, codes_of, scales_of, zero_points_of)]
        return [None if one is None else (one.data_type, tuple(one.dims)) for one in found]

    def with_exchanged(self, pairs: Mapping[str, str]) -> OnnxSession:
        """The graph with the value of ``pairs[name]`` for every ``name``."""
        if self._can_override:
            return self._open(overrides={name: self._value(other) for name, other in pairs.items()})
        tensors = {}
        for name, other in pairs.items():
            mine, others = (self._holder.get(one, one) for one in (name, other))
            for part in (str, codes_of, scales_of, zero_points_of):
                if part(mine) in self._stored:
                    tensors[part(mine)] = self._stored[part(others)]
        return self._with_tensors(tensors)

    @property
    def _can_override(self) -> bool:
        return self._quantization is None and self._dtype == np.float32

    @cached_property
    def _stored(self) -> dict[str, TensorProto]:
        return {one.name: one for one in read_graph(self._file).graph.initializer}

    @cached_property
    def _holder(self) -> dict[str, str]:
        """Each coded weight with the name that its codes are stored under."""
        coded = () if self._quantization is None else self._quantization.coded_weights(parameters(self._config))
        return {part.name: one.name for one in coded for part in one.parts}

    def _value(self, name: str) -> Weight:
        tensor = self._stored[name]
        flat: Weight = stored_bytes(tensor, self._file.parent).view(self._dtype)
        shaped: Weight = flat.reshape(tuple(tensor.dims)).copy()
        return shaped

    def _with_tensors(self, tensors: Mapping[str, TensorProto]) -> OnnxSession:
        def replace(model: onnx.ModelProto) -> None:
            for one in model.graph.initializer:
                if one.name in tensors:
                    name = one.name
                    one.CopyFrom(tensors[name])
                    one.name = name

        return self._with_changed(replace)

    def _with_nothing(self, names: Collection[str]) -> OnnxSession:
        """NaN for every initializer of ``names``, made by the graph: written out, a file of two gigabytes could not hold it."""

        def replace(model: onnx.ModelProto) -> None:
            kept = [one for one in model.graph.initializer if one.name not in names]
            gone = [one for one in model.graph.initializer if one.name in names]
            del model.graph.initializer[:]
            model.graph.initializer.extend(kept)
            for one in reversed(gone):
                shape = onnx.numpy_helper.from_array(np.array(one.dims, np.int64), f"{one.name}.shape")
                dtype = onnx.helper.tensor_dtype_to_np_dtype(one.data_type)
                value = onnx.numpy_helper.from_array(np.full(1, np.nan, dtype))
                model.graph.initializer.append(shape)
                model.graph.node.insert(0, onnx.helper.make_node("ConstantOfShape", [shape.name], [one.name], value=value))

        return self._with_changed(replace)

    def _with_changed(self, change: Callable[[onnx.ModelProto], None]) -> OnnxSession:
        replaced = {}
        for graph in self._graphs:
            model = read_graph(self._file.parent / graph.file_name)
            change(model)
            replaced[graph] = model.SerializeToString()
        return self._open(replaced=replaced)


def _nothing(tensor: TensorProto) -> TensorProto:
    dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)
    return onnx.numpy_helper.from_array(np.full(tuple(tensor.dims), np.nan, dtype), tensor.name)
