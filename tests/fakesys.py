"""FAKE /sys, /proc and /dev trees for tests: PCI devices where Linux has them, with the links that lead there.

What real files say is taken from published listings of such machines (lspci, /sys, drm-usage-stats.rst).
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

from mgpu.units import GIB, MIB

GEN3: Final = "8.0 GT/s PCIe"
GEN4: Final = "16.0 GT/s PCIe"
GEN5: Final = "32.0 GT/s PCIe"

MEMINFO_64: Final = "MemTotal:       67108864 kB\nMemFree:  1048576 kB\nMemAvailable:   41943040 kB\n"  # 64 and 40 GiB

Files = dict[str, str | int]


def link_files(speed: str, width: int, *, most: int | None = None, fastest: str | None = None) -> Files:
    """A PCI device's link: `speed` and `width` as it can be here, `fastest` and `most` as the device could."""
    return {
        "current_link_speed": "2.5 GT/s PCIe",  # idle
        "current_link_width": width,
        "max_link_speed": fastest or speed,
        "max_link_width": most or width,
    }


class FakeSys:
    """A root directory under which a machine is built."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.cards = 0
        self.write({"proc/meminfo": MEMINFO_64})

    def write(self, files: Files) -> None:
        for name, text in files.items():
            path = self.root / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(f"{text}\n", encoding="utf-8")

    def pci(self, place: str, files: Files) -> Path:
        """A PCI device at `place`, a path from its host bridge; bridges above it that are not there yet are plain."""
        folder = self.root / "sys/devices"
        for part in place.split("/"):
            folder /= part
            new = not folder.exists()
            folder.mkdir(parents=True, exist_ok=True)
            if new and not part.startswith("pci"):
                self._link(self.root / "sys/bus/pci/devices" / part, folder)
        self._fill(folder, files)
        return folder

    def drm(self, place: str, vendor: int, product: int, files: Files, *, screen: str = "") -> Path:
        """A graphics card with its driver. `screen`: the connector that has one."""
        number, self.cards = self.cards, self.cards + 1
        ids: Files = {"vendor": f"0x{vendor:04x}", "device": f"0x{product:04x}", "class": "0x030000"}
        folder = self.pci(place, ids | files)
        self.driver(place, "amdgpu" if vendor == 0x1002 else "xe")
        node = folder / "drm" / f"card{number}"
        node.mkdir(parents=True)
        self._link(node / "device", folder)
        self._link(self.root / "sys/class/drm" / node.name, node)
        for connector in ("DP-1", "HDMI-A-1"):
            name = f"{node.name}-{connector}"
            self._fill(node / name, {"status": "connected" if connector == screen else "disconnected"})
            self._link(self.root / "sys/class/drm" / name, node / name)
        render = f"renderD{128 + number}"
        (folder / "drm" / render).mkdir()
        self.write({f"dev/dri/{render}": ""})
        return folder

    def driver(self, place: str, name: str) -> None:
        """The driver a PCI device is bound to."""
        target = self.root / "sys/bus/pci/drivers" / name
        target.mkdir(parents=True, exist_ok=True)
        self._link(self.root / "sys/devices" / place / "driver", target)

    def kfd(self, number: int, gpu_id: int, render: int, target: int) -> None:
        """A GPU of the compute driver."""
        facts = f"cpu_cores_count 0\nsimd_count 192\ngfx_target_version {target}\ndrm_render_minor {render}"
        folder = f"sys/class/kfd/kfd/topology/nodes/{number}"
        self.write({f"{folder}/properties": facts, f"{folder}/gpu_id": gpu_id})

    def kfd_link(self, a: int, b: int, kind: int, group: str = "io_links") -> None:
        for one, other in ((a, b), (b, a)):
            folder = f"sys/class/kfd/kfd/topology/nodes/{one}/{group}/{other}"
            self.write({f"{folder}/properties": f"type {kind}\nnode_from {one}\nnode_to {other}\nweight 15"})

    def process(self, pid: int, name: str, *infos: str) -> None:
        """A running program that has a graphics card open once for each of `infos`."""
        self.write({f"proc/{pid}/comm": name})
        for number, info in enumerate(infos, 10):
            self.write({f"proc/{pid}/fdinfo/{number}": info})
            self._link(self.root / f"proc/{pid}/fd/{number}", Path("/dev/dri/renderD128"), exact=True)

    def _fill(self, folder: Path, files: Files) -> None:
        self.write({str((folder / name).relative_to(self.root)): text for name, text in files.items()})

    def _link(self, path: Path, target: Path, *, exact: bool = False) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.symlink_to(target if exact else os.path.relpath(target, path.parent))


def fdinfo(address: str, client: int, memory: str) -> str:
    return f"pos:\t0\ndrm-driver:\tamdgpu\ndrm-pdev:\t{address}\ndrm-client-id:\t{client}\n{memory}"


def amd_memory(gib: int, used: int = 100 * MIB, gtt: int = 32 * GIB, **more: str | int) -> Files:
    return {
        "mem_info_vram_total": gib * GIB - 16 * MIB,
        "mem_info_vram_used": used,
        "mem_info_gtt_total": gtt,
        "mem_info_gtt_used": 64 * MIB,
        **more,
    }


def rx_7900_xtx(
    sys: FakeSys, port: str, bus: int, *, slot: Files | None = None, screen: str = "", **files: str | int
) -> str:
    """An RX 7900 XTX below `port`, behind the card's own two bridges; its address. `slot`: the port's link."""
    up, down = f"{port}/0000:{bus:02x}:00.0", f"{port}/0000:{bus:02x}:00.0/0000:{bus + 1:02x}:00.0"
    wired = slot or link_files(GEN4, 16)
    sys.pci(port, {"vendor": "0x1022", "device": "0x14db", **wired})
    width = wired["current_link_width"]
    assert isinstance(width, int)
    sys.pci(up, {"vendor": "0x1002", "device": "0x1478", **link_files(GEN4, width, most=16)})
    sys.pci(down, {"vendor": "0x1002", "device": "0x1479", **link_files(GEN4, 16)})
    facts: Files = {
        **amd_memory(24),
        **link_files(GEN4, 16),
        "revision": "0xc8",
        "unique_id": f"{0xA1B2C3D4E5F60000 + bus:016x}",
        "numa_node": -1,
        "board_info": "type : cem",
        "hwmon/hwmon3/power1_cap": 339_000_000,
    }
    sys.drm(f"{down}/0000:{bus + 2:02x}:00.0", 0x1002, 0x744C, facts | files, screen=screen)
    return f"0000:{bus + 2:02x}:00.0"


def raphael(sys: FakeSys, *, screen: str = "") -> str:
    """The graphics of a Ryzen 7000 desktop processor."""
    facts: Files = {
        "mem_info_vram_total": 512 * MIB,
        "mem_info_vram_used": 40 * MIB,
        "mem_info_gtt_total": 31 * GIB,
        "mem_info_gtt_used": GIB,
        "mem_info_vram_vendor": "unknown",
        "revision": "0xc1",
        **link_files(GEN4, 16),
    }
    sys.drm("pci0000:00/0000:00:08.1/0000:0e:00.0", 0x1002, 0x164E, facts, screen=screen)
    return "0000:0e:00.0"


def arc(sys: FakeSys, product: int, bus: int, *, slot: Files, files: Files) -> str:
    """An Arc card behind the switch on its own board, whose inner links claim 2.5 GT/s x1."""
    port, inner = "pci0000:00/0000:00:01.0", link_files("2.5 GT/s PCIe", 1)
    up = f"{port}/0000:{bus:02x}:00.0"
    down = f"{up}/0000:{bus + 1:02x}:01.0"
    sys.pci(port, {"vendor": "0x8086", "device": "0x460d", **slot})
    sys.pci(up, {"vendor": "0x8086", "device": "0x4fa0", **slot, "max_link_width": 16, "max_link_speed": GEN4})
    sys.pci(down, {"vendor": "0x8086", "device": "0x4fa4", **inner})
    sys.drm(f"{down}/0000:{bus + 2:02x}:00.0", 0x8086, product, inner | files)
    return f"0000:{bus + 2:02x}:00.0"


def uhd(sys: FakeSys, *, screen: str = "") -> str:
    """The graphics of an Intel desktop processor."""
    sys.drm("pci0000:00/0000:00:02.0", 0x8086, 0x4680, {"revision": "0x0c"}, screen=screen)
    return "0000:00:02.0"
