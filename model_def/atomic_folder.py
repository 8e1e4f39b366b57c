"""A folder that appears whole or not at all: written beside its place, synced, then renamed. Standard library alone.

It knows nothing of what is written inside. Checkpoints and bundles are both written through it, so "interrupted at any
point, nothing that opens is left, and the next run cleans up" is said in this file and nowhere else.
"""

import errno
import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from motrt.errors import MotrtError

_DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
_NO_SYNC = (errno.EINVAL, errno.ENOTSUP)  # file systems that can not sync a folder


@contextmanager
def new_folder(out: Path, needed_bytes: int | None, error: type[MotrtError]) -> Iterator[Path]:
    """Give a folder to write into, which becomes ``out`` when the block ends well and vanishes when it does not.

    What is written stands in ``.<name>.partial`` beside ``out`` until then. What an interrupted run left there is removed;
    what a run that is still alive writes there is not (the folder is locked while it is written).

    Args:
        out: the folder to make; its parent must exist.
        needed_bytes: how much will be written, so that a disk too small is told before the work; None where unknown.
        error: the class of every error raised here.

    Yields:
        The partial folder, empty.

    Raises:
        MotrtError: of class ``error``: ``out`` exists, its parent is missing or can not be written, another run is writing
            the same folder, or the disk is full. Whatever else the block raises passes through unchanged.
    """
    partial = out.parent / f".{out.name}.partial"
    _refuse_existing(out, error)
    _refuse_parent(out.parent, error)
    lock = _make_and_lock(partial, error)
    try:
        _refuse_small_disk(out, needed_bytes, error)
        yield partial
        _refuse_existing(out, error)
        for written in (*sorted(partial.rglob("*")), partial):
            _sync(written)
        partial.rename(out)
        _sync(out.parent)
    except BaseException as failure:
        shutil.rmtree(partial, ignore_errors=True)
        if _is_disk_full(failure):
            raise error(f"the disk of {out.parent} is full: free some space, or choose a folder on another disk") from failure
        raise
    finally:
        os.close(lock)


def _sync(path: Path) -> None:
    """Put ``path`` on the disk: a machine that loses power must not come back with the folder's name and no contents."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as failure:
        if failure.errno not in _NO_SYNC:
            raise
    finally:
        os.close(descriptor)


def _refuse_existing(out: Path, error: type[MotrtError]) -> None:
    if os.path.lexists(out):
        raise error(f"{out} exists already and nothing is overwritten: remove it, or choose another folder")


def _refuse_parent(parent: Path, error: type[MotrtError]) -> None:
    if not parent.is_dir():
        what = "is not a folder" if parent.exists() else "does not exist"
        raise error(f"{parent}, in which the new folder should be made, {what}: make it first, or choose another")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise error(f"{parent} can not be written: change its permissions, or choose another folder")


def _refuse_small_disk(out: Path, needed_bytes: int | None, error: type[MotrtError]) -> None:
    # Asked after an earlier run's leftover is gone: its bytes are free again.
    free = shutil.disk_usage(out.parent).free
    if needed_bytes is not None and free < needed_bytes:
        raise error(
            f"{out} needs {needed_bytes / 1e9:.2f} GB and the disk of {out.parent} has {free / 1e9:.2f} GB free: "
            "free some space, or choose a folder on another disk"
        )


def _make_and_lock(partial: Path, error: type[MotrtError]) -> int:
    """The partial folder, made anew; the open, locked descriptor that marks it as being written is returned."""
    try:
        if os.path.lexists(partial):
            _remove_leftover(partial, error)
        partial.mkdir()
        return _lock(partial, error)
    except (OSError, ValueError) as failure:
        raise error(f"{partial.parent} can not be written ({failure}): mend that, or choose another folder") from failure


def _remove_leftover(partial: Path, error: type[MotrtError]) -> None:
    if partial.is_symlink() or not partial.is_dir():
        partial.unlink()
        return
    lock = _lock(partial, error)
    try:
        shutil.rmtree(partial)
    finally:
        os.close(lock)


def _lock(folder: Path, error: type[MotrtError]) -> int:
    # The kernel drops the lock when its process dies, however it dies: a locked folder is one that is being written.
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise error(f"another run is writing {folder}: wait for it, or choose another folder") from None
    except OSError:
        # A file system without locks (some network shares): written all the same, without that protection.
        pass
    return descriptor


def _is_disk_full(failure: BaseException) -> bool:
    if isinstance(failure, OSError):
        return failure.errno in _DISK_FULL
    # Libraries written in C++ and Rust report it in words of their own exception types.
    return isinstance(failure, Exception) and not isinstance(failure, MotrtError) and "No space left on device" in str(failure)
