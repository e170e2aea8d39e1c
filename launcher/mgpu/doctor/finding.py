"""What a check says."""

from __future__ import annotations

from typing import Final, Literal

from msgspec import Struct

Severity = Literal["error", "warning", "note", "ok"]
Area = Literal[
    "driver", "access", "cards", "links", "memory", "limits", "disks", "cpu", "environment", "runtimes", "mgpu"
]

#: Worst first.
SEVERITIES: Final[tuple[Severity, ...]] = ("error", "warning", "note", "ok")


class Finding(Struct, frozen=True, kw_only=True):
    """One thing about the machine. `id` names the check; `text` has the figure, `fix` a command or what to do.

    An "error" keeps something from working, a "warning" costs speed or will cost a launch one day, a "note" is good to
    know, "ok" is a check that passed. `source`: who says so, where it is not plain to see.
    """

    severity: Severity
    area: Area
    id: str
    text: str
    fix: str = ""
    source: str = ""


def ok(area: Area, name: str, text: str) -> Finding:
    """A check that passed."""
    return Finding(severity="ok", area=area, id=name, text=text)
