"""`mgpu ps`, `stop` and `logs`: launches of this user, whoever started them and from whichever terminal."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Sequence
from typing import Any, Final

import click
import msgspec

from mgpu.errors import RuntimeFailedError, UsageError
from mgpu.launch.follow import Following
from mgpu.launch.heal import heal
from mgpu.launch.identity import send
from mgpu.launch.records import Record
from mgpu.launch.redact import redact
from mgpu.launch.signals import raising
from mgpu.launch.store import Seen, is_alive, is_local, launches, taken_over

#: A runtime has 5 s after SIGTERM, then is killed; a proxy and replicas are ended at once.
_STOP_S: Final = 30.0
_CONTAINER_S: Final = 60.0
_KILLED_S: Final = 5.0
_POLL_S: Final = 0.05
_FOLLOW_S: Final = 0.2
_LOOK_S: Final = 1.0
_LINES: Final = 40


def show(*, as_json: bool) -> None:
    """All launches: those that live, and those that have failed and were not cleared away yet."""
    seen = heal()
    if as_json:
        click.echo(json.dumps({"schema": 1, "launches": [_object(one) for one in seen]}, indent=2))
        return
    if not seen:
        click.echo("nothing is running (`mgpu run MODEL --detach` starts something)")
        return
    from mgpu.report.launches import launches_screen
    from mgpu.report.screen import console

    out = console()
    table, notes = launches_screen(tuple((one.name, one.alive, one.record) for one in seen), time.time())
    out.print(table)
    for note in notes:
        out.print(note, soft_wrap=True)


def stop(names: Sequence[str], *, everything: bool) -> None:
    """End launches and wait until they have ended. One that has failed already is cleared away.

    Raises `UsageError` for a name there is not, `RuntimeFailedError` for what does not end.
    """
    seen = heal()
    chosen = seen if everything else _named(names, seen) if names else _only(seen)
    for one in chosen:
        _check_local(one)
    for one in chosen:
        _ask(one)
    stuck = [one for one in chosen if not _has_ended(one, _patience(one))]
    for one in stuck:
        _kill(one)
    heal()
    for one in chosen:
        if is_alive(one) and one.holder is None:
            raise RuntimeFailedError(
                f"{one.name} runs, but its files do not say which process it is",
                hint="`pgrep -af 'mgpu run'` shows it, and `kill` ends it",
            )
        if is_alive(one):
            raise RuntimeFailedError(
                f"{one.name} does not end, even killed: it is stuck inside a driver or a disk",
                hint="`dmesg` may tell more; a reboot will end it",
            )
        with taken_over(one) as over:
            if over is not None:
                over.forget()
        click.echo(f"{'cleared away' if not one.alive else 'stopped'} {one.name}", err=True)
    if everything and not chosen:
        click.echo("nothing is running", err=True)


def logs(name: str | None, *, follow: bool, lines: int | None) -> None:
    """What a launch has said: the end of its runtimes' logs, and what mgpu itself said of it since it was ready."""
    seen = heal()
    (one,) = _named((name,), seen) if name is not None else _only(seen)
    record = one.record
    if record is None or not record.all_logs:
        raise RuntimeFailedError(f"{one.name} has no log yet", hint="`mgpu ps` says how far it is")
    with Following(_echo) as following:
        flaws = following.show_end(record, lines or _LINES)
        if len(flaws) == len(record.all_logs):
            raise RuntimeFailedError(f"{one.name}: {flaws[-1]}", hint="what is launched from now on has one of its own")
        for flaw in flaws:
            click.echo(f"mgpu: {one.name}: {flaw}", err=True)
        if follow:
            _follow(one, following)


def _echo(line: str) -> None:
    """People paste what they see: TabbyAPI tells its keys there."""
    click.echo(redact(line, home=""))


def _follow(one: Seen, following: Following) -> None:
    """Until it ends, or Ctrl-C: which is no failure here. A new try has a new log."""
    looked_at = time.monotonic()
    with raising():
        while True:
            alive = is_alive(one)  # asked before reading: what it says last is not missed
            if not alive or time.monotonic() - looked_at >= _LOOK_S:
                looked_at = time.monotonic()
                record = _record_now(one)
                if record is not None:
                    following.keep_to(record)
            following.read()
            sys.stdout.flush()
            if not alive:
                return
            time.sleep(_FOLLOW_S)


def _record_now(one: Seen) -> Record | None:
    """None where it is over, and nothing is left."""
    return next((seen.record for seen in launches() if seen.name == one.name), None)


def _named(names: Sequence[str], seen: Sequence[Seen]) -> tuple[Seen, ...]:
    by_name = {one.name: one for one in seen}
    for name in names:
        if name not in by_name:
            known = ", ".join(by_name) or "none"
            raise UsageError(f"there is no launch {name!r}", hint=f"launches: {known}")
    return tuple(by_name[name] for name in dict.fromkeys(names))


def _only(seen: Sequence[Seen]) -> tuple[Seen, ...]:
    """The one there is. Raises where it would take a guess."""
    if not seen:
        raise UsageError("nothing is running", hint="`mgpu run MODEL --detach` starts something")
    alive = [one for one in seen if one.alive]
    if len(alive) == 1:
        return (alive[0],)
    if len(seen) > 1:
        raise UsageError(f"there are {len(seen)} launches: say which", hint=", ".join(one.name for one in seen))
    return tuple(seen)


def _check_local(one: Seen) -> None:
    """Raises for a launch on another machine, where no signal reaches it."""
    if one.alive and one.record is not None and one.record.machine is not None and not is_local(one.record):
        raise UsageError(
            f"{one.name} runs on {one.record.machine.name}, which shares this home",
            hint=f"`mgpu stop {one.name}` there",
        )


def _patience(one: Seen) -> float:
    """A container that is removed gives its GPUs back first."""
    if one.holder is None:
        return 0.0
    return _STOP_S + (_CONTAINER_S if one.record is not None and one.record.after else 0.0)


def _ask(one: Seen) -> None:
    if one.alive and one.holder is not None and one.holder.pid != os.getpid():
        send(one.holder, signal.SIGTERM)
        send(one.holder, signal.SIGCONT)  # a stopped process hears nothing else


def _has_ended(one: Seen, seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while is_alive(one):
        if time.monotonic() > deadline:
            return False
        time.sleep(_POLL_S)
    return True


def _kill(one: Seen) -> None:
    """The launcher first: its runtimes are ended by the kernel (Linux), and by `heal`."""
    if one.holder is not None:
        send(one.holder, signal.SIGKILL)
        _has_ended(one, _KILLED_S)


def _object(one: Seen) -> dict[str, Any]:
    """For scripts: names and numbers, and no paths of private files."""
    if one.record is None:
        return {"name": one.name, "alive": one.alive, "state": "unknown"}
    told = msgspec.to_builtins(one.record)
    hidden = {"directories", "leaves", "after", "runtimes", "members", "promised_host"}
    pids = {"pid": one.holder.pid if one.alive and one.holder else None}
    kept = {key: value for key, value in told.items() if key not in hidden}
    return {**kept, "alive": one.alive, **pids, "runtime_pids": [runtime.pid for runtime in one.record.runtimes]}
