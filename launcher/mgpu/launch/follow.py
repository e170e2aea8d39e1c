"""The logs of a launch as one text: their ends, then what they gain, also where a new try writes new ones."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Final, Self

from mgpu.launch.logs import LogTail
from mgpu.launch.records import Record

_NOTHING: Final = "it has no log: nothing could be written when it started"


class Following:
    """Says the lines of a launch's logs. Where several programs have one each, a heading tells whose they are."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self._say = say
        self._tails: dict[str, LogTail] = {}
        self._is_headed = False
        self._last = ""  # the log whose line was said last

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for tail in self._tails.values():
            tail.close()

    def show_end(self, record: Record, n: int) -> tuple[str, ...]:
        """The last `n` lines of each log. Returns what is wrong with those that cannot be read."""
        self._is_headed = len(record.logs) > 1
        flaws: list[str] = []
        for path in record.all_logs:
            try:
                self._tails[path] = tail = LogTail(Path(path), start=Path(path).stat().st_size)
            except OSError as error:
                flaws.append(_flaw(path, error))
                continue
            if path == os.devnull:
                flaws.append(_NOTHING)
            self._tell(path, tail.last_lines(n))
        return tuple(flaws)

    def keep_to(self, record: Record) -> None:
        """These are its logs by now: new ones are told from their beginning, others no longer."""
        self._is_headed = len(record.logs) > 1
        for path in self._tails.keys() - set(record.all_logs):
            tail = self._tails.pop(path)
            self._tell(path, tail.read_rest())
            tail.close()
        for path in record.all_logs:
            if path not in self._tails:
                try:
                    self._tails[path] = LogTail(Path(path))
                except OSError:  # not there yet, or gone: that was said
                    continue

    def read(self) -> None:
        """What they have gained."""
        for path, tail in self._tails.items():
            self._tell(path, tail.read())

    def _tell(self, path: str, lines: tuple[str, ...] | list[str]) -> None:
        if lines and self._is_headed and path != self._last:
            self._say(f"==> {Path(path).name} <==")
        self._last = path if lines else self._last
        for line in lines:
            self._say(line)


def _flaw(path: str, error: OSError) -> str:
    if isinstance(error, FileNotFoundError):
        return f"its log is gone: {path}"
    return f"its log cannot be read: {path} ({error.strerror})"
