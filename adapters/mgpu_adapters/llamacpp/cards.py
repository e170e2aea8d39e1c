"""Rig cards by the names llama.cpp gives them, and the environment that hides the others."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from typing import Final

from msgspec.structs import replace

from mgpu.adapter import ListedDevice
from mgpu.rig import Finding, Gpu, Rig
from mgpu.units import MIB

#: `  CUDA0: NVIDIA GeForce RTX 4090 (24077 MiB, 23600 MiB free)`; descriptions may hold parentheses of their own.
_LISTED: Final = re.compile(r"^\s+(\S+?):\s+(.+?)\s+\((\d+)\s+MiB,\s+(\d+)\s+MiB\s+free\)\s*$", re.MULTILINE)

#: The backend each vendor's cards have in a build made for them, and the variable that selects its devices.
_BACKENDS: Final = {
    "nvidia": ("CUDA", "CUDA_VISIBLE_DEVICES"),
    "amd": ("ROCm", "HIP_VISIBLE_DEVICES"),
    "intel": ("SYCL", ""),
    "apple": ("MTL", ""),
    "unknown": ("Vulkan", ""),
}


def read_devices(text: str) -> tuple[ListedDevice, ...]:
    """`llama-server --list-devices` as devices. CPUs are never in the list."""
    return tuple(
        ListedDevice(
            device=match[1], description=match[2], total_bytes=int(match[3]) * MIB, free_bytes=int(match[4]) * MIB
        )
        for match in _LISTED.finditer(text)
    )


def device_names(gpus: Sequence[Gpu]) -> tuple[str, ...]:
    """Names for `--device`, in order. Cards selected by a visibility variable are numbered from 0 in that order."""
    counts: Counter[str] = Counter()
    names: list[str] = []
    for gpu in gpus:
        if gpu.device is not None:
            names.append(gpu.device)
            continue
        backend = _BACKENDS[gpu.vendor][0]
        names.append(f"{backend}{counts[backend]}")
        counts[backend] += 1
    return tuple(names)


def visibility(gpus: Sequence[Gpu], rig: Rig) -> dict[str, str]:
    """Variables that show the runtime only `gpus`, in this order. A context on a hidden card costs it nothing."""
    env: dict[str, str] = {}
    for vendor, (_, variable) in _BACKENDS.items():
        # A card that the runtime's own list has named is selected by that name.
        ours = [gpu for gpu in rig.gpus if gpu.vendor == vendor and gpu.device is None]
        if not variable or not ours:
            continue
        if vendor == "nvidia":
            env["CUDA_DEVICE_ORDER"] = "PCI_BUS_ID"
        chosen = [gpu for gpu in gpus if gpu in ours]
        env[variable] = ",".join(_selector(gpu, ours) for gpu in chosen)
    return env


def _selector(gpu: Gpu, ours: Sequence[Gpu]) -> str:
    """NVIDIA's UUID, or the number among the vendor's own cards: another vendor's do not count."""
    return gpu.uuid if gpu.uuid is not None and gpu.vendor == "nvidia" else str(ours.index(gpu))


def bind(rig: Rig, listed: Sequence[ListedDevice]) -> Rig:
    """The rig as this build of llama.cpp can use it: cards of a driver it was not built for get their listed names.

    A CUDA build sees NVIDIA cards by the variables alone. A Vulkan build names the same cards `Vulkan0` …, in its own
    order: matched by name, equal cards in order. Cards that it does not list cannot be used, and a finding says so.
    """
    native = {prefix for prefix, _ in _BACKENDS.values() if any(_is(device, prefix) for device in listed)}
    left = list(listed)
    gpus: list[Gpu] = []
    missing: list[str] = []
    for gpu in rig.gpus:
        if gpu.device is not None or (_BACKENDS[gpu.vendor][0] in native and gpu.vendor != "unknown"):
            gpus.append(gpu)
            continue
        match = _match(gpu.name, left)
        if match is None:
            missing.append(f"GPU {gpu.index} ({gpu.name})")
            gpus.append(replace(gpu, enabled=False))
        else:
            left.remove(match)
            gpus.append(replace(gpu, device=match.device))
    findings = rig.findings
    if missing:
        text = f"this llama-server cannot use {', '.join(missing)}: its build lists no such device"
        findings += (Finding(text=text, hint="install a llama.cpp built with CUDA (or ROCm, or Vulkan)"),)
    return replace(rig, gpus=tuple(gpus), findings=findings)


def _is(device: ListedDevice, prefix: str) -> bool:
    return device.device.rstrip("0123456789") == prefix


def _match(name: str, listed: Sequence[ListedDevice]) -> ListedDevice | None:
    """The device of this very name; where none has it, one whose description contains it."""
    plain = _plain(name)
    exact = next((device for device in listed if _plain(device.description) == plain), None)
    return exact or next((device for device in listed if plain in device.description.lower()), None)


def _plain(name: str) -> str:
    """Vulkan adds the driver in parentheses ("… (RADV NAVI31)"); old NVIDIA drivers leave the vendor out."""
    return name.partition(" (")[0].removeprefix("NVIDIA ").strip().lower()
