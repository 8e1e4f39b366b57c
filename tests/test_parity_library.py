"""Parity as a library and in pytest, as a user's own repository has it."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import motrt
from motrt import parity
from motrt.errors import InputError, ParityError
from motrt.model_def.config import ModelConfig
from motrt.runtime.kv_cache import KVCache
from motrt.runtime.onnx_session import OnnxSession
from motrt.runtime.session import Logits
from motrt.runtime.step_inputs import StepInputs

SEQUENCES = [[1, 2, 3, 100, 101, 4], [120, 121, 5]]


class SlightlyOff(OnnxSession):
    def execute(self, inputs: StepInputs, cache: KVCache) -> Logits:
        logits: Logits = super().execute(inputs, cache) * np.float32(1.001)
        return logits


@pytest.mark.parametrize("inputs", [None, SEQUENCES], ids=["usual", "brought"])
def test_two_sessions_over_one_model_are_compared(inputs: list[list[int]] | None, tiny_bundle: Path) -> None:
    with motrt.load(tiny_bundle, "torch") as reference, motrt.load(tiny_bundle, "onnxruntime") as session:
        report = parity.compare(reference, session, inputs)
    assert report.verdict is parity.Outcome.PASS
    report.raise_on_failure()
    assert {one.rung for one in report.findings} == {"P4"}
    assert report.to_page()["positions"]


def test_a_session_that_is_slightly_off_is_named(tiny_bundle: Path) -> None:
    with motrt.load(tiny_bundle, "torch") as reference:
        off = SlightlyOff(tiny_bundle / "model.onnx", reference.config)
        report = parity.compare(reference, off, SEQUENCES)
    with pytest.raises(ParityError, match=r"relative L2 0\.001 over"):
        report.raise_on_failure()


def test_sessions_over_different_models_are_not_compared(tiny_bundle: Path, make_bundle: object) -> None:
    other = make_bundle(ModelConfig.tiny().replace(num_layers=1))  # type: ignore[operator]
    with motrt.load(tiny_bundle) as one, motrt.load(other) as another, pytest.raises(InputError, match="different models"):
        parity.compare(one, another)


@pytest.mark.parametrize("inputs", [[], [[1]], [[1, 9999]], [[0] * 5000], [["a", "b"]]])
def test_sequences_that_can_not_be_compared_are_refused(inputs: list[list[int]], tiny_bundle: Path) -> None:
    with motrt.load(tiny_bundle) as session, pytest.raises(InputError):
        parity.compare(session, session, inputs)


def test_polygraphy_reads_and_compares_what_is_dumped(tiny_bundle: Path, tmp_path: Path) -> None:
    from polygraphy.comparator import Comparator, RunResults, SimpleCompareFunc

    with motrt.load(tiny_bundle, "torch") as reference, motrt.load(tiny_bundle, "onnxruntime") as session:
        parity.dump(reference, tmp_path / "reference.json", SEQUENCES)
        parity.dump(session, tmp_path / "session.json", SEQUENCES)
    results = RunResults.load(str(tmp_path / "reference.json"))
    results.extend(RunResults.load(str(tmp_path / "session.json")))
    assert bool(Comparator.compare_accuracy(results, compare_func=SimpleCompareFunc(atol=1e-4)))
    assert not bool(Comparator.compare_accuracy(results, compare_func=SimpleCompareFunc(atol=0, rtol=0)))


GATE = """
def test_the_bundle_is_still_the_model(motrt_verify):
    motrt_verify({bundle!r})
"""


def run_pytest(folder: Path, bundle: Path, *options: str) -> subprocess.CompletedProcess[str]:
    (folder / "test_gate.py").write_text(GATE.format(bundle=str(bundle)), encoding="utf-8")
    command = [sys.executable, "-W", "error", "-m", "pytest", "-q", "-p", "no:cacheprovider", *options, "test_gate.py"]
    return subprocess.run(command, capture_output=True, text=True, cwd=folder)


def test_three_lines_of_pytest_gate_a_bundle(tiny_bundle: Path, tmp_path: Path) -> None:
    done = run_pytest(tmp_path, tiny_bundle, "--motrt-report", "reports")
    assert done.returncode == 0, done.stdout + done.stderr
    (page,) = (tmp_path / "reports").rglob("report.html")
    assert "PASS" in page.read_text(encoding="utf-8")


def test_a_bundle_that_is_no_model_of_its_checkpoint_fails_the_users_test(tiny_bundle: Path, tmp_path: Path) -> None:
    bundle = tmp_path / "bundle"
    bundle.mkdir()
    for file in tiny_bundle.iterdir():
        (bundle / file.name).write_bytes(file.read_bytes())
    data = bytearray((bundle / "model.onnx.data").read_bytes())
    data[100] ^= 1
    (bundle / "model.onnx.data").write_bytes(data)
    done = run_pytest(tmp_path, bundle)
    assert done.returncode == 1
    assert "its hash differs" in done.stdout
