"""The runtimes as people see them: `mgpu runtimes`, the guide's software table, live. Holds in 80 columns."""

from __future__ import annotations

import functools
import textwrap
from collections.abc import Iterator, Sequence
from typing import Any, Final

from msgspec import Struct
from rich.console import Group
from rich.text import Text

from mgpu.adapter import Abilities, Here, Installed
from mgpu.plan import Mode
from mgpu.report.lines import indices
from mgpu.request import RuntimeName
from mgpu.rig import Rig, short_name


class Row(Struct, frozen=True, kw_only=True):
    """One runtime on this rig. `missing`: what is wrong with it; empty, also where it is just not `installed`.

    `devices`: those that it lists itself.
    """

    runtime: RuntimeName
    formats: tuple[str, ...]
    abilities: Abilities
    installed: Installed | None
    missing: str
    install: str  # the command
    here: Here
    devices: tuple[str, ...] = ()


_HEADINGS: Final = ("runtime", "version", "formats", "several cards", "unequal")
_VERSION: Final = _HEADINGS.index("version")
_LEAST_VERSION: Final = 8
_GAP: Final = "  "
_WORDS: Final[dict[Mode, str]] = {"pipeline": "layers", "tensor": "tensor", "replicas": "replicas"}
_WAYS: Final[dict[Mode, str]] = {"pipeline": "by layers", "tensor": "as tensor ranks", "replicas": "a replica on each"}


#: Without breaks inside of words: commands are there to be copied.
_WRAPPER: Final = functools.partial(
    textwrap.TextWrapper,
    initial_indent="    ",
    subsequent_indent="      ",
    break_on_hyphens=False,
    break_long_words=False,
)


def runtimes_screen(rows: Sequence[Row], rig: Rig, width: int) -> Group:
    """The table; below each runtime where it is, what it can do on `rig`, why not more, how to get it."""
    cells = [_HEADINGS, *(_cells(row) for row in rows)]
    widths = [max(len(line[column]) for line in cells) for column in range(len(_HEADINGS))]
    others = sum(widths) - widths[_VERSION] + len(_GAP) * (len(widths) - 1)
    widths[_VERSION] = max(min(widths[_VERSION], width - others), _LEAST_VERSION)
    parts = [Text(_rig_words(rig), style="bold"), Text(_aligned(_HEADINGS, widths), style="dim")]
    for row, line in zip(rows, cells[1:], strict=True):
        parts.append(Text(_aligned(line, widths), style="" if row.installed else "dim"))
        cut = len(line[_VERSION]) > widths[_VERSION]
        for detail in _details(row, rig, cut=cut):
            parts += [Text(text, style="dim") for text in _WRAPPER(width).wrap(detail)]
    return Group(*parts)


def runtime_object(row: Row) -> dict[str, Any]:
    """A row for scripts; `here` has rig indices."""
    found = row.installed
    told: dict[str, Any] = {
        "runtime": row.runtime,
        "formats": list(row.formats),
        "modes": list(row.abilities.modes),
        "mixed": list(row.abilities.mixed),
        "cpu": row.abilities.cpu,
        "machines": row.abilities.machines,
        "note": row.abilities.note,
        "here": {"gpus": list(row.here.gpus), "modes": list(row.here.modes), "why_not": list(row.here.why_not)},
        "install": row.install,
        "found": found is not None,
    }
    if found is None:
        return told | {"why_not": row.missing or _absent(row.abilities)}
    return told | {
        "version": found.version,
        "path": found.executable,
        "origin": found.origin,
        "devices": list(row.devices),
    }


def _absent(abilities: Abilities) -> str:
    """What to say of one that is not here: other machines' need not be installed on this one."""
    return "not running" if abilities.machines else "not installed"


def _cells(row: Row) -> tuple[str, ...]:
    modes, mixed = row.abilities.modes, row.abilities.mixed
    left = [mode for mode in modes if mode not in mixed]
    unequal = "yes" if not left else f"not {_WORDS[left[0]]}" if len(left) == 1 and mixed else "no"
    return (
        row.runtime,
        row.installed.version if row.installed else "-" if row.missing else _absent(row.abilities),
        ", ".join(row.formats),
        ", ".join(_WORDS[mode] for mode in modes) or "no",
        unequal if modes else "-",
    )


def _details(row: Row, rig: Rig, *, cut: bool) -> Iterator[str]:
    if row.installed is not None:
        version = f"version {row.installed.version}, " if cut else ""
        yield f"{version}{row.installed.executable} ({row.installed.origin})"
        if row.devices:
            yield f"its {'nodes' if row.abilities.machines else 'devices'}: {', '.join(row.devices)}"
    elif row.missing:
        yield row.missing
    if row.abilities.note:
        yield row.abilities.note
    here = _here(row, rig)
    if here:
        yield f"here: {here}"
    yield from row.here.why_not
    if row.installed is None:
        yield f"install: {row.install}"


def _here(row: Row, rig: Rig) -> str:
    """`"one card; several by layers or a replica on each"`; empty where its own nodes decide, or it can nothing."""
    gpus = row.here.gpus
    if not gpus:
        on_cpu = row.abilities.cpu or (row.installed is not None and row.installed.cpu_build)
        return "the CPU alone" if on_cpu else ""
    if len(gpus) == 1:
        return f"GPU {gpus[0]}"
    which = "" if len(gpus) == len(rig.gpus) else f" of GPU {indices(gpus)}"
    several = f"; several {_joined([_WAYS[mode] for mode in row.here.modes])}" if row.here.modes else ""
    return f"one card{which}{several}"


def _joined(words: Sequence[str]) -> str:
    return " or ".join([", ".join(words[:-1]), words[-1]]) if len(words) > 1 else "".join(words)


def _rig_words(rig: Rig) -> str:
    """`"rig 3090+3060: GPU 0 RTX 3090, GPU 1 RTX 3060"`, `"this machine: no GPU"`."""
    cards = [f"GPU {gpu.index} {short_name(gpu.name)}" for gpu in rig.gpus]
    name = rig.name if rig.source == "detected" else f"rig {rig.name}"
    return f"{name}: {', '.join(cards) or 'no GPU'}"


def _aligned(row: Sequence[str], widths: Sequence[int]) -> str:
    return _GAP.join(_cut(cell, width).ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()


def _cut(text: str, width: int) -> str:
    return text if len(text) <= width else f"{text[: width - 1]}…"
