"""Where a runtime is."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

from msgspec import Struct

from mgpu.adapter import Search
from mgpu.errors import RuntimeMissingError


class Found(Struct, frozen=True, kw_only=True):
    """An executable file, where it was found ("--llama-server", "$VARIABLE", "PATH", a package), how to get another.

    `distributions` and `live` as in `Search`; `texts` are what `Search.folder` asks for.
    """

    executable: str
    origin: str
    install: str
    distributions: tuple[str, ...] = ()
    live: bool = False
    texts: Mapping[str, str] = {}


def find_runtime(search: Search, *, explicit: str | None, environ: Mapping[str, str]) -> Found | None:
    """The first of: `explicit`, the environment variable, PATH, a file of a known PyPI package on `sys.path`.

    Raises `RuntimeMissingError` when one that was named by hand cannot be run: nothing else is tried in its place.
    """
    if search.folder is not None:
        from mgpu.launch.folder import find_folder

        return find_folder(search, search.folder, environ)
    path = environ.get("PATH", os.defpath)
    by_hand = ((explicit, "--llama-server"), (environ.get(search.variable) or None, f"${search.variable}"))
    for given, origin in by_hand:
        if given is not None:
            return _found(_given(given, origin, path, search), origin, search)
    for candidate, origin in _candidates(search, path):
        if _flaw(candidate) is None:
            return _found(str(candidate), origin, search)
    return None


def _found(executable: str, origin: str, search: Search) -> Found:
    return Found(
        executable=executable,
        origin=origin,
        install=search.install,
        distributions=search.distributions,
        live=search.live,
    )


def _candidates(search: Search, path: str) -> Iterator[tuple[Path, str]]:
    for name in search.executables:
        for candidate in _on_path(name, path):
            yield candidate, "PATH"
    for directory in sys.path:  # the package is never imported: it may load a GPU driver
        for file in search.package_files:
            yield Path(directory) / file, f"the Python package {Path(file).parts[0]}"


def _on_path(name: str, path: str) -> Iterator[Path]:
    return (Path(directory) / name for directory in path.split(os.pathsep) if directory)


def _given(given: str, origin: str, path: str, search: Search) -> str:
    """A path, or a bare name on PATH, as a path that can be executed."""
    if os.sep not in given:
        named = next((str(candidate) for candidate in _on_path(given, path) if _flaw(candidate) is None), None)
        if named is not None:
            return named
    candidate = Path(given).expanduser()
    flaw = _flaw(candidate)
    if flaw is not None:
        raise RuntimeMissingError(
            f"{origin} {given}: {flaw}",
            hint=f"name the {search.executables[0]} file itself, or install: {search.install}",
        )
    return str(candidate.absolute())


def _flaw(candidate: Path) -> str | None:
    """Why this file cannot be executed, if that can be seen from outside."""
    try:
        if candidate.is_dir():
            return "is a directory"
        if not candidate.is_file():
            return "no such file"
    except OSError as error:
        return str(error.strerror)
    return None if os.access(candidate, os.X_OK) else "is not executable"
