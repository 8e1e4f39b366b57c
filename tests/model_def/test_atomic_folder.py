"""A folder appears whole or not at all, whatever happens while it is written."""

import errno
import fcntl
import os
import shutil
import threading
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


def _meanwhile(monkeypatch: pytest.MonkeyPatch, does: Callable[[], object]) -> None:
    """Let another run do something between the opening of the partial folder and its locking, once."""
    lock, left = fcntl.flock, [does]

    def flock(descriptor: int, operation: int) -> None:
        if left:
            left.pop()()
        lock(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", flock)


def test_a_folder_that_another_run_removed_before_it_was_locked_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _meanwhile(monkeypatch, (tmp_path / ".model.partial").rmdir)
    with new_folder(tmp_path / "model", None, CheckpointError) as partial:
        (partial / "a").write_text("1")
    assert _names(tmp_path / "model") == ["a"]


def test_a_folder_that_another_run_put_in_the_place_of_ours_is_not_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    partial, held = tmp_path / ".model.partial", []

    def takes_over() -> None:
        partial.rmdir()
        partial.mkdir()
        (partial / "theirs").write_text("2")
        held.append(os.open(partial, os.O_RDONLY))
        fcntl.flock(held[0], fcntl.LOCK_EX | fcntl.LOCK_NB)

    _meanwhile(monkeypatch, takes_over)
    with pytest.raises(CheckpointError, match="another run is writing"), new_folder(tmp_path / "model", None, CheckpointError):
        raise AssertionError("the block must not run")
    assert (partial / "theirs").read_text() == "2"
    os.close(held[0])


def test_a_folder_that_another_run_published_before_it_was_locked_stays_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, leftover: Path
) -> None:
    _meanwhile(monkeypatch, lambda: leftover.rename(tmp_path / "model"))
    with pytest.raises(CheckpointError, match="exists already"), new_folder(tmp_path / "model", None, CheckpointError):
        raise AssertionError("the block must not run")
    assert _names(tmp_path) == ["model"]
    assert (tmp_path / "model" / "half").read_text() == "written"


@pytest.mark.parametrize("is_well", [True, False])
def test_a_folder_that_was_replaced_while_it_was_written_is_neither_published_nor_removed(
    is_well: bool, tmp_path: Path
) -> None:
    with pytest.raises((CheckpointError, KeyError)) as caught, new_folder(tmp_path / "model", None, CheckpointError) as partial:
        partial.rename(tmp_path / "elsewhere")
        partial.mkdir()
        (partial / "theirs").touch()
        if not is_well:
            raise KeyError
    assert ("was removed or replaced while it was written" in str(caught.value)) == is_well
    assert _names(tmp_path) == [".model.partial", "elsewhere"]
    assert _names(tmp_path / ".model.partial") == ["theirs"]


def test_what_another_run_publishes_at_the_last_moment_is_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, rename = tmp_path / "model", Path.rename

    def late(self: Path, target: Path) -> Path:
        out.mkdir()
        (out / "theirs").touch()
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", late)
    with pytest.raises(BundleError, match="exists already"), new_folder(out, None, BundleError):
        pass
    assert _names(tmp_path) == ["model"]
    assert _names(out) == ["theirs"]


def test_of_runs_that_begin_together_one_alone_makes_the_folder(tmp_path: Path) -> None:
    """Locks are of open files, so threads exclude each other as processes do."""
    rounds, runs = 60, 4
    together = threading.Barrier(runs)
    refused: list[str] = []

    def run(number: int) -> None:
        for turn in range(rounds):
            together.wait(60)
            try:
                with new_folder(tmp_path / str(turn), None, CheckpointError) as partial:
                    for name in "abc":
                        (partial / f"{name}{number}").touch()
            except CheckpointError as failure:
                refused.append(str(failure))

    threads = [threading.Thread(target=run, args=(number,)) for number in range(runs)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(refused) == rounds * (runs - 1)
    assert all("another run" in one or "exists already" in one for one in refused)
    assert _names(tmp_path) == sorted(map(str, range(rounds)))
    for folder in tmp_path.iterdir():
        assert len({name[1] for name in _names(folder)}) == 1 and len(_names(folder)) == 3


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
