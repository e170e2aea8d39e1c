"""AMD GPUs, as the kernel's amdgpu driver describes them in /sys: no root, no ROCm."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final

from msgspec import Struct
from msgspec.structs import replace

from mgpu.detect.holders import Held, name_holders
from mgpu.detect.host import read_memory
from mgpu.detect.kfd import KfdNode, kfd_holders, kfd_links, kfd_nodes
from mgpu.detect.pci_names import amd_name
from mgpu.detect.sysfs import (
    AMD,
    DrmCard,
    SysfsProbe,
    bridges,
    list_names,
    numa_node,
    read_number,
    read_text,
    slot_finding,
    slowest_link,
    widest_link,
)
from mgpu.rig import Finding, Gpu, Link, LinkKind, Pcie
from mgpu.units import MIB
from mgpu_profiles.gpus import GpuSpec, find_spec

#: Integrated GPUs by name: "Radeon 780M", "Radeon Vega 8 Graphics", "Radeon R7 Graphics"; never "RX 6700M".
_INTEGRATED: Final = re.compile(
    r"Radeon (?:\d{3}M|80\d0S|Vega \d+|(?:RX Vega \d+ |R\d\w? )?Graphics)\b|Custom GPU", re.IGNORECASE
)

#: Ryzen AI Max (Strix Halo), under whichever name it is sold: its memory bus is that of a graphics card.
_STRIX_HALO: Final = "gfx1151"

#: A card that holds less than this has nobody on it who could be in the way.
_NOBODY: Final = 256 * MIB


class _Memory(Struct, frozen=True, kw_only=True):
    """In bytes. `gtt` is RAM that the GPU may borrow."""

    vram: int
    vram_used: int
    gtt: int
    gtt_used: int


def probe_amd(cards: tuple[DrmCard, ...], first: int, *, held: Callable[[], Held], root: Path) -> SysfsProbe:
    """The AMD GPUs among `cards`, numbered from `first`. `held` asks who holds memory: only where some is in use."""
    nodes = {node.render: node for node in kfd_nodes(root)}
    gpus: list[Gpu] = []
    findings: list[Finding] = []
    indices: dict[int, int] = {}  # KFD's number -> ours
    for card in cards:
        memory = _memory(card.device) if card.vendor == AMD else None
        if memory is None:
            findings += [_no_memory(card, root)] if card.vendor == AMD else []
            continue
        node = nodes.get(card.render)
        gpu = _read(first + len(gpus), card, node, memory, root)
        if node is not None:
            indices[node.number] = gpu.index
        if memory.vram_used > _NOBODY:
            gpu = replace(gpu, processes=_holders(card, node, held(), root))
        found = slot_finding(gpu.index, gpu.name, gpu.pcie, _own_link(card))
        findings += [found] if found else []
        gpus.append(gpu)
    known = tuple(node for node in nodes.values() if node.number in indices)
    links = tuple(_link(indices[link.nodes[0]], indices[link.nodes[1]], link.kind) for link in kfd_links(known, root))
    return SysfsProbe(gpus=tuple(gpus), links=links, findings=tuple(findings))


class AmdNow(Struct, frozen=True, kw_only=True):
    """What is in use of a GPU's own memory, or where it has none, of what it may borrow; and of RAM beside it."""

    used_bytes: int
    free_bytes: int
    gtt_used_bytes: int
    by_pid: Mapping[int, int]


def memory_now(gpu: Gpu, *, held: Callable[[], Held], root: Path) -> AmdNow | None:
    """Of a GPU that a rig has; None where it is not there, or its driver does not tell."""
    device = root / "sys/bus/pci/devices" / (gpu.pci_bus_id or "none")
    memory = _memory(device)
    if memory is None:
        return None
    total, free = _borrowed(memory, root) if gpu.unified else (memory.vram, memory.vram - memory.vram_used)
    by_pid: dict[int, int] = {}
    if memory.vram_used + memory.gtt_used > _NOBODY:
        names = list_names(device / "drm")
        node = next((node for node in kfd_nodes(root) if node.render in names), None)
        by_pid = _sizes(device.name, node, held(), root)
    return AmdNow(used_bytes=total - free, free_bytes=max(free, 0), gtt_used_bytes=memory.gtt_used, by_pid=by_pid)


def _link(a: int, b: int, kind: LinkKind) -> Link:
    return Link(gpus=(min(a, b), max(a, b)), kind=kind, n_links=1 if kind == "nvlink" else 0)


def _holders(card: DrmCard, node: KfdNode | None, held: Held, root: Path) -> tuple[str, ...]:
    return name_holders(_sizes(card.address, node, held, root), root)


def _sizes(address: str, node: KfdNode | None, held: Held, root: Path) -> dict[int, int]:
    """ROCm's processes of all users, and this user's others: one process may be told by both, of the same memory."""
    sizes = dict(held.get(address, {}))
    for pid, size in kfd_holders(node, root) if node else ():
        sizes[pid] = max(sizes.get(pid, 0), size)
    return sizes


def _read(index: int, card: DrmCard, node: KfdNode | None, memory: _Memory, root: Path) -> Gpu:
    target = node.target if node else ""
    name = amd_name(card, root)
    spec = find_spec(name, memory.vram) or (find_spec("Strix Halo") if target == _STRIX_HALO else None)
    shared = _is_part_of_the_processor(card, name, spec)
    if shared and name.endswith("]"):
        name = f"AMD Radeon Graphics [{card.pci_id}]"  # as AMD calls them
    # A carve-out larger than what may be borrowed is the GPU's own memory: the system does not count it as RAM.
    unified = shared and memory.vram <= memory.gtt
    total, free = _borrowed(memory, root) if unified else (memory.vram, memory.vram - memory.vram_used)
    unique = read_text(card.device / "unique_id")
    return Gpu(
        index=index,
        name=name,
        vendor="amd",
        total_bytes=total,
        free_bytes=max(min(free, total), 0),
        uuid=f"GPU-{unique}" if re.fullmatch(r"[0-9a-f]{16}", unique) and unique.strip("0") else None,
        bandwidth_bytes_per_s=_bandwidth(spec, memory.vram),
        pcie=None if shared else _slot(card),
        compute_capability=target or (spec.compute_capability if spec else None),
        display=card.display,
        unified=unified,
        integrated=shared and spec is None,
        numa_node=numa_node(card.device),
        pci_bus_id=card.address,
        power_limit_watts=_power(card.device) or None,
    )


def _memory(device: Path) -> _Memory | None:
    vram = read_number(device / "mem_info_vram_total")
    if not vram:
        return None
    return _Memory(
        vram=vram,
        vram_used=read_number(device / "mem_info_vram_used") or 0,
        gtt=read_number(device / "mem_info_gtt_total") or 0,
        gtt_used=read_number(device / "mem_info_gtt_used") or 0,
    )


def _borrowed(memory: _Memory, root: Path) -> tuple[int, int]:
    """(total, free) of a GPU that lives in the host's RAM: its carve-out and what it may borrow, as far as there is."""
    lendable = min(memory.gtt - memory.gtt_used, read_memory(root).available_bytes)
    return memory.vram + memory.gtt, memory.vram - memory.vram_used + max(lendable, 0)


def _is_part_of_the_processor(card: DrmCard, name: str, spec: GpuSpec | None) -> bool:
    """The driver says it since Linux 6.9: `board_info` is there for cards alone. Before, names and memory tell."""
    if (card.device / "board_info").exists():
        return False
    if spec is not None:
        return spec.unified
    if _INTEGRATED.search(name):
        return True
    maker = read_text(card.device / "mem_info_vram_vendor")
    return maker in {"", "unknown"} and not read_text(card.device / "unique_id").strip("0")


def _bandwidth(spec: GpuSpec | None, vram: int) -> int | None:
    """Half of a double card (MI250X), or a partition, has its share of the whole card's figure."""
    if spec is None or spec.bandwidth_bytes_per_s is None:
        return None
    whole = spec.vram_bytes
    part = whole is not None and vram * 5 < whole * 3
    return spec.bandwidth_bytes_per_s * vram // whole if part and whole else spec.bandwidth_bytes_per_s


def _slot(card: DrmCard) -> Pcie | None:
    return slowest_link((card.device, *bridges(card.device)))


def _own_link(card: DrmCard) -> Pcie | None:
    """Newer cards sit behind two bridges of their own; the upper one is what is in the slot."""
    own = [bridge for bridge in bridges(card.device) if read_number(bridge / "vendor") == AMD]
    return widest_link(own[-1] if own else card.device)


def _power(device: Path) -> int:
    """Watts; sysfs has microwatts."""
    folder = device / "hwmon"
    caps = (read_number(folder / name / "power1_cap") for name in list_names(folder))
    return next((cap for cap in caps if cap), 0) // 1_000_000


def _no_memory(card: DrmCard, root: Path) -> Finding:
    return Finding(
        text=f"{amd_name(card, root)} at {card.address}: its driver does not tell its memory",
        hint="models need the amdgpu driver, not radeon: see lspci -k",
    )
