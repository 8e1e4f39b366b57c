"""Backends are asked to compute; what can not says why, in a sentence, and ``auto`` takes the best that is left."""

import logging
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from motrt.errors import BackendError
from motrt.runtime import backends, load
from motrt.runtime.backends import ORDER, SQUARE, Probe, probe, probe_all
from motrt.runtime.bundle import open_bundle
from motrt.runtime.gpu import Gpu, Gpus

GPU = Gpus((Gpu("NVIDIA L40", "8.9", 48 * 10**9),), "13.0")


@pytest.fixture(autouse=True)
def forgotten() -> Any:
    """Probes are made once for a process; here, once for each test."""
    probe.cache_clear()
    yield
    probe.cache_clear()


def test_the_known_graph_is_x_times_x() -> None:
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [2, 2]) for name in "xy")
    graph = helper.make_graph([helper.make_node("MatMul", ["x", "x"], ["y"])], "square", [x], [y])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 24)], ir_version=10)
    model.producer_name = ""
    onnx.checker.check_model(model)
    assert model.SerializeToString(deterministic=True) == SQUARE


def test_on_this_machine_onnxruntime_and_torch_answer() -> None:
    probes = {one.backend: one for one in probe_all()}
    assert tuple(probes) == ORDER
    assert probes["onnxruntime"].is_usable and "onnxruntime 1" in probes["onnxruntime"].detail
    assert probes["torch"].is_usable
    for one in probes.values():
        assert one.is_usable != bool(one.reason)
        assert set(one.to_dict()) == {"backend", "usable", "reason", "detail"}


@pytest.mark.parametrize("backend", ["tensorrt", "tensorrt-rtx", "cuda"])
def test_without_a_driver_what_needs_a_gpu_says_so(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "find_gpus", lambda: Gpus((), None, "no NVIDIA driver is installed"))
    assert probe(backend) == Probe(backend, "no NVIDIA driver is installed")


def test_a_wheel_without_cuda_is_told_from_a_machine_without(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "find_gpus", lambda: GPU)
    assert "built without CUDA: install `motrt[gpu]`" in probe("cuda").reason


def test_a_wrong_answer_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "_KNOWN", np.zeros((2, 2), np.float32))
    assert "it computes [[7.0, 10.0], [15.0, 22.0]] where the answer is" in probe("onnxruntime").reason


@pytest.mark.parametrize("failure", [RuntimeError("boom"), OSError("libfoo.so: not found"), ImportError("no")])
def test_whatever_a_library_raises_is_a_reason(failure: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> str:
        raise failure

    monkeypatch.setitem(backends._PROBES, "cuda", fail)
    assert probe("cuda").reason == f"{type(failure).__name__}: {failure}"


def test_the_known_engine_is_built_by_the_flavour_for_rtx() -> None:
    module = pytest.importorskip("tensorrt_rtx")
    data = backends._square_engine(module, "tensorrt-rtx", module.Logger(module.Logger.ERROR), is_for_here=False)
    assert bytes(data)[1:4] == b"trt"


def test_auto_takes_the_cpu_here_and_says_why_it_passed_the_others_over(
    tiny_bundle: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backends, "find_gpus", lambda: Gpus((), None, "no NVIDIA driver is installed"))
    with caplog.at_level(logging.INFO), load.load(tiny_bundle) as session:
        assert session.backend == "onnxruntime (CPU)"
    assert "tensorrt is passed over: the bundle holds no engines for it" in caplog.text
    assert "cuda is passed over: no NVIDIA driver is installed" in caplog.text


def test_auto_goes_on_where_a_backend_fails_to_open(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tried = []
    real = load.open_session

    def open_session(bundle: Any, backend: str, num_threads: int = 0) -> Any:
        tried.append(backend)
        if backend != "onnxruntime":
            raise BackendError("out of device memory")
        return real(bundle, backend, num_threads)

    monkeypatch.setattr(load, "open_session", open_session)
    monkeypatch.setattr(load, "why_not", lambda bundle, backend: "")
    load.best_session(open_bundle(tiny_bundle)).close()
    assert tried == list(ORDER[:4])


def test_where_nothing_runs_every_reason_is_named(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def open_session(bundle: Any, backend: str, num_threads: int = 0) -> Any:
        raise BackendError("no bfloat16 on the CPU")

    monkeypatch.setattr(load, "open_session", open_session)
    monkeypatch.setattr(load, "find_gpus", lambda: GPU)
    monkeypatch.setattr(load, "why_not", lambda bundle, backend: f"{backend} is asleep")
    with pytest.raises(BackendError, match=r"(?s)tensorrt is asleep.*cuda is asleep.*no bfloat16 on the CPU"):
        load.best_session(open_bundle(tiny_bundle))


def test_a_backend_that_was_asked_for_by_name_says_why_not(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "find_gpus", lambda: Gpus((), None, "no NVIDIA driver is installed"))
    with pytest.raises(BackendError, match="can not run on a GPU here: no NVIDIA driver is installed"):
        load.load(tiny_bundle, "cuda")
