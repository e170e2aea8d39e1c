"""What to paste into an issue when a runtime has failed: the plan, the versions, the last lines, and nothing secret."""

from __future__ import annotations

import os
import platform
import shlex
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Final

from mgpu import __version__
from mgpu.adapter import Command
from mgpu.errors import RuntimeFailedError
from mgpu.launch.logs import last_lines
from mgpu.launch.places import state_dir
from mgpu.launch.private import write_whole
from mgpu.launch.records import Record
from mgpu.launch.redact import redact, redact_words, secrets_of
from mgpu.launch.verify import Launched
from mgpu.units import gib

KEPT: Final = 10
_LINES: Final = 60
_FOLDER: Final = "reports"


def keep_report(
    error: RuntimeFailedError, record: Record, launched: Launched, command: Command | None, said: Sequence[str]
) -> str:
    """Write the report of a failure, and return its path; empty where it could not be written. Keeps the newest ten."""
    folder = state_dir() / _FOLDER
    path = folder / f"{record.name}-{time.strftime('%Y%m%dT%H%M%S')}-{os.getpid()}.md"
    secrets = secrets_of(os.environ, launched.request.api_key)
    text = redact("\n".join(_lines(error, record, launched, command, said)), secrets)
    try:
        write_whole(path, f"{text}\n".encode("utf-8", "backslashreplace"))
    except OSError:
        return ""
    _prune(path)
    return str(path)


def _lines(
    error: RuntimeFailedError, record: Record, launched: Launched, command: Command | None, said: Sequence[str]
) -> Iterator[str]:
    yield f"# {error.message}"
    yield ""
    if error.hint:
        yield f"Advice given: {error.hint}"
        yield ""
    yield from _versions(launched)
    yield ""
    yield from _plan(record, launched)
    if command is not None:
        yield ""
        yield "Command:"
        yield ""
        secrets = (launched.request.api_key,) if launched.request.api_key else ()
        names = " ".join(f"{name}=…" for name in command.env)
        words = shlex.join(redact_words(command.argv, secrets))
        yield f"    {f'{names} ' if names else ''}{words}"
    if said:
        yield ""
        yield "Before that:"
        yield ""
        yield from (f"    {line}" for line in said)
    lines = (last_lines(Path(record.log), _LINES) if record.log else ()) or error.log_tail
    yield ""
    yield f"The last {len(lines)} lines of its log:"
    yield ""
    yield from (f"    {line}" for line in lines)


def _versions(launched: Launched) -> Iterator[str]:
    rig, installed = launched.rig, launched.installed
    yield f"- mgpu {__version__}, Python {platform.python_version()}, {platform.system()} {platform.release()}"
    yield f"- {installed.runtime} {installed.version} ({installed.origin})"
    yield f"- driver: {rig.driver or 'none'}"
    for gpu in rig.gpus:
        slot = f", PCIe {gpu.pcie}" if gpu.pcie else ""
        yield f"- GPU {gpu.index}: {gpu.name}, {gib(gpu.free_bytes)} of {gib(gpu.total_bytes)} free before{slot}"
    yield f"- RAM: {gib(rig.ram_free_bytes)} of {gib(rig.ram_bytes)} available before"


def _plan(record: Record, launched: Launched) -> Iterator[str]:
    plan, model = launched.plan, launched.model
    yield f"Model: {model.name}, {model.architecture}, {model.quantization}, {gib(model.weights_bytes)}"
    lived = f", ready before, started again {record.restarts} times" if record.ready else ", never ready"
    yield f"Plan: {plan.placement}, context {plan.ctx} x {plan.users} users, cache {plan.kv_type}{lived}"
    for device in plan.devices:
        memory = device.memory
        yield (
            f"- GPU {device.gpu}: {len(device.blocks)} blocks, weights {gib(memory.weights)}, cache {gib(memory.kv)}, "
            f"compute {gib(memory.compute)}, overhead {gib(memory.overhead)} of {gib(device.free_bytes)} free"
        )
    host = plan.host.memory
    yield f"- host: weights {gib(host.weights)}, cache {gib(host.kv)}, compute {gib(host.compute)}"
    yield from (f"- warning: {warning}" for warning in plan.warnings)


def _prune(newest: Path) -> None:
    """Whatever the clock said of the others: the one just written is the newest."""
    with suppress(OSError):
        others = [path for path in newest.parent.glob("*.md") if path != newest]
        for path in sorted(others, key=lambda one: one.stat().st_mtime)[: 1 - KEPT]:
            path.unlink()
