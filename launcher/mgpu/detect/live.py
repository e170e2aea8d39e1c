"""What cards hold right now: asked again and again while a model is served, so nothing is kept between two calls."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Final

from msgspec import Struct

from mgpu.detect.nvml import (
    DRIVER_NOT_LOADED,
    GPU_IS_LOST,
    GPU_NOT_FOUND,
    NOT_FOUND,
    RESET_REQUIRED,
    UNKNOWN,
    NoAnswerError,
    Nvml,
)
from mgpu.detect.sysfs import ROOT
from mgpu.rig import Finding, Gpu, short_name

#: What a driver that works says of a card that does not.
_LOST: Final = frozenset({NOT_FOUND, GPU_IS_LOST, RESET_REQUIRED, GPU_NOT_FOUND, UNKNOWN})


class CardNow(Struct, frozen=True, kw_only=True):
    """One card (`index` of the rig's). None: its driver does not tell. `by_pid`: bytes of those processes it tells of.

    `gtt_used_bytes`: host RAM that AMD's driver lends it. `lost`: it has gone, and whatever ran on it with it.
    `blind`: the driver's library does not answer: after an upgrade without a reboot, or in a container that lost its
    devices. What runs already may run on.
    """

    index: int
    free_bytes: int | None = None
    used_bytes: int | None = None
    by_pid: Mapping[int, int] = {}
    gtt_used_bytes: int | None = None
    lost: Finding | None = None
    blind: Finding | None = None


def read_now(gpus: Sequence[Gpu], root: Path = ROOT) -> tuple[CardNow, ...]:
    """One for each card given, in their order. Never raises for driver trouble. `root`: where /sys and /proc are."""
    nvidia = _read_nvidia([gpu for gpu in gpus if gpu.vendor == "nvidia"], root)
    amd = _read_amd([gpu for gpu in gpus if gpu.vendor == "amd"], root)
    found = {card.index: card for card in (*nvidia, *amd)}
    return tuple(found.get(gpu.index, CardNow(index=gpu.index)) for gpu in gpus)


def _read_nvidia(gpus: Sequence[Gpu], root: Path) -> tuple[CardNow, ...]:
    if not gpus:
        return ()
    from mgpu.detect.nvidia import open_nvml

    library = open_nvml()
    if library is None:
        return ()
    try:
        with library as nvml:
            return tuple(_read_card(nvml, gpu, root) for gpu in gpus)
    except NoAnswerError as error:
        said = error.finding("NVIDIA")
        if error.code == DRIVER_NOT_LOADED:  # no module without a driver in use: nothing runs there
            return tuple(CardNow(index=gpu.index, lost=said) for gpu in gpus)
        return tuple(CardNow(index=gpu.index, blind=said) for gpu in gpus)


def _read_card(nvml: Nvml, gpu: Gpu, root: Path) -> CardNow:
    from mgpu.detect.nvidia import memory_now

    try:
        used, free, by_pid = memory_now(nvml, gpu, root)
    except NoAnswerError as error:
        said = error.finding(_subject(gpu))
        if error.code in _LOST:
            return CardNow(index=gpu.index, lost=said)
        return CardNow(index=gpu.index, blind=said)
    return CardNow(index=gpu.index, free_bytes=free, used_bytes=used, by_pid=by_pid)


def _read_amd(gpus: Sequence[Gpu], root: Path) -> tuple[CardNow, ...]:
    if not gpus:
        return ()
    from mgpu.detect.amd import memory_now
    from mgpu.detect.holders import read_holders

    held = cache(lambda: read_holders(root))  # at most once for all cards of this call
    cards: list[CardNow] = []
    for gpu in gpus:
        now = memory_now(gpu, held=held, root=root)
        if now is not None:
            cards.append(
                CardNow(
                    index=gpu.index,
                    free_bytes=now.free_bytes,
                    used_bytes=now.used_bytes,
                    by_pid=now.by_pid,
                    gtt_used_bytes=now.gtt_used_bytes,
                )
            )
        elif gpu.pci_bus_id and not (root / "sys/bus/pci/devices" / gpu.pci_bus_id).exists():
            cards.append(CardNow(index=gpu.index, lost=_gone(gpu)))
    return tuple(cards)


def _gone(gpu: Gpu) -> Finding:
    return Finding(
        text=f"{_subject(gpu)}: it is not on the bus any more",
        hint="reboot; if it happens again, check the riser and the power supply",
    )


def _subject(gpu: Gpu) -> str:
    return f"GPU {gpu.index} ({short_name(gpu.name)})"
