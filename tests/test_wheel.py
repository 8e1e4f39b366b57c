"""The wheel holds the rooms and nothing else, and runs a bundle where neither torch nor onnx is installed.

Needs what pip needs to find packages: an index, or a folder of wheels.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ROOMS = ("model_def", "runtime", "export")
NOT_INSTALLED = ("tests", "benchmarks", "docs")
FOR_THE_BUILD = ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE", "py.typed")

# What it takes to open a bundle and generate on a CPU: the core's dependencies and the [cpu] extra.
RUNTIME = ("numpy", "click", "rich", "tokenizers", "onnxruntime")

GREEDY = """
import sys
import motrt

with motrt.load(sys.argv[1]) as session:
    steps = session.generate([1, 2, 3], sampling=motrt.Sampling(temperature=0), max_tokens=4)
    ids = [step.token_id for step in steps]
print("loaded:", *({"torch", "onnx"} & set(sys.modules)))
print(*ids)
"""


def run(*command: str | Path, cwd: Path) -> str:
    """Standard output of a command that must succeed; what it said, if it does not."""
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
    done = subprocess.run([str(part) for part in command], cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f"{command} said:\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the tree, so that building leaves nothing behind in the real one; what stays home holds a file each."""
    folder = tmp_path_factory.mktemp("source")
    for name in ROOMS:
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in NOT_INSTALLED:
        (folder / name).mkdir()
        (folder / name / "test_stray.py").touch()
        (folder / name / "__init__.py").touch()
    for path in [*ROOT.glob("*.py"), *(ROOT / name for name in FOR_THE_BUILD)]:
        shutil.copy(path, folder / path.name)
    return folder


@pytest.fixture(scope="module")
def wheel(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", folder, source, cwd=folder)
    (found,) = folder.glob("*.whl")
    return found


@pytest.fixture(scope="module")
def empty_environment(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the programs of a new environment that holds the wheel and what it needs on a CPU."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=False, symlinks=True)
    pip = (sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", "--python", folder / "bin" / "python")
    run(*pip, "install", "-c", ROOT / "constraints.txt", f"{wheel}[cpu]", cwd=folder)
    return folder / "bin"


def test_the_wheel_holds_every_module_of_the_rooms_and_nothing_else(wheel: Path, source: Path) -> None:
    modules = [path for path in source.glob("*.py") if path.name != "setup.py"]
    modules += [path for room in ROOMS for path in (source / room).rglob("*.py")]
    modules += [source / "py.typed", source / "runtime" / "step_kernels.cu"]
    expected = {f"motrt/{path.relative_to(source).as_posix()}" for path in modules}
    with zipfile.ZipFile(wheel) as archive:
        held = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert held == expected


def test_the_wheel_carries_its_licence_and_its_command(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        files = {name.split(".dist-info/")[1]: name for name in archive.namelist() if ".dist-info/" in name}
        assert "Apache License" in archive.read(files["licenses/LICENSE"]).decode()
        assert "motrt = motrt.cli:main" in archive.read(files["entry_points.txt"]).decode()
        assert "License-Expression: Apache-2.0" in archive.read(files["METADATA"]).decode()


def test_the_core_and_its_cpu_extra_are_all_that_running_a_bundle_takes(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        lines = re.findall(r"^Requires-Dist: (.*)$", archive.read(name).decode(), re.MULTILINE)
    core = {re.split(r"[ <>=;]", line)[0] for line in lines if "extra ==" not in line or 'extra == "cpu"' in line}
    assert core == set(RUNTIME)


def test_building_warns_of_nothing_left_out_or_deprecated(source: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(tmp_path), str(source)],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    said = done.stdout + done.stderr
    assert [line for line in said.splitlines() if re.search("absent|deprecat|ambiguous", line, re.IGNORECASE)] == []


def test_the_installed_program_introduces_itself_without_torch_or_onnx(empty_environment: Path, tmp_path: Path) -> None:
    assert run(empty_environment / "motrt", "--help", cwd=tmp_path).startswith("Usage: motrt ")
    code = "import importlib.util as u; print(*[n for n in ('torch', 'onnx', 'safetensors', 'tests') if u.find_spec(n)])"
    assert run(empty_environment / "python", "-c", code, cwd=tmp_path).split() == []


def test_the_installed_program_generates_from_a_bundle(empty_environment: Path, tiny_bundle: Path, tmp_path: Path) -> None:
    command = ("generate", tiny_bundle, "--prompt-ids", "1,2,3", "--schedule", "text:4,audio:2f", "--json")
    there = json.loads(run(empty_environment / "motrt", *command, cwd=tmp_path))
    here = json.loads(run(sys.executable, "-m", "motrt", *command, cwd=tmp_path))
    assert there["tokens"] == here["tokens"]
    assert there["frames"] == here["frames"]
    assert (len(there["tokens"]), len(there["frames"]), there["finish"]) == (12, 2, "schedule")


def test_the_installed_program_says_what_a_command_needs_that_is_not_there(
    empty_environment: Path, tiny_bundle: Path, tmp_path: Path
) -> None:
    for arguments in (("init", "model"), ("inspect", tiny_bundle), ("export", "a", "b"), ("verify", tiny_bundle)):
        done = subprocess.run([empty_environment / "motrt", *arguments], capture_output=True, text=True, cwd=tmp_path)
        assert done.returncode == 1
        assert "pip install 'motrt[export,cpu]'" in done.stderr
        assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_the_installed_library_says_the_same_tokens_as_this_one(
    empty_environment: Path, tiny_bundle: Path, tmp_path: Path
) -> None:
    script = tmp_path / "greedy.py"
    script.write_text(GREEDY, encoding="utf-8")
    there = run(empty_environment / "python", script, tiny_bundle, cwd=tmp_path).splitlines()
    here = run(sys.executable, script, tiny_bundle, cwd=tmp_path).splitlines()
    assert there[0] == "loaded:"
    assert len(there[1].split()) == 4
    assert there[1] == here[1]
