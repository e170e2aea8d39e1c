"""Where mgpu keeps what it knows of its launches: one directory of this user, or the next best."""

from __future__ import annotations

import os
import stat
from contextlib import suppress
from pathlib import Path
from typing import Final

from mgpu.launch.private import make_directory

_OTHERS_WRITE: Final = stat.S_IWGRP | stat.S_IWOTH


def state_dir() -> Path:
    """The user's state directory, made if need be; where it cannot be written, one of ours for temporary files.

    Neither may be writable: whoever writes there says so then. Never raises.
    """
    usual = usual_state_dir()
    _close(usual)
    if _usable(usual):
        return usual
    spare = spare_state_dir()
    return spare if _usable(spare) else usual


def state_dirs() -> tuple[Path, ...]:
    """All that may hold launches of this user: a home that was read-only yesterday is written again today."""
    return tuple(path for path in (usual_state_dir(), spare_state_dir()) if _is_ours(path))


def usual_state_dir() -> Path:
    """`~/.local/state/mgpu` on Linux."""
    import platformdirs  # 4 ms, not needed by a dry run

    return Path(platformdirs.user_state_dir("mgpu"))


def spare_state_dir() -> Path:
    """By user, below the directory for temporary files: others may make it first, so it is looked at before use."""
    import tempfile  # 5 ms, as above

    try:
        temporary = Path(tempfile.gettempdir())
    except FileNotFoundError:  # there is no directory at all that can be written
        temporary = Path("/tmp")  # noqa: S108 - where it would be
    return temporary / f"mgpu-{os.getuid()}"


def _usable(path: Path) -> bool:
    try:
        make_directory(path)
    except OSError:
        return False
    return _is_ours(path) and os.access(path, os.W_OK | os.X_OK)


def _close(path: Path) -> None:
    """Our own, as the first version made it, with a umask of 002: nobody else is to write there from now on."""
    with suppress(OSError):
        status = path.stat()
        if status.st_uid == os.geteuid() and status.st_mode & _OTHERS_WRITE:
            path.chmod(stat.S_IMODE(status.st_mode) & ~_OTHERS_WRITE)


def _is_ours(path: Path) -> bool:
    """A directory of this user that no other may write into: what lies in it tells us what to kill."""
    try:
        status = path.stat() if path == usual_state_dir() else path.lstat()  # people may link their own elsewhere
    except OSError:
        return False
    ours = stat.S_ISDIR(status.st_mode) and status.st_uid == os.geteuid()
    return ours and not status.st_mode & _OTHERS_WRITE
