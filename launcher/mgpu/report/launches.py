"""Launches as a table: what runs, where, how fast, for whom, and since when."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Protocol

from rich import box
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from mgpu.errors import one_line
from mgpu.rig import short_name
from mgpu.units import gib, gib_of


class Card(Protocol):
    """One card of a launch: bytes planned, and held if that is known."""

    @property
    def gpu(self) -> int: ...
    @property
    def name(self) -> str: ...
    @property
    def planned(self) -> int: ...
    @property
    def held(self) -> int | None: ...
    @property
    def reported(self) -> int | None: ...
    @property
    def reported_planned(self) -> int: ...


class Work(Protocol):
    """What it has done."""

    @property
    def requests(self) -> int | None: ...
    @property
    def tok_s(self) -> float | None: ...
    @property
    def lately(self) -> float | None: ...
    @property
    def running(self) -> int | None: ...
    @property
    def waiting(self) -> int | None: ...


class End(Protocol):
    """How it failed."""

    @property
    def message(self) -> str: ...
    @property
    def report(self) -> str: ...


class Launch(Protocol):
    """What the table shows of a launch."""

    @property
    def state(self) -> str: ...
    @property
    def detached(self) -> bool: ...
    @property
    def terminal(self) -> bool: ...
    @property
    def unit(self) -> bool: ...
    @property
    def model(self) -> str: ...
    @property
    def runtime(self) -> str: ...
    @property
    def users(self) -> int: ...
    @property
    def cards(self) -> Sequence[Card]: ...
    @property
    def ram_planned(self) -> int: ...
    @property
    def ram_held(self) -> int: ...
    @property
    def endpoint(self) -> str: ...
    @property
    def started(self) -> float: ...
    @property
    def ready(self) -> float | None: ...
    @property
    def restarts(self) -> int: ...
    @property
    def work(self) -> Work: ...
    @property
    def said(self) -> str: ...
    @property
    def end(self) -> End | None: ...


_FIGURES = {"tok/s", "users", "since"}
_MOST = 900  # characters of a line that quotes something
_STYLES = {"ready": "green", "failed": "red", "unwell": "red"}


def launches_screen(
    launches: Iterable[tuple[str, bool, Launch | None]], now: float
) -> tuple[RenderableType, tuple[Text, ...]]:
    """The table, and lines of launches that have something to say, not to be wrapped: paths are among them.

    `now`: seconds since 1970.
    """
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for heading in ("name", "state", "where", "held of planned", "tok/s", "users", "since"):
        table.add_column(heading, justify="right" if heading in _FIGURES else "left", overflow="fold")
    lines: list[Text] = []
    for name, alive, launch in launches:
        if launch is None:
            state = "running, its record is damaged" if alive else "unknown"
            table.add_row(name, Text(state, style="yellow"))
            continue
        table.add_row(*_row(name, launch, now))
        lines += _notes(name, launch)
    return table, tuple(lines)


def _row(name: str, launch: Launch, now: float) -> tuple[RenderableType, ...]:
    how = "as a unit" if launch.unit else "in a terminal" if launch.terminal and not launch.detached else ""
    state = f"{launch.state}\n{how}".rstrip()
    where = " + ".join(f"{card.gpu} ({short_name(card.name)})" for card in launch.cards)
    cpu = "" if launch.end is not None else "CPU"
    return (
        name,
        Text(state, style=_STYLES.get(launch.state, "")),
        f"{launch.runtime}\n{f'GPU {where}' if where else cpu}".strip(),
        "\n".join(_memory(launch)),
        _speed(launch.work),
        _users(launch),
        age(now - (launch.ready or launch.started)),
    )


def _memory(launch: Launch) -> Iterator[str]:
    """Held and planned, a line for each card; RAM where there is no card.

    Of RAM no part: what is resident has libraries and all pages of the file in it, also those that were only copied.
    """
    rows = [
        (card.reported, card.reported_planned) if card.held is None and card.reported else (card.held, card.planned)
        for card in launch.cards
    ]
    if not rows and launch.ram_planned:
        if launch.ram_held:
            yield f"{gib(launch.ram_held)} resident"
        yield f"{gib(launch.ram_planned)} planned"
    for held, planned in rows:
        yield f"- of {gib(planned)}" if held is None else gib_of(held, planned)


def _speed(work: Work) -> str:
    """Lately if it is at work, else over all."""
    speed = work.lately or work.tok_s
    return f"{speed:.0f}" if speed and speed >= 10 else f"{speed:.1f}" if speed else "-"


def _users(launch: Launch) -> str:
    work = launch.work
    running = "-" if work.running is None else str(work.running)
    return f"{running} of {launch.users}" + (f", {work.waiting} wait" if work.waiting else "")


def _notes(name: str, launch: Launch) -> list[Text]:
    """What there is to say of it; records quote logs and drivers, so nothing but letters reaches the terminal."""
    said = one_line(launch.said, _MOST)
    notes: list[Text] = []
    if launch.endpoint and launch.end is None:
        notes.append(Text(f"{name}: {one_line(launch.endpoint, _MOST)}"))
    if launch.end is not None:
        notes.append(Text(f"{name}: {one_line(launch.end.message, _MOST)}", style="red"))
        if launch.end.report:
            notes.append(Text(f"    report: {one_line(launch.end.report, _MOST)}"))
        notes.append(Text(f"    `mgpu logs {name}` shows its last lines, `mgpu stop {name}` clears it away"))
    elif launch.state == "waiting":
        notes.append(Text(f"{name}: waits to be started again; last: {said}", style="yellow"))
    elif launch.restarts:
        times = "once" if launch.restarts == 1 else f"{launch.restarts} times"
        notes.append(Text(f"{name}: started again {times}; last: {said}", style="yellow"))
    elif said:
        notes.append(Text(f"{name}: {said}", style="yellow" if launch.state == "unwell" else ""))
    return notes


def age(seconds: float) -> str:
    """`"5 s"`, `"12 min"`, `"3 h"`, `"41 d"`: the largest unit of which there are two. 0 where a clock was set back."""
    seconds = max(seconds, 0.0)
    for unit, length in (("d", 86400.0), ("h", 3600.0), ("min", 60.0)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds:.0f} s"
