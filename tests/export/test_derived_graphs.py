"""Every derived graph means the same as the canonical one: the whole ladder, in onnxruntime, before any engine is built."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import onnx
import pytest

from motrt.benchmarks.doctored import exchange_places
from motrt.errors import ExportError
from motrt.export.onnx_check import census_problems, check_onnx, weight_problems
from motrt.export.onnx_from_module import attach_weights, write_derived, write_onnx
from motrt.export.parity.derived import derived_contract_findings, use_finding
from motrt.export.parity.findings import Finding, Outcome, Report
from motrt.export.parity.gate import Extras, Subject, climb
from motrt.export.steps import Steps
from motrt.model_def.checkpoint.native import open_checkpoint
from motrt.model_def.config import ModelConfig
from motrt.model_def.graph import CANONICAL, Graph, Operators, Target, plan_for
from motrt.model_def.parameters import parameters
from motrt.model_def.signature import CACHE_POSITION
from motrt.tests.conftest import Trace
from motrt.tests.export.models import ONE, THREE, TIED, TINY

MakeCheckpoint = Callable[[ModelConfig], Path]


class Write(Protocol):
    def __call__(self, config: ModelConfig, target: Target, operators: Operators = "standard") -> Path: ...


@pytest.fixture(scope="session")
def write(make_checkpoint: MakeCheckpoint, trace: Trace, tmp_path_factory: pytest.TempPathFactory) -> Write:
    """A folder with the canonical graph and those of a target, made once for each."""
    made: dict[tuple[str, Target, Operators], Path] = {}

    def make(config: ModelConfig, target: Target, operators: Operators = "standard") -> Path:
        key = (config.to_json(), target, operators)
        if key not in made:
            folder = made[key] = tmp_path_factory.mktemp("graphs")
            model = trace(config, "float32")
            attach_weights(model, config, "float32", open_checkpoint(make_checkpoint(config)).read)
            write_onnx(model, folder)
            for graph in plan_for(target, config, operators):
                write_derived(trace(config, "float32", graph), graph, folder)
        return made[key]

    return make


QK_NORM = TINY.replace(qk_norm=True, num_layers=1)
# Where the number of layers is not what matters, one: each graph is a trace of its own.
MODELS = {
    "tiny": TINY,
    "tied, attention not routed": TIED.replace(num_layers=1),
    "one modality": ONE.replace(num_layers=1),
    "three": THREE.replace(num_layers=1),
}
models = pytest.mark.parametrize("config", MODELS.values(), ids=MODELS)


@models
def test_every_graph_is_valid_and_weights_lie_on_the_disk_once(config: ModelConfig, write: Write) -> None:
    folder = write(config, "tensorrt")
    for graph in (CANONICAL, *plan_for("tensorrt", config)):
        check_onnx(folder / graph.file_name, config, "float32", graph)
        assert (folder / graph.file_name).stat().st_size < 200_000
    files = {file.name for file in folder.iterdir()}
    assert files == {"model.onnx.data", "model.onnx", *(graph.file_name for graph in plan_for("tensorrt", config))}


def test_a_weight_of_another_modality_in_a_step_is_seen(write: Write) -> None:
    step = plan_for("tensorrt", TINY)[0]
    model = onnx.load(write(TINY, "tensorrt") / "prefill.onnx", load_external_data=False)
    problems = weight_problems(model, TINY, "float32", step)
    absent = len(parameters(TINY)) - len(step.parameters(TINY))
    assert len(problems) == absent and all("does not serve" in problem for problem in problems)


def test_a_derived_graph_of_another_model_is_refused(write: Write, trace: Trace, tmp_path: Path) -> None:
    step = plan_for("tensorrt", QK_NORM)[0]
    for file in write(TINY, "tensorrt").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    with pytest.raises(ExportError, match=r"q_norm.text.weight, which model.onnx does not hold"):
        write_derived(trace(QK_NORM, "float32", step), step, tmp_path)


def test_the_check_of_a_step_refuses_the_canonical_graph(write: Write) -> None:
    with pytest.raises(ExportError, match="does not keep the contract"):
        check_onnx(write(TINY, "tensorrt") / "model.onnx", TINY, "float32", Graph("step", "fixed", 0, 0, TINY.max_seq_len))


def climbed(folder: Path, config: ModelConfig, checkpoint: Path, target: Target, operators: Operators = "standard") -> Report:
    subject = Subject(folder / "model.onnx", config, "fp32", {}, plan_for(target, config, operators))
    return climb(subject, open_checkpoint(checkpoint), Steps(), num_threads=1)


@models
def test_every_graph_climbs_the_whole_ladder(config: ModelConfig, write: Write, make_checkpoint: MakeCheckpoint) -> None:
    report = climbed(write(config, "tensorrt"), config, make_checkpoint(config), "tensorrt")
    wrong = [one for one in report.findings if one.outcome not in (Outcome.PASS, Outcome.SKIPPED)]
    assert not wrong
    for graph in plan_for("tensorrt", config):
        rungs = {one.rung for one in report.findings if one.graph == graph.name}
        assert rungs == ({"P1", "P2", "P4", "P5"} if graph.is_step else {"P1", "P2", "P3", "P4", "P5"})


def test_the_graphs_for_onnxruntime_on_a_gpu_climb_it_too(write: Write, tiny_checkpoint: Path) -> None:
    report = climbed(write(TINY, "cuda"), TINY, tiny_checkpoint, "cuda")
    assert not [one for one in report.findings if one.outcome not in (Outcome.PASS, Outcome.SKIPPED)]
    assert {one.graph for one in report.findings} >= {graph.name for graph in plan_for("cuda", TINY)}


@pytest.mark.parametrize("config", [TINY, QK_NORM], ids=["tiny", "norms of queries and keys"])
def test_so_do_graphs_in_onnxruntimes_own_operators(config: ModelConfig, write: Write, make_checkpoint: MakeCheckpoint) -> None:
    folder, graphs = write(config, "cuda", "onnxruntime"), plan_for("cuda", config, "onnxruntime")
    for graph in graphs:
        counts = check_onnx(folder / graph.file_name, config, "float32", graph)
        assert counts["GroupQueryAttention"] == config.num_layers and "TensorScatter" not in counts
    report = climbed(folder, config, make_checkpoint(config), "cuda", "onnxruntime")
    assert not [one for one in report.findings if one.outcome not in (Outcome.PASS, Outcome.SKIPPED)]
    assert {one.graph for one in report.findings} >= {graph.name for graph in graphs}


@pytest.mark.parametrize(
    ("operator", "attribute", "value"),
    [("GroupQueryAttention", "rotary_interleaved", 0), ("SkipSimplifiedLayerNormalization", "epsilon", 0.1)],
)
def test_a_wrong_number_in_one_of_those_is_seen(
    operator: str, attribute: str, value: float, write: Write, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(write(TINY, "cuda", "onnxruntime"), tmp_path / "graphs"))

    def doctor(model: onnx.ModelProto) -> None:
        for node in model.graph.node:
            if node.op_type == operator:
                kept = [one for one in node.attribute if one.name != attribute]
                del node.attribute[:]
                node.attribute.extend([*kept, onnx.helper.make_attribute(attribute, value)])

    assert TINY.rope.style == "interleaved"
    change(folder / "decode.text.onnx", doctor)
    findings = failed(climbed(folder, TINY, tiny_checkpoint, "cuda", "onnxruntime"))
    assert {one.graph for one in findings} == {"decode.text"} and {"P1", "P4"} <= {one.rung for one in findings}


def test_what_can_not_be_taken_apart_is_said(write: Write, tiny_checkpoint: Path) -> None:
    graphs = plan_for("cuda", TINY, "onnxruntime")
    subject = Subject(write(TINY, "cuda", "onnxruntime") / "model.onnx", TINY, "fp32", {}, graphs)
    report = climb(subject, open_checkpoint(tiny_checkpoint), Steps(), 1, Extras(is_dissected=True))
    said = [one for one in report.findings if one.question == "its parts can be asked alone"]
    assert {one.graph for one in said} == {graph.name for graph in graphs}
    assert all(one.outcome is Outcome.SKIPPED and "--operators standard" in one.detail for one in said)


def test_those_operators_are_expected_where_they_were_asked_for_alone(write: Write) -> None:
    step, own = plan_for("cuda", TINY)[0], plan_for("cuda", TINY, "onnxruntime")[0]
    model = onnx.load(write(TINY, "cuda", "onnxruntime") / own.file_name, load_external_data=False)
    assert census_problems(model, TINY, own) == []
    problems = " ".join(census_problems(model, TINY, step))
    assert "is of domain 'com.microsoft'" in problems and "0 x Attention, 2 were expected" in problems


@pytest.fixture
def copied(write: Write, tmp_path: Path) -> Path:
    """The tiny model's graphs, to be changed."""
    return Path(shutil.copytree(write(TINY, "tensorrt"), tmp_path / "graphs"))


def change(file: Path, doctor: Callable[[onnx.ModelProto], None]) -> None:
    model = onnx.load(file, load_external_data=False)
    doctor(model)
    file.write_bytes(model.SerializeToString())


def failed(report: Report) -> list[Finding]:
    return [one for one in report.findings if one.outcome is Outcome.FAIL]


def exchange_inputs(one: str, other: str) -> Callable[[onnx.ModelProto], None]:
    def doctor(model: onnx.ModelProto) -> None:
        exchanged = {one: other, other: one}
        for node in model.graph.node:
            node.input[:] = [exchanged.get(name, name) for name in node.input]

    return doctor


@pytest.mark.parametrize("graph", [graph.name for graph in plan_for("tensorrt", TINY)])
def test_two_weights_exchanged_in_one_graph_fail_that_graph_alone(graph: str, copied: Path, tiny_checkpoint: Path) -> None:
    # Norms are read by every graph, whatever its modality.
    change(copied / f"{graph}.onnx", exchange_inputs("layers.0.attention_norm.weight", "layers.1.ffn_norm.weight"))
    findings = failed(climbed(copied, TINY, tiny_checkpoint, "tensorrt"))
    assert {one.graph for one in findings} == {graph}
    assert "P4" in {one.rung for one in findings}


@pytest.fixture
def cuda_copied(write: Write, tmp_path: Path) -> Path:
    """The tiny model's graphs for onnxruntime on a GPU, to be changed."""
    return Path(shutil.copytree(write(TINY, "cuda"), tmp_path / "graphs"))


def test_the_newest_token_left_out_of_the_number_of_keys_fails(cuda_copied: Path, tiny_checkpoint: Path) -> None:
    step = plan_for("cuda", TINY)[0]

    def doctor(model: onnx.ModelProto) -> None:
        for node in model.graph.node:
            if node.op_type == "Attention":
                node.input[6] = CACHE_POSITION

    change(cuda_copied / step.file_name, doctor)
    findings = failed(climbed(cuda_copied, TINY, tiny_checkpoint, "cuda"))
    assert {one.graph for one in findings} == {step.name} and "P4" in {one.rung for one in findings}


def test_two_weights_exchanged_for_rows_of_several_modalities_fail_that_graph_alone(
    cuda_copied: Path, tiny_checkpoint: Path
) -> None:
    change(
        cuda_copied / "decode.mixed.onnx",
        exchange_inputs("layers.0.feed_forward.text.w1.weight", "layers.0.feed_forward.text.w3.weight"),
    )
    findings = failed(climbed(cuda_copied, TINY, tiny_checkpoint, "cuda"))
    assert {one.graph for one in findings} == {"decode.mixed"}


def test_attention_that_is_told_its_keys_otherwise_is_seen(write: Write) -> None:
    targets: tuple[Target, Target] = ("cuda", "tensorrt")
    for target, other in (targets, targets[::-1]):
        (step, *_), (theirs, *_) = plan_for(target, TINY), plan_for(other, TINY)
        model = onnx.load(write(TINY, target) / step.file_name, load_external_data=False)
        assert census_problems(model, TINY, step) == []
        problems = census_problems(model, TINY, theirs)
        assert len(problems) == TINY.num_layers and all("is told its keys by" in problem for problem in problems)


def test_weights_that_lie_elsewhere_are_seen(copied: Path) -> None:
    step = plan_for("tensorrt", TINY)[0]

    def doctor(model: onnx.ModelProto) -> None:
        places = {one.name: one for one in model.graph.initializer}
        first, second = places["layers.0.attention.wk.text.weight"], places["layers.0.attention.wv.text.weight"]
        exchange_places(first, second)

    change(copied / step.file_name, doctor)
    findings = derived_contract_findings(copied / "model.onnx", step, TINY, "float32")
    assert {one.question for one in findings if one.outcome is Outcome.FAIL} == {
        "its weights are the canonical graph's very bytes"
    }


def test_a_graph_that_nothing_went_through_is_not_proven() -> None:
    assert use_finding(0).outcome is Outcome.FAIL
    assert use_finding(3).outcome is Outcome.PASS
