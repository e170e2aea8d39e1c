"""Intel GPUs, as the kernel's xe and i915 drivers describe them in /sys."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final

from mgpu.detect.holders import Held, name_holders
from mgpu.detect.host import read_memory
from mgpu.detect.pci_names import intel_name
from mgpu.detect.sysfs import (
    INTEL,
    DrmCard,
    SysfsProbe,
    bridges,
    list_names,
    numa_node,
    order,
    read_number,
    slot_finding,
    slowest_link,
    widest_link,
)
from mgpu.rig import Finding, Gpu, Pcie
from mgpu.units import GIB
from mgpu_profiles.gpus import GpuSpec, find_spec

#: The graphics of the processor are always there (device 2 on bus 0), and cards never are.
_PROCESSOR: Final = (0, 0, 2, 0)


def probe_intel(cards: tuple[DrmCard, ...], first: int, *, held: Callable[[], Held], root: Path) -> SysfsProbe:
    """The Intel GPUs among `cards`, numbered from `first`. `held` tells who holds their memory: no file says how much
    is free, and what other users' programs hold is not seen."""
    gpus: list[Gpu] = []
    findings: list[Finding] = []
    for card in cards:
        if card.vendor != INTEL:
            continue
        index = first + len(gpus)
        if order(card.address) == _PROCESSOR:
            gpus.append(_integrated(index, card, root))
            continue
        name = intel_name(card)
        total, spec = _memory(card, name)
        if not total:
            findings.append(_no_memory(card, name))
            continue
        gpu = _read(index, card, spec, total, held().get(card.address, {}), root)
        found = slot_finding(index, name, gpu.pcie, _own_link(card))
        findings += [found] if found else []
        gpus.append(gpu)
    return SysfsProbe(gpus=tuple(gpus), findings=tuple(findings))


def _integrated(index: int, card: DrmCard, root: Path) -> Gpu:
    """It has no memory of its own. Mesa lends it three quarters of the RAM, half of 4 GiB and less (anv_device.c)."""
    memory = read_memory(root)
    total = memory.total_bytes * 3 // 4 if memory.total_bytes > 4 * GIB else memory.total_bytes // 2
    return Gpu(
        index=index,
        name=intel_name(card),
        vendor="intel",
        total_bytes=total,
        free_bytes=min(total, memory.available_bytes),
        display=card.display,
        unified=True,
        integrated=True,
        pci_bus_id=card.address,
    )


def _read(index: int, card: DrmCard, spec: GpuSpec | None, total: int, sizes: Mapping[int, int], root: Path) -> Gpu:
    return Gpu(
        index=index,
        name=intel_name(card),
        vendor="intel",
        total_bytes=total,
        free_bytes=max(total - sum(sizes.values()), 0),
        bandwidth_bytes_per_s=spec.bandwidth_bytes_per_s if spec else None,
        pcie=_slot(card),
        display=card.display,
        numa_node=numa_node(card.device),
        pci_bus_id=card.address,
        power_limit_watts=spec.tdp_watts if spec else None,
        processes=name_holders(sizes, root),
    )


def _memory(card: DrmCard, name: str) -> tuple[int, GpuSpec | None]:
    """(bytes, the card's specification). xe tells each tile's memory; i915 may tell none: then the name does."""
    tiles = [card.device / tile for tile in list_names(card.device) if tile.startswith("tile")]
    nodes = [card.device / "drm" / node for node in list_names(card.device / "drm") if node.startswith("card")]
    told = sum(read_number(tile / "physical_vram_size_bytes") or 0 for tile in tiles)
    told = told or max((read_number(node / "lmem_total_bytes") or 0 for node in nodes), default=0)
    spec = find_spec(name, told or None)
    return told or (spec.vram_bytes if spec else 0) or 0, spec


def _slot(card: DrmCard) -> Pcie | None:
    return slowest_link(_outside(card))


def _own_link(card: DrmCard) -> Pcie | None:
    return widest_link(_outside(card)[0])


def _outside(card: DrmCard) -> tuple[Path, ...]:
    """From the port in the slot upwards. Arc cards have a switch of their own, behind which the chip itself, and the
    port above it, claim a link of 2.5 GT/s x1 that is none."""
    above = bridges(card.device)
    return above[1:] if len(above) > 1 else (card.device, *above)


def _no_memory(card: DrmCard, name: str) -> Finding:
    return Finding(
        text=f"{name} at {card.address}: its driver does not tell its memory",
        hint="the xe driver does (Linux 6.8 and newer): see lspci -k",
    )
