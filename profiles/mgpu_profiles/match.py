"""A profile beside the machine it should describe: what differs, and the two made one. Pure."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from typing import Final, Literal

import msgspec
from msgspec import Struct

from mgpu.errors import ProfileError
from mgpu.rig import Gpu, Link, Measured, Rig
from mgpu.units import gib
from mgpu_profiles.gpus import plain_name

Severity = Literal["error", "note"]
DifferenceId = Literal["missing-card", "extra-card", "vram", "pcie", "link", "ram"]

#: One card, asked in two ways, may differ by this much: NVML counts what the driver keeps (2 %), CUDA and Vulkan do
#: not, and ECC takes some more.
SAME_SIZE: Final = 0.03

#: What firmware and an integrated GPU keep of the RAM that was bought.
SAME_RAM: Final = 0.10


class Difference(Struct, frozen=True, kw_only=True):
    """One thing a profile says that the machine does not. An "error": the profile does not stand for this machine."""

    id: DifferenceId
    severity: Severity
    text: str


def check(profile: Rig, machine: Rig) -> tuple[Difference, ...]:
    """What differs, errors first. A profile matches when no difference is an error.

    Cards are the same by UUID where the profile gives one, else by name and size, in whatever order.
    A profile's disabled cards may be missing.
    """
    pairs = _pairs(profile, machine)
    found = [
        *_cards(profile, machine, pairs),
        *(difference for wanted, card in pairs.values() for difference in _card(wanted, card)),
        *_links(profile, machine, pairs),
    ]
    if machine.ram_bytes < profile.ram_bytes * (1 - SAME_RAM):
        text = f"{gib(machine.ram_bytes)} of RAM; the profile says {gib(profile.ram_bytes)}"
        found.append(Difference(id="ram", severity="note", text=text))
    return tuple(sorted(found, key=lambda difference: difference.severity))  # "error" < "note"


def merge(profile: Rig, machine: Rig) -> Rig:
    """The machine as it is now, used as the profile says. Raises `ProfileError` when they do not match.

    Live from the machine: memory, identity, slots, processes. From the profile: its name, reserves, which cards are
    enabled, bandwidths, links, the power supply, and what was measured on cards that are here. A card that the profile
    does not name stays in the rig, disabled. Cards keep the machine's numbers.
    """
    errors = [difference.text for difference in check(profile, machine) if difference.severity == "error"]
    if errors:
        more = f" (and {len(errors) - 1} more)" if len(errors) > 1 else ""
        hint = f"`mgpu rig check {profile.name}` compares; with --dry-run or `mgpu plan`, a profile need not match"
        raise ProfileError(f"profile {profile.name!r} is not this machine: {errors[0]}{more}", hint=hint)
    pairs = _pairs(profile, machine)
    wanted_by_index = {card.index: wanted for wanted, card in pairs.values()}
    return msgspec.structs.replace(
        machine,
        name=profile.name,
        source="profile",
        gpus=tuple(_merged(card, wanted_by_index.get(card.index)) for card in machine.gpus),
        links=_merged_links(profile, machine, pairs),
        ram_bandwidth_bytes_per_s=profile.ram_bandwidth_bytes_per_s or machine.ram_bandwidth_bytes_per_s,
        cpu_cores=machine.cpu_cores or profile.cpu_cores,
        psu_watts=profile.psu_watts or machine.psu_watts,
        measured=_on_cards(profile.measured, {wanted: card.index for wanted, (_, card) in pairs.items()}),
    )


def as_profiled(profile: Rig, machine: Rig, measured: tuple[Measured, ...]) -> tuple[Measured, ...]:
    """What was measured on the machine's cards, by the numbers that they have in the profile that matches it.

    Figures of cards that the profile does not name are left out.
    """
    pairs = _pairs(profile, machine)
    return _on_cards(measured, {card.index: wanted for wanted, (_, card) in pairs.items()})


_Pairs = dict[int, tuple[Gpu, Gpu]]  # index in the profile -> its card there, and here


def _pairs(profile: Rig, machine: Rig) -> _Pairs:
    """Each card of the profile with one of the machine's: surest likeness first, so that none takes another's match."""
    likenesses: tuple[Callable[[Gpu, Gpu], bool], ...] = (
        lambda wanted, card: wanted.uuid is not None and wanted.uuid == card.uuid,
        lambda wanted, card: _alike(wanted, card) and _same_size(wanted, card) and wanted.pcie == card.pcie,
        lambda wanted, card: _alike(wanted, card) and _same_size(wanted, card),
        _alike,
    )
    left = list(machine.gpus)
    pairs: _Pairs = {}
    for like in likenesses:
        for wanted in profile.gpus:
            if wanted.index in pairs:
                continue
            card = next((card for card in left if like(wanted, card)), None)
            if card is not None:
                pairs[wanted.index] = (wanted, card)
                left.remove(card)
    return pairs


def _alike(wanted: Gpu, card: Gpu) -> bool:
    return wanted.uuid is None and _plain(wanted.name) == _plain(card.name)


def _plain(name: str) -> str:
    """One name for what drivers write in several ways: "GeForce RTX 3090", "AMD Radeon RX 7900 XTX (RADV NAVI31)"."""
    plain, _, _ = plain_name(name).casefold().partition(" (")
    return plain.removeprefix("nvidia ").removeprefix("amd ")


def _same_size(wanted: Gpu, card: Gpu) -> bool:
    return abs(wanted.total_bytes - card.total_bytes) <= wanted.total_bytes * SAME_SIZE


def _cards(profile: Rig, machine: Rig, pairs: _Pairs) -> list[Difference]:
    found: list[Difference] = []
    for wanted in profile.gpus:
        if wanted.index not in pairs:
            uuid = f" {wanted.uuid}" if wanted.uuid else ""
            text = f"gpu[{wanted.index}], {wanted.name} ({gib(wanted.total_bytes)}){uuid}, is not in this machine"
            found.append(Difference(id="missing-card", severity="error" if wanted.enabled else "note", text=text))
    here = {card.index for _, card in pairs.values()}
    for card in machine.gpus:
        if card.index not in here and not card.integrated:
            text = (
                f"GPU {card.index}, {card.name} ({gib(card.total_bytes)}), is not in the profile and will not be used"
            )
            found.append(Difference(id="extra-card", severity="note", text=text))
    return found


def _card(wanted: Gpu, card: Gpu) -> list[Difference]:
    found: list[Difference] = []
    if not _same_size(wanted, card):
        text = f"GPU {card.index}, {card.name}, has {gib(card.total_bytes)}; the profile says {gib(wanted.total_bytes)}"
        smaller = card.total_bytes < wanted.total_bytes and wanted.enabled
        found.append(Difference(id="vram", severity="error" if smaller else "note", text=text))
    if wanted.pcie and card.pcie and wanted.pcie != card.pcie:
        text = f"GPU {card.index}, {card.name}, has a PCIe {card.pcie} slot; the profile says {wanted.pcie}"
        found.append(Difference(id="pcie", severity="note", text=text))
    return found


def _links(profile: Rig, machine: Rig, pairs: _Pairs) -> list[Difference]:
    found: list[Difference] = []
    for one, other in itertools.combinations(sorted(pairs), 2):
        a, b = pairs[one][1].index, pairs[other][1].index
        here, said = machine.link(a, b), profile.link(one, other)
        if here != said:
            text = f"GPUs {a} and {b} are joined by {here}; the profile says {said}"
            found.append(Difference(id="link", severity="note", text=text))
    return found


def _merged(card: Gpu, wanted: Gpu | None) -> Gpu:
    if wanted is None:
        return msgspec.structs.replace(card, enabled=False)
    return msgspec.structs.replace(
        card,
        reserve_bytes=wanted.reserve_bytes,
        enabled=wanted.enabled and (card.enabled or _may_work(card)),
        bandwidth_bytes_per_s=wanted.bandwidth_bytes_per_s or card.bandwidth_bytes_per_s,
        pcie=card.pcie or wanted.pcie,
        power_limit_watts=card.power_limit_watts or wanted.power_limit_watts,
    )


def _on_cards(measured: tuple[Measured, ...], numbers: Mapping[int, int]) -> tuple[Measured, ...]:
    """The figures with each card's other number; those of cards that have none are dropped."""
    return tuple(
        msgspec.structs.replace(one, gpus=tuple(numbers[gpu] for gpu in one.gpus))
        for one in measured
        if numbers.keys() >= set(one.gpus)
    )


def _may_work(card: Gpu) -> bool:
    """Integrated GPUs rest beside other cards until a profile says otherwise, if the runtime has a name for them."""
    return card.integrated and card.device is not None


def _merged_links(profile: Rig, machine: Rig, pairs: _Pairs) -> tuple[Link, ...]:
    """The profile's links, by the machine's numbers; for other pairs, their way over PCIe alone."""
    here = {link.gpus: link for link in machine.links}
    links = {pair: Link(gpus=pair, kind="pcie", path=link.path) for pair, link in here.items() if link.path}
    for link in profile.links:
        if pairs.keys() >= set(link.gpus):
            a, b = sorted(pairs[index][1].index for index in link.gpus)
            path = here[a, b].path if (a, b) in here else ""
            links[a, b] = msgspec.structs.replace(link, gpus=(a, b), path=path or link.path)
    return tuple(links[pair] for pair in sorted(links))
