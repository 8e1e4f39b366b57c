"""Which versions of what a bundle depends on are installed here, and which are too old. Imports none of them."""

import platform
import re
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version

from motrt.errors import BackendError, raise_all

PACKAGES = ("motrt", "torch", "onnx", "onnxscript", "onnx-ir", "onnxruntime", "numpy", "polygraphy", "tensorrt-rtx", "tensorrt")

# The oldest that are used, and the extra that installs them; pyproject.toml asks for the same.
OLDEST = {
    "onnxruntime": ("1.25", "cpu"),
    "onnxruntime-gpu": ("1.25", "gpu"),
    "torch": ("2.11", "export"),
    "onnx": ("1.20", "export"),
    "onnxscript": ("0.7", "export"),
    "onnx-ir": ("1.0", "export"),
    "polygraphy": ("0.49", "export"),
    "tensorrt": ("10.13", "tensorrt"),
    "tensorrt-rtx": ("1.3", "tensorrt-rtx"),
}

EXPORT_PACKAGES = ("torch", "onnx", "onnxscript", "onnx-ir")

# What can change the numbers that a session computes: the rest writes graphs and engines, or is not in the way.
_COMPUTING = ("motrt", "numpy", "onnxruntime", "torch", "tensorrt-rtx", "tensorrt", "python", "platform")

# One package, by another name where it is built for GPUs.
_OTHER_NAMES = {"onnxruntime": "onnxruntime-gpu"}

_NONE = "not installed"


def installed_versions() -> dict[str, str]:
    """By name: of Python, the platform and every package; ``not installed`` for those that are not."""
    found = {"python": platform.python_version(), "platform": platform.platform()}
    return found | {name: _version_of(name) for name in PACKAGES}


def version_differences(made_with: Mapping[str, str]) -> list[str]:
    """What computes here in another version than ``made_with`` says, as sentences; what is not installed computes nothing."""
    here = installed_versions()
    return [
        f"{name} {here[name]} runs here, {made_with.get(name, 'unknown')} made the bundle"
        for name in _COMPUTING
        if here[name] not in (_NONE, made_with.get(name))
    ]


def refuse_older(*packages: str, **running: str) -> None:
    """Refuse packages that are older than this version of motrt uses; what is not installed is not asked.

    Args:
        packages: names in ``OLDEST``, asked by what is installed.
        running: by name, versions that the modules say of themselves, ``_`` for ``-``.

    Raises:
        BackendError: naming all that are too old, what is needed and what to do.
    """
    found = {name: _version_of(name) for name in packages} | {name.replace("_", "-"): said for name, said in running.items()}
    raise_all(
        BackendError,
        "what is installed is too old for this motrt:",
        [problem for name, came in found.items() if (problem := _too_old(name, came))],
    )


def _too_old(package: str, came: str) -> str | None:
    if package in _OTHER_NAMES and not _is_installed(package) and _is_installed(_OTHER_NAMES[package]):
        package = _OTHER_NAMES[package]
    oldest, extra = OLDEST[package]
    numbers = version_numbers(came)
    if not numbers or numbers >= version_numbers(oldest):
        return None
    built = " (built for Python 3.11 and newer)" if package.startswith("onnxruntime") else ""
    return f"{package} {came} is installed, {oldest} or newer is needed{built}: pip install --upgrade 'motrt[{extra}]'"


def version_numbers(said: str) -> tuple[int, ...]:
    """``10.13.0+cu12`` as (10, 13, 0), which order as versions do; empty where it begins with no number."""
    found = re.match(r"\d+(\.\d+)*", said)
    return tuple(map(int, found[0].split("."))) if found else ()


def _is_installed(package: str) -> bool:
    try:
        version(package)
    except PackageNotFoundError:
        return False
    return True


def _version_of(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return _version_of(_OTHER_NAMES[package]) if package in _OTHER_NAMES else _NONE
