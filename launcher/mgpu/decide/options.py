"""Every placement worth weighing for one case, by kind. The rules pick among them in `choose`."""

from __future__ import annotations

from collections.abc import Sequence
from math import isfinite
from typing import Final

from msgspec import Struct

from mgpu.decide import place
from mgpu.decide.case import Case
from mgpu.decide.matched import linked_directly, matched_sets
from mgpu.decide.speed import forecast
from mgpu.decide.splits import balanced, fewest, pipeline
from mgpu.decide.weigh import Weighed, total, weigh
from mgpu.plan import Layout, Speed
from mgpu.rig import Gpu

#: A further card takes part in what the CPU must help with only if that makes it this much faster.
_WORTH_A_CARD: Final = 1.05


class Sketch(Struct, frozen=True, kw_only=True):
    """A placement known only by its speed: nobody means to use it, so its memory is not worth the milliseconds."""

    layout: Layout
    gpus: tuple[Gpu, ...]
    speed: Speed | None


class Options(Struct, frozen=True, kw_only=True):
    """Every placement that was weighed. `singles` are best first; `split` is the fastest over the fewest cards."""

    singles: tuple[Weighed, ...] = ()
    replicas: Weighed | None = None
    split: Weighed | None = None
    balanced: Weighed | None = None  # the split whose stages take equally long: for prompts, and for many users
    tensor: Weighed | None = None
    needless: Sketch | None = None  # the smallest split of a model that one card holds
    unasked: Sketch | None = None  # the split over all cards by room alone, as runtimes make it unasked
    offload: Weighed | None = None
    cpu: Weighed | None = None

    @property
    def fitting(self) -> tuple[Weighed, ...]:
        return tuple(single for single in self.singles if single.fits)

    @property
    def single(self) -> Weighed | None:
        """The best card that holds it."""
        return next(iter(self.fitting), None)

    @property
    def with_cpu(self) -> Weighed | None:
        """The CPU's help: partial offload or everything on the CPU, by what lacks less, then by speed."""
        helped = [option for option in (self.offload, self.cpu) if option is not None]
        return min(helped, key=lambda option: (option.short_bytes, -total(option)), default=None)

    @property
    def all(self) -> tuple[Weighed, ...]:
        others = (self.replicas, self.tensor, self.split, self.balanced, self.offload, self.cpu)
        return (*self.singles, *(other for other in others if other is not None))


def weigh_options(case: Case) -> Options:
    """Cards alone first, or one replica on each; a split only where none will do; the CPU only where no split will."""
    singles = _singles(case)
    copies = None if case.one_card_only else _replicas(case)
    if copies is not None or any(single.fits for single in singles):
        return Options(singles=singles, replicas=copies, needless=_needless(case))
    if not case.one_card_only:
        split, ranks = fewest(case), tensor(case)
        if split is not None or ranks is not None:
            even = balanced(case, split)
            return Options(singles=singles, split=split, balanced=even, tensor=ranks, unasked=_by_room(case, case.gpus))
    if not case.job.computes_on_cpu:
        return Options(singles=singles)
    cpu = weigh(case.job, place.on_host(case.job), (), case.rig)
    return Options(singles=singles, offload=_offload(case), cpu=cpu)


def on_gpus(case: Case) -> Weighed | None:
    """The best placement on cards alone, or None."""
    single = next((single for single in _singles(case) if single.fits), None)
    if single is not None or case.one_card_only:
        return single
    return _replicas(case) or fewest(case) or _unasked(case, tensor(case))


def gpus_hold(case: Case) -> bool:
    """Whether there is any placement on cards alone: as `on_gpus`, without looking for the best."""
    job = case.job
    if not place.roughly_hold(job, case.gpus):
        return False
    alone = (weigh(job, place.on_one(job, gpu), (gpu,), case.rig) for gpu in _roomiest_first(case.gpus))
    if any(single.fits for single in alone):
        return True
    if case.one_card_only or len(case.gpus) < 2:
        return False
    roomiest = _roomiest_first(case.gpus)
    for size in range(2, len(roomiest) + 1):
        if pipeline(case, place.fastest_first(roomiest[:size], case.paces)) is not None:
            return True
    return _replicas(case) is not None or _unasked(case, tensor(case)) is not None


def _unasked(case: Case, found: Weighed | None) -> Weighed | None:
    return found if found is not None and ranks_unasked(case, found) else None


def ranks_unasked(case: Case, found: Weighed) -> bool:
    """Whether tensor ranks may be chosen without being asked for.

    Where the runtime itself calls them experimental, only if the cards reach each other directly.
    """
    return not case.job.tensor_is_experimental or linked_directly(found.gpus, case.rig)


def _roomiest_first(gpus: Sequence[Gpu]) -> list[Gpu]:
    return sorted(gpus, key=lambda gpu: -gpu.usable_bytes)


def _singles(case: Case) -> tuple[Weighed, ...]:
    """Each card alone, best first by rule `fastest-card`."""
    job = case.job
    return tuple(sorted((weigh(job, place.on_one(job, gpu), (gpu,), case.rig) for gpu in case.gpus), key=_rank))


def _replicas(case: Case) -> Weighed | None:
    """Rule `many-users`: a runtime on each of the fastest cards that hold a share of the users; the best number.

    Flags after `--` that fix the number of users, or what is on the host, leave nothing to replicate.
    """
    job, pinned = case.job, case.job.pinned
    if job.users < 2 or len(case.gpus) < 2 or pinned.host_layers is not None or pinned.host_experts is not None:
        return None
    best: Weighed | None = None
    for size in range(2, min(job.users, len(case.gpus)) + 1):
        each = job.at_users(-(-job.users // size))
        if each.users == job.users:
            return None
        holding = [single for single in _singles(case.with_job(each)) if single.fits]
        if len(holding) < size:
            continue
        cards = tuple(single.gpus[0] for single in holding[:size])
        weighed = weigh(job, place.on_each(job, cards, "replicas"), cards, case.rig)
        if weighed.fits and (best is None or total(weighed) > total(best)):
            best = weighed
    return best


def tensor(case: Case) -> Weighed | None:
    """Rule `tensor-when-matched`: ranks on the fewest matched cards that hold it; for many users, the best number.

    Those that may be chosen unasked come before those that may not.
    """
    pinned = case.job.pinned
    if pinned.host_layers is not None or pinned.host_experts is not None or pinned.tensor_split is not None:
        return None
    found: list[Weighed] = []
    for cards in matched_sets(case.gpus, case.rig):
        if found and case.job.users == 1 and len(cards) > len(found[0].gpus):
            break
        weighed = ranks(case, cards)
        if weighed is not None and weighed.fits:
            found.append(weighed)
    return max(found, key=lambda one: (ranks_unasked(case, one), total(one)), default=None)


def ranks(case: Case, cards: tuple[Gpu, ...]) -> Weighed | None:
    """Tensor ranks on exactly these cards; None where the runtime cannot."""
    if case.job.why_not_tensor(cards) is not None:
        return None
    return weigh(case.job, place.on_each(case.job, cards, "tensor"), cards, case.rig)


def _needless(case: Case) -> Sketch | None:
    """The split the runtime would make of it unasked, over the fewest of the fastest cards that may hold it.

    What rule `fits-one-card` saves; or what it costs, where the one card that holds it is slow.
    """
    fastest = (case.ordered[:size] for size in range(2, len(case.gpus) + 1))
    return _by_room(case, next((gpus for gpus in fastest if place.roughly_hold(case.job, gpus)), ()))


def _by_room(case: Case, gpus: tuple[Gpu, ...]) -> Sketch | None:
    """Layers in proportion to each card's free memory: neither speed nor whole sizes are looked at."""
    if len(gpus) < 2 or case.job.pinned.host_layers is not None:
        return None
    layout = place.by_room(case.job, gpus)
    return Sketch(layout=layout, gpus=gpus, speed=forecast(case.job, layout, gpus, case.rig).tok_s)


def _offload(case: Case) -> Weighed | None:
    """The fastest way to keep some of it on cards: over the fastest, the two fastest … or over any one, if one it is.

    A card of unknown speed is in it only where the others hold nothing.
    """
    if case.job.pinned.host_layers is not None:
        return None
    known = tuple(gpu for gpu in case.ordered if isfinite(case.paces[gpu.index]))
    return _best_offload(case, known) or _best_offload(case, case.ordered)


def _best_offload(case: Case, gpus: Sequence[Gpu]) -> Weighed | None:
    n_at_once = 1 if case.one_card_only else min(len(gpus), 2)
    gpus = [gpu for gpu in gpus if place.holds_one(case.job, gpu, n_at_once)]  # a full card is in nobody's way
    sizes = range(len(gpus), 0, -1)
    sets = [gpus[i : i + 1] for i in range(len(gpus))] if case.one_card_only else [gpus[:n] for n in sizes]
    found: list[Weighed] = []
    best: Weighed | None = None
    for cards in sets:
        layout = place.least_offload(case.job, cards)
        if layout is None:
            continue
        found.append(weigh(case.job, layout, place.cards_of(layout, case.gpus), case.rig))
        best = min(found, key=lambda one: (one.short_bytes, -total(one)))
        if not case.one_card_only and total(found[-1]) * _WORTH_A_CARD < total(best):
            break  # still fewer cards are slower still
    # Fewest cards here, too: one more has to be worth it.
    as_good = (one for one in found if best and one.fits and total(one) * _WORTH_A_CARD >= total(best))
    return min(as_good, key=lambda one: len(one.gpus), default=best)


def _rank(single: Weighed) -> tuple[float, int, bool, int]:
    """Rule `fastest-card`: predicted speed, then free memory, then no display, then the index."""
    gpu = single.gpus[0]
    return (-total(single), -gpu.usable_bytes, gpu.display, gpu.index)
