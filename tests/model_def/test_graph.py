"""Plans name every graph a target needs, and each graph's signature and weights are the canonical ones less what it knows."""

import json
from dataclasses import replace

import pytest

from motrt.errors import ConfigError
from motrt.model_def.config import PRESETS, Modality, ModelConfig, SwigluExpert
from motrt.model_def.graph import CANONICAL, TARGETS, Graph, Target, plan_for
from motrt.model_def.parameters import parameters
from motrt.model_def.signature import CAPACITY, RANGE_LOGITS, Signature, TensorSpec

TINY = ModelConfig.tiny()
THREE = TINY.replace(modalities=(*TINY.modalities, Modality("picture", 17, SwigluExpert(24))))
ONE = TINY.replace(modalities=TINY.modalities[:1], head="shared")


def names(target: Target, config: ModelConfig) -> list[str]:
    return [graph.name for graph in plan_for(target, config)]


def test_each_target_has_the_graphs_it_needs() -> None:
    steps = ["decode.text", "decode.audio", "change.text.audio", "change.audio.text"]
    assert names("onnx", TINY) == []
    assert names("cuda", TINY) == [*steps, "decode.mixed"]
    assert names("cuda", ONE) == ["decode.text"]
    assert names("tensorrt", TINY) == names("tensorrt-rtx", TINY) == [*steps, "prefill"]


def test_there_is_a_step_from_every_modality_to_every_modality() -> None:
    for config, count in ((ONE, 1), (TINY, 2), (THREE, 3)):
        steps = [graph for graph in plan_for("cuda", config) if graph.is_step]
        assert {(one.tokens, one.predicts) for one in steps} == {(a, b) for a in range(count) for b in range(count)}
        assert len({one.name for one in steps}) == len(steps) == count**2


def test_onnxruntime_on_a_gpu_alone_is_given_steps_without_masks() -> None:
    masked = {target: {graph.masked for graph in plan_for(target, TINY)} for target in TARGETS}
    assert masked == {"onnx": set(), "cuda": {False}, "tensorrt": {True}, "tensorrt-rtx": {True}}


@pytest.mark.parametrize("target", ["tensorrt", "tensorrt-rtx"])
def test_what_is_compiled_knows_its_capacity_and_serves_everything(target: Target) -> None:
    assert all(graph.capacity == THREE.max_seq_len for graph in plan_for(target, THREE))
    assert [graph.routing for graph in plan_for(target, THREE) if not graph.is_step] == ["select"]


def test_the_canonical_signature_is_that_of_the_canonical_graph() -> None:
    assert Signature.of(CANONICAL, TINY, "float16") == Signature.canonical(TINY, "float16")


def test_a_graph_for_prompts_fixes_the_capacity_alone() -> None:
    canonical, fixed = Signature.canonical(TINY, "float16"), Signature.of(Graph("p", "select", capacity=99), TINY, "float16")
    for one, other in zip((*canonical.inputs, *canonical.outputs), (*fixed.inputs, *fixed.outputs), strict=True):
        assert other == TensorSpec(one.name, one.dtype, tuple(99 if dim == CAPACITY else dim for dim in one.dims))


def test_a_step_drops_what_it_knows_and_gives_its_range() -> None:
    signature = Signature.of(Graph("step", "fixed", 0, 1, 256), TINY, "float16")
    assert [str(one) for one in signature.inputs[:4]] == [
        "input_ids: int64[b, 1]",
        "cache_position: int64[b]",
        "past_key.0: float16[b, 2, 256, 16]",
        "past_value.0: float16[b, 2, 256, 16]",
    ]
    assert signature.logits == TensorSpec(RANGE_LOGITS, "float32", ("b", TINY.modalities[1].vocab_size))
    assert len(signature.inputs) == 2 + 2 * TINY.num_layers and len(signature.outputs) == 1 + 2 * TINY.num_layers


@pytest.mark.parametrize("here", range(3))
@pytest.mark.parametrize("there", range(3))
def test_a_step_reads_its_own_weights_and_the_head_of_what_it_predicts(here: int, there: int) -> None:
    read = Graph("step", "fixed", here, there).parameters(THREE)
    assert {one.modality for one in read if one.part in ("attention", "expert")} == {THREE.modality_names[here]}
    assert [one.modality for one in read if one.part == "head"] == [THREE.modality_names[there]]
    assert [one for one in parameters(THREE) if one.modality is None] == [one for one in read if one.modality is None]


def test_other_graphs_read_all_weights() -> None:
    assert CANONICAL.parameters(THREE) == Graph("p", "select").parameters(THREE) == parameters(THREE)


def test_an_audio_step_of_the_full_model_reads_a_third_of_a_text_step() -> None:
    config = PRESETS["llama-3.2-1b"]
    counts = {
        graph.name: sum(one.numel for one in graph.parameters(config) if one.part != "embedding")
        for graph in plan_for("cuda", config)
        if graph.tokens == graph.predicts
    }
    assert round(counts["decode.text"] / 1e6) == 1236 and round(counts["decode.audio"] / 1e6) == 373


@pytest.mark.parametrize("target", TARGETS)
def test_a_plan_comes_back_from_its_json(target: Target) -> None:
    for graph in plan_for(target, THREE):
        assert Graph.from_dict(json.loads(json.dumps(graph.to_dict())), THREE) == graph


def test_a_graph_of_another_model_is_refused() -> None:
    step = plan_for("cuda", TINY)[0]
    for graph in (replace(step, capacity=7), replace(step, name="../model"), replace(step, tokens=1)):
        with pytest.raises(ConfigError, match="no graph of this model"):
            Graph.from_dict(graph.to_dict(), TINY)
    with pytest.raises(ConfigError, match="no graph of this model"):
        Graph.from_dict({"name": "decode.text"}, TINY)
