"""Whether the kernel has killed somebody for want of RAM since a process was started.

A process that it kills cannot say so itself. Linux counts: for the machine in /proc/vmstat (`oom_kill`, since 4.13),
and for each control group in memory.events (version 2) or memory.oom_control (version 1), which containers may read.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Final

_COUNT: Final = re.compile(r"^oom_kill ([0-9]{1,18})$", re.MULTILINE)
_ROOT: Final = "/"
_MOST: Final = 64 << 10


def kills(root: Path | None = None) -> tuple[int, ...]:
    """The counters there are; empty on other systems. `root`: where /proc and /sys are."""
    root = Path(_ROOT) if root is None else root
    return tuple(_count(path) for path in (root / "proc/vmstat", *_groups(root)))


def has_killed(since: tuple[int, ...], root: Path | None = None) -> bool:
    """Whether a counter has grown. `since`: what `kills` said then."""
    return any(now > before for now, before in zip(kills(root), since, strict=False))


def _groups(root: Path) -> Iterator[Path]:
    """The files of our own control group, which is that of what we start."""
    for line in _text(root / "proc/self/cgroup").splitlines():
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        group = path.lstrip("/")
        if number == "0":
            yield root / "sys/fs/cgroup" / group / "memory.events"
        elif "memory" in controllers.split(","):
            yield root / "sys/fs/cgroup/memory" / group / "memory.oom_control"


def _count(path: Path) -> int:
    found = _COUNT.search(_text(path))
    return int(found[1]) if found is not None else 0


def _text(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return file.read(_MOST).decode("ascii", "replace")
    except (OSError, ValueError):  # ValueError: a name with a null byte
        return ""
