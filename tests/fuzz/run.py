"""Runs a target on many inputs, in children under resource limits, and says what was found.

An input is known by its number: whatever kills a child, the parent makes the same input again and keeps it.
"""

from __future__ import annotations

import faulthandler
import json
import mmap
import os
import random
import resource
import signal
import struct
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable, Iterable
from hashlib import sha256
from pathlib import Path
from typing import Any, Final

from msgspec import Struct

from fuzz.mutate import mutate
from fuzz.target import Target

_HUNG_S: Final = 20  # beyond its processor time, a child sleeps or waits for something that never comes
_MOST_FOUND: Final = 8  # kinds of findings of one batch


class Finding(Struct, frozen=True, kw_only=True):
    """What should not have happened: `place` is the line of code or the signal, the same for the same flaw."""

    target: str
    place: str
    what: str
    data: bytes


class Outcome(Struct, kw_only=True):
    """Inputs, what became of them, and processor time in seconds."""

    target: str
    n: int = 0
    kinds: Counter[str] = Counter()
    findings: dict[str, Finding] = {}
    cpu_s: float = 0.0


def fuzz(target: Target, n: int, seed: str) -> Outcome:
    """The corpus as it is, then `n` inputs made from it."""
    outcome = Outcome(target=target.name, kinds=Counter(), findings={})
    whole = target.pool()
    pool = tuple(data for data in whole if len(data) <= 4 * target.most) or whole

    def made(number: int) -> bytes:
        return mutate(random.Random(f"{target.name} {seed} {number}"), pool, target.tokens, target.most)

    _batches(target, whole.__getitem__, len(whole), outcome)
    _batches(target, made, n, outcome)
    return outcome


def replay(target: Target, inputs: Iterable[bytes]) -> Outcome:
    outcome = Outcome(target=target.name, kinds=Counter(), findings={})
    listed = tuple(inputs)
    _batches(target, listed.__getitem__, len(listed), outcome)
    return outcome


def save(finding: Finding, target: Target) -> Path:
    """Into the corpus: from now on each run starts with it."""
    target.directory.mkdir(parents=True, exist_ok=True)
    path = target.directory / f"found-{sha256(finding.data).hexdigest()[:12]}"
    path.write_bytes(finding.data)
    return path


def _batches(target: Target, made: Callable[[int], bytes], n: int, outcome: Outcome) -> None:
    start = 0
    while start < n:
        start = _batch(target, made, range(start, min(start + target.batch, n)), outcome)


def _batch(target: Target, made: Callable[[int], bytes], numbers: range, outcome: Outcome) -> int:
    """Where to go on: after the batch, or after the input that ended it."""
    report, cause, at, cpu_s = _in_child(target, made, numbers, target.cpu_s)
    outcome.cpu_s += cpu_s
    outcome.kinds.update(report["kinds"])
    outcome.n += sum(report["kinds"].values())
    for number, place, what in report["found"]:
        _add(outcome, Finding(target=target.name, place=place, what=what, data=made(number)))
    if not cause:
        return numbers.stop
    data = made(at)
    if cause == "SIGXCPU":
        cause = _slowest(target, made, range(numbers.start, at + 1))
        data = made(int(cause.rpartition(" ")[2])) if cause.startswith("input") else data
    outcome.n += at + 1 - numbers.start  # the child's own counts died with it
    _add(outcome, Finding(target=target.name, place=cause.rpartition(" ")[0] or cause, what=cause, data=data))
    return at + 1


def _slowest(target: Target, made: Callable[[int], bytes], numbers: range) -> str:
    """Which input of a batch that took too long takes too long by itself: halves, then quarters."""
    while len(numbers) > 1:
        first, second = numbers[: len(numbers) // 2], numbers[len(numbers) // 2 :]
        allowed = max(target.alone_s, target.cpu_s * len(numbers) // (2 * target.batch))
        if _in_child(target, made, first, allowed)[1]:
            numbers = first
        elif _in_child(target, made, second, allowed)[1]:
            numbers = second
        else:
            return f"SIGXCPU: {len(numbers)} inputs together take more than {allowed} s"
    return f"input takes too long: number {numbers.start}"


def _add(outcome: Outcome, finding: Finding) -> None:
    known = outcome.findings.get(finding.place)
    if known is None or len(finding.data) < len(known.data):
        outcome.findings[finding.place] = finding


def _in_child(
    target: Target, made: Callable[[int], bytes], numbers: range, cpu_s: int
) -> tuple[dict[str, Any], str, int, float]:
    """(the child's report, what ended it, the input it was at, its processor time)."""
    with mmap.mmap(-1, 8) as at, tempfile.TemporaryDirectory(prefix="mgpu-fuzz-") as folder:
        reader, writer = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.close(reader)
            _child(target, made, numbers, cpu_s, (at, writer, folder))
        os.close(writer)
        with os.fdopen(reader, "rb") as pipe:
            told = [json.loads(line) for line in pipe.read().splitlines()]
        _, status, used = os.wait4(pid, 0)
        found = [line for line in told if isinstance(line, list)]
        kinds = next((line for line in told if isinstance(line, dict)), None)  # the last thing it says
        cause = signal.Signals(os.WTERMSIG(status)).name if os.WIFSIGNALED(status) else ""
        if not cause and kinds is None:
            cause = f"exit {os.WEXITSTATUS(status)}"
        report = {"kinds": kinds or {}, "found": found}
        return report, cause, struct.unpack("<q", at[:8])[0], used.ru_utime + used.ru_stime


def _child(
    target: Target, made: Callable[[int], bytes], numbers: range, cpu_s: int, tools: tuple[mmap.mmap, int, str]
) -> None:
    """Never returns."""
    at, writer, folder = tools
    faulthandler.disable()  # how it died is told to whoever has forked it
    os.environ["MGPU_FUZZ_SCRATCH"] = folder
    os.chdir(folder)
    kinds: Counter[str] = Counter()
    found: set[str] = set()
    with open(os.devnull, "wb") as nowhere:  # noqa: PTH123 - beside dup2
        os.dup2(nowhere.fileno(), 1)
    _limit(target, cpu_s)
    for number in numbers:
        data = made(number)
        at[:8] = struct.pack("<q", number)
        try:
            kinds[target.run(data)] += 1
        except BaseException as error:  # noqa: BLE001 - whatever comes is what this is looking for
            place = _place(error)
            kinds["finding"] += 1
            if len(found) < _MOST_FOUND and place not in found:
                found.add(place)
                _say(writer, (number, place, f"{type(error).__name__}: {str(error)[:300]}"))
    _say(writer, kinds)
    os._exit(0)


def _say(writer: int, what: object) -> None:
    """At once: the next input may be the end of this process. (JSON tells findings, which are lists, from counts.)"""
    os.write(writer, json.dumps(what).encode() + b"\n")


def _limit(target: Target, cpu_s: int) -> None:
    size = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0]) * resource.getpagesize()
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    resource.setrlimit(resource.RLIMIT_AS, (size + target.memory, hard))
    resource.setrlimit(resource.RLIMIT_CPU, (cpu_s, cpu_s + 5))
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, (target.file_bytes, resource.RLIM_INFINITY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.alarm(10 * cpu_s + _HUNG_S)  # an input that waits takes no processor time


def _place(error: BaseException) -> str:
    """The innermost line of ours."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in frames if "/mgpu" in frame.filename or "/tests/" in frame.filename]
    last = (ours or list(frames))[-1]
    return f"{type(error).__name__} at {Path(last.filename).name}:{last.lineno} {last.name}"
