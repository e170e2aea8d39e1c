"""What runtimes' logs and metrics have in common: sizes, being out of memory, counters. Bounded, whatever the text."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Final

from mgpu.adapter import Cause
from mgpu.units import GIB, KIB, MIB, gib

#: What the host's memory is called among the devices of a `Cause`.
HOST: Final = "CPU"

_LONGEST_LINE: Final = 4096
_MOST_METRICS: Final = 1 << 20  # characters; vLLM's text for one engine has some 60,000
_LARGEST_COUNT: Final = float(1 << 53)  # whole numbers that a float tells apart

_UNITS: Final = {"": 1, "B": 1, "bytes": 1, "Bytes": 1, "KiB": KIB, "MiB": MIB, "MB": MIB, "GiB": GIB, "GB": GIB}

_LESS: Final = "use a smaller --ctx or --kv-type q8_0, or keep more free with --reserve"
_LESS_RAM: Final = "use a smaller --ctx, end other programs that hold RAM, or take a smaller quantisation of the model"


def clip(line: str) -> str:
    """As much of a line as is looked at: enough to recognise it, whatever somebody makes a runtime print."""
    return line[:_LONGEST_LINE]


def size(number: str | None, unit: str | None) -> int:
    """`"20480.00"`, `"MiB"` as bytes; 0 for what is none. What runtimes call MB is MiB."""
    try:
        return int(float((number or "0")[:24]) * _UNITS[unit or ""])
    except (KeyError, ValueError, OverflowError):
        return 0


def shortage(where: str, devices: tuple[str, ...], wanted: int, hint: str = _LESS) -> Cause:
    """A device had too little memory: `where` in a person's words, `devices` as the runtime calls it."""
    asked = f" (asked for {gib(wanted)})" if wanted else ""
    return Cause(
        text=f"out of memory on {where}{asked}", hint=hint, out_of_memory=True, devices=devices, wanted_bytes=wanted
    )


def shortage_of_ram(wanted: int, hint: str = _LESS_RAM) -> Cause:
    """The host had too little."""
    asked = f" (asked for {gib(wanted)})" if wanted else ""
    return Cause(text=f"out of RAM{asked}", hint=hint, out_of_memory=True, devices=(HOST,), wanted_bytes=wanted)


def counts(text: str, names: frozenset[str]) -> dict[str, float]:
    """Those of `names` that a text of Prometheus has, each summed over its labels (one series for each engine).

    What is no number of 0 or more is not there. Format: prometheus.io/docs/instrumenting/exposition_formats.
    """
    sums: dict[str, float] = {}
    for name, value in _samples(text[:_MOST_METRICS]):
        if name in names and 0 <= value <= _LARGEST_COUNT:
            sums[name] = sums.get(name, 0.0) + value
    return sums


def whole(value: float | None) -> int | None:
    """A count as such."""
    return None if value is None else int(value)


def _samples(text: str) -> Iterator[tuple[str, float]]:
    """(name, value) of every line `name{label="…"} value`; a label's text may hold anything but a line's end."""
    for line in text.split("\n"):
        name, brace, rest = line.partition("{")
        _, closed, after = rest.rpartition("}")
        values = after if brace and closed else "" if brace else line.partition(" ")[2]
        if line.startswith("#") or not values:
            continue
        try:
            value = float(values.split(maxsplit=1)[0][:32])
        except (IndexError, ValueError):
            continue
        if not math.isnan(value):
            yield (name if brace else line.partition(" ")[0]), value
