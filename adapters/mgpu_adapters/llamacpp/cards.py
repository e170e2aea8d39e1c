"""Rig cards by the names llama.cpp gives them, and the environment that hides the others."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Final

from msgspec.structs import replace

from mgpu.adapter import ListedDevice
from mgpu.rig import Finding, Gpu, Rig, Vendor
from mgpu.units import MIB
from mgpu_profiles.gpus import find_spec, plain_name

#: `  CUDA0: NVIDIA GeForce RTX 4090 (24077 MiB, 23600 MiB free)`; descriptions may hold parentheses of their own.
_LISTED: Final = re.compile(
    r"[ \t]{1,20}(\S{1,60}?):[ \t]{1,20}(.{1,200}?)[ \t]{1,20}"
    r"\(([0-9]{1,9})[ \t]{1,20}MiB,[ \t]{1,20}([0-9]{1,9})[ \t]{1,20}MiB[ \t]{1,20}free\)[ \t\r]{0,20}"
)

_LONGEST: Final = 400  # characters of such a line

#: The backend each vendor's cards have in a build made for them.
_BACKENDS: Final[Mapping[Vendor, str]] = {
    "nvidia": "CUDA",
    "amd": "ROCm",
    "intel": "SYCL",
    "apple": "MTL",
    "unknown": "Vulkan",
}

#: What a device's description, or else its backend, says of its vendor.
_WORDS: Final[Mapping[Vendor, str]] = {
    "nvidia": r"nvidia|geforce|quadro|tesla",
    "amd": r"\bamd\b|radeon|instinct|\bgfx\d",
    "intel": r"intel",
    "apple": r"apple",
}

#: Memory of one card as its driver tells it, and as Vulkan adds up its heaps.
_SAME_SIZE: Final = 0.12


def read_devices(text: str) -> tuple[ListedDevice, ...]:
    """`llama-server --list-devices` as devices. CPUs are never in the list."""
    return tuple(
        ListedDevice(
            device=match[1], description=match[2], total_bytes=int(match[3]) * MIB, free_bytes=int(match[4]) * MIB
        )
        for line in text.split("\n")
        if len(line) < _LONGEST and (match := _LISTED.fullmatch(line)) and match[2].isprintable()
    )


def device_names(gpus: Sequence[Gpu]) -> tuple[str, ...]:
    """Names for `--device`, in order. Cards selected by a visibility variable are numbered from 0 in that order."""
    counts: Counter[str] = Counter()
    names: list[str] = []
    for gpu in gpus:
        if gpu.device is not None:
            names.append(gpu.device)
            continue
        backend = _BACKENDS[gpu.vendor]
        number = _rank(gpu, gpus) if gpu.vendor == "intel" else counts[backend]
        names.append(f"{backend}{number}")
        counts[backend] += 1
    return tuple(names)


def _rank(gpu: Gpu, gpus: Sequence[Gpu]) -> int:
    """Intel's variable selects, and does not reorder."""
    return sum(other.vendor == gpu.vendor and other.device is None and other.index < gpu.index for other in gpus)


def visibility(gpus: Sequence[Gpu], rig: Rig) -> dict[str, str]:
    """Variables that show the runtime only `gpus`, in this order. A context on a hidden card costs it nothing.

    A card that the runtime's own list has named is selected by that name alone: `GGML_VK_VISIBLE_DEVICES` would count
    what Vulkan lists before llama.cpp leaves out doubles and CPUs (ggml-vulkan.cpp), and renumber the rest.
    """
    env: dict[str, str] = {}
    unnamed = [gpu for gpu in rig.gpus if gpu.device is None]
    if ours := [gpu for gpu in unnamed if gpu.vendor == "nvidia"]:
        chosen = [gpu for gpu in gpus if gpu in ours]
        env["CUDA_DEVICE_ORDER"] = "PCI_BUS_ID"
        env["CUDA_VISIBLE_DEVICES"] = ",".join(_selector(gpu, ours) for gpu in chosen)
    ours = [gpu for gpu in unnamed if gpu.vendor == "amd"]
    if any(gpu.enabled for gpu in ours):
        chosen = [gpu for gpu in gpus if gpu in ours]
        env["ROCR_VISIBLE_DEVICES"] = ",".join(_selector(gpu, ours) for gpu in chosen)
        # HIP counts what ROCR leaves. Without a list of its own it would take CUDA's (ROCm clr, rocdevice.cpp).
        env["HIP_VISIBLE_DEVICES"] = ",".join(str(number) for number, _ in enumerate(chosen)) or "-1"
    ours = [gpu for gpu in unnamed if gpu.vendor == "intel"]
    if numbers := sorted(ours.index(gpu) for gpu in gpus if gpu in ours):
        env["ZE_ENABLE_PCI_ID_DEVICE_ORDER"] = "1"
        env["ONEAPI_DEVICE_SELECTOR"] = f"level_zero:{','.join(map(str, numbers))}"
    return env


def _selector(gpu: Gpu, ours: Sequence[Gpu]) -> str:
    """The UUID, or the number among the vendor's own cards: another vendor's do not count."""
    return gpu.uuid if gpu.uuid is not None else str(ours.index(gpu))


def bind(rig: Rig, listed: Sequence[ListedDevice]) -> Rig:
    """The rig as this build of llama.cpp can use it: cards of a driver it was not built for get their listed names.

    A CUDA build sees NVIDIA cards by the variables alone, a ROCm build AMD's. A Vulkan build names the same cards
    `Vulkan0` …, in its own order: matched by name, equal cards in order; where the names do not tell, by vendor and
    memory. Cards that it does not list cannot be used, and a finding says so.
    """
    native = {vendor for vendor, prefix in _BACKENDS.items() if any(_is(device, prefix) for device in listed)}
    native -= {"unknown", "intel"}  # Intel's numbers are Level Zero's: only the list tells which is which
    wanted = [gpu for gpu in rig.gpus if gpu.device is None and gpu.vendor not in native]
    matches = _match(wanted, [device for device in listed if not any(_is(device, _BACKENDS[v]) for v in native)])
    gpus = tuple(_bound(gpu, matches.get(gpu.index)) if gpu in wanted else gpu for gpu in rig.gpus)
    missing = [gpu for gpu in wanted if gpu.index not in matches and not gpu.integrated]
    if not missing:
        return replace(rig, gpus=gpus)
    names = ", ".join(f"GPU {gpu.index} ({gpu.name})" for gpu in missing)
    text = f"this llama-server cannot use {names}: its build lists no such device"
    finding = Finding(text=text, hint=f"install a llama.cpp built with {_wanted_build(rig, missing)}")
    return replace(rig, gpus=gpus, findings=(*rig.findings, finding))


def _wanted_build(rig: Rig, missing: Sequence[Gpu]) -> str:
    if len({gpu.vendor for gpu in rig.gpus if not gpu.integrated}) > 1:
        return "Vulkan, which lists the cards of every vendor"
    return f"{_BACKENDS[missing[0].vendor]} or Vulkan"


def _bound(gpu: Gpu, device: ListedDevice | None) -> Gpu:
    if device is None:
        return replace(gpu, enabled=False)
    bound = replace(gpu, device=device.device)
    if gpu.name.endswith("]"):  # a PCI id, where /sys knows no name
        spec = find_spec(device.description, gpu.total_bytes)
        speed = gpu.bandwidth_bytes_per_s or (spec.bandwidth_bytes_per_s if spec else None)
        bound = replace(bound, name=plain_name(device.description), bandwidth_bytes_per_s=speed)
    if gpu.vendor != "intel":
        return bound
    # Intel's drivers tell neither what is free nor what they keep for themselves; the runtime has asked the card.
    total = min(gpu.total_bytes, device.total_bytes)
    return replace(bound, total_bytes=total, free_bytes=min(gpu.free_bytes, device.free_bytes, total))


def _is(device: ListedDevice, prefix: str) -> bool:
    return device.device.rstrip("0123456789") == prefix


def _match(gpus: Sequence[Gpu], listed: Sequence[ListedDevice]) -> dict[int, ListedDevice]:
    """Each card's device: surest likeness first, so that none takes another's match."""
    likenesses: tuple[Callable[[Gpu, ListedDevice], bool], ...] = (
        lambda gpu, device: _plain(gpu.name) == _plain(device.description),
        lambda gpu, device: _plain(gpu.name) in _plain(device.description),
        lambda gpu, device: _vendor(device) == gpu.vendor and _same_size(gpu, device),
        lambda gpu, device: _vendor(device) == gpu.vendor and gpu.integrated,
    )
    left, matches = list(listed), dict[int, ListedDevice]()
    for like in likenesses:
        for gpu in gpus:
            device = next((device for device in left if like(gpu, device)), None)
            if gpu.index not in matches and device is not None:
                matches[gpu.index] = device
                left.remove(device)
    return matches


def _vendor(device: ListedDevice) -> Vendor:
    return next(
        (vendor for vendor, words in _WORDS.items() if re.search(words, device.description, re.IGNORECASE)), "unknown"
    )


def _same_size(gpu: Gpu, device: ListedDevice) -> bool:
    return abs(gpu.total_bytes - device.total_bytes) <= _SAME_SIZE * gpu.total_bytes


def _plain(name: str) -> str:
    """Vulkan adds the driver in parentheses ("… (RADV NAVI31)"); old NVIDIA drivers leave the vendor out."""
    return (
        re.sub(r"\((?:R|TM)\)", "", name, flags=re.IGNORECASE)
        .partition(" (")[0]
        .removeprefix("NVIDIA ")
        .strip()
        .lower()
    )
