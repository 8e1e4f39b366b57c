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


def test_what_is_raced_is_made_first_and_the_rest_is_proven_behind_the_race(
    gpu_check: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    check = gpu_check.Check(tmp_path, seconds=600)
    names: list[str] = []

    def run(name: str, command: list[str], *others: Any, **more: Any) -> Any:
        names.append(name)
        if "export" in name:
            (tmp_path / command[5]).mkdir()
            (tmp_path / command[5] / "manifest.json").touch()
        return gpu_check.Part(name, "passed")

    monkeypatch.setattr(check, "run", run)
    gpu_check.make_raced(check, ["cuda"])
    gpu_check.check_speed(check)
    gpu_check.check_full(check, ["cuda"])
    race = names.index("race")
    assert names[0] == "full: model" and set(names[1:race]) == {f"full: export for cuda, {kind}" for kind in gpu_check.RACED}
    kinds = gpu_check.KINDS["full"]
    behind = {f"full: parity of cuda, {kind}" for kind in kinds} | {f"full: export for cuda, {kind}" for kind in kinds}
    assert set(names[race + 1 :]) == behind - set(names[1:race]) and len(names) == 2 + 2 * len(kinds)


def test_what_a_process_left_is_kept_where_it_was_ended(gpu_check: Any, tmp_path: Path) -> None:
    check = gpu_check.Check(tmp_path, seconds=60)
    left = tmp_path / "left.json"
    writes = f"import time; open({str(left)!r}, 'w').write('{{\"cases\": [1]}}'); print('busy', flush=True); time.sleep(60)"
    part = check.run("race", [sys.executable, "-c", writes], most_seconds=3, leaves=left)
    assert (part.outcome, part.figures, part.detail) == ("timed out", {"cases": [1]}, "busy")
