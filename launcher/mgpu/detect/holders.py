"""Who holds a card's memory: what drivers tell of each process (Linux Documentation/gpu/drm-usage-stats.rst)."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Final

from mgpu.detect.host import process_name
from mgpu.detect.sysfs import list_names, read_text
from mgpu.units import GIB, KIB, MIB, gib

#: PCI address -> pid -> bytes
Held = Mapping[str, Mapping[int, int]]

#: A desktop has some thousands of open files in all. There is no more to learn from a machine with many more.
_MOST_FILES: Final = 50_000

#: Memory of the card itself: amdgpu's "vram", xe's "vram0", i915's "local0".
_MEMORY: Final = re.compile(
    r"^drm-(memory|resident|total)-(?:vram|local)[0-9]*:\s*([0-9]{1,18}) ?([KMG]iB)?$", re.MULTILINE
)
_UNITS: Final = {"": 1, "KiB": KIB, "MiB": MIB, "GiB": GIB}

#: Less is a console or a login screen's, and no reason for anything.
_LEAST: Final = 16 * MIB


def read_holders(root: Path) -> Held:
    """What each process of this user holds of each card; of all users, for root."""
    held: dict[str, dict[int, int]] = {}
    seen: set[tuple[str, str]] = set()
    for pid, info in _open_cards(root):
        address, client = _field(info, "drm-pdev"), _field(info, "drm-client-id")
        if not address or (address, client) in seen:
            continue
        if client:
            seen.add((address, client))  # one client may be open several times
        of_card = held.setdefault(address, {})
        of_card[pid] = of_card.get(pid, 0) + _bytes(info)
    return held


def name_holders(held: Mapping[int, int], root: Path) -> tuple[str, ...]:
    """`"4242 python (3.1 GiB)"` for each, most first."""
    ranked = sorted(held.items(), key=lambda item: (-item[1], item[0]))
    return tuple(f"{pid} {process_name(pid, root) or '?'} ({gib(size)})" for pid, size in ranked if size >= _LEAST)


def _open_cards(root: Path) -> Iterator[tuple[int, str]]:
    """(pid, the kernel's description) of every open file of a graphics card."""
    files = 0
    for pid in list_names(root / "proc"):
        if not pid.isdecimal():
            continue
        for number in list_names(root / "proc" / pid / "fd"):  # another user's cannot be listed
            files += 1
            if files > _MOST_FILES:
                return
            if _leads_to(root / "proc" / pid / "fd" / number).startswith("/dev/dri/"):
                yield int(pid), read_text(root / "proc" / pid / "fdinfo" / number)


def _leads_to(link: Path) -> str:
    try:
        return os.readlink(link)  # noqa: PTH115 - its text alone: what it leads to need not be a file
    except (OSError, ValueError):
        return ""


def _field(info: str, key: str) -> str:
    match = re.search(rf"^{key}:\s*(\S+)$", info, re.MULTILINE)
    return match[1] if match else ""


def _bytes(info: str) -> int:
    """What the process has there now; what it asked for, where the driver tells no more."""
    sums: dict[str, int] = {}
    for kind, number, unit in _MEMORY.findall(info):
        sums[kind] = sums.get(kind, 0) + int(number) * _UNITS[unit]
    return next((sums[kind] for kind in ("memory", "resident", "total") if kind in sums), 0)
