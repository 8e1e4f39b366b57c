"""The check for machines with a GPU runs to its end on one without, and no part takes another with it."""

import json
import os
import subprocess
import sys
from importlib.machinery import SourceFileLoader
from importlib.util import module_from_spec, spec_from_loader
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).resolve().parent.parent / "scripts" / "gpu_check"


@pytest.fixture
def gpu_check() -> Any:
    loader = SourceFileLoader("gpu_check", str(SCRIPT))
    spec = spec_from_loader("gpu_check", loader)
    assert spec is not None
    module = sys.modules["gpu_check"] = module_from_spec(spec)
    loader.exec_module(module)
    return module


def test_without_a_gpu_it_says_what_it_skipped_and_why(tmp_path: Path) -> None:
    hidden = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, str(SCRIPT), "--out", str(tmp_path / "found.json")]
    done = subprocess.run(command, env=hidden, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    parts = {part["name"]: part for part in json.loads((tmp_path / "found.json").read_text())}
    assert parts["environment"]["figures"]["packages"]["torch"] != "not installed"
    assert [one["backend"] for one in parts["backends"]["figures"]["backends"]][-2:] == ["onnxruntime", "torch"]
    for size in ("tiny", "full"):
        for backend in ("cuda", "tensorrt", "tensorrt-rtx"):
            part = parts[f"{size}: parity of {backend}"]
            assert part["outcome"] == "skipped" and part["detail"]
    assert parts["race"]["outcome"] == "skipped"
    assert "skipped" in done.stdout and "found.json: the whole of it" in done.stdout


def test_a_part_that_fails_or_hangs_is_told_and_the_next_one_runs(gpu_check: Any, tmp_path: Path) -> None:
    check = gpu_check.Check(tmp_path, seconds=60)
    check.run("fails", [sys.executable, "-c", "import sys; sys.exit('out of luck')"])
    check.run("hangs", [sys.executable, "-c", "import time; time.sleep(60)"], most_seconds=0.5)
    check.run("is not there", [str(tmp_path / "nothing")])
    check.run("runs", [sys.executable, "-c", 'print(\'{"verdict": "PASS"}\')'])
    assert [part.outcome for part in check.parts] == ["failed", "timed out", "failed", "passed"]
    said = gpu_check.summary(check.parts)
    assert "out of luck" in said and "verdict    PASS: runs" in said


def test_when_the_time_is_over_the_rest_is_skipped(gpu_check: Any, tmp_path: Path) -> None:
    check = gpu_check.Check(tmp_path, seconds=0)
    assert check.run("late", [sys.executable, "-c", ""]).detail == "the time is over"


def test_a_backend_that_can_be_used_is_exported_for_and_verified(
    gpu_check: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    check = gpu_check.Check(tmp_path, seconds=60)
    commands: list[list[str]] = []

    def run(name: str, command: list[str], *others: Any, **more: Any) -> Any:
        commands.append(command)
        failed = "fp16" in command
        if command[3] == "export" and not failed:
            (tmp_path / command[5]).mkdir()
            (tmp_path / command[5] / "manifest.json").touch()
        return gpu_check.Part(name, "failed" if failed else "passed")

    monkeypatch.setattr(check, "run", run)
    gpu_check.check_tiny(check, {"cuda": {"usable": True}})
    asked = [command[3] for command in commands]
    # What could not be exported is not verified.
    assert asked == ["init", "export", *["export", "verify"] * 4]
    assert commands[-2][-3:-1] == ["--operators", "onnxruntime"]
    assert commands[3][-4:] == ["tiny-cuda-bf16", "--backend", "cuda", "--json"]


def made_full(gpu_check: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seconds: float) -> list[str]:
    """The names of what is run of the full size, where every part of it passes."""
    check = gpu_check.Check(tmp_path, seconds=seconds)
    names: list[str] = []

    def run(name: str, command: list[str], *others: Any, **more: Any) -> Any:
        names.append(name)
        if "export" in name:
            (tmp_path / command[5]).mkdir()
            (tmp_path / command[5] / "manifest.json").touch()
        return gpu_check.Part(name, "passed")

    monkeypatch.setattr(check, "run", run)
    gpu_check.make_full(check, ["cuda"], True, gpu_check.RACE_SECONDS)
    gpu_check.check_speed(check)
    for kind in gpu_check.KINDS["full"]:
        gpu_check.prove_bundle(check, "full", "cuda", kind)
    return names


def test_the_full_size_is_made_once_proven_once_and_raced_alone(
    gpu_check: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = made_full(gpu_check, tmp_path, monkeypatch, 600)
    exports, proofs = (
        {f"full: {what} cuda, {kind}" for kind in gpu_check.KINDS["full"]} for what in ("export for", "parity of")
    )
    assert names[0] == "full: model" and names[-1] == "race"
    assert set(names[1:-1]) == exports | proofs and len(names) == 2 + len(exports) + len(proofs)


def test_proofs_leave_the_race_its_time(gpu_check: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = made_full(gpu_check, tmp_path, monkeypatch, gpu_check.RACE_SECONDS)
    assert names.index("race") == 1 + len(gpu_check.KINDS["full"])  # the model, the bundles, and then at once
    assert len(names) == 2 + 2 * len(gpu_check.KINDS["full"])


def test_what_a_process_left_is_kept_where_it_was_ended(gpu_check: Any, tmp_path: Path) -> None:
    check = gpu_check.Check(tmp_path, seconds=60)
    left = tmp_path / "left.json"
    writes = f"import time; open({str(left)!r}, 'w').write('{{\"cases\": [1]}}'); time.sleep(60)"
    part = check.run("race", [sys.executable, "-c", writes], most_seconds=3, leaves=left)
    assert part.outcome == "timed out" and part.figures == {"cases": [1]}
