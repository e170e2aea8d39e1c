"""Graphics cards that are in the machine, and that no driver can run models on."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Final

from mgpu.detect.sysfs import AMD, INTEL, NVIDIA, driver_of, list_names, order, read_number
from mgpu.rig import Finding

#: The upper byte of a PCI class.
_DISPLAY: Final = 0x03

_VENDORS: Final = {NVIDIA: "NVIDIA", AMD: "AMD", INTEL: "Intel"}

_INSTALL: Final = {
    NVIDIA: "install NVIDIA's driver, or load it: sudo modprobe nvidia (with Secure Boot it must be signed)",
    AMD: "load the driver: sudo modprobe amdgpu; a new card may need a newer kernel",
    INTEL: "load the driver: sudo modprobe xe (or i915); a new card may need a newer kernel",
}

#: Drivers that are of no use here, and what to do about each.
_USELESS: Final = {
    "nouveau": ("runs with nouveau, which cannot run models", "install NVIDIA's own driver, then reboot"),
    "radeon": (
        "runs with the radeon driver, which cannot run models",
        "use amdgpu: amdgpu.si_support=1 or a newer card",
    ),
    "vfio-pci": ("is set aside for virtual machines (vfio-pci)", "give it back to its own driver to use it here"),
    "pci-stub": ("is set aside for virtual machines (pci-stub)", "give it back to its own driver to use it here"),
}


def unclaimed_cards(root: Path, *, has_nvml: bool) -> Iterator[Finding]:
    """One for each card of NVIDIA, AMD or Intel that cannot be used, and why. The processor's own graphics are no loss.

    `has_nvml`: NVIDIA's library answers, so whatever is amiss with its cards, it says itself.
    """
    folder = root / "sys/bus/pci/devices"
    for address in sorted(list_names(folder), key=order):
        device = folder / address
        if order(address)[1:3] == (0, 2) or (read_number(device / "class") or 0) >> 16 != _DISPLAY:
            continue
        vendor = read_number(device / "vendor") or 0
        said = _trouble(vendor, driver_of(device), has_nvml=has_nvml) if vendor in _VENDORS else None
        if said is not None:
            name = f"{_VENDORS[vendor]} GPU [{vendor:04x}:{read_number(device / 'device') or 0:04x}] at {address}"
            yield Finding(text=f"{name} {said[0]}", hint=said[1])


def _trouble(vendor: int, driver: str, *, has_nvml: bool) -> tuple[str, str] | None:
    if not driver:
        return "has no driver", _INSTALL[vendor]
    if driver == "nvidia" and not has_nvml:
        return "cannot be used: there is no libnvidia-ml.so.1", "start a container with --gpus all"
    return _USELESS.get(driver)
