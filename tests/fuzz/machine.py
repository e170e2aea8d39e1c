"""What the kernel and the firmware say of the machine: /proc, /sys, SMBIOS; and lists of visible devices."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Final

import fakesys
from fuzz.target import Target, check_line, scratch
from mgpu.detect import dmi
from mgpu.detect.machine import detect_rig
from mgpu.detect.visible import apply_cuda_visible, apply_rocm_visible
from mgpu_profiles.rigs import parse_rig
from mgpu_profiles.store import BUNDLED

_RIG: Final = parse_rig((BUNDLED / "4x3090.toml").read_text(encoding="utf-8"), "4x3090")
_MODULE: Final = (
    bytes((17, 0x28))
    + bytes(6)
    + b"\x48\0\x40\0\0\x40"
    + b"\0\0\1\2\x1a"
    + bytes(2)
    + b"\xc0\x12"
    + bytes(9)
    + b"\xc0\x12"
    + bytes(6)
    + b"DIMM_A1\0P0 CHANNEL A\0\0"
)


def _smbios(data: bytes) -> None:
    speed = dmi.bandwidth_of(tuple(dmi.read_modules(data)))
    assert speed is None or 0 < speed < 1 << 60


def _machine(root: Path) -> list[Path]:
    """Two Radeons and an Arc; the files that say so."""
    sys = fakesys.FakeSys(root)
    fakesys.rx_7900_xtx(sys, "pci0000:00/0000:00:01.1", 3)
    fakesys.rx_7900_xtx(sys, "pci0000:00/0000:00:01.2", 8, screen="DP-1")
    fakesys.raphael(sys)
    sys.kfd(1, 1001, 128, 110000)
    sys.kfd(2, 1002, 129, 110000)
    sys.kfd_link(1, 2, 2)
    sys.process(4242, "python", fakesys.fdinfo("0000:05:00.0", 1, "drm-memory-vram: 3 GiB"))
    sys.write(
        {
            "proc/cpuinfo": "processor : 0\nmodel name : A CPU @ 3.0GHz",
            "proc/self/cgroup": "0::/user.slice",
            "sys/fs/cgroup/memory.max": "max",
            "sys/fs/cgroup/user.slice/memory.max": "34359738368",
            "sys/fs/cgroup/user.slice/memory.current": "1073741824",
            "sys/fs/cgroup/user.slice/memory.stat": "inactive_file 1024",
            "proc/device-tree/model": "A board",
            "usr/share/libdrm/amdgpu.ids": "744C,\tC8,\tAMD Radeon RX 7900 XTX",
        }
    )
    (root / "sys/firmware/dmi/tables").mkdir(parents=True, exist_ok=True)
    (root / "sys/firmware/dmi/tables/DMI").write_bytes(_MODULE)
    return sorted(path for path in root.rglob("*") if path.is_file() and not path.is_symlink())


def _kernel(data: bytes) -> None:
    """Each line of the input goes into one of the machine's files: its number, then the text (\\x1f: a line's end)."""
    root = scratch() / "machine"
    files = sorted(path for path in root.rglob("*") if path.is_file() and not path.is_symlink()) or _machine(root)
    before: dict[Path, bytes] = {}
    for line in data.split(b"\n")[:6]:
        number, _, text = line.partition(b" ")
        path = files[sum(number) % len(files)]
        before.setdefault(path, path.read_bytes())
        path.write_bytes(text.replace(b"\x1f", b"\n"))
    try:
        rig = detect_rig({}, root=root)
    finally:
        for path, text in before.items():
            path.write_bytes(text)
    for gpu in rig.gpus:
        check_line(gpu.name)
        assert 0 <= gpu.free_bytes <= gpu.total_bytes < 1 << 70, gpu
    assert 0 <= rig.ram_free_bytes < 1 << 70, rig.ram_free_bytes
    for finding in rig.findings:
        check_line(finding.text)
        check_line(finding.hint)


def _kernel_seeds() -> Iterator[bytes]:
    for number in range(110):
        yield bytes([number + 32]) + b" 0x1002"
        yield bytes([number + 32]) + b" MemTotal: 65000000 kB\x1fMemAvailable: 60000000 kB"


def _visible(data: bytes) -> None:
    text = data.decode("utf-8", "replace")
    for _, findings in (
        apply_cuda_visible(text, _RIG.gpus),
        apply_rocm_visible({"HIP_VISIBLE_DEVICES": text, "ROCR_VISIBLE_DEVICES": text[::-1]}, _RIG.gpus),
    ):
        for finding in findings:
            check_line(finding.text)
            check_line(finding.hint)


_SAID: Final = (
    b"max",
    b"0",
    b"-1",
    b"18446744073709551615",
    b"9" * 30,
    b"16.0 GT/s PCIe",
    b"0000:03:00.0",
    b"connected",
    b"\x1f",
    b"Jetson",
    b"model name : ",
    b"0::/",
    b"../..",
    b"drm-memory-vram: ",
    b"gfx_target_version ",
)

TARGETS: Final = (
    Target(name="smbios", check=_smbios, seeds=lambda: (_MODULE * 2 + b"\x7f\4\0\0\0\0",)),
    Target(name="machine", check=_kernel, seeds=_kernel_seeds, tokens=_SAID, weight=0.02, batch=100, alone_s=5),
    Target(name="visible", check=_visible, seeds=lambda: (b"0,1", b"GPU-1,-1", b"2, 1 ,9")),
)
