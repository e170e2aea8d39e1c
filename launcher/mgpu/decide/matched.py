"""Which cards may work as tensor ranks: matched ones, over links that pay. Rule `tensor-when-matched`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import combinations
from typing import Final

from mgpu.rig import Gpu, LinkKind, Pcie, Rig

#: PCIe 4.0 x8, in lanes of the first generation: what a link must have for its waits to pay (`tensor-when-matched`).
_PAYS: Final = 8 * 2**3

#: Slots that are too slow for tensor ranks whoever asks (rule `slow-slot`): fewer lanes, or an older generation.
_LEAST_WIDTH: Final = 8
_LEAST_GEN: Final = 3

#: Of up to so many matched cards, every set is looked at.
_FEW: Final = 8

#: Cards of one model differ by what the driver keeps for itself.
_SAME_MEMORY: Final = 0.02


def matched_sets(gpus: Sequence[Gpu], rig: Rig, *, paying: bool = True) -> Iterator[tuple[Gpu, ...]]:
    """Sets of two and more matched cards, fewest first; of interchangeable sets, the best linked.

    `paying`: only those whose links pay.
    """
    ways = _Ways(rig)
    groups = [_best_sets(group, ways) for group in _groups(gpus) if len(group) > 1]
    for size in range(2, max(map(len, groups), default=0) + 2):
        for best in groups:
            if size in best and (link_pays(best[size], rig) or not paying):
                yield best[size]


class _Ways(dict[tuple[int, int], LinkKind]):
    """How cards reach each other, by rig indices, smaller first; plain PCIe where nobody says."""

    def __init__(self, rig: Rig) -> None:
        super().__init__({link.gpus: link.kind for link in reversed(rig.links)})

    def __missing__(self, pair: tuple[int, int]) -> LinkKind:
        return "pcie"


def _best_sets(group: Sequence[Gpu], ways: _Ways) -> dict[int, tuple[Gpu, ...]]:
    """By size, the best linked set of a group. Of many cards, each is the next larger one without its worst card."""
    sizes = range(2, len(group) + 1)
    if len(group) <= _FEW:
        return {size: min(combinations(group, size), key=lambda cards: _rank(cards, ways)) for size in sizes}
    best = {len(group): tuple(group)}
    for size in reversed(sizes[:-1]):
        best[size] = min(combinations(best[size + 1], size), key=lambda cards: _rank(cards, ways))
    return best


def _groups(gpus: Sequence[Gpu]) -> list[list[Gpu]]:
    groups: list[list[Gpu]] = []
    for gpu in gpus:
        home = next((group for group in groups if why_unmatched((group[0], gpu)) is None), None)
        if home is None:
            groups.append([gpu])
        else:
            home.append(gpu)
    return groups


def _rank(cards: Sequence[Gpu], ways: _Ways) -> tuple[float, ...]:
    """Smallest first: cards in slow slots, pairs without NVLink or any direct way, the fullest card, the indices."""
    kinds = [ways[a.index, b.index] for a, b in combinations(cards, 2)]
    apart = sum(kind != "nvlink" for kind in kinds), sum(kind == "pcie" for kind in kinds)
    return len(slow_slots(cards)), *apart, -min(gpu.usable_bytes for gpu in cards), sum(gpu.index for gpu in cards)


def why_unmatched(gpus: Sequence[Gpu]) -> str | None:
    """How these cards differ in what tensor ranks must have in common; None where they do not."""
    first = gpus[0]
    for other in gpus[1:]:
        if abs(other.total_bytes - first.total_bytes) > _SAME_MEMORY * first.total_bytes:
            return "cards of different memory"
        if other.bandwidth_bytes_per_s != first.bandwidth_bytes_per_s:
            return "cards of different speed"
        if other.compute_capability != first.compute_capability or other.vendor != first.vendor:
            return "cards of different generations"
    return None


def link_pays(gpus: Sequence[Gpu], rig: Rig) -> bool:
    """Whether each pair has NVLink or P2P, or else each card a slot with the lanes of PCIe 4.0 x8 or more."""
    if slow_slots(gpus):
        return False
    return linked_directly(gpus, rig) or all(gpu.pcie is not None and _lanes(gpu.pcie) >= _PAYS for gpu in gpus)


def linked_directly(gpus: Sequence[Gpu], rig: Rig) -> bool:
    """Whether each pair has NVLink or P2P: nothing is copied through the host's memory."""
    return all(rig.link(a.index, b.index) != "pcie" for a, b in combinations(gpus, 2))


def slow_slots(gpus: Sequence[Gpu]) -> tuple[Gpu, ...]:
    """Of these cards, those in a slot of less than eight lanes, or of PCIe 1 or 2."""
    return tuple(gpu for gpu in gpus if gpu.pcie is not None and is_slow(gpu.pcie))


def is_slow(slot: Pcie) -> bool:
    return slot.width < _LEAST_WIDTH or slot.gen < _LEAST_GEN


def _lanes(slot: Pcie) -> int:
    """Lanes of the first generation that would carry as much."""
    return slot.width << (slot.gen - 1)
