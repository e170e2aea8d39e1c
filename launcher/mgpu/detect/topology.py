"""The way over PCIe between two cards, in `nvidia-smi topo`'s words, from where they hang in /sys/devices."""

from __future__ import annotations

import itertools
import os
import re
from pathlib import Path
from typing import Final

from msgspec.structs import replace

from mgpu.detect.sysfs import AMD, INTEL, numa_node, order, plain_address, read_number
from mgpu.rig import Gpu, Link

_HOST_BRIDGE: Final = re.compile(r"pci[0-9a-f]{4,8}:[0-9a-f]{2}")

#: Arc cards bring a PCIe switch of their own: its ports, by PCI id (A series, B series).
_INTEL_PORTS: Final = frozenset({0x4FA0, 0x4FA1, 0x4FA4, 0xE2F0, 0xE2F1, 0xE2FF})


def join(gpus: tuple[Gpu, ...], links: tuple[Link, ...], root: Path) -> tuple[Link, ...]:
    """`links`, and a plain one for every other two cards whose way is known; a way that is missing is filled in.

    Integrated GPUs have no way of their own, and two instances of one card are none to each other.
    """
    known = {link.gpus: link for link in links}
    places = {gpu.index: _place(gpu, root) for gpu in gpus if not gpu.integrated}
    for pair in itertools.combinations(sorted(places), 2):
        a, b = (places[index] for index in pair)
        link = known.get(pair)
        if (link is not None and link.path) or not a or not b or a == b:
            continue
        known[pair] = replace(link, path=way(a, b)) if link else Link(gpus=pair, kind="pcie", path=way(a, b))
    return tuple(known[pair] for pair in sorted(known))


def way(a: Path, b: Path) -> str:
    """PIX (one switch), PXB (several), PHB (through the processor), NODE (between its host bridges) or SYS (between
    processors). `a` and `b` are the cards' own directories."""
    here, there = _chain(a), _chain(b)
    common = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(here, there, strict=False)))
    if common == 0:
        nodes = {numa_node(a), numa_node(b)}
        return "NODE" if len(nodes) == 1 else "SYS"
    if common == 1:
        return "PHB"
    ports = max(sum(not _is_on_card(part) for part in chain[common:-1]) for chain in (here, there))
    return "PIX" if ports <= 1 else "PXB"


def _place(gpu: Gpu, root: Path) -> Path | None:
    address = plain_address(gpu.pci_bus_id or "")
    directory = root / "sys/bus/pci/devices" / address
    return Path(os.path.realpath(directory)) if address and directory.exists() else None


def _chain(device: Path) -> tuple[Path, ...]:
    """From the host bridge down to the device itself."""
    above = itertools.takewhile(lambda path: order(path.name) or _HOST_BRIDGE.fullmatch(path.name), device.parents)
    return (*reversed(tuple(above)), device)


def _is_on_card(bridge: Path) -> bool:
    """AMD's and Intel's cards sit behind bridges of their own; AMD's and Intel's boards use other ids."""
    vendor = read_number(bridge / "vendor")
    return vendor == AMD or (vendor == INTEL and read_number(bridge / "device") in _INTEL_PORTS)
