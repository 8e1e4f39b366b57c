"""Each check of a written graph fails with its own error, and all weights reach the file whatever their values."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper

from motrt.errors import ExportError
from motrt.export.onnx_check import check_onnx
from motrt.export.onnx_from_module import attach_weights, write_onnx
from motrt.model_def.config import ModelConfig
from motrt.model_def.initialize import random_tensors
from motrt.model_def.parameters import parameters
from motrt.tests.conftest import Trace
from motrt.tests.export.models import ONE, THREE, TIED, TINY, load_whole, nodes, save_whole

Doctor = Callable[[onnx.ModelProto], None]


def rename(model: onnx.ModelProto, old: str, new: str) -> None:
    for one in (*model.graph.input, *model.graph.output, *model.graph.initializer):
        one.name = new if one.name == old else one.name
    for node in model.graph.node:
        node.input[:] = [new if name == old else name for name in node.input]
        node.output[:] = [new if name == old else name for name in node.output]


def specialise(model: onnx.ModelProto) -> None:
    model.graph.input[0].type.tensor_type.shape.dim[1].dim_value = 5


def other_dtype(model: onnx.ModelProto) -> None:
    next(one for one in model.graph.initializer if one.name == "norm.weight").data_type = TensorProto.INT32


def unread(model: onnx.ModelProto) -> None:
    for node in model.graph.node:
        node.input[:] = ["layers.0.ffn_norm.weight" if name == "norm.weight" else name for name in node.input]


def foreign_operator(model: onnx.ModelProto) -> None:
    model.opset_import.append(helper.make_opsetid("com.example", 1))
    node = nodes(model, "Sigmoid")[0]
    node.domain, node.op_type = "com.example", "Sigmoid"


def branch(model: onnx.ModelProto) -> None:
    """An If that does nothing, around the head's mask."""
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.array(True), "always"))
    parts = [
        helper.make_graph(
            [helper.make_node("Identity", ["head_mask"], [f"{name}_out"])],
            name,
            [],
            [helper.make_tensor_value_info(f"{name}_out", TensorProto.INT64, ["n"])],
        )
        for name in ("yes", "no")
    ]
    for node in model.graph.node:
        node.input[:] = ["chosen" if name == "head_mask" else name for name in node.input]
    model.graph.node.insert(0, helper.make_node("If", ["always"], ["chosen"], then_branch=parts[0], else_branch=parts[1]))


def lose_an_operator(model: onnx.ModelProto) -> None:
    """Layer 0's queries are not rotated."""
    node = nodes(model, "RotaryEmbedding")[0]
    model.graph.node.remove(node)
    for other in model.graph.node:
        other.input[:] = [node.input[0] if name == node.output[0] else name for name in other.input]


def break_it(model: onnx.ModelProto) -> None:
    model.graph.node[0].op_type = "NoSuchOperator"


def set_attribute(model: onnx.ModelProto, operator: str, name: str, value: float | int | str) -> None:
    node = nodes(model, operator)[-1]
    kept = [one for one in node.attribute if one.name != name]
    del node.attribute[:]
    node.attribute.extend([*kept, helper.make_attribute(name, value)])


DOCTORED: dict[str, tuple[Doctor, str]] = {
    "another epsilon": (
        lambda model: set_attribute(model, "RMSNormalization", "epsilon", 1e-6),
        "other numbers.*\n.*epsilon .* 1e-05 was expected",
    ),
    "another scale": (lambda model: set_attribute(model, "Attention", "scale", 0.5), "Attention .* has scale 0.5"),
    "another rotation": (
        lambda model: set_attribute(model, "RotaryEmbedding", "interleaved", 0),
        "RotaryEmbedding .* has interleaved 0, 1 was expected",
    ),
    "approximate GELU": (lambda model: set_attribute(model, "Gelu", "approximate", "tanh"), "Gelu .* has approximate b'tanh'"),
    "no operator of that name": (break_it, "is no valid ONNX"),
    "input renamed": (lambda model: rename(model, "input_ids", "tokens"), "contract:\n  - input 'input_ids' is missing"),
    "output renamed": (lambda model: rename(model, "present_key.1", "k1"), "contract:\n  - output 'present_key.1' is missing"),
    "dim specialised": (specialise, r"input input_ids: int64\[b, 5\] should be input_ids: int64\[b, s\]"),
    "weight under another name": (
        lambda model: rename(model, "norm.weight", "w"),
        "not in the graph:\n  - norm.weight is missing",
    ),
    "weight unread": (unread, "norm.weight is stored and nothing reads it"),
    "foreign operator": (foreign_operator, "other operators.*\n.*'com.example', not a standard operator"),
    "branch": (branch, "other operators.*\n.*If"),
    "operator missing": (lose_an_operator, "3 x RotaryEmbedding, 4 were expected"),
}


@pytest.mark.parametrize("name", DOCTORED)
def test_a_doctored_graph_is_refused_and_the_reason_said(name: str, tiny_bundle: Path, tmp_path: Path) -> None:
    doctor, reason = DOCTORED[name]
    model = load_whole(tiny_bundle)
    doctor(model)
    with pytest.raises(ExportError, match=reason):
        check_onnx(save_whole(model, tmp_path), TINY, "float32")


def test_two_data_files_are_refused(tiny_bundle: Path, tmp_path: Path) -> None:
    onnx.save(load_whole(tiny_bundle), tmp_path / "model.onnx", save_as_external_data=True, all_tensors_to_one_file=False)
    with pytest.raises(ExportError, match="external data are not one file"):
        check_onnx(tmp_path / "model.onnx", TINY, "float32")


def test_a_data_file_of_another_name_is_refused(tiny_bundle: Path, tmp_path: Path) -> None:
    onnx.save(load_whole(tiny_bundle), tmp_path / "model.onnx", save_as_external_data=True, location="other.data")
    with pytest.raises(
        ExportError, match=r"not one file beside the model:\n  - model.onnx.data was expected, found: other.data"
    ):
        check_onnx(tmp_path / "model.onnx", TINY, "float32")


def test_a_graph_that_no_bundle_may_hold_is_refused_before_there_is_one(tiny_bundle: Path, tmp_path: Path) -> None:
    model = load_whole(tiny_bundle)
    opsets = [helper.make_opsetid("", 24)]
    model.functions.append(
        helper.make_function("own", "same", ["x"], ["y"], [helper.make_node("Identity", ["x"], ["y"])], opsets)
    )
    with pytest.raises(ExportError, match=r"no bundle of this graph would be opened:\n  - model.onnx: it holds functions"):
        check_onnx(save_whole(model, tmp_path), TINY, "float32")


def test_a_graph_of_another_precision_or_configuration_is_refused(tiny_bundle: Path) -> None:
    with pytest.raises(ExportError, match="float16"):
        check_onnx(tiny_bundle / "model.onnx", TINY, "float16")
    with pytest.raises(ExportError, match=r"past_key\.2"):
        check_onnx(tiny_bundle / "model.onnx", TINY.replace(num_layers=3), "float32")


def test_all_problems_of_a_question_are_named_at_once(tiny_bundle: Path, tmp_path: Path) -> None:
    model = load_whole(tiny_bundle)
    lost = ["layers.0.ffn_norm.weight", "output.audio.weight", "layers.1.feed_forward.audio.fc2.bias"]
    for name in lost:
        rename(model, name, f"another.{name}")
    with pytest.raises(ExportError) as caught:
        check_onnx(save_whole(model, tmp_path), TINY, "float32")
    assert all(f"{name} is missing" in str(caught.value) for name in lost)


def degenerate(name: str, shape: tuple[int, ...]) -> torch.Tensor:
    """What a pass that looks at values would fold or merge: equal norms, biases of zeros, equal matrices."""
    return torch.zeros(shape) if name.endswith(".bias") else torch.ones(shape)


@pytest.mark.parametrize("config", [TINY, TIED, ONE, THREE], ids=["tiny", "tied", "one", "three"])
def test_no_weight_vanishes_whatever_its_value(config: ModelConfig, trace: Trace, tmp_path: Path) -> None:
    shapes = {one.name: one.shape for one in parameters(config)}
    model = trace(config, "float32")
    attach_weights(model, config, "float32", lambda name: degenerate(name, shapes[name]))
    write_onnx(model, tmp_path)
    check_onnx(tmp_path / "model.onnx", config, "float32")
    stored = {one.name: onnx.numpy_helper.to_array(one) for one in onnx.load(tmp_path / "model.onnx").graph.initializer}
    for name, shape in shapes.items():
        assert np.array_equal(stored[name], degenerate(name, shape).numpy())


def test_the_same_trace_filled_twice_gives_each_its_own_weights(trace: Trace, tmp_path: Path) -> None:
    model = trace(TINY, "float32")
    for seed in (1, 2):
        weights = dict(random_tensors(TINY, seed))
        attach_weights(model, TINY, "float32", weights.__getitem__)
        folder = tmp_path / str(seed)
        folder.mkdir()
        write_onnx(model, folder)
        stored = {one.name: onnx.numpy_helper.to_array(one) for one in onnx.load(folder / "model.onnx").graph.initializer}
        assert all(np.array_equal(stored[name], value.numpy()) for name, value in weights.items())


def test_a_weight_that_does_not_fit_the_precision_is_named(trace: Trace, tmp_path: Path) -> None:
    weights = dict(random_tensors(TINY, 0))
    weights["layers.1.attention.wk.audio.weight"][3, 4] = 70000.0
    model = trace(TINY, "float16")
    attach_weights(model, TINY, "float16", weights.__getitem__)
    with pytest.raises(ExportError, match=r"layers\.1\.attention\.wk\.audio\.weight does not fit float16.*7e\+04.*bf16"):
        write_onnx(model, tmp_path)
