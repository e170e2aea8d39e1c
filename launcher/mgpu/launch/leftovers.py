"""What a runtime leaves behind when it is killed: shared memory, files for its workers to meet, a container.

A regular end leaves nothing, as each program tidies up after itself. SIGKILL lets none, and shared memory is RAM until
the next boot: vLLM's workers hold some 670 MB of it. What is removed is known to be its own: files that its processes
had mapped, under names that its adapter knows, and files that its log said it had made.
"""

from __future__ import annotations

import os
import stat
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from fnmatch import fnmatch
from pathlib import Path
from typing import Final

_SHARED: Final = Path("/dev/shm")  # noqa: S108 - where Linux keeps shared memory, not a place for temporary files
_AFTER_S: Final = 60.0  # a container that is killed gives its GPUs back first
_MOST: Final = 64  # files a log may name


class Leftovers:
    """Of one process and its descendants. `patterns`: names in shared memory; `after`: what is run at the end."""

    def __init__(
        self, patterns: Sequence[str] = (), after: Sequence[str] = (), env: Mapping[str, str] | None = None
    ) -> None:
        self._patterns = tuple(patterns)
        self._after = tuple(after)
        self._env = dict(env or {})
        self._inodes: set[int] = set()
        self._named: list[str] = []

    def expect(self, paths: Iterable[str]) -> None:
        """The runtime said that it made these: absolute paths, the last part of which may end in `*`."""
        new = [path for path in paths if path not in self._named]
        self._named += new[: _MOST - len(self._named)]

    def look(self, pids: Iterable[int]) -> None:
        """Remember the shared memory that these processes hold."""
        if self._patterns:
            self._inodes.update(inode for pid in pids for inode in _shared_inodes(pid))

    def clear(self, *, by_itself: bool) -> None:
        """Once all of it has ended. `by_itself`: unasked, so that what `after` does is done already."""
        for path in self._paths():
            with suppress(OSError):  # gone, or not ours
                if _is_own_file(path):
                    path.unlink()
        after, self._after = self._after, ()
        if after and not by_itself:
            with suppress(OSError, subprocess.SubprocessError):
                subprocess.run(
                    after,
                    env=self._env,
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                    start_new_session=True,
                    timeout=_AFTER_S,
                    check=False,
                )

    def _paths(self) -> list[Path]:
        named = [found for path in self._named for found in _matching(Path(path))]
        return [*named, *self._shared()]

    def _shared(self) -> list[Path]:
        """Files in shared memory that the processes had mapped, and that nobody has mapped now."""
        if not self._inodes:
            return []
        ours: dict[int, Path] = {}
        with suppress(OSError), os.scandir(_SHARED) as entries:
            for entry in entries:
                if entry.inode() in self._inodes and any(fnmatch(entry.name, name) for name in self._patterns):
                    ours[entry.inode()] = Path(entry.path)
        if not ours:
            return []
        held = {inode for pid in _all_pids() for inode in _shared_inodes(pid)}
        return [path for inode, path in ours.items() if inode not in held]


def _matching(path: Path) -> list[Path]:
    if not path.name.endswith("*"):
        return [path]
    try:
        return [found for found in path.parent.iterdir() if found.name.startswith(path.name[:-1])]
    except OSError:
        return []


def _is_own_file(path: Path) -> bool:
    status = path.lstat()
    return stat.S_ISREG(status.st_mode) and status.st_uid == os.geteuid()


def _shared_inodes(pid: int) -> set[int]:
    """Inodes of what a process has mapped from shared memory; none where that cannot be told (macOS, other users).

    By inode: a semaphore is mapped under a name that it no longer has.
    """
    found: set[int] = set()
    try:
        with Path(f"/proc/{pid}/maps").open(encoding="utf-8", errors="replace") as lines:
            for line in lines:
                if f" {_SHARED}/" in line:
                    found.add(int(line.split(maxsplit=5)[4]))
    except (OSError, ValueError, IndexError):
        return found
    return found


def _all_pids() -> list[int]:
    try:
        return [int(name) for name in os.listdir("/proc") if name.isdecimal()]  # noqa: PTH208 - names are all it takes
    except OSError:
        return []
