"""What a runtime says of itself (`--version`, `--help`, `--list-devices`), asked once while it stays the same."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import IO, Final

import msgspec

from mgpu.adapter import Probe
from mgpu.errors import UNREADABLE, RuntimeMissingError
from mgpu.launch.find import Found
from mgpu.launch.private import read_own, write_whole
from mgpu.launch.process import describe_exit, die_with_parent
from mgpu.request import KEY_VARIABLE

PROBE_TIMEOUT_S: Final = 20.0
DEVICES_TIMEOUT_S: Final = 60.0  # opens every GPU; without persistence mode a driver takes seconds for each

_VERSION: Final = "--version"
_MAX_OUTPUT: Final = 4 << 20
_MAX_CACHE: Final = 64 << 20  # bytes
_MAX_CACHED: Final = 64  # texts; llama-server's help is 60 kB


def probe_runtime(
    found: Found,
    flags: tuple[str, ...],
    *,
    environ: Mapping[str, str],
    cache: Path | None = None,
    timeout_s: float = PROBE_TIMEOUT_S,
) -> Probe:
    """What `found` prints for each flag (both outputs together), from the cache where the file has not changed.

    `cache` is the file to keep them in; by default `probes.json` in the user's cache directory. A flag may have words
    of its own ("image inspect"). What the metadata of its package tell is not asked, and what is `live` not kept.
    Raises `RuntimeMissingError` for an executable that cannot run, hangs, crashes or fails, with its last line.
    """
    if found.live:
        outputs = {flag: _ask(found, flag, environ, timeout_s, whatever=True) for flag in flags}
        return Probe(executable=found.executable, origin=found.origin, outputs=outputs)
    metadata = _by_metadata(found, flags)
    flags = tuple(flag for flag in flags if flag not in metadata)
    cache = cache or _default_cache()
    identity = _identity(found.executable)
    cached = _read_cache(cache)
    known = {flag: cached[identity + flag] for flag in flags if identity + flag in cached}
    fresh = {flag: _ask(found, flag, environ, timeout_s) for flag in flags if flag not in known}
    if fresh:
        _write_cache(cache, cached | {identity + flag: text for flag, text in fresh.items()})
    return Probe(
        executable=found.executable, origin=found.origin, outputs={**metadata, **known, **fresh, **found.texts}
    )


def list_devices(found: Found, flag: str, environ: Mapping[str, str], *, timeout_s: float = DEVICES_TIMEOUT_S) -> str:
    """What `found` prints for `flag` in this very environment; never cached. Raises as `probe_runtime` does."""
    return _ask(found, flag, environ, timeout_s)


def _by_metadata(found: Found, flags: tuple[str, ...]) -> dict[str, str]:
    if _VERSION not in flags or not found.distributions:
        return {}
    from mgpu.launch.packages import find_distribution

    distribution = find_distribution(found.executable, found.distributions)
    return {} if distribution is None else {_VERSION: f"{distribution}\n"}


def _ask(found: Found, flag: str, environ: Mapping[str, str], timeout_s: float, *, whatever: bool = False) -> str:
    """`whatever`: the exit status says nothing about the program."""
    try:
        process = subprocess.Popen(
            (found.executable, *flag.split()),
            env={name: value for name, value in environ.items() if name != KEY_VARIABLE},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=die_with_parent(),  # noqa: PLW1509 - as it says itself; a list of devices may take a minute
        )
    except OSError as error:
        raise _unusable(found, f"cannot be run: {error.strerror}") from error
    text, ended = b"", False
    try:
        text, ended = _read(process, time.monotonic() + timeout_s)
    finally:  # also for Ctrl-C: it never outlives the question
        _end(process)
    output = text.decode("utf-8", "replace")
    if not ended:
        raise _unusable(found, f"gave no end to `{flag}` within {timeout_s:.0f} s and 4 MiB")
    if process.returncode != 0 and not whatever:
        last = next((line.strip() for line in reversed(output.splitlines()) if line.strip()), "no output")
        raise _unusable(found, f"{describe_exit(process.returncode)} at `{flag}`: {last[:300]}")
    return output


def _read(process: subprocess.Popen[bytes], deadline: float) -> tuple[bytes, bool]:
    """The output, and whether the process ended by itself in time, within the bound on its output."""
    assert process.stdout is not None  # noqa: S101  # stdout=PIPE
    text = b""
    while len(text) < _MAX_OUTPUT:
        piece = _read_piece(process.stdout, deadline)
        if piece is None:
            return text, False
        if not piece:
            with suppress(subprocess.TimeoutExpired):
                process.wait(max(deadline - time.monotonic(), 0))
            return text, process.poll() is not None
        text += piece
    return text, False


def _read_piece(pipe: IO[bytes], deadline: float) -> bytes | None:
    """What came next; empty at the end; None when the time was over first."""
    readable, _, _ = select.select([pipe], [], [], max(deadline - time.monotonic(), 0))
    return os.read(pipe.fileno(), 1 << 16) if readable else None


def _end(process: subprocess.Popen[bytes]) -> None:
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    if process.stdout is not None:
        process.stdout.close()
    with suppress(subprocess.TimeoutExpired):  # stuck inside a driver: not ours to wait for
        process.wait(2)


def _unusable(found: Found, reason: str) -> RuntimeMissingError:
    return RuntimeMissingError(
        f"{found.executable} ({found.origin}) {reason}",
        hint=f"try it by hand (`{found.executable} --version`), or install another: {found.install}",
    )


def _identity(executable: str) -> str:
    """A prefix of cache keys that changes with the file, and with its directory: libraries beside it hold the flags."""
    path = Path(executable).resolve()
    try:
        file, directory = path.stat(), path.parent.stat()
    except OSError:
        return f"{path}|gone|"  # running it will say why
    return f"{path}|{file.st_size}|{file.st_mtime_ns}|{directory.st_mtime_ns}|"


def _default_cache() -> Path:
    import platformdirs  # 4 ms, not needed by plans for another rig

    return Path(platformdirs.user_cache_dir("mgpu")) / "probes.json"


def _read_cache(path: Path) -> dict[str, str]:
    """What decides which flags are used: nothing that another user could have written."""
    try:
        return msgspec.json.decode(read_own(path, at_most=_MAX_CACHE) or b"{}", type=dict[str, str])
    except (OSError, *UNREADABLE):
        return {}  # absent or damaged: the runtime is asked again


def _write_cache(path: Path, texts: dict[str, str]) -> None:
    newest = dict(list(texts.items())[-_MAX_CACHED:])
    with suppress(OSError):  # no cache is no error: the next run asks again
        write_whole(path, msgspec.json.encode(newest))
