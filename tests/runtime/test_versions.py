"""What is too old is refused with the version that is needed, on every path that needs it, and before any work."""

import re
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import onnxruntime
import pytest
from click.testing import CliRunner

from motrt.cli import main
from motrt.errors import BackendError
from motrt.export.bundle_from_checkpoint import export_bundle
from motrt.export.engine_from_onnx import _polygraphy
from motrt.export.verification import verify_bundle
from motrt.runtime import versions
from motrt.runtime.backends import probe
from motrt.runtime.cuda_device import CudaDevice
from motrt.runtime.load import load
from motrt.runtime.tensorrt_library import tensorrt_module
from motrt.runtime.versions import OLDEST, refuse_older, version_numbers

PYPROJECT = Path(__file__).resolve().parents[2] / "pyproject.toml"


@pytest.fixture
def old(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Versions that are said to be installed, by package; the others are what they are."""
    said: dict[str, str] = {}
    monkeypatch.setattr(versions, "version", lambda package: said.get(package) or version(package))
    return said


def test_the_oldest_versions_are_those_that_the_package_asks_for() -> None:
    text = PYPROJECT.read_text(encoding="utf-8")
    for package, (oldest, extra) in OLDEST.items():
        asked = re.search(rf"^{extra} = (.*)$", text, re.MULTILINE)
        assert asked is not None and f'"{package}>={oldest}"' in asked[1]


@pytest.mark.parametrize(
    ("came", "is_refused"),
    [
        ("1.24.9", True), ("1.9", True), ("0.99.1", True), ("1", True), ("1.24.0.dev20260101", True),
        ("1.25", False), ("1.25.0rc1", False), ("1.25rc1", False), ("1.100.0+cpu", False), ("2", False), ("of mine", False),
    ],
)  # fmt: skip
def test_versions_are_compared_as_numbers(came: str, is_refused: bool) -> None:
    if not is_refused:
        return refuse_older(onnxruntime=came)
    with pytest.raises(BackendError, match=rf"onnxruntime {came} is installed, 1.25 or newer is needed .*pip install"):
        refuse_older(onnxruntime=came)
    return None


def test_what_begins_with_no_number_has_none() -> None:
    assert (version_numbers("10.13.0+cu12"), version_numbers("dev")) == ((10, 13, 0), ())


def test_all_that_is_too_old_is_named_at_once(old: dict[str, str]) -> None:
    old |= {"torch": "2.5.1", "onnx": "1.17.0", "onnx-ir": "0.1.0"}
    with pytest.raises(BackendError) as caught:
        refuse_older("torch", "onnx", "onnxscript", "onnx-ir")
    for said in ("torch 2.5.1 is installed, 2.11", "onnx 1.17.0 is installed, 1.20", "onnx-ir 0.1.0 is installed, 1.0"):
        assert said in str(caught.value)
    assert "onnxscript" not in str(caught.value)


def test_an_onnxruntime_for_gpus_is_mended_by_its_own_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(versions, "_is_installed", lambda package: package == "onnxruntime-gpu")
    with pytest.raises(BackendError, match=r"onnxruntime-gpu 1.23.2 is installed, .*'motrt\[gpu\]'"):
        refuse_older(onnxruntime="1.23.2")


def test_an_old_onnxruntime_is_named_by_all_that_would_run_it(
    tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(onnxruntime, "__version__", "1.23.2")
    for backend in ("auto", "onnxruntime"):
        with pytest.raises(BackendError, match=r"onnxruntime 1.23.2 is installed, 1.25 or newer is needed"):
            load(tiny_bundle, backend)
    probe.cache_clear()
    assert "1.25 or newer is needed" in probe("onnxruntime").reason
    done = CliRunner().invoke(main, ["generate", str(tiny_bundle), "--prompt-ids", "1"])
    assert done.exit_code == 1 and "1.25 or newer is needed" in done.stderr
    probe.cache_clear()


@pytest.mark.parametrize("package", ["torch", "onnx", "onnxscript", "onnx-ir", "onnxruntime"])
def test_exporting_and_verifying_refuse_what_is_too_old_before_any_work(
    package: str, tiny_checkpoint: Path, tiny_bundle: Path, tmp_path: Path, old: dict[str, str]
) -> None:
    old[package] = "0.1"
    for does in (lambda: export_bundle(tiny_checkpoint, tmp_path / "b"), lambda: verify_bundle(tiny_bundle)):
        with pytest.raises(BackendError, match=f"{package} 0.1 is installed, "):
            does()
    if package != "onnxruntime":
        done = CliRunner().invoke(main, ["inspect", str(tiny_bundle)])
        assert done.exit_code == 1 and f"{package} 0.1 is installed" in done.stderr
    assert not list(tmp_path.iterdir())


def test_the_torch_backend_refuses_an_old_torch(tiny_checkpoint: Path, old: dict[str, str]) -> None:
    old["torch"] = "2.5.1+cpu"
    with pytest.raises(BackendError, match=r"torch 2.5.1\+cpu is installed, 2.11 or newer is needed"):
        load(tiny_checkpoint)


@pytest.mark.parametrize(("flavour", "module"), [("tensorrt", "tensorrt"), ("tensorrt-rtx", "tensorrt_rtx")])
def test_an_old_tensorrt_is_refused(flavour: str, module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, module, SimpleNamespace(__version__="1.2.0"))
    with pytest.raises(BackendError, match=f"{flavour} 1.2.0 is installed, .* or newer is needed"):
        tensorrt_module(flavour)


def test_an_old_polygraphy_is_refused_by_engines_and_by_devices(old: dict[str, str]) -> None:
    old["polygraphy"] = "0.40"
    for does in (CudaDevice, lambda: _polygraphy("tensorrt-rtx")):
        with pytest.raises(BackendError, match=r"polygraphy 0.40 is installed, 0.49 or newer is needed"):
            does()
