"""When a row of `mgpu.doctor.checks.troubles` is about a machine."""

from __future__ import annotations

import re

from msgspec import Struct

from mgpu.doctor.facts import Facts, Program
from mgpu.doctor.finding import Severity
from mgpu.rig import Gpu, Vendor
from mgpu_adapters.llamacpp.work import build_number

Version = tuple[int, ...]


class Known(Struct, frozen=True, kw_only=True):
    """One row. It applies to `runtime` from version `since` until before `before` (build numbers of llama.cpp), on a
    machine where all the rest holds.

    `cards`: at least so many, beside integrated ones. `vendors`: all of them are there. `name`: of so many cards, this
    is in their names. `mixed`: of different memory or compute capability. `below`: a card below this compute
    capability is there. `driver_below`: NVIDIA's. `p2p`: a link between cards other than plain PCIe, none of them an
    NVLink. `variable`: (name, pattern of its value). `origin`: is in where the runtime was found. `lacks`: of the CPU.
    """

    id: str
    runtime: str
    severity: Severity
    text: str
    fix: str
    source: str
    since: Version = ()
    before: Version = ()
    cards: int = 0
    vendors: tuple[Vendor, ...] = ()
    name: str = ""
    mixed: bool = False
    below: Version = ()
    driver_below: Version = ()
    p2p: bool = False
    variable: tuple[str, str] | None = None
    origin: str = ""
    lacks: str = ""


def applies(known: Known, program: Program, facts: Facts) -> bool:
    """Whether a row is about this runtime on this machine."""
    if program.runtime != known.runtime or program.installed is None:
        return False
    return (
        _in_versions(known, version_of(program)) and _about_cards(known, facts) and _about_rest(known, program, facts)
    )


def version_of(program: Program) -> Version:
    """As numbers; of llama.cpp its build; empty where it is not told."""
    version = program.installed.version if program.installed else ""
    if program.runtime == "llama.cpp":
        build = build_number(version)
        return () if build is None else (build,)
    found = re.findall(r"\d{1,6}(?:\.\d{1,6})+", version)
    return tuple(int(part) for part in found[-1].split(".")) if found else ()


def _in_versions(known: Known, version: Version) -> bool:
    """An unknown version is not held against anybody, where it matters."""
    if not version:
        return not known.since and not known.before
    return version >= known.since and (not known.before or version < known.before)


def _about_cards(known: Known, facts: Facts) -> bool:
    cards = tuple(gpu for gpu in facts.cards.rig.gpus if gpu.enabled and not gpu.integrated)
    named = [gpu for gpu in cards if known.name in gpu.name]
    return (
        len(named) >= known.cards
        and set(known.vendors) <= {gpu.vendor for gpu in cards}
        and (not known.mixed or _is_mixed(cards))
        and (not known.below or any(capability < known.below for gpu in cards if (capability := _capability(gpu))))
        and (not known.p2p or _has_p2p_alone(facts))
    )


def _about_rest(known: Known, program: Program, facts: Facts) -> bool:
    state = facts.cards.nvidia
    driver = tuple(int(part) for part in re.findall(r"\d+", state.driver)) if state else ()
    variable = known.variable
    return (
        (not known.driver_below or (driver != () and driver < known.driver_below))
        and (variable is None or re.search(variable[1], facts.environ.get(variable[0], "")) is not None)
        and known.origin in (program.installed.origin + program.installed.executable if program.installed else "")
        and (not known.lacks or (facts.host.cpu_flags != frozenset() and known.lacks not in facts.host.cpu_flags))
    )


def _is_mixed(cards: tuple[Gpu, ...]) -> bool:
    kinds = {(gpu.compute_capability, round(gpu.total_bytes / 2**30)) for gpu in cards}
    return len(kinds) > 1


def _capability(gpu: Gpu) -> Version:
    """NVIDIA's; AMD's "gfx1100" is none."""
    parts = (gpu.compute_capability or "").split(".")
    return tuple(int(part) for part in parts) if all(part.isdecimal() for part in parts) else ()


def _has_p2p_alone(facts: Facts) -> bool:
    kinds = {link.kind for link in facts.cards.rig.links}
    return "pcie-p2p" in kinds and "nvlink" not in kinds
