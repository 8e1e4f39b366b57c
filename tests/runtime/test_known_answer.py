"""A session that answers otherwise than the bundle knows is refused, and no right one ever is."""

import json
import logging
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from motrt import cli
from motrt.cli import main
from motrt.errors import BundleError, InputError, ParityError
from motrt.model_def.config import Modality, ModelConfig, SwigluExpert
from motrt.runtime import load as loading
from motrt.runtime import versions
from motrt.runtime.bundle import MANIFEST_FILE, open_bundle
from motrt.runtime.known_answer import (
    MOST_ROWS,
    MOST_STEPS,
    NUM_STORED_IDS,
    KnownAnswer,
    Question,
    allowed,
    ask,
    check_answer,
    differences,
)
from motrt.runtime.kv_cache import KVCache
from motrt.runtime.load import CHECKS, load
from motrt.runtime.session import Logits, Session
from motrt.runtime.step_inputs import StepInputs
from motrt.runtime.versions import installed_versions, version_differences
from motrt.tests.runtime.test_bundle import rewrite

MakeBundle = Callable[..., Path]

TINY = ModelConfig.tiny()
TEXT, AUDIO = TINY.id_ranges


@pytest.fixture(scope="module")
def answer(tiny_bundle: Path) -> KnownAnswer:
    known = open_bundle(tiny_bundle).manifest.answer
    assert known is not None
    return known


# What is asked.


def named(config: ModelConfig, ids: tuple[int, ...]) -> list[str]:
    return [config.modality_names[config.modality_of(token)] for token in ids]


def test_every_modality_is_read_and_rows_are_of_different_lengths() -> None:
    question = Question.usual(TINY)
    assert all(set(named(TINY, row)) == {"text", "audio"} for row in question.prompts)
    assert len({len(row) for row in question.prompts}) == 2
    assert {TEXT.start, TEXT.stop - 1, AUDIO.start, AUDIO.stop - 1} <= set(question.prompts[0])


def test_every_pair_of_a_modality_read_and_one_predicted_occurs_in_steps_and_those_that_stay_twice() -> None:
    question = Question.usual(TINY)
    pairs = [
        pair
        for step, names in zip(question.steps, question.predicted[1:], strict=True)
        for pair in zip(named(TINY, step), names, strict=True)
    ]
    assert set(pairs) == {(here, there) for here in TINY.modality_names for there in TINY.modality_names}
    assert all(pairs.count((name, name)) >= 2 for name in TINY.modality_names)
    assert {len(set(names)) for names in question.predicted} == {1, 2}  # the rows predict the same, and not the same


def test_what_is_fed_next_is_of_the_modality_that_was_predicted() -> None:
    question = Question.usual(TINY)
    assert [tuple(named(TINY, step)) for step in question.steps] == list(question.predicted[:-1])


@pytest.mark.parametrize("count", [1, 2, 3, 7, 30])
@pytest.mark.parametrize("length", [1, 2, 3, 4, 5, 9, 40, 4096])
def test_the_question_fits_models_of_any_length_and_number_of_modalities(count: int, length: int) -> None:
    config = TINY.replace(
        modalities=tuple(Modality(f"m{number}", 1 + number, SwigluExpert(8)) for number in range(count)), max_seq_len=length
    )
    question = Question.usual(config)
    assert question.problems_of(config) == []
    assert len(question.steps) == min(max(3, 2 * count), 8, length // 2)


# Right sessions.


@pytest.mark.parametrize("backend", ["auto", "onnxruntime", "torch"])
@pytest.mark.parametrize("num_threads", [1, 2])
def test_the_right_build_is_let_in(backend: str, num_threads: int, tiny_bundle: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO), load(tiny_bundle, backend, "answer", num_threads) as session:
        assert len(list(session.generate([1, 2, 3], max_tokens=2))) == 2
    assert "known answer of" in caplog.text


def test_the_answer_is_what_the_reference_says(answer: KnownAnswer, reference: Session) -> None:
    """By steps, in float64: its own way to the same numbers."""
    assert max(one.error for one in differences(reference, answer)) < 1e-14


def test_rows_are_asked_together_and_alone_as_far_as_the_session_takes_them(answer: KnownAnswer, onnx: Session) -> None:
    passes = len(answer.question.steps) + 1
    asked = {(one.row, one.step, one.is_alone) for one in differences(onnx, answer)}
    assert asked == {(row, step, alone) for row in (0, 1) for step in range(passes) for alone in (True, False)}
    single = replaced(onnx, most_rows=1)
    assert {one.is_alone for one in differences(single, answer)} == {True}


# Wrong sessions.


class Spoilt(Session):
    """Another session, whose logits go through ``spoil(logits, inputs, batch size)``."""

    def __init__(self, inner: Session, spoil: Callable[[Logits, StepInputs, int], Logits]) -> None:
        self.inner, self.spoil, self.most_rows = inner, spoil, inner.most_rows
        self.config, self.backend, self.precision = inner.config, inner.backend, inner.precision

    def make_buffers(self, batch_size: int, capacity: int) -> Any:
        return self.inner.make_buffers(batch_size, capacity)

    def grow_buffers(self, buffers: Any, capacity: int) -> Any:
        return self.inner.grow_buffers(buffers, capacity)

    def execute(self, inputs: StepInputs, cache: KVCache) -> Logits:
        return self.spoil(self.inner.execute(inputs, cache), inputs, cache.batch_size)

    def release(self) -> None:
        """The other one stays open."""


def replaced(inner: Session, **attributes: Any) -> Session:
    session = Spoilt(inner, lambda logits, *_: logits)
    for name, value in attributes.items():
        setattr(session, name, value)
    return session


def noisy(size: float) -> Callable[[Logits, StepInputs, int], Logits]:
    chance = np.random.default_rng(0)

    def spoil(logits: Logits, *_: Any) -> Logits:
        errors = size * chance.standard_normal(logits.shape)
        spoilt: Logits = logits * (1 + errors).astype(np.float32)
        return spoilt

    return spoil


def in_single_steps(change: Callable[[Logits], Logits]) -> Callable[[Logits, StepInputs, int], Logits]:
    def spoil(logits: Logits, inputs: StepInputs, rows: int) -> Logits:
        return change(logits) if rows == 1 and inputs.input_ids.shape[1] == 1 else logits

    return spoil


def in_batches(change: Callable[[Logits], Logits]) -> Callable[[Logits, StepInputs, int], Logits]:
    return lambda logits, inputs, rows: change(logits) if rows > 1 else logits


def on_ids(ids: range, change: Callable[[Logits], Logits]) -> Callable[[Logits, StepInputs, int], Logits]:
    def spoil(logits: Logits, *_: Any) -> Logits:
        spoilt: Logits = logits.copy()
        spoilt[:, ids.start : ids.stop] = change(logits[:, ids.start : ids.stop])
        return spoilt

    return spoil


def leaking(logits: Logits, inputs: StepInputs, rows: int) -> Logits:
    spoilt: Logits = logits.copy()
    spoilt[:, -1] = np.where(np.isneginf(spoilt[:, -1]), -40.0, spoilt[:, -1])
    return spoilt


SPOILT: dict[str, Callable[[Logits, StepInputs, int], Logits]] = {
    "off by a hundredth": noisy(1e-2),
    "off by ten times what is allowed": noisy(5e-5),
    "all of them a little too large": lambda logits, *_: np.float32(1.0001) * logits,
    "shifted by one id": lambda logits, *_: np.roll(logits, 1, axis=1),
    "wrong in steps of one row alone": in_single_steps(lambda logits: np.float32(1.01) * logits),
    "wrong in batches alone": in_batches(lambda logits: np.float32(1.01) * logits),
    "rows of a batch mixed up": in_batches(lambda logits: logits[::-1].copy()),
    "not a number": lambda logits, *_: logits * np.float32(np.nan),
    "not a number in one place that is not stored": on_ids(range(2, 3), lambda logits: logits * np.float32(np.nan)),
    "ids that are not stored are wrong": on_ids(range(4, 6), lambda logits: np.float32(3) * logits),
    "an id of another modality is let through": leaking,
}


@pytest.mark.parametrize("name", SPOILT)
def test_a_wrong_session_is_refused(name: str, answer: KnownAnswer, onnx: Session) -> None:
    with pytest.raises(ParityError, match="does not give the known answer of this bundle, so it is refused"):
        check_answer(Spoilt(onnx, SPOILT[name]), answer, {})


def test_what_the_limit_allows_is_let_in(answer: KnownAnswer, onnx: Session) -> None:
    smallest = min(allowed(onnx, answer, row, step) for step, rows in enumerate(answer.noise) for row in range(len(rows)))
    check_answer(Spoilt(onnx, noisy(smallest / 3)), answer, {})
    with pytest.raises(ParityError):
        check_answer(Spoilt(onnx, noisy(20 * smallest)), answer, {})


def test_a_row_that_rounding_moves_further_is_allowed_as_much_more(answer: KnownAnswer, onnx: Session) -> None:
    def with_noise(value: float) -> KnownAnswer:
        return replace(answer, noise=tuple(tuple(value for _ in rows) for rows in answer.noise))

    session = Spoilt(onnx, noisy(1e-3))
    check_answer(session, with_noise(1e-3), {})
    with pytest.raises(ParityError):
        check_answer(session, with_noise(1e-5), {})
    with pytest.raises(ParityError):  # one row alone is not
        first, *others = with_noise(1e-3).noise
        check_answer(session, replace(answer, noise=((1e-5, *first[1:]), *others)), {})


def test_the_refusal_says_how_much_where_and_what_to_do(answer: KnownAnswer, onnx: Session) -> None:
    spoil = in_single_steps(lambda logits: np.float32(1.25) * logits)
    made_with = {**installed_versions(), "numpy": "1.0.0"}
    with pytest.raises(ParityError) as caught:
        check_answer(Spoilt(onnx, spoil), answer, made_with)
    said = str(caught.value)
    place = r"(text|audio) after step [1-4] of row [01], fed alone: relative error 0\.25, where \d\.\d+e-06 is allowed"
    assert re.search(place + "; 8 of 20 rows of logits are beyond it", said)
    assert f"numpy {np.__version__} runs here, 1.0.0 made the bundle" in said
    assert "`motrt verify`" in said and "export it again" in said
    report = json.loads(json.dumps(caught.value.report, allow_nan=False))
    assert (report["verdict"], report["backend"], len(report["differences"])) == ("FAIL", "onnxruntime (CPU)", 20)
    assert report["versions"]["made_with"]["numpy"] == "1.0.0"


def test_where_all_versions_are_the_same_the_machine_is_suspected(answer: KnownAnswer, onnx: Session) -> None:
    with pytest.raises(ParityError, match="every version is the one that made the bundle: look at its files") as caught:
        check_answer(Spoilt(onnx, SPOILT["not a number"]), answer, installed_versions())
    json.dumps(caught.value.report, allow_nan=False)


def test_load_closes_what_it_refuses(bundle_copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[Spoilt] = []

    def open_wrong(*arguments: Any) -> Session:
        opened.append(Spoilt(loading.onnx_session(arguments[0]), noisy(1e-2)))
        return opened[-1]

    monkeypatch.setattr(loading, "open_session", open_wrong)
    with pytest.raises(ParityError):
        load(bundle_copy, check="answer")
    assert opened[0]._is_closed
    opened[0].inner.close()
    load(bundle_copy, check="hash").close()  # nobody asked


def test_weights_that_were_changed_after_the_export_are_heard(bundle_copy: Path) -> None:
    data = bundle_copy / "model.onnx.data"
    values = np.fromfile(data, np.float32)
    values[: len(values) // 2] *= np.float32(1.001)
    values.tofile(data)
    load(bundle_copy).close()  # its size is right
    with pytest.raises(ParityError, match=r"look at its files \(check='hash'\)"):
        load(bundle_copy, check="answer")


def flip(bundle: Path) -> None:
    """One bit of one weight, which the question does not hear."""
    data = bundle / "model.onnx.data"
    held = bytearray(data.read_bytes())
    held[0] ^= 1
    data.write_bytes(bytes(held))


@pytest.mark.parametrize(
    "check", ["hash,answer", "answer, hash", ("hash", "answer"), ["answer", "hash", "size"], {"answer", "hash"}]
)
def test_hash_and_answer_are_asked_for_together_and_each_refuses(check: Any, tiny_bundle: Path, bundle_copy: Path) -> None:
    load(tiny_bundle, check=check).close()
    rewrite(bundle_copy, lambda values: values["answer"]["logits"][0][0].__setitem__(0, 3.0))
    with pytest.raises(ParityError):
        load(bundle_copy, check=check)
    rewrite(bundle_copy, lambda values: values.__setitem__("answer", json.loads(read_manifest(tiny_bundle))["answer"]))
    load(bundle_copy, check=check).close()
    flip(bundle_copy)
    load(bundle_copy, check="answer").close()  # which is why the other is there
    with pytest.raises(BundleError, match="hash"):
        load(bundle_copy, check=check)


def read_manifest(bundle: Path) -> str:
    return (bundle / "manifest.json").read_text(encoding="utf-8")


@pytest.mark.parametrize("checks", [("hash",), ("hash", "answer"), ("answer", "hash")])
def test_generate_asks_for_both_where_both_are_named(checks: tuple[str, ...], bundle_copy: Path) -> None:
    command = ["generate", str(bundle_copy), "--prompt-ids", "1,2,3", "--max-tokens", "2", "--json"]
    command += [word for one in checks for word in ("--check", one)]
    assert CliRunner().invoke(main, command).exit_code == 0
    flip(bundle_copy)
    assert CliRunner().invoke(main, [*command[:7], "--check", "answer"]).exit_code == 0
    result = CliRunner().invoke(main, command)
    assert result.exit_code == 1 and json.loads(result.stdout)["error"] == "BundleError"


# Where there is no answer.


def test_a_bundle_of_an_older_version_has_none_and_says_so(bundle_copy: Path) -> None:
    rewrite(bundle_copy, lambda values: values.pop("answer"))
    assert open_bundle(bundle_copy, "hash").manifest.answer is None
    load(bundle_copy).close()
    with pytest.raises(BundleError, match=r"carries no known answer: it was exported by an older motrt.* Export it again"):
        load(bundle_copy, check="answer")


def test_a_checkpoint_has_none_and_says_so(tiny_checkpoint: Path) -> None:
    for backend in ("auto", "torch"):
        with pytest.raises(InputError, match="is a checkpoint, and bundles alone carry a known answer"):
            load(tiny_checkpoint, backend, check="answer")


def test_the_checkpoints_weights_are_not_asked_what_codes_say(make_bundle: MakeBundle) -> None:
    bundle = make_bundle(TINY, "int4")
    load(bundle, check="answer").close()
    with pytest.raises(InputError, match="holds the checkpoint's own weights, and the known answer is what the int4 weights"):
        load(bundle, "torch", check="answer")


# What manifests may say.


def set_at(*path: Any) -> Callable[[dict[str, Any], Any], None]:
    """Put a value into the answer of a manifest."""

    def put(values: dict[str, Any], value: Any) -> None:
        place = values["answer"]
        for step in path[:-1]:
            place = place[step]
        place[path[-1]] = value

    return put


ABSURD: dict[str, tuple[Callable[[dict[str, Any], Any], None], Any]] = {
    "a number": (lambda values, value: values.update(answer=value), 7),
    "false": (lambda values, value: values.update(answer=value), False),
    "a list": (lambda values, value: values.update(answer=value), []),
    "a word": (lambda values, value: values.update(answer=value), "42"),
    "nothing in it": (lambda values, value: values.update(answer=value), {}),
    "no prompts": (set_at("prompts"), []),
    "an empty prompt": (set_at("prompts", 0), []),
    "prompts that are numbers": (set_at("prompts"), [1, 2]),
    "prompts that are a word": (set_at("prompts"), "ab"),
    "too many prompts": (set_at("prompts"), [[1]] * (MOST_ROWS + 1)),
    "an endless prompt": (set_at("prompts", 0), [1] * 100_000),
    "endless steps": (set_at("steps"), [[1, 1]] * (MOST_STEPS + 1)),
    "more positions than the model has": (set_at("prompts", 0), [1] * 125),
    "an id beyond the vocabulary": (set_at("prompts", 0, 0), 128),
    "an id below zero": (set_at("steps", 0, 0), -1),
    "an id that is a fraction": (set_at("prompts", 0, 0), 1.5),
    "an id that is true": (set_at("prompts", 0, 0), True),
    "an id of a thousand digits": (set_at("prompts", 0, 0), 10**1000),
    "a step for another number of rows": (set_at("steps", 0), [1]),
    "too few steps": (set_at("steps"), []),
    "an unknown modality": (set_at("predicted", 0, 0), "smell"),
    "a modality that is a number": (set_at("predicted", 0, 0), 0),
    "predictions for another number of rows": (set_at("predicted", 0), ["text"]),
    "no ids of a modality": (set_at("ids"), {"text": list(range(32))}),
    "ids that are a number": (set_at("ids", "text"), 5),
    "no ids": (set_at("ids", "text"), []),
    "ids of another modality": (set_at("ids", "text", 31), 96),
    "ids that do not ascend": (set_at("ids", "text", 1), 0),
    "ids of an unknown modality": (set_at("ids", "smell"), [1]),
    "too many ids": (set_at("ids", "text"), list(range(10_000))),
    "a logit that is not a number": (set_at("logits", 0, 0, 0), float("nan")),
    "an infinite logit": (set_at("logits", 0, 0, 0), float("-inf")),
    "a logit of a thousand digits": (set_at("logits", 0, 0, 0), 10**1000),
    "a logit that is a word": (set_at("logits", 0, 0, 0), "1"),
    "a logit that is nothing": (set_at("logits", 0, 0, 0), None),
    "one logit too few": (lambda values, value: values["answer"]["logits"][0][0].pop(), None),
    "logits of one pass too few": (lambda values, value: values["answer"]["logits"].pop(), None),
    "logits that are a number": (set_at("logits"), 1.0),
    "a negative norm": (set_at("rms", 0, 0), -1.0),
    "a norm that is not a number": (set_at("rms", 0, 0), float("nan")),
    "one norm too few": (lambda values, value: values["answer"]["rms"][0].pop(), None),
    "no norms": (lambda values, value: values["answer"].pop("rms"), None),
    "noise wide enough for anything": (set_at("noise", 0, 0), 1e9),
    "noise that is not a number": (set_at("noise", 0, 0), float("nan")),
    "noise below zero": (set_at("noise", 0, 0), -0.1),
    "noise of one pass too few": (lambda values, value: values["answer"]["noise"].pop(), None),
    "noise that is a number": (set_at("noise"), 0.5),
    "rounding that is not a number": (set_at("rounding_loss"), [[float("nan")]]),
    "rounding of another number of rows": (set_at("rounding_loss"), [[0.1]]),
    "rounding that is a word": (set_at("rounding_loss"), "little"),
}


@pytest.mark.parametrize("name", ABSURD)
def test_an_absurd_answer_is_refused(name: str, bundle_copy: Path) -> None:
    put, value = ABSURD[name]
    rewrite(bundle_copy, lambda values: put(values, value))
    with pytest.raises(BundleError, match="export") as caught:
        open_bundle(bundle_copy)
    assert len(str(caught.value)) < 2000


def test_an_answer_read_back_is_the_same_and_is_small(answer: KnownAnswer, tiny_bundle: Path) -> None:
    assert KnownAnswer.from_dict(json.loads(json.dumps(answer.to_dict()))) == answer
    assert (tiny_bundle / MANIFEST_FILE).stat().st_size < 50_000


def test_no_more_ids_are_stored_than_needed_first_and_last_among_them(answer: KnownAnswer) -> None:
    assert {name: (len(ids), ids[0], ids[-1]) for name, ids in answer.ids.items()} == {
        "text": (NUM_STORED_IDS, TEXT.start, TEXT.stop - 1),
        "audio": (len(AUDIO), AUDIO.start, AUDIO.stop - 1),
    }


def test_logits_that_are_all_zero_are_an_answer(onnx: Session) -> None:
    """Of rows that were never trained: 0 is then the only right logit."""
    question = Question.usual(TINY)
    silent = Spoilt(onnx, lambda logits, *_: np.where(np.isfinite(logits), np.float32(0), logits))
    answer = KnownAnswer.of(question, ask(silent, question), TINY, "nobody")
    check_answer(silent, answer, {})
    with pytest.raises(ParityError):
        check_answer(onnx, answer, {})


# Versions, and the command line.


def test_only_what_computes_here_in_another_version_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    here = {**installed_versions(), "onnxruntime": "1.30.0", "tensorrt": "not installed"}
    monkeypatch.setattr(versions, "installed_versions", lambda: here)
    assert version_differences(here) == []
    assert version_differences({**here, "onnxruntime": "1.32.0", "tensorrt": "10.13", "onnxscript": "0.1"}) == [
        "onnxruntime 1.30.0 runs here, 1.32.0 made the bundle"
    ]
    assert "onnxruntime 1.30.0 runs here, unknown made the bundle" in version_differences({})


def test_generate_checks_the_answer_where_it_is_told_to(bundle_copy: Path) -> None:
    assert tuple(cli.CHECKS) == CHECKS
    command = ["generate", str(bundle_copy), "--prompt-ids", "1,2,3", "--max-tokens", "2", "--check", "answer", "--json"]
    assert CliRunner().invoke(main, command).exit_code == 0
    rewrite(bundle_copy, lambda values: values["answer"]["logits"][0][0].__setitem__(0, 3.0))
    result = CliRunner().invoke(main, command)
    assert result.exit_code == 1
    assert "does not give the known answer" in result.stderr
    told = json.loads(result.stdout)
    assert told["error"] == "ParityError" and told["report"]["verdict"] == "FAIL"
