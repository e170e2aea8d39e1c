"""A launch that outlives the terminal: an mgpu of its own, in a session of its own, watched until it is ready.

Up to then it says on our terminal what a launch in the foreground says; from then on, in a log of its own. The one that
was typed ends with its exit code, or with 0 once it is ready.
"""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Final, Self

from mgpu.errors import InterruptedLaunchError, RuntimeFailedError
from mgpu.launch.background import Background
from mgpu.launch.process import describe_exit
from mgpu.launch.signals import StopSignals
from mgpu.request import KEY_VARIABLE

#: How the one that stays is told where to say that it is ready.
VARIABLE: Final = "MGPU_READY_FD"

_READY: Final = b"ready\n"
_KEY: Final = "--api-key"


def detach(arguments: Sequence[str], environ: Mapping[str, str]) -> int:
    """Start mgpu again with these `arguments`, and return 0 once it is ready, or the exit code it has ended with.

    A stop signal to us is passed on until then. Raises `InterruptedLaunchError` once it has ended for that,
    `RuntimeFailedError` when it was killed.
    """
    given, key = _without_key(arguments)
    reader, writer = os.pipe()
    env = {**environ, VARIABLE: str(writer)} | ({} if key is None else {KEY_VARIABLE: key})
    with StopSignals() as stop:
        process = subprocess.Popen(
            # -P: the directory it is started in is nobody's package
            (sys.executable, "-P", "-m", "mgpu", *given),
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            pass_fds=(writer,),
            start_new_session=True,
        )
        os.close(writer)
        told = Background(_read(reader), stop.wake)
        passed_on = 0
        while not told.done:
            stop.wait(None)
            passed_on = _pass_on(process, stop, passed_on)
        if _READY in told.take():
            return 0
        code = process.wait()
        if stop.requested:
            raise InterruptedLaunchError("stopped before it was ready")
        if code < 0:
            raise RuntimeFailedError(
                f"the launch {describe_exit(code)} before it was ready",
                hint="start it again; `mgpu ps` shows what runs",
            )
        if code == 0:
            raise RuntimeFailedError(
                "the launch ended before it was ready", hint="run it without --detach to see what it says"
            )
        return code


def _pass_on(process: subprocess.Popen[bytes], stop: StopSignals, passed_on: int) -> int:
    wanted = int(stop.requested) + int(stop.hurried)
    for _ in range(passed_on, wanted):
        with suppress(OSError):
            process.send_signal(signal.SIGTERM)
    return max(wanted, passed_on)


def _read(descriptor: int) -> Iterator[bytes]:
    """What it says, once; nothing if it has ended instead."""
    with os.fdopen(descriptor, "rb", buffering=0) as pipe:
        said = pipe.read(len(_READY))
        if said:
            yield said


def _without_key(arguments: Sequence[str]) -> tuple[list[str], str | None]:
    """Everybody may read the arguments of a process for as long as it lives: not the key's."""
    kept: list[str] = []
    key: str | None = None
    words = iter(arguments)
    for word in words:
        if word == "--":
            kept += [word, *words]
        elif word == _KEY:
            key = next(words, None)
        elif word.startswith(f"{_KEY}="):
            key = word.partition("=")[2]
        else:
            kept.append(word)
    return kept, key


class _Lossy(io.FileIO):
    """A log whose disk may be full: what has no room there is lost, and nothing else with it."""

    def write(self, data: Any, /) -> int:
        with suppress(OSError):
            super().write(data)
        return memoryview(data).nbytes


def _lossy(descriptor: int) -> io.TextIOWrapper:
    raw = _Lossy(descriptor, "w", closefd=False)
    return io.TextIOWrapper(raw, encoding="utf-8", errors="backslashreplace", write_through=True)


class Tether:
    """The other end: what ties the one that stays to the terminal it was started from."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    @classmethod
    def find(cls, environ: dict[str, str] | os._Environ[str]) -> Self | None:
        """None in an mgpu that was typed. The variable is taken away: it means nothing to a runtime."""
        given = environ.pop(VARIABLE, "")
        if not given.isdecimal():
            return None
        descriptor = int(given)
        try:
            os.set_inheritable(descriptor, False)  # noqa: FBT003 - the signature of os
        except OSError:
            return None
        return cls(descriptor)

    def let_go(self, log: Path) -> None:
        """It is ready: say so, and say everything else in `log` from now on."""
        try:
            descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW, 0o600)
        except OSError:
            descriptor = os.open(os.devnull, os.O_WRONLY)  # a full disk: its words are lost, not the launch
        sys.stderr.flush()
        os.dup2(descriptor, 2)
        os.dup2(descriptor, 1)
        os.close(descriptor)
        sys.stdout, sys.stderr = _lossy(1), _lossy(2)
        with suppress(OSError):  # whoever waited has gone
            os.write(self._descriptor, _READY)
        with suppress(OSError):
            os.close(self._descriptor)
