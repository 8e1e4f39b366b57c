"""The gate catches what is wrong on a GPU, too: faults planted in what onnxruntime runs there, and in how it is run."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from motrt.benchmarks.doctored import Doctored
from motrt.benchmarks.faults import change, row_of_another, set_attribute, shifted_rows, write_back_by_one
from motrt.export.bundle_from_checkpoint import export_bundle
from motrt.export.parity.findings import Outcome
from motrt.export.parity.gate import climb_session
from motrt.export.steps import Steps
from motrt.export.verification import verify_bundle
from motrt.model_def.checkpoint.native import open_checkpoint
from motrt.runtime import step_kernels
from motrt.runtime.backends import probe
from motrt.runtime.bundle import open_bundle
from motrt.runtime.kv_cache import KVCache
from motrt.runtime.load import cuda_session
from motrt.runtime.onnx_cuda_session import CudaOnnxSession
from motrt.runtime.session import Logits
from motrt.runtime.step_inputs import StepInputs
from motrt.runtime.step_kernels import StepShape
from motrt.tests.runtime.host_kernels import FAULTY_LINES, FAULTY_MACROS, faulty_source

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module", params=["bf16", "fp16"])
def bundle(request: pytest.FixtureRequest, tiny64_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    if reason := probe("cuda").reason:
        pytest.skip(reason)
    out = tmp_path_factory.mktemp("faults") / "b"
    export_bundle(tiny64_checkpoint, out, request.param, verify=False, target="cuda", operators="standard")
    return out


Plant = Callable[[Doctored], object]
# In what is stored, and in the steps' graphs, which run where the step kernels cannot.
FAULTS: dict[str, tuple[str, Plant]] = {
    "a row of a projection is another's": ("model", change("layers.1.attention.wq.audio.weight", row_of_another)),
    "the weight of a norm dropped": ("model", change("layers.1.ffn_norm.weight", np.ones_like)),
    "the text head shifted by one id": ("model", change("output.text.weight", shifted_rows)),
    "softmax of a step not scaled": ("decode.audio", set_attribute("Attention", "scale", 1.0, "layers.1.")),
    "half rotation in a step": ("decode.text", set_attribute("RotaryEmbedding", "interleaved", 0)),
    "a step writes one place back": ("decode.text", write_back_by_one("past_key.0")),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_a_fail(name: str, bundle: Path, tmp_path: Path) -> None:
    graph, plant = FAULTS[name]
    doctored = Doctored(bundle, tmp_path / "planted", f"{graph}.onnx")
    plant(doctored)
    report = verify_bundle(doctored.vouch(), backend="cuda")
    failed = [one for one in report.findings if one.outcome is Outcome.FAIL]
    assert failed, name
    # P1 reads what is stored. That the GPU's answers are looked at must show without it, where rounding hides no fault.
    ran = [one for one in failed if one.rung != "P1"]
    if graph != "model":
        assert [one for one in ran if "onnxruntime's kernels" in one.question], name
    elif name != "a row of a projection is another's":
        assert ran, name


def _is_failed(bundle: Path) -> bool:
    failed = [one for one in verify_bundle(bundle, backend="cuda").findings if one.outcome is Outcome.FAIL]
    # With onnxruntime's kernels, which have no fault, nothing fails.
    return bool(failed) and not any("onnxruntime's kernels" in one.question for one in failed)


@pytest.mark.parametrize("name", FAULTY_MACROS)
def test_step_kernels_with_another_number_are_a_fail(name: str, bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = StepShape.macros.fget  # type: ignore[attr-defined]
    monkeypatch.setattr(StepShape, "macros", property(lambda shape: real(shape) | FAULTY_MACROS[name]))
    assert _is_failed(bundle)


@pytest.mark.parametrize("name", FAULTY_LINES)
def test_step_kernels_with_another_line_are_a_fail(
    name: str, bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "kernels.cu").write_text(faulty_source(name))
    monkeypatch.setattr(step_kernels, "SOURCE", tmp_path / "kernels.cu")
    assert _is_failed(bundle)


class RepeatsAStep(CudaOnnxSession):
    """A replay that reads what it was captured with: as if ids were bound and not copied."""

    _first: Any = None

    def execute(self, inputs: StepInputs, cache: KVCache) -> Logits:
        if inputs.input_ids.shape[1] > 1:
            return super().execute(inputs, cache)
        ids = self._first = inputs.input_ids if self._first is None else self._first
        same = ids.shape == inputs.input_ids.shape and bool((ids < 1).all() == (inputs.input_ids < 1).all())
        return super().execute(StepInputs(ids if same else inputs.input_ids, *list(inputs.named().values())[1:]), cache)


def test_a_step_that_is_not_fed_is_a_fail(bundle: Path, tiny64_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = open_bundle(bundle)
    monkeypatch.setattr("motrt.runtime.onnx_cuda_session.CudaOnnxSession", RepeatsAStep)
    report = climb_session(lambda: cuda_session(opened), opened.config, open_checkpoint(tiny64_checkpoint), Steps(), {})
    assert [one for one in report.findings if one.outcome is Outcome.FAIL]
