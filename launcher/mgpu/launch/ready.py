"""Is it ready? Only a token proves it: tensor parallelism can pass /health and abort at the first batch."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Final, Self
from urllib.parse import urlsplit

from msgspec import Struct

from mgpu.adapter import Command
from mgpu.errors import RuntimeFailedError
from mgpu.launch.background import Background
from mgpu.launch.signals import StopSignals
from mgpu.launch.stream import LostError
from mgpu.launch.watch import Watch

STALL_S: Final = 600.0  # neither a log line, nor memory, nor a second of processor time
_TICK_S: Final = 0.1  # between two looks at the log and the memory
_PATIENCE_S: Final = 0.2  # for a thread whose connection was broken off
_LAST_WORDS_S: Final = 3.0  # from a broken connection to the exit of the process behind it


class Loading(Struct, frozen=True, kw_only=True):
    """How far loading is. `rss_bytes` is the runtime's resident memory: a hint only, as weights may go to a GPU."""

    stage: str
    seconds: float
    rss_bytes: int
    ready: bool = False


def wait_ready(
    watch: Watch,
    command: Command,
    *,
    stop: StopSignals,
    api_key: str | None = None,
    on_progress: Callable[[Loading], None] = lambda _: None,
    stall_s: float = STALL_S,
) -> bool:
    """Return once the runtime has generated a token; False if it answers but says that it cannot be asked for one.

    Raises `RuntimeFailedError` when it dies, breaks off or does nothing for `stall_s`; `InterruptedLaunchError`
    within a moment of a stop signal, whatever the server does.
    """
    (proven,) = wait_all_ready(
        [(watch, command)],
        stop=stop,
        api_key=api_key,
        on_progress=lambda loadings: on_progress(loadings[0]),
        stall_s=stall_s,
    )
    return proven


def wait_all_ready(
    started: Sequence[tuple[Watch, Command]],
    *,
    stop: StopSignals,
    api_key: str | None = None,
    on_progress: Callable[[tuple[Loading, ...]], None] = lambda _: None,
    stall_s: float = STALL_S,
) -> tuple[bool, ...]:
    """As `wait_ready`, for runtimes that load at the same time: the first that fails is raised at once."""
    with ExitStack() as stack:
        waits = [stack.enter_context(_Wait(watch, command, stop, api_key, stall_s)) for watch, command in started]
        while any(wait.proven is None for wait in waits):
            stop.wait(_TICK_S)
            stop.check()
            on_progress(tuple(wait.look() for wait in waits))
        return tuple(wait.proven is True for wait in waits)


def explain(
    error: RuntimeFailedError, watch: Watch, stop: StopSignals, others: Sequence[Watch] = ()
) -> RuntimeFailedError:
    """The whole story of a failed request: how the process behind it ended, if it does, and what its log says.

    `watch` is whom we asked; `others` are those it may have asked in turn.
    """
    deadline = time.monotonic() + (_LAST_WORDS_S if isinstance(error, LostError) else 0)
    while (dead := first_dead((*others, watch))) is None and time.monotonic() < deadline:
        stop.wait(_TICK_S)
        stop.check()
    if dead is None:
        return watch.failure(error.message)
    return dead.death(f"and {error.message}")


def first_dead(watches: Sequence[Watch]) -> Watch | None:
    """The first of them that has ended."""
    return next((watch for watch in watches if watch.child.poll() is not None), None)


class _Wait:
    """One runtime on its way to readiness. `proven` is None until it is ready, then what `wait_ready` returns."""

    def __init__(self, watch: Watch, command: Command, stop: StopSignals, api_key: str | None, stall_s: float) -> None:
        from mgpu.launch.client import Client  # http.client: 25 ms, spent while the model loads

        self.proven: bool | None = None
        self._watch = watch
        self._command = command
        self._stop = stop
        self._started = time.monotonic()
        self._client = Client(command, api_key)
        self._knocking = Background(self._client.knock(self._is_ours), stop.wake)
        self._activity = _Activity(watch, stall_s)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._client.abort()
        self._knocking.join(_PATIENCE_S)

    def look(self) -> Loading:
        """How far it is. Raises when it has died, does nothing, or did not give its token."""
        watch = self._watch
        if self.proven is not None:
            if watch.child.poll() is not None:
                raise watch.death("while others were loading")
        else:
            watch.update()
            if watch.child.poll() is not None:
                raise watch.death("before it was ready")
            if watch.lost_port:
                raise watch.failure("was stopped before it was ready")
            self._activity.check()
            if self._knocking.done:
                self._settle()
        return Loading(
            stage=watch.stage,
            seconds=time.monotonic() - self._started,
            rss_bytes=self._activity.rss_bytes,
            ready=self.proven is not None,
        )

    def _is_ours(self) -> bool:
        return self._command.elsewhere or _is_ours(self._watch.child.pid, self._command.ready_url)

    def _settle(self) -> None:
        try:
            proven = self._knocking.take()[0]
        except RuntimeFailedError as error:
            raise explain(error, self._watch, self._stop) from error
        if self._watch.child.poll() is not None:
            raise self._watch.death("as soon as it was ready")
        self._watch.finish()
        self.proven = proven


def _is_ours(pid: int, url: str) -> bool:
    """Whether it is not another program that answers there: it may have taken the port while ours was starting."""
    from mgpu.launch.tree import owns_port  # psutil: 12 ms

    return owns_port(pid, urlsplit(url).port or 80) is not False


class _Activity:
    """Notices a runtime that lives but does nothing."""

    def __init__(self, watch: Watch, stall_s: float) -> None:
        self.rss_bytes = 0
        self._watch = watch
        self._stall_s = stall_s
        self._last: tuple[int, int, int] | None = None
        self._since = time.monotonic()

    def check(self) -> None:
        """Raises `RuntimeFailedError` when nothing has changed for too long."""
        from mgpu.launch.tree import cpu_seconds, rss_bytes  # psutil: 12 ms

        pid = self._watch.child.pid
        self.rss_bytes = rss_bytes(pid)
        now = (self._watch.log_size, self.rss_bytes, int(cpu_seconds(pid)))
        if now != self._last:
            self._last, self._since = now, time.monotonic()
        elif time.monotonic() - self._since > self._stall_s:
            raise self._watch.failure(f"has done nothing for {self._stall_s:.0f} s")
