"""What only a GPU can tell: each backend against PyTorch there, from the file that will be deployed."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from motrt.errors import BackendError, InputError
from motrt.export.bundle_from_checkpoint import export_bundle
from motrt.export.engine_from_onnx import EngineOptions
from motrt.export.parity.findings import Outcome
from motrt.export.trt_profile import Sizes
from motrt.export.verification import verify_bundle
from motrt.model_def.config import ModelConfig
from motrt.model_def.signature import INPUT_IDS
from motrt.runtime.backends import probe
from motrt.runtime.bundle import open_bundle
from motrt.runtime.engine_record import Range
from motrt.runtime.load import cuda_session, load
from motrt.runtime.onnx_cuda_session import CudaOnnxSession

pytestmark = pytest.mark.gpu

TINY = ModelConfig.preset("tiny64")


@pytest.fixture(scope="module", params=["cuda", "tensorrt", "tensorrt-rtx"])
def backend(request: pytest.FixtureRequest) -> str:
    """Every backend on a GPU; skipped where it can not be used, with the probe's reason."""
    name = str(request.param)
    if reason := probe(name).reason:
        pytest.skip(f"{name}: {reason}")
    return name


KINDS = [f"{precision}{own}" for precision in ("fp16", "bf16", "int8", "int4") for own in ("", "-onnxruntime")]


@pytest.fixture(scope="module", params=KINDS)
def bundle(
    backend: str, request: pytest.FixtureRequest, tiny64_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The tiny model for the backend."""
    precision, _, operators = request.param.partition("-")
    if operators and backend != "cuda":
        pytest.skip("engines have operators of their own")
    out = tmp_path_factory.mktemp("gpu") / "b"
    options = None if backend == "cuda" else EngineOptions(backend, Sizes(Range(1, 2, 4), Range(1, 16, 32)))
    target: Any = backend
    export_bundle(
        tiny64_checkpoint,
        out,
        precision,
        verify=False,
        target=target,
        engine_options=options,
        operators=operators or "standard",
    )
    return out


def test_it_climbs_the_ladder(backend: str, bundle: Path) -> None:
    report = verify_bundle(bundle, backend=backend)
    assert [str(one) for one in report.findings if one.outcome is Outcome.FAIL] == []


def test_it_gives_the_known_answer(backend: str, bundle: Path) -> None:
    load(bundle, backend, "answer").close()


def test_auto_takes_a_gpu(backend: str, bundle: Path) -> None:
    with load(bundle) as session:
        assert "CPU" not in session.backend


def test_steps_are_done_again_from_their_record(backend: str, bundle: Path) -> None:
    """A record reads where it read when it was made: a step that is bound to other ids then gives the same logits."""
    if backend != "cuda":
        pytest.skip("of onnxruntime alone")
    with cuda_session(open_bundle(bundle), step_kernels=False) as session:
        assert isinstance(session, CudaOnnxSession)
        _, cache = session.prefill([[1, 2, 3]], "text")
        for _ in range(4):
            session.decode_step([1], "text", cache)
        ((graph, step),) = cache.buffers.held.steps.items()
        assert graph in session._recorded
        run = session._loaded[graph].session.run_with_iobinding
        run(step.binding, step.options)
        expected = step.logits.numpy().copy()
        step.binding.bind_ortvalue_input(INPUT_IDS, session._on_device(np.array([[9]])))
        run(step.binding, step.options)
        np.testing.assert_array_equal(step.logits.numpy(), expected)


def test_steps_of_half_precision_are_own_kernels_and_say_what_onnxruntimes_say(backend: str, bundle: Path) -> None:
    if backend != "cuda":
        pytest.skip("of onnxruntime alone")
    opened = open_bundle(bundle)
    is_half = opened.manifest.quantization is None
    rows = [[1, 2, 3], [4, 5], *([number] * 9 for number in range(6, 12))]
    said: list[list[np.ndarray[Any, Any]]] = []
    for own in (True, False):
        with cuda_session(opened, step_kernels=own) as session:
            assert isinstance(session, CudaOnnxSession)
            assert (session.no_kernels == "") is (own and is_half), session.no_kernels
            steps = []
            for count in (1, 2, 5, len(rows)):
                _, cache = session.prefill(rows[:count], "text")
                steps += [session.decode_step([7 + n] * count, "text", cache) for n in range(3)]
                assert bool(cache.buffers.held.kernels) is (own and is_half)
            said.append(steps)
    text = TINY.id_ranges[0]
    for ours, theirs in zip(*said, strict=True):
        for one, right in zip(ours[:, : text.stop], theirs[:, : text.stop], strict=True):
            assert np.linalg.norm(one - right) <= 0.03 * np.linalg.norm(right)


def test_nothing_that_computes_is_left_to_the_host(backend: str, bundle: Path) -> None:
    if backend != "cuda":
        pytest.skip("of onnxruntime alone")
    with load(bundle, backend) as session:
        assert isinstance(session, CudaOnnxSession)
        assert all(found is not None for found in session.elsewhere.values())
        for graph in (graph for graph in session._loaded if graph.takes_one_token):
            assert set(session.elsewhere[graph.name] or ()) <= {"Shape", "Concat"}, graph.name  # they size, and compute nothing
        assert not {"Gemm", "MatMul", "Attention", "TensorScatter"} & set(session.elsewhere["model"] or ())


def test_the_cache_stays_on_the_device_and_is_written_in_place(backend: str, bundle: Path) -> None:
    if backend != "cuda":
        pytest.skip("of onnxruntime alone")
    with load(bundle, backend) as session:
        _, cache = session.prefill([[1, 2, 3]], "text")
        values = cache.buffers.held.buffers.values
        places = [value.data_ptr() for value in values]
        for _ in range(4):  # recorded, and done again
            session.decode_step([1], "text", cache)
        assert [value.data_ptr() for value in values] == places
        assert all(value.device_name().lower() == "cuda" for value in values)
        for value in values:
            written = value.numpy()[0].astype(np.float64).any(axis=(0, 2))  # [k, t, d] -> [t]
            assert written[:7].all() and not written[7:].any()


def test_rows_that_are_joined_go_on_as_they_were(backend: str, bundle: Path) -> None:
    if backend != "cuda":
        pytest.skip("engines can not join rows")
    with load(bundle, backend) as session:
        caches = [session.prefill([ids], "text")[1] for ids in ([1, 2, 3], [4, 5])]
        assert isinstance(session, CudaOnnxSession) and session._copier is not None  # and not by way of the host
        joined = session.join_rows([(cache, 0) for cache in caches])
        apart = [session.decode_step([6], "text", cache)[0] for cache in caches]
        for row, alone in zip(session.decode_step([6, 6], "text", joined), apart, strict=True):
            said, right = row[: TINY.id_ranges[0].stop], alone[: TINY.id_ranges[0].stop]
            assert np.linalg.norm(said - right) <= 0.02 * np.linalg.norm(right)


def test_conversations_in_turn_do_not_disturb_each_other(backend: str, bundle: Path) -> None:
    ids = TINY.id_ranges[1]
    with load(bundle, backend) as session:
        alone: Callable[[int], list[int]] = lambda first: [  # noqa: E731
            step.token_id for step in session.generate([first], max_tokens=12)
        ]
        expected = {first: alone(first) for first in (ids.start, ids.start + 5)}
        running = {first: session.generate([first], max_tokens=12) for first in expected}
        said: dict[int, list[int]] = {first: [] for first in expected}
        for _ in range(12):
            for first, steps in running.items():
                said[first].append(next(steps).token_id)
        assert said == expected


def test_a_cache_that_is_too_large_leaves_the_session_usable(backend: str, bundle: Path) -> None:
    with load(bundle, backend) as session:
        _, cache = session.prefill([[1, 2, 3]], "text")
        with pytest.raises((BackendError, InputError)):
            session.new_cache(10**8, TINY.max_seq_len)
        session.decode_step([1], "text", cache)
