"""What a graph would read and run is told from its bytes, and what no export writes is refused before anything runs it."""

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from motrt.errors import BundleError
from motrt.export import onnxruntime_operators
from motrt.export.verification import verify_bundle
from motrt.runtime import graph_file
from motrt.runtime.bundle import WEIGHTS_FILE, open_bundle
from motrt.runtime.graph_file import graph_problems
from motrt.runtime.load import load
from motrt.tests.runtime.test_load import claim

Change = Callable[[onnx.ModelProto], object]


def elsewhere(location: str = "other.data", name: str = "planted") -> TensorProto:
    """A tensor of one number that lies in another file."""
    tensor = TensorProto(name=name, data_type=TensorProto.FLOAT, dims=[1], data_location=TensorProto.EXTERNAL)
    tensor.external_data.add(key="location", value=location)
    return tensor


def sparse(values: TensorProto, indices: TensorProto) -> onnx.SparseTensorProto:
    return onnx.SparseTensorProto(values=values, indices=indices, dims=[4])


def body(name: str) -> onnx.GraphProto:
    flag = helper.make_tensor_value_info(f"{name}_in", TensorProto.BOOL, [])
    count = helper.make_tensor_value_info(f"{name}_count", TensorProto.INT64, [])
    out = helper.make_tensor_value_info(f"{name}_out", TensorProto.BOOL, [])
    return helper.make_graph([helper.make_node("Identity", [f"{name}_in"], [f"{name}_out"])], name, [count, flag], [out])


def put(model: onnx.ModelProto, node: onnx.NodeProto, constant: bool = True) -> None:
    model.graph.node.insert(0, node)
    if constant:
        model.graph.initializer.append(numpy_helper.from_array(np.array(True), "always"))


def put_constant(model: onnx.ModelProto, **attribute: Any) -> None:
    put(model, helper.make_node("Constant", [], ["planted"], **attribute), constant=False)


def endless(model: onnx.ModelProto) -> None:
    put(model, helper.make_node("Loop", ["", "always"], [], body=body("forever")))


def called(model: onnx.ModelProto) -> None:
    """The same loop, in a function."""
    loop = helper.make_node("Loop", ["", "always"], [], body=body("forever"))
    opsets = [helper.make_opsetid("", 24)]
    model.functions.append(helper.make_function("own", "spin", ["always"], [], [loop], opsets))
    model.opset_import.append(helper.make_opsetid("own", 1))
    put(model, helper.make_node("spin", ["always"], [], domain="own"))


def trained(model: onnx.ModelProto) -> None:
    model.training_info.add().initialization.initializer.append(elsewhere())


READS_ELSEWHERE: dict[str, Change] = {
    "an unnamed neighbour": lambda model: model.graph.initializer.append(elsewhere()),
    "a folder": lambda model: model.graph.initializer.append(elsewhere(f"sub/{WEIGHTS_FILE}")),
    "upwards": lambda model: model.graph.initializer.append(elsewhere(f"../{WEIGHTS_FILE}")),
    "down and up": lambda model: model.graph.initializer.append(elsewhere(f"sub/../{WEIGHTS_FILE}")),
    "absolute": lambda model: model.graph.initializer.append(elsewhere("/etc/passwd")),
    "another case": lambda model: model.graph.initializer.append(elsewhere(WEIGHTS_FILE.upper())),
    "the manifest": lambda model: model.graph.initializer.append(elsewhere("manifest.json")),
    "memory": lambda model: model.graph.initializer.append(elsewhere("*/_ORT_MEM_ADDR_/*")),
    "nowhere": lambda model: model.graph.initializer.append(elsewhere("")),
    "sparse values": lambda model: model.graph.sparse_initializer.append(sparse(elsewhere(), TensorProto())),
    "sparse indices": lambda model: model.graph.sparse_initializer.append(sparse(TensorProto(), elsewhere())),
    "an attribute": lambda model: put_constant(model, value=elsewhere()),
    "a sparse attribute": lambda model: put_constant(model, sparse_value=sparse(elsewhere(), elsewhere())),
    "several in an attribute": lambda model: put_constant(model, values=[elsewhere()]),
    "training": trained,
}

RUNS_OTHERWISE: dict[str, tuple[Change, str]] = {
    "an endless loop": (endless, "Loop holds a graph of its own"),
    "a loop in a function": (called, "it holds functions"),
    "a scan": (
        lambda model: put(model, helper.make_node("Scan", ["always"], [], body=body("scan"), num_scan_inputs=1)),
        "Scan holds a graph of its own",
    ),
    "a branch": (
        lambda model: put(model, helper.make_node("If", ["always"], [], then_branch=body("a"), else_branch=body("b"))),
        "If holds a graph of its own",
    ),
    "a sequence's map": (
        lambda model: put(model, helper.make_node("SequenceMap", ["always"], ["mapped"], body=body("map"))),
        "SequenceMap holds a graph of its own",
    ),
    "graphs in a list": (
        lambda model: put(model, helper.make_node("Identity", ["always"], ["same"], bodies=[body("a"), body("b")])),
        "Identity holds a graph of its own",
    ),
    "onnxruntime's search": (
        lambda model: put(model, helper.make_node("BeamSearch", ["always"], ["found"], domain="com.microsoft")),
        "BeamSearch is of domain 'com.microsoft'",
    ),
    "a compiled file": (
        lambda model: put(model, helper.make_node("EPContext", ["always"], ["done"], domain="com.microsoft")),
        "EPContext is of domain 'com.microsoft'",
    ),
    "a plugin": (lambda model: put(model, helper.make_node("Op", ["always"], ["done"], domain="a.b")), "Op is of domain 'a.b'"),
}


def changed(folder: Path, change: Change, file: str = "model.onnx") -> Path:
    """Change a bundle's graph and let the manifest vouch for it."""
    model = onnx.load(folder / file, load_external_data=False)
    change(model)
    (folder / file).write_bytes(model.SerializeToString())
    claim(folder)
    return folder


@pytest.mark.parametrize("way", READS_ELSEWHERE)
def test_values_in_files_that_no_hash_covers_are_refused_whatever_holds_them(way: str, bundle_copy: Path) -> None:
    (bundle_copy / "other.data").write_bytes(bytes(4))
    changed(bundle_copy, READS_ELSEWHERE[way])
    for check in ("size", "hash"):
        with pytest.raises(BundleError, match=r"holds what no export writes(?s:.*)(values lie in|training information)"):
            open_bundle(bundle_copy, check)


def test_values_in_a_file_that_the_manifest_names_too_are_refused_where_it_is_not_the_data_file(bundle_copy: Path) -> None:
    (bundle_copy / "other.data").write_bytes(bytes(4))
    changed(bundle_copy, READS_ELSEWHERE["an unnamed neighbour"])
    assert "other.data" in (bundle_copy / "manifest.json").read_text(encoding="utf-8")
    with pytest.raises(BundleError, match=r"values lie in 'other.data'"):
        load(bundle_copy, check="hash")


@pytest.mark.parametrize("way", RUNS_OTHERWISE)
def test_what_may_never_end_or_is_no_operator_of_an_export_is_refused_before_it_runs(way: str, bundle_copy: Path) -> None:
    change, said = RUNS_OTHERWISE[way]
    changed(bundle_copy, change)
    for opens in (load, verify_bundle):
        with pytest.raises(BundleError, match=said):
            opens(bundle_copy)


def test_the_same_file_written_again_is_opened(bundle_copy: Path) -> None:
    changed(bundle_copy, lambda model: model.graph.node[0].metadata_props.add(key="a", value="b"))
    assert open_bundle(bundle_copy, "hash").num_bytes == sum(
        (bundle_copy / one).stat().st_size for one in ("model.onnx", WEIGHTS_FILE)
    )


@pytest.mark.parametrize(
    "content", [b"", b"noise" * 100, b"\x08\x0a", b"ORTM" * 9, b"{}", b"\x3a\x00", b"\x80" * 50, b"\x0b\x0c"]
)
def test_what_is_no_graph_is_a_sentence_for_all_who_open_it(content: bytes, bundle_copy: Path) -> None:
    (bundle_copy / "model.onnx").write_bytes(content)
    claim(bundle_copy)
    for opens in (open_bundle, load, verify_bundle):
        with pytest.raises(BundleError, match=r"model.onnx is no ONNX file, or a part of one \("):
            opens(bundle_copy)


def test_a_part_of_a_graph_is_refused_wherever_it_was_cut(tiny_bundle: Path, tmp_path: Path) -> None:
    whole, file = (tiny_bundle / "model.onnx").read_bytes(), tmp_path / "model.onnx"
    node = whole.index(b"input_ids")
    for length in (1, 2, node, *random.Random(0).sample(range(len(whole) - 200), 50)):
        file.write_bytes(whole[:length])
        assert graph_problems(file, WEIGHTS_FILE), length
    file.write_bytes(whole)
    assert not graph_problems(file, WEIGHTS_FILE)


def test_a_field_that_decoders_read_differently_is_refused(tiny_bundle: Path, tmp_path: Path) -> None:
    """Its number needs more than 32 bits; who cuts it off reads a second graph, with a loop in it."""
    model = onnx.load(tiny_bundle / "model.onnx", load_external_data=False)
    endless(model)
    hidden = model.graph.SerializeToString()
    tag = bytes([0x80 | (7 << 3 | 2), 0x80, 0x80, 0x80, 0x10])
    file = tmp_path / "model.onnx"
    size = bytes([len(hidden) & 127 | 128, len(hidden) >> 7 & 127 | 128, len(hidden) >> 14])
    file.write_bytes((tiny_bundle / "model.onnx").read_bytes() + tag + size + hidden)
    assert graph_problems(file, WEIGHTS_FILE)


def test_graphs_that_a_decoder_joins_are_all_looked_at(tiny_bundle: Path, tmp_path: Path) -> None:
    other = onnx.ModelProto()
    other.graph.initializer.append(elsewhere())
    file = tmp_path / "model.onnx"
    file.write_bytes((tiny_bundle / "model.onnx").read_bytes() + other.SerializeToString())
    assert onnx.load(file, load_external_data=False).graph.initializer[-1].name == "planted"
    assert any("other.data" in problem for problem in graph_problems(file, WEIGHTS_FILE))


def test_many_problems_are_told_once_each_and_not_all(bundle_copy: Path) -> None:
    def change(model: onnx.ModelProto) -> None:
        model.graph.initializer.extend(elsewhere(f"{number // 2}.data") for number in range(100))

    changed(bundle_copy, change)
    told = graph_problems(bundle_copy / "model.onnx", WEIGHTS_FILE)
    assert len(told) == len(set(told)) == 10


def test_the_two_operators_of_onnxruntimes_own_are_the_exporters() -> None:
    assert onnxruntime_operators.DOMAIN == graph_file.OWN_DOMAIN
    assert (onnxruntime_operators.ATTENTION, onnxruntime_operators.NORM) == (graph_file.OWN_ATTENTION, graph_file.OWN_NORM)


def test_derived_graphs_are_looked_at_too(tmp_path: Path, tiny_checkpoint: Path) -> None:
    from motrt.export.bundle_from_checkpoint import export_bundle

    bundle = export_bundle(tiny_checkpoint, tmp_path / "b", target="cuda", operators="onnxruntime", verify=False).bundle
    step = bundle.manifest.graphs[0].file_name
    changed(bundle.path, READS_ELSEWHERE["an unnamed neighbour"], step)
    with pytest.raises(BundleError, match=f"{step}: values lie in 'other.data'"):
        open_bundle(bundle.path)
