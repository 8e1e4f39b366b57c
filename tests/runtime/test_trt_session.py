"""Engines as a session: the right one does each pass, over one aliased cache, and moves little. Without a GPU: see the fake."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from motrt.errors import BackendError, BundleError, InputError, ParityError
from motrt.export.bundle_from_checkpoint import export_bundle
from motrt.export.engine_from_onnx import EngineOptions
from motrt.export.parity.agreement import agreement_findings, compare, noise_of
from motrt.export.parity.consistency import consistency_findings
from motrt.export.parity.findings import Outcome
from motrt.export.parity.gate import ask
from motrt.export.parity.generation import generation_findings
from motrt.export.parity.routing_laws import law_findings
from motrt.model_def.config import ModelConfig
from motrt.runtime import trt_session
from motrt.runtime.backends import Probe
from motrt.runtime.bundle import Bundle, open_bundle, write_manifest
from motrt.runtime.gpu import Gpu, Gpus
from motrt.runtime.known_answer import check_answer
from motrt.runtime.load import load
from motrt.runtime.trt_session import TrtSession
from motrt.tests.export.models import torch_session
from motrt.tests.runtime.fake_tensorrt import L40, Context, Engine, HostDevice, Library, fake_engines, with_fake_engines

TINY = ModelConfig.tiny()
TEXT, AUDIO = list(range(5)), list(range(TINY.id_ranges[1].start, TINY.id_ranges[1].start + 5))


@pytest.fixture(scope="module")
def graphs(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle with the graphs of a TensorRT target, in fp32 so that the CPU is exact; engines are faked."""
    out = tmp_path_factory.mktemp("graphs") / "b"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("motrt.export.bundle_from_checkpoint.refuse_options", lambda options, precision: None)
        patch.setattr("motrt.export.bundle_from_checkpoint._Work.build_engines", lambda *_: ())
        export_bundle(tiny_checkpoint, out, "fp32", verify=False, target="tensorrt", engine_options=EngineOptions("tensorrt"))
    return out


@pytest.fixture(scope="module")
def bundle(graphs: Path) -> Bundle:
    return with_fake_engines(graphs)


@pytest.fixture
def copied(bundle: Bundle, tmp_path: Path) -> Path:
    return Path(shutil.copytree(bundle.path, tmp_path / "b"))


def opened(bundle: Bundle, device: HostDevice | None = None, gpu: Gpu = L40) -> TrtSession:
    device = device or HostDevice()
    return TrtSession(bundle, "tensorrt", Library(device), device, gpu)


def test_the_whole_ladder_holds_for_engines(bundle: Bundle, tiny_checkpoint: Path) -> None:
    expected = ask(torch_session(tiny_checkpoint, "fp64"))
    with opened(bundle) as session:
        compared = compare(session, expected.scenarios, expected.limits)
        findings = [
            *consistency_findings(session),
            *law_findings(session),
            *agreement_findings(session, compared),
            *generation_findings(session, expected.plans, noise_of(compared)),
        ]
        assert [one for one in findings if one.outcome not in (Outcome.PASS, Outcome.SKIPPED)] == []
        assert all(session.passes.values())


@pytest.mark.parametrize("most_rows", [1, None])
def test_the_known_answer_is_given_and_every_engine_asked(most_rows: int | None, bundle: Bundle) -> None:
    answer = bundle.manifest.answer
    assert answer is not None
    with opened(bundle) as session:
        session.most_rows = most_rows or session.most_rows
        check_answer(session, answer, bundle.manifest.versions)
        assert all(session.passes.values())


def test_each_pass_takes_the_engine_that_is_made_for_it(bundle: Bundle) -> None:
    with opened(bundle) as session:

        def passes_of(action: Any) -> dict[str, int]:
            before = dict(session.passes)
            action()
            return {name: count - before[name] for name, count in session.passes.items() if count > before[name]}

        _, cache = session.prefill([TEXT, TEXT], "text")
        assert session.passes["prefill"] == 1
        assert passes_of(lambda: session.decode_step([1, 2], "text", cache)) == {"decode.text": 1}
        assert passes_of(lambda: session.decode_step([1, 2], "audio", cache)) == {"change.text.audio": 1}
        assert passes_of(lambda: session.decode_step(AUDIO[:2], "audio", cache)) == {"decode.audio": 1}
        assert passes_of(lambda: session.decode_step(AUDIO[:2], "text", cache)) == {"change.audio.text": 1}
        assert passes_of(lambda: session.decode_step([1, AUDIO[0]], "text", cache)) == {"prefill": 1}
        assert passes_of(lambda: session.decode_step([1, 2], ["text", "audio"], cache)) == {"prefill": 1}
        assert passes_of(lambda: session.decode_step([1, 2], "text", cache, active=[1])) == {"decode.text": 1}


def test_a_decode_step_uploads_two_arrays_and_downloads_its_range(bundle: Bundle) -> None:
    device = HostDevice()
    with opened(bundle, device) as session:
        _, cache = session.prefill([TEXT], "text")
        before = device.num_uploads, device.num_downloads
        session.decode_step([1], "text", cache)
        assert (device.num_uploads - before[0], device.num_downloads - before[1]) == (2, 1)


def test_steps_are_recorded_once_for_each_cache_and_done_again(bundle: Bundle) -> None:
    device = HostDevice()
    with opened(bundle, device) as session:
        _, first = session.prefill([TEXT], "audio")
        _, second = session.prefill([AUDIO], "audio")
        said = {id(first): [], id(second): []}  # type: ignore[var-annotated]
        for token in AUDIO:  # two conversations in turn, each over its own memory
            for cache in (first, second):
                said[id(cache)].append(session.decode_step([token], "audio", cache))
        assert device.num_recorded == 2
        for prompt, cache in ((TEXT, first), (AUDIO, second)):
            _, alone = session.prefill([prompt], "audio")
            for token, logits in zip(AUDIO, said[id(cache)], strict=True):
                np.testing.assert_array_equal(session.decode_step([token], "audio", alone), logits)


def test_addresses_are_told_once_while_nothing_changes(bundle: Bundle) -> None:
    device = HostDevice()
    library = Library(device)
    with TrtSession(bundle, "tensorrt", library, device, L40) as session:
        _, cache = session.prefill([TEXT], "text")
        session.decode_step([1], "text", cache)
        told = [context.num_bindings for context in library.contexts]
        session.decode_step([1], "text", cache)
        assert [context.num_bindings for context in library.contexts] == told


def test_more_logits_than_an_engine_gives_are_asked_for_in_shares(bundle: Bundle, tiny_checkpoint: Path) -> None:
    from motrt.runtime.step_inputs import StepInputs, modality_of_ids

    ids = np.array([[*TEXT, *AUDIO]] * 2)
    index = np.arange(ids.size)
    inputs = StepInputs(ids, modality_of_ids(ids, TINY), np.zeros(2, np.int64), index, index % 2)
    with opened(bundle) as session, torch_session(tiny_checkpoint) as reference:
        came = session.run(inputs, session.new_cache(2, 10))
        assert session.passes["prefill"] == 5  # 20 rows, 4 at a time
        np.testing.assert_allclose(came, reference.run(inputs, reference.new_cache(2, 10)), atol=1e-5)


def test_a_long_prompt_is_read_in_passes_that_the_engine_takes(bundle: Bundle, tiny_checkpoint: Path) -> None:
    prompt = (TEXT * 8)[:37]
    with opened(bundle) as session, torch_session(tiny_checkpoint) as reference:
        came, _ = session.prefill([prompt, TEXT], "audio")
        assert session.passes["prefill"] == 3
        np.testing.assert_allclose(came, reference.prefill([prompt, TEXT], "audio")[0], atol=1e-5)


def test_requests_that_a_profile_can_not_hold_name_dim_and_range(bundle: Bundle) -> None:
    with opened(bundle) as session:
        with pytest.raises(InputError, match="rows: 5 asked, the engine takes 1 to 4"):
            session.new_cache(5)
        with pytest.raises(InputError, match="new tokens per row: 17 asked, the engine takes 1 to 16"):
            session.prefill([TEXT * 5], "text", chunk_size=17)
        session.prefill([TEXT], "text")


def test_a_gpu_that_is_full_leaves_the_session_usable(bundle: Bundle) -> None:
    device = HostDevice()
    with opened(bundle, device) as session:
        _, cache = session.prefill([TEXT], "text")
        held, device.left = device.left, 100
        with pytest.raises(BackendError, match="GPU has no"):
            session.prefill([TEXT], "text")
        session.decode_step([1], "text", cache)
        device.left = held
        session.prefill([TEXT], "text")


def test_memory_goes_back_with_the_cache(bundle: Bundle) -> None:
    device = HostDevice()
    with opened(bundle, device) as session:
        _, cache = session.prefill([TEXT], "text")
        one = len(device.held)
        del cache
        _, second = session.prefill([TEXT], "text")  # the context lets go of the cache before
        assert len(device.held) == one and second.batch_size == 1


def test_an_engine_that_fails_is_a_sentence_and_the_session_goes_on(bundle: Bundle) -> None:
    device = HostDevice()
    library = Library(device)
    with TrtSession(bundle, "tensorrt", library, device, L40) as session:
        session.prefill([TEXT], "text")
        for context in library.contexts:
            context.fails = True
        with pytest.raises(BackendError, match=r"failed in a pass of prefill\.engine"):
            session.prefill([TEXT], "text")
        for context in library.contexts:
            context.fails = False
        session.prefill([TEXT], "text")


def test_a_shape_that_tensorrt_refuses_is_named_and_not_taken_for_bound(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    with opened(bundle) as session:
        with monkeypatch.context() as patch:
            patch.setattr(Context, "set_input_shape", lambda self, name, shape: name != "past_key.0")
            with pytest.raises(BackendError, match=r"(?s)does not take what a pass of decode\.text\.engine needs.*past_key\.0"):
                session.prefill([TEXT], "text")
        session.prefill([TEXT], "text")


def test_memory_that_is_not_there_is_missed_when_a_cache_is_made_and_not_in_the_middle(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    with opened(bundle) as session:
        _, cache = session.prefill([TEXT], "text")
        with monkeypatch.context() as patch:
            patch.setattr(Engine, "create_execution_context", lambda self: None)
            patch.setattr(Engine, "device_memory_size_v2", 3 * 10**9, raising=False)
            with pytest.raises(BackendError, match=r"decode\.text\.engine: 3\.00 GB are needed .* GB are free"):
                session.new_cache(1)
            session.decode_step(TEXT[:1], "text", cache)  # who has begun goes on
            session.decode_step(AUDIO[:1], "audio", cache)
        session.decode_step(TEXT[:1], "text", session.prefill([TEXT], "text")[1])


def test_a_step_that_can_not_be_recorded_is_done_as_it_is(bundle: Bundle, caplog: pytest.LogCaptureFixture) -> None:
    class Unrecording(HostDevice):
        def record(self, work: Any) -> Any:
            raise BackendError("CUDA failed in cudaStreamBeginCapture: error 900")

    with opened(bundle, Unrecording()) as session, opened(bundle) as other:
        logits = []
        for one in (session, other):
            _, cache = one.prefill([TEXT], "text")
            logits.append([one.decode_step([token], "text", cache) for token in TEXT])
        np.testing.assert_array_equal(logits[0], logits[1])
    assert "not recorded as a CUDA graph: CUDA failed" in caplog.text


# What must not be loaded


@pytest.mark.parametrize(
    ("gpu", "said"),
    [
        (Gpu("NVIDIA H200", "9.0", 1), "built for compute capability 8.9, and NVIDIA H200 has 9.0"),
        (Gpu("NVIDIA L40S", "8.9", 1), "it was built on NVIDIA L40, and this is NVIDIA L40S"),
    ],
)
def test_an_engine_of_another_gpu_is_refused_with_the_command_that_builds_it(gpu: Gpu, said: str, bundle: Bundle) -> None:
    with pytest.raises(BackendError, match=said) as refusal:
        opened(bundle, gpu=gpu)
    assert "motrt export" in str(refusal.value) and "--target tensorrt --precision fp32" in str(refusal.value)


def test_an_engine_of_another_version_is_refused(copied: Path) -> None:
    manifest = open_bundle(copied).manifest
    engines = tuple(replace(one, versions={"tensorrt": "10.9"}) for one in manifest.engines)
    write_manifest(copied, replace(manifest, engines=engines))
    with pytest.raises(BackendError, match=r"built by tensorrt 10\.9, and 10\.13 is installed here"):
        opened(open_bundle(copied))


def test_an_engine_of_another_hash_is_not_deserialised(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = open_bundle(copied)
    file = copied / "decode.text.engine"
    data = file.read_bytes()
    file.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    monkeypatch.setattr(Library, "deserialize_cuda_engine", lambda self, data: pytest.fail("code was loaded"))
    with pytest.raises(BundleError, match=r"decode\.text\.engine is not the file that was exported"):
        opened(open_bundle(copied))
    assert bundle.manifest.engines[0].file == file.name


def test_an_engine_of_another_graph_does_not_keep_the_contract(copied: Path, bundle: Bundle) -> None:
    """Two engines under each other's names, and a manifest that was made to fit."""
    first, second, *others = bundle.manifest.engines
    swapped = (
        replace(first, file=second.file, sha256=second.sha256),
        replace(second, file=first.file, sha256=first.sha256),
        *others,
    )
    write_manifest(copied, replace(bundle.manifest, engines=swapped))
    with pytest.raises(BundleError, match=r"decode\.audio\.engine does not keep the graph contract"):
        opened(open_bundle(copied))


def test_an_engine_that_tensorrt_does_not_take_is_a_sentence(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Library, "deserialize_cuda_engine", lambda self, data: None)
    with pytest.raises(BackendError, match=r"can not load decode\.text\.engine"):
        opened(bundle)


def test_a_bundle_without_engines_names_the_command(tiny_bundle: Path) -> None:
    with pytest.raises(BundleError, match="holds no engines for tensorrt-rtx: make a bundle that does with `motrt export"):
        TrtSession(open_bundle(tiny_bundle), "tensorrt-rtx", Library(HostDevice()), HostDevice(), L40)


def test_without_a_gpu_it_says_so(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trt_session, "find_gpus", lambda: Gpus((), None, "no NVIDIA driver is installed"))
    device = HostDevice()
    with pytest.raises(BackendError, match="engines run on an NVIDIA GPU, and no NVIDIA driver is installed"):
        TrtSession(bundle, "tensorrt", Library(device), device)


def test_the_bundle_still_runs_on_the_cpu(bundle: Bundle, tiny_checkpoint: Path) -> None:
    with load(bundle.path, "onnxruntime") as session, torch_session(tiny_checkpoint) as reference:
        came, _ = session.prefill([TEXT], "audio")
        np.testing.assert_allclose(came, reference.prefill([TEXT], "audio")[0], atol=1e-5)


@pytest.fixture
def with_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine whose GPU the engines are for: an export builds fakes of them, and opens them."""
    from motrt.export import bundle_from_checkpoint as export

    def build(self: Any, folder: Path, options: Any) -> Any:
        engines, _ = fake_engines(folder, self.graphs, self.config, self.precision)
        return engines

    def open_session(bundle: Bundle, backend: str, num_threads: int = 0) -> TrtSession:
        device = HostDevice()
        return TrtSession(bundle, backend, Library(device), device, L40)

    monkeypatch.setattr(export, "refuse_options", lambda options, precision: None)
    monkeypatch.setattr(export._Work, "build_engines", build)
    monkeypatch.setattr(export, "find_gpus", lambda: Gpus((L40,), "13.0"))
    monkeypatch.setattr(export, "probe", lambda backend: Probe(backend, ""))
    monkeypatch.setattr(export, "open_session", open_session)


def test_an_export_beside_its_gpu_proves_the_engines(with_a_gpu: None, make_checkpoint: Any, tmp_path: Path) -> None:
    config = TINY.replace(num_layers=1)
    made = export_bundle(make_checkpoint(config), tmp_path / "b", "fp32", target="tensorrt")
    for engine in made.bundle.manifest.engines:
        assert engine.parity is not None and engine.parity["verdict"] == "PASS"
        assert engine.parity["backend"] == "tensorrt (NVIDIA L40)"
        assert {one["graph"] for one in engine.parity["findings"]} == {engine.graph}
    assert made.report is not None and made.report.backend == "onnxruntime (CPU)"


def test_engines_that_are_not_the_model_leave_no_bundle(
    with_a_gpu: None, make_checkpoint: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Context._run

    def shifted(self: Context, shapes: Any, addresses: dict[str, int]) -> None:
        """Some logits of every step are off by one."""
        real(self, shapes, addresses)
        if "range_logits" in addresses:
            count = shapes["input_ids"][0]
            self._view(addresses["range_logits"], (count, 8), np.dtype(np.float32))[...] += 1

    monkeypatch.setattr(Context, "_run", shifted)
    with pytest.raises(ParityError, match="what was exported is not the model"):
        export_bundle(make_checkpoint(TINY.replace(num_layers=1)), tmp_path / "b", "fp32", target="tensorrt")
    assert list(tmp_path.iterdir()) == []


def test_engines_for_another_gpu_are_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    from motrt.export import bundle_from_checkpoint as export

    monkeypatch.setattr(export, "find_gpus", lambda: Gpus((L40,), "13.0"))
    monkeypatch.setattr(export, "probe", lambda backend: Probe(backend, ""))
    can = export._can_prove_on_gpu
    assert can("tensorrt", EngineOptions("tensorrt")) and can("cuda", None) and not can("onnx", None)
    assert can("tensorrt-rtx", EngineOptions("tensorrt-rtx", compute_capabilities=("8.9",)))
    assert not can("tensorrt-rtx", EngineOptions("tensorrt-rtx", compute_capabilities=("12.0",)))
    monkeypatch.setattr(export, "probe", lambda backend: Probe(backend, "too old a driver"))
    assert not can("cuda", None)


def test_closing_lets_go_of_engines_though_a_cache_lives(bundle: Bundle) -> None:
    session = opened(bundle)
    _, cache = session.prefill([TEXT], "text")
    session.decode_step([1], "text", cache)
    assert cache.buffers.steps
    session.close()
    assert not cache.buffers.steps


def test_what_can_not_be_opened_gives_its_stream_back(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    closed = []

    class Closing(HostDevice):
        def close(self) -> None:
            closed.append(True)

    monkeypatch.setattr(Library, "deserialize_cuda_engine", lambda self, data: None)
    with pytest.raises(BackendError):
        opened(bundle, Closing())
    assert closed == [True]


def test_version_compatible_engines_bring_their_own_runtime_and_go_forward_alone(copied: Path) -> None:
    manifest = open_bundle(copied).manifest
    device = HostDevice()
    for built, runs in (("10.9", True), ("10.14", False)):
        options = {"version_compatible": True}
        engines = tuple(replace(one, versions={"tensorrt": built}, options=options) for one in manifest.engines)
        write_manifest(copied, replace(manifest, engines=engines))
        library = Library(device)
        if runs:
            TrtSession(open_bundle(copied), "tensorrt", library, device, L40).close()
            assert library.engine_host_code_allowed
        else:
            with pytest.raises(BackendError, match=r"built by tensorrt 10\.14, and 10\.13 is installed here"):
                TrtSession(open_bundle(copied), "tensorrt", library, device, L40)


def test_a_record_without_a_range_is_refused(copied: Path) -> None:
    manifest = open_bundle(copied).manifest
    engines = tuple(replace(one, ranges={}) for one in manifest.engines)
    write_manifest(copied, replace(manifest, engines=engines))
    with pytest.raises(BundleError, match=r"(?s)record of decode\.text\.engine lacks ranges.*- b"):
        opened(open_bundle(copied))
