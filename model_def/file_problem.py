"""Why a path is no file or folder that can be read, in words. Standard library alone.

Links are followed wherever they lead: hubs keep files in a store and lay links to them, volumes are swapped by moving one. A
link that leads nowhere is told apart from a file that is missing, and neither is damage. Whether a name stays in its folder
is another question, asked of names and not of links.
"""

import errno
import stat
from pathlib import Path


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
