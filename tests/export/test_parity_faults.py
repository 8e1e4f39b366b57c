"""Every rung is shown faults, and must see them by its own means: the rungs below it are not asked."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch

from motrt.export.onnx_check import check_onnx, routing_problems
from motrt.export.onnx_from_module import attach_weights, trace, write_onnx
from motrt.export.parity.agreement import agreement_findings, compare
from motrt.export.parity.consistency import consistency_findings
from motrt.export.parity.contract import contract_findings
from motrt.export.parity.findings import Finding, Outcome
from motrt.export.parity.gate import Expectation, ask
from motrt.export.parity.generation import Greedy, generation_findings
from motrt.export.parity.routing_laws import absence_finding, law_findings, swap_finding
from motrt.export.parity.scenarios import observe, scenarios
from motrt.model_def import experts, operators
from motrt.model_def.checkpoint.native import open_checkpoint
from motrt.model_def.config import ModelConfig, RopeConfig
from motrt.model_def.decoder import Decoder
from motrt.model_def.operators import rope_tables
from motrt.model_def.parameters import Parameter, parameters
from motrt.model_def.routing import Gathered, Routing
from motrt.runtime.bundle import WEIGHTS_FILE
from motrt.runtime.kv_cache import KVCache
from motrt.runtime.onnx_session import OnnxSession
from motrt.runtime.session import Logits, Session
from motrt.runtime.step_inputs import StepInputs
from motrt.runtime.torch_session import TorchSession
from motrt.tests.export.models import (
    EQUAL,
    ONE,
    THREE,
    TINY,
    load_whole,
    nodes,
    save_whole,
    set_weight,
    swap_weights,
    torch_session,
    weight,
    write_random,
)

MakeCheckpoint = Callable[[ModelConfig], Path]
MakeBundle = Callable[..., Path]
Plant = Callable[[onnx.ModelProto], None]


def failed(findings: list[Finding]) -> set[str]:
    return {one.question for one in findings if one.outcome is Outcome.FAIL}


def passed(findings: list[Finding]) -> bool:
    return all(one.outcome is Outcome.PASS for one in findings)


# P1: names, dims, and every byte.


def rename_input(model: onnx.ModelProto) -> None:
    model.graph.input[0].name = "tokens"
    for node in model.graph.node:
        node.input[:] = ["tokens" if name == "input_ids" else name for name in node.input]


def lose_weight(model: onnx.ModelProto) -> None:
    """Its product reads another weight of the same shape."""
    lost, other = "layers.1.attention.wq.audio.weight", "layers.1.attention.wq.text.weight"
    model.graph.initializer.remove(next(one for one in model.graph.initializer if one.name == lost))
    for node in model.graph.node:
        node.input[:] = [other if name == lost else name for name in node.input]


def transpose_weight(model: onnx.ModelProto) -> None:
    set_weight(model, "layers.0.attention.wo.text.weight", weight(model, "layers.0.attention.wo.text.weight").T)


def spoil_last_rotary_row(model: onnx.ModelProto) -> None:
    table = weight(model, "rope_cos")
    table[-1] += 0.5
    set_weight(model, "rope_cos", table)


P1_FAULTS: dict[str, tuple[Plant, str]] = {
    "an input is renamed": (rename_input, "graph keeps the contract"),
    "a weight is missing": (lose_weight, "every weight is in the graph and read"),
    "a weight is transposed": (transpose_weight, "every weight equals the checkpoint's, bit for bit"),
    "a rotary row no scenario reaches": (spoil_last_rotary_row, "rotary tables are the configuration's, bit for bit"),
}


def ask_p1(model_file: Path, config: ModelConfig, checkpoint: Path) -> list[Finding]:
    return contract_findings(model_file, config, "float32", open_checkpoint(checkpoint), lambda num_bytes: None)


def test_p1_has_nothing_to_say_of_a_good_bundle(tiny_bundle: Path, tiny_checkpoint: Path) -> None:
    assert passed(ask_p1(tiny_bundle / "model.onnx", TINY, tiny_checkpoint))


@pytest.mark.parametrize("name", P1_FAULTS)
def test_p1_sees(name: str, tiny_bundle: Path, tiny_checkpoint: Path, tmp_path: Path) -> None:
    plant, question = P1_FAULTS[name]
    model = load_whole(tiny_bundle)
    plant(model)
    assert question in failed(ask_p1(save_whole(model, tmp_path), TINY, tiny_checkpoint))


@pytest.mark.parametrize("where", [0.0, 0.5, 0.999])
def test_p1_sees_one_flipped_bit_of_the_weights(where: float, tiny_bundle: Path, tiny_checkpoint: Path, tmp_path: Path) -> None:
    for file in tiny_bundle.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    model = onnx.load(tmp_path / "model.onnx", load_external_data=False)
    spans = [{one.key: one.value for one in tensor.external_data} for tensor in model.graph.initializer]
    inside = [(int(span["offset"]), int(span["length"])) for span in spans if span]
    offset, length = sorted(inside)[int(where * len(inside))]
    data = bytearray((tmp_path / WEIGHTS_FILE).read_bytes())
    data[offset + length // 2] ^= 1
    (tmp_path / WEIGHTS_FILE).write_bytes(data)
    assert len(failed(ask_p1(tmp_path / "model.onnx", TINY, tiny_checkpoint))) == 1


# P2: a session that does not agree with itself.


class OffByOneInDecode(TorchSession):
    def execute(self, inputs: StepInputs, cache: KVCache) -> Logits:
        is_decode = inputs.input_ids.shape[1] == 1 and cache.capacity > 1
        position = np.maximum(inputs.cache_position - 1, 0) if is_decode else inputs.cache_position
        return super().execute(replace(inputs, cache_position=position), cache)


class OffByOneAtChunks(TorchSession):
    """A later chunk is written one place too far."""

    def execute(self, inputs: StepInputs, cache: KVCache) -> Logits:
        later = (inputs.cache_position > 0) & (inputs.input_ids.shape[1] > 1)
        return super().execute(replace(inputs, cache_position=inputs.cache_position + later), cache)


class StaleRow(TorchSession):
    """The second row of a batch keeps its old cache in decode steps."""

    def execute(self, inputs: StepInputs, cache: KVCache) -> Logits:
        before = [(keys.clone(), values.clone()) for keys, values in cache.buffers]
        logits = super().execute(inputs, cache)
        if cache.batch_size > 1 and inputs.input_ids.shape[1] == 1:
            for old_pair, new_pair in zip(before, cache.buffers, strict=True):
                for old, new in zip(old_pair, new_pair, strict=True):
                    with torch.inference_mode():
                        new[1] = old[1]
        return logits


class RowsMixed(TorchSession):
    """Two rows of a batch get each other's logits."""

    def execute(self, inputs: StepInputs, cache: KVCache) -> Logits:
        logits = super().execute(inputs, cache)
        same = cache.batch_size > 1 and len(logits) > 1 and inputs.head_mask[0] == inputs.head_mask[-1]
        return logits[::-1].copy() if same else logits


class LosesWhenGrowing(TorchSession):
    def grow_buffers(self, buffers: Any, capacity: int) -> Any:
        grown = super().grow_buffers(buffers, capacity)
        for keys, _ in grown:
            keys[:, :, 5] = 0
        return grown


class StreamsAnotherToken(TorchSession):
    def generate(self, *arguments: Any, **named: Any) -> Any:
        for step in super().generate(*arguments, **named):
            yield replace(step, token_id=self.config.id_ranges[0].start) if step.index == 5 else step


class StopsStreamingEarly(TorchSession):
    def generate(self, *arguments: Any, **named: Any) -> Any:
        return (step for step in super().generate(*arguments, **named) if step.index != 7)


class SaysNaN(TorchSession):
    """From some position on there are no numbers at all, on both sides of every comparison."""

    def execute(self, inputs: StepInputs, cache: KVCache) -> Logits:
        logits = super().execute(inputs, cache)
        logits[-1] = np.nan
        return logits


P2_FAULTS: dict[str, tuple[type[TorchSession], str]] = {
    "the cache is off by one in decode": (OffByOneInDecode, "decode steps equal one full pass"),
    "a chunk is written one place too far": (OffByOneAtChunks, "chunked prefill equals whole"),
    "a row is stale": (StaleRow, "a row alone equals the row in a mixed batch"),
    "rows are mixed up": (RowsMixed, "a row alone equals the row in a mixed batch"),
    "growing loses a key": (LosesWhenGrowing, "a cache that grew equals one that was large"),
    "streaming says another token": (StreamsAnotherToken, "streamed generation of a batch equals each row alone"),
    "streaming stops early": (StopsStreamingEarly, "streamed generation of a batch equals each row alone"),
    "nothing is a number": (SaysNaN, "decode steps equal one full pass"),
}


@pytest.mark.parametrize("name", P2_FAULTS)
def test_p2_sees_that(name: str, tiny_checkpoint: Path) -> None:
    kind, question = P2_FAULTS[name]
    assert question in failed(consistency_findings(torch_session(tiny_checkpoint, kind=kind)))


@pytest.mark.parametrize("config", [TINY, ONE, THREE], ids=["two", "one", "three"])
def test_p2_has_nothing_to_say_of_the_reference(config: ModelConfig, make_checkpoint: MakeCheckpoint) -> None:
    assert passed(consistency_findings(torch_session(make_checkpoint(config))))


@pytest.mark.parametrize("length", [1, 2, 3, 4, 5, 8, 17, 65])
@pytest.mark.parametrize("config", [TINY, ONE], ids=["two", "one"])
def test_a_model_of_few_positions_can_be_climbed(length: int, config: ModelConfig, tmp_path: Path) -> None:
    short = config.replace(max_seq_len=length, num_layers=1)
    session = torch_session(write_random(tmp_path / "model", short, 0))
    said = ask(session)
    compared = compare(session, said.scenarios, said.limits)
    findings = [*consistency_findings(session), *law_findings(session), *agreement_findings(session, compared)]
    findings += generation_findings(session, said.plans, 0.0)
    assert compared and not failed(findings)


# P3: laws of routing, on decoders that break them.

CAUSAL, RANGES = "a later token changes no earlier logit", "filtered ids never leave their range"


class TorchReplacement:
    """The decoder of a checkpoint with some of its weights replaced."""

    def __init__(self, checkpoint: Path) -> None:
        self.checkpoint = checkpoint

    def with_poison(self, poisoned: Iterable[Parameter]) -> Session:
        session = torch_session(self.checkpoint)
        with torch.no_grad():
            for one in poisoned:
                session.decoder.get_parameter(one.name).fill_(torch.nan)
        return session

    def can_exchange(self, pairs: Mapping[str, str]) -> bool:
        return True

    def with_exchanged(self, pairs: Mapping[str, str]) -> Session:
        session, opened = torch_session(self.checkpoint), open_checkpoint(self.checkpoint)
        with torch.no_grad():
            for name, other in pairs.items():
                session.decoder.get_parameter(name).copy_(opened.read(other))
        return session


class Unreplaced(TorchReplacement):
    """One that replaces nothing."""

    def with_exchanged(self, pairs: Mapping[str, str]) -> Session:
        return torch_session(self.checkpoint)


@pytest.mark.parametrize("config", [TINY, ONE, THREE], ids=["two", "one", "three"])
def test_p3_has_nothing_to_say_of_the_reference(config: ModelConfig, make_checkpoint: MakeCheckpoint) -> None:
    checkpoint = make_checkpoint(config)
    session = torch_session(checkpoint)
    assert passed(law_findings(session))
    for modality in range(len(config.modalities)) if len(config.modalities) > 1 else ():
        assert absence_finding(session, TorchReplacement(checkpoint), modality).outcome is Outcome.PASS


@pytest.mark.parametrize("reach", [1, 100])
def test_p3_sees_a_mask_that_looks_ahead(reach: int, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Even by one place: only the very neighbour of a change can tell."""
    attend = operators.attend

    def looking_ahead(query: Any, key: Any, value: Any, visible: torch.Tensor) -> torch.Tensor:
        wider = visible.clone()
        for step in range(1, min(reach, visible.shape[-1] - 1) + 1):
            wider[..., step:] |= visible[..., :-step]
        return attend(query, key, value, wider)

    monkeypatch.setattr(operators, "attend", looking_ahead)
    assert failed(law_findings(torch_session(tiny_checkpoint))) == {CAUSAL}


@pytest.mark.parametrize("modality", [0, 1])
@pytest.mark.parametrize("border", ["first", "last"])
@pytest.mark.parametrize("direction", ["too narrow", "too wide"])
def test_p3_sees_a_filter_off_by_one(modality: int, border: str, direction: str, tiny_checkpoint: Path) -> None:
    ids = TINY.id_ranges[modality]
    inner, outer = (ids.start, ids.start - 1) if border == "first" else (ids.stop - 1, ids.stop)
    if direction == "too wide" and outer not in range(TINY.vocab_size):
        outer = (outer + TINY.vocab_size) % TINY.vocab_size  # the far end: what a wrapped index would let through

    class Filtering(TorchSession):
        def execute(self, inputs: StepInputs, cache: KVCache) -> Logits:
            logits = super().execute(inputs, cache)
            rows = inputs.head_mask == modality
            logits[rows, inner if direction == "too narrow" else outer] = -np.inf if direction == "too narrow" else 0.0
            return logits

    assert RANGES in failed(law_findings(torch_session(tiny_checkpoint, kind=Filtering)))


def all_added(self: experts.RoutedExperts, x: torch.Tensor, routing: Routing) -> torch.Tensor:
    """Every expert computes every row; products with 0 and 1 merge them."""
    assert isinstance(routing, Gathered)
    outputs = [expert(x) for expert in self.values()]
    masks = [torch.zeros_like(x[:, :1]).index_fill(0, rows, 1.0) for rows in routing.rows]
    return sum((mask * output for mask, output in zip(masks, outputs, strict=True)), torch.zeros_like(x))


def all_selected(self: experts.RoutedExperts, x: torch.Tensor, routing: Routing) -> torch.Tensor:
    """Every expert computes every row; the wanted one is chosen: not even NaN would show."""
    assert isinstance(routing, Gathered)
    merged = torch.zeros_like(x)
    for expert, rows in zip(self.values(), routing.rows, strict=True):
        is_own = torch.zeros_like(x[:, :1]).index_copy(0, rows, torch.ones_like(x[:, :1]).index_select(0, rows)) > 0
        merged = torch.where(is_own, expert(x), merged)
    return merged


@pytest.mark.parametrize("modality", [0, 1])
def test_p3_sees_experts_that_are_all_computed(modality: int, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = [one.logits for one in observe(torch_session(tiny_checkpoint), scenarios(TINY)[2])]
    monkeypatch.setattr(experts.RoutedExperts, "forward", all_added)
    session = torch_session(tiny_checkpoint)
    came = [one.logits for one in observe(session, scenarios(TINY)[2])]
    assert all(np.allclose(a, b, atol=1e-5) for a, b in zip(expected, came, strict=True))  # nothing but the law tells
    finding = absence_finding(session, TorchReplacement(tiny_checkpoint), modality)
    assert finding.outcome is Outcome.FAIL


@pytest.mark.parametrize("merge", [all_added, all_selected])
def test_a_graph_that_computes_all_experts_is_seen_even_where_no_logit_differs(
    merge: Any, make_checkpoint: MakeCheckpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = TINY.replace(num_layers=1)
    checkpoint = open_checkpoint(make_checkpoint(config))
    monkeypatch.setattr(experts.RoutedExperts, "forward", merge)
    model = trace(config, "float32")  # the real one: a remembered trace would be the good graph
    attach_weights(model, config, "float32", checkpoint.read)
    write_onnx(model, tmp_path)
    findings = contract_findings(tmp_path / "model.onnx", config, "float32", checkpoint, lambda num_bytes: None)
    assert failed(findings) == {"routed weights multiply their own rows alone"}
    problems = routing_problems(onnx.load(tmp_path / "model.onnx", load_external_data=False), config)
    routed = [one for one in parameters(config) if one.part == "expert" and len(one.shape) == 2]
    assert len(problems) == len(routed)


def test_poison_really_replaces_weights_in_the_graph(tiny_bundle: Path) -> None:
    """The law would hold of any graph if overriding weights did nothing."""
    session = OnnxSession(tiny_bundle / "model.onnx", TINY)
    alone = scenarios(TINY)[0]
    for parameter in (one for one in parameters(TINY) if one.modality == "text"):
        nothing = {parameter.name: np.full(parameter.shape, np.nan, np.float32)}
        poisoned = OnnxSession(tiny_bundle / "model.onnx", TINY, overrides=nothing)
        assert any(np.isnan(one.logits).any() for one in observe(poisoned, alone)), parameter.name
        poisoned.close()
    assert all(np.isfinite(one.logits).all() for one in observe(session, alone))


def test_swapped_experts_and_a_flipped_mask_give_the_same(make_checkpoint: MakeCheckpoint) -> None:
    checkpoint = make_checkpoint(EQUAL)
    finding = swap_finding(torch_session(checkpoint), TorchReplacement(checkpoint))
    assert finding.outcome is Outcome.PASS


def test_swapping_sees_a_mask_that_is_not_read(make_checkpoint: MakeCheckpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = make_checkpoint(EQUAL)
    unread = staticmethod(lambda mask, count: Gathered.by(torch.zeros_like(mask), count))
    monkeypatch.setattr(Decoder, "route", unread)
    finding = swap_finding(torch_session(checkpoint), TorchReplacement(checkpoint))
    assert finding.outcome is Outcome.FAIL


def test_the_swap_of_three_modalities_feeds_both_that_are_swapped(make_checkpoint: MakeCheckpoint) -> None:
    """Weights that were not swapped at all must be seen, which a row without either modality would not do."""
    config = EQUAL.replace(modalities=(*EQUAL.modalities, replace(EQUAL.modalities[1], name="picture")))
    checkpoint = make_checkpoint(config)
    session = torch_session(checkpoint)
    assert swap_finding(session, TorchReplacement(checkpoint)).outcome is Outcome.PASS
    assert swap_finding(session, Unreplaced(checkpoint)).outcome is Outcome.FAIL


def test_experts_of_two_kinds_can_not_be_swapped_and_it_is_said(tiny_checkpoint: Path) -> None:
    finding = swap_finding(torch_session(tiny_checkpoint), TorchReplacement(tiny_checkpoint))
    assert finding.outcome is Outcome.SKIPPED and "text and audio" in finding.detail


# P4: the graph computes something else than the reference.


def swap_experts(model: onnx.ModelProto) -> None:
    for one in parameters(EQUAL):
        if one.part == "expert" and one.modality == "text":
            swap_weights(model, one.name, one.name.replace(".text.", ".audio."))


def flip(model: onnx.ModelProto, mask: str) -> None:
    """1 - mask, before anything reads it."""
    for node in model.graph.node:
        node.input[:] = ["flipped" if name == mask else name for name in node.input]
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.array(1, np.int64), "one"))
    model.graph.node.insert(0, onnx.helper.make_node("Sub", ["one", mask], ["flipped"]))


def set_attribute(op_type: str, name: str, value: float | int) -> Plant:
    def plant(model: onnx.ModelProto) -> None:
        found = [one for node in nodes(model, op_type) for one in node.attribute if one.name == name]
        assert found
        for one in found:
            one.CopyFrom(onnx.helper.make_attribute(name, value))

    return plant


def change_weight(name: str, change: Callable[[Any], Any]) -> Plant:
    return lambda model: set_weight(model, name, change(weight(model, name)).astype(np.float32))


def rotate_by_another_theta(model: onnx.ModelProto) -> None:
    tables = rope_tables(RopeConfig(theta=450000.0), TINY.head_size, TINY.max_seq_len, torch.float32)
    for name, table in zip(("rope_cos", "rope_sin"), tables, strict=True):
        set_weight(model, name, table.numpy())


def swap_keys_and_values(model: onnx.ModelProto) -> None:
    swap_weights(model, "layers.1.attention.wk.text.weight", "layers.1.attention.wv.text.weight")


def hide_the_newest_key(model: onnx.ModelProto) -> None:
    for node in nodes(model, "LessOrEqual"):
        node.op_type = "Less"


def write_one_place_back(model: onnx.ModelProto) -> None:
    """The keys of layer 1 overwrite the newest slot: a cache off by one, and a stale slot where they should be."""
    scatter = next(node for node in nodes(model, "TensorScatter") if node.input[0] == "past_key.1")
    scatter.input[2] = "behind"
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.array(1, np.int64), "one"))
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.array(0, np.int64), "zero"))
    model.graph.node.insert(0, onnx.helper.make_node("Sub", ["cache_position", "one"], ["before"]))
    model.graph.node.insert(1, onnx.helper.make_node("Max", ["before", "zero"], ["behind"]))


def roll_rows(value: Any) -> Any:
    return np.roll(value, 1, axis=0)


def without_first(value: Any) -> Any:
    return value * (np.arange(len(value)) > 0)


def to_half_and_back(value: Any) -> Any:
    return value.astype(np.float16)


AUDIO = "layers.1.feed_forward.audio."

P4_FAULTS: dict[str, tuple[ModelConfig, Plant]] = {
    "experts swapped between modalities": (EQUAL, swap_experts),
    "experts' mask flipped": (EQUAL, lambda model: flip(model, "modality_mask")),
    "head's mask flipped": (TINY, lambda model: flip(model, "head_mask")),
    "wrong rotation": (TINY, set_attribute("RotaryEmbedding", "interleaved", 0)),
    "wrong theta": (TINY, rotate_by_another_theta),
    "transposed weight": (TINY, transpose_weight),
    "permuted weight": (TINY, change_weight("layers.0.attention.wq.audio.weight", lambda value: value[::-1])),
    "text head shifted by one id": (TINY, change_weight("output.text.weight", roll_rows)),
    "audio head shifted by one id": (TINY, change_weight("output.audio.weight", roll_rows)),
    "embedding shifted by one id": (TINY, change_weight("tok_embeddings.weight", roll_rows)),
    "one layer's bias dropped": (TINY, change_weight(AUDIO + "fc1.bias", np.zeros_like)),
    "one value of one bias dropped": (
        TINY,
        change_weight(AUDIO + "fc2.bias", without_first),
    ),
    "another epsilon": (TINY, set_attribute("RMSNormalization", "epsilon", 1e-4)),
    "one norm left out": (TINY, change_weight("layers.1.ffn_norm.weight", np.ones_like)),
    "approximate GELU": (TINY, set_attribute("Gelu", "approximate", "tanh")),  # type: ignore[arg-type]
    "attention scaled otherwise": (TINY, set_attribute("Attention", "scale", 0.251)),
    "keys and values swapped": (TINY, swap_keys_and_values),
    "newest key hidden": (TINY, hide_the_newest_key),
    "cache off by one, a stale slot": (TINY, write_one_place_back),
    "one weight rounded to half": (TINY, change_weight("layers.0.feed_forward.text.w2.weight", to_half_and_back)),
    "one weight not a number": (TINY, change_weight("layers.0.attention.wv.text.weight", lambda value: value * np.nan)),
}


@pytest.fixture(scope="module")
def expected(make_checkpoint: MakeCheckpoint) -> Callable[[ModelConfig], Expectation]:
    """What the float64 reference says, asked once for each configuration."""
    made: dict[str, Expectation] = {}

    def of(config: ModelConfig) -> Expectation:
        key = config.to_json()
        if key not in made:
            made[key] = ask(torch_session(make_checkpoint(config), "fp64"))
        return made[key]

    return of


Expected = Callable[[ModelConfig], Expectation]


@pytest.mark.parametrize("name", P4_FAULTS)
def test_p4_sees(name: str, expected: Expected, make_bundle: MakeBundle, tmp_path: Path) -> None:
    config, plant = P4_FAULTS[name]
    model = load_whole(make_bundle(config))
    plant(model)
    with OnnxSession(save_whole(model, tmp_path), config) as session:
        findings = agreement_findings(session, compare(session, expected(config).scenarios, expected(config).limits))
    assert failed(findings)


@pytest.mark.parametrize("config", [TINY, EQUAL], ids=["tiny", "equal"])
def test_p4_and_p5_have_nothing_to_say_of_a_good_graph(
    config: ModelConfig, expected: Expected, make_bundle: MakeBundle, tmp_path: Path
) -> None:
    """Written through the same two functions as the faults: these alone do no harm."""
    with OnnxSession(save_whole(load_whole(make_bundle(config)), tmp_path), config) as session:
        assert passed(agreement_findings(session, compare(session, expected(config).scenarios, expected(config).limits)))
        assert passed(generation_findings(session, expected(config).plans, 1e-6))


def test_p4_names_scenario_row_and_position(expected: Expected, make_bundle: MakeBundle, tmp_path: Path) -> None:
    model = load_whole(make_bundle(TINY))
    change_weight("output.audio.weight", roll_rows)(model)
    with OnnxSession(save_whole(model, tmp_path), TINY) as session:
        findings = agreement_findings(session, compare(session, expected(TINY).scenarios, expected(TINY).limits))
    assert failed(findings) == {one.question for one in findings if one.question.startswith("audio")}
    assert all("row" in one.detail and "position" in one.detail for one in findings if one.outcome is Outcome.FAIL)


def test_p4_fails_where_the_reference_itself_is_not_a_number(expected: Expected, tiny_bundle: Path) -> None:
    """NaN compares false with everything: a worst value found by max would pass it by."""
    spoilt = [
        (scenario, [replace(one, logits=one.logits * np.nan) if number == 3 else one for number, one in enumerate(said)])
        for scenario, said in expected(TINY).scenarios
    ]
    with OnnxSession(tiny_bundle / "model.onnx", TINY) as session:
        assert failed(agreement_findings(session, compare(session, spoilt, expected(TINY).limits)))


# P5: tokens.


class FaultyLate(TorchSession):
    """Right until row 0 holds 36 positions."""

    def execute(self, inputs: StepInputs, cache: KVCache) -> Logits:
        logits = super().execute(inputs, cache)
        return np.where(np.isfinite(logits), -logits, logits) if inputs.cache_position[0] >= 36 else logits


def test_p5_sees_a_fault_in_late_steps_alone(expected: Expected, tiny_checkpoint: Path) -> None:
    plans = expected(TINY).plans
    assert passed(generation_findings(torch_session(tiny_checkpoint), plans, 1e-6))
    findings = generation_findings(torch_session(tiny_checkpoint, kind=FaultyLate), plans, 1e-6)
    assert len(failed(findings)) == len(plans)
    assert all(one.figures["matched"] == 25 for one in findings)


@dataclass(frozen=True)
class Tie:
    """How sure the reference was of the token that differs, and what follows."""

    margin: float
    outcome: Outcome


@pytest.mark.parametrize("tie", [Tie(5.9e-6, Outcome.AMBIGUOUS), Tie(6.1e-6, Outcome.FAIL), Tie(1.0, Outcome.FAIL)], ids=str)
def test_p5_tells_a_near_tie_from_a_fault(tie: Tie, expected: Expected, tiny_checkpoint: Path) -> None:
    (plan, said), *_ = expected(TINY).plans
    margins, tokens = list(said.margins), list(said.tokens)
    margins[7], tokens[7] = tie.margin, tokens[7] + 1
    (finding,) = generation_findings(torch_session(tiny_checkpoint), [(plan, Greedy(tokens, margins, said.rms))], 1e-6)
    assert finding.outcome is tie.outcome
    assert finding.figures["matched"] == 7


@pytest.mark.parametrize("cut", [1, -1])
def test_p5_fails_where_more_or_fewer_tokens_came(cut: int, expected: Expected, tiny_checkpoint: Path) -> None:
    (plan, said), *_ = expected(TINY).plans
    longer = Greedy([*said.tokens, 0], [*said.margins, 0.0], said.rms)
    shorter = Greedy(said.tokens[:-1], said.margins[:-1], said.rms)
    (finding,) = generation_findings(torch_session(tiny_checkpoint), [(plan, longer if cut > 0 else shorter)], 1e-6)
    assert finding.outcome is Outcome.FAIL


def test_p5_fails_where_no_id_can_be_chosen(expected: Expected, tiny_checkpoint: Path) -> None:
    plans = expected(TINY).plans
    assert len(failed(generation_findings(torch_session(tiny_checkpoint, kind=SaysNaN), plans, 1e-6))) == len(plans)


def test_p5_fails_where_noise_is_not_a_number(expected: Expected, tiny_checkpoint: Path) -> None:
    (plan, said), *_ = expected(TINY).plans
    other = Greedy([said.tokens[0] + 1, *said.tokens[1:]], said.margins, said.rms)
    (finding,) = generation_findings(torch_session(tiny_checkpoint), [(plan, other)], float("nan"))
    assert finding.outcome is Outcome.FAIL


def test_the_checks_of_an_export_accept_what_the_faults_were_planted_in(make_bundle: MakeBundle, tmp_path: Path) -> None:
    assert check_onnx(save_whole(load_whole(make_bundle(TINY)), tmp_path), TINY, "float32")["Attention"] == TINY.num_layers
