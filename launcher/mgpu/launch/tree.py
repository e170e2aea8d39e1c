"""What the system knows of a process and its descendants. Imports psutil (12 ms): import this where it is used."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any, Final

import psutil

from mgpu.units import KIB

_MOST_ROLLUP: Final = 16 << 10  # characters


class Tree:
    """A process's descendants of whatever group and session, remembered before their parents go.

    `before`: those of an earlier look, too.
    """

    def __init__(self, pid: int, before: Tree | None = None) -> None:
        self.processes: list[psutil.Process] = []
        with suppress(psutil.Error):
            self.processes = psutil.Process(pid).children(recursive=True)
        if before is not None:
            self.processes += [one for one in before.processes if one not in self.processes]

    @property
    def pids(self) -> tuple[int, ...]:
        return tuple(process.pid for process in self.processes)

    def any_alive(self) -> bool:
        return any(_is_alive(process) for process in self.processes)

    def kill(self) -> None:
        for process in self.processes:
            with suppress(psutil.Error):  # psutil compares creation times: a recycled pid is not killed
                process.kill()


def family(pid: int) -> tuple[int, ...]:
    """A process and its descendants; itself alone when they cannot be told."""
    return (pid, *Tree(pid).pids)


def rss_bytes(pid: int) -> int:
    """Resident memory of one process; 0 when it cannot be told."""
    try:
        return int(psutil.Process(pid).memory_info().rss)
    except psutil.Error:
        return 0


def host_bytes(pid: int) -> int | None:
    """RAM of a process and its descendants that no file is behind: private and shared memory, swapped out or not.

    Shared memory that several of them have mapped counts once for each, as far as it cannot be told apart. None where
    the system does not tell (another user's process, or it has gone).
    """
    sizes = [_anonymous(member) for member in family(pid)]
    return sum(size for size in sizes if size is not None) if sizes[0] is not None else None


#: `Pss_Anon` and `Pss_Shmem` share out what is shared (Linux 5.9); pages that a driver pins are in none of them.
_PARTS: Final = frozenset({"Pss_Anon:", "Pss_Shmem:", "SwapPss:"})


def _anonymous(pid: int) -> int | None:
    try:
        with Path(f"/proc/{pid}/smaps_rollup").open(encoding="ascii", errors="replace") as file:
            rows = [line.split() for line in file.read(_MOST_ROLLUP).splitlines()]
    except OSError:
        rows = []
    sizes = [int(row[1]) * KIB for row in rows if len(row) > 1 and row[0] in _PARTS and row[1].isdecimal()]
    if sizes:
        return sum(sizes)
    try:
        memory = psutil.Process(pid).memory_info()
    except psutil.Error:
        return None
    return max(int(memory.rss) - int(getattr(memory, "shared", 0)), 0)


def cpu_seconds(pid: int) -> float:
    """Processor time one process has used; 0 when it cannot be told."""
    try:
        times = psutil.Process(pid).cpu_times()
    except psutil.Error:
        return 0.0
    return float(times.user + times.system)


def owns_port(pid: int, port: int) -> bool | None:
    """Whether `pid` or a descendant listens on `port`; None when nobody is seen there (a container, another user)."""
    try:
        root = psutil.Process(pid)
        family = [root, *root.children(recursive=True)]
        if any(_listens(process, port) for process in family):
            return True
    except psutil.Error:
        return None
    return None if holder(port) is None else False


def holder(port: int) -> str | None:
    """Who listens on `port`, as "llama-server (pid 4242)"; None when it cannot be told."""
    try:
        connections = psutil.net_connections(kind="tcp")
    except (psutil.Error, OSError):  # macOS lets only root see them all
        return None
    for connection in connections:
        if connection.pid and _listens_on(connection, port):
            with suppress(psutil.Error):
                return f"{psutil.Process(connection.pid).name()} (pid {connection.pid})"
    return None


def _listens(process: psutil.Process, port: int) -> bool:
    return any(_listens_on(connection, port) for connection in process.net_connections(kind="tcp"))


def _listens_on(connection: Any, port: int) -> bool:  # psutil's named tuples: private types, two of them
    return bool(connection.status == psutil.CONN_LISTEN and connection.laddr and connection.laddr.port == port)


def _is_alive(process: psutil.Process) -> bool:
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.Error:
        return False
