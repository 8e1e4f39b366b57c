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

from motrt.benchmarks import clean_builds, gpu_contender, gpu_decode
from motrt.benchmarks.builds import Build
from motrt.benchmarks.contender import CASES, LONG_PROMPT, timed
from motrt.benchmarks.error_compensation import compensated, losses_by_way, nearest
from motrt.benchmarks.gpu_contender import OPERATORS
from motrt.errors import CheckpointError
from motrt.export.bundle_from_checkpoint import export_bundle
from motrt.export.parity.findings import Finding, Outcome, Report
from motrt.export.quantize import choose_scales
from motrt.model_def.config import ModelConfig
from motrt.model_def.quantization import Quantization, WeightFormat
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


ROWS = (1, 3)


@pytest.fixture(scope="module")
def gpu_race(make_checkpoint: Callable[[ModelConfig], Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The race for GPUs with host memory for a device's, every group in this process, and what it left."""
    checkpoint = make_checkpoint(ModelConfig.tiny(max_seq_len=512))
    folder = tmp_path_factory.mktemp("race")
    bundles = [folder / "standard"]
    export_bundle(checkpoint, bundles[0], "fp32", verify=False, target="cuda")

    def run(group: gpu_decode.Group, model: Path, reference: Path, work: Path) -> dict[str, Any]:
        if group.kind == "kernels":  # of half precision alone
            return {"group": "kernels", "cases": {}, "ended": "not on a host"}
        found = gpu_contender.contend(group.kind, model, group.bundle, group.rows, reference, "cpu", profiles=False)
        return found | {"ended": ""}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpu_contender, "CudaOnnxSession", OnTheHost)
        patch.setattr(gpu_contender, "NUM_STEPS", 4)
        patch.setattr(gpu_contender, "compiled", lambda step, tunes: torch.compile(step, backend="eager", fullgraph=True))
        return gpu_decode.race(checkpoint, bundles, ROWS, True, 600, lambda document: None, run)


def test_the_race_on_a_gpu_has_every_case_and_contender(gpu_race: dict[str, Any]) -> None:
    cases = {(one["case"], one["rows"]): one for one in gpu_race["cases"]}
    assert list(cases) == [("text", 1), ("audio", 1), ("text", 3), ("audio", 3), ("mixed", 3)]
    everywhere = {gpu_contender.EAGER, gpu_contender.CAPTURED, gpu_contender.COMPILED, OPERATORS["standard"]}
    alone = {gpu_contender.NOT_CAPTURED, gpu_contender.ONE_GRAPH, f"{OPERATORS['standard']}, {gpu_contender.FLASH}"}
    for (name, rows), case in cases.items():
        expected = everywhere | (alone if rows == 1 else set()) | ({gpu_contender.ALL_EXPERTS} if name != "mixed" else set())
        assert set(case["contenders"]) == expected
        for one in case["contenders"].values():
            assert "missing" not in one, one
            assert one["event_ms"]["median"] > 0 and one["event_share_of_read"] > 0 and one["error"] < 1e-3
    assert cases["text", 1]["weight_bytes"] != cases["audio", 1]["weight_bytes"]
    assert json.loads(json.dumps(gpu_race)) == gpu_race
    assert len(gpu_decode.table_of(gpu_race).splitlines()) == 1 + sum(len(case["contenders"]) for case in cases.values())


def test_the_chart_of_the_race_is_drawn(gpu_race: dict[str, Any], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    gpu_decode.draw(gpu_race, tmp_path / "chart.svg")
    assert "mixed, rows: 3" in (tmp_path / "chart.svg").read_text()


def test_the_steps_of_the_kernels_alone_are_drawn_beside_it(gpu_race: dict[str, Any], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    cut = {"tuning": {}, "decode.text": {"event_ms": {"median": 0.5}}, "decode.audio": {"missing": "no memory"}}
    drawn = gpu_decode.with_step_kernels(gpu_race, {"runs": [{"rows": 1, "cuts": [cut]}]})
    names = {(case["case"], case["rows"]): set(case["contenders"]) for case in drawn["cases"]}
    assert [key for key, found in names.items() if "motrt, own kernels (alone)" in found] == [("text", 1)]
    gpu_decode.draw(drawn, tmp_path / "chart.svg")


def a_contender(begin: Callable[[gpu_contender.Case], gpu_contender.Step]) -> gpu_contender.Contender:
    config, clock = ModelConfig.tiny(max_seq_len=512), gpu_contender.Clock(on_gpu=False)
    return gpu_contender.Contender("bundle", [gpu_contender.Way("it", begin)], config, clock)


TEXT = gpu_contender.Case("text", (0,))
RIGHT = np.arange(128, dtype=np.float32)[None] + 1


def test_a_contender_that_is_wrong_is_told_and_not_timed() -> None:
    document = a_contender(lambda case: lambda: np.roll(RIGHT, 1, axis=1)).run([TEXT], lambda case: RIGHT, profiles=False)
    assert "its logits differ from the reference's" in document["cases"]["text-1"]["it"]["missing"]
    right = a_contender(lambda case: lambda: RIGHT).run([TEXT], lambda case: RIGHT, profiles=False)
    assert set(right["cases"]["text-1"]["it"]) == {"error", "caller_ms"}


def test_a_contender_that_fails_in_the_race_is_out_of_it_and_the_other_cases_go_on() -> None:
    left = iter(range(20))

    def begin(case: gpu_contender.Case) -> gpu_contender.Step:
        def step() -> gpu_contender.Logits:
            if case is TEXT and next(left, None) is None:
                raise RuntimeError("no memory left")
            return RIGHT

        return step

    other = gpu_contender.Case("text", (0, 0))
    document = a_contender(begin).run([TEXT, other], lambda case: np.repeat(RIGHT, case.rows, axis=0), profiles=False)
    assert document["cases"]["text-1"]["it"]["missing"] == "RuntimeError: no memory left"


def test_a_group_that_does_not_come_to_its_end_is_told_and_what_it_found_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = tmp_path / "contender.py"
    monkeypatch.setattr(gpu_decode, "CONTENDER", script)
    group = gpu_decode.Group("flash", tmp_path, (1,), 5)
    writes = "import sys; open(sys.argv[sys.argv.index('--json') + 1], 'w').write('{\"cases\": {\"text-1\": {}}}')\n"
    for end, words in (("sys.exit('out of luck')", "out of luck"), ("import time; time.sleep(60)", "it took longer than 5 s")):
        script.write_text(writes + end)
        found = gpu_decode.run_group(group, tmp_path, tmp_path / "reference.npz", tmp_path)
        assert found["cases"] == {"text-1": {}} and words in found["ended"]


def test_kernels_are_counted_by_step_with_the_gaps_between_them() -> None:
    span = gpu_contender.Span
    spans = [span("gemm", 10 * k, 10 * k + 6) for k in range(4)] + [span("norm", 6, 8)]
    spans += [span("inside", 31, 34), span("gemm", 1000, 1006)]  # a step later, the host waited
    found = gpu_contender.kernels_of(spans, 2)
    assert (found["kernels"], found["copies"], found["busy_us"], found["gaps_us"]) == (3.5, 0.0, 16.0, 5.0)
    assert found["by_name"][0] == {"name": "gemm", "calls": 2.5, "us": 15.0}
    assert gpu_contender.kernels_of([], 2)["kernels"] == 0
    others = gpu_contender.kernels_of([span("spin_kernel(long)", 0, 100), span("Memcpy HtoD", 100, 102)], 1)
    assert others["copies"] == 1 and others["kernels"] == 0 and others["busy_us"] == 0


def test_damaged_files_and_runs_at_once_are_tried_and_counted(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / "hostile_files.py"), "--json", str(tmp_path / "found.json")]
    command += ["--bits", "2", "--manifests", "4", "--checkpoints", "4", "--kills", "1", "--races", "1"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    outcomes = json.loads((tmp_path / "found.json").read_text())["outcomes"]
    assert outcomes["bits"] == {"refused": 2}
    counts = {name: sum(found.values()) for name, found in outcomes.items()}
    assert counts == {"bits": 2, "manifests": 4, "checkpoints": 4, "kills": 1, "races": 1}


def test_what_8_bit_activations_lose_is_told_by_product(make_checkpoint: Callable[[ModelConfig], Path], tmp_path: Path) -> None:
    bundle, data = tmp_path / "int8", tmp_path / "ids.jsonl"
    export_bundle(make_checkpoint(ModelConfig.tiny()), bundle, "int8", verify=False)
    data.write_text("[1, 2, 3, 4, 5, 100, 101, 102, 6, 7]\n", encoding="utf-8")
    script = str(ROOT / "benchmarks" / "rounded_activations.py")
    done = subprocess.run([sys.executable, script, str(bundle), "--data", str(data)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lost = json.loads(done.stdout.splitlines()[-1])["mean_kl"]
    assert {"all", "attention.wq.text", "feed_forward.audio.fc2", "head", "layer 0"} <= set(lost)
    told = [
        lost[name][modality] for name in ("all", "all, in blocks of 16", "head", "layer 0") for modality in ("text", "audio")
    ]
    assert min(told) > 0 and len(set(told)) == len(told)  # other products are rounded before every time
    none = subprocess.run([sys.executable, script, str(tmp_path), "--data", str(data)], capture_output=True, text=True)
    assert none.returncode == 1 and none.stderr.startswith("Error: ") and "motrt export" in none.stderr


def test_errors_are_made_up_for_as_if_each_column_were_eliminated_by_hand() -> None:
    """Columns one at a time, each with the inverse of what is left of the matrix, and no factors."""
    chance, how = torch.Generator().manual_seed(0), WeightFormat("int4", 32)
    usual = Quantization((), "search", True, half_scales=True, calibration="none")
    weight = torch.randn(48, 128, generator=chance)
    x = torch.randn(4096, 24, generator=chance) @ torch.randn(24, 128, generator=chance)
    x += 0.3 * torch.randn(4096, 128, generator=chance)
    squares = x.T @ x / len(x)
    inverse = torch.linalg.inv((squares + 0.01 * squares.diagonal().mean() * torch.eye(128)).double())
    left, wanted = weight.double(), torch.empty(48, 128, dtype=torch.float64)
    for column in range(128):
        if column % 32 == 0:
            scale = (
                choose_scales(left[:, column : column + 32].float(), how, "search", torch.float16, True).scales[:, 0].double()
            )
        wanted[:, column] = (left[:, column] / scale).round().clamp(-8, 7) * scale
        error = (left[:, column] - wanted[:, column]) / inverse[column, column]
        left -= error[:, None] * inverse[column][None]
        inverse -= inverse[:, column, None] * inverse[column][None] / inverse[column, column]
    made = compensated(weight, how, squares, usual)
    assert (made.double() - wanted).abs().gt(1e-4).float().mean() < 0.01  # a code may fall the other way in float32
    lost = [(x @ (one - weight).T).square().mean() for one in (made, nearest(weight, how, squares, usual))]
    assert lost[0] < 0.2 * lost[1]


def test_what_compensation_would_bring_is_measured_on_both_modalities(
    make_checkpoint: Callable[[ModelConfig], Path], tmp_path: Path
) -> None:
    checkpoint, data = make_checkpoint(ModelConfig.tiny()), tmp_path / "ids.jsonl"
    export_bundle(checkpoint, tmp_path / "int4", "int4", verify=False)
    data.write_text("[1, 2, 3, 4, 5, 100, 101, 102, 6, 7]\n", encoding="utf-8")
    found = losses_by_way(tmp_path / "int4", checkpoint, data)
    bundle, same = found["the bundle"], found["nearest codes, sampled at once"]
    assert set(found) == {"the bundle"} | {
        f"{way}, sampled {how}" for way in ("nearest codes", "compensated") for how in ("at once", "token by token")
    }
    assert all(set(one) == {"text", "audio"} and min(one.values()) > 0 for one in found.values())
    assert bundle == pytest.approx(same, rel=1e-4)  # the export samples and chooses in the same way
    assert len({tuple(one.values()) for one in found.values() if one is not same and one is not bundle}) == 3
    with pytest.raises(CheckpointError, match="its hash differs"):
        losses_by_way(tmp_path / "int4", make_checkpoint(ModelConfig.tiny(max_seq_len=512)), data)


@pytest.mark.parametrize(("wrong_rung", "verdict"), [("loss", "PASS"), ("P4", "FALSE ALARM")])
def test_a_format_that_loses_much_is_no_false_alarm(
    wrong_rung: str, verdict: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    figures = {"relative_l2_max": 0.5, "limit": 0.1, "share": 0.4}  # the worst error is of a row with a wider limit
    findings = [Finding("P2", "steps", Outcome.PASS, "", {"relative_l2_max": 0.01, "limit": 0.1})]
    findings += [Finding("P4", "text", Outcome.PASS, "", figures), Finding(wrong_rung, "text", Outcome.FAIL, "too much", {})]
    evidence = {"bisect": {"first": None, "broken": [], "parts": [{"error": 1.0, "budget": 4.0}]}}
    report = Report("onnxruntime", "PyTorch", tuple(findings), 1.0, {}, evidence)
    monkeypatch.setattr(clean_builds, "verify_bundle", lambda *arguments, **named: report)
    monkeypatch.setattr(Build, "make", lambda self, folder: folder)
    told = clean_builds.ask(Build(ModelConfig.tiny()), tmp_path)
    assert told["verdict"] == verdict and told["share"] == 0.4 and ("wrong" in told) == (verdict != "PASS")
    assert told["loss"] == ("over" if wrong_rung == "loss" else None)
