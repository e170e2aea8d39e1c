"""The cards, their drivers and their device files."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Final

from mgpu.detect.machine import detect_rig
from mgpu.detect.nvidia import open_nvml
from mgpu.detect.nvidia_state import NvidiaState, read_state
from mgpu.detect.nvml import NoAnswerError
from mgpu.detect.sysfs import AMD, INTEL, NVIDIA, driver_of, list_names, order, read_number, read_text
from mgpu.doctor.facts import CardFacts, Graphics, Node
from mgpu.rig import Rig, Vendor

_DISPLAY: Final = 0x03  # the upper byte of a PCI class
_VENDORS: Final[dict[int, Vendor]] = {NVIDIA: "nvidia", AMD: "amd", INTEL: "intel"}

#: "NVRM version: NVIDIA UNIX x86_64 Kernel Module  580.95.05  …", "… Open Kernel Module for x86_64  580.95.05  …"
_MODULE: Final = re.compile(r"^NVRM version:.*?\s([0-9]{3}\.[0-9.]+)\s", re.MULTILINE)

#: Where distributions and NVIDIA's installer keep the library, and its version in the file's name.
_LIBRARY_FOLDERS: Final = ("usr/lib/x86_64-linux-gnu", "usr/lib/aarch64-linux-gnu", "usr/lib64", "usr/lib")
_LIBRARY: Final = re.compile(r"libnvidia-ml\.so\.([0-9]{3}\.[0-9.]+)")


def look_at_cards(environ: Mapping[str, str], root: Path) -> CardFacts:
    """What drivers and the PCI bus say. It may take seconds where a driver sleeps until it is asked."""
    rig = detect_rig(environ, root=root)
    graphics = tuple(_graphics(root))
    return CardFacts(
        rig=rig,
        nvidia=_nvidia(),
        graphics=graphics,
        nodes=tuple(_nodes(rig, graphics, root)),
        module=_module(root),
        libraries=tuple(_libraries(root)),
        nouveau=(root / "sys/module/nouveau").exists(),
    )


def _nvidia() -> NvidiaState | None:
    nvml = open_nvml()
    if nvml is None:
        return None
    with suppress(NoAnswerError), nvml:  # why there is no answer, the rig's own findings say
        return read_state(nvml)
    return None


def _graphics(root: Path) -> Iterator[Graphics]:
    """Cards of these makers, but for the processor's own graphics as Intel's are."""
    folder = root / "sys/bus/pci/devices"
    for address in sorted(list_names(folder), key=order):
        device = folder / address
        vendor = _VENDORS.get(read_number(device / "vendor") or 0)
        if vendor is None or (read_number(device / "class") or 0) >> 16 != _DISPLAY or order(address)[1:3] == (0, 2):
            continue
        yield Graphics(
            address=address,
            vendor=vendor,
            driver=driver_of(device),
            translated=read_text(device / "iommu_group/type").startswith("DMA"),
            vram=read_number(device / "mem_info_vram_total"),
            visible=read_number(device / "mem_info_vis_vram_total"),
        )


def _nodes(rig: Rig, graphics: tuple[Graphics, ...], root: Path) -> Iterator[Node]:
    """The files that CUDA and ROCm need beside those in /dev/dri, which detection looks at."""
    if any(card.driver == "nvidia" for card in graphics) or (root / "proc/driver/nvidia/version").exists():
        yield _node(root, "dev/nvidiactl")
        yield _node(root, "dev/nvidia-uvm")
    if any(gpu.vendor == "amd" and not gpu.integrated for gpu in rig.gpus):
        yield _node(root, "dev/kfd")


def _node(root: Path, name: str) -> Node:
    path = root / name
    try:
        group = path.stat().st_gid
    except OSError:
        return Node(path=f"/{name}", exists=False)
    return Node(path=f"/{name}", exists=True, allowed=os.access(path, os.R_OK | os.W_OK), group=_group_name(group))


def _group_name(group: int) -> str:
    import grp

    try:
        return grp.getgrgid(group).gr_name
    except KeyError:
        return str(group)  # a container need not know its host's groups


def _module(root: Path) -> str:
    match = _MODULE.search(read_text(root / "proc/driver/nvidia/version") + "\n")
    return match[1] if match else read_text(root / "sys/module/nvidia/version")


def _libraries(root: Path) -> Iterator[str]:
    seen: set[str] = set()
    for folder in _LIBRARY_FOLDERS:
        for name in list_names(root / folder):
            match = _LIBRARY.fullmatch(name)
            if match and match[1] not in seen:
                seen.add(match[1])
                yield match[1]
