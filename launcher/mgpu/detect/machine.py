"""This machine as a `Rig`: the vendors' own drivers first, then whatever the installed runtime says it can use."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Mapping
from typing import Final

from mgpu.adapter import ListedDevice
from mgpu.detect.host import Host, read_host
from mgpu.detect.visible import apply_cuda_visible
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
)

#: Mesa's software Vulkan device: lavapipe's maxStorageBufferRange (llama.cpp keeps larger tensors off the device).
_LLVMPIPE_MAX_TENSOR: Final = 1 << 27


def detect_rig(environ: Mapping[str, str], *, listed: Callable[[], tuple[ListedDevice, ...]] | None = None) -> Rig:
    """What there is to run models on, now. A machine without a GPU is a rig with `gpus=()`.

    `environ` is the caller's environment: its CUDA_VISIBLE_DEVICES is respected. `listed` asks the installed runtime
    for its devices; it is called only where no vendor's driver knows a GPU.
    """
    host = read_host()
    if sys.platform == "darwin":  # no NVIDIA driver since macOS 10.14
        return rig_from_listed(listed(), host) if listed else _rig(host)
    from mgpu.detect.nvidia import probe_nvidia

    probe = probe_nvidia()
    if probe.gpus:
        gpus, notes = apply_cuda_visible(
            environ.get("CUDA_VISIBLE_DEVICES"), probe.gpus, device_order=environ.get("CUDA_DEVICE_ORDER")
        )
        indices = {gpu.index for gpu in gpus}
        links = tuple(link for link in probe.links if indices.issuperset(link.gpus))
        return _rig(host, gpus=gpus, links=links, driver=probe.driver, findings=(*probe.findings, *notes))
    devices = listed() if listed else ()
    # With GPUs of another make there is nothing amiss in having no NVIDIA driver.
    findings = () if devices and probe.state == "no-driver" else probe.findings
    return rig_from_listed(devices, host, findings=findings, driver=probe.driver)


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
    return Rig(
        name=NAME,
        source="detected",
        gpus=gpus,
        links=links,
        ram_bytes=host.memory.total_bytes,
        ram_free_bytes=host.memory.available_bytes,
        cpu_cores=host.cpu_cores,
        driver=driver,
        findings=findings,
    )


def _gpu(index: int, listed: ListedDevice) -> Gpu:
    name = plain_name(listed.description)
    spec = find_spec(name, listed.total_bytes)
    vendor = spec.vendor if spec else _vendor(name, listed.device)
    return Gpu(
        index=index,
        name=name,
        vendor=vendor,
        total_bytes=listed.total_bytes,
        free_bytes=listed.free_bytes,
        bandwidth_bytes_per_s=spec.bandwidth_bytes_per_s if spec else None,
        compute_capability=spec.compute_capability if spec else None,
        unified=vendor == "apple" or (spec is not None and spec.unified) or _INTEGRATED.search(name) is not None,
        device=listed.device,
        max_tensor_bytes=_LLVMPIPE_MAX_TENSOR if name.startswith("llvmpipe") else None,
    )


def _vendor(name: str, device: str) -> Vendor:
    for vendor, words in _VENDOR_WORDS:
        if re.search(words, name, re.IGNORECASE):
            return vendor
    return next((vendor for vendor, prefix in _VENDOR_DEVICES if device.startswith(prefix)), "unknown")
