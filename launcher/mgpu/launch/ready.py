"""Is it ready? Only a token proves it: tensor parallelism can pass /health and abort at the first batch."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Final
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
    from mgpu.launch.client import Client  # http.client: 25 ms, spent while the model loads

    started = time.monotonic()
    client = Client(command, api_key)
    knocking = Background(client.knock(lambda: _is_ours(watch.child.pid, command.ready_url)), stop.wake)
    activity = _Activity(watch, stall_s)
    try:
        while not knocking.done:
            stop.wait(_TICK_S)
            watch.update()
            stop.check()
            if watch.child.poll() is not None:
                raise watch.death("before it was ready")
            activity.check()
            on_progress(Loading(stage=watch.stage, seconds=time.monotonic() - started, rss_bytes=activity.rss_bytes))
        proven = _outcome(knocking, watch, stop)
    finally:
        client.abort()
        knocking.join(_PATIENCE_S)
    if watch.child.poll() is not None:
        raise watch.death("as soon as it was ready")
    watch.finish()
    return proven


def explain(error: RuntimeFailedError, watch: Watch, stop: StopSignals) -> RuntimeFailedError:
    """The whole story of a failed request: how the process behind it ended, if it does, and what its log says."""
    deadline = time.monotonic() + (_LAST_WORDS_S if isinstance(error, LostError) else 0)
    while watch.child.poll() is None and time.monotonic() < deadline:
        stop.wait(_TICK_S)
        stop.check()
    if watch.child.poll() is None:
        return watch.failure(error.message)
    return watch.death(f"and {error.message}")


def _outcome(knocking: Background[bool], watch: Watch, stop: StopSignals) -> bool:
    try:
        return knocking.take()[0]
    except RuntimeFailedError as error:
        raise explain(error, watch, stop) from error


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
