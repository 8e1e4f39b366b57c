"""The side-by-side runs from end to end on the tiny model, and times what it says that it times."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from motrt.benchmarks import gpu_decode
from motrt.benchmarks.contender import CASES, LONG_PROMPT, timed
from motrt.export.bundle_from_checkpoint import export_bundle
from motrt.model_def.checkpoint.native import open_checkpoint
from motrt.model_def.config import ModelConfig
from motrt.runtime.torch_session import TorchSession
from motrt.tests.runtime.test_onnx_cuda_session import OnTheHost

ROOT = Path(__file__).resolve().parent.parent


def test_contenders_take_turns_and_are_compared_with_ours(
    make_checkpoint: Callable[[ModelConfig], Path], tmp_path: Path
) -> None:
    checkpoint = make_checkpoint(ModelConfig.tiny(max_seq_len=512))
    export_bundle(checkpoint, tmp_path / "int4", "int4", verify=False)
    command = [sys.executable, str(ROOT / "benchmarks" / "side_by_side.py"), "--int4", str(tmp_path / "int4")]
    command += ["--fp32", str(tmp_path / "int4"), "--rounds", "2"]  # the same again, in the second group
    command += ["--json", str(tmp_path / "found.json")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found == json.loads((tmp_path / "found.json").read_text())
    assert set(found["contenders"]) == {"motrt int4", "motrt fp32"}
    for figures in found["contenders"].values():
        # A prompt of 1000 is more than this model holds.
        assert set(figures) == {case for case, (_, _, before) in CASES.items() if before != LONG_PROMPT}
        assert all(one["tokens_per_s"] > 0 for one in figures.values())
    ours = found["contenders"]["motrt int4"]["text decode"]["ours_is_faster_by"]
    assert ours == {"ratio": 1.0, "quartile_1": 1.0, "quartile_3": 1.0}


def test_a_case_is_timed_step_by_step(tmp_path: Path) -> None:
    """A contender that waits is measured waiting: nothing of the protocol is in its time."""

    class Counting:
        def __init__(self) -> None:
            self.asked: list[str] = []

        def has(self, modality: str, rows: int, length: int) -> bool:
            return modality == "text"

        def prefill(self, modality: str, rows: int, count: int) -> object:
            self.asked.append(f"prefill {count}")
            return self

        def step(self, modality: str, rows: int, state: object) -> None:
            assert state is self
            self.asked.append("step")

    counting, states = Counting(), dict[str, object]()
    first = timed(counting, states, "text decode", 3)
    again = timed(counting, states, "text decode", 2)
    assert [len(one["seconds"]) for one in (first, again)] == [3, 2]
    assert counting.asked == ["prefill 128", *["step"] * 4, *["step"] * 3]  # one more before each turn, not timed
    assert timed(counting, states, "text prefill of 128", 1)["tokens_per_step"] == 128
    assert timed(counting, states, "audio decode", 1) == {"missing": "it has no such thing"}


@pytest.fixture(scope="module")
def gpu_race(make_checkpoint: Callable[[ModelConfig], Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The race for GPUs with the host's memory for a device's, and what it left."""
    checkpoint = make_checkpoint(ModelConfig.tiny(max_seq_len=512))
    bundle = tmp_path_factory.mktemp("race") / "cuda"
    export_bundle(checkpoint, bundle, "fp32", verify=False, target="cuda")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpu_decode, "CudaOnnxSession", OnTheHost)
        patch.setattr(gpu_decode, "NUM_ROUNDS", 2)
        patch.setattr(gpu_decode, "compiled", lambda step, tunes: torch.compile(step, backend="eager", fullgraph=True))
        return gpu_decode.raced(checkpoint, [f"cuda={bundle}"], (1, 3), "cpu", compiles=True, minutes=10.0)


def test_the_race_on_a_gpu_has_every_case_and_contender(gpu_race: dict[str, Any], tmp_path: Path) -> None:
    cases = {(one["case"], one["rows"]): one for one in gpu_race["cases"]}
    assert list(cases) == [("text", 1), ("audio", 1), ("text", 3), ("audio", 3), ("mixed", 3)]
    every = {gpu_decode.OURS, gpu_decode.NOT_RECORDED, gpu_decode.FLASH, gpu_decode.ALL_EXPERTS, gpu_decode.ONE_GRAPH}
    every |= {gpu_decode.EAGER, gpu_decode.COMPILED}
    for (name, _), case in cases.items():
        assert set(case["contenders"]) == (every - {gpu_decode.ALL_EXPERTS} if name == "mixed" else every)
        assert case["missing"] == {}
        for one in case["contenders"].values():
            assert 0 < one["device_ms"]["median"] <= one["whole_ms"]["median"]
        assert case["contenders"][gpu_decode.OURS]["ours_is_faster_by"]["device"]["median"] == 1.0
    assert cases["text", 1]["weight_bytes_per_step"] != cases["audio", 1]["weight_bytes_per_step"]
    assert json.loads(json.dumps(gpu_race)) == gpu_race


def test_the_chart_of_the_race_is_drawn(gpu_race: dict[str, Any], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    gpu_decode.draw(gpu_race, tmp_path / "chart.svg")
    assert "mixed, rows: 3" in (tmp_path / "chart.svg").read_text()


def a_race(make_checkpoint: Callable[[ModelConfig], Path]) -> gpu_decode.Race:
    reference = TorchSession.open(open_checkpoint(make_checkpoint(ModelConfig.tiny(max_seq_len=512))))
    return gpu_decode.Race(reference, gpu_decode.Clock(on_gpu=False), compiles=False, ends=0.0)


def test_a_contender_that_is_wrong_is_told_and_not_measured(
    make_checkpoint: Callable[[ModelConfig], Path],
) -> None:
    race = a_race(make_checkpoint)

    class Wrong(TorchSession):
        def decode_step(self, *arguments: Any, **more: Any) -> Any:
            return np.roll(super().decode_step(*arguments, **more), 1, axis=1)

    race.sessions[gpu_decode.OURS] = Wrong(race.reference.decoder)
    case = gpu_decode.Case("text", (0,))
    race.run(case)
    assert "its logits differ from the reference's" in case.missing[gpu_decode.OURS]
    assert set(case.whole_ms) == {gpu_decode.EAGER}


def test_kernels_are_counted_by_step_with_the_gaps_between_them() -> None:
    spans = [gpu_decode.Span("gemm", 10 * k, 10 * k + 6) for k in range(4)] + [gpu_decode.Span("norm", 6, 8)]
    spans += [gpu_decode.Span("inside", 31, 34), gpu_decode.Span("gemm", 1000, 1006)]  # a step later, the host waited
    found = gpu_decode.kernels_of(spans, 2)
    assert (found["kernels"], found["copies"], found["busy_us"], found["gaps_us"]) == (3.5, 0.0, 16.0, 5.0)
    assert found["by_name"][0] == {"name": "gemm", "calls": 2.5, "us": 15.0}
    assert gpu_decode.kernels_of([], 2)["kernels"] == 0
    others = [gpu_decode.Span("spin_kernel(long)", 0, 100), gpu_decode.Span("Memcpy HtoD", 100, 102)]
    assert gpu_decode.kernels_of(others, 1)["copies"] == 1 and gpu_decode.kernels_of(others, 1)["kernels"] == 0


def test_a_contender_that_fails_in_the_race_is_out_of_it_and_the_others_go_on(
    make_checkpoint: Callable[[ModelConfig], Path],
) -> None:
    race = a_race(make_checkpoint)

    class Tiring(TorchSession):
        left = 20

        def decode_step(self, *arguments: Any, **more: Any) -> Any:
            self.left -= 1
            if not self.left:
                raise RuntimeError("no memory left")
            return super().decode_step(*arguments, **more)

    race.sessions[gpu_decode.OURS] = Tiring(race.reference.decoder)
    case = gpu_decode.Case("text", (0,))
    race.run(case)
    assert case.missing[gpu_decode.OURS] == "RuntimeError: no memory left"
    assert set(case.whole_ms) == set(case.device_ms) == {gpu_decode.EAGER}
