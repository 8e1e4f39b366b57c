"""A graph that is no valid one is a sentence to all who look at it, whatever its hash: never a traceback, never a PASS."""

import contextlib
import shutil
from collections.abc import Callable
from pathlib import Path

import onnx
import pytest
from onnx import TensorProto

from motrt.errors import BackendError, BundleError, ExportError, MotrtError
from motrt.export.inspection import inspect
from motrt.export.onnx_check import check_onnx
from motrt.export.verification import verify_bundle
from motrt.model_def.config import ModelConfig
from motrt.runtime.load import load
from motrt.tests.runtime.test_load import claim

Change = Callable[[onnx.ModelProto], object]


def tensor(model: onnx.ModelProto, name: str = "norm.weight") -> TensorProto:
    found: TensorProto = next(one for one in model.graph.initializer if one.name == name)
    return found


def node(model: onnx.ModelProto, kind: str) -> onnx.NodeProto:
    found: onnx.NodeProto = next(one for one in model.graph.node if one.op_type == kind)
    return found


def entry(model: onnx.ModelProto, key: str) -> onnx.StringStringEntryProto:
    found = next(one for one in tensor(model, "tok_embeddings.weight").external_data if one.key == key)
    assert isinstance(found, onnx.StringStringEntryProto)
    return found


def inline(model: onnx.ModelProto) -> None:
    one = tensor(model, "tok_embeddings.weight")
    one.ClearField("external_data")
    one.data_location, one.raw_data = TensorProto.DEFAULT, b"xx"


# What is done to the graph, and whether the description of a bundle must refuse it too.
MALFORMED: dict[str, tuple[Change, bool]] = {
    "a type that is none": (lambda model: setattr(tensor(model), "data_type", 99), True),
    "a type of no weight": (lambda model: setattr(tensor(model), "data_type", TensorProto.BOOL), True),
    "no type": (lambda model: setattr(tensor(model), "data_type", 0), True),
    "dims below zero": (lambda model: tensor(model).dims.__setitem__(0, -1), True),
    "dims beyond all files": (lambda model: tensor(model).dims.__setitem__(0, 2**62), True),
    "a dim too many": (lambda model: tensor(model).dims.append(2), True),
    "no dims": (lambda model: tensor(model).ClearField("dims"), True),
    "values that are too few": (inline, True),
    "a place that is no number": (lambda model: setattr(entry(model, "offset"), "value", "x"), True),
    "a place below zero": (lambda model: setattr(entry(model, "offset"), "value", "-1"), True),
    "a place beyond the file": (lambda model: setattr(entry(model, "offset"), "value", "9" * 20), True),
    "a product of nothing": (lambda model: node(model, "Gemm").ClearField("input"), True),
    "an operator that is none": (lambda model: setattr(node(model, "Gemm"), "op_type", "Gemmm"), False),
    "an operator of others' inputs": (lambda model: setattr(node(model, "Gemm"), "op_type", "DequantizeLinear"), False),
    "no outputs": (lambda model: node(model, "Gemm").ClearField("output"), False),
    "a circle": (lambda model: node(model, "Gemm").input.__setitem__(0, node(model, "Gemm").output[0]), False),
    "no inputs": (lambda model: model.graph.ClearField("input"), False),
    "an input without a type": (lambda model: model.graph.input[0].ClearField("type"), False),
}


@pytest.mark.parametrize("fault", MALFORMED)
def test_a_malformed_graph_is_a_sentence(fault: str, tiny_bundle: Path, tiny_checkpoint: Path, tmp_path: Path) -> None:
    change, is_no_model = MALFORMED[fault]
    bundle = Path(shutil.copytree(tiny_bundle, tmp_path / "b"))
    model = onnx.load(bundle / "model.onnx", load_external_data=False)
    change(model)
    (bundle / "model.onnx").write_bytes(model.SerializeToString())
    claim(bundle)
    for opens in (load, verify_bundle):
        with pytest.raises((BackendError, BundleError), match=r"model.onnx"):
            opens(bundle)
    with contextlib.suppress(ExportError):  # where values lie in their file is not asked: nothing is read
        check_onnx(bundle / "model.onnx", ModelConfig.tiny(), "float32")
    if is_no_model:
        with pytest.raises(BundleError):
            inspect(bundle)
    for path in (bundle, bundle / "model.onnx"):
        with contextlib.suppress(MotrtError):
            inspect(path)


def test_names_that_are_no_letters_are_a_sentence(tiny_bundle: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    bundle = Path(shutil.copytree(tiny_bundle, tmp_path / "b"))
    data = (bundle / "model.onnx").read_bytes()
    (bundle / "model.onnx").write_bytes(data.replace(b"input_ids", b"\xff\xfeput_ids"))
    claim(bundle)
    for opens in (load, verify_bundle):
        with pytest.raises((BackendError, BundleError), match=r"model.onnx"):
            opens(bundle)
    assert capfd.readouterr().out == ""
    (bundle / "model.onnx").write_bytes(data.replace(b"model.onnx.data", b"\xffodel.onnx.data"))
    inspect(bundle / "model.onnx")
