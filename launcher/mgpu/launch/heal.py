"""What launches leave behind that could not end in peace: killed with SIGKILL, or with the machine.

Whoever lists, launches or stops does this first. Only what a record of this user names is touched, and only while the
lock of its launch is held by nobody: processes by their start as well as their number, directories below our own.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import stat
import subprocess
import time
from collections.abc import Mapping, Sequence
from contextlib import closing, suppress
from pathlib import Path
from typing import Final

from msgspec.structs import replace

from mgpu.launch.identity import Identity, is_running, send
from mgpu.launch.leftovers import Leftovers
from mgpu.launch.locks import unheld
from mgpu.launch.places import state_dirs
from mgpu.launch.records import End, Record
from mgpu.launch.store import Seen, is_local, launches, taken_over

_GRACE_S: Final = 5.0  # from SIGTERM to SIGKILL, as for a child
_POLL_S: Final = 0.02
_UNDO_S: Final = 5.0  # a service that does not answer has no more to give back
_KEPT_S: Final = 7 * 86400.0  # how a launch ended is told for a week
_BEING_MADE_S: Final = 3600.0  # a private directory that nobody has named by then
_PRIVATE: Final = re.compile(r"(?:mgpu-)?(?:run|proxy)-[A-Za-z0-9_-]+")
_KILLED: Final = 7  # exit code of what died

_DRAFT: Final = re.compile(r"\..+\.([0-9]{1,9})")


def heal(*, now: float | None = None) -> tuple[Seen, ...]:
    """Put right what is not, and return what is left: launches that live, and those whose end is worth telling."""
    now = time.time() if now is None else now
    left = tuple(kept for seen in launches() if (kept := _healed(seen, now)) is not None)
    for state in state_dirs():
        _remove_drafts(state / "launches")
        _sweep(state, left, now)
    return left


def _healed(seen: Seen, now: float) -> Seen | None:
    if seen.alive or (seen.record is not None and not _is_due(seen.record, seen, now)):
        return seen
    with taken_over(seen) as over:
        if over is None:
            return seen  # it lives after all, or somebody else is at it
        told = _ended(over.record, seen.folder.parent, now) if over.record is not None else None
        if told is None:
            over.forget()
            return None
        over.rewrite(told)
    return replace(seen, record=told)


def _is_due(record: Record, seen: Seen, now: float) -> bool:
    """Whether there is something to do: of launches on other machines only what is old, as nothing is known of them."""
    if not is_local(record):
        return abs(now - _changed(seen)) > _KEPT_S
    return record.end is None or abs(now - record.end.at) > _KEPT_S  # also where the clock has been set back


def _ended(record: Record, state: Path, now: float) -> Record | None:
    """Clean up after a launch that is over. Returns what is to be told of it; None: nothing, or not any longer."""
    if record.end is not None or not is_local(record):
        return None
    _clean_up(record, state)
    if not record.detached:
        return None
    end = End(
        exit_code=_KILLED,
        message=f"mgpu itself was killed, or the machine went down; {record.runtime or 'its runtime'} was ended, too",
        at=now,
    )
    return replace(record, state="failed", end=end, runtimes=(), directories=(), after=(), undo=(), cards=(), ports=())


def _changed(seen: Seen) -> float:
    try:
        return (seen.folder / f"{seen.name}.json").stat().st_mtime
    except OSError:
        return 0.0


def _clean_up(record: Record, state: Path) -> None:
    """End its runtimes, with all that these started, then remove their files."""
    leftovers = Leftovers(record.leaves)
    families = [_Orphan(identity) for identity in (*record.runtimes, *record.members) if is_running(identity)]
    leftovers.look(pid for orphan in families for pid in orphan.pids)
    _end(families)
    leftovers.clear(by_itself=True)
    for argv in record.after:
        _run(argv, record.variables)
    _undo(record)
    for name in record.directories:
        if _is_private(Path(name), (state, *state_dirs())):
            shutil.rmtree(name, ignore_errors=True)


def _is_private(path: Path, states: Sequence[Path]) -> bool:
    """A directory that a launch has made for itself, here or among temporary files, and nothing else."""
    import tempfile  # 5 ms, for a rare case

    temporary = Path(tempfile.gettempdir())
    if not _PRIVATE.fullmatch(path.name) or path.parent not in {*states, temporary}:
        return False
    if path.parent == temporary and not path.name.startswith("mgpu-"):
        return False
    try:
        status = path.lstat()
    except OSError:
        return False
    return stat.S_ISDIR(status.st_mode) and status.st_uid == os.geteuid() and stat.S_IMODE(status.st_mode) == 0o700


def _sweep(state: Path, left: Sequence[Seen], now: float) -> None:
    """Private directories that no record names: of launches that were killed while they were making one."""
    if any(seen.record is None for seen in left):
        return  # whose they are cannot be told just now
    named = {name for seen in left if seen.record is not None for name in seen.record.directories}
    try:
        found = [path for path in state.iterdir() if str(path) not in named and _is_private(path, (state,))]
        old = [path for path in found if now - path.stat().st_mtime > _BEING_MADE_S]
    except OSError:
        return
    for path in old:
        shutil.rmtree(path, ignore_errors=True)


def _end(orphans: Sequence[_Orphan]) -> None:
    for orphan in orphans:
        orphan.ask()
    deadline = time.monotonic() + _GRACE_S
    while any(orphan.any_left() for orphan in orphans) and time.monotonic() < deadline:
        time.sleep(_POLL_S)
    for orphan in orphans:
        orphan.kill()


class _Orphan:
    """A runtime whose mgpu has gone, or what one has left."""

    def __init__(self, identity: Identity) -> None:
        from mgpu.launch.tree import Tree  # psutil: 12 ms

        self._identity = identity
        self._family = Tree(identity.pid)

    @property
    def pids(self) -> tuple[int, ...]:
        return (self._identity.pid, *self._family.pids)

    def ask(self) -> None:
        send(self._identity, signal.SIGTERM)

    def kill(self) -> None:
        if is_running(self._identity):
            with suppress(OSError):
                os.killpg(self._identity.pid, signal.SIGKILL)  # each was started in a session of its own
            send(self._identity, signal.SIGKILL)
        self._family.kill()

    def any_left(self) -> bool:
        return is_running(self._identity) or self._family.any_alive()


def _run(argv: tuple[str, ...], variables: Mapping[str, str]) -> None:
    with suppress(OSError, subprocess.SubprocessError):
        subprocess.run(
            argv,
            env={**os.environ, **variables},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
            timeout=60,
            check=False,
        )


def _undo(record: Record) -> None:
    """Give models back to services, unless another launch uses the same one: then that will."""
    if not record.undo:
        return
    from mgpu.launch.http import Caller
    from mgpu.service import Call

    others = (seen.record for seen in launches() if seen.alive and seen.record is not None)
    wanted = {(one.url, str(one.body)) for other in others for one in other.undo}
    with closing(Caller()) as caller:
        for one in record.undo:
            if (one.url, str(one.body)) not in wanted:
                caller.ask(Call(method=one.method, url=one.url, body=one.body, timeout_s=_UNDO_S))


def _remove_drafts(folder: Path) -> None:
    """Texts of a record whose writer was killed before they were in place; and locks nobody holds or will."""
    try:
        names = os.listdir(folder)  # noqa: PTH208 - names are all it takes
    except OSError:
        return
    for name in names:
        match = _DRAFT.fullmatch(name)
        if match and not _lives(int(match[1])):
            with suppress(OSError):
                (folder / name).unlink()
        if name.endswith(".lock") and f"{name.removesuffix('.lock')}.json" not in names:
            _remove_lock(folder / name)


def _remove_lock(path: Path) -> None:
    """Of a launch without a record: one that is just beginning holds it, or will ask for another."""
    with unheld(path) as ours:
        if ours and not path.with_suffix(".json").exists():
            with suppress(OSError):
                path.unlink()


def _lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True
