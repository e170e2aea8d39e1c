"""Sizes. Bytes are `int` everywhere; this module parses what people type and prints what they read."""

from __future__ import annotations

import re
from typing import Final

from mgpu.errors import UsageError

KIB: Final = 1 << 10
MIB: Final = 1 << 20
GIB: Final = 1 << 30
GB: Final = 10**9

_FACTORS: Final = {
    "": MIB,  # a bare number is MiB, as in every runtime's own flags
    "B": 1,
    "K": KIB, "KIB": KIB, "KB": 10**3,
    "M": MIB, "MIB": MIB, "MB": 10**6,
    "G": GIB, "GIB": GIB, "GB": GB,
    "T": 1 << 40, "TIB": 1 << 40, "TB": 10**12,
}  # fmt: skip
_SIZE: Final = re.compile(r"([0-9]{1,15}(?:\.[0-9]{1,9})?)\s*([KMGT](?:i?B)?|B?)", re.IGNORECASE)


def parse_size(text: str) -> int:
    """`"2G"`, `"1.5 GiB"`, `"800MB"`, `"512"` (MiB) as bytes. Raises `UsageError`."""
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise UsageError(f"not a size: {text!r}", hint="write it like 2G, 1.5GiB, 800MB or 512 (MiB)")
    return int(float(match[1]) * _FACTORS[match[2].upper()])


def gib(size: int) -> str:
    """Bytes as GiB with one decimal: `"22.9 GiB"`; below 1 GiB as whole MiB."""
    return f"{size / GIB:.1f} GiB" if abs(size) >= GIB else f"{size / MIB:.0f} MiB"


def gib_of(size: int, total: int) -> str:
    """`"4.7 of 23.5 GiB"`: one unit for both, so that they can be compared at a glance."""
    if total >= GIB:
        return f"{size / GIB:.1f} of {total / GIB:.1f} GiB"
    return f"{size / MIB:.0f} of {total / MIB:.0f} MiB"
