"""A folder that appears whole or not at all: written beside its place, synced, then renamed. Standard library alone.

It knows nothing of what is written inside. Checkpoints and bundles are both written through it, so "interrupted at any
point, nothing that opens is left, and the next run cleans up" is said in this file and nowhere else.

Two runs for one folder meet in the partial folder. The rule is: whoever holds the lock of the very folder that stands at the
path may write into it, publish it or remove it, and nobody else. A lock belongs to a folder and not to its path, and between
opening and locking another run may have removed or published that folder; so whoever locks looks again at the path.
"""

import errno
import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from motrt.errors import MotrtError

_DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
_NO_SYNC = (errno.EINVAL, errno.ENOTSUP)  # file systems that can not sync a folder
_TAKEN = (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR)  # what renaming over something says
_NO_FOLDER = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP)  # nothing, a file, a link

# Each attempt to make and lock a folder fails only where another run did something between two lines of this one.
_MOST_ATTEMPTS = 1000


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
            the same folder, the partial folder was removed or replaced meanwhile, or the disk is full. Whatever else the block
            raises passes through unchanged.
    """
    partial = out.parent / f".{out.name}.partial"
    _refuse_existing(out, error)
    _refuse_parent(out.parent, error)
    lock = _make_and_lock(partial, error)
    try:
        _refuse_existing(out, error)  # what another run published since it was asked first
        _refuse_small_disk(out, needed_bytes, error)
        yield partial
        for written in (*sorted(partial.rglob("*")), partial):
            _sync(written)
        _publish(partial, lock, out, error)
        _sync(out.parent)
    except BaseException as failure:
        if _stands_at(partial, lock):  # else it is another run's
            shutil.rmtree(partial, ignore_errors=True)
        if _is_disk_full(failure):
            raise error(f"the disk of {out.parent} is full: free some space, or choose a folder on another disk") from failure
        raise
    finally:
        os.close(lock)


def _publish(partial: Path, lock: int, out: Path, error: type[MotrtError]) -> None:
    """Give the folder that was written its name, unless it is no longer there or the name is taken."""
    if not _stands_at(partial, lock):
        raise error(f"{partial} was removed or replaced while it was written: do not touch it, and run this again")
    _refuse_existing(out, error)
    try:
        partial.rename(out)
    except OSError as failure:
        if failure.errno in _TAKEN:  # by another run, since it was asked
            _refuse_existing(out, error)
        raise


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
        for _ in range(_MOST_ATTEMPTS):
            if not _remove_leftover(partial, error):
                continue
            try:
                partial.mkdir()
            except FileExistsError:
                continue
            lock = _lock(partial, error)
            if lock is not None:
                return lock
    except (OSError, ValueError) as failure:
        raise error(f"{partial.parent} can not be written ({failure}): mend that, or choose another folder") from failure
    raise error(f"other runs are making {partial} all the time: wait for them, or choose another folder")


def _remove_leftover(partial: Path, error: type[MotrtError]) -> bool:
    """Whether nothing stands at ``partial`` any more; False where another run was quicker."""
    if not os.path.lexists(partial):
        return True
    if partial.is_symlink() or not partial.is_dir():
        with suppress(IsADirectoryError):  # of another run that was quicker: it is seen in the next attempt
            partial.unlink(missing_ok=True)
        return not os.path.lexists(partial)
    lock = _lock(partial, error)
    if lock is None:
        return False
    try:
        shutil.rmtree(partial)
    finally:
        os.close(lock)
    return True


def _lock(folder: Path, error: type[MotrtError]) -> int | None:
    """A descriptor that holds the lock of what stands at ``folder``; None where that changed before it was locked."""
    # The kernel drops the lock when its process dies, however it dies: a locked folder is one that is being written.
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError as failure:
        if failure.errno in _NO_FOLDER:
            return None
        raise
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise error(f"another run is writing {folder}: wait for it, or choose another folder") from None
    except OSError:
        # A file system without locks (some network shares): written all the same, without that protection.
        pass
    if _stands_at(folder, descriptor):
        return descriptor
    os.close(descriptor)
    return None


def _stands_at(folder: Path, descriptor: int) -> bool:
    """Whether ``folder`` is the very folder that is open, and not another of its name, or none."""
    try:
        return os.path.samestat(os.lstat(folder), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _is_disk_full(failure: BaseException) -> bool:
    if isinstance(failure, OSError):
        return failure.errno in _DISK_FULL
    # Libraries written in C++ and Rust report it in words of their own exception types.
    return isinstance(failure, Exception) and not isinstance(failure, MotrtError) and "No space left on device" in str(failure)
