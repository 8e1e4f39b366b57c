"""The answer that exports store: the model's own, whatever it is made of; never a false alarm, and wrong builds are heard."""

import logging
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from motrt.errors import ParityError
from motrt.export.answer_from_weights import known_answer, said_in_groups
from motrt.export.bundle_from_checkpoint import export_bundle
from motrt.export.streamed_decoder import StreamedDecoder
from motrt.model_def.config import ModelConfig
from motrt.model_def.decoder import Decoder
from motrt.model_def.head_surgery import Read
from motrt.model_def.initialize import random_tensors
from motrt.model_def.parameters import parameters
from motrt.runtime.bundle import open_bundle
from motrt.runtime.known_answer import KnownAnswer, Question, allowed, check_answer, differences
from motrt.runtime.load import load
from motrt.runtime.onnx_session import OnnxSession
from motrt.runtime.session import Session
from motrt.runtime.tolerances import LARGEST_NOISE, expected_noise, limit_of
from motrt.runtime.torch_session import TorchSession
from motrt.tests.export.models import (
    EQUAL,
    ONE,
    THREE,
    TIED,
    TINY,
    load_whole,
    save_whole,
    torch_session,
    write_random,
)
from motrt.tests.export.test_parity_faults import (
    P4_FAULTS,
    OffByOneInDecode,
    RowsMixed,
    SaysNaN,
    StaleRow,
)

MakeCheckpoint = Callable[[ModelConfig], Path]
MakeBundle = Callable[..., Path]

CONFIGS = {
    "tiny": TINY,
    "one": ONE,
    "three": THREE,
    "tied": TIED,
    "equal": EQUAL,
    "shared": TINY.replace(head="shared"),
    "half rotation": TINY.replace(rope=replace(TINY.rope, style="half")),
}


def weights_of(config: ModelConfig, seed: int = 0) -> Read:
    return dict(random_tensors(config, seed)).__getitem__


def answer_to(config: ModelConfig, read: Read, precision: str = "fp32") -> KnownAnswer:
    answer = known_answer(config, read, precision)
    assert answer is not None
    return answer


def worst(session: Session, answer: KnownAnswer) -> float:
    return max(one.error for one in differences(session, answer))


def session_of(config: ModelConfig, read: Read, dtype: torch.dtype) -> TorchSession:
    return TorchSession(Decoder.from_tensors(config, read, dtype))


def stored(bundle: Path) -> KnownAnswer:
    answer = open_bundle(bundle).manifest.answer
    assert answer is not None
    return answer


# The answer.


@pytest.mark.parametrize("name", CONFIGS)
def test_one_pass_with_weights_on_the_disk_is_what_the_decoder_says_step_by_step(name: str) -> None:
    config, read = CONFIGS[name], weights_of(CONFIGS[name])
    answer = answer_to(config, read)
    assert answer.problems_of(config) == []
    assert worst(session_of(config, read, torch.float64), answer) < 1e-14
    assert 0 < worst(session_of(config, read, torch.float32), answer) < limit_of(session_of(config, read, torch.float32))


@pytest.mark.parametrize("length", [1, 2, 3, 4, 5, 6, 9, 11])
@pytest.mark.parametrize("name", ["tiny", "one", "three"])
def test_models_of_few_positions_have_an_answer(name: str, length: int) -> None:
    config = CONFIGS[name].replace(max_seq_len=length)
    read = weights_of(config)
    for dtype in (torch.float32, torch.float16):
        session = session_of(config, read, dtype)
        check_answer(session, answer_to(config, read, session.precision), {})


@pytest.mark.parametrize("name", CONFIGS)
def test_the_errors_that_are_added_reach_their_own_groups_alone(name: str) -> None:
    config, read = CONFIGS[name], weights_of(CONFIGS[name])
    question = Question.usual(config)
    blocks = {one.name: 16 for one in parameters(config) if len(one.shape) == 2 and one.part != "embedding"}
    plain = said_in_groups(TorchSession(StreamedDecoder(config, read, torch.float64)), question, 1)
    disturbed = said_in_groups(TorchSession(StreamedDecoder(config, read, torch.float64, 1e-3, 4, blocks)), question, 4)
    for parts in zip(*plain, *disturbed, strict=True):
        expected, first, second, third, rounded = (torch.from_numpy(one).nan_to_num(neginf=0.0) for one in parts)
        assert 1e-4 < float((third - expected).norm() / expected.norm()) < 1e-1
        for one, other in ((first, expected), (second, expected), (rounded, expected), (first, second)):
            assert 1e-4 < float((one - other).norm() / other.norm()) < 1e-1


@pytest.mark.parametrize("name", ["tiny", "one", "tied", "shared"])
def test_weights_are_read_once_and_let_go_of(name: str) -> None:
    config, source = CONFIGS[name], dict(random_tensors(CONFIGS[name], 0))
    alive: list[weakref.ref[torch.Tensor]] = []
    counted: list[int] = []
    most = 0

    def read(weight: str) -> torch.Tensor:
        nonlocal most
        most = max(most, sum(one() is not None for one in alive))
        value = source[weight].clone()
        alive.append(weakref.ref(value))
        return value

    answer = known_answer(config, read, "fp32", on_weight=counted.append)
    assert answer is not None
    assert len(counted) == 2 * len(parameters(config)) and sum(counted) == 2 * sum(one.numel for one in parameters(config))
    assert most <= (2 if config.tied_embeddings else 1)  # a bias is read while its weight is held


def test_a_model_that_says_no_numbers_has_no_answer_and_it_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    for size in (1e35, float("inf"), float("nan")):
        source = dict(random_tensors(TINY, 0))
        source["output.text.weight"] = source["output.text.weight"] * size
        caplog.clear()
        with caplog.at_level(logging.WARNING, "motrt"):
            assert known_answer(TINY, source.__getitem__, "fp32") is None
        assert "no known answer, PyTorch itself gets no numbers" in caplog.text


# How much rounding is amplified.


@pytest.mark.parametrize("name", CONFIGS)
def test_the_noise_of_usual_models_is_what_the_formula_expects(name: str) -> None:
    noise = answer_to(CONFIGS[name], weights_of(CONFIGS[name])).noise
    expected = expected_noise(CONFIGS[name], "fp32")
    assert all(expected / 50 < value < expected for row in noise for value in row)


@pytest.mark.parametrize("seed", range(4))
def test_a_model_that_amplifies_rounding_is_known_and_not_taken_for_a_fault(seed: int) -> None:
    """Queries and keys eight times as large: attention jumps at little, and float32 is beyond the usual limit's formula."""
    source = dict(random_tensors(TINY, seed))
    large = {name: value * 8 if ".wq." in name or ".wk." in name else value for name, value in source.items()}
    read = large.__getitem__
    steep, flat = (max(max(row) for row in answer_to(TINY, one.__getitem__).noise) for one in (large, source))
    assert steep > 2.5 * flat
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        session = session_of(TINY, read, dtype)
        check_answer(session, answer_to(TINY, read, session.precision), {})


def test_a_model_whose_numbers_float32_cannot_hold_is_as_noisy_as_can_be() -> None:
    """The gate of an expert overflows, and what it is multiplied by is small: in float64 the logits are as usual."""
    source = {name: value.double() for name, value in random_tensors(TINY, 0)}
    source["layers.0.feed_forward.text.w1.weight"] *= 1e39
    source["layers.0.feed_forward.text.w2.weight"] *= 1e-39
    noise = answer_to(TINY, source.__getitem__).noise
    assert all(value == LARGEST_NOISE for row in noise[-2:] for value in row)


# No false alarm.


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8", "int4"])
def test_right_builds_of_many_models_are_all_let_in(precision: str, tmp_path: Path) -> None:
    config = TINY.replace(num_layers=1)
    for seed in range(20):
        export_bundle(write_random(tmp_path / f"m{seed}", config, seed), tmp_path / f"b{seed}", precision, verify=False)
        load(tmp_path / f"b{seed}", "onnxruntime", "answer", num_threads=1 + seed % 2).close()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["tiny", "one", "three", "tied"])
def test_right_sessions_of_any_precision_are_all_let_in(name: str, dtype: torch.dtype) -> None:
    for seed in range(20):
        read = weights_of(CONFIGS[name], seed)
        session = session_of(CONFIGS[name], read, dtype)
        check_answer(session, answer_to(CONFIGS[name], read, session.precision), {})


# Wrong builds.


@pytest.mark.parametrize("name", P4_FAULTS)
def test_a_graph_with_a_fault_is_refused(name: str, make_bundle: MakeBundle, tmp_path: Path) -> None:
    config, plant = P4_FAULTS[name]
    bundle = make_bundle(config)
    model = load_whole(bundle)
    plant(model)
    with OnnxSession(save_whole(model, tmp_path), config) as session, pytest.raises(ParityError):
        check_answer(session, stored(bundle), {})


@pytest.mark.parametrize("kind", [OffByOneInDecode, RowsMixed, SaysNaN, StaleRow])
def test_a_session_with_a_fault_is_refused(kind: type[TorchSession], tiny_checkpoint: Path, tiny_bundle: Path) -> None:
    check_answer(torch_session(tiny_checkpoint), stored(tiny_bundle), {})
    with pytest.raises(ParityError):
        check_answer(torch_session(tiny_checkpoint, kind=kind), stored(tiny_bundle), {})


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8", "int4"])
def test_the_weights_of_another_seed_are_refused(precision: str, make_bundle: MakeBundle, tmp_path: Path) -> None:
    export_bundle(write_random(tmp_path / "other", TINY, 1), tmp_path / "b", precision, verify=False)
    with load(tmp_path / "b") as session, pytest.raises(ParityError):
        check_answer(session, stored(make_bundle(TINY, precision)), {})


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_activations_of_8_bits_are_allowed_what_they_do_to_this_question_and_not_what_they_could(
    precision: str, make_bundle: MakeBundle
) -> None:
    answer = stored(make_bundle(TINY, precision))
    assert answer.rounding_loss is not None
    largest = max(max(row) for row in answer.rounding_loss)
    with load(make_bundle(TINY, precision)) as session:
        assert largest / 2 < worst(session, answer) < 2 * largest
        assert allowed(session, answer, 0, 0) == pytest.approx(4 * answer.rounding_loss[0][0], rel=1e-2)
        assert allowed(session, replace(answer, noise=()), 0, 0) == limit_of(session)
    assert stored(make_bundle(TINY)).rounding_loss is None


@pytest.mark.parametrize("precision", ["int8", "int4"])
@pytest.mark.parametrize(
    "fault", ["head's mask flipped", "wrong rotation", "newest key hidden", "cache off by one, a stale slot"]
)
def test_gross_faults_are_heard_through_activations_of_8_bits(
    fault: str, precision: str, make_bundle: MakeBundle, tmp_path: Path
) -> None:
    """What is smaller than a few times the rounding, the ladder alone can tell."""
    bundle = open_bundle(make_bundle(TINY, precision))
    model = load_whole(bundle.path)
    P4_FAULTS[fault][1](model)
    faulty = OnnxSession(save_whole(model, tmp_path), TINY, quantization=bundle.manifest.quantization)
    with faulty as session, pytest.raises(ParityError):
        check_answer(session, stored(bundle.path), {})
