"""Which versions of what a bundle depends on are installed here. Imports none of them."""

import platform
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version

PACKAGES = ("motrt", "torch", "onnx", "onnxscript", "onnx-ir", "onnxruntime", "numpy", "polygraphy", "tensorrt-rtx", "tensorrt")

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


def _version_of(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return _version_of(_OTHER_NAMES[package]) if package in _OTHER_NAMES else _NONE
