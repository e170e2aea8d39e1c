"""Apple's chips, by what the kernel says (`sysctlbyname`): one GPU, in the machine's own memory."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Final

from mgpu.rig import Gpu
from mgpu.units import GB, GIB, MIB
from mgpu_profiles.gpus import find_spec

#: The name of a kernel variable -> its bytes; empty where there is none of that name.
Sysctl = Callable[[str], bytes]

#: Chips sold with two memory buses tell them apart by their performance cores: the smaller one's, in bytes per second.
#: (14-core CPU with 30-core GPU, 16 with 40; Apple's specifications of MacBook Pro 2023 and 2024.)
_SMALLER: Final = {("Apple M3 Max", 10): 300 * GB, ("Apple M4 Max", 10): 410 * GB}

#: Up to this much RAM Metal recommends two thirds of it for the GPU, above three quarters
#: (`recommendedMaxWorkingSetSize` as seen on 16 to 128 GiB machines; newer systems sometimes allow more).
_SMALL: Final = 32 * GIB


def sysctl(name: str) -> bytes:
    """A kernel variable as it is; empty on other systems, too."""
    ask = getattr(ctypes.CDLL(None), "sysctlbyname", None)
    if ask is None:
        return b""
    size = ctypes.c_size_t(0)
    if ask(name.encode(), None, ctypes.byref(size), None, ctypes.c_size_t(0)) != 0:
        return b""
    buffer = ctypes.create_string_buffer(size.value)
    if ask(name.encode(), buffer, ctypes.byref(size), None, ctypes.c_size_t(0)) != 0:
        return b""
    return buffer.raw[: size.value]


def read_apple(ask: Sysctl, available_bytes: int) -> Gpu | None:
    """The GPU of an Apple chip; None on a Mac with an Intel processor. `available_bytes`: what the host has free."""
    name = ask("machdep.cpu.brand_string").rstrip(b"\0").decode("utf-8", "replace").strip()
    ram = _number(ask("hw.memsize"))
    if not name.startswith("Apple ") or not ram:
        return None
    # A limit that a person has set; 0: the system's own.
    total = _number(ask("iogpu.wired_limit_mb")) * MIB or working_set(ram)
    total = min(total, ram)
    return Gpu(
        index=0,
        name=name,
        vendor="apple",
        total_bytes=total,
        free_bytes=min(total, available_bytes),
        bandwidth_bytes_per_s=bandwidth(name, ask),
        unified=True,
    )


def working_set(ram_bytes: int) -> int:
    """What Metal recommends at most for the GPU of a machine with so much RAM."""
    return ram_bytes * 2 // 3 if ram_bytes <= _SMALL else ram_bytes * 3 // 4


def bandwidth(name: str, ask: Sysctl) -> int | None:
    """Bytes per second of the chip called `name`."""
    spec = find_spec(name)
    smaller = _SMALLER.get((name, _number(ask("hw.perflevel0.physicalcpu"))))
    return smaller or (spec.bandwidth_bytes_per_s if spec else None)


def _number(raw: bytes) -> int:
    """4 or 8 bytes; 0 for anything else."""
    return int.from_bytes(raw, "little") if len(raw) in {4, 8} else 0
