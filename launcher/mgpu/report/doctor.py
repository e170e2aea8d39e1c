"""What `mgpu doctor` found, as people see it. Holds in 80 columns; nothing is lost without colour."""

from __future__ import annotations

import functools
import textwrap
from collections.abc import Iterator, Sequence
from typing import Any, Final

import msgspec
from rich.console import Group
from rich.text import Text

from mgpu.doctor.finding import SEVERITIES, Finding, Severity
from mgpu.rig import Rig

_MARKS: Final[dict[Severity, tuple[str, str]]] = {
    "error": ("✗", "red"),
    "warning": ("!", "yellow"),
    "note": ("·", ""),
    "ok": ("○", "dim"),
}
_PLURALS: Final[dict[Severity, tuple[str, str]]] = {
    "error": ("error", "errors"),
    "warning": ("warning", "warnings"),
    "note": ("note", "notes"),
    "ok": ("fine", "fine"),
}

#: Without breaks inside of words: commands are there to be copied.
_wrap: Final = functools.partial(textwrap.wrap, break_on_hyphens=False, break_long_words=False)


def doctor_screen(found: Sequence[Finding], rig: Rig, width: int) -> Group:
    """The findings, the worst first, each with its fix; then the checks that passed, area by area."""
    cards = ", ".join(f"GPU {gpu.index} {gpu.name}" for gpu in rig.gpus) or "no GPU"
    parts = [Text(line, style="bold") for line in _wrap(f"{rig.name}: {cards}", width)]
    if rig.driver:
        parts.append(Text(rig.driver, style="dim"))
    parts.append(Text())
    for finding in found:
        if finding.severity != "ok":
            parts += _lines(finding, width)
    passed = [finding for finding in found if finding.severity == "ok"]
    if passed:
        parts += [Text(), Text("fine", style="bold")]
        parts += [Text(line, style="dim") for line in _passed(passed, width)]
    parts += [Text(), Text(summary(found))]
    return Group(*parts)


def doctor_object(found: Sequence[Finding]) -> dict[str, Any]:
    """The findings for scripts; `checks` counts all of them, those that passed too."""
    return {
        "schema": 1,
        "findings": [msgspec.to_builtins(finding) for finding in found],
        "checks": len(found),
    }


def summary(found: Sequence[Finding]) -> str:
    """`"31 checks: 1 error, 2 warnings, 28 fine"`."""
    counts = {severity: sum(one.severity == severity for one in found) for severity in SEVERITIES}
    words = [f"{count} {_PLURALS[severity][count != 1]}" for severity, count in counts.items() if count]
    return f"{len(found)} check{'s' if len(found) != 1 else ''}: {', '.join(words)}"


def _lines(finding: Finding, width: int) -> Iterator[Text]:
    mark, style = _MARKS[finding.severity]
    text = f"{finding.area}: {finding.text}"
    for line in _wrap(text, width, initial_indent=f"{mark} ", subsequent_indent="  "):
        yield Text(line, style=style)
    for label, more in (("fix", finding.fix), ("see", finding.source)):
        if more:
            for line in _wrap(f"{label}: {more}", width, initial_indent="    ", subsequent_indent="      "):
                yield Text(line, style="dim")


def _passed(passed: Sequence[Finding], width: int) -> Iterator[str]:
    areas = dict.fromkeys(finding.area for finding in passed)
    for area in areas:
        told = "; ".join(finding.text for finding in passed if finding.area == area)
        yield from _wrap(f"{area}: {told}", width, initial_indent="○ ", subsequent_indent="  ")
