"""The runtime's log: where it lies, its new lines as they come, its last lines."""

from __future__ import annotations

import os
import re
import time
from pathlib import Path
from typing import Final

from msgspec import Struct

KEPT_LOGS: Final = 20

_MAX_LINE: Final = 4096  # bytes kept of one line: enough to recognise it
_CHUNK: Final = 1 << 20
_REST: Final = 4 << 20  # bytes read at most when a runtime has ended
_TAIL: Final = 64 << 10  # bytes in which the last lines are looked for

_ESCAPE: Final = re.compile(r"\x1b\[[0-9;?]*[ -/]*[@-~]|[\x00-\x08\x0b-\x1f\x7f]")
#: What ggml's abort handler lets gdb print after the reason (ggml/src/ggml.c, ggml_print_backtrace).
_BACKTRACE: Final = re.compile(
    r"#\d+ |\[(?:New LWP|Thread debugging|Inferior \d)|warning: |Using host libthread_db|0x[0-9a-f]{8}"
)


class LogPlace(Struct, frozen=True, kw_only=True):
    """Where a launch writes its log; `note` is a word for the person when that is not the usual place."""

    path: Path
    note: str = ""


class LogTail:
    """The lines of a file that another process appends to, in pieces. Lines are text without colours and controls."""

    def __init__(self, path: Path, *, start: int = 0) -> None:
        self._file = path.open("rb", buffering=0)
        self._file.seek(start)
        self._partial = b""

    def close(self) -> None:
        self._file.close()

    @property
    def size(self) -> int:
        return os.fstat(self._file.fileno()).st_size

    def read(self) -> list[str]:
        """The lines completed since the last call (at most 1 MiB of them)."""
        if self._file.tell() > self.size:  # truncated by a log rotation
            self._file.seek(0)
        *lines, partial = (self._partial + (self._file.read(_CHUNK) or b"")).split(b"\n")
        self._partial = partial[:_MAX_LINE]
        return [_clean(line[:_MAX_LINE]) for line in lines]

    def read_rest(self) -> list[str]:
        """All lines left, the unfinished one included; of more than 4 MiB only the end."""
        if self.size - self._file.tell() > _REST:
            self._file.seek(-_REST, os.SEEK_END)
            self._partial = b""
        lines: list[str] = []
        while self._file.tell() < self.size:
            lines += self.read()
        if self._partial:
            lines.append(_clean(self._partial))
            self._partial = b""
        return lines


def last_lines(path: Path, n: int, *, start: int = 0) -> tuple[str, ...]:
    """The last `n` lines after byte `start` that say something: no empty ones, no debugger backtrace.

    Empty when there is no file.
    """
    try:
        with path.open("rb") as file:
            begin = max(file.seek(0, os.SEEK_END) - _TAIL, start)
            file.seek(begin)
            raw = file.read(_TAIL).split(b"\n")
    except OSError:
        return ()
    if begin > start and len(raw) > 1:
        del raw[0]  # cut in the middle
    lines = [_clean(line[:_MAX_LINE]).rstrip() for line in raw]
    return tuple(line for line in lines if line and not _BACKTRACE.match(line))[-n:]


def new_log(name: str, *, state_dir: Path | None = None) -> LogPlace:
    """A path for a new log: `<state>/logs/<name>-<time>-<pid>.log`; all but the newest 20 there are removed.

    `state_dir` defaults to the user's; where it cannot be written, a fresh temporary directory takes its place.
    """
    if state_dir is None:
        import platformdirs  # 4 ms, not needed by a dry run

        state_dir = Path(platformdirs.user_state_dir("mgpu"))
    safe = re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-.")[:80] or "runtime"
    file_name = f"{safe}-{time.strftime('%Y%m%dT%H%M%S')}-{os.getpid()}.log"
    logs = state_dir / "logs"
    try:
        logs.mkdir(mode=0o700, parents=True, exist_ok=True)
        path = logs / file_name
        path.touch(mode=0o600)
    except OSError as error:
        import tempfile  # 5 ms, for a rare case

        path = Path(tempfile.mkdtemp(prefix="mgpu-")) / file_name
        return LogPlace(path=path, note=f"cannot write to {logs} ({error.strerror}): the log is {path}")
    _prune(logs)
    return LogPlace(path=path)


def _prune(logs: Path) -> None:
    dated: list[tuple[float, Path]] = []
    for path in logs.glob("*.log"):
        try:
            dated.append((path.stat().st_mtime, path))
        except OSError:
            continue  # removed by another mgpu meanwhile
    for _, path in sorted(dated)[:-KEPT_LOGS]:
        try:
            path.unlink()
        except OSError:
            continue  # not ours, or gone: the next launch tries again


def _clean(line: bytes) -> str:
    return _ESCAPE.sub("", line.decode("utf-8", "replace"))
