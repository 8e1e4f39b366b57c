"""What lies behind links is the same bundle and the same checkpoint to every command, however hubs and volumes lay them."""

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from motrt.cli import main
from motrt.export.parity.findings import Outcome
from motrt.export.verification import VerifyOptions, verify_bundle
from motrt.model_def.checkpoint.native import open_checkpoint
from motrt.model_def.config import ModelConfig
from motrt.model_def.initialize import random_tensors
from motrt.runtime.bundle import open_bundle
from motrt.runtime.load import load
from motrt.serve.triton import write_repository
from motrt.tests.conftest import MakeBundle
from motrt.tests.model_def import foreign

Layout = Callable[[Path, Path], Path]
TINY = ModelConfig.tiny()


def hub(source: Path, place: Path) -> Path:
    """As a hub's cache has it: files by the hashes of their contents, and a folder of links for every revision."""
    blobs, snapshot = place / "blobs", place / "snapshots" / "revision"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for file in source.iterdir():
        blob = hashlib.sha256(file.read_bytes()).hexdigest()
        shutil.copyfile(file, blobs / blob)
        (snapshot / file.name).symlink_to(f"../../blobs/{blob}")
    return snapshot


def volume(source: Path, place: Path) -> Path:
    """As a volume is mounted in a cluster: links through one link, which is moved when the contents change."""
    shutil.copytree(source, place / "..2024")
    (place / "..data").symlink_to("..2024")
    for file in source.iterdir():
        (place / file.name).symlink_to(f"..data/{file.name}")
    return place


def folder(source: Path, place: Path) -> Path:
    place.symlink_to(source)
    return place


def weights_apart(source: Path, place: Path) -> Path:
    """The large file alone lies on another disk."""
    shutil.copytree(source, place)
    large = max(place.iterdir(), key=lambda file: file.stat().st_size)
    shutil.move(large, place.parent / "large")
    large.symlink_to(place.parent / "large")
    return place


def all_apart(source: Path, place: Path) -> Path:
    """Every file in a folder of its own, under another name, behind two links."""
    place.mkdir()
    for number, file in enumerate(sorted(source.iterdir())):
        store = place.parent / f"{place.name}{number}"
        store.mkdir()
        shutil.copyfile(file, store / "x")
        (store / "y").symlink_to("x")
        (place / file.name).symlink_to(f"../{store.name}/y")
    return place


LAYOUTS: tuple[Layout, ...] = (hub, volume, folder, weights_apart, all_apart)


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, list(map(str, arguments)))


def answered(*arguments: object) -> Any:
    done = run(*arguments, "--json")
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)


@pytest.mark.parametrize("precision", ["fp32", "int4"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_linked_bundle_says_what_the_bundle_says(
    layout: Layout, precision: str, make_bundle: MakeBundle, tmp_path: Path
) -> None:
    bundle = make_bundle(TINY, precision)
    linked = layout(bundle, tmp_path / "linked")
    with load(bundle) as session:
        wanted = session.prefill([[1, 2, 100]], ["text"])[0]
    for check in ("size", "hash", "answer"):
        with load(linked, check=check) as session:
            assert (session.prefill([[1, 2, 100]], ["text"])[0] == wanted).all()


@pytest.mark.parametrize("layout", [hub, all_apart])
def test_a_linked_bundle_climbs_the_ladder_and_is_taken_apart(layout: Layout, tiny_bundle: Path, tmp_path: Path) -> None:
    linked = layout(tiny_bundle, tmp_path / "linked")
    report = verify_bundle(linked, options=VerifyOptions(report=tmp_path / "report"))
    assert report.verdict is Outcome.PASS
    assert report.evidence["bisect"]["first"] is None


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_command_takes_a_linked_bundle(layout: Layout, tiny_bundle: Path, tmp_path: Path) -> None:
    linked = layout(tiny_bundle, tmp_path / "linked")
    found = answered("inspect", linked)
    assert found["files"] == answered("inspect", tiny_bundle)["files"]
    assert answered("inspect", linked / "model.onnx")["health"] == answered("inspect", tiny_bundle / "model.onnx")["health"]
    answered("bench", linked, "--prompt", 8, "--tokens", 4)
    write_repository(linked, tmp_path / "repository")
    copied = next((tmp_path / "repository").rglob("manifest.json")).parent
    assert not any(file.is_symlink() for file in copied.iterdir())
    open_bundle(copied, "hash")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_linked_checkpoint_is_the_same_to_every_command(layout: Layout, tiny_checkpoint: Path, tmp_path: Path) -> None:
    linked = layout(tiny_checkpoint, tmp_path / "linked")
    answered("export", linked, tmp_path / "bundle", "--no-verify")
    assert open_bundle(tmp_path / "bundle").manifest.source["sha256"] == open_checkpoint(tiny_checkpoint).sha256()
    answered("convert", tmp_path / "again", "--native", linked)
    assert open_checkpoint(tmp_path / "again").sha256() == open_checkpoint(tiny_checkpoint).sha256()
    tokens = [
        answered("generate", path, "--prompt-ids", "1,2", "--max-tokens", 3)["tokens"] for path in (linked, tiny_checkpoint)
    ]
    assert tokens[0] == tokens[1]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_linked_folder_of_another_format_is_converted_as_the_folder_is(layout: Layout, tmp_path: Path) -> None:
    llama = foreign.write_llama_hf(tmp_path / "llama", TINY, dict(random_tensors(TINY, 1)))
    linked = layout(llama, tmp_path / "linked")
    for path, out in ((llama, "one"), (linked, "other")):
        answered("convert", tmp_path / out, "--llama", path)
    assert open_checkpoint(tmp_path / "one").sha256() == open_checkpoint(tmp_path / "other").sha256()
    assert answered("inspect", linked)["health"] == answered("inspect", llama)["health"]


@pytest.mark.parametrize("name", ["manifest.json", "model.onnx", "model.onnx.data"])
def test_a_blob_that_is_gone_is_named_by_every_command(name: str, tiny_bundle: Path, tmp_path: Path) -> None:
    linked = hub(tiny_bundle, tmp_path / "hub")
    (linked / name).resolve().unlink()
    for command in (["generate", linked, "--prompt-ids", 1], ["inspect", linked], ["verify", linked], ["bench", linked]):
        done = run(*command)
        assert done.exit_code == 1 and f"{name} is a link to ../../blobs/" in done.stderr, done.output
        assert "damaged" not in done.stderr


def test_a_checkpoint_whose_configuration_is_gone_is_no_missing_bundle(tiny_checkpoint: Path, tmp_path: Path) -> None:
    linked = hub(tiny_checkpoint, tmp_path / "hub")
    (linked / "config.json").resolve().unlink()
    assert "config.json is a link to ../../blobs/" in run("generate", linked, "--prompt-ids", 1).stderr
    assert "links that lead nowhere: config.json" in run("inspect", linked).stderr
    (tmp_path / "link").symlink_to("gone")
    assert "link, which is a link to gone, which is not there" in run("inspect", tmp_path / "link").stderr
