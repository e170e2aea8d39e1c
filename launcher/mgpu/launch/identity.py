"""Which process a number meant: pids are used again, after a reboot and sooner."""

from __future__ import annotations

import functools
import os
import signal
import sys
from contextlib import suppress
from pathlib import Path
from typing import Final

from msgspec import Struct

_PROC: Final = Path("/proc")


class Identity(Struct, frozen=True, kw_only=True):
    """A process that was running once. `start`: when it began, by a clock that nobody sets, and in which boot."""

    pid: int
    start: str


def identify(pid: int) -> Identity | None:
    """The process that has this number now; None when there is none, or only its corpse."""
    start = _start(pid)
    return None if start is None else Identity(pid=pid, start=start)


class Machine(Struct, frozen=True, kw_only=True):
    """Where a launch runs: a home directory may be shared. `boot`: of the kernel, which containers share."""

    name: str
    boot: str

    @property
    def is_here(self) -> bool:
        """Whether this is that machine, or the same one in another boot, or another container on it."""
        here = this_machine()
        return not self.boot or self.boot == here.boot or self.name == here.name


@functools.cache
def this_machine() -> Machine:
    """The machine that this process runs on."""
    return Machine(name=os.uname().nodename, boot=_boot().partition(":")[0])


def is_running(identity: Identity) -> bool:
    """Whether it is still that process."""
    return _start(identity.pid) == identity.start


def is_stopped(pid: int) -> bool:
    """Whether it was stopped, as by Ctrl-Z: it goes on when it gets SIGCONT. False where that cannot be told."""
    fields = _fields(pid)
    return bool(fields) and fields[0] in {b"T", b"t"}


def send(identity: Identity, number: signal.Signals) -> bool:
    """Send a signal to that very process; False when it has gone, or is not ours to signal."""
    if not is_running(identity):
        return False
    with suppress(OSError):
        os.kill(identity.pid, number)
        return True
    return False


def _start(pid: int) -> str | None:
    if pid <= 0:
        return None
    if sys.platform != "linux":
        return _start_elsewhere(pid)
    fields = _fields(pid)  # `starttime` is field 22 (proc(5))
    if len(fields) < 20 or fields[0] in {b"Z", b"X"}:
        return None
    return f"{_boot()}:{fields[19].decode()}"


def _fields(pid: int) -> list[bytes]:
    """What /proc/PID/stat says from the third field on, the state. Empty where there is nothing."""
    try:
        stat = (_PROC / str(pid) / "stat").read_bytes()
    except OSError:
        return []
    return stat.rpartition(b")")[2].split()  # "pid (name) S ppid …": the name may hold anything, parentheses too


@functools.cache
def _boot() -> str:
    """This boot, and whose numbers they are: containers count pids of their own."""
    try:
        boot = (_PROC / "sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot}:{os.readlink('/proc/self/ns/pid')}"  # noqa: PTH115 - the text of a link that leads nowhere
    except OSError:
        return ""


def _start_elsewhere(pid: int) -> str | None:
    import psutil  # 12 ms, for macOS

    try:
        process = psutil.Process(pid)
        return None if process.status() == psutil.STATUS_ZOMBIE else f"{process.create_time():.3f}"
    except psutil.Error:
        return None
