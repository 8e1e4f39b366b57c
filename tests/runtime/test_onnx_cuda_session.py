"""onnxruntime on a GPU, as far as a CPU can tell: the same session with the host's memory for the device's."""

import ctypes
import gc
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest

from motrt.errors import BackendError
from motrt.export.bundle_from_checkpoint import export_bundle
from motrt.export.parity.agreement import agreement_findings, compare, noise_of
from motrt.export.parity.consistency import consistency_findings
from motrt.export.parity.findings import Outcome
from motrt.export.parity.gate import ask, climb_session
from motrt.export.parity.generation import generation_findings
from motrt.export.parity.routing_laws import law_findings
from motrt.export.steps import Steps
from motrt.export.verification import subject_of
from motrt.model_def.checkpoint.native import open_checkpoint
from motrt.model_def.config import ModelConfig
from motrt.model_def.graph import CANONICAL, Graph, plan_for
from motrt.model_def.parameters import parameters
from motrt.runtime import onnx_cuda_session
from motrt.runtime.bundle import open_bundle
from motrt.runtime.known_answer import check_answer
from motrt.runtime.kv_cache import KVCache
from motrt.runtime.onnx_cuda_session import MOST_IDLE, CudaOnnxSession, Lease
from motrt.runtime.session import Logits
from motrt.runtime.step_inputs import StepInputs
from motrt.tests.export.models import torch_session
from motrt.tests.runtime.host_kernels import COMPILER, KernelDevice

TINY, TINY64 = ModelConfig.tiny(), ModelConfig.preset("tiny64")
TEXT, AUDIO = list(range(5)), list(range(TINY.id_ranges[1].start, TINY.id_ranges[1].start + 5))
STEPS = plan_for("cuda", TINY)


class Copier:
    """Copies from device to device, where the device is the host."""

    def __init__(self) -> None:
        self.num_copied = self.num_finished = 0

    def copy(self, target: int, source: int, num_bytes: int) -> None:
        ctypes.memmove(target, source, num_bytes)
        self.num_copied += num_bytes

    def zero(self, address: int, num_bytes: int) -> None:
        ctypes.memset(address, 0, num_bytes)

    def finish(self) -> None:
        self.num_finished += 1

    def close(self) -> None:
        pass


class OnTheHost(CudaOnnxSession):
    """All of it but the GPU."""

    device, provider = "cpu", "CPUExecutionProvider"

    def _provider(self, graph: Graph) -> tuple[str, dict[str, str]]:
        self.asked = {**getattr(self, "asked", {}), graph.name: super()._provider(graph)[1]}
        return self.provider, {}

    def execute(self, inputs: StepInputs, cache: KVCache) -> Logits:
        """Logits on a GPU are copied to the host; here they would be the very memory that the next pass writes."""
        copied: Logits = super().execute(inputs, cache).copy()
        return copied


@pytest.fixture(scope="module")
def bundle(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("cuda") / "b"
    export_bundle(tiny_checkpoint, out, "fp32", verify=False, target="cuda")
    return out


def opened(bundle: Path, **options: Any) -> OnTheHost:
    shared = {"weights": open_bundle(bundle).manifest.shared_weights}
    return OnTheHost(bundle / "model.onnx", TINY, (*STEPS, CANONICAL), **(shared | options))


@pytest.mark.parametrize("records_steps", [True, False])
def test_the_whole_ladder_holds(records_steps: bool, bundle: Path, tiny_checkpoint: Path) -> None:
    expected = ask(torch_session(tiny_checkpoint, "fp64"))
    with opened(bundle, records_steps=records_steps) as session:
        compared = compare(session, expected.scenarios, expected.limits)
        findings = [
            *consistency_findings(session),
            *law_findings(session),
            *agreement_findings(session, compared),
            *generation_findings(session, expected.plans, noise_of(compared)),
        ]
        assert [one for one in findings if one.outcome not in (Outcome.PASS, Outcome.SKIPPED)] == []
        assert all(session.passes.values())


def test_a_cache_that_numpy_has_no_name_for_is_bound_by_its_address(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As bfloat16 is on a GPU: here float32, held as its bit patterns."""
    with opened(bundle) as session:
        expected = [step.token_id for step in session.generate([1, 2], max_tokens=8)]
    monkeypatch.setitem(onnx_cuda_session._STORED, "float32", np.uint32)
    monkeypatch.setitem(onnx_cuda_session._BOUND_AS, "float32", 1)
    with opened(bundle) as session:
        assert [step.token_id for step in session.generate([1, 2], max_tokens=8)] == expected
        caches = [session.prefill([prompt], "audio")[1] for prompt in (TEXT, AUDIO)]
        assert caches[0].buffers.held.buffers.values[0].numpy().dtype == np.uint32
        joined = session.join_rows([(cache, 0) for cache in caches])
        apart = [session.decode_step([AUDIO[0]], "audio", cache)[0] for cache in caches]
        for row, alone in zip(session.decode_step([AUDIO[0]] * 2, "audio", joined), apart, strict=True):
            np.testing.assert_allclose(row, alone, rtol=1e-4, atol=1e-5)


def test_the_known_answer_is_given_and_every_graph_asked(bundle: Path) -> None:
    manifest = open_bundle(bundle).manifest
    assert manifest.answer is not None
    with opened(bundle) as session:
        check_answer(session, manifest.answer, manifest.versions)
        assert all(session.passes.values())


def test_steps_alone_are_recorded_and_no_product_is_rounded_to_tf32(bundle: Path) -> None:
    with opened(bundle) as session:
        assert all(settings["use_tf32"] == "0" for settings in session.asked.values())
        recorded = {name for name, settings in session.asked.items() if settings.get("enable_cuda_graph") == "1"}
        assert recorded == {graph.name for graph in STEPS}
    with opened(bundle, records_steps=False) as session:
        assert not any("enable_cuda_graph" in settings for settings in session.asked.values())


def test_weights_are_on_the_device_once_and_every_graph_reads_them_there(bundle: Path) -> None:
    with opened(bundle) as session:
        assert session.shares == {graph.name: True for graph in (*STEPS, CANONICAL)}
        assert set(session._weights) == {one.name for one in parameters(TINY)}
        _, cache = session.prefill([TEXT], "text")
        before = [session.decode_step([1], "text", cache), session.prefill([TEXT], "text")[0]]
        norm = session._weights["norm.weight"].value  # a product's weights onnxruntime rearranges on a CPU, in copies
        norm.update_inplace(2 * norm.numpy())
        cache.lengths -= 1
        after = [session.decode_step([1], "text", cache), session.prefill([TEXT], "text")[0]]
        for one, other in zip(before, after, strict=True):
            np.testing.assert_allclose(other, 2 * one, rtol=1e-5)


def test_where_weights_can_not_be_shared_each_graph_holds_its_own(
    bundle: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with opened(bundle, weights=None) as session:
        assert not any(session.shares.values())
        expected = [step.token_id for step in session.generate([1, 2], max_tokens=6)]

    def refuse(value: Any) -> None:
        raise RuntimeError("lends nothing")

    monkeypatch.setattr(ort.OrtValue, "from_dlpack", refuse)
    with opened(bundle) as session:
        assert not any(session.shares.values()) and session._recorded == set(STEPS)
        assert [step.token_id for step in session.generate([1, 2], max_tokens=6)] == expected
    assert "lends nothing" in caplog.text


def test_it_says_which_operators_are_not_where_they_should_be(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with opened(bundle) as session:
        assert session.elsewhere == {graph.name: {} for graph in (*STEPS, CANONICAL)}
        loaded = session._loaded[CANONICAL]
        told = onnx_cuda_session._elsewhere(loaded.session, "CUDAExecutionProvider")
        assert told is not None and told["Attention"] == TINY.num_layers
        assert onnx_cuda_session._elsewhere(object(), "CUDAExecutionProvider") is None


def test_every_record_has_a_number_of_its_own_and_keeps_its_addresses(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    numbers: list[str] = []

    class Options(ort.RunOptions):  # type: ignore[misc]
        def add_run_config_entry(self, key: str, value: str) -> None:
            assert key == "gpu_graph_id"
            if value != "-1":  # a pass that is not recorded
                numbers.append(value)

    monkeypatch.setattr(ort, "RunOptions", Options)
    with opened(bundle) as session:
        caches = [session.prefill([prompt], "audio")[1] for prompt in (TEXT, AUDIO)]
        for token in AUDIO:
            for cache in caches:
                session.decode_step([token], "audio", cache)
        step = caches[0].buffers.held.steps[STEPS[1]]
        places = [value.data_ptr() for value in (*step.inputs.values(), step.logits)]
        session.decode_step([AUDIO[0]], "audio", caches[0])
        assert [value.data_ptr() for value in (*step.inputs.values(), step.logits)] == places
    assert numbers == ["1", "2"]


def test_rows_of_several_modalities_take_the_graph_for_them_where_every_row_is_wanted(bundle: Path) -> None:
    with opened(bundle) as session:
        _, cache = session.prefill([TEXT, AUDIO], ["text", "audio"])
        session.decode_step([TEXT[0], AUDIO[0]], ["audio", "text"], cache)
        assert session.passes["decode.mixed"] == 1
        position = np.array(cache.lengths)
        both, one = np.arange(2), np.array([1])
        ids, mask = np.array([[TEXT[1]], [AUDIO[1]]]), np.array([[0], [1]])
        whole = session.execute(StepInputs(ids, mask, position, both, mask[:, 0]), cache)
        part = session.execute(StepInputs(ids, mask, position, one, mask[one, 0]), cache)  # through the canonical graph
        assert session.passes["decode.mixed"] == 2
        np.testing.assert_allclose(part, whole[1:], rtol=1e-5, atol=1e-6)


def test_a_step_that_can_not_be_recorded_is_done_as_it_is(bundle: Path, caplog: pytest.LogCaptureFixture) -> None:
    class Refusing:
        """onnxruntime's session, where it can not record."""

        def __init__(self, session: Any) -> None:
            self.session = session

        def __getattr__(self, name: str) -> Any:
            return getattr(self.session, name)

        def run_with_iobinding(self, binding: Any, options: Any) -> None:
            if options.get_run_config_entry("gpu_graph_id") != "-1":
                raise RuntimeError("operation not permitted when stream is capturing")
            self.session.run_with_iobinding(binding, options)

    with opened(bundle) as session:
        expected = [step.token_id for step in session.generate([1, 2], max_tokens=6)]
    with opened(bundle) as session:
        loaded = session._loaded[STEPS[0]]
        session._loaded[STEPS[0]] = replace(loaded, session=Refusing(loaded.session))
        assert [step.token_id for step in session.generate([1, 2], max_tokens=6)] == expected
        assert STEPS[0] not in session._recorded and STEPS[1] in session._recorded
        # Another batch has a record of its own, which can fail though others did not.
        _, one = session.prefill([TEXT], "audio")
        session.decode_step([AUDIO[0]], "audio", one)
        loaded = session._loaded[STEPS[1]]
        session._loaded[STEPS[1]] = replace(loaded, session=Refusing(loaded.session))
        _, two = session.prefill([TEXT, TEXT], "audio")
        session.decode_step([AUDIO[0]] * 2, "audio", two)
        assert STEPS[1] not in session._recorded and STEPS[1] not in two.buffers.held.steps
    assert "decode.text are not recorded as a CUDA graph" in caplog.text


def test_which_kernels_attention_takes_can_be_said(bundle: Path) -> None:
    with opened(bundle, attention_kernels=1) as session:
        assert all(settings["sdpa_kernel"] == "1" for settings in session.asked.values())
    with opened(bundle) as session:
        assert not any("sdpa_kernel" in settings for settings in session.asked.values())


def test_a_stream_of_the_caller_is_computed_on(bundle: Path) -> None:
    with opened(bundle, stream=4711) as session:
        assert all(settings["user_compute_stream"] == "4711" for settings in session.asked.values())
    with opened(bundle) as session:
        assert not any("user_compute_stream" in settings for settings in session.asked.values())


@pytest.mark.parametrize("copies", [True, False], ids=["on the device", "by way of the host"])
def test_a_cache_that_is_given_up_is_used_again_empty(copies: bool, bundle: Path) -> None:
    with opened(bundle) as session:
        if copies:
            session._copier = Copier()  # type: ignore[assignment]
        fresh, cache = session.prefill([TEXT], "audio")
        session.decode_step([AUDIO[0]], "audio", cache)
        held = cache.buffers.held
        del cache
        gc.collect()
        buffers = session.make_buffers(1, TINY.max_seq_len)
        assert buffers.held is held and held.steps
        assert not any(value.numpy().any() for value in held.buffers.values)
        del buffers
        again, cache = session.prefill([TEXT], "audio")
        assert cache.buffers.held is held
        np.testing.assert_array_equal(again, fresh)
        _, second = session.prefill([TEXT], "audio")
        assert second.buffers.held is not held


def test_conversations_in_turn_do_not_disturb_each_other(bundle: Path) -> None:
    with opened(bundle) as session:

        def alone(first: int) -> list[int]:
            return [step.token_id for step in session.generate([first], max_tokens=12)]

        expected = {first: alone(first) for first in AUDIO[:3]}
        running = {first: session.generate([first], max_tokens=12) for first in expected}
        said: dict[int, list[int]] = {first: [] for first in expected}
        for _ in range(12):
            for first, steps in running.items():
                said[first].append(next(steps).token_id)
        assert said == expected


@pytest.mark.parametrize("copies", [True, False], ids=["on the device", "by way of the host"])
def test_rows_take_the_places_of_others(copies: bool, bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copier = Copier()
    with opened(bundle) as session:
        if copies:
            session._copier = copier  # type: ignore[assignment]
        _, coming = session.prefill([TEXT], "audio")
        _, cache = session.prefill([AUDIO, TEXT[::-1]], "audio")
        (other,) = session.decode_step([AUDIO[0]], "audio", session.join_rows([(cache, 1)]))
        before = cache.buffers
        session.replace_rows(cache, {0: (coming, 0)})
        assert cache.buffers is before  # in place: what is recorded over it stays
        (expected,) = session.decode_step([AUDIO[0]], "audio", coming)
        came = session.decode_step([AUDIO[0]] * 2, "audio", cache)
        for row, right in zip(came, (expected, other), strict=True):
            np.testing.assert_allclose(row, right, rtol=1e-4, atol=1e-5)
    if copies:
        a_row = 2 * TINY.num_layers * TINY.num_kv_heads * TINY.max_seq_len * TINY.head_size * 4
        assert copier.num_copied == 2 * a_row


def test_where_steps_can_not_be_recorded_they_are_done_as_they_are(
    bundle: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    real: Callable[..., Any] = ort.InferenceSession

    def open_it(file: Path, options: Any, providers: list[tuple[str, dict[str, str]]], **more: Any) -> Any:
        if "enable_cuda_graph" in providers[0][1]:
            raise RuntimeError("this session can not use the graph capture feature")
        return real(file, options, providers=[("CPUExecutionProvider", {})], **more)

    class Refused(OnTheHost):
        def _provider(self, graph: Graph) -> tuple[str, dict[str, str]]:
            return CudaOnnxSession._provider(self, graph)

    monkeypatch.setattr(ort, "InferenceSession", open_it)
    with Refused(bundle / "model.onnx", TINY, (*STEPS, CANONICAL)) as session:
        _, cache = session.prefill([TEXT], "text")
        session.decode_step([1], "text", cache)
        assert session.passes["decode.text"] == 1 and not cache.buffers.held.steps
    assert "decode.text can not be opened so (recorded, weights of its own)" in caplog.text


def test_a_recorded_step_that_fails_is_a_sentence(bundle: Path) -> None:
    with opened(bundle) as session:
        _, cache = session.prefill([TEXT], "text")
        session.decode_step([1], "text", cache)

        class Broken:
            def run_with_iobinding(self, binding: Any, options: Any) -> None:
                raise RuntimeError("the machine is on fire")

        session._loaded[STEPS[0]] = replace(session._loaded[STEPS[0]], session=Broken())
        with pytest.raises(BackendError, match=r"recorded step of decode\.text: the machine is on fire"):
            session.decode_step([1], "text", cache)


def test_no_memory_is_told_with_a_figure(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: Any) -> None:
        raise RuntimeError("out of memory")

    with opened(bundle) as session:
        session.prefill([TEXT], "text")
        with monkeypatch.context() as patch:
            patch.setattr(ort.OrtValue, "ortvalue_from_shape_and_type", fail)
            with pytest.raises(BackendError, match=r"no memory on the GPU for a cache of \d+\.\d\d GB: out of memory"):
                session.new_cache(2)
        session.prefill([TEXT], "text")


def test_a_lease_gives_back_what_it_holds_and_no_more_than_will_be_wanted() -> None:
    idle: list[Any] = []
    held: list[Any] = [object() for _ in range(MOST_IDLE + 1)]
    for one in held:
        lease = Lease(one, idle)
        del lease
    gc.collect()
    assert idle == held[:MOST_IDLE]


def test_what_is_kept_for_others_is_given_up_where_memory_is_short(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with opened(bundle) as session:
        session.prefill([TEXT, TEXT], "text")
        gc.collect()
        assert any(session._idle.values())
        real = session._value

        def value(stored: Any) -> Any:
            if any(session._idle.values()):
                raise BackendError("no memory on the GPU")
            return real(stored)

        monkeypatch.setattr(session, "_value", value)
        session.prefill([TEXT], "text")


class WithKernels(OnTheHost):
    """Its steps of one modality are the package's own kernels, compiled for the host."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        self.kernel_device = KernelDevice()
        self.__dict__["_copier"] = self.kernel_device
        super().__init__(*arguments, **options)

    def _why_no_kernels(self) -> str:
        self.device = "cuda"
        try:
            return super()._why_no_kernels()
        finally:
            self.device = "cpu"


@pytest.fixture(scope="module")
def half_bundle(make_checkpoint: Callable[[ModelConfig], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("half") / "b"
    export_bundle(make_checkpoint(TINY64), out, "fp16", verify=False, target="cuda")
    return out


def with_kernels(bundle: Path, **options: Any) -> WithKernels:
    opened = open_bundle(bundle)
    shared = {"weights": opened.manifest.shared_weights}
    return WithKernels(bundle / "model.onnx", opened.config, (*opened.manifest.graphs, CANONICAL), **(shared | options))


@pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")
def test_steps_of_own_kernels_say_what_onnxruntimes_say(half_bundle: Path) -> None:
    ranges = TINY64.id_ranges
    with with_kernels(half_bundle) as session, with_kernels(half_bundle, step_kernels=False) as other:
        assert session.no_kernels == "" and other.no_kernels == "they were not asked for"
        said = []
        for one in (session, other):
            caches = [one.prefill([prompt], "text")[1] for prompt in (TEXT, TEXT[:3])]
            steps = [one.decode_step([2], "text", caches[0]), one.decode_step([3], "audio", caches[0])]
            steps.append(one.decode_step([AUDIO[1]], "audio", caches[0]))
            joined = one.join_rows([(caches[1], 0), (caches[1], 0)])
            steps += [one.decode_step([5, 6], "text", joined), one.decode_step([7, AUDIO[0]], ["text", "audio"], joined)]
            said.append(steps)
        assert {graph.name for graph in caches[0].buffers.held.kernels} == set()
        assert session.kernel_device.num_recorded == 4  # text, its change-over, audio, and two rows of text; not rows of both
        for ours, theirs in zip(*said, strict=True):
            for row, right in zip(ours, theirs, strict=True):
                np.testing.assert_array_equal(np.isinf(row), np.isinf(right))
                ids = ranges[0] if np.isfinite(right[0]) else ranges[1]
                own, expected = row[ids.start : ids.stop], right[ids.start : ids.stop]
                assert np.linalg.norm(own - expected) <= 0.01 * np.linalg.norm(expected)


@pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")
def test_rows_of_logits_come_in_the_order_that_was_asked_for(half_bundle: Path) -> None:
    for own in (True, False):
        with with_kernels(half_bundle, step_kernels=own) as session:
            _, cache = session.prefill([TEXT, TEXT[:3]], "text")
            ids, mask = np.array([[2], [3]]), np.zeros((2, 1), np.int64)
            first, second = session.run(StepInputs(ids, mask, cache.lengths.copy(), np.array([0, 1]), mask[:, 0]), cache)
            for order in ([1, 0], [0, 0], [1]):
                wanted = np.array(order)
                got = session.run(StepInputs(ids, mask, cache.lengths.copy(), wanted, mask[: len(order), 0]), cache)
                np.testing.assert_array_equal(got, np.stack([(first, second)[row] for row in order]))
            assert bool(cache.buffers.held.kernels) is own


@pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")
def test_a_step_that_wants_no_logits_is_waited_for(half_bundle: Path) -> None:
    """The next pass may be onnxruntime's, on another stream."""
    with with_kernels(half_bundle) as session:
        cache = session.new_cache(1, TINY64.max_seq_len)
        before = session.kernel_device.num_finished
        assert session.prefill_chunk([2], "text", cache, is_last=False).shape == (0, TINY64.vocab_size)
        assert cache.buffers.held.kernels and session.kernel_device.num_finished == before + 1
        got = session.prefill_chunk([3, 4], "text", cache)
        expected, _ = session.prefill([[2, 3, 4]], "text")
        ours, right = (logits[:, : TINY64.id_ranges[0].stop] for logits in (got, expected))
        assert np.linalg.norm(ours - right) <= 0.01 * np.linalg.norm(right)


@pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")
def test_a_capture_without_memory_is_tried_again_without_the_caches_of_others(
    half_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with with_kernels(half_bundle) as session:
        assert session._kernels is not None
        capture, failures = session._kernels.capture, iter([BackendError("the GPU has no memory left")])

        def once_without_memory(*arguments: Any) -> Any:
            if (failure := next(failures, None)) is not None:
                raise failure
            return capture(*arguments)

        monkeypatch.setattr(session._kernels, "capture", once_without_memory)
        session.prefill([TEXT], "text")  # given up at once, and kept
        _, cache = session.prefill([TEXT, TEXT], "text")
        assert any(session._idle.values())
        session.decode_step([1, 2], "text", cache)
        assert session.no_kernels == "" and cache.buffers.held.kernels and not any(session._idle.values())


@pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")
def test_a_session_that_nobody_holds_is_gone_without_a_collector(half_bundle: Path) -> None:
    gc.disable()
    try:
        session = with_kernels(half_bundle)
        assert session.no_kernels == ""
        gone = weakref.ref(session)
        del session
        assert gone() is None
    finally:
        gc.enable()


def test_kernels_that_cannot_be_compiled_are_told_and_onnxruntime_goes_on(
    half_bundle: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(self: Any, source: str, macros: dict[str, str]) -> Any:
        raise BackendError("NVRTC cannot compile")

    monkeypatch.setattr(KernelDevice, "compile", refuse)
    with with_kernels(half_bundle) as session:
        assert session.no_kernels == "NVRTC cannot compile" and "onnxruntime's kernels" in caplog.text
        _, cache = session.prefill([TEXT], "text")
        session.decode_step([1], "text", cache)
        assert cache.buffers.held.kernels == {} and cache.buffers.held.steps


def test_the_gate_says_where_the_kernels_did_not_run_and_climbs_with_others_where_they_did(
    bundle: Path, tiny_checkpoint: Path
) -> None:
    opened_bundle, checkpoint = open_bundle(bundle), open_checkpoint(tiny_checkpoint)
    for no_kernels in ("no compiler", ""):
        climbed: list[str] = []

        def otherwise(climbed: list[str] = climbed) -> OnTheHost:
            climbed.append("otherwise")
            return opened(bundle)

        def as_usual(no_kernels: str = no_kernels) -> OnTheHost:
            session = opened(bundle)
            session.no_kernels = no_kernels
            return session

        ways = {"others' kernels": otherwise}
        report = climb_session(as_usual, opened_bundle.config, checkpoint, Steps(), {}, None, subject_of(opened_bundle), ways)
        told = [one for one in report.findings if one.question == "the step kernels were examined"]
        assert [one.outcome for one in told] == ([Outcome.SKIPPED] if no_kernels else [])
        assert len(climbed) == (0 if no_kernels else 1)
        assert any("others' kernels" in one.question for one in report.findings) is (not no_kernels)
        assert any(one.rung == "P1" for one in report.findings) and report.verdict is Outcome.PASS


def test_kernels_are_not_for_weights_of_codes_or_of_float32(bundle: Path) -> None:
    with with_kernels(bundle) as session:
        assert session.no_kernels == "they are for bfloat16 and float16, not for float32"
