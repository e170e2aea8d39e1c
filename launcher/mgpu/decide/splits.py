"""Layers over several cards: of all sets of cards, the fewest and fastest that hold them. Rule `fewest-cards`."""

from __future__ import annotations

from collections.abc import Sequence
from math import inf
from typing import Final

from mgpu.decide import place
from mgpu.decide.case import Case
from mgpu.decide.matched import slow_slots
from mgpu.decide.weigh import Weighed, total, weigh
from mgpu.rig import Gpu

#: A card of unknown speed counts as one that takes this many seconds for a token.
_VERY_SLOW: Final = 100.0

#: Of sets of cards, those are tried whose speed on paper is within this of the best that was tried; so many at most.
_WORTH_TRYING: Final = 1.03
_MOST_TRIED: Final = 6


def fewest(case: Case) -> Weighed | None:
    """Rule `fewest-cards`: the smallest number of cards (of two and more) that holds it, and of those the fastest."""
    sizes = range(2, len(case.gpus) + 1)
    if not place.roughly_hold(case.job, case.gpus):
        return None
    return next((found for size in sizes if (found := split_over(case, size)) is not None), None)


def split_over(case: Case, size: int) -> Weighed | None:
    """The fastest split over exactly `size` cards, or None."""
    found: list[Weighed] = []
    bound = inf
    on_paper = _on_paper(case, size)
    for seconds, cards in on_paper:
        if seconds > bound or len(found) == _MOST_TRIED:
            break
        weighed = pipeline(case, cards)
        if weighed is not None:
            found.append(weighed)
            bound = min(bound, seconds * _WORTH_TRYING)
        elif cards == on_paper[0][1] and pipeline(case, _roomiest(on_paper)) is None:
            return None  # what these do not hold, no others of this number do
    if not found:
        return None
    best = max(found, key=_merit)
    layout = place.evened(case.job, best.gpus, best.layout, case.paces)
    return best if layout == best.layout else weigh(case.job, layout, best.gpus, case.rig)


def pipeline(case: Case, cards: Sequence[Gpu]) -> Weighed | None:
    """Whole layers over all of `cards`, fastest first; None where they do not hold it."""
    layout = place.pipeline(case.job, cards)
    weighed = None if layout is None else weigh(case.job, layout, place.cards_of(layout, case.gpus), case.rig)
    return weighed if weighed is not None and weighed.fits else None


def _roomiest(on_paper: Sequence[tuple[float, tuple[Gpu, ...]]]) -> tuple[Gpu, ...]:
    return max((cards for _, cards in on_paper), key=lambda cards: sum(gpu.usable_bytes for gpu in cards))


def _merit(split: Weighed) -> tuple[float, int, int]:
    """Largest first: the speed; of equally fast ones, the fewest cards in slow slots; the room on the fullest card."""
    return round(total(split), 2), -len(slow_slots(split.gpus)), split.least_spare


def _on_paper(case: Case, size: int) -> list[tuple[float, tuple[Gpu, ...]]]:
    """Sets of `size` cards that may hold it, quickest first: (a measure of time, the cards).

    Weights and cache are poured into the fastest card, then the next, as if they were a liquid. A card of unknown
    speed counts as very slow.
    """
    job, shape = case.job, place.pinned_shape(case.job, size)
    rooms = {gpu.index: place.net_room(job, gpu, shape) for gpu in case.gpus}
    everything = range(shape.host_layers, job.n_units)
    needed = min(job.stored(everything, shape, gpu) for gpu in case.gpus)
    if sum(sorted(rooms.values())[-size:]) < needed:
        return []
    found: list[tuple[float, tuple[Gpu, ...]]] = []
    for cards in place.subsets([gpu for gpu in case.ordered if rooms[gpu.index] > 0], size):
        left, seconds = needed, 0.0
        for gpu in cards:
            taken = min(rooms[gpu.index], left)
            seconds += taken * min(case.paces[gpu.index], _VERY_SLOW)
            left -= taken
        if left <= 0:
            found.append((seconds, cards))
    return sorted(found, key=lambda one: one[0])


def balanced(case: Case, split: Weighed | None) -> Weighed | None:
    """The same cards with stages that take equally long, where that is another split."""
    if split is None or len({case.paces[gpu.index] for gpu in split.gpus}) == 1:
        return None
    layout = place.balanced(case.job, split.gpus, case.paces)
    if layout is None or layout.counts == split.layout.counts:
        return None
    weighed = weigh(case.job, layout, split.gpus, case.rig)
    return weighed if weighed.fits else None
