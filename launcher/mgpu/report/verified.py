"""A plan beside what the runtime's own tool projects for it: as a table, as sentences, as JSON."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Final

from msgspec import Struct
from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from mgpu.adapter import TOLERANCE, Expected, Projected, Projection
from mgpu.plan import Plan
from mgpu.report.lines import name_of
from mgpu.units import MIB, gib

_PARTS: Final = ("weights", "kv", "compute")
_WORDS: Final = {"weights": "weights", "kv": "context", "compute": "compute"}


class Row(Struct, frozen=True, kw_only=True):
    """One device: what was planned, and what the tool says of it."""

    name: str  # "GPU 0 (RTX 3090)", "host RAM"
    expected: Expected
    projected: Projected

    def difference(self, part: str) -> int:
        """Bytes the projection is above the plan, negative when below; 0 within what is known to differ.

        The tool prints whole MiB, rounded down: so is the plan, before they are compared.
        """
        told: int = getattr(self.projected, part)
        least: int = getattr(self.expected, part)
        most = least + (self.expected.compute_more if part == "compute" else 0)
        if told < _floor(least):
            return told - _floor(least)
        return max(told - _floor(most), 0)

    @property
    def share(self) -> float:
        """All differences together, as a share of what is planned for the device."""
        planned = self.expected.weights + self.expected.kv + self.expected.compute
        return sum(abs(self.difference(part)) for part in _PARTS) / max(planned, MIB)


def rows(plan: Plan, projection: Projection) -> tuple[Row, ...]:
    """Devices in the plan's order, the host, then devices that the tool uses and the plan does not."""
    names = (*(name_of(device) for device in plan.devices), "host RAM")
    told = {item.device: item for item in projection.projected}
    known = [
        Row(name=name, expected=expected, projected=told.pop(expected.device, _nothing(expected.device)))
        for name, expected in zip(names, projection.question.expected, strict=True)
    ]
    strangers = [
        Row(name=item.device, expected=Expected(device=item.device, weights=0, kv=0, compute=0), projected=item)
        for item in told.values()
    ]
    return (*known, *strangers)


def warnings(compared: Sequence[Row]) -> tuple[str, ...]:
    """One sentence for each device whose projection differs from the plan by more than `TOLERANCE`."""
    return tuple(
        f"{row.name}: the projection differs from the plan by {row.share:.0%} ({', '.join(_differences(row))})"
        for row in compared
        if row.share > TOLERANCE
    )


def verified_screen(plan: Plan, projection: Projection) -> Group:
    """The table, what is known to differ, and what should not."""
    compared = rows(plan, projection)
    table = Table.grid(padding=(0, 2))
    table.add_column()
    table.add_column()
    table.add_column(justify="right")
    table.add_column(justify="right")
    table.add_column()
    table.add_row("", "", *(Text(word, style="dim") for word in ("plan", "projection", "")))
    for row in compared:
        for i, part in enumerate(_PARTS):
            told: int = getattr(row.projected, part)
            planned: int = getattr(row.expected, part)
            cells = (_mib(planned), _mib(told), _verdict(row, part))
            table.add_row(row.name if i == 0 else "", Text(_WORDS[part], style="dim"), *cells)
    parts: list[RenderableType] = [Text("Verified, in MiB", style="bold"), Padding(table, (0, 0, 0, 2))]
    parts += [Padding(Text(f"* {remark}", style="dim"), (0, 0, 0, 2)) for remark in projection.question.remarks]
    parts.append(Padding(Text(f"projected by {projection.tool}", style="dim", overflow="fold"), (0, 0, 0, 2)))
    told_off = warnings(compared)
    parts += [Text(f"warning: {text}", style="yellow") for text in told_off]
    if not told_off:
        parts.append(Text("plan and projection agree", style="green"))
    return Group(*parts)


def verified_object(plan: Plan, projection: Projection) -> dict[str, Any]:
    """As `verified_screen`, for `--json`. `difference_bytes` leaves out what is known to differ."""
    compared = rows(plan, projection)
    return {
        "tool": projection.tool,
        "arguments": list(projection.question.arguments),
        "agrees": not warnings(compared),
        "devices": [_device(row) for row in compared],
        "remarks": list(projection.question.remarks),
        "warnings": list(warnings(compared)),
    }


def _device(row: Row) -> dict[str, Any]:
    return {
        "device": row.expected.device,
        "name": row.name,
        "planned": {f"{part}_bytes": getattr(row.expected, part) for part in _PARTS},
        "projected": {f"{part}_bytes": getattr(row.projected, part) for part in _PARTS},
        "difference": {f"{part}_bytes": row.difference(part) for part in _PARTS},
        "known_compute_bytes": row.expected.compute_more,
    }


def _verdict(row: Row, part: str) -> Text:
    off = row.difference(part)
    if off:
        return Text(f"{off // MIB:+d}", style="yellow")
    above = _floor(getattr(row.projected, part)) - _floor(getattr(row.expected, part))
    return Text(f"{above // MIB:+d}, as known *" if above else "=", style="dim")


def _differences(row: Row) -> Iterator[str]:
    for part in _PARTS:
        off = row.difference(part)
        if off:
            yield f"{_WORDS[part]} {'+' if off > 0 else '-'}{gib(abs(off))}"


def _nothing(device: str) -> Projected:
    return Projected(device=device, weights=0, kv=0, compute=0)


def _floor(size: int) -> int:
    return size // MIB * MIB


def _mib(size: int) -> str:
    return f"{size // MIB}"
