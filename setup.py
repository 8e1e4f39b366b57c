"""Packaging: the repository root *is* the package ``motrt``, so the rooms stand at the top level.

Everything that can be said without code stands in ``pyproject.toml``; this file holds what can not: which folders are
rooms, and that the build script itself, which lies among the package's modules, is not one of them.
"""

from setuptools import setup
from setuptools.command.build_py import build_py

ROOMS = ["model_def", "model_def.checkpoint", "runtime", "export", "export.parity"]
NOT_MODULES = {"setup"}


class BuildRooms(build_py):  # type: ignore[misc, unused-ignore]  # untyped where setuptools ships no types
    """Collects the modules of the rooms, and leaves the build script out of the wheel."""

    def find_package_modules(self, package: str, package_dir: str) -> list[tuple[str, str, str]]:
        """The (package, module, path) triples of one room."""
        found = super().find_package_modules(package, package_dir)
        return [triple for triple in found if package != "motrt" or triple[1] not in NOT_MODULES]


setup(
    packages=["motrt", *(f"motrt.{room}" for room in ROOMS)],
    package_dir={"motrt": "."},
    package_data={"motrt": ["py.typed"]},
    cmdclass={"build_py": BuildRooms},
)
