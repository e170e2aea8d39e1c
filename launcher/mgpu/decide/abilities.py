"""What a runtime can do on a rig, before there is a model: the live half of `mgpu runtimes`. Pure."""

from __future__ import annotations

from collections.abc import Iterator

from msgspec.structs import replace

from mgpu.adapter import Adapter, Here
from mgpu.decide.matched import matched_sets, slow_slots, why_unmatched
from mgpu.plan import Mode
from mgpu.rig import Gpu, Rig, short_name


def only_usable(adapter: Adapter, rig: Rig) -> Rig:
    """`rig` with the cards disabled that `adapter`'s runtime has no use for, as `Adapter.bind` does it on the spot."""
    gpus = tuple(replace(gpu, enabled=gpu.enabled and adapter.why_not_gpu(gpu) is None) for gpu in rig.gpus)
    return replace(rig, gpus=gpus)


def abilities_on(adapter: Adapter, rig: Rig, bound: Rig | None = None, *, cpu_build: bool = False) -> Here:
    """What `adapter`'s runtime can do on `rig`. `bound`: the rig as an installed build of it can use it.

    `cpu_build`: as in `Installed`.
    """
    if adapter.abilities.machines:
        return Here(gpus=(), modes=())  # it counts other machines' memory, and places by itself
    if cpu_build:
        return Here(gpus=(), modes=(), why_not=("it was built for the CPU alone",) if rig.gpus else ())
    cards = _usable(adapter, bound or rig)
    told = tuple(_why_not_cards(adapter, rig, cards))
    modes, why_not = _modes(adapter, cards, rig)
    return Here(gpus=tuple(gpu.index for gpu in cards), modes=modes, why_not=(*told, *why_not))


def _usable(adapter: Adapter, rig: Rig) -> tuple[Gpu, ...]:
    return tuple(gpu for gpu in only_usable(adapter, rig).gpus if gpu.enabled)


def _why_not_cards(adapter: Adapter, rig: Rig, cards: tuple[Gpu, ...]) -> Iterator[str]:
    """A line for each card that is out of the runtime's reach; one that a profile disables is nobody's fault."""
    used = {gpu.index for gpu in cards}
    for gpu in rig.gpus:
        if gpu.enabled and gpu.index not in used:
            reason = adapter.why_not_gpu(gpu) or "this build of it lists no such device"
            yield f"GPU {gpu.index} ({short_name(gpu.name)}): {reason}"
    if not cards and not adapter.abilities.cpu:
        yield "it needs a GPU" if not rig.gpus else "no card of this rig is one it can use"


def _modes(adapter: Adapter, cards: tuple[Gpu, ...], rig: Rig) -> tuple[tuple[Mode, ...], tuple[str, ...]]:
    """How these cards can share, and what rules the other ways out. One card has nobody to share with."""
    if len(cards) < 2:
        return (), ()
    reasons = {mode: _why_not_mode(adapter, mode, cards, rig) for mode in adapter.abilities.modes}
    modes = tuple(mode for mode, reason in reasons.items() if reason is None)
    return modes, tuple(f"no {_WORDS[mode]}: {reason}" for mode, reason in reasons.items() if reason is not None)


_WORDS: dict[Mode, str] = {"pipeline": "split by layers", "tensor": "tensor ranks", "replicas": "replicas"}


def _why_not_mode(adapter: Adapter, mode: Mode, cards: tuple[Gpu, ...], rig: Rig) -> str | None:
    """What is against `mode` on every set of these cards; None where one set will do."""
    if mode not in adapter.abilities.mixed:
        sets = list(matched_sets(cards, rig, paying=False))
        if not sets:
            return why_unmatched(cards)
        if mode == "tensor" and not any(True for _ in matched_sets(cards, rig)):
            return _slow_link(sets[0])
    return None


def _slow_link(cards: tuple[Gpu, ...]) -> str:
    slow = slow_slots(cards)
    if slow:
        return f"GPU {slow[0].index} is in a PCIe {slow[0].pcie} slot"
    slots = {str(gpu.pcie) for gpu in cards if gpu.pcie is not None}
    known = f"PCIe {min(slots)}" if slots else "a link of unknown speed"
    return f"{known} is too slow a link for it; NVLink, P2P or PCIe 4.0 x8 would do"
