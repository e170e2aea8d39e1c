"""What a launch really took, seen from outside: the cards before it and after, its processes' RAM, against the plan."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Final, TypeVar

from msgspec import Struct

from mgpu.detect.host import read_host
from mgpu.detect.live import CardNow, read_now
from mgpu.launch.background import Background
from mgpu.launch.spill import HostSeen, Place, judge
from mgpu.launch.verify import Reported
from mgpu.plan import Plan
from mgpu.rig import Gpu
from mgpu.units import gib

T = TypeVar("T")

_LOOK_S: Final = 10.0  # a driver that takes longer is not waited for
_UNIFIED: Final = "GGML_CUDA_ENABLE_UNIFIED_MEMORY"


class Before(Struct, frozen=True, kw_only=True):
    """The machine just before a runtime starts: its cards, and bytes of RAM that were to be had."""

    cards: tuple[CardNow, ...]
    ram_bytes: int | None


def look_before(gpus: Sequence[Gpu]) -> Before:
    """Never raises, and waits for no driver."""
    return Before(cards=_bounded(lambda: read_now(gpus), ()) if gpus else (), ram_bytes=_ram())


def compare(
    before: Before, plans: Sequence[Plan], gpus: Sequence[Gpu], roots: Sequence[int], environ: Mapping[str, str]
) -> tuple[Place, ...]:
    """Each card of `plans` as it is now. `roots`: the processes that were started, one for each plan."""
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
    after: tuple[CardNow, ...] = _bounded(lambda: read_now(gpus), ())
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


def _bounded(look: Callable[[], T], otherwise: T) -> T:
    """What `look` returns, if it does so in time: a driver that hangs must not keep us from hearing a signal."""

    def once() -> Iterator[T]:
        yield look()

    looking = Background(once(), lambda: None)
    looking.join(_LOOK_S)
    return next(iter(looking.take()), otherwise) if looking.done else otherwise
