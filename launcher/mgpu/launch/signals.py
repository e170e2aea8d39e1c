"""Ctrl-C, `kill` and a closed terminal, as requests to stop; and the one place where the main thread waits."""

from __future__ import annotations

import select
import signal
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from types import FrameType, TracebackType
from typing import Final, Self

from mgpu.errors import InterruptedLaunchError

_Handler = Callable[[int, FrameType | None], object] | int | None

#: Wrappers (`uv run`, npm) pass on the SIGINT that the terminal has already sent: not a second request.
_SAME_REQUEST_S: Final = 0.1

_WORDS: Final = {
    signal.SIGINT: "interrupted by Ctrl-C",
    signal.SIGTERM: "stopped by SIGTERM",
    signal.SIGHUP: "stopped: the terminal was closed",
}


class StopSignals:
    """While entered (main thread only), SIGINT, SIGTERM and SIGHUP are counted instead of raised.

    A handler that raised could do so between `fork` and the assignment of the child, and leave an orphan behind.
    SIGCHLD ends a `wait` too, so a dead child is seen at once and an idle launcher does not poll.
    """

    def __init__(self) -> None:
        self._first: signal.Signals | None = None
        self._first_at = 0.0
        self._hurried = False
        self._handlers: dict[signal.Signals, _Handler] = {}
        self._inbox, self._outbox = socket.socketpair()
        self._inbox.setblocking(False)  # noqa: FBT003  # the socket API's own signature
        self._outbox.setblocking(False)  # noqa: FBT003  # as above; also a condition of set_wakeup_fd
        self._wakeup_fd = -1

    def __enter__(self) -> Self:
        self._wakeup_fd = signal.set_wakeup_fd(self._outbox.fileno(), warn_on_full_buffer=False)
        for number in _WORDS:
            if number is signal.SIGHUP and signal.getsignal(number) is signal.SIG_IGN:
                continue  # nohup: outliving the terminal is the wish
            self._handlers[number] = signal.signal(number, self._count)
        self._handlers[signal.SIGCHLD] = signal.signal(signal.SIGCHLD, _wake_only)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._handlers.clear()
        signal.set_wakeup_fd(self._wakeup_fd, warn_on_full_buffer=False)
        self._inbox.close()
        self._outbox.close()

    @property
    def requested(self) -> bool:
        """Somebody wants us to stop."""
        return self._first is not None

    @property
    def hurried(self) -> bool:
        """Somebody asked a second time: kill at once."""
        return self._hurried

    def check(self) -> None:
        """Raises `InterruptedLaunchError` once a stop was requested."""
        if self._first is not None:
            raise InterruptedLaunchError(_WORDS[self._first])

    def wait(self, seconds: float | None) -> None:
        """Sleep until a signal, the death of a child, a `wake`, or the time is over. None: no limit."""
        select.select([self._inbox], [], [], seconds)
        with suppress(BlockingIOError):  # the time was over
            self._inbox.recv(4096)

    def wake(self) -> None:
        """End the present `wait`, or the next one. From any thread, at any time."""
        with suppress(OSError):  # full: it will wake anyway; closed: nobody waits any more
            self._outbox.send(b"\0")

    def _count(self, number: int, _frame: FrameType | None) -> None:
        if self._first is None:
            self._first, self._first_at = signal.Signals(number), time.monotonic()
        elif time.monotonic() - self._first_at > _SAME_REQUEST_S:
            self._hurried = True


@contextmanager
def raising() -> Iterator[None]:
    """While nothing has been started that must be ended: the same signals raise `InterruptedLaunchError`."""

    def end(number: int, _frame: FrameType | None) -> None:
        raise InterruptedLaunchError(_WORDS[signal.Signals(number)])

    handlers: dict[signal.Signals, _Handler] = {}
    for number in _WORDS:
        if number is not signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN:
            handlers[number] = signal.signal(number, end)
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)


def entered(stop: StopSignals | None) -> AbstractContextManager[StopSignals]:
    """`stop`, which somebody has entered already; without one, a new one for as long as this lasts."""
    return StopSignals() if stop is None else nullcontext(stop)


def _wake_only(_number: int, _frame: FrameType | None) -> None:
    """A handler must exist for the wake-up byte to be written."""
