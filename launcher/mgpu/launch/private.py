"""Files and directories for this user alone, whatever the umask and whoever else writes to the same places."""

from __future__ import annotations

import os
import secrets
import stat
from contextlib import suppress
from pathlib import Path
from typing import Final

_DIRECTORY: Final = 0o700
_FILE: Final = 0o600
_OTHERS_WRITE: Final = stat.S_IWGRP | stat.S_IWOTH


def make_directory(path: Path) -> None:
    """`path` and what lacks above it, each for this user alone (as the XDG specification wants it). Raises OSError."""
    missing: list[Path] = []
    for directory in (path, *path.parents):
        if directory.is_dir():
            break
        missing.append(directory)
    for directory in reversed(missing):
        try:
            directory.mkdir(mode=_DIRECTORY)
        except FileExistsError:
            if not directory.is_dir():  # not a race with another mgpu
                raise


def new_file(path: Path, content: bytes) -> None:
    """A file that was not there before. Raises OSError, FileExistsError for one that was: a link, too."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, _FILE)
    with os.fdopen(descriptor, "wb") as file:
        os.fchmod(descriptor, _FILE)  # a umask may have taken our own rights away
        file.write(content)


def draft_of(path: Path) -> Path:
    """A name beside `path` that nobody else uses, or could have guessed."""
    return path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(8)}")


def write_whole(path: Path, content: bytes) -> None:
    """All of `content` at once: readers see what was there before, or this. Raises OSError."""
    make_directory(path.parent)
    draft = draft_of(path)
    try:
        new_file(draft, content)
        draft.replace(path)
    except OSError:
        with suppress(OSError):
            draft.unlink()
        raise


def read_own(path: Path, *, at_most: int) -> bytes | None:
    """The content of a file that nobody else can have written; None for any other, or a larger one. Raises OSError.

    A file of another user, or one that others may write to, could tell us anything.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW)
    with os.fdopen(descriptor, "rb") as file:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode) or status.st_uid != os.geteuid() or status.st_mode & _OTHERS_WRITE:
            return None
        content = file.read(at_most + 1)
    return content if len(content) <= at_most else None
