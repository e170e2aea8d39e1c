"""What a launch really took, seen from outside: the cards before it and after, its processes' RAM, against the plan."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping, Sequence
from typing import Final

from msgspec import Struct

from mgpu.detect.host import read_host
from mgpu.detect.live import CardNow
from mgpu.launch.spill import HostSeen, Place, judge
from mgpu.launch.verify import Reported
from mgpu.plan import Plan
from mgpu.rig import Gpu
from mgpu.units import gib

_UNIFIED: Final = "GGML_CUDA_ENABLE_UNIFIED_MEMORY"


class Before(Struct, frozen=True, kw_only=True):
    """The machine just before a runtime starts: its cards, and bytes of RAM that were to be had."""

    cards: tuple[CardNow, ...]
    ram_bytes: int | None


def look_before(cards: tuple[CardNow, ...]) -> Before:
    """`cards`: as they are now, as far as they could be seen."""
    return Before(cards=cards, ram_bytes=_ram())


def compare(
    before: Before,
    after: tuple[CardNow, ...],
    plans: Sequence[Plan],
    gpus: Sequence[Gpu],
    roots: Sequence[int],
    environ: Mapping[str, str],
) -> tuple[Place, ...]:
    """Each card of `plans`. `after`: as they are now. `roots`: the processes that were started, one for each plan."""
    if not gpus:
        return ()
    from mgpu.launch.tree import family, host_bytes  # psutil: imported by then

    sizes = [size for root in roots if (size := host_bytes(root)) is not None]
    ram = _ram()
    host = HostSeen(
        private_bytes=sum(sizes) if sizes else None,
        taken_bytes=None if ram is None or before.ram_bytes is None else before.ram_bytes - ram,
        unified=_UNIFIED in environ,
        wsl="microsoft" in os.uname().release.lower(),
    )
    pids = {pid for root in roots for pid in family(root)}
    return judge(plans, gpus, before=before.cards, after=after, host=host, pids=pids)


def held_lines(places: Collection[Place], reported: Mapping[int, Reported]) -> tuple[str, ...]:
    """What is said of it: what the cards hold, by the driver or else by the runtime, and what should not be so."""
    words: list[str] = []
    for place in places:
        told = reported.get(place.gpu)
        if place.held_bytes is not None:
            words.append(f"{gib(place.held_bytes)} of GPU {place.gpu} ({gib(place.planned_bytes)} planned)")
        elif told is not None:
            words.append(f"{gib(told.n_bytes)} of GPU {place.gpu} ({gib(told.planned)} planned, less the driver's)")
    lines = [f"  holds {', '.join(words)}"] if words else []
    for place in places:
        if place.warning:
            lines += [f"  warning: {place.warning}", f"           {place.hint}"]
    return tuple(lines)


def _ram() -> int | None:
    return read_host().memory.available_bytes or None
