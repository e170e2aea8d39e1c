"""mgpu's own: where launches are kept, what dead ones left, the default profile."""

from __future__ import annotations

import os
import stat
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

from mgpu.detect.sysfs import list_names
from mgpu.doctor.facts import Folder, OwnFacts
from mgpu.errors import ProfileError
from mgpu.rig import Rig

_DAY_S: Final = 86_400.0
_PREFIXES: Final = ("run-", "proxy-")
_MOST: Final = 1000


def look_at_own() -> OwnFacts:
    """The state directories and the default profile."""
    from mgpu.launch.places import spare_state_dir, state_dir, usual_state_dir

    used = state_dir()
    profile, default, flaw, hint = _profile()
    return OwnFacts(
        folders=tuple(_folder(path, used=path == used) for path in (usual_state_dir(), spare_state_dir())),
        profile=profile,
        default=default,
        flaw=flaw,
        flaw_hint=hint,
        psu_watts=default.psu_watts if default else None,
        leftovers=leftovers(),
    )


def leftovers(
    now: float | None = None, proc: Path = Path("/proc"), live: Callable[[], frozenset[str]] | None = None
) -> tuple[str, ...]:
    """Directories of launches that are over: a day old or older, of no launch that lives, and nobody works in them.

    `live`: the directories of launches that live; by default, what their records say.
    """
    from mgpu.launch.places import state_dirs

    found = tuple(_old(state_dirs(), time.time() if now is None else now))
    if not found:
        return ()
    kept = (live or _live_directories)() | _working_directories(proc)
    return tuple(str(path) for path in found if str(path) not in kept)


def _old(folders: tuple[Path, ...], now: float) -> Iterator[Path]:
    for folder in folders:
        for name in list_names(folder)[:_MOST]:
            path = folder / name
            if not name.startswith(_PREFIXES):
                continue
            try:
                status = path.lstat()
            except OSError:
                continue
            if stat.S_ISDIR(status.st_mode) and now - status.st_mtime >= _DAY_S:
                yield path


def _live_directories() -> frozenset[str]:
    from mgpu.launch.store import launches

    records = (seen.record for seen in launches() if seen.alive and seen.record is not None)
    return frozenset(directory for record in records for directory in record.directories)


def _working_directories(proc: Path) -> frozenset[str]:
    """Where this user's processes stand: a runtime starts among its files."""
    found: set[str] = set()
    for pid in list_names(proc):
        if pid.isdecimal():
            try:
                found.add(os.readlink(proc / pid / "cwd"))  # noqa: PTH115 - its text alone
            except OSError:  # gone, or another user's
                continue
    return frozenset(found)


def _folder(path: Path, *, used: bool) -> Folder:
    try:
        status = path.stat()
    except OSError:
        return Folder(path=str(path), exists=False, used=used)
    return Folder(
        path=str(path),
        exists=True,
        owned=status.st_uid == os.geteuid(),
        mode=stat.S_IMODE(status.st_mode),
        writable=os.access(path, os.W_OK | os.X_OK),
        used=used,
    )


def _profile() -> tuple[str, Rig | None, str, str]:
    """(name, rig, what is wrong with it, what to do) of the default profile; all empty where there is none."""
    from mgpu_profiles.store import user_store

    store = user_store()
    name = ""
    try:
        name = store.default() or ""
        return name, store.load(name) if name else None, "", ""
    except ProfileError as error:
        return name or "default", None, error.message, error.hint
