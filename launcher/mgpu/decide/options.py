"""Every placement worth weighing for one case, by kind. The rules pick among them in `choose`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from msgspec import Struct
from msgspec.structs import replace

from mgpu.adapter import Job
from mgpu.decide.place import by_room, evened, fastest_first, least_offload, on_host, on_one, pipeline, subsets
from mgpu.decide.speed import forecast
from mgpu.decide.weigh import Weighed, weigh
from mgpu.plan import Layout, Speed
from mgpu.request import Request
from mgpu.rig import Gpu, Rig

#: A further card takes part in what the CPU must help with only if that makes it this much faster.
_WORTH_A_CARD: Final = 1.05


class Case(Struct, frozen=True, kw_only=True):
    """What is to be decided: a job, on these cards of this rig, as asked. `gpus` are those considered, in rig order."""

    request: Request
    rig: Rig
    job: Job
    gpus: tuple[Gpu, ...]

    @property
    def one_card_only(self) -> bool:
        return self.request.split == "none" or self.job.pinned.single

    def with_job(self, job: Job) -> Case:
        return replace(self, job=job)


class Sketch(Struct, frozen=True, kw_only=True):
    """A placement known only by its speed: nobody means to use it, so its memory is not worth the milliseconds."""

    layout: Layout
    gpus: tuple[Gpu, ...]
    speed: Speed | None


class Options(Struct, frozen=True, kw_only=True):
    """Every placement that was weighed. `singles` are best first; `split` is the fastest over the fewest cards."""

    singles: tuple[Weighed, ...] = ()
    split: Weighed | None = None
    needless: Sketch | None = None  # the smallest split of a model that one card holds
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
        return min(helped, key=lambda option: (option.short_bytes, -_tok_s(option)), default=None)


def weigh_options(case: Case) -> Options:
    """Cards alone first; a split only where none will do; the CPU only where no split will."""
    singles = _singles(case)
    if any(single.fits for single in singles):
        return Options(singles=singles, needless=_needless(case))
    split = None if case.one_card_only else fewest(case)
    if split is not None:
        return Options(singles=singles, split=split)
    if not case.job.computes_on_cpu:
        return Options(singles=singles)
    cpu = weigh(case.job, on_host(case.job), (), case.rig) if case.job.pinned.host_layers is None else None
    return Options(singles=singles, offload=_offload(case), cpu=cpu)


def on_gpus(case: Case) -> Weighed | None:
    """The best without the CPU, or None: what `--ctx max` and "what would fit" are searched with."""
    single = next((single for single in _singles(case) if single.fits), None)
    return single or (None if case.one_card_only else fewest(case))


def _singles(case: Case) -> tuple[Weighed, ...]:
    """Each card alone, best first by rule `fastest-card`."""
    job = case.job
    return tuple(sorted((weigh(job, on_one(job, gpu), (gpu,), case.rig) for gpu in case.gpus), key=_rank))


def fewest(case: Case) -> Weighed | None:
    """Rule `fewest-cards`: the smallest number of cards (of two and more) that holds it, and of those the fastest."""
    sizes = range(2, len(case.gpus) + 1)
    return next((found for size in sizes if (found := split_over(case, size)) is not None), None)


def split_over(case: Case, size: int) -> Weighed | None:
    """The fastest split over exactly `size` cards, or None."""
    fitting: list[Weighed] = []
    for subset in subsets(case.gpus, size):
        layout = pipeline(case.job, subset)
        if layout is not None:
            weighed = weigh(case.job, layout, cards_of(layout, case.gpus), case.rig)
            if weighed.fits:
                fitting.append(weighed)
    if not fitting:
        return None
    best = max(fitting, key=lambda one: (_tok_s(one), one.least_spare))
    return weigh(case.job, evened(case.job, best.gpus, best.layout), best.gpus, case.rig)


def _needless(case: Case) -> Sketch | None:
    """The split the runtime would make of it unasked, over the two fastest cards: what rule `fits-one-card` saves."""
    pair = fastest_first(case.gpus)[:2]
    if len(pair) < 2:
        return None
    layout = by_room(case.job, pair)
    return Sketch(layout=layout, gpus=pair, speed=forecast(case.job, layout, pair, case.rig).tok_s)


def _offload(case: Case) -> Weighed | None:
    """The fastest way to keep some of it on cards: over the fastest, the two fastest … or over any one, if one it is.

    A card of unknown speed is in it only where the others hold nothing.
    """
    if case.job.pinned.host_layers is not None:
        return None
    known = tuple(gpu for gpu in fastest_first(case.gpus) if gpu.bandwidth_bytes_per_s is not None)
    return _best_offload(case, known) or _best_offload(case, fastest_first(case.gpus))


def _best_offload(case: Case, gpus: Sequence[Gpu]) -> Weighed | None:
    sizes = range(1, len(gpus) + 1)
    sets = [tuple(gpus[i : i + 1]) for i in range(len(gpus))] if case.one_card_only else [gpus[:n] for n in sizes]
    found: list[Weighed] = []
    for cards in sets:
        layout = least_offload(case.job, cards)
        if layout is not None:
            found.append(weigh(case.job, layout, cards_of(layout, case.gpus), case.rig))
    best = min(found, key=lambda one: (one.short_bytes, -_tok_s(one)), default=None)
    # Fewest cards here, too: one more has to be worth it.
    as_good = (one for one in found if best and one.fits and _tok_s(one) * _WORTH_A_CARD >= _tok_s(best))
    return min(as_good, key=lambda one: len(one.gpus), default=best)


def cards_of(layout: Layout, gpus: Sequence[Gpu]) -> tuple[Gpu, ...]:
    """The cards of a layout, in its order."""
    by_index = {gpu.index: gpu for gpu in gpus}
    return tuple(by_index[index] for index in layout.gpus)


def _rank(single: Weighed) -> tuple[float, int, bool, int]:
    """Rule `fastest-card`: predicted speed, then free memory, then no display, then the index."""
    gpu = single.gpus[0]
    return (-_tok_s(single), -gpu.usable_bytes, gpu.display, gpu.index)


def _tok_s(weighed: Weighed) -> float:
    """The expected speed; 0 where it is unknown."""
    return weighed.speed.expected if weighed.speed else 0.0
