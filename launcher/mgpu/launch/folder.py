"""Where a runtime is that is a folder of source and no program: what it is told by the files in it."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Final

from mgpu.adapter import Folder, Search
from mgpu.errors import RuntimeMissingError
from mgpu.launch.find import Found

_MOST_TEXT: Final = 64 << 10  # bytes read of one file
_MOST_FILES: Final = 64


def find_folder(search: Search, folder: Folder, environ: Mapping[str, str]) -> Found | None:
    """The folder that the variable names, else one of the usual places; of several, the one with `folder.wanted`.

    Raises `RuntimeMissingError` when none that was named by hand is one: nothing else is tried in its place.
    """
    given = environ.get(search.variable)
    if given:
        paths = [Path(path).expanduser() for path in given.split(os.pathsep) if path]
        flaws = {path: _flaw(path, folder) for path in paths}
        fit = [path for path, flaw in flaws.items() if flaw is None]
        if not fit:
            path, flaw = next(iter(flaws.items()))
            raise RuntimeMissingError(
                f"${search.variable} {path}: {flaw}",
                hint=f"name the folder of {search.executables[0]}, or install it: {search.install}",
            )
        return _found(fit, search, folder, f"${search.variable}")
    fit = [path for path in map(_expanded, folder.places) if _flaw(path, folder) is None]
    return _found(fit, search, folder, "a usual place") if fit else None


def _expanded(place: str) -> Path:
    try:
        return Path(place).expanduser()
    except RuntimeError:  # no home directory: pathlib says it so
        return Path(place)


def _flaw(path: Path, folder: Folder) -> str | None:
    """Why this is no such folder."""
    try:
        if not path.is_dir():
            return "no such directory"
        return None if (path / folder.program).is_file() else f"has no {folder.program}"
    except OSError as error:
        return str(error.strerror)


def _found(fit: list[Path], search: Search, folder: Folder, origin: str) -> Found:
    path = next((path for path in fit if (path / folder.wanted).exists()), fit[0]).absolute()
    return Found(
        executable=str(path / folder.program), origin=origin, install=search.install, texts=dict(_texts(path, folder))
    )


def _texts(path: Path, folder: Folder) -> Iterator[tuple[str, str]]:
    for pattern in folder.texts:
        for file in sorted(islice(path.glob(pattern), _MOST_FILES)):
            yield str(file.relative_to(path)), _text(file)


def _text(file: Path) -> str:
    """Empty for folders, programs, and what cannot be read: that it is there says enough."""
    if not file.is_file() or os.access(file, os.X_OK):
        return ""
    try:
        with file.open("rb") as opened:
            return opened.read(_MOST_TEXT).decode("utf-8", "replace")
    except OSError:
        return ""
