"""How NVIDIA's cards are kept: power, faults, P2P, links. For `mgpu doctor`: nothing is planned by it."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any, Final

from msgspec import Struct

from mgpu.detect.nvml import (
    FUNCTION_NOT_FOUND,
    INVALID_ARGUMENT,
    NOT_SUPPORTED,
    NVLINK_MAX_LINKS,
    P2P_CAPS_INDEX_NVLINK,
    P2P_CAPS_INDEX_READ,
    NoAnswerError,
    Nvml,
    decode,
)
from mgpu.detect.sysfs import plain_address

# `nvmlClocksEventReasons` of nvml.h that are no choice of the owner's.
SLOWED_BY_HARDWARE: Final = 0x08
SLOWED_BY_HEAT: Final = 0x20 | 0x40
SLOWED_BY_POWER_BRAKE: Final = 0x80

_UNCORRECTED: Final = 1  # nvmlMemoryErrorType_t
_SINCE_BOOT: Final = 0  # nvmlEccCounterType_t, "volatile"


class CardState(Struct, frozen=True, kw_only=True):
    """One card. What the driver does not tell is None. `slowed`: bits of `nvmlClocksEventReasons`.

    `nvlinks`: for each link that the card has, whether it is active. `uncorrected`: memory errors since boot.
    `repair`: faulty rows wait for a reset to be replaced, and that some could not be.
    """

    index: int
    name: str
    address: str = ""  # as /sys writes it
    compute_capability: tuple[int, int] | None = None
    total_bytes: int | None = None
    bar1_bytes: int | None = None
    persistence: bool | None = None
    ecc: bool | None = None
    uncorrected: int | None = None
    repair: tuple[bool, bool] = (False, False)
    power_limit_watts: int | None = None
    power_default_watts: int | None = None
    slowed: int = 0
    nvlinks: tuple[bool, ...] = ()


class PairState(Struct, frozen=True, kw_only=True):
    """Two cards, by NVML's numbers. `nvmlGpuP2PStatus_t` of reading over PCIe, and over NVLink; 0 is "OK"."""

    gpus: tuple[int, int]
    read: int | None
    nvlink: int | None


class NvidiaState(Struct, frozen=True, kw_only=True):
    """`driver` is "580.95.05", `cuda` (13, 0); empty and None where the driver does not tell."""

    driver: str = ""
    cuda: tuple[int, int] | None = None
    cards: tuple[CardState, ...] = ()
    pairs: tuple[PairState, ...] = ()


def read_state(nvml: Nvml) -> NvidiaState:
    """Of an open library: every card that can be read. Never raises for driver trouble."""
    count = nvml.ask("DeviceGetCount") or 0
    handles = {index: nvml.ask("DeviceGetHandleByIndex", index) for index in range(count)}
    known = {index: handle for index, handle in handles.items() if handle is not None}
    cuda = nvml.ask("SystemGetCudaDriverVersion_v2")
    return NvidiaState(
        driver=nvml.ask("SystemGetDriverVersion") or "",
        cuda=(cuda // 1000, cuda % 1000 // 10) if cuda else None,
        cards=tuple(_card(nvml, index, handle) for index, handle in known.items()),
        pairs=tuple(
            PairState(
                gpus=(a, b),
                read=nvml.ask("DeviceGetP2PStatus", known[a], known[b], P2P_CAPS_INDEX_READ),
                nvlink=nvml.ask("DeviceGetP2PStatus", known[a], known[b], P2P_CAPS_INDEX_NVLINK),
            )
            for a, b in itertools.combinations(sorted(known), 2)
        ),
    )


def _card(nvml: Nvml, index: int, handle: Any) -> CardState:
    pci = nvml.ask("DeviceGetPciInfo", handle)
    memory = nvml.ask("DeviceGetMemoryInfo", handle)
    bar1 = nvml.ask("DeviceGetBAR1MemoryInfo", handle)
    capability = nvml.ask("DeviceGetCudaComputeCapability", handle)
    ecc = nvml.ask("DeviceGetEccMode", handle)  # [now, after a reset]
    return CardState(
        index=index,
        name=nvml.ask("DeviceGetName", handle) or "NVIDIA GPU",
        address=plain_address(decode(pci.busId)) if pci else "",
        compute_capability=tuple(capability) if capability else None,
        total_bytes=memory.total if memory else None,
        bar1_bytes=bar1.bar1Total if bar1 else None,
        persistence=_flag(nvml.ask("DeviceGetPersistenceMode", handle)),
        ecc=_flag(ecc[0]) if ecc else None,
        uncorrected=nvml.ask("DeviceGetTotalEccErrors", handle, _UNCORRECTED, _SINCE_BOOT),
        repair=_repair(nvml.ask("DeviceGetRemappedRows", handle)),
        power_limit_watts=_watts(nvml.ask("DeviceGetPowerManagementLimit", handle)),
        power_default_watts=_watts(nvml.ask("DeviceGetPowerManagementDefaultLimit", handle)),
        slowed=nvml.ask("DeviceGetCurrentClocksEventReasons", handle)  # its name since driver 535
        or nvml.ask("DeviceGetCurrentClocksThrottleReasons", handle)
        or 0,
        nvlinks=tuple(_nvlinks(nvml, handle)),
    )


def _flag(value: int | None) -> bool | None:
    return None if value is None else value == 1


def _watts(milliwatts: int | None) -> int | None:
    return milliwatts // 1000 if milliwatts else None


def _repair(rows: Any) -> tuple[bool, bool]:
    """From (corrected, uncorrected, pending, failed), as the binding returns `nvmlDeviceGetRemappedRows`."""
    return (bool(rows[2]), bool(rows[3])) if rows else (False, False)


def _nvlinks(nvml: Nvml, handle: Any) -> Iterator[bool]:
    for link in range(NVLINK_MAX_LINKS):
        try:
            yield nvml.call("DeviceGetNvLinkState", handle, link) == 1
        except NoAnswerError as error:
            if error.code in {NOT_SUPPORTED, INVALID_ARGUMENT, FUNCTION_NOT_FOUND}:  # no NVLink, or past the last
                return
            yield False
