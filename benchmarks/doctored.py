"""A copy of a bundle that can be changed, and that vouches for itself afterwards as if the exporter had made it so.

Weights are changed in the data file, where they lie, so that every graph of the bundle reads the change. Knows no fault by
name.
"""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import NodeProto, TensorProto, helper, numpy_helper

from motrt.export.stored_weights import data_place
from motrt.runtime.bundle import MODEL_FILE, open_bundle, record_files, write_manifest

Value = NDArray[Any]


class Doctored:
    """One graph of a copied bundle.

    Args:
        bundle: what is copied.
        folder: where the copy goes; it must not be there.
        file: the graph that will be changed.
    """

    def __init__(self, bundle: Path, folder: Path, file: str = MODEL_FILE) -> None:
        shutil.copytree(bundle, folder)
        self.folder, self._file = folder, folder / file
        self._manifest = open_bundle(folder).manifest
        self.config = self._manifest.config
        self.model = onnx.load(self._file, load_external_data=False)

    def vouch(self) -> Path:
        """Write the graph, and a manifest with the hashes of what now lies there. Returns the bundle."""
        ordered = self._in_order()
        del self.model.graph.node[:]
        self.model.graph.node.extend(ordered)
        self._file.write_bytes(self.model.SerializeToString())
        files = record_files(self.folder)
        manifest = self._manifest
        engines = tuple(replace(one, onnx_sha256=files[f"{one.graph}.onnx"].sha256) for one in manifest.engines)
        write_manifest(self.folder, replace(manifest, files=files, engines=engines))
        return self.folder

    # Weights.

    def tensor(self, name: str) -> TensorProto:
        found: TensorProto = next(one for one in self.model.graph.initializer if one.name == name)
        return found

    def names(self, start: str = "") -> list[str]:
        """Of initializers."""
        return [one.name for one in self.model.graph.initializer if one.name.startswith(start)]

    def weight(self, name: str) -> Value:
        """A copy of a stored value; 4-bit codes one to a number."""
        value: Value = numpy_helper.to_array(self.tensor(name), str(self.folder)).copy()
        return value

    def set_weight(self, name: str, value: Value) -> None:
        """Another value of the same shape in the place of the stored one."""
        tensor = self.tensor(name)
        assert tuple(tensor.dims) == value.shape, name
        raw = _raw(value, tensor.data_type)
        if tensor.data_location != TensorProto.EXTERNAL:
            tensor.CopyFrom(helper.make_tensor(name, tensor.data_type, tensor.dims, raw, raw=True))
            return
        file, start, _ = data_place(tensor)
        with (self.folder / file).open("r+b") as stream:
            stream.seek(int(start))
            stream.write(raw)

    def change(self, name: str, change: Callable[[Value], Value]) -> None:
        self.set_weight(name, change(self.weight(name)))

    def exchange(self, one: str, other: str) -> None:
        first, second = self.weight(one), self.weight(other)
        self.set_weight(one, second)
        self.set_weight(other, first)

    # Nodes.

    def nodes(self, op_type: str, start: str = "") -> list[NodeProto]:
        """Nodes of a kind, by the module they came from."""
        return [node for node in self.model.graph.node if node.op_type == op_type and node.name.startswith(start)]

    def node(self, op_type: str, start: str = "", number: int = 0) -> NodeProto:
        return self.nodes(op_type, start)[number]

    def producer(self, value: str) -> NodeProto:
        found: NodeProto = next(node for node in self.model.graph.node if value in node.output)
        return found

    def constant(self, value: Value | float | int | list[int], dtype: str = "int64") -> str:
        """A new initializer; returns its name."""
        name = f"planted.{len(self.model.graph.initializer)}"
        self.model.graph.initializer.append(numpy_helper.from_array(np.array(value, dtype), name))
        return name

    def make(self, op_type: str, *inputs: str, **attributes: Any) -> str:
        """A new node that nothing reads yet; returns what it makes."""
        made = f"planted.{len(self.model.graph.node)}"
        self.model.graph.node.append(helper.make_node(op_type, list(inputs), [made], f"planted/{made}", **attributes))
        return made

    def behind(self, value: str, made: Callable[[str], str]) -> None:
        """Whatever read ``value`` reads what ``made`` makes of it, graph outputs too."""
        readers = [node for node in self.model.graph.node if value in node.input]
        taken, is_output = value, value in [one.name for one in self.model.graph.output]
        if is_output:
            taken, producer = f"{value}.raw", self.producer(value)
            producer.output[:] = [taken if one == value else one for one in producer.output]
        result = made(taken)
        if is_output:
            self.producer(result).output[:] = [value]
            return
        for node in readers:
            node.input[:] = [result if one == value else one for one in node.input]

    def read_instead(self, node: NodeProto, place: int, made: Callable[[str], str]) -> None:
        """One input of one node is what ``made`` makes of it."""
        node.input[place] = made(node.input[place])

    def through(self, kind: int) -> Callable[[str], str]:
        """For ``behind``: to another type and back again."""
        own = TensorProto.FLOAT if self._manifest.precision == "fp32" else TensorProto.FLOAT16
        return lambda value: self.make("Cast", self.make("Cast", value, to=kind), to=own)

    def _in_order(self) -> list[NodeProto]:
        """Every node behind what it reads, and otherwise as they stand."""
        left, waited = list(self.model.graph.node), {name for node in self.model.graph.node for name in node.output}
        found: list[NodeProto] = []
        while left:
            at = next((at for at, node in enumerate(left) if waited.isdisjoint(node.input)), None)
            assert at is not None, "the planted nodes read each other in a circle"
            waited.difference_update(left[at].output)
            found.append(left.pop(at))
        return found


def _raw(value: Value, data_type: int) -> bytes:
    """As the data file holds it."""
    if data_type in (TensorProto.INT4, TensorProto.UINT4):
        flat = value.astype(np.int8).flatten().view(np.uint8)
        flat = np.append(flat, np.zeros(len(flat) % 2, np.uint8))
        return ((flat[0::2] & 15) | (flat[1::2] << 4)).tobytes()
    return np.ascontiguousarray(value.astype(helper.tensor_dtype_to_np_dtype(data_type))).tobytes()


def exchange_places(one: TensorProto, other: TensorProto) -> None:
    """Two external tensors are read from each other's place in the data file."""
    kept = [(entry.key, entry.value) for entry in one.external_data]
    del one.external_data[:]
    one.external_data.extend(other.external_data)
    del other.external_data[:]
    for key, value in kept:
        other.external_data.add(key=key, value=value)
