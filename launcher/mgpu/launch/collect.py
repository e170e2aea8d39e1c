"""What a program prints on its two outputs, within bounds of size and of time."""

from __future__ import annotations

import os
import selectors
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Final

from msgspec import Struct

MOST: Final = 4 << 20  # bytes of both outputs together

_PIECE: Final = 1 << 16
_STUCK_S: Final = 2.0  # a process inside a driver does not end when it is killed: not ours to wait for


class EndlessError(Exception):
    """The program did not end in time, or printed more than it may."""


class Printed(Struct, frozen=True, kw_only=True):
    """How it ended, and its texts; bytes that are no text are replaced."""

    returncode: int
    out: str
    err: str


def collect(argv: Sequence[str], env: Mapping[str, str], *, timeout_s: float) -> Printed:
    """Run it to its end. It never outlives the question, nor does what it started. Raises OSError, `EndlessError`."""
    process = subprocess.Popen(
        argv,
        env=dict(env),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    try:
        out, err = _read(process, time.monotonic() + timeout_s)
    finally:  # also for Ctrl-C
        _end(process)
    return Printed(
        returncode=process.returncode, out=out.decode("utf-8", "replace"), err=err.decode("utf-8", "replace")
    )


def _read(process: subprocess.Popen[bytes], deadline: float) -> tuple[bytes, bytes]:
    texts = {process.stdout: bytearray(), process.stderr: bytearray()}
    with selectors.DefaultSelector() as waiting:
        for pipe in texts:
            waiting.register(pipe, selectors.EVENT_READ)  # type: ignore[arg-type] # PIPE was asked for
        while waiting.get_map():
            ready = waiting.select(max(deadline - time.monotonic(), 0))
            if not ready:
                raise EndlessError
            for key, _ in ready:
                piece = os.read(key.fd, _PIECE)
                texts[key.fileobj] += piece  # type: ignore[index] # one of the two
                if not piece:
                    waiting.unregister(key.fileobj)
            if sum(map(len, texts.values())) > MOST:
                raise EndlessError
    try:
        process.wait(max(deadline - time.monotonic(), 0))
    except subprocess.TimeoutExpired:
        raise EndlessError from None
    return bytes(texts[process.stdout]), bytes(texts[process.stderr])


def _end(process: subprocess.Popen[bytes]) -> None:
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    for pipe in (process.stdout, process.stderr):
        if pipe is not None:
            pipe.close()
    with suppress(subprocess.TimeoutExpired):
        process.wait(_STUCK_S)
