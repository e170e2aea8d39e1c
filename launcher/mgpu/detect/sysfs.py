"""Linux's /sys as it is: small texts, graphics cards with a driver, and the PCIe links that lead to them.

Nothing here raises for what it finds, or does not find: a missing, forbidden or senseless file is no answer.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from msgspec import Struct
from msgspec.structs import replace

from mgpu.rig import Finding, Gpu, Link, Pcie, short_name

ROOT: Final = Path("/")

#: Files of /sys and of /proc/PID are small; whatever is larger is not read further.
_MOST: Final = 4096

_NUMBER: Final = re.compile(r"[0-9]{1,20}|0x[0-9a-fA-F]{1,16}")
_ADDRESS: Final = re.compile(r"([0-9a-fA-F]{4,8}):([0-9a-fA-F]{2}):([0-9a-fA-F]{2})\.([0-7])")
_CARD: Final = re.compile(r"card[0-9]{1,4}")

#: GT/s of a link, by PCIe generation.
_GENERATIONS: Final = {"2.5": 1, "5": 2, "5.0": 2, "8": 3, "8.0": 3, "16": 4, "16.0": 4, "32": 5, "32.0": 5, "64.0": 6}
_WIDTHS: Final = frozenset({1, 2, 4, 8, 12, 16, 32})

AMD: Final = 0x1002
INTEL: Final = 0x8086
NVIDIA: Final = 0x10DE


def read_text(path: Path, most: int = _MOST) -> str:
    """The file without white space around it; empty where there is none to read."""
    try:
        file = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # never waits, whatever stands there
    except (OSError, ValueError):
        return ""
    try:
        return os.read(file, most).decode("utf-8", "replace").strip("\0 \t\r\n")
    except OSError:
        return ""
    finally:
        os.close(file)


def read_number(path: Path) -> int | None:
    """A whole number, decimal or with 0x; None for anything else."""
    text = read_text(path)
    return int(text, 16 if text.startswith("0x") else 10) if _NUMBER.fullmatch(text) else None


def list_names(directory: Path) -> tuple[str, ...]:
    """What is in a directory, sorted; nothing where it cannot be read."""
    try:
        return tuple(sorted(os.listdir(directory)))  # noqa: PTH208 - names alone, without a Path for each
    except (OSError, ValueError):
        return ()


class DrmCard(Struct, frozen=True, kw_only=True):
    """A graphics card with a kernel driver. `device` is its PCI device's own directory, all links followed."""

    device: Path
    address: str  # "0000:03:00.0"
    vendor: int
    product: int
    revision: int
    driver: str  # "amdgpu"
    display: bool  # a screen is connected to it
    render: str  # "renderD128", the file in /dev/dri through which programs compute on it; empty: none

    @property
    def pci_id(self) -> str:
        """`"1002:744c"`."""
        return f"{self.vendor:04x}:{self.product:04x}"


class SysfsProbe(Struct, frozen=True, kw_only=True):
    """What /sys says of one vendor's GPUs. `links` name pairs of `Gpu.index`."""

    gpus: tuple[Gpu, ...] = ()
    links: tuple[Link, ...] = ()
    findings: tuple[Finding, ...] = ()
    driver: str = ""
    has_cards: bool = False  # beside the processor's own graphics; also cards that the caller hides


def drm_cards(root: Path) -> tuple[DrmCard, ...]:
    """The PCI graphics cards that have a driver, in PCI order."""
    folder = root / "sys/class/drm"
    names = list_names(folder)
    cards: dict[str, DrmCard] = {}
    for name in names:
        if not _CARD.fullmatch(name):
            continue
        device = Path(os.path.realpath(folder / name / "device"))
        vendor, product = read_number(device / "vendor"), read_number(device / "device")
        if vendor is None or product is None or not _ADDRESS.fullmatch(device.name):
            continue  # not on the PCI bus: a Raspberry Pi's, a part of another card
        cards[device.name] = DrmCard(
            device=device,
            address=device.name,
            vendor=vendor,
            product=product,
            revision=read_number(device / "revision") or 0,
            driver=driver_of(device),
            display=any(
                other.startswith(f"{name}-") and read_text(folder / other / "status") == "connected" for other in names
            ),
            render=next((node for node in list_names(device / "drm") if node.startswith("renderD")), ""),
        )
    return tuple(cards[address] for address in sorted(cards, key=order))


def lock_out(
    gpus: tuple[Gpu, ...], cards: tuple[DrmCard, ...], root: Path
) -> tuple[tuple[Gpu, ...], tuple[Finding, ...]]:
    """The GPUs, those disabled that this user may not compute on, and why."""
    nodes = {card.address: root / "dev/dri" / card.render for card in cards if card.render}
    locked = {
        gpu.index: nodes[gpu.pci_bus_id]
        for gpu in gpus
        if gpu.pci_bus_id in nodes and not os.access(nodes[gpu.pci_bus_id], os.R_OK | os.W_OK)
    }
    findings = tuple(_locked(gpu, locked[gpu.index]) for gpu in gpus if gpu.index in locked and not gpu.integrated)
    return tuple(replace(gpu, enabled=False) if gpu.index in locked else gpu for gpu in gpus), findings


def _locked(gpu: Gpu, node: Path) -> Finding:
    subject = f"GPU {gpu.index} ({short_name(gpu.name)})"
    if not node.exists():
        text = f"{subject} cannot be used here: there is no /dev/dri/{node.name}"
        return Finding(text=text, hint="start the container with --device /dev/dri (and /dev/kfd for ROCm)")
    text = f"{subject}: no permission to use /dev/dri/{node.name}"
    return Finding(text=text, hint="sudo usermod -aG render,video $USER, then log in again")


def driver_of(device: Path) -> str:
    """The name of the kernel driver a PCI device is bound to; empty for none."""
    link = device / "driver"
    return Path(os.path.realpath(link)).name if link.exists() else ""


def order(address: str) -> tuple[int, ...]:
    """A PCI address as numbers that sort in bus order; () for what is none."""
    match = _ADDRESS.fullmatch(address)
    return tuple(int(part, 16) for part in match.groups()) if match else ()


def plain_address(address: str) -> str:
    """NVML's `"00000000:0A:00.0"` as /sys writes it: `"0000:0a:00.0"`; empty for what is no address."""
    numbers = order(address)
    return "{:04x}:{:02x}:{:02x}.{}".format(*numbers) if numbers else ""


def numa_node(device: Path) -> int | None:
    """The processor (socket) a PCI device belongs to; None where the system does not say, as on most desktops."""
    return read_number(device / "numa_node")  # -1, "not known", is no number here


def bridges(device: Path) -> tuple[Path, ...]:
    """The PCI bridges above a device, nearest first."""
    return tuple(_bridges(device))


def _bridges(device: Path) -> Iterator[Path]:
    for parent in device.parents:
        if not _ADDRESS.fullmatch(parent.name):
            return
        yield parent


def slowest_link(chain: tuple[Path, ...]) -> Pcie | None:
    """What the links of these devices can do together. An idle link lowers its speed, but never its width."""
    gens = [gen for device in chain if (gen := _generation(device))]
    widths = [width for device in chain if (width := read_number(device / "current_link_width")) in _WIDTHS]
    return Pcie(gen=min(gens), width=min(filter(None, widths))) if gens and widths else None


def widest_link(device: Path) -> Pcie | None:
    """What one device could do in the best of slots."""
    gen, width = _generation(device), read_number(device / "max_link_width")
    return Pcie(gen=gen, width=width) if gen and width in _WIDTHS and width else None


def _generation(device: Path) -> int | None:
    """From `"16.0 GT/s PCIe"`; older kernels leave the last word out, or the `.0`."""
    return _GENERATIONS.get(read_text(device / "max_link_speed").partition(" ")[0])


def slot_finding(index: int, name: str, slot: Pcie | None, card: Pcie | None) -> Finding | None:
    """What a person should know of a slot with less than half of what its card could use."""
    if slot is None or card is None or 2 * _rate(slot) >= _rate(card):
        return None
    return Finding(
        text=f"GPU {index} ({short_name(name)}) runs at PCIe {slot}; the card can do {card}",
        hint="loading, and a split over this card, are slower; see the slot, the riser and the lanes in the firmware",
    )


def _rate(link: Pcie) -> int:
    return link.width << link.gen  # each generation has twice the rate of the one before
