"""Bundles of codes and scales: what is in them, that they are the model, and that the gate sees what is wrong with one."""

import shutil
import weakref
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch

import motrt
from motrt.errors import BundleError, InputError, ParityError
from motrt.export import quantize
from motrt.export.bundle_from_checkpoint import Exported, QuantizeOptions, export_bundle
from motrt.export.inspection import inspect
from motrt.export.onnx_check import dequantize_problems
from motrt.export.parity import quantization_loss
from motrt.export.parity.findings import Outcome, Report
from motrt.export.parity.gate import Subject, climb, climb_session
from motrt.export.parity.scenarios import observe, scenarios
from motrt.export.quantized_graph import CodeSource
from motrt.export.quantized_weights import QuantizedWeights
from motrt.export.steps import Steps
from motrt.export.verification import verify_bundle
from motrt.model_def.checkpoint.native import open_checkpoint
from motrt.model_def.config import ModelConfig
from motrt.model_def.graph import CANONICAL, Graph
from motrt.model_def.parameters import EMBEDDING, parameters
from motrt.model_def.quantization import (
    CodedWeight,
    Quantization,
    Scales,
    codes_of,
    scales_of,
    stored_bytes_of,
    zero_points_of,
)
from motrt.runtime.bundle import Manifest, open_bundle, record_files, write_manifest
from motrt.runtime.onnx_session import OnnxSession
from motrt.runtime.step_inputs import StepInputs, modality_of_ids
from motrt.runtime.torch_session import TorchSession
from motrt.tests.export.models import EQUAL, ONE, THREE, TIED, TINY, Weight, load_whole, save_whole, set_weight, weight

MakeCheckpoint = Callable[[ModelConfig], Path]

ONE_TIED = TIED.replace(modalities=TIED.modalities[:1])


def exported(checkpoint: Path, out: Path, precision: str, verify: bool = False, **options: Any) -> Path:
    target = options.pop("target", "onnx")
    chosen = QuantizeOptions(**options) if options else None
    export_bundle(checkpoint, out, precision, verify=verify, target=target, quantize_options=chosen)
    return out


@pytest.fixture(scope="module")
def int4(make_checkpoint: MakeCheckpoint, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Experts of one shape, so that every law can be asked."""
    return exported(make_checkpoint(EQUAL), tmp_path_factory.mktemp("int4") / "b", "int4")


@pytest.mark.parametrize(
    ("precision", "config"),
    [("int8", TINY), ("int4", TINY), ("int4", ONE), ("int8", TIED), ("int8", ONE_TIED), ("int4", ONE_TIED)],
    ids=["two", "two4", "one4", "two tied", "one tied", "one tied4"],
)
def test_the_gate_passes_every_format_of_every_model(
    precision: str, config: ModelConfig, make_checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    out = exported(make_checkpoint(config), tmp_path / "b", precision, verify=True)
    manifest = open_bundle(out, "hash").manifest
    assert manifest.parity is not None and manifest.parity["verdict"] in ("PASS", "AMBIGUOUS")
    assert manifest.weights == precision and manifest.precision == "fp32"
    assert {one["rung"] for one in manifest.parity["findings"]} == {"P1", "P2", "P3", "P4", "P5", "loss"}


@pytest.mark.parametrize(
    "options",
    [
        {"symmetric": False},
        {"calibrate": "none", "parts": ("hidden=int8", "layers.0=none")},
        {"block_size": 16, "scales": "absmax"},
        {"parts": ("head=int8", "embedding=fp16", "expert.audio=none")},
        {"parts": ("embedding=none",)},
        {"activations": "fp16"},
    ],
    ids=str,
)
def test_the_gate_passes_every_choice(options: dict[str, Any], tiny_checkpoint: Path, tmp_path: Path) -> None:
    out = exported(tiny_checkpoint, tmp_path / "b", "int4", verify=True, **options)
    parity = open_bundle(out).manifest.parity
    assert parity is not None and parity["verdict"] in ("PASS", "AMBIGUOUS")


def test_q_k_and_v_of_a_route_are_one_product_and_put_back_once(int4: Path, make_checkpoint: MakeCheckpoint) -> None:
    graph = onnx.load(int4 / "model.onnx", load_external_data=False).graph
    names = {one.name for one in graph.initializer}
    assert (
        codes_of("layers.0.attention.wqkv.audio.weight") in names
        and codes_of("layers.0.attention.wq.audio.weight") not in names
    )
    producers = {output: node for node in graph.node for output in node.output}
    splits = [node for node in graph.node if node.op_type == "Split"]
    assert len(splits) == EQUAL.num_layers and {producers[node.input[0]].op_type for node in splits} == {"Gather"}
    held = QuantizedWeights(int4 / "model.onnx", EQUAL, quantization_of(int4))
    read = open_checkpoint(make_checkpoint(EQUAL)).read
    for name in ("wq", "wk", "wv", "wo"):  # each in its own place
        name = f"layers.1.attention.{name}.text.weight"
        assert (held.read(name) - read(name)).norm() < 0.12 * read(name).norm()


def test_where_q_and_k_have_norms_the_product_is_cut_before_them(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    out = exported(make_checkpoint(TIED), tmp_path / "b", "int4")
    graph = onnx.load(out / "model.onnx", load_external_data=False).graph
    producers = {output: node for node in graph.node for output in node.output}
    splits = [node for node in graph.node if node.op_type == "Split"]
    assert len(splits) == TIED.num_layers and {producers[node.input[0]].op_type for node in splits} == {"MatMul"}


def test_parts_of_another_format_stay_by_themselves(tiny_checkpoint: Path, tmp_path: Path) -> None:
    out = exported(tiny_checkpoint, tmp_path / "b", "int4", verify=True, parts=("attention.audio=none",))
    names = {one.name for one in onnx.load(out / "model.onnx", load_external_data=False).graph.initializer}
    assert codes_of("layers.0.attention.wqkv.text.weight") in names and "layers.0.attention.wq.audio.weight" in names


def test_a_tied_table_is_stored_once_and_rows_and_products_read_it(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    """The head is a product of codes; all that a bundle holds is counted once."""
    out = exported(make_checkpoint(ONE_TIED), tmp_path / "b", "int4")
    config, how = open_bundle(out).manifest.config, quantization_of(out)
    assert config.tied_embeddings and how.tied
    graph = onnx.load(out / "model.onnx", load_external_data=False).graph
    shape = [ONE_TIED.model_width, ONE_TIED.vocab_size]
    assert [one.name for one in graph.initializer if sorted(one.dims) == sorted(shape)] == [codes_of(EMBEDDING)]
    rope = 4 * config.max_seq_len * config.head_size
    assert abs((out / "model.onnx.data").stat().st_size - rope - stored_bytes_of(config, how, 4)) < 0.02 * rope + 65536
    run = operators_as_run(out / "model.onnx", tmp_path)
    assert run["MatMulNBits"] == len(multiplied(out, config)) and "Transpose" not in lookups_as_run(tmp_path)


def lookups_as_run(folder: Path) -> set[str]:
    """Operators behind the rows that plain onnxruntime looks up: of a tied table they are turned once, when it is loaded."""
    graph = onnx.load(folder / "as_run.onnx", load_external_data=False).graph
    producers = {output: node.op_type for node in graph.node for output in node.output}
    return {producers[node.input[0]] for node in graph.node if node.op_type == "Gather" and node.input[0] in producers}


@pytest.mark.parametrize(
    ("config", "options"),
    [
        (TIED, {}),
        (ONE_TIED, {"parts": ("head=int8",)}),
        (ONE_TIED, {"parts": ("embedding=fp16",)}),
        (ONE_TIED, {"target": "cuda"}),
    ],
    ids=["two", "a head of its own", "a table of its own", "cuda"],
)
def test_where_a_table_can_not_be_the_head_the_head_is_cut_out(
    config: ModelConfig, options: dict[str, Any], make_checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    out = exported(make_checkpoint(config), tmp_path / "b", "int8", **options)
    manifest = open_bundle(out).manifest
    assert manifest.config.head == "split" and not quantization_of(out).tied


def test_scales_are_weighed_by_the_models_own_sequences_a_files_or_none(tiny_checkpoint: Path, tmp_path: Path) -> None:
    file, held = tmp_path / "ids.jsonl", dict[str, Weight]()
    file.write_text("\n".join(["[1, 2, 3, 4, 5, 6, 7, 8]", '{"ids": [9, 8, 7, 6, 120, 121, 122]}']))
    for name, said in (("sampled", None), ("file", str(file)), ("none", "none")):
        out = exported(tiny_checkpoint, tmp_path / name, "int4", calibrate=said)
        assert quantization_of(out).calibration == name
        held[name] = weight(load_whole(out), scales_of("layers.0.feed_forward.text.w1.weight"))
    assert not any(np.array_equal(held[one], held[other]) for one, other in (("sampled", "file"), ("file", "none")))
    assert quantization_of(exported(tiny_checkpoint, tmp_path / "int8", "int8")).calibration == "none"


@pytest.mark.parametrize(
    ("precision", "options", "told"),
    [
        ("int8", {"calibrate": "ids.jsonl"}, "for weights of 4 bits"),
        ("int4", {"calibrate": "ids.jsonl", "scales": "absmax"}, "for --scales search"),
        ("int4", {"calibrate": "nowhere.jsonl"}, "nowhere.jsonl does not exist"),
    ],
)
def test_sequences_that_are_for_nothing_are_refused_before_anything_is_done(
    precision: str, options: dict[str, Any], told: str, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=told):
        exported(tiny_checkpoint, tmp_path / "b", precision, **options)
    assert not (tmp_path / "b").exists()


def test_weighed_scales_may_lose_more_than_the_usual_ones_and_only_so_much(int4: Path, make_checkpoint: MakeCheckpoint) -> None:
    held, read = (
        QuantizedWeights(int4 / "model.onnx", EQUAL, quantization_of(int4)),
        open_checkpoint(make_checkpoint(EQUAL)).read,
    )
    plain = QuantizedWeights(int4 / "model.onnx", EQUAL, replace(quantization_of(int4), calibration="none"))
    four = [one for one in held.coded if one.how.stored == "int4"]
    assert all(held.problem(one, read) is None for one in held.coded)
    assert any("lose more than the usual ones" in str(plain.problem(one, read)) for one in four)


def quantization_of(bundle: Path) -> Quantization:
    found = open_bundle(bundle).manifest.quantization
    assert found is not None
    return found


ONE_WITH_BIASES = EQUAL.replace(modalities=EQUAL.modalities[:1], head="shared")


@pytest.mark.parametrize(
    "config",
    [ONE, ONE_WITH_BIASES, EQUAL, TIED, ONE_TIED],
    ids=["one", "one with biases", "two", "two, tied", "one, tied"],
)
@pytest.mark.parametrize("precision", ["int4", "int8"])
@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
def test_plain_onnxruntime_multiplies_codes_and_says_what_our_session_says(
    config: ModelConfig, precision: str, symmetric: bool, make_checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    """As anybody opens the file, with no option: the same kernels, and the same numbers, bit for bit, in prompts and steps."""
    out = exported(make_checkpoint(config), tmp_path / "b", precision, symmetric=symmetric)
    manifest, options = open_bundle(out).manifest, ort.SessionOptions()
    assert operators_as_run(out / "model.onnx", tmp_path)["MatMulNBits"] == len(multiplied(out, manifest.config))
    options.log_severity_level = 3
    plain = ort.InferenceSession(out / "model.onnx", options, providers=["CPUExecutionProvider"])
    names = [one.name for one in plain.get_inputs()]
    cache = [np.zeros((2, config.num_kv_heads, 16, config.head_size), np.float32) for _ in range(2 * config.num_layers)]
    chance = np.random.default_rng(7)
    with OnnxSession(out / "model.onnx", manifest.config, quantization=manifest.quantization) as session:
        ours = session.new_cache(2, 16)
        for width in (5, 1, 1):
            ids = chance.integers(0, config.vocab_size, (2, width))
            predicted = chance.integers(0, len(config.modalities), 2)
            last = np.arange(1, 3) * width - 1
            inputs = StepInputs(ids, modality_of_ids(ids, config), ours.lengths.copy(), last, predicted)
            fed = inputs.named() | dict(zip((one for one in names if one.startswith("past_")), cache, strict=True))
            logits, *cache = plain.run(None, {name: value for name, value in fed.items() if name in names})
            np.testing.assert_array_equal(logits, session.run(inputs, ours))
            ours.lengths += width


@pytest.mark.parametrize("config", [ONE, TINY], ids=["one", "two"])
def test_no_graph_of_a_plan_is_taken_apart_by_plain_onnxruntime(
    config: ModelConfig, make_checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    """Steps of one modality add the residual stream right behind a product, where a routed graph puts rows back first."""
    out = exported(make_checkpoint(config), tmp_path / "b", "int4", target="cuda", symmetric=False, activations="fp32")
    for graph in open_bundle(out).manifest.graphs:
        run = operators_as_run(out / graph.file_name, tmp_path)
        assert run["MatMulNBits"] == len(multiplied(out, config, graph)), graph.name


def test_a_graph_that_onnxruntime_would_take_apart_is_refused(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    """It computes the same, several times slower: nothing but P1 would see it."""
    out = exported(make_checkpoint(ONE), tmp_path / "b", "int4")
    model = onnx.load(out / "model.onnx", load_external_data=False)
    assert dequantize_problems(model, ONE, quantization=quantization_of(out)) == []
    for node in model.graph.node:
        if node.op_type == "Sum":
            node.op_type = "Add"
    problems = dequantize_problems(model, ONE, quantization=quantization_of(out))
    assert len(problems) == 2 * ONE.num_layers and "should be a Sum" in problems[0]
    onnx.save(model, out / "model.onnx")
    assert operators_as_run(out / "model.onnx", tmp_path)["MatMulNBits"] < len(multiplied(out, ONE))


def multiplied(bundle: Path, config: ModelConfig, graph: Graph = CANONICAL) -> list[CodedWeight]:
    """What one product each should be left for."""
    return [one for one in quantization_of(bundle).coded_weights(graph.parameters(config)) if not one.is_table]


def operators_as_run(file: Path, folder: Path) -> Counter[str]:
    """The operators of ``file`` as plain onnxruntime runs it, counted."""
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.optimized_model_filepath = str(folder / "as_run.onnx")
    ort.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    return Counter(node.op_type for node in onnx.load(folder / "as_run.onnx", load_external_data=False).graph.node)


def test_generating_needs_no_word_of_how_weights_are_stored(int4: Path) -> None:
    with motrt.load(int4, check="hash") as session:
        assert session.weights == "int4" and session.activation_block == 32
        steps = list(session.generate([1, 2, 3], schedule=motrt.then("audio", tokens=8)))
    assert len(steps) == 8 and all(step.modality == "audio" for step in steps)


def test_products_round_activations_unless_asked_not_to(int4: Path) -> None:
    manifest = open_bundle(int4).manifest
    said = []
    for exact in (True, False):
        with OnnxSession(int4 / "model.onnx", EQUAL, quantization=manifest.quantization, exact_activations=exact) as session:
            said.append(observe(session, scenarios(EQUAL)[0]))
            assert (session.activation_block is None) == exact
    differences = [np.linalg.norm(a.logits - b.logits) / np.linalg.norm(a.logits) for a, b in zip(*said, strict=True)]
    assert 1e-4 < max(differences) < 0.05


def test_poison_reaches_codes_that_onnxruntime_has_made_its_own(int4: Path) -> None:
    """The law would hold of any graph if replacing weights did nothing."""
    subject = subject_of(int4)
    for parameter in (one for one in parameters(EQUAL) if one.modality == "text"):
        with subject.replacement(1).with_poison([parameter]) as poisoned:
            assert any(np.isnan(one.logits).any() for one in observe(poisoned, scenarios(EQUAL)[0])), parameter.name


def subject_of(bundle: Path, manifest: Manifest | None = None) -> Subject:
    told = manifest or open_bundle(bundle).manifest
    return Subject(bundle / "model.onnx", told.config, told.precision, {}, told.graphs, told.quantization)


# Faults, planted in a finished file. The first two rungs are asked of the file, the others of what it computes.

FIRST, SECOND = "layers.0.feed_forward.text.w1.weight", "layers.0.feed_forward.text.w3.weight"


def one_scale(model: onnx.ModelProto) -> None:
    scales = weight(model, scales_of(FIRST))
    scales[0, 5] *= 1.25
    set_weight(model, scales_of(FIRST), scales)


def scales_of_another(model: onnx.ModelProto) -> None:
    first, second = (weight(model, scales_of(name)) for name in (FIRST, SECOND))
    set_weight(model, scales_of(FIRST), second)
    set_weight(model, scales_of(SECOND), first)


def scales_read_from_another(model: onnx.ModelProto) -> None:
    """Both stored right, and each read where the other should be."""
    other = {scales_of(FIRST): scales_of(SECOND), scales_of(SECOND): scales_of(FIRST)}
    for node in model.graph.node:
        if node.op_type == "Cast" and node.input[0] in other:
            node.input[0] = other[node.input[0]]


def one_code(model: onnx.ModelProto) -> None:
    tensor = next(one for one in model.graph.initializer if one.name == codes_of(FIRST))
    codes = onnx.numpy_helper.to_array(tensor).copy()
    codes[3, 5] = 7 if int(codes[3, 5]) < 0 else -8
    tensor.CopyFrom(onnx.helper.make_tensor(tensor.name, tensor.data_type, codes.shape, codes.flatten()))


def turned_back_whole(model: onnx.ModelProto) -> None:
    """The same numbers, by way of an operator that keeps codes and product apart."""
    product = next(node for node in model.graph.node if node.op_type == "MatMul" and "w1" in node.name)
    whole = product.input[1]
    product.input[1] = "whole"
    place = list(model.graph.node).index(product)
    model.graph.node.insert(place, onnx.helper.make_node("Identity", [whole], ["whole"], "between"))


def a_row_of_the_table(model: onnx.ModelProto) -> None:
    codes = onnx.numpy_helper.to_array(next(one for one in model.graph.initializer if one.name == codes_of(EMBEDDING))).copy()
    codes[[3, 4]] = codes[[4, 3]]
    set_weight(model, codes_of(EMBEDDING), codes)


def head_of_half_the_scale(model: onnx.ModelProto) -> None:
    set_weight(model, scales_of("output.audio.weight"), weight(model, scales_of("output.audio.weight")) * 0.5)


FAULTS = [
    turned_back_whole,
    one_scale,
    scales_of_another,
    scales_read_from_another,
    one_code,
    a_row_of_the_table,
    head_of_half_the_scale,
]


@pytest.mark.parametrize("plant", FAULTS, ids=lambda one: one.__name__)
def test_a_fault_in_codes_or_scales_is_seen_in_the_file_and_in_what_it_computes(
    plant: Callable[[onnx.ModelProto], None], int4: Path, make_checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    model = load_whole(int4)
    plant(model)
    save_whole(model, tmp_path / "b")
    subject = subject_of(tmp_path / "b", open_bundle(int4).manifest)
    report = climb(subject, open_checkpoint(make_checkpoint(EQUAL)), Steps())
    failed = {one.rung for one in report.findings if one.outcome is Outcome.FAIL}
    assert report.verdict is Outcome.FAIL and "P1" in failed
    if plant is scales_read_from_another:  # the others changed what is stored, which the reference reads too: P1 tells those
        assert "P4" in failed


def test_with_activations_as_they_are_the_gate_is_as_tight_as_for_plain_weights(
    int4: Path, make_checkpoint: MakeCheckpoint
) -> None:
    report = climb(subject_of(int4), open_checkpoint(make_checkpoint(EQUAL)), Steps())
    exact = [one for one in report.findings if one.rung == "P4" and "activations rounded" not in one.question]
    rounded = [one for one in report.findings if one.rung == "P4" and "activations rounded" in one.question]
    assert exact and rounded and report.verdict is Outcome.PASS
    assert all(float(one.figures["limit"]) < 1e-4 for one in exact)
    assert 0 < float(rounded.pop().figures["share"]) < 1.5  # of all rows together, against a reference that rounds as they do
    assert max(float(one.figures["share"]) for one in rounded) < 1


def test_a_small_fault_below_the_roundings_is_seen_all_the_same(
    int4: Path, make_checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    """Half a percent on one norm moves logits less than 8-bit activations do."""
    model = load_whole(int4)
    set_weight(model, "layers.1.ffn_norm.weight", weight(model, "layers.1.ffn_norm.weight") * 1.005)
    save_whole(model, tmp_path / "b")
    report = climb(subject_of(tmp_path / "b", open_bundle(int4).manifest), open_checkpoint(make_checkpoint(EQUAL)), Steps())
    by_rounding = {
        rounded: {one.outcome for one in report.findings if one.rung == "P4" and ("rounded" in one.question) == rounded}
        for rounded in (False, True)
    }
    # The reference reads the file's plain weights; the checkpoint's own stand in P1.
    assert any(one.rung == "P1" and one.outcome is Outcome.FAIL for one in report.findings)
    assert by_rounding == {False: {Outcome.PASS}, True: {Outcome.PASS}}


def test_loss_is_told_apart_from_faults(
    make_checkpoint: MakeCheckpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A format that loses too much fails on its own rung, with every other rung passed."""
    monkeypatch.setattr(quantization_loss, "LARGEST_MEAN_KL", {4: 1e-6, 8: 1e-9})
    with pytest.raises(ParityError, match="loses more of it than --max-loss") as caught:
        exported(make_checkpoint(TINY), tmp_path / "b", "int4", verify=True)
    report: Mapping[str, Any] = caught.value.report or {}
    assert {one["rung"] for one in report["findings"] if one["outcome"] == "FAIL"} == {"loss"}
    assert not (tmp_path / "b").exists()


def test_fewer_bits_lose_more_and_searching_loses_less(tiny_checkpoint: Path, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(tiny_checkpoint)
    means = {}
    choices: dict[str, tuple[str, Scales]] = {
        "int8": ("int8", "search"),
        "search": ("int4", "search"),
        "absmax": ("int4", "absmax"),
    }
    for name, (precision, scales) in choices.items():
        out = exported(tiny_checkpoint, tmp_path / name, precision, scales=scales)
        held = QuantizedWeights(out / "model.onnx", TINY, quantization_of(out))
        found = quantization_loss.measure_losses(TINY, checkpoint, held, Steps())
        means[name] = float(np.mean([float(one.figures["kl_mean"]) for one in found]))
    assert means["int8"] < 0.05 * means["search"] and means["search"] < means["absmax"]


def test_a_finished_bundle_is_verified_with_its_quantisation(int4: Path) -> None:
    report: Report = verify_bundle(int4)
    assert report.verdict is Outcome.PASS


def test_inspect_tells_the_format_of_every_part(int4: Path) -> None:
    found = inspect(int4)
    assert found["quantization"]["scales"] == "search"
    assert found["total_bytes"] < 0.4 * 4 * found["total_parameters"]
    assert found["health"]["problems"] == []


def test_the_table_is_gathered_before_it_is_turned_back(int4: Path) -> None:
    """A table turned back whole costs its whole size at every step."""
    graph = onnx.load(int4 / "model.onnx", load_external_data=False).graph
    producers = {output: node for node in graph.node for output in node.output}
    readers = [node for node in graph.node if codes_of(EMBEDDING) in node.input]
    assert [node.op_type for node in readers] == ["Gather"]
    turned = next(
        node for node in graph.node if node.op_type == "DequantizeLinear" and producers.get(node.input[0]) == readers[0]
    )
    assert producers[turned.input[1]].op_type == "Gather"


@pytest.fixture(scope="module")
def steps(make_checkpoint: MakeCheckpoint, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """With the graphs of one modality's steps."""
    out, options = tmp_path_factory.mktemp("steps") / "b", QuantizeOptions(symmetric=False, activations="fp32")
    return export_bundle(make_checkpoint(TINY), out, "int4", target="cuda", quantize_options=options)


def test_codes_are_multiplied_in_onnxruntimes_own_operators_too(
    make_checkpoint: MakeCheckpoint, tmp_path: Path, steps: Exported
) -> None:
    options = QuantizeOptions(symmetric=False, activations="fp32")
    made = export_bundle(
        make_checkpoint(TINY.replace(num_layers=1)),
        tmp_path / "b",
        "int4",
        target="cuda",
        quantize_options=options,
        operators="onnxruntime",
    )
    assert made.report is not None and made.report.verdict in (Outcome.PASS, Outcome.AMBIGUOUS)
    assert {one.operators for one in made.bundle.manifest.graphs} == {"onnxruntime"}
    assert open_bundle(made.bundle.path).manifest.graphs == made.bundle.manifest.graphs


@pytest.mark.parametrize(("target", "operators"), [("onnx", "onnxruntime"), ("tensorrt-rtx", "onnxruntime"), ("cuda", "mine")])
def test_operators_that_nothing_would_run_are_refused(
    target: Any, operators: Any, make_checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match="operators"):
        export_bundle(make_checkpoint(TINY), tmp_path / "b", target=target, operators=operators)
    assert not (tmp_path / "b").exists()


def test_derived_graphs_read_the_same_codes(steps: Exported) -> None:
    assert steps.report is not None and steps.report.verdict in (Outcome.PASS, Outcome.AMBIGUOUS)
    assert {one.graph for one in steps.report.findings} > {"decode.text", "change.audio.text"}
    graph = onnx.load(steps.bundle.path / "decode.text.onnx", load_external_data=False).graph
    names = {one.name for one in graph.initializer}
    assert zero_points_of(FIRST) in names and not any(".audio." in name for name in names)


@pytest.mark.parametrize(
    ("precision", "options", "error", "told"),
    [
        ("fp32", {"block_size": 32}, InputError, "quantises nothing"),
        ("fp8", {}, InputError, "fp8 is for --target tensorrt"),
        ("int4", {"block_size": 128}, InputError, "blocks of 16, 32"),
        ("int4", {"parts": ("haed=int8",)}, InputError, "haed"),
        ("int4", {"activations": "fp12"}, InputError, "fp12"),
        ("int4", {"parts": ("head=fp8",)}, InputError, "fp8 is for --target tensorrt"),
        ("int4", {"symmetric": False, "target": "tensorrt-rtx"}, InputError, "takes no zero points"),
        ("int4", {"parts": ("head=int8:32",), "target": "tensorrt-rtx"}, InputError, "one scale per output"),
        ("int4", {"parts": ("embedding.audio=int8",)}, InputError, "the same for all modalities"),
        ("int4", {"parts": ("embedding=int8",), "target": "cuda"}, InputError, "cuts the embedding by modality"),
    ],
)
def test_what_can_not_be_quantised_is_said_before_any_work(
    precision: str, options: dict[str, Any], error: type[Exception], told: str, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    with pytest.raises(error, match=told):
        exported(tiny_checkpoint, tmp_path / "b", precision, **(options or {"symmetric": True}))
    assert not any(tmp_path.iterdir())


def test_widths_that_no_block_fits_are_named(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    """The third modality's expert has 24 hidden units."""
    out = exported(make_checkpoint(THREE), tmp_path / "b", "int8", verify=True)  # one scale per output where no block fits
    assert open_bundle(out).manifest.weights == "int8"
    with pytest.raises(InputError, match=r"rows of 24 .*no block size fits"):
        exported(make_checkpoint(THREE), tmp_path / "c", "int8", block_size=16)


def test_a_manifest_whose_quantisation_is_not_the_models_is_refused(int4: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(int4, tmp_path / "b"))
    manifest = open_bundle(copy).manifest
    assert manifest.quantization is not None
    other = replace(manifest.quantization, formats=(("video", None),))
    write_manifest(copy, replace(manifest, quantization=other, files=record_files(copy)))
    with pytest.raises(BundleError, match="video"):
        open_bundle(copy)


def test_memory_holds_one_weight_at_a_time(
    make_checkpoint: MakeCheckpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No weight is read before the one before it was let go of."""
    read: list[weakref.ref[torch.Tensor]] = []
    real = CodeSource._weight

    def counted(self: CodeSource, one: CodedWeight) -> torch.Tensor:
        assert all(weight() is None for weight in read), "an earlier weight is still held"
        weight = real(self, one).clone()
        read.append(weakref.ref(weight))
        return weight

    monkeypatch.setattr(CodeSource, "_weight", counted)
    exported(make_checkpoint(TINY), tmp_path / "b", "int4")
    assert len(read) == 2 * len(quantization_of(tmp_path / "b").coded_weights(parameters(TINY)))  # for scales, and for codes


def test_experts_stored_in_different_formats_can_not_be_swapped_and_it_is_said(
    make_checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    for number, part in enumerate(("expert.audio=none", "audio=int8:16")):
        out = exported(make_checkpoint(EQUAL), tmp_path / str(number), "int4", verify=True, parts=(part,))
        parity = open_bundle(out).manifest.parity
        assert parity is not None and parity["verdict"] in ("PASS", "AMBIGUOUS")
        assert [one["detail"] for one in parity["findings"] if one["outcome"] == "SKIPPED"] == [
            "the weights of text and audio are stored in different formats"
        ]


def test_a_quantiser_that_rounds_wrongly_does_not_vouch_for_itself(
    make_checkpoint: MakeCheckpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = quantize._nearest
    monkeypatch.setattr(quantize, "_nearest", lambda cut, how, scale, zero: real(cut + 0.6 * scale, how, scale, zero))
    with pytest.raises(ParityError, match="more than half a step from the weights"):
        exported(make_checkpoint(TINY), tmp_path / "b", "int8", verify=True)


def test_another_backend_is_asked_for_the_checkpoints_weights_too(
    int4: Path, make_checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    """Its reference reads the bundle's own file: wrong codes would stand on both sides."""
    model = load_whole(int4)
    one_code(model)
    save_whole(model, tmp_path / "b")
    told = open_bundle(int4).manifest
    for folder, verdict in ((int4, Outcome.PASS), (tmp_path / "b", Outcome.FAIL)):
        subject = Subject(folder / "model.onnx", EQUAL, told.precision, {}, told.graphs, told.quantization)
        opened = partial(OnnxSession, folder / "model.onnx", EQUAL, quantization=told.quantization, exact_activations=True)
        report = climb_session(opened, EQUAL, open_checkpoint(make_checkpoint(EQUAL)), Steps(), {}, subject=subject)
        assert report.verdict is verdict
        assert {"P1", "loss"} < {one.rung for one in report.findings}


@pytest.mark.parametrize(
    ("config", "expected"), [(ONE, ["0"] * 4), (TINY, ["0", "1", "01", "01"]), (THREE, ["0", "1", "2", "012"])]
)
def test_loss_is_sampled_of_each_modality_alone_and_of_all_in_their_order(
    config: ModelConfig, expected: list[str], make_checkpoint: MakeCheckpoint
) -> None:
    with TorchSession.open(open_checkpoint(make_checkpoint(config)), "fp32") as session:
        rows = quantization_loss.sampled_rows(session)
        turns = ["".join(str(one) for one, _ in groupby(modality_of_ids(row, config).tolist())) for row in rows]
        assert turns == expected and {len(row) for row in rows} == {quantization_loss.NUM_TOKENS + 1}
        for row, again in zip(rows, quantization_loss.sampled_rows(session), strict=True):
            np.testing.assert_array_equal(row, again)
