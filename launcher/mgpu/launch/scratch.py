"""A private directory for one runtime: the files it reads and starts among, gone when it has ended."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from mgpu.errors import RuntimeFailedError
from mgpu.launch.private import make_directory, new_file

_PREFIX: Final = "run-"


class Scratch:
    """The files of `Command.files` that have relative paths, for this user alone (keys are among them).

    `directory` is None where there are none. Raises `RuntimeFailedError` when they cannot be written.
    """

    def __init__(self, files: Mapping[str, str] | None = None) -> None:
        own = {name: text for name, text in (files or {}).items() if not os.path.isabs(name)}  # noqa: PTH117 - a name, no Path yet
        self.directory = _make() if own else None
        try:
            for name, text in own.items():
                _write(name, text, self.directory or "")
        except RuntimeFailedError:
            self.remove()
            raise

    def remove(self) -> None:
        """Safe at any time, any number of times."""
        if self.directory is not None:
            shutil.rmtree(self.directory, ignore_errors=True)


def _make() -> str:
    """Below the state directory if that can be written, else where temporary files go; mode 0700."""
    import tempfile  # 5 ms, for the few runtimes that need it

    from mgpu.launch.places import state_dir

    state = state_dir()
    try:
        state.mkdir(mode=0o700, parents=True, exist_ok=True)
        return tempfile.mkdtemp(prefix=_PREFIX, dir=state)
    except OSError:
        return _make_elsewhere()


def _make_elsewhere() -> str:
    import tempfile  # as above

    try:
        return tempfile.mkdtemp(prefix=f"mgpu-{_PREFIX}")
    except OSError as error:
        raise RuntimeFailedError(
            f"cannot make a directory for the runtime's files: {error.strerror}", hint="set TMPDIR to a writable one"
        ) from error


def _write(name: str, text: str, directory: str) -> None:
    path = Path(directory, name)
    try:
        make_directory(path.parent)
        new_file(path, text.encode("utf-8"))
    except OSError as error:
        raise RuntimeFailedError(
            f"cannot write {path}, which the runtime needs: {error.strerror}", hint="make its directory writable"
        ) from error
