"""The rules of the house, held by reading the source itself: who imports whom, who owns what, what is public.

Nothing here knows what the code does.
"""

import ast
import re
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from fnmatch import fnmatch
from importlib import metadata
from pathlib import Path

import pytest

import motrt

ROOT = Path(__file__).resolve().parent.parent
ROOMS = ("model_def", "runtime", "export", "serve")

# Each may import what stands before it, and itself; `motrt` is the public face, __init__.py.
ORDER = (
    "motrt.errors",
    "motrt.model_def",
    "motrt.runtime",
    "motrt",
    "motrt.serve",
    "motrt.export",
    "motrt.parity",
    "motrt.pytest_plugin",
    "motrt.cli",
    "motrt.__main__",
)

STANDARD_LIBRARY_ALONE = (
    "errors.py",
    "model_def/atomic_folder.py",
    "model_def/config.py",
    "model_def/file_problem.py",
    "model_def/graph.py",
    "model_def/parameters.py",
    "model_def/quantization.py",
    "model_def/signature.py",
)

# Heavy packages, and the files that may import them when they are themselves imported. Elsewhere: inside a function.
OWNERS = {
    "torch": ("model_def/*.py", "runtime/torch_session.py", "export/*.py"),
    "safetensors": ("model_def/checkpoint/*.py",),
    "onnxruntime": ("runtime/onnx_session.py", "runtime/onnx_cuda_session.py", "export/*.py"),
    "onnx": ("export/*.py",),
    "onnx_ir": ("export/*.py",),
    "onnxscript": ("export/*.py",),
    "polygraphy": ("export/*.py",),
    "gguf": (),
    "tensorrt": (),
    "tensorrt_rtx": (),
    "fastapi": ("serve/*.py",),
    "uvicorn": ("serve/*.py",),
    "prometheus_client": ("serve/*.py",),
    "ray": ("serve/ray.py",),
    "click": ("cli.py",),
    "rich": ("cli.py", "export/report.py"),
}

GENERIC_NAMES = {"utils", "util", "helpers", "helper", "common", "misc", "tools", "core", "base", "stuff"}

PUBLIC_NAMES = {
    "AudioFrame",
    "Engine",
    "EngineOptions",
    "MotrtError",
    "Sampling",
    "Session",
    "Step",
    "__version__",
    "interleave",
    "load",
    "on_control",
    "then",
}

MACHINE_PATH = re.compile(r"(?<![\w.~$}])/(?:work|root|home/\w+|Users/\w+)/\w")
REGISTRY = re.compile(
    r"pypi\.(?:org|python)|pythonhosted\.|download\.pytorch\.|--(?:extra-)?index-url|--find[-]links|file:[/]{2}"
)


def package_files() -> list[Path]:
    """The files that the wheel holds, relative to the root."""
    top = [path for path in ROOT.glob("*.py") if path.name != "setup.py"]
    return sorted(path.relative_to(ROOT) for path in [*top, *(file for room in ROOMS for file in (ROOT / room).rglob("*.py"))])


def text_files() -> list[Path]:
    """Everything of ours that people read, relative to the root."""
    folders = [*(ROOT / name for name in (*ROOMS, "tests", "benchmarks", "examples", "docs", ".ci")), ROOT]
    found = [path for folder in folders for path in (folder.glob("*") if folder == ROOT else folder.rglob("*"))]
    suffixes = {".py", ".md", ".txt", ".toml", ".json", ".in", ".sh", ".yml", ".yaml", ""}
    return sorted(path.relative_to(ROOT) for path in found if path.is_file() and path.suffix in suffixes)


def module_name(path: Path) -> str:
    parts = ["motrt", *path.with_suffix("").parts]
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path) for path in package_files()}


def imports(nodes: list[ast.stmt] | Iterator[ast.AST]) -> Iterator[str]:
    """The full names of the modules that these nodes import; ``from motrt import errors`` is ``motrt.errors``."""
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: a relative import: write it in full"
            base = node.module or ""
            for alias in node.names:
                yield f"{base}.{alias.name}" if f"{base}.{alias.name}" in MODULES else base


def parse(path: Path) -> ast.Module:
    return ast.parse((ROOT / path).read_text(encoding="utf-8"), str(path))


def all_imports(path: Path) -> set[str]:
    return set(imports(ast.walk(parse(path))))


def import_time_nodes(nodes: list[ast.stmt]) -> Iterator[ast.AST]:
    """What runs when the file is imported: not the bodies of functions, nor what only a type checker reads."""
    for node in nodes:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            continue
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            yield from import_time_nodes(node.orelse)
            continue
        yield node
        for block in ("body", "orelse", "finalbody"):
            yield from import_time_nodes(getattr(node, block, []))
        for handler in getattr(node, "handlers", []):
            yield from import_time_nodes(handler.body)


def import_time_packages(path: Path) -> set[str]:
    return {name.split(".")[0] for name in imports(import_time_nodes(parse(path).body))}


def place(module: str) -> int:
    """Where a module stands in ``ORDER``."""
    return ORDER.index(module if module in ORDER else ".".join(module.split(".")[:2]))


def test_imports_run_one_way() -> None:
    for path in package_files():
        ours = {name for name in all_imports(path) if name.split(".")[0] == "motrt"}
        backwards = sorted(name for name in ours if place(name) > place(module_name(path)))
        assert not backwards, f"{path} stands below what it imports: {backwards}"


def test_the_package_never_imports_what_is_not_installed_with_it() -> None:
    outside = {"tests", "benchmarks", "examples", "setup", "motrt.tests", "motrt.benchmarks", "motrt.examples"}
    for path in package_files():
        taken = {name for name in all_imports(path) for prefix in outside if f"{name}.".startswith(f"{prefix}.")}
        assert not taken, f"{path} imports {sorted(taken)}"


def test_errors_know_nothing_of_the_package() -> None:
    assert not {name for name in all_imports(Path("errors.py")) if name.split(".")[0] == "motrt"}


@pytest.mark.parametrize("name", STANDARD_LIBRARY_ALONE)
def test_what_the_model_is_can_be_told_with_the_standard_library_alone(name: str) -> None:
    allowed = {"motrt.errors", *(module_name(Path(other)) for other in STANDARD_LIBRARY_ALONE)}
    foreign = {m for m in all_imports(Path(name)) if m not in allowed and m.split(".")[0] not in sys.stdlib_module_names}
    assert not foreign


def test_heavy_packages_are_imported_at_module_level_by_their_owners_alone() -> None:
    for path in package_files():
        heavy = import_time_packages(path) & OWNERS.keys()
        taken = sorted(
            package for package in heavy if not any(fnmatch(path.as_posix(), pattern) for pattern in OWNERS[package])
        )
        assert not taken, f"{path} imports {taken} when it is imported: do it inside the function that needs it"


def test_the_reader_of_imports_sees_what_runs_and_skips_what_does_not() -> None:
    source = """
import one
if TYPE_CHECKING:
    import two
else:
    import three
try:
    import four.part
except ImportError:
    from five import name
class A:
    import six
    def f(self):
        import seven
"""
    found = set(imports(import_time_nodes(ast.parse(source).body)))
    assert found == {"one", "three", "four.part", "five", "six"}


@pytest.mark.parametrize("module", ["motrt", "motrt.cli"])
def test_importing_the_package_or_its_command_line_loads_nothing_heavy(module: str) -> None:
    heavy = sorted(OWNERS.keys() - {"click", "rich"})
    code = f"import sys, {module}; print(*sorted(set({heavy}) & set(sys.modules)))"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert loaded == []


def test_opening_a_bundle_and_generating_loads_neither_torch_nor_onnx(tiny_bundle: Path) -> None:
    code = f"""
import sys, motrt
with motrt.load({str(tiny_bundle)!r}) as session:
    assert len(list(session.generate([1, 2, 3], max_tokens=2))) == 2
print(*sorted({{"torch", "onnx", "onnx_ir", "onnxscript", "safetensors"}} & set(sys.modules)))
"""
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert loaded == []


def test_no_file_has_a_name_that_says_nothing() -> None:
    generic = [path for path in text_files() if path.suffix == ".py" and path.stem.removeprefix("test_") in GENERIC_NAMES]
    assert generic == []


def test_the_root_of_the_tests_is_not_a_package_so_the_name_of_the_checkout_does_not_matter() -> None:
    assert not (ROOT / "tests" / "__init__.py").exists()


def test_the_patterns_below_know_a_machines_path_and_a_registry() -> None:
    for folder in ("work", "root", "home/someone", "Users/someone"):
        assert MACHINE_PATH.search(f"see /{folder}/main")
    assert not MACHINE_PATH.search("the framework/root/model of a/home/x")
    assert REGISTRY.search("https://" + "pypi" + ".org/simple")


def test_no_file_names_a_machine_or_a_registry() -> None:
    lines = (
        (f"{path}:{number}", line)
        for path in text_files()
        for number, line in enumerate((ROOT / path).read_text(encoding="utf-8").splitlines(), 1)
    )
    assert [f"{where}: {line}" for where, line in lines if MACHINE_PATH.search(line) or REGISTRY.search(line)] == []


def ways_to_start() -> dict[str, list[str]]:
    return {
        "motrt": [str(Path(sysconfig.get_path("scripts"), "motrt"))],
        "python -m motrt": [sys.executable, "-m", "motrt"],
        "python cli.py": [sys.executable, str(ROOT / "cli.py")],
    }


@pytest.mark.parametrize("option", ["--help", "--version"])
@pytest.mark.parametrize("folder", ["the root", "elsewhere"])
def test_the_three_ways_to_start_the_program_are_one_program(option: str, folder: str, tmp_path: Path) -> None:
    cwd = ROOT if folder == "the root" else tmp_path
    said = {
        way: subprocess.run([*command, option], capture_output=True, text=True, check=True, cwd=cwd).stdout
        for way, command in ways_to_start().items()
    }
    assert said["motrt"].strip()
    assert said["python -m motrt"] == said["motrt"]
    assert said["python cli.py"] == said["motrt"]


def test_the_public_names_are_these_and_each_is_there() -> None:
    assert set(motrt.__all__) == PUBLIC_NAMES
    assert len(motrt.__all__) == len(PUBLIC_NAMES)
    assert [name for name in motrt.__all__ if not hasattr(motrt, name)] == []


def test_the_version_is_one_number() -> None:
    assert motrt.__version__ == metadata.version("motrt"), "if the number has just changed: make install"


def test_every_dependency_has_a_tested_version() -> None:
    lines = metadata.requires("motrt") or []
    wanted = {re.split(r"[ <>=;\[]", line)[0] for line in lines if not re.search(r"extra == .(gpu|tensorrt)", line)}
    constrained = re.findall(r"^([\w-]+)==", (ROOT / "constraints.txt").read_text(encoding="utf-8"), re.MULTILINE)
    assert {"numpy", "torch", "pytest"} <= wanted <= set(constrained)


def test_every_folder_of_a_room_is_a_package_so_that_the_wheel_holds_it() -> None:
    folders = {path.parent for path in package_files()}
    assert [folder for folder in folders if not (ROOT / folder / "__init__.py").is_file()] == []


def test_every_folder_at_the_root_is_a_room_or_stays_home() -> None:
    setup = parse(Path("setup.py"))
    (rooms,) = (node.value for node in setup.body if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "ROOMS")
    assert ast.literal_eval(rooms) == ROOMS
    with_code = {path.relative_to(ROOT).parts[0] for path in ROOT.glob("[!.]*/**/*.py")}
    assert with_code - {"build", "dist", "demo"} <= {*ROOMS, "tests", "benchmarks", "examples"}
