"""This machine as a `Rig`: the vendors' own drivers first, then whatever the installed runtime says it can use."""

from __future__ import annotations

import functools
import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final

from msgspec import Struct
from msgspec.structs import replace

from mgpu.adapter import ListedDevice
from mgpu.detect.host import Host, read_host
from mgpu.detect.jetson import read_jetson
from mgpu.detect.sysfs import AMD, INTEL, ROOT, SysfsProbe, drm_cards, lock_out
from mgpu.detect.topology import join
from mgpu.detect.unclaimed import unclaimed_cards
from mgpu.detect.visible import apply_cuda_visible, apply_rocm_visible
from mgpu.rig import Finding, Gpu, Link, Rig, Vendor
from mgpu_profiles.gpus import find_spec, plain_name

NAME: Final = "this machine"

#: Words of a description, and prefixes of a runtime's device name (llama.cpp's backends), by vendor.
_VENDOR_WORDS: Final[tuple[tuple[Vendor, str], ...]] = (
    ("nvidia", r"\b(?:NVIDIA|GeForce|Quadro|Tesla)\b"),
    ("amd", r"\b(?:AMD|Radeon|Instinct)\b"),
    ("intel", r"\bIntel\b"),
    ("apple", r"\bApple\b"),
)
_VENDOR_DEVICES: Final[tuple[tuple[Vendor, str], ...]] = (
    ("nvidia", "CUDA"),
    ("amd", "ROCm"),
    ("intel", "SYCL"),
    ("apple", "MTL"),
    ("apple", "Metal"),
)

#: Integrated GPUs that say so. (Plain "AMD Radeon Graphics" does not: unnamed discrete cards are called that, too.)
_INTEGRATED: Final = re.compile(
    r"\b(?:UHD|HD|Iris(?: \w+)?) Graphics|\bIntel Graphics|\bArc Graphics|\bRadeon (?:Vega \d+|\d{3,4}[MS]) Graphics"
    # chips by the names Mesa's RADV gives them
    r"|\(RADV (?:RAVEN2?|RENOIR|VANGOGH|REMBRANDT|RAPHAEL_MENDOCINO|PHOENIX2?|GFX1103_R\d|GFX115[023])\)"
)

#: Mesa's software Vulkan device: lavapipe's maxStorageBufferRange (llama.cpp keeps larger tensors off the device).
_LLVMPIPE_MAX_TENSOR: Final = 1 << 27


def detect_rig(
    environ: Mapping[str, str], *, listed: Callable[[], tuple[ListedDevice, ...]] | None = None, root: Path = ROOT
) -> Rig:
    """What there is to run models on, now. A machine without a GPU is a rig with `gpus=()`.

    Numbered: NVIDIA's by their driver, then AMD's, then Intel's, in PCI order. `environ` is the caller's environment:
    its lists of visible cards are respected. `listed` asks the installed runtime for its devices; it is called only
    where no vendor's driver knows a card. `root`: where /sys and /proc are.
    """
    host = read_host(root)
    if sys.platform == "darwin":  # no NVIDIA driver since macOS 10.14
        return _mac(host, listed() if listed else ())
    found = _survey(environ, root)
    devices = listed() if listed and not found.has_cards else ()
    if devices:
        return rig_from_listed(devices, host, findings=found.findings, driver=found.driver)
    findings = (*(() if found.gpus else found.no_driver), *found.findings)
    return _rig(host, gpus=found.gpus, links=found.links, driver=found.driver, findings=findings)


class _Survey(Struct, frozen=True, kw_only=True):
    """What the vendors' own drivers say. `no_driver` is news only where there is no other GPU. `has_cards`: also cards
    that the caller hides."""

    gpus: tuple[Gpu, ...]
    links: tuple[Link, ...]
    driver: str
    findings: tuple[Finding, ...]
    no_driver: tuple[Finding, ...]
    has_cards: bool


def _survey(environ: Mapping[str, str], root: Path) -> _Survey:
    from mgpu.detect.nvidia import probe_nvidia

    nvidia = probe_nvidia(root)
    jetson = None if nvidia.gpus else read_jetson(root)
    cards = (jetson,) if jetson else nvidia.gpus
    visible, notes = apply_cuda_visible(
        environ.get("CUDA_VISIBLE_DEVICES"), cards, device_order=environ.get("CUDA_DEVICE_ORDER")
    )
    others = _others(environ, nvidia.count or len(cards), root)
    gpus = (*visible, *others.gpus)
    indices = {gpu.index for gpu in gpus}
    links = tuple(link for link in (*nvidia.links, *others.links) if indices.issuperset(link.gpus))
    no_driver = nvidia.findings if nvidia.state == "no-driver" else ()
    unclaimed = tuple(unclaimed_cards(root, has_nvml=not no_driver))
    trouble = () if no_driver else nvidia.findings
    return _Survey(
        gpus=gpus,
        links=join(gpus, links, root),
        driver="; ".join(filter(None, (nvidia.driver, others.driver))),
        findings=(*trouble, *notes, *others.findings, *unclaimed),
        no_driver=() if unclaimed else no_driver,
        has_cards=bool(cards) or others.has_cards,
    )


def _others(environ: Mapping[str, str], first: int, root: Path) -> SysfsProbe:
    """AMD's and Intel's GPUs."""
    cards = drm_cards(root)
    if not {AMD, INTEL} & {card.vendor for card in cards}:
        return SysfsProbe()
    from mgpu.detect.amd import probe_amd
    from mgpu.detect.holders import read_holders
    from mgpu.detect.intel import probe_intel

    held = functools.cache(lambda: read_holders(root))
    amd = probe_amd(cards, first, held=held, root=root)
    intel = probe_intel(cards, first + len(amd.gpus), held=held, root=root)
    visible, notes = apply_rocm_visible(environ, amd.gpus)
    gpus, locked = lock_out((*visible, *intel.gpus), cards, root)
    drivers = sorted({card.driver for card in cards if card.vendor in {AMD, INTEL} and card.driver})
    findings = (*amd.findings, *intel.findings, *notes, *locked)
    return SysfsProbe(
        gpus=gpus,
        links=amd.links,
        findings=findings,
        driver=", ".join(drivers),
        has_cards=any(not gpu.integrated for gpu in (*amd.gpus, *intel.gpus)),
    )


def _mac(host: Host, devices: tuple[ListedDevice, ...]) -> Rig:
    """Metal knows best what it may use; without a runtime to ask it, the kernel tells nearly as much."""
    from mgpu.detect import apple

    if devices:
        rig = rig_from_listed(devices, host)
        speeds = (apple.bandwidth(gpu.name, apple.sysctl) for gpu in rig.gpus)
        gpus = (replace(gpu, bandwidth_bytes_per_s=speed) for gpu, speed in zip(rig.gpus, speeds, strict=True))
        return replace(rig, gpus=tuple(gpus))
    gpu = apple.read_apple(apple.sysctl, host.memory.available_bytes)
    return _rig(host, gpus=(gpu,) if gpu else ())


def rig_from_listed(
    devices: tuple[ListedDevice, ...], host: Host, *, findings: tuple[Finding, ...] = (), driver: str = ""
) -> Rig:
    """The devices a runtime lists, as a rig: each entry is a device, numbered in the runtime's order."""
    gpus = tuple(_gpu(index, device) for index, device in enumerate(devices))
    return _rig(host, gpus=gpus, findings=findings, driver="devices as the runtime lists them" if devices else driver)


def _rig(
    host: Host,
    *,
    gpus: tuple[Gpu, ...] = (),
    links: tuple[Link, ...] = (),
    driver: str = "",
    findings: tuple[Finding, ...] = (),
) -> Rig:
    gpus, notes = _rest_integrated(gpus)
    return Rig(
        name=NAME,
        source="detected",
        gpus=gpus,
        links=links,
        ram_bytes=host.memory.total_bytes,
        ram_free_bytes=host.memory.available_bytes,
        ram_bandwidth_bytes_per_s=host.ram_bandwidth_bytes_per_s,
        cpu_cores=host.cpu_cores,
        driver=driver,
        findings=(*findings, *notes),
    )


def _rest_integrated(gpus: tuple[Gpu, ...]) -> tuple[tuple[Gpu, ...], tuple[Finding, ...]]:
    """Beside a card, the processor's own graphics are left to the desktop."""
    resting = [gpu for gpu in gpus if gpu.integrated]
    if not resting or len(resting) == len(gpus):
        return gpus, ()
    names = ", ".join(f"GPU {gpu.index} ({gpu.name})" for gpu in resting)
    finding = Finding(
        text=f"{names}: part of the processor, left to the desktop",
        hint="a rig profile may say enabled = true for it",
        usual=True,
    )
    return tuple(replace(gpu, enabled=gpu.enabled and not gpu.integrated) for gpu in gpus), (finding,)


def _gpu(index: int, listed: ListedDevice) -> Gpu:
    name = plain_name(listed.description)
    spec = find_spec(name, listed.total_bytes)
    vendor = spec.vendor if spec else _vendor(name, listed.device)
    integrated = spec is None and _INTEGRATED.search(name) is not None
    return Gpu(
        index=index,
        name=name,
        vendor=vendor,
        total_bytes=listed.total_bytes,
        free_bytes=listed.free_bytes,
        bandwidth_bytes_per_s=spec.bandwidth_bytes_per_s if spec else None,
        compute_capability=spec.compute_capability if spec else None,
        unified=vendor == "apple" or (spec is not None and spec.unified) or integrated or _is_tegra(name),
        integrated=integrated,
        device=listed.device,
        max_tensor_bytes=_LLVMPIPE_MAX_TENSOR if name.startswith("llvmpipe") else None,
    )


def _is_tegra(name: str) -> bool:
    """Jetson boards, as CUDA calls them."""
    return re.fullmatch(r"(?:NVIDIA )?(?:Orin|Xavier|Thor|Tegra \w+)", name) is not None


def _vendor(name: str, device: str) -> Vendor:
    for vendor, words in _VENDOR_WORDS:
        if re.search(words, name, re.IGNORECASE):
            return vendor
    return next((vendor for vendor, prefix in _VENDOR_DEVICES if device.startswith(prefix)), "unknown")
