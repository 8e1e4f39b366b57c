"""A folder appears whole or not at all, whatever happens while it is written."""

import errno
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from motrt.errors import BundleError, CheckpointError
from motrt.model_def.atomic_folder import new_folder


class _Usage(NamedTuple):
    total: int
    used: int
    free: int


def _names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_the_folder_appears_only_when_the_block_ends(tmp_path: Path) -> None:
    out = tmp_path / "model"
    with new_folder(out, 10, CheckpointError) as partial:
        (partial / "a").write_text("1")
        assert not out.exists()
        assert partial.parent == out.parent
    assert _names(tmp_path) == ["model"]
    assert (out / "a").read_text() == "1"


@pytest.mark.parametrize("failure", [ValueError("a bug"), KeyboardInterrupt(), BundleError("refused")])
def test_a_failure_leaves_nothing_and_passes_through(tmp_path: Path, failure: BaseException) -> None:
    with pytest.raises(type(failure)) as caught, new_folder(tmp_path / "model", None, CheckpointError) as partial:
        (partial / "a").write_text("1")
        raise failure
    assert caught.value is failure
    assert _names(tmp_path) == []


@pytest.mark.parametrize("kind", ["folder", "file", "dangling link"])
def test_what_exists_is_not_overwritten(tmp_path: Path, kind: str) -> None:
    out = tmp_path / "model"
    makers: dict[str, Callable[[], None]] = {
        "folder": out.mkdir,
        "file": out.touch,
        "dangling link": lambda: out.symlink_to("nowhere"),
    }
    makers[kind]()
    with pytest.raises(BundleError, match="remove it, or choose another"), new_folder(out, None, BundleError):
        raise AssertionError("the block must not run")
    assert _names(tmp_path) == ["model"]


def test_what_appears_meanwhile_is_not_overwritten(tmp_path: Path) -> None:
    out = tmp_path / "model"
    with pytest.raises(CheckpointError, match="exists already"), new_folder(out, None, CheckpointError):
        out.mkdir()
    assert _names(tmp_path) == ["model"]


def test_a_missing_parent_is_refused(tmp_path: Path) -> None:
    with (
        pytest.raises(CheckpointError, match="does not exist: make it first"),
        new_folder(tmp_path / "a" / "b", None, CheckpointError),
    ):
        raise AssertionError("the block must not run")


def test_a_parent_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a").touch()
    with pytest.raises(CheckpointError, match="is not a folder"), new_folder(tmp_path / "a" / "b", None, CheckpointError):
        raise AssertionError("the block must not run")


def test_a_parent_that_can_not_be_written_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda *_: False)  # permissions do not bind root, who runs tests in containers
    with pytest.raises(CheckpointError, match="can not be written"), new_folder(tmp_path / "b", None, CheckpointError):
        raise AssertionError("the block must not run")


def test_a_name_that_the_file_system_refuses_is_told(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="can not be written"), new_folder(tmp_path / ("n" * 300), None, CheckpointError):
        raise AssertionError("the block must not run")


def test_a_disk_too_small_is_told_before_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: _Usage(100, 91, 9))
    with pytest.raises(CheckpointError, match="free some space"), new_folder(tmp_path / "model", 10, CheckpointError):
        raise AssertionError("the block must not run")
    assert _names(tmp_path) == []


@pytest.mark.parametrize(
    "failure",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        OSError(errno.EDQUOT, "quota"),
        RuntimeError("No space left on device (28)"),
    ],
)
def test_a_disk_that_fills_up_is_a_sentence(tmp_path: Path, failure: Exception) -> None:
    with pytest.raises(CheckpointError, match="is full: free some space"), new_folder(tmp_path / "model", 10, CheckpointError):
        raise failure
    assert _names(tmp_path) == []


@pytest.fixture
def leftover(tmp_path: Path) -> Iterator[Path]:
    partial = tmp_path / ".model.partial"
    partial.mkdir()
    (partial / "half").write_text("written")
    yield partial


def test_the_leftover_of_an_interrupted_run_is_cleaned_up(tmp_path: Path, leftover: Path) -> None:
    with new_folder(tmp_path / "model", None, CheckpointError) as partial:
        assert _names(partial) == []
    assert _names(tmp_path) == ["model"]


def test_a_leftover_that_is_a_link_is_removed_without_touching_its_target(tmp_path: Path) -> None:
    (tmp_path / "precious").mkdir()
    (tmp_path / ".model.partial").symlink_to(tmp_path / "precious")
    with new_folder(tmp_path / "model", None, CheckpointError) as partial:
        (partial / "a").touch()
    assert _names(tmp_path / "precious") == []


def test_two_runs_do_not_write_the_same_folder(tmp_path: Path) -> None:
    out = tmp_path / "model"
    with new_folder(out, None, CheckpointError) as partial:
        (partial / "a").write_text("1")
        with pytest.raises(CheckpointError, match="another run is writing"), new_folder(out, None, CheckpointError):
            raise AssertionError("the block must not run")
    assert (out / "a").read_text() == "1"


def test_what_appears_is_on_the_disk_already(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    sync, rename = os.fsync, Path.rename

    def tell_sync(descriptor: int) -> None:
        events.append(Path(f"/proc/self/fd/{descriptor}").readlink().name)
        sync(descriptor)

    def tell_rename(self: Path, target: Path) -> Path:
        events.append("renamed")
        return rename(self, target)

    monkeypatch.setattr(os, "fsync", tell_sync)
    monkeypatch.setattr(Path, "rename", tell_rename)
    with new_folder(tmp_path / "model", None, CheckpointError) as partial:
        (partial / "a").write_text("1")
        (partial / "b").write_text("2")
    assert events == ["a", "b", ".model.partial", "renamed", tmp_path.name]


@pytest.mark.parametrize(("number", "goes_on"), [(errno.EINVAL, True), (errno.EIO, False)])
def test_a_folder_that_can_not_be_synced_is_no_error_but_a_broken_disk_is(
    number: int, goes_on: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(descriptor: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", fail)
    try:
        with new_folder(tmp_path / "model", None, CheckpointError):
            pass
    except OSError:
        assert not goes_on
    assert (tmp_path / "model").exists() == goes_on
    assert _names(tmp_path) == ["model"] * goes_on
