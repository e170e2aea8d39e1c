"""How far loading is, on stderr: one line that rewrites itself, or a line for each stage where that is a file."""

from __future__ import annotations

import os
import select
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import Final, TextIO

from mgpu.errors import one_line
from mgpu.launch.ready import Loading
from mgpu.service import Told
from mgpu.units import gib, gib_of

_WIDTH: Final = 80
_PATIENCE_S: Final = 0.2  # for a reader that is slow
_QUIET_S: Final = 0.3  # a load this short needs no word
_MOST: Final = 900  # characters of a line


def say(stream: TextIO, text: str) -> None:
    """A line for the person, if anybody is still there: a closed terminal must not keep us from stopping.

    Logs and services are quoted in it: nothing of theirs reaches the terminal but letters.
    """
    if takes(stream):
        with suppress(OSError, ValueError):
            stream.write(f"{one_line(text, _MOST)}\n")
            stream.flush()


def takes(stream: TextIO) -> bool:
    """Whether `stream` takes a line now: a full pipe, or a terminal after Ctrl-S, would hold us as long as it likes."""
    try:
        return bool(select.select([], [stream.fileno()], [], _PATIENCE_S)[1])
    except (OSError, ValueError):  # no file, or a closed one: `write` knows
        return True


class _Line:
    """A line that rewrites itself, without colours or escape sequences: NO_COLOR and dumb terminals need no care."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._columns = _columns(stream)
        self._drawn = 0

    def close(self) -> None:
        """Leave no trace of the rewriting line."""
        if self._drawn:
            self._write(f"\r{' ' * self._drawn}\r")
            self._drawn = 0

    def _draw(self, text: str) -> None:
        text = one_line(text, _MOST)[: self._columns - 1]
        self._write(f"\r{text.ljust(self._drawn)}")
        self._drawn = len(text)

    def _write(self, text: str) -> None:
        if takes(self._stream):
            with suppress(OSError, ValueError):
                self._stream.write(text)
                self._stream.flush()


class LoadingLine(_Line):
    """Draws the `Loading`s of one runtime."""

    def __init__(self, stream: TextIO, *, expected_bytes: int) -> None:
        super().__init__(stream)
        self._expected_bytes = expected_bytes
        self._stage = ""

    def __call__(self, loading: Loading) -> None:
        if loading.seconds < _QUIET_S:
            return
        if self._columns:
            self._draw(describe(loading, self._expected_bytes))
        elif loading.stage != self._stage:
            self._stage = loading.stage
            say(self._stream, f"{loading.seconds:6.1f} s  {loading.stage}")


class JointLine(_Line):
    """Draws the `Loading`s of several runtimes that load at the same time, in the order of their `names`."""

    def __init__(self, stream: TextIO, names: Sequence[str], *, expected_bytes: int) -> None:
        super().__init__(stream)
        self._names = names
        self._expected_bytes = expected_bytes
        self._stages = [""] * len(names)

    def __call__(self, loadings: Sequence[Loading]) -> None:
        seconds = max(loading.seconds for loading in loadings)
        if seconds < _QUIET_S:
            return
        if self._columns:
            self._draw(describe_all(self._names, loadings, self._expected_bytes))
            return
        for place, loading in enumerate(loadings):
            stage = "ready" if loading.ready else loading.stage
            if stage != self._stages[place]:
                self._stages[place] = stage
                say(self._stream, f"{seconds:6.1f} s  {self._names[place]}: {stage}")


class ToldLine(_Line):
    """Draws what a service tells on its way to a model that answers."""

    def __init__(self, stream: TextIO) -> None:
        super().__init__(stream)
        self._started = time.monotonic()
        self._told = Told(text="")

    def __call__(self, told: Told) -> None:
        fresh = told.text != self._told.text
        self._told = told
        if self._columns:
            self._redraw()
        elif fresh:
            say(self._stream, f"{time.monotonic() - self._started:6.1f} s  {told.text}")

    def update(self, done: int, total: int) -> None:
        """The clock goes on; and how far mgpu's own part is, where it has one (`total` above 0)."""
        if total:
            self._told = Told(text=self._told.text, done=done, total=total)
        if self._columns and self._told.text:
            self._redraw()

    def _redraw(self) -> None:
        seconds, told = time.monotonic() - self._started, self._told
        if seconds >= _QUIET_S:
            size = f"  {gib_of(min(told.done, told.total), told.total)}" if told.total else ""
            self._draw(f"{seconds:6.1f} s{size}  {told.text}")


def describe(loading: Loading, expected_bytes: int) -> str:
    """`"  12.3 s  ~3.1 of 4.6 GiB  loading the weights"`: resident memory, hence the "~"."""
    size = ""
    if loading.rss_bytes and expected_bytes:
        size = f"  ~{gib_of(min(loading.rss_bytes, expected_bytes), expected_bytes)}"
    elif loading.rss_bytes:
        size = f"  ~{gib(loading.rss_bytes)}"
    return f"{loading.seconds:6.1f} s{size}  {loading.stage}"


def describe_all(names: Sequence[str], loadings: Sequence[Loading], expected_bytes: int) -> str:
    """`"  12.3 s  ~3.1 of 9.2 GiB  1 of 2 ready, GPU 1: loading the weights"`. `expected_bytes`: by all together."""
    n_ready = sum(loading.ready for loading in loadings)
    pairs = zip(names, loadings, strict=True)
    slowest = next((f", {name}: {loading.stage}" for name, loading in pairs if not loading.ready), "")
    joint = Loading(
        stage=f"{n_ready} of {len(names)} ready{slowest}",
        seconds=max(loading.seconds for loading in loadings),
        rss_bytes=sum(loading.rss_bytes for loading in loadings),
    )
    return describe(joint, expected_bytes)


def _columns(stream: TextIO) -> int:
    """The width to draw in; 0 when it is no terminal."""
    try:
        if not stream.isatty():
            return 0
        return min(os.get_terminal_size(stream.fileno()).columns or _WIDTH, _WIDTH)
    except (OSError, ValueError):
        return 0
