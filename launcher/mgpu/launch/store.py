"""The launches of this user: a record and a lock for each, in the state directory.

Whoever launches holds `NAME.lock` while it lives, and rewrites `NAME.json` as a whole. A launch is alive as long as its
lock is held (or, where somebody has removed the lock, as long as its launcher lives); everything else in these files
may be old, damaged or missing, and is put right by whoever comes next (`mgpu.launch.heal`).
"""

from __future__ import annotations

import errno
import os
import re
import stat
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import Final, Self

from msgspec import Struct
from msgspec.structs import replace

from mgpu.decide.claims import HOST, Claim
from mgpu.errors import UsageError
from mgpu.launch.identity import Identity, identify, is_running, is_stopped, this_machine
from mgpu.launch.locks import Lock, held, is_held, unheld
from mgpu.launch.locks import holder as lock_holder
from mgpu.launch.places import state_dir, state_dirs
from mgpu.launch.records import MOST_BYTES, SETTLED, Record, from_text, to_text

NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")

_MOST_LETTERS: Final = 64

_LONGEST: Final = 48  # characters of a name that is made of a model's
_FOLDER: Final = "launches"
_PLANNING: Final = "planning"  # the lock of whoever is deciding: nobody else's memory changes hands meanwhile
_PLANNING_S: Final = 30.0  # a runtime that lists its devices may wake a driver first
_PORTS: Final = "ports"  # the lock of whoever is choosing some
_PORTS_S: Final = 5.0
_MOST_NAMES: Final = 1000
_MOMENT_S: Final = 0.1


class Seen(Struct, frozen=True, kw_only=True):
    """A launch as it was found. `record` None: damaged. `holder`: who launched it, as far as is known."""

    name: str
    alive: bool
    record: Record | None
    holder: Identity | None
    folder: Path


class Entry:
    """Our own launch in the store, from its decision to its end. Where nothing can be written it lives in memory only.

    `flaw` says why it could not be written, the last time that was tried; empty when it was.
    """

    def __init__(self, record: Record, lock: Lock | None, folder: Path, flaw: str = "") -> None:
        self.record = record
        self.flaw = flaw
        self._lock = lock
        self._folder = folder
        self.write()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def change(self, **changes: object) -> None:
        """Change the record, here and on disk; called now and then even if nothing has changed."""
        changed = replace(self.record, **changes)
        if changed != self.record or (self._lock is not None and not self._lock.is_in_place):
            self.record = changed
            self.write()
        elif self._lock is not None:
            self._lock.touch()

    def write(self) -> None:
        """Readers see the record as it was or as it is, never half of it."""
        if self._lock is None:
            return
        if not self._lock.is_in_place:
            self._take_again(self._lock)
        self.flaw = _write(self._folder, self.record)

    def _take_again(self, lost: Lock) -> None:
        """Somebody has removed our lock, and may have our name by now: then we have another."""
        with suppress(OSError):  # the record's own flaw will say it
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            lock = Lock.try_take(lost.path)
            if lock is None:
                name, lock = _free_name(self._folder, self.record.name)
                self.record = replace(self.record, name=name)
            lost.release()
            _sign(lock)
            self._lock = lock

    def close(self, *, keep: bool = False) -> None:
        """The launch is over; `keep`: its record tells how it ended."""
        if self._lock is None:
            return
        if keep:
            self.write()
        else:
            with suppress(OSError):
                _record_path(self._folder, self.record.name).unlink(missing_ok=True)
        with suppress(OSError):
            self._lock.path.unlink(missing_ok=True)  # while it is held: no one else can take it any more
        self._lock.release()
        self._lock = None


@contextmanager
def planning(
    on_wait: Callable[[], None] = lambda: None,
    *,
    on_stuck: Callable[[str], None] = lambda _: None,
    check: Callable[[], None] = lambda: None,
) -> Iterator[bool]:
    """Keep other launches of this user from deciding at the same time. Yields False where that could not be had.

    Whoever else decides is waited for (`on_wait` is called once, `check` again and again; it may raise), but not for
    ever: `on_stuck` is told who it is.
    """
    path = _folder() / _PLANNING
    with held(path, wait_s=_PLANNING_S, on_wait=on_wait, check=check) as ours:
        if not ours and is_held(path):
            on_stuck(_stuck(_text(path)))
        yield ours


def choosing_ports() -> AbstractContextManager[bool]:
    """Keep other launches from choosing ports at the same time: that takes them a moment, whatever else they do."""
    return held(_folder() / _PORTS, wait_s=_PORTS_S)


def enter(record: Record, *, exact: bool = False) -> Entry:
    """Enter a launch under its name, or the next one like it that is free. Call it while `planning`.

    `exact`: raises `UsageError` where it would have another name.
    """
    folder = state_dir() / _FOLDER
    record = replace(record, launcher=identify(os.getpid()), machine=this_machine())
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        name, lock = _free_name(folder, record.name)
    except OSError as error:
        return Entry(record, None, folder, f"cannot keep the launch in {folder}: {error.strerror}")
    if exact and name != record.name:
        with suppress(OSError):
            lock.path.unlink()
        lock.release()
        raise UsageError(
            f"there is a launch called {record.name}", hint=f"choose another --name, or `mgpu stop {record.name}` first"
        )
    _sign(lock)
    return Entry(replace(record, name=name), lock, folder)


def launches() -> tuple[Seen, ...]:
    """All that are alive or have left something, by name. Never raises."""
    found: dict[str, Seen] = {}
    for state in state_dirs():
        folder = state / _FOLDER
        for name in sorted(_entries(folder)):
            found.setdefault(name, _see(folder, name))
    return tuple(found[name] for name in sorted(found))


class Over(Struct, frozen=True, kw_only=True):
    """A launch that is over, in the hands of whoever clears it away. `record`: as it is now; None: damaged, or gone."""

    record: Record | None
    path: Path

    def rewrite(self, record: Record) -> None:
        """Put down how it ended."""
        _write(self.path.parent, record)

    def forget(self) -> None:
        """Remove what is left of it here."""
        with suppress(OSError):
            self.path.unlink(missing_ok=True)


@contextmanager
def taken_over(seen: Seen) -> Iterator[Over | None]:
    """A launch that is over: nobody else clears it away meanwhile, and nobody takes its name.

    None where it lives after all, or somebody else has it in hand.
    """
    lock = _lock_path(seen.folder, seen.name)
    with unheld(lock) as ours:
        record = _read(seen.folder, seen.name)
        if not ours:
            yield None
            return
        try:
            lives = record is not None and _launcher_lives(record)
            yield None if lives else Over(record=record, path=_record_path(seen.folder, seen.name))
        finally:
            with suppress(OSError):
                lock.unlink(missing_ok=True)


def is_alive(seen: Seen) -> bool:
    """Whether it still is."""
    return _see(seen.folder, seen.name).alive


def claims(others: Sequence[Seen] | None = None) -> tuple[Claim, ...]:
    """What launches that live were promised and have not taken yet."""
    return tuple(claim for seen in (launches() if others is None else others) for claim in _claims(seen))


def taken_ports(*, but: str = "") -> dict[int, str]:
    """Ports of launches that live, and whose: all but those of this name. Also ones that are not bound yet."""
    alive = (seen.record for seen in launches() if seen.alive and seen.record is not None and seen.name != but)
    return {port: record.name for record in alive if is_local(record) for port in record.ports}


def is_local(record: Record) -> bool:
    """Whether it runs on this machine, as far as is known: a home directory may be shared."""
    return record.machine is None or record.machine.is_here


def name_for(model: str) -> str:
    """What a launch of `model` is called, if nobody says otherwise."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", model).strip("-._")[:_LONGEST].rstrip("-._").lower() or "model"


def _folder() -> Path:
    """Where launches are kept, made if that can be done."""
    folder = state_dir() / _FOLDER
    with suppress(OSError):
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    return folder


def _stuck(said: bytes) -> str:
    """How long we have waited, and for whom, by what the lock's file says."""
    waited = f"waited {_PLANNING_S:.0f} s for another mgpu"
    if not re.fullmatch(rb"[0-9]{1,9}\s?", said):
        return waited
    pid = int(said)
    stopped = f", which is stopped: `kill -CONT {pid}` lets it go on" if is_stopped(pid) else ""
    return f"{waited} (pid {pid}{stopped})"


def _sign(lock: Lock) -> None:
    """Who holds it, for those who find the record damaged."""
    me = identify(os.getpid())
    lock.write("" if me is None else f"{me.pid} {me.start}\n")


def _launcher_lives(record: Record) -> bool:
    """Whether the mgpu that launched it lives, whatever has become of its lock."""
    return record.end is None and record.launcher is not None and is_running(record.launcher)


def _claims(seen: Seen) -> Iterator[Claim]:
    record = seen.record
    if not seen.alive or record is None or record.state in SETTLED or not is_local(record):
        return
    why = f"promised to {record.name}, which is loading"
    for card in record.cards:
        if card.planned > card.taken:
            yield Claim(key=card.key, n_bytes=card.planned - card.taken, why=why)
    if record.promised_host > 0:
        yield Claim(key=HOST, n_bytes=record.promised_host, why=why)


def _free_name(folder: Path, wanted: str) -> tuple[str, Lock]:
    """The first name like `wanted` that no launch has, and its lock. Raises OSError."""
    for name in _names(wanted):
        if _is_ended(folder, name) or not _record_path(folder, name).exists():
            lock = _take_soon(_lock_path(folder, name))
            if lock is not None:
                return name, lock
    raise FileExistsError(errno.EEXIST, f"there are {_MOST_NAMES} launches of {wanted}")


def _take_soon(path: Path) -> Lock | None:
    """Somebody who only looks whether it is held has it for a moment, too."""
    deadline = time.monotonic() + _MOMENT_S
    while (lock := Lock.try_take(path)) is None and time.monotonic() < deadline:
        time.sleep(_MOMENT_S / 10)
    return lock


def _names(name: str) -> Iterator[str]:
    yield name
    for number in range(2, _MOST_NAMES):
        suffix = f"-{number}"
        yield f"{name[: _MOST_LETTERS - len(suffix)]}{suffix}"


def _is_ended(folder: Path, name: str) -> bool:
    """A launch of this name is over, and its name free again."""
    seen = _see(folder, name)
    return not seen.alive and (seen.record is None or seen.record.end is not None)


def _entries(folder: Path) -> set[str]:
    try:
        files = os.listdir(folder)  # noqa: PTH208 - names are all it takes
    except OSError:
        return set()
    stems = {file.rpartition(".")[0] for file in files if file.endswith((".json", ".lock"))}
    return {name for name in stems if NAME.fullmatch(name)}


def _see(folder: Path, name: str) -> Seen:
    record = _read(folder, name)
    alive = is_held(_lock_path(folder, name)) or (record is not None and _launcher_lives(record))
    holder = _holder(folder, name) or (record.launcher if record is not None else None)
    return Seen(name=name, alive=alive, record=record, holder=holder, folder=folder)


def _read(folder: Path, name: str) -> Record | None:
    record = from_text(_text(_record_path(folder, name)))
    return None if record is None else replace(record, name=name)


def _holder(folder: Path, name: str) -> Identity | None:
    pid, _, start = _text(_lock_path(folder, name)).decode("ascii", "replace").strip().partition(" ")
    if re.fullmatch(r"[0-9]{1,9}", pid):
        return Identity(pid=int(pid), start=start)
    told = lock_holder(_lock_path(folder, name))  # a full disk: the lock is there, and nothing in it
    return None if told is None else identify(told)


def _text(path: Path) -> bytes:
    """A file of ours; empty where it is none. Whatever else lies there is not waited for."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return b""
    try:
        return os.read(descriptor, MOST_BYTES + 1) if stat.S_ISREG(os.fstat(descriptor).st_mode) else b""
    except OSError:
        return b""
    finally:
        os.close(descriptor)


def _write(folder: Path, record: Record) -> str:
    """Why it could not be written; empty when it was."""
    path = _record_path(folder, record.name)
    draft = path.with_name(f".{record.name}.{os.getpid()}")
    try:
        with os.fdopen(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o600), "wb") as out:
            out.write(to_text(record))
        draft.replace(path)
    except OSError as error:
        with suppress(OSError):
            draft.unlink(missing_ok=True)
        return f"cannot keep the launch in {folder}: {error.strerror}"
    return ""


def _record_path(folder: Path, name: str) -> Path:
    return folder / f"{name}.json"


def _lock_path(folder: Path, name: str) -> Path:
    return folder / f"{name}.lock"
