"""What is known of one launch, as every mgpu of this user can read it. Types, and their text on disk.

A record may have been written by an older or a newer mgpu: keys it lacks have defaults, keys nobody knows are left
alone, and one whose values make no sense is damaged, never an error.
"""

from __future__ import annotations

import json
from typing import Final, Literal

import msgspec
from msgspec import Struct

from mgpu.launch.identity import Identity, Machine

SCHEMA: Final = 1

State = Literal["loading", "ready", "unwell", "waiting", "stopping", "failed"]

#: A launch whose runtime is up has allocated what it was promised.
SETTLED: Final[frozenset[State]] = frozenset({"ready", "unwell", "stopping"})

#: A record is a few KiB.
MOST_BYTES: Final = 1 << 20


class Card(Struct, frozen=True, kw_only=True):
    """One card of the plan. `key` as in `mgpu.decide.claims`; `held`: what it holds by now, None where nobody tells.

    `reported`: by the runtime itself, which sees less than a driver; `reported_planned`: the same of the plan.
    `taken`: of `planned`, what is not free any more: all of it once the runtime is ready.
    """

    key: str
    gpu: int = 0
    name: str = ""
    planned: int = 0
    taken: int = 0
    held: int | None = None
    reported: int | None = None
    reported_planned: int = 0


class Work(Struct, frozen=True, kw_only=True):
    """What it has done so far. `tok_s` over all requests, `lately` over the last minute; None where nothing is told."""

    requests: int | None = None
    tok_s: float | None = None
    lately: float | None = None
    running: int | None = None
    waiting: int | None = None


class End(Struct, frozen=True, kw_only=True):
    """How a launch failed, as it was said. `report`: the file to paste into an issue."""

    exit_code: int
    message: str
    hint: str = ""
    at: float = 0.0
    report: str = ""


class Undo(Struct, frozen=True, kw_only=True):
    """A request that gives a model back to a service which goes on without us."""

    method: Literal["POST", "DELETE"]
    url: str
    body: dict[str, str | int | bool] | None = None


class Record(Struct, frozen=True, kw_only=True):
    """One launch. Times are seconds since 1970, to be shown; nothing is decided by them.

    `launcher`: the mgpu that holds its lock. `promised_host`: bytes of RAM that are planned and not taken yet.
    `ram_held`: what is resident of its processes, the pages of the model's file among them; 0 where it was not looked
    at yet. `runtimes`: the processes started, a proxy among them; `members`: what these have started, as last seen.
    `directories`: private ones, to be removed with them. `leaves`: patterns of their shared memory; `after`: commands
    that end what they started elsewhere, with these `variables`; `undo`: what a service is asked then. `said`: the last
    thing that went wrong, or went well again. `logs`: of the runtimes and the proxy, `log` the first of them;
    `own_log`: our own. `terminal`: it was started in one and stays there; `unit`: by a service manager. `restarts`: how
    often it was started again.
    """

    schema: int = SCHEMA
    mgpu: str = ""
    launcher: Identity | None = None
    machine: Machine | None = None
    name: str
    state: State = "loading"
    detached: bool = False
    terminal: bool = False
    unit: bool = False
    model: str = ""
    path: str = ""
    runtime: str = ""
    version: str = ""
    placement: str = ""
    ctx: int = 0
    users: int = 1
    cards: tuple[Card, ...] = ()
    promised_host: int = 0
    ram_planned: int = 0
    ram_held: int = 0
    endpoint: str = ""
    ports: tuple[int, ...] = ()
    log: str = ""
    logs: tuple[str, ...] = ()
    own_log: str = ""
    started: float = 0.0
    ready: float | None = None
    restarts: int = 0
    runtimes: tuple[Identity, ...] = ()
    members: tuple[Identity, ...] = ()
    directories: tuple[str, ...] = ()
    leaves: tuple[str, ...] = ()
    after: tuple[tuple[str, ...], ...] = ()
    variables: dict[str, str] = {}
    undo: tuple[Undo, ...] = ()
    work: Work = Work()
    said: str = ""
    end: End | None = None

    @property
    def all_logs(self) -> tuple[str, ...]:
        """Our own first. An older mgpu knows of one runtime's alone."""
        return tuple(path for path in dict.fromkeys((self.own_log, self.log, *self.logs)) if path)


def to_text(record: Record) -> bytes:
    """JSON in ASCII: a path that is no valid text survives as the escapes of its bytes."""
    return json.dumps(msgspec.to_builtins(record), indent=1).encode("ascii")


def from_text(text: bytes) -> Record | None:
    """None for a text that is damaged, cut short, or no record at all."""
    if len(text) > MOST_BYTES:
        return None
    try:
        return msgspec.convert(json.loads(text), type=Record)
    except (ValueError, RecursionError):  # msgspec's errors are ValueErrors, json's and bad UTF-8 too
        return None
