"""Why a path is no file or folder that can be read, in words. Standard library alone.

Links are followed wherever they lead: hubs keep files in a store and lay links to them, volumes are swapped by moving one. A
link that leads nowhere is told apart from a file that is missing, and neither is damage. Whether a name stays in its folder
is asked of names that a file gives, and not of links.
"""

import errno
import os
import stat
from pathlib import Path

_LONGEST_NAME = 255  # bytes, of a file on Linux


def named_file_problem(folder: Path, name: str) -> str | None:
    """Say why ``name``, which an index gives, is no file of ``folder``, links followed; None where it is one."""
    if not is_plain_name(name):
        return f"{name!r} is no plain file name: what an index names lies in its own folder"
    problem = file_problem(folder / name)
    return f"{name} {problem}" if problem else None


def is_plain_name(name: str) -> bool:
    """Tell whether ``name`` stays in its folder: no separator, no ``..``, not absolute."""
    is_short = len(name.encode("utf-8", "surrogatepass")) <= _LONGEST_NAME
    return is_short and name not in ("", ".", "..") and "\0" not in name and Path(name).name == name


def link_problem(path: Path) -> str | None:
    """Say why something stands at ``path`` and is no file, a broken link say; None where it is one, or nothing is there."""
    return file_problem(path) if os.path.lexists(path) else None


def file_problem(path: Path) -> str | None:
    """Say why ``path``, links followed, is no regular file; None where it is one."""
    mode, problem = _mode(path, "is missing")
    if mode is None or stat.S_ISREG(mode):
        return problem
    return f"{_is(path)} a folder" if stat.S_ISDIR(mode) else f"{_is(path)} no regular file"


def folder_problem(path: Path) -> str | None:
    """Say why ``path``, links followed, is no folder; None where it is one."""
    mode, problem = _mode(path, "does not exist")
    return problem if mode is None or stat.S_ISDIR(mode) else f"{_is(path)} not a folder"


def _mode(path: Path, absent: str) -> tuple[int | None, str | None]:
    """What ``path`` leads to, or why it leads to nothing."""
    try:
        return path.stat().st_mode, None
    except OSError as failure:
        if failure.errno == errno.ELOOP:
            return None, "is a link that leads back to itself"
        if failure.errno not in (errno.ENOENT, errno.ENOTDIR):
            return None, f"can not be read ({failure.strerror})"
    except ValueError:  # a zero byte, or what has no place in the file system's encoding
        return None, "has a name that no file can have"
    return None, f"is a link to {path.readlink()}, which is not there" if path.is_symlink() else absent


def _is(path: Path) -> str:
    return f"is a link to {path.readlink()}," if path.is_symlink() else "is"
