"""Every placement worth weighing for one case, by kind. The rules pick among them in `choose`."""

from __future__ import annotations

from collections.abc import Sequence
from math import inf, isfinite
from typing import Final, Literal

from msgspec import Struct
from msgspec.structs import replace

from mgpu.adapter import Job
from mgpu.decide import place
from mgpu.decide.matched import linked_directly, matched_sets
from mgpu.decide.speed import forecast
from mgpu.decide.weigh import Weighed, weigh
from mgpu.plan import Layout, Speed
from mgpu.request import Request
from mgpu.rig import Gpu, Rig

#: A further card takes part in what the CPU must help with only if that makes it this much faster.
_WORTH_A_CARD: Final = 1.05

#: A card of unknown speed counts as one that takes this many seconds for a token.
_VERY_SLOW: Final = 100.0

#: From this context on, prompts are expected to be so long that reading them matters as much as answering.
LONG_CTX: Final = 65536

#: Of sets of cards, those are tried whose speed on paper is within this of the best that was tried; so many at most.
_WORTH_TRYING: Final = 1.03
_MOST_TRIED: Final = 6


class Case(Struct, frozen=True, kw_only=True):
    """What is to be decided: a job, on these cards of this rig, as asked. `gpus` are those considered, in rig order."""

    request: Request
    rig: Rig
    job: Job
    gpus: tuple[Gpu, ...]
    paces: place.Paces

    @property
    def ordered(self) -> tuple[Gpu, ...]:
        """The cards considered, fastest first."""
        return place.fastest_first(self.gpus, self.paces)

    @property
    def one_card_only(self) -> bool:
        return self.request.split == "none" or self.job.pinned.single

    @property
    def asked_mode(self) -> Literal["pipeline", "tensor"] | None:
        """The kind of split that was asked for, by option or by flags after `--`."""
        if self.job.pinned.mode == "tensor":
            return "tensor"
        split = self.request.split
        return split if split in {"pipeline", "tensor"} else None

    @property
    def wants_balance(self) -> bool:
        """Whether stages that take equally long are worth more than the fastest answer to one short question.

        Batches of many users, and of one long prompt, follow each other through a pipeline at its slowest stage's pace.
        """
        return self.job.users > 1 or self.job.ctx >= LONG_CTX

    def with_job(self, job: Job) -> Case:
        return replace(self, job=job)


def paces_of(job: Job, gpus: Sequence[Gpu], rig: Rig) -> dict[int, float]:
    """How long each card alone would take for one token of one user."""
    speeds = {gpu.index: forecast(job, place.on_one(job, gpu), (gpu,), rig).tok_s for gpu in gpus}
    return {index: inf if speed is None else 1 / speed.expected for index, speed in speeds.items()}


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
        return min(helped, key=lambda option: (option.short_bytes, -tok_s(option)), default=None)

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
            even = _balanced(case, split)
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
    if _hopeless(case):
        return False
    alone = (weigh(job, place.on_one(job, gpu), (gpu,), case.rig) for gpu in _roomiest_first(case.gpus))
    if any(single.fits for single in alone):
        return True
    if case.one_card_only or len(case.gpus) < 2:
        return False
    roomiest = _roomiest_first(case.gpus)
    for size in range(2, len(roomiest) + 1):
        layout = place.pipeline(job, place.fastest_first(roomiest[:size], case.paces))
        if layout is not None and weigh(job, layout, cards_of(layout, case.gpus), case.rig).fits:
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


def fewest(case: Case) -> Weighed | None:
    """Rule `fewest-cards`: the smallest number of cards (of two and more) that holds it, and of those the fastest."""
    sizes = range(2, len(case.gpus) + 1)
    if _hopeless(case):
        return None
    return next((found for size in sizes if (found := split_over(case, size)) is not None), None)


def _hopeless(case: Case) -> bool:
    """Whether all cards together have less room than weights and cache take: nothing else need be looked at then."""
    job = case.job
    shape = place.pinned_shape(job, len(case.gpus))
    everything = range(shape.host_layers, job.n_units)
    needed = min((job.stored(everything, shape, gpu) for gpu in case.gpus), default=1)
    return sum(gpu.usable_bytes for gpu in case.gpus) < needed


def split_over(case: Case, size: int) -> Weighed | None:
    """The fastest split over exactly `size` cards, or None."""
    best: Weighed | None = None
    bound, tried = 0.0, 0
    for seconds, cards in _on_paper(case, size):
        if best is not None and (seconds > bound or tried == _MOST_TRIED):
            break
        layout = place.pipeline(case.job, cards)
        weighed = None if layout is None else weigh(case.job, layout, cards_of(layout, case.gpus), case.rig)
        if weighed is None or not weighed.fits:
            continue
        tried += 1
        bound = bound or seconds * _WORTH_TRYING
        if best is None or (tok_s(weighed), weighed.least_spare) > (tok_s(best), best.least_spare):
            best = weighed
    if best is None:
        return None
    layout = place.evened(case.job, best.gpus, best.layout, case.paces)
    return best if layout == best.layout else weigh(case.job, layout, best.gpus, case.rig)


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


def _balanced(case: Case, split: Weighed | None) -> Weighed | None:
    """The same cards with stages that take equally long, where that is another split."""
    if split is None or len({case.paces[gpu.index] for gpu in split.gpus}) == 1:
        return None
    layout = place.balanced(case.job, split.gpus, case.paces)
    if layout is None or layout.counts == split.layout.counts:
        return None
    weighed = weigh(case.job, layout, split.gpus, case.rig)
    return weighed if weighed.fits else None


def tensor(case: Case) -> Weighed | None:
    """Rule `tensor-when-matched`: ranks on the fewest matched cards that hold it; for many users, the best number."""
    pinned = case.job.pinned
    if pinned.host_layers is not None or pinned.host_experts is not None or pinned.tensor_split is not None:
        return None
    best: Weighed | None = None
    for cards in matched_sets(case.gpus, case.rig):
        if best is not None and case.job.users == 1 and len(cards) > len(best.gpus):
            break
        weighed = ranks(case, cards)
        if weighed is not None and weighed.fits and (best is None or total(weighed) > total(best)):
            best = weighed
    return best


def ranks(case: Case, cards: tuple[Gpu, ...]) -> Weighed | None:
    """Tensor ranks on exactly these cards; None where the runtime cannot."""
    if case.job.why_not_tensor(cards) is not None:
        return None
    return weigh(case.job, place.on_each(case.job, cards, "tensor"), cards, case.rig)


def _needless(case: Case) -> Sketch | None:
    """The split the runtime would make of it unasked, over the two fastest cards: what rule `fits-one-card` saves."""
    return _by_room(case, case.ordered[:2])


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
    sizes = range(len(gpus), 0, -1)
    sets = [tuple(gpus[i : i + 1]) for i in range(len(gpus))] if case.one_card_only else [gpus[:n] for n in sizes]
    found: list[Weighed] = []
    best: Weighed | None = None
    for cards in sets:
        layout = place.least_offload(case.job, cards)
        if layout is None:
            continue
        found.append(weigh(case.job, layout, cards_of(layout, case.gpus), case.rig))
        best = min(found, key=lambda one: (one.short_bytes, -tok_s(one)))
        if not case.one_card_only and tok_s(found[-1]) * _WORTH_A_CARD < tok_s(best):
            break  # still fewer cards are slower still
    # Fewest cards here, too: one more has to be worth it.
    as_good = (one for one in found if best and one.fits and tok_s(one) * _WORTH_A_CARD >= tok_s(best))
    return min(as_good, key=lambda one: len(one.gpus), default=best)


def cards_of(layout: Layout, gpus: Sequence[Gpu]) -> tuple[Gpu, ...]:
    """The cards of a layout, in its order."""
    by_index = {gpu.index: gpu for gpu in gpus}
    return tuple(by_index[index] for index in layout.gpus)


def _rank(single: Weighed) -> tuple[float, int, bool, int]:
    """Rule `fastest-card`: predicted speed, then free memory, then no display, then the index."""
    gpu = single.gpus[0]
    return (-tok_s(single), -gpu.usable_bytes, gpu.display, gpu.index)


def tok_s(weighed: Weighed) -> float:
    """The expected speed for one user; 0 where it is unknown."""
    return weighed.speed.expected if weighed.speed else 0.0


def total(weighed: Weighed) -> float:
    """The expected speed for all users together; 0 where it is unknown."""
    return weighed.total.expected if weighed.total else 0.0
