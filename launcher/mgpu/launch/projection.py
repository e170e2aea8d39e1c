"""A runtime's own projection of the memory a plan would take: its tool found, asked, and read. Nothing is allocated."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final

from msgspec.structs import replace

from mgpu.adapter import Adapter, Cause, Command, Projection, Projector, Question, Search
from mgpu.errors import RuntimeFailedError, RuntimeMissingError
from mgpu.launch.collect import MOST, EndlessError, Printed, collect
from mgpu.launch.find import Found, find_runtime
from mgpu.launch.probe import probe_runtime
from mgpu.launch.process import describe_exit, environment

TIMEOUT_S: Final = 120.0  # it reads the header alone, but opens every device of the plan

_LAST_LINES: Final = 5

#: ggml lets gdb print a backtrace when a program ends by an uncaught error, as this tool does for a bad model.
_QUIET: Final = {"GGML_NO_BACKTRACE": "1"}


def project(
    adapter: Adapter,
    projector: Projector,
    question: Callable[[str], Question],
    command: Command,
    environ: Mapping[str, str],
    *,
    timeout_s: float = TIMEOUT_S,
) -> Projection:
    """The projection for `command`, in its environment. `question` is made from what the tool prints for `--help`.

    Raises `RuntimeMissingError` when there is no such tool or it cannot be used, `RuntimeFailedError` when it fails.
    """
    found = find_tool(projector.search, command.argv[0], environ)
    asked = question(probe_runtime(found, ("--help",), environ=environ).outputs["--help"])
    env = environment(command, environ) | _QUIET
    done = _run(found, asked, env, timeout_s)
    if done.returncode != 0:
        raise _failed(found, describe_exit(done.returncode), adapter, done.err)
    projected = projector.read(done.out)
    if not projected:
        raise _failed(found, "printed no projection", adapter, done.err)
    return Projection(tool=found.executable, question=asked, projected=projected)


def find_tool(search: Search, executable: str, environ: Mapping[str, str]) -> Found:
    """The first of: the environment variable, beside the runtime `executable` (of the same build), PATH."""
    server = Path(executable)
    beside = [str(server.parent), str(server.resolve().parent)]
    path = os.pathsep.join((*beside, environ.get("PATH", os.defpath)))
    found = find_runtime(search, explicit=None, environ={**environ, "PATH": path})
    name = search.executables[0]
    if found is None:
        raise RuntimeMissingError(
            f"no {name} beside {executable}, on PATH or in ${search.variable}",
            hint=f"--verify asks it what would be allocated; build it: {search.install}",
        )
    if found.origin == "PATH" and str(Path(found.executable).parent) in beside:
        return replace(found, origin=f"beside {server.name}")
    return found


def _run(found: Found, asked: Question, env: Mapping[str, str], timeout_s: float) -> Printed:
    try:
        return collect((found.executable, *asked.arguments), env, timeout_s=timeout_s)
    except EndlessError as error:
        raise RuntimeFailedError(
            f"{found.executable} gave no projection within {timeout_s:.0f} s and {MOST >> 20} MiB",
            hint="is a GPU or its driver stuck?",
        ) from error
    except OSError as error:
        raise RuntimeMissingError(
            f"{found.executable} ({found.origin}) cannot be run: {error.strerror}", hint=found.install
        ) from error


def _failed(found: Found, what: str, adapter: Adapter, log: str) -> RuntimeFailedError:
    lines = tuple(line.strip() for line in log.splitlines() if line.strip())
    facts = (adapter.read_log(line) for line in lines)
    cause = next((fact for fact in facts if isinstance(fact, Cause)), None)
    name = Path(found.executable).name
    if cause is None:
        return RuntimeFailedError(
            f"{name} {what}", hint=f"it is {found.executable} ({found.origin})", log_tail=lines[-_LAST_LINES:]
        )
    return RuntimeFailedError(f"{name} {what}: {cause.text}", hint=cause.hint, log_tail=lines[-_LAST_LINES:])
