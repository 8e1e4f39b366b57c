"""Packaging: the repository root *is* the package ``motrt``, so the rooms stand at the top level."""

from setuptools import setup

ROOMS = ["model_def", "model_def.checkpoint", "runtime", "export"]

setup(
    packages=["motrt", *(f"motrt.{room}" for room in ROOMS)],
    package_dir={"motrt": "."},
    package_data={"motrt": ["py.typed"]},
)
