"""Locks that the kernel lets go of when their holder ends, however it ends: whoever holds one is alive.

`flock` knows neither clocks nor process numbers: a recycled pid, a reboot or a clock that jumps cannot fool it.
"""

from __future__ import annotations

import errno
import fcntl
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final, Self

_POLL_S: Final = 0.05

#: Of a lock that nobody can have taken.
_NOT_THERE: Final = frozenset({errno.ENOENT, errno.ENOTDIR, errno.EACCES, errno.EROFS, errno.ELOOP})


class Lock:
    """A file locked by this process; never by its children, as their copy of the descriptor is closed on exec."""

    def __init__(self, descriptor: int, path: Path) -> None:
        self._descriptor = descriptor
        self.path = path

    @classmethod
    def try_take(cls, path: Path) -> Self | None:
        """None when another process holds it. Raises OSError where the file cannot be made."""
        while True:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(descriptor)
                return None
            except OSError:
                os.close(descriptor)
                raise
            if _is_at(descriptor, path):
                return cls(descriptor, path)
            os.close(descriptor)  # its last holder removed the file while we were opening it

    @property
    def is_in_place(self) -> bool:
        """Whether others can see it: a cleaner of old files, or a person, may have removed it."""
        return _is_at(self._descriptor, self.path)

    def touch(self) -> None:
        """Show that it is in use to whoever removes what is old."""
        with suppress(OSError):
            os.utime(self._descriptor)

    def write(self, text: str) -> None:
        """Replace what the file says. A full disk is no reason to give the lock up."""
        with suppress(OSError):
            os.ftruncate(self._descriptor, 0)
            os.pwrite(self._descriptor, text.encode(), 0)

    def release(self) -> None:
        """Safe any number of times."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


def is_held(path: Path) -> bool:
    """Whether a process that lives holds the lock at `path`."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # a file system without locks: nobody could have taken it
        return False
    finally:
        os.close(descriptor)
    return False


def holder(path: Path) -> int | None:
    """The pid of whoever holds the lock at `path`, by what Linux tells of all locks (proc_locks(5)); None: not told."""
    try:
        status = path.stat(follow_symlinks=False)
        lines = Path("/proc/locks").read_text(encoding="ascii").splitlines()
    except (OSError, UnicodeDecodeError):
        return None
    wanted = f"{os.major(status.st_dev):02x}:{os.minor(status.st_dev):02x}:{status.st_ino}"
    for fields in map(str.split, lines):
        if fields[1:2] == ["FLOCK"] and fields[5:6] == [wanted] and fields[4].isdecimal():
            return int(fields[4])
    return None


@contextmanager
def unheld(path: Path) -> Iterator[bool]:
    """Whether nobody holds the lock at `path`; if so, nobody can take it while in here: its file may be removed."""
    try:
        lock = Lock.try_take(path)
    except OSError as error:
        yield error.errno in _NOT_THERE  # else it may be held for all we know
        return
    try:
        yield lock is not None
    finally:
        if lock is not None:
            lock.release()


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat(follow_symlinks=False))
    except OSError:
        return False


@contextmanager
def held(
    path: Path,
    *,
    wait_s: float,
    on_wait: Callable[[], None] = lambda: None,
    check: Callable[[], None] = lambda: None,
) -> Iterator[bool]:
    """Hold the lock at `path` while in it; whether that succeeded within `wait_s` is what it yields.

    It goes on without: a stopped process or a file system without locks must not keep people from their work.
    `on_wait` is called once when somebody else has it; `check` while waiting, and may raise. The file says our pid.
    """
    lock = _wait_for(path, wait_s, on_wait, check)
    if lock is not None:
        lock.write(f"{os.getpid()}\n")
    try:
        yield lock is not None
    finally:
        if lock is not None:
            lock.release()


def _wait_for(path: Path, wait_s: float, on_wait: Callable[[], None], check: Callable[[], None]) -> Lock | None:
    deadline, told = time.monotonic() + wait_s, False
    while True:
        try:
            lock = Lock.try_take(path)
        except OSError:
            return None
        if lock is not None or time.monotonic() >= deadline:
            return lock
        if not told:
            on_wait()
            told = True
        check()
        time.sleep(_POLL_S)
