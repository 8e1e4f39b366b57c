"""The examples of docs/deploy, as far as they can be held without a daemon or a cluster: what goes in, and by which hash."""

import re
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
DEPLOY = ROOT / "docs" / "deploy"


def pins(text: str) -> dict[str, str]:
    return dict(re.findall(r"^([\w.-]+)==([\w.]+)", text, re.MULTILINE))


def test_everything_that_the_image_installs_is_held_by_its_hash_and_is_the_tested_version() -> None:
    text = (DEPLOY / "requirements.txt").read_text(encoding="utf-8")
    entries = re.split(r"\n(?=[\w.-]+==)", re.sub(r"^#.*\n", "", text, flags=re.MULTILINE).strip())
    assert len(entries) == len(pins(text)) > 20
    for entry in entries:
        first, *hashes = [line.strip().removesuffix("\\").strip() for line in entry.splitlines()]
        assert re.fullmatch(r"[\w.-]+==[\w.]+", first) and hashes, entry
        assert all(re.fullmatch(r"--hash=sha256:[0-9a-f]{64}", one) for one in hashes), first
    tested = (ROOT / "constraints.txt").read_text(encoding="utf-8").replace('2.2.6; python_version < "3.11"', "")
    assert {name: version for name, version in pins(text).items() if pins(tested).get(name, version) != version} == {}


def test_the_image_installs_what_a_server_needs_and_builds_with() -> None:
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    wanted = {"setuptools"}
    for name in ("dependencies", "cpu", "serve"):
        listed = re.search(rf"^{name} = \[(.*)\]", project, re.MULTILINE)
        assert listed is not None
        wanted |= set(re.findall(r'"([\w-]+)', listed[1]))
    assert wanted <= set(pins((DEPLOY / "requirements.txt").read_text(encoding="utf-8")))


def test_every_package_that_the_server_imports_is_a_dependency_with_a_tested_version() -> None:
    imported = {
        name
        for path in (ROOT / "serve").glob("*.py")
        for name in re.findall(r"^(?:from|import) (\w+)", path.read_text(encoding="utf-8"), re.MULTILINE)
    }
    of_serving = {"anyio", "fastapi", "h11", "prometheus_client", "pydantic", "starlette", "uvicorn"}
    assert of_serving - {"h11"} <= imported  # h11 by way of uvicorn's protocol, which Connection is one of
    serving = re.search(r"^serve = \[(.*)\]", (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.MULTILINE)
    assert serving is not None
    assert set(re.findall(r'"([\w-]+)', serving[1])) == {name.replace("_", "-") for name in of_serving}
    assert {name.replace("_", "-") for name in of_serving} <= set(pins((ROOT / "constraints.txt").read_text(encoding="utf-8")))


def goes_to_the_builder(path: str) -> bool:
    """As .dockerignore says it: the last pattern that fits, a folder's for all that is in it."""
    is_kept, parts = True, path.split("/")
    lines = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    for line in (one.strip() for one in lines if one.strip() and not one.startswith("#")):
        pattern = line.removeprefix("!").rstrip("/")
        heads = ["/".join(parts[: end + 1]) for end in range(len(parts))]
        if pattern.startswith("**/"):
            heads, pattern = parts, pattern.removeprefix("**/")
        if any(fnmatch(head, pattern) and head.count("/") == pattern.count("/") for head in heads):
            is_kept = line.startswith("!")
    return is_kept


@pytest.mark.parametrize(
    "path",
    [
        *(
            ".git/config",
            ".venv/bin/python",
            "keys",
            "keys.txt",
            "bundle/model.onnx",
            "model/model.safetensors",
            ".env",
            "a.pem",
        ),
        *("demo/bundle/manifest.json", "tests/serve/served.py", "benchmarks/load.py", "docs/serving.md", ".mypy_cache/x"),
        *("serve/__pycache__/app.cpython-311.pyc", "motrt.egg-info/PKG-INFO", "docs/deploy/Dockerfile"),
    ],
)
def test_what_lies_beside_the_code_stays_out_of_the_image(path: str) -> None:
    assert not goes_to_the_builder(path)


def test_all_of_the_code_goes_to_the_builder() -> None:
    rooms = ("model_def", "runtime", "export", "serve")
    files = [path for room in rooms for path in (ROOT / room).rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    files += [
        *ROOT.glob("*.py"),
        *(ROOT / name for name in ("pyproject.toml", "README.md", "LICENSE", "MANIFEST.in", "py.typed")),
    ]
    files.append(DEPLOY / "requirements.txt")
    assert [one for one in files if not goes_to_the_builder(one.relative_to(ROOT).as_posix())] == []


def test_the_base_image_is_named_by_a_digest_that_has_no_default() -> None:
    lines = (DEPLOY / "Dockerfile").read_text(encoding="utf-8").splitlines()
    assert "ARG PYTHON_DIGEST" in lines
    assert all(re.search(r"@\$\{PYTHON_DIGEST\}( AS \w+)?$", line) for line in lines if line.startswith("FROM"))
    assert any("--require-hashes" in line for line in lines)


@pytest.fixture(scope="module")
def objects() -> dict[str, Any]:
    yaml = pytest.importorskip("yaml", reason="PyYAML is not installed")
    loaded = yaml.safe_load_all((DEPLOY / "kubernetes.yaml").read_text(encoding="utf-8"))
    return {one["kind"]: one for one in loaded}


def test_pods_are_reached_at_one_port_and_reach_nothing(objects: dict[str, Any]) -> None:
    policy, deployment = objects["NetworkPolicy"]["spec"], objects["Deployment"]["spec"]
    assert policy["podSelector"]["matchLabels"] == deployment["template"]["metadata"]["labels"]
    assert set(policy["policyTypes"]) == {"Ingress", "Egress"} and policy["egress"] == []
    (rule,) = policy["ingress"]
    (container,) = deployment["template"]["spec"]["containers"]
    assert [one["port"] for one in rule["ports"]] == [one["name"] for one in container["ports"]]
    assert rule["from"] and container["livenessProbe"]["httpGet"]["path"] == "/health/live"


def test_what_the_examples_say_to_the_server_it_understands(objects: dict[str, Any]) -> None:
    from motrt.cli import SERVE_OPTIONS, serve

    assert SERVE_OPTIONS
    known = {name for one in serve.params for name in one.opts}
    (container,) = objects["Deployment"]["spec"]["template"]["spec"]["containers"]
    said = [one.partition("=")[0] for one in container["args"] if one.startswith("--")]
    said += re.findall(r'"(--[\w-]+)"', (DEPLOY / "Dockerfile").read_text(encoding="utf-8"))
    assert said and set(said) <= known
