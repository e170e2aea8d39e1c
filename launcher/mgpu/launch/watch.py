"""A runtime under way: what its log has said so far, and why it died if it did."""

from __future__ import annotations

import time
from collections import deque
from typing import Final, Protocol, Self

from mgpu.adapter import Buffer, Cause, Left, LogFact, Served, Stage
from mgpu.errors import OutOfMemoryError, RuntimeFailedError
from mgpu.launch.logs import LogTail
from mgpu.launch.process import Child, describe_exit

_LAST_LINES: Final = 8
_FATAL_S: Final = 60.0  # from a complaint to the death that it explains
_LESS_RAM: Final = "keep less on the CPU (a smaller --ctx or quantisation), end other programs, or add RAM or swap"
_MOST_SERVED: Final = 1 << 15
_MOST_BUFFERS: Final = 4096
_MOST_OF_A_LOOK: Final = 16 << 20  # bytes of a log; what is read later is only later


class LogReader(Protocol):
    """What an adapter knows of its runtime's log."""

    def read_log(self, line: str) -> LogFact | None: ...


class Watch:
    """Reads the log of `child` through `adapter.read_log`. `buffers` are in the log's order, as printed.

    `name` is what errors call it ("llama-server on GPU 1"); by default, that of its executable.
    """

    def __init__(self, child: Child, adapter: LogReader, *, name: str = "") -> None:
        self.child = child
        self.name = name or child.name
        self.stage = "starting"
        self.buffers: list[Buffer] = []
        self.served: deque[Served] = deque(maxlen=_MOST_SERVED)  # for who counts them
        self._adapter = adapter
        self.lost_port = False  # it said that another program has it
        self._cause: Cause | None = None
        self._cause_at = 0.0
        self._tail = LogTail(child.log_path, start=child.log_start, writable=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._tail.close()

    @property
    def log_size(self) -> int:
        """Bytes the log has by now."""
        return self._tail.size

    def update(self) -> None:
        """Take in what the log has gained, as far as one look goes; and keep it from growing for ever."""
        left = _MOST_OF_A_LOOK
        while left > 0:
            behind = self._tail.behind
            self._take_in(self._tail.read())
            left -= max(behind - self._tail.behind, 1)
            if self._tail.behind <= 0:
                break
        if self._tail.shorten():
            self.child.log_start = 0

    def finish(self) -> None:
        """Take in the rest of the log: all that a runtime said before it ended, or before it was ready."""
        self._take_in(self._tail.read_rest())

    def settle(self) -> None:
        """It goes on: what it complained of a minute ago was not fatal."""
        if self._cause is not None and time.monotonic() - self._cause_at > _FATAL_S:
            self._cause = None

    def failure(self, what: str) -> RuntimeFailedError:
        """`what` went wrong, with the cause that the log gives if it is a known one, and the log's last lines."""
        self.finish()
        log = self.child.log_path
        name = self.name
        if self._cause is None:
            message, hint = f"{name} {what}", f"the whole log: {log}"
        else:
            message, hint = f"{name} {what}: {self._cause.text}", self._cause.hint
        lines = self._last_lines()
        if self._cause is not None and self._cause.out_of_memory:
            return OutOfMemoryError(
                message,
                hint=hint,
                log_tail=lines,
                devices=self._cause.devices,
                wanted_bytes=self._cause.wanted_bytes,
                held_bytes=sum(one.n_bytes for one in self.buffers if one.device in self._cause.devices),
            )
        return RuntimeFailedError(message, hint=hint, log_tail=lines)

    def death(self, when: str) -> RuntimeFailedError:
        """The failure of a child that has ended: how, and `when` ("before it was ready")."""
        code = self.child.poll()
        if self.child.was_short_of_ram():
            self.finish()
            return OutOfMemoryError(
                f"{self.name} was killed by the kernel {when}: out of RAM",
                hint=_LESS_RAM,
                log_tail=self._last_lines(),
                devices=("CPU",),
            )
        return self.failure(f"{'ended' if code is None else describe_exit(code)} {when}")

    def _last_lines(self) -> tuple[str, ...]:
        """Of the log that it has, whatever lies at its path by now."""
        return self._tail.last_lines(_LAST_LINES, start=self.child.log_start)

    def _take_in(self, lines: list[str]) -> None:
        for line in lines:
            fact = self._adapter.read_log(line)
            if isinstance(fact, Stage):
                self.stage = fact.text
                if not self.lost_port:
                    self._cause = None  # it went on: what was said before was not fatal
            elif isinstance(fact, Buffer):
                self.buffers += [fact] if len(self.buffers) < _MOST_BUFFERS else []
            elif isinstance(fact, Served):
                self.served.append(fact)
            elif isinstance(fact, Left):
                self.child.leftovers.expect(fact.paths)
            elif isinstance(fact, Cause) and self._cause is not None:
                self._cause = self._cause.with_more(fact)  # a consequence, or the same in other words
            elif isinstance(fact, Cause):
                self._cause, self._cause_at = fact, time.monotonic()
                self.lost_port = fact.port_taken
