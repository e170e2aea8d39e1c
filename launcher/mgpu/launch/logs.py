"""The runtime's log: where it lies, its new lines as they come, its last lines."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Sequence
from io import FileIO
from pathlib import Path
from typing import BinaryIO, Final

from msgspec import Struct

KEPT_LOGS: Final = 20

_MAX_LINE: Final = 4096  # bytes kept of one line: enough to recognise it
_CHUNK: Final = 1 << 20
_REST: Final = 4 << 20  # bytes read at most when a runtime has ended
_TAILS: Final = (64 << 10, 1 << 20, 8 << 20)  # bytes of its end in which the last lines are looked for

LONGEST: Final = 64 << 20  # bytes of a log
_KEPT_END: Final = 8 << 20
_KNOWN: Final = 256  # bytes by which a reader finds its place again
_SHORTENED: Final = b"(what was here before has been removed: the log was longer than 64 MiB)\n"

_ESCAPE: Final = re.compile(r"\x1b\[[0-9;?]*[ -/]*[@-~]|[\x00-\x08\x0b-\x1f\x7f-\x9f]")
#: What ggml's abort handler lets gdb print after the reason (ggml/src/ggml.c, ggml_print_backtrace).
_BACKTRACE: Final = re.compile(
    r"#\d+ |\[(?:New LWP|Thread debugging|Inferior \d)|warning: |Using host libthread_db|0x[0-9a-f]{8}"
)


class LogPlace(Struct, frozen=True, kw_only=True):
    """Where a launch writes its log; `note` is a word for the person when that is not the usual place."""

    path: Path
    note: str = ""


class LogTail:
    """The lines of a file that another process appends to, in pieces. Lines are text without colours and controls.

    It stays with the file it has opened, also where that is given another name, or none. `writable`: to be shortened.
    """

    def __init__(self, path: Path, *, start: int = 0, writable: bool = False) -> None:
        self._file = _open(path, writable=writable)
        self._file.seek(max(start - _KNOWN, 0))
        self._last = self._file.read(min(start, _KNOWN)) or b""  # what was read last, to be found again
        self._partial = b""
        self._was_cut = False

    def close(self) -> None:
        self._file.close()

    def _skip_known(self) -> None:
        """One that was shortened begins with lines that were read before."""
        self._was_cut = False
        begin = self._file.read(_KEPT_END + _CHUNK) or b""
        known = begin.rfind(self._last) if begin.startswith(_SHORTENED) and self._last else -1
        if known < 0:
            self._partial = b""
        self._file.seek(known + len(self._last) if known >= 0 else 0)

    @property
    def size(self) -> int:
        return os.fstat(self._file.fileno()).st_size

    @property
    def behind(self) -> int:
        """Bytes that were not read yet; less than none where the log was cut since."""
        return self.size - self._file.tell()

    def last_lines(self, n: int, *, start: int = 0) -> tuple[str, ...]:
        """As the function of that name, of the file that is open here."""
        place = self._file.tell()
        try:
            return _last_lines(self._file, n, start)
        except OSError:
            return ()
        finally:
            self._file.seek(place)

    def shorten(self) -> bool:
        """Keep a log that grows for months from filling the disk: beyond `LONGEST` only its end stays, in place.

        The runtime appends (O_APPEND), so it goes on at the new end; so do we. What it writes in this very moment may
        be lost. Returns whether it was cut.
        """
        if self.size <= LONGEST:
            return False
        place = self._file.tell()
        try:
            self._file.seek(-_KEPT_END, os.SEEK_END)
            end = (self._file.read(_KEPT_END) or b"").partition(b"\n")[2]
            self._file.truncate(0)
            self._file.write(_SHORTENED + end)
        except OSError:
            self._file.seek(place)
            return False  # the next time, perhaps
        self._file.seek(0)
        self._was_cut = True
        return True

    def read(self) -> list[str]:
        """The lines completed since the last call (at most 1 MiB of them)."""
        if self._file.tell() > self.size:  # truncated by a log rotation
            self._file.seek(0)
            self._was_cut = True
        if self._was_cut and self.size:
            self._skip_known()
        piece = self._file.read(_CHUNK) or b""
        self._last = (self._last + piece)[-_KNOWN:]
        *lines, partial = (self._partial + piece).split(b"\n")
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
            return _last_lines(file, n, start)
    except OSError:
        return ()


def _last_lines(file: BinaryIO | FileIO, n: int, start: int) -> tuple[str, ...]:
    """Looked for further and further back, until there are enough."""
    end = file.seek(0, os.SEEK_END)
    lines: tuple[str, ...] = ()
    for n_bytes in _TAILS:
        begin = max(end - n_bytes, start)
        file.seek(begin)
        raw = (file.read(max(end - begin, 0)) or b"").split(b"\n")
        if begin > start and len(raw) > 1:
            del raw[0]  # cut in the middle
        cleaned = (_clean(line[:_MAX_LINE]).rstrip() for line in raw)
        lines = tuple(line for line in cleaned if line and not _BACKTRACE.match(line))[-n:]
        if len(lines) >= n or begin == start:
            break
    return lines


def new_log(name: str, *, state_dir: Path | None = None, kept: Sequence[str] = ()) -> LogPlace:
    """A path for a new log: `<state>/logs/<name>-<time>-<pid>.log`; all but the newest 20 there are removed.

    Those of launches that live stay, and `kept`. `state_dir` defaults to the user's; where it cannot be written, a
    fresh temporary directory takes its place; where nothing can be written, there is no log. Never raises.
    """
    note = ""
    if state_dir is None:
        from mgpu.launch.places import state_dir as own_state_dir
        from mgpu.launch.places import usual_state_dir

        state_dir = own_state_dir()
        if state_dir != usual_state_dir():
            note = f"cannot write to {usual_state_dir()}: logs and launches are kept in {state_dir}"
    safe = re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-.")[:80] or "runtime"
    file_name = f"{safe}-{time.strftime('%Y%m%dT%H%M%S')}-{os.getpid()}.log"
    logs = state_dir / "logs"
    try:
        logs.mkdir(mode=0o700, parents=True, exist_ok=True)
        path = logs / file_name
        path.touch(mode=0o600)
    except OSError as error:
        return _elsewhere(file_name, f"cannot write to {logs} ({error.strerror})")
    _prune(logs, (*kept, str(path)))
    return LogPlace(path=path, note=note)


def _elsewhere(file_name: str, why: str) -> LogPlace:
    import tempfile  # 5 ms, for a rare case

    try:
        path = Path(tempfile.mkdtemp(prefix="mgpu-")) / file_name
    except OSError:
        return LogPlace(path=Path(os.devnull), note=f"{why}, nor elsewhere: there is no log")
    return LogPlace(path=path, note=f"{why}: the log is {path}")


def _prune(logs: Path, kept: Sequence[str]) -> None:
    from mgpu.launch.store import launches

    records = [seen.record for seen in launches() if seen.record is not None]
    in_use = {*kept, *(log for record in records for log in record.all_logs)}
    dated: list[tuple[float, Path]] = []
    for path in logs.glob("*.log"):
        if str(path) in in_use:
            continue  # perhaps silent for weeks, and yet the one to look into
        try:
            dated.append((path.stat().st_mtime, path))
        except OSError:
            continue  # removed by another mgpu meanwhile
    for _, path in sorted(dated)[: 1 - KEPT_LOGS]:
        try:
            path.unlink()
        except OSError:
            continue  # not ours, or gone: the next launch tries again


def _open(path: Path, *, writable: bool) -> FileIO:
    """Unbuffered. Where it cannot be written any more, to be read."""
    if writable:
        try:
            # O_APPEND: what the runtime writes meanwhile is not written over
            return FileIO(os.open(path, os.O_RDWR | os.O_APPEND | os.O_NOCTTY), "r+")
        except OSError:
            pass
    return FileIO(path, "r")


def _clean(line: bytes) -> str:
    return _ESCAPE.sub("", line.decode("utf-8", "replace"))
