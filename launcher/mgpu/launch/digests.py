"""The sha256 of files as large as models, reckoned once while a file stays the same."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Final

import msgspec

from mgpu.errors import UNREADABLE
from mgpu.launch.private import read_own, write_whole

_BLOCK: Final = 4 << 20
_KEPT: Final = 256  # files remembered
_MOST_BYTES: Final = 4 << 20  # of these, paths of 4 KiB included


class Stopped(Exception):  # noqa: N818 - no error: somebody wanted it to stop
    """`sha256` was told to stop."""


def sha256(path: Path, *, told: Callable[[int, int], bool], cache: Path | None = None) -> str:
    """64 hex digits. `told(done, total)` is called on the way and stops it with `Stopped` by returning False.

    `cache` is the file that remembers; by default `digests.json` in the user's cache directory. Raises OSError.
    """
    cache = cache or _default_cache()
    facts = path.stat()
    identity = f"{path.resolve()}|{facts.st_size}|{facts.st_mtime_ns}|{facts.st_ino}"
    known = _read(cache)
    if identity in known:
        return known[identity]
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
            if not told(file.tell(), facts.st_size):
                raise Stopped
    found = digest.hexdigest()
    _write(cache, known | {identity: found})
    return found


def _default_cache() -> Path:
    import platformdirs  # 4 ms, and for uploads alone

    return Path(platformdirs.user_cache_dir("mgpu")) / "digests.json"


def _read(path: Path) -> dict[str, str]:
    try:
        return msgspec.json.decode(read_own(path, at_most=_MOST_BYTES) or b"{}", type=dict[str, str])
    except (OSError, *UNREADABLE):
        return {}  # absent or damaged: reckoned again


def _write(path: Path, digests: dict[str, str]) -> None:
    with suppress(OSError):  # no cache is no error
        write_whole(path, msgspec.json.encode(dict(list(digests.items())[-_KEPT:])))
