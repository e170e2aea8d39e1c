"""The drivers: there, whole, new enough for today's runtimes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from mgpu.doctor.facts import Facts
from mgpu.doctor.finding import Finding, Severity, ok
from mgpu.rig import Vendor

#: NVIDIA's branches: the first for CUDA 12 and 13 with minor-version compatibility, the last for Maxwell to Volta.
_CUDA_12: Final = 525
_CUDA_13: Final = 580
_LAST_FOR_OLD: Final = 580
_OLD: Final = (7, 5)

_MORE: Final = "`mgpu rig show` tells more"
_SUPPORT: Final = "NVIDIA: Supported Drivers and CUDA Toolkit Versions"
_DEPRECATED: Final = "NVIDIA: Unix graphics feature deprecation schedule; CUDA 13.0 release notes"


def as_detected(facts: Facts) -> Iterator[Finding]:
    """What detection itself has to say: no driver, a mismatch, a card that is lost, a slow slot, hidden cards."""
    rig = facts.cards.rig
    dead = {card.vendor for card in facts.cards.graphics} - {gpu.vendor for gpu in rig.gpus}
    for found in rig.findings:
        severity: Severity = "note" if found.usual else "warning"
        if not facts.cards.graphics and not rig.gpus:
            severity = "note"
        elif dead and not found.usual and "runs at PCIe" not in found.text:
            severity = "error"
        yield Finding(severity=severity, area="cards", id="as-detected", text=found.text, fix=found.hint or _MORE)
    if not any(not found.usual for found in rig.findings):
        what = ", ".join(f"GPU {gpu.index} {gpu.name}" for gpu in rig.gpus) or "no GPU: models run on the CPU"
        yield ok("cards", "as-detected", what)


def module_and_libraries(facts: Facts) -> Iterator[Finding]:
    """After an upgrade the old kernel module stays until it is reloaded."""
    module, libraries = facts.cards.module, facts.cards.libraries
    if not module or not libraries:
        return
    if module in libraries:
        yield ok("driver", "driver-versions", f"NVIDIA {module}, module and libraries")
        return
    yield Finding(
        severity="error",
        area="driver",
        id="driver-versions",
        text=f"the NVIDIA kernel module is {module}, its libraries are {', '.join(libraries)}",
        fix="reboot (or unload and load the nvidia modules); in a container: restart it after the host's upgrade",
        source="nvml.h, NVML_ERROR_LIB_RM_VERSION_MISMATCH",
    )


def nouveau(facts: Facts) -> Iterator[Finding]:
    """Loaded, it may take a card before NVIDIA's driver does."""
    if not _has(facts, "nvidia"):
        return
    if not facts.cards.nouveau:
        yield ok("driver", "nouveau", "nouveau is not loaded")
        return
    yield Finding(
        severity="warning",
        area="driver",
        id="nouveau",
        text="the nouveau driver is loaded: it cannot run models, and holds cards that NVIDIA's driver could use",
        fix="echo 'blacklist nouveau' | sudo tee /etc/modprobe.d/nouveau.conf; sudo update-initramfs -u; reboot",
    )


def cuda_version(facts: Facts) -> Iterator[Finding]:
    """What today's builds of the runtimes are made for."""
    state = facts.cards.nvidia
    branch = _branch(state.driver) if state else None
    if state is None or branch is None:
        return
    cuda = f" (CUDA {state.cuda[0]}.{state.cuda[1]})" if state.cuda else ""
    if branch < _CUDA_12:
        yield Finding(
            severity="warning",
            area="driver",
            id="driver-cuda",
            text=f"NVIDIA driver {state.driver}{cuda} is too old for runtimes built for CUDA 12",
            fix=f"install driver {_CUDA_13} or newer",
            source=_SUPPORT,
        )
    elif branch < _CUDA_13:
        yield Finding(
            severity="note",
            area="driver",
            id="driver-cuda",
            text=f"NVIDIA driver {state.driver}{cuda} runs what is built for CUDA 12, and nothing built for CUDA 13",
            fix=f"take builds for CUDA 12 (cu12…), or install driver {_CUDA_13} or newer",
            source=_SUPPORT,
        )
    else:
        yield ok("driver", "driver-cuda", f"NVIDIA driver {state.driver}{cuda}")


def old_cards(facts: Facts) -> Iterator[Finding]:
    """Maxwell, Pascal and Volta: their last driver, and no CUDA 13."""
    state = facts.cards.nvidia
    old = [card for card in state.cards if card.compute_capability and card.compute_capability < _OLD] if state else []
    if not old:
        return
    names = ", ".join(f"GPU {card.index} ({card.name})" for card in old)
    yield Finding(
        severity="note",
        area="driver",
        id="old-cards",
        text=f"{names}: driver branch {_LAST_FOR_OLD} is the last for compute capability below 7.5, CUDA 12 too",
        fix=f"stay on driver {_LAST_FOR_OLD}, and take builds of the runtimes for CUDA 12",
        source=_DEPRECATED,
    )


def wsl(facts: Facts) -> Iterator[Finding]:
    """Windows' driver hides much from what runs below it."""
    if facts.host.wsl and facts.cards.rig.gpus:
        yield Finding(
            severity="note",
            area="driver",
            id="wsl",
            text="below WSL 2 the driver tells no processes, no P2P and no NVLink; too large a model spills into RAM",
            fix="in Windows' NVIDIA settings: CUDA - Sysmem Fallback Policy: Prefer No Sysmem Fallback",
            source="NVIDIA: CUDA on WSL user guide",
        )


def _has(facts: Facts, vendor: Vendor) -> bool:
    return any(card.vendor == vendor for card in facts.cards.graphics)


def _branch(version: str) -> int | None:
    first = version.partition(".")[0]
    return int(first) if first.isdecimal() and first.isascii() else None


CHECKS: Final = (as_detected, module_and_libraries, nouveau, cuda_version, old_cards, wsl)
