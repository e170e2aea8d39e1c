"""How far loading is, on stderr: one line that rewrites itself, or a line for each stage where that is a file."""

from __future__ import annotations

import os
from contextlib import suppress
from typing import Final, TextIO

from mgpu.launch.ready import Loading
from mgpu.units import gib, gib_of

_WIDTH: Final = 80
_QUIET_S: Final = 0.3  # a load this short needs no word


def say(stream: TextIO, text: str) -> None:
    """A line for the person, if anybody is still there: a closed terminal must not keep us from stopping."""
    with suppress(OSError, ValueError):
        stream.write(f"{text}\n")
        stream.flush()


class LoadingLine:
    """Draws `Loading`s without colours or escape sequences, so NO_COLOR and dumb terminals need no care."""

    def __init__(self, stream: TextIO, *, expected_bytes: int) -> None:
        self._stream = stream
        self._expected_bytes = expected_bytes
        self._columns = _columns(stream)
        self._stage = ""
        self._drawn = 0

    def __call__(self, loading: Loading) -> None:
        if loading.seconds < _QUIET_S:
            return
        if self._columns:
            self._draw(describe(loading, self._expected_bytes)[: self._columns - 1])
        elif loading.stage != self._stage:
            self._stage = loading.stage
            say(self._stream, f"{loading.seconds:6.1f} s  {loading.stage}")

    def close(self) -> None:
        """Leave no trace of the rewriting line."""
        if self._drawn:
            self._write(f"\r{' ' * self._drawn}\r")
            self._drawn = 0

    def _draw(self, text: str) -> None:
        self._write(f"\r{text.ljust(self._drawn)}")
        self._drawn = len(text)

    def _write(self, text: str) -> None:
        with suppress(OSError, ValueError):
            self._stream.write(text)
            self._stream.flush()


def describe(loading: Loading, expected_bytes: int) -> str:
    """`"  12.3 s  ~3.1 of 4.6 GiB  loading the weights"`: resident memory, hence the "~"."""
    size = ""
    if loading.rss_bytes and expected_bytes:
        size = f"  ~{gib_of(min(loading.rss_bytes, expected_bytes), expected_bytes)}"
    elif loading.rss_bytes:
        size = f"  ~{gib(loading.rss_bytes)}"
    return f"{loading.seconds:6.1f} s{size}  {loading.stage}"


def _columns(stream: TextIO) -> int:
    """The width to draw in; 0 when it is no terminal."""
    try:
        if not stream.isatty():
            return 0
        return min(os.get_terminal_size(stream.fileno()).columns or _WIDTH, _WIDTH)
    except (OSError, ValueError):
        return 0
