"""How the cards are kept, and who else is on them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from mgpu.detect.nvidia_state import SLOWED_BY_HARDWARE, SLOWED_BY_HEAT, SLOWED_BY_POWER_BRAKE, CardState
from mgpu.doctor.facts import Facts
from mgpu.doctor.finding import Finding, ok
from mgpu.rig import Gpu, short_name
from mgpu.units import GIB, gib, gib_of

#: A power limit below this share of the card's own is worth a word.
_LEAST_POWER: Final = 0.75

#: Held memory: of the card, from which on it is in the way; and below which it is a desktop's.
_IN_THE_WAY: Final = 0.25
_NOBODY: Final = GIB

#: What the rest of a machine draws (the guide's rule `psu`), in watts.
_REST_WATTS: Final = 150


def persistence(facts: Facts) -> Iterator[Finding]:
    """Without it the driver unloads when nobody looks, and takes seconds for each card to come back."""
    off = [card for card in _states(facts) if card.persistence is False]
    if not off:
        if any(card.persistence for card in _states(facts)):
            yield ok("cards", "persistence", "persistence mode is on")
        return
    if facts.host.wsl or any(gpu.display for gpu in facts.cards.rig.gpus if gpu.vendor == "nvidia"):
        return  # a desktop keeps the driver awake
    yield Finding(
        severity="note",
        area="cards",
        id="persistence",
        text=f"persistence mode is off on {_numbers(off)}: the first to ask waits some seconds for each card",
        fix="sudo nvidia-smi -pm 1, or for good: sudo systemctl enable --now nvidia-persistenced",
        source="NVIDIA: Driver Persistence",
    )


def power_limit(facts: Facts) -> Iterator[Finding]:
    """A lowered limit is often wise, and forgotten as often."""
    for card in _states(facts):
        limit, own = card.power_limit_watts, card.power_default_watts
        if limit is None or own is None:
            continue
        if limit >= own * _LEAST_POWER:
            yield ok("cards", "power-limit", f"GPU {card.index}: {limit} of {own} W")
            continue
        yield Finding(
            severity="note",
            area="cards",
            id="power-limit",
            text=f"GPU {card.index} ({card.name}) may draw {limit} of its {own} W: prompts are slower, answers hardly",
            fix=f"sudo nvidia-smi -i {card.index} -pl {own} gives it all back",
        )


def held_back(facts: Facts) -> Iterator[Finding]:
    """Heat and power brakes."""
    words = (
        (SLOWED_BY_HEAT, "heat", "clean the fans, give it air; memory pads age, too"),
        (SLOWED_BY_POWER_BRAKE, "the power brake", "see the power supply and its cables"),
        (SLOWED_BY_HARDWARE, "its hardware protection", "see cooling, power supply and cables: nvidia-smi -q -d CLOCK"),
    )
    for card in _states(facts):
        why = next(((cause, fix) for bits, cause, fix in words if card.slowed & bits), None)
        if why is not None:
            text = f"GPU {card.index} ({card.name}) is held back by {why[0]} right now"
            yield Finding(severity="warning", area="cards", id="held-back", text=text, fix=why[1])


def faults(facts: Facts) -> Iterator[Finding]:
    """Memory errors that could not be corrected."""
    for card in _states(facts):
        subject = f"GPU {card.index} ({card.name})"
        pending, failed = card.repair
        if failed or (card.uncorrected or 0) > 0:
            text = f"{subject}: {card.uncorrected or 0} memory errors since boot that could not be corrected"
            text += "; faulty rows are left that cannot be replaced" if failed else ""
            fix = f"sudo nvidia-smi -i {card.index} -r; if they come back, the card is dying"
            yield Finding(severity="error", area="cards", id="memory-errors", text=text, fix=fix)
        elif pending:
            text = f"{subject}: faulty memory waits to be replaced by spare rows"
            fix = f"sudo nvidia-smi -i {card.index} -r, with nobody on the card"
            yield Finding(severity="warning", area="cards", id="memory-errors", text=text, fix=fix)
        elif card.uncorrected == 0:
            yield ok("cards", "memory-errors", f"GPU {card.index}: none since boot")


def ecc(facts: Facts) -> Iterator[Finding]:
    """On cards without memory for it, ECC takes a share of the VRAM and of the bandwidth."""
    for card in _states(facts):
        if card.ecc and not any(word in card.name for word in ("H100", "H200", "A100", "B200", "GH200", "V100")):
            yield Finding(
                severity="note",
                area="cards",
                id="ecc",
                text=f"ECC is on on GPU {card.index} ({card.name}): with GDDR memory it costs some of it, and speed",
                fix=f"sudo nvidia-smi -i {card.index} -e 0, then reboot; leave it on where results matter more",
                source="nvidia-smi manual, ECC mode",
            )


def held(facts: Facts) -> Iterator[Finding]:
    """Other programs' memory."""
    for gpu in facts.cards.rig.gpus:
        if gpu.unified or not gpu.total_bytes:
            continue
        used = gpu.total_bytes - gpu.free_bytes
        if used < max(_NOBODY, gpu.total_bytes * _IN_THE_WAY):
            yield ok("cards", "held", f"GPU {gpu.index}: {gib_of(gpu.free_bytes, gpu.total_bytes)} free")
            continue
        who = ", ".join(gpu.processes) or "processes that cannot be seen from here"
        text = f"{gib_of(used, gpu.total_bytes)} of GPU {gpu.index} ({short_name(gpu.name)}) are held by {who}"
        yield Finding(severity="warning", area="cards", id="held", text=text, fix=_way_out(gpu))


def power_supply(facts: Facts) -> Iterator[Finding]:
    """The cards' limits and the rest, against what the default profile says of the supply."""
    watts, limits = facts.own.psu_watts, [gpu.power_limit_watts for gpu in facts.cards.rig.gpus if gpu.enabled]
    if not watts or not limits or None in limits:
        return
    drawn = sum(limit or 0 for limit in limits) + _REST_WATTS
    if drawn <= watts:
        yield ok("cards", "power-supply", f"{drawn} of {watts} W")
        return
    yield Finding(
        severity="warning",
        area="cards",
        id="power-supply",
        text=f"all cards at their limits and {_REST_WATTS} W for the rest are {drawn} W; the supply has {watts} W",
        fix="lower the limits: sudo nvidia-smi -pl WATTS (they are set anew at each boot)",
        source="the guide's rule `psu`",
    )


def _way_out(gpu: Gpu) -> str:
    names = " ".join(gpu.processes)
    if "ollama" in names or "llama-server" in names:
        return "ollama ps, ollama stop MODEL; or mgpu ps, mgpu stop NAME"
    if gpu.processes:
        return f"end it, or leave it there: mgpu plans with the {gib(gpu.free_bytes)} that are free"
    return "sudo fuser -v /dev/nvidia* /dev/dri/render* names them; a killed container may have left some"


def _states(facts: Facts) -> tuple[CardState, ...]:
    return facts.cards.nvidia.cards if facts.cards.nvidia else ()


def _numbers(cards: list[CardState]) -> str:
    return ", ".join(f"GPU {card.index}" for card in cards)


CHECKS: Final = (persistence, power_limit, held_back, faults, ecc, held, power_supply)
