"""Packaging: the repository root *is* the package ``motrt``, so the rooms stand at the top level.

Everything that can be said without code stands in ``pyproject.toml``; this file holds what can not: which folders are
rooms (the folders within a room come with it), and that the build script itself, which lies among the package's modules,
is not one of them.
"""

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

ROOMS = ("model_def", "runtime", "export", "serve")
NOT_MODULES = {"setup"}


class BuildRooms(build_py):  # type: ignore[misc, unused-ignore]  # untyped where setuptools ships no types
    """Collects the modules of the rooms, and leaves the build script out of the wheel."""

    def find_package_modules(self, package: str, package_dir: str) -> list[tuple[str, str, str]]:
        """The (package, module, path) triples of one room."""
        found = super().find_package_modules(package, package_dir)
        return [triple for triple in found if package != "motrt" or triple[1] not in NOT_MODULES]


def rooms() -> list[str]:
    """Every room and every room within it, as the package calls them."""
    return [f"motrt.{name}" for name in find_packages(include=[*ROOMS, *(f"{room}.*" for room in ROOMS)])]


setup(
    packages=["motrt", *rooms()],
    package_dir={"motrt": "."},
    package_data={"motrt": ["py.typed"], "motrt.runtime": ["step_kernels.cu"]},
    cmdclass={"build_py": BuildRooms},
)
