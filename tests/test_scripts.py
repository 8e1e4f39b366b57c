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
    for name in ("smoke", "race", "tests", "proof", "probes"):
        assert parts[name]["outcome"] == "skipped" and parts[name]["detail"]
    assert "skipped" in done.stdout and "found.json: the whole of it" in done.stdout


def test_a_part_that_fails_or_hangs_is_told_and_the_next_one_runs(gpu_check: Any, tmp_path: Path) -> None:
    check = gpu_check.Check(tmp_path, seconds=60)
    check.run("fails", [sys.executable, "-c", "import sys; sys.exit('out of luck')"])
    check.run("hangs", [sys.executable, "-c", "import time; time.sleep(60)"], max_seconds=0.5)
    check.run("is not there", [str(tmp_path / "nothing")])
    check.run("runs", [sys.executable, "-c", 'print(\'{"verdict": "PASS"}\')'])
    assert [part.outcome for part in check.parts] == ["failed", "timed out", "failed", "passed"]
    said = gpu_check.summary(check.parts)
    assert "out of luck" in said and "verdict    PASS: runs" in said


def test_when_the_time_is_over_the_rest_is_skipped(gpu_check: Any, tmp_path: Path) -> None:
    check = gpu_check.Check(tmp_path, seconds=0)
    assert check.run("late", [sys.executable, "-c", ""]).detail == "the time is over"


def test_a_gpu_that_no_backend_can_use_is_a_failure(gpu_check: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check = gpu_check.Check(tmp_path, seconds=60)
    listed = [{"backend": name, "usable": False, "reason": f"no {name}"} for name in gpu_check.GPU_BACKENDS]
    monkeypatch.setattr(gpu_check.shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(check, "run", lambda name, *others: gpu_check.Part(name, "passed", figures={"backends": listed}))
    gpu_check.run_parts(check, set(gpu_check.PARTS))
    told = {part.name: part for part in check.parts}
    assert told["a backend that can use the GPU"].outcome == "failed"
    assert "cuda: no cuda; tensorrt: no tensorrt" in told["a backend that can use the GPU"].detail
    assert told["race"].outcome == "skipped"


@pytest.fixture
def named(gpu_check: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Any, list[str]]:
    """A check that runs nothing, its processes' names in turn; the full model's export in fp16 fails."""
    check, names = gpu_check.Check(tmp_path, seconds=600), list[str]()

    def run(name: str, command: list[str], *others: Any, **more: Any) -> Any:
        names.append(name)
        failed = name == "full: export, fp16"
        if command[2:4] == ["motrt", "export"] and not failed:
            (tmp_path / command[5]).mkdir()
            (tmp_path / command[5] / "manifest.json").touch()
        return gpu_check.Part(name, "failed" if failed else "passed")

    monkeypatch.setattr(check, "run", run)
    return check, names


def test_every_part_is_run_in_its_order_and_nothing_is_made_twice(
    gpu_check: Any, named: tuple[Any, list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    check, names = named
    monkeypatch.setattr(gpu_check, "check_environment", lambda check: {"cuda": {"usable": True}})
    gpu_check.run_parts(check, set(gpu_check.PARTS))
    exports = [name for name in names if "export" in name]
    assert len(exports) == len(set(exports))
    assert set(names[: names.index("smoke")]) >= {f"tiny64: export, {kind}" for kind in gpu_check.RACED}
    before = set(names[: names.index("race")])
    assert before >= {f"full: export, {kind}" for kind in (*gpu_check.RACED, *gpu_check.PROVEN)} | {"smoke"}
    assert before >= {f"tests, {kind}" for kind in (*gpu_check.TESTED, "planted faults")}
    # What could not be exported is not verified.
    proven = [kind for kind in gpu_check.PROVEN if kind != "fp16"]
    assert {one for one in names[names.index("race") :] if "parity" in one} == {f"full: parity, {kind}" for kind in proven}


def test_one_part_alone_makes_what_it_needs(
    gpu_check: Any, named: tuple[Any, list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    check, names = named
    monkeypatch.setattr(gpu_check, "check_environment", lambda check: {"cuda": {"usable": True}})
    gpu_check.run_parts(check, {"race"})
    assert names[0] == "full: model" and names[-1] == "race" and not any("tiny64" in name for name in names)


def test_what_a_process_left_is_kept_where_it_was_ended(gpu_check: Any, tmp_path: Path) -> None:
    check = gpu_check.Check(tmp_path, seconds=60)
    left = tmp_path / "left.json"
    writes = f"import time; open({str(left)!r}, 'w').write('{{\"cases\": [1]}}'); print('busy', flush=True); time.sleep(60)"
    part = check.run("race", [sys.executable, "-c", writes], max_seconds=3, leaves=left)
    assert (part.outcome, part.figures, part.detail) == ("timed out", {"cases": [1]}, "busy")
