"""Layers onto devices: every placement worth considering, as layouts. Pure search; the scales are in `weigh`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import combinations

from mgpu.adapter import Job
from mgpu.plan import Layout, Shape
from mgpu.rig import Gpu
from mgpu.units import MIB

#: Slack between equal cards is evened out to this much; finer would move no whole layer.
_EVEN_TO = 32 * MIB


def fastest_first(gpus: Sequence[Gpu]) -> tuple[Gpu, ...]:
    """Bandwidth decides decode speed; then room, then no desktop on it, then the index."""
    return tuple(sorted(gpus, key=lambda g: (-(g.bandwidth_bytes_per_s or 0), -g.usable_bytes, g.display, g.index)))


def pinned_shape(job: Job, n_devices: int) -> Shape:
    """The shape that flags after `--` leave: nothing on the host unless they say so."""
    pinned = job.pinned
    layers = min(pinned.host_layers or 0, job.n_units)
    return Shape(n_devices=n_devices, host_layers=layers, host_experts=pinned.host_experts or 0)


def on_one(job: Job, gpu: Gpu) -> Layout:
    """Everything on one card, whether it fits or not."""
    shape = pinned_shape(job, 1)
    return Layout(gpus=(gpu.index,), counts=(job.n_units - shape.host_layers,), shape=shape)


def on_host(job: Job) -> Layout:
    """Everything computed by the CPU."""
    return Layout(gpus=(), counts=(), shape=Shape(n_devices=0, host_layers=job.n_units))


def subsets(gpus: Sequence[Gpu], size: int) -> Iterator[tuple[Gpu, ...]]:
    """Sets of `size` cards, fastest first in each; of sets that differ only in which identical cards they take, one."""
    seen: set[tuple[object, ...]] = set()
    for subset in combinations(fastest_first(gpus), size):
        key = tuple((gpu.name, gpu.usable_bytes, gpu.bandwidth_bytes_per_s, gpu.max_tensor_bytes) for gpu in subset)
        if key not in seen:
            seen.add(key)
            yield subset


def pipeline(job: Job, gpus: Sequence[Gpu], shape: Shape | None = None) -> Layout | None:
    """Whole layers over all of `gpus`, each filled in turn; None when they do not hold it.

    In their order, which is the fastest; or, as the first layers and the output are not of a size, with another last.
    """
    shape = shape or pinned_shape(job, len(gpus))
    for order in _orders(gpus):
        counts = _fill(job, order, shape, slack=0)
        if counts is not None:
            return Layout(gpus=tuple(gpu.index for gpu in order), counts=counts, shape=shape)
    return None


def _orders(gpus: Sequence[Gpu]) -> Iterator[tuple[Gpu, ...]]:
    yield tuple(gpus)
    for last in gpus[:-1]:
        yield (*(gpu for gpu in gpus if gpu is not last), last)


def evened(job: Job, gpus: Sequence[Gpu], layout: Layout) -> Layout:
    """The same, with equal room left on cards of equal speed: no speed is lost, and no card is filled to the brim.

    Only the slowest of the cards' speeds is evened; faster cards stay full, as that is what makes the split fast.
    """
    by_index = {gpu.index: gpu for gpu in gpus}
    slowest = _slowest(gpus)

    def spares(counted: Layout) -> list[int]:
        """What is left on each of the slowest cards."""
        cards = [by_index[index] for index in counted.gpus]
        return [
            card.usable_bytes - job.device(span, counted.shape, card).total
            for card, span in zip(cards, counted.spans(), strict=True)
            if (card.bandwidth_bytes_per_s or 0) == slowest
        ]

    left = spares(layout)
    low, high, best = max(min(left), 0), sum(left) // len(left), layout  # at best, all have the same left
    while high - low > _EVEN_TO:
        middle = (low + high) // 2
        counts = _fill(job, gpus, layout.shape, slack=middle, guess=best.counts)
        if counts is None:
            high = middle
        else:
            best = Layout(gpus=layout.gpus, counts=counts, shape=layout.shape)
            low = max(middle, min(spares(best)))
    return best


def by_room(job: Job, gpus: Sequence[Gpu]) -> Layout:
    """Units in proportion to each card's room, whether they fit or not: what a misfit is measured on."""
    shape = pinned_shape(job, len(gpus))
    room = [float(max(gpu.usable_bytes, MIB)) for gpu in gpus]
    return Layout(gpus=tuple(gpu.index for gpu in gpus), counts=job.counts(tuple(room), shape.host_layers), shape=shape)


def as_pinned(job: Job, gpus: Sequence[Gpu]) -> tuple[Layout, tuple[Gpu, ...]]:
    """The layout that `--tensor-split` after `--` demands of `gpus`, and those of them that are in it.

    Proportions beyond the last card are dropped, as are cards after the last that gets a share.
    """
    split = (job.pinned.tensor_split or ())[: len(gpus)]
    used = tuple(gpus[: max((i + 1 for i, share in enumerate(split) if share), default=len(gpus))])
    shape = pinned_shape(job, len(used))
    counts = job.counts(split[: len(used)], shape.host_layers)
    return Layout(gpus=tuple(gpu.index for gpu in used), counts=counts, shape=shape), used


def least_offload(job: Job, gpus: Sequence[Gpu]) -> Layout | None:
    """As little as possible on the host: experts first where there are any, then whole layers. None: nothing fits."""
    if not all(_holds_one(job, gpu, len(gpus)) for gpu in gpus):
        return None
    n, given = len(gpus), job.pinned.host_experts
    n_blocks = job.n_units - 1

    def with_experts(count: int) -> Layout | None:
        return pipeline(job, gpus, Shape(n_devices=n, host_experts=count))

    def with_layers(count: int) -> Layout | None:
        return pipeline(job, gpus, Shape(n_devices=n, host_layers=count, host_experts=given or 0))

    if job.has_experts and given is None:
        experts = _smallest(1, n_blocks, lambda count: with_experts(count) is not None)
        if experts is not None:
            return with_experts(experts)
    layers = _smallest(0, job.n_units - n, lambda count: with_layers(count) is not None)
    return None if layers is None else with_layers(layers)


def _holds_one(job: Job, gpu: Gpu, n_devices: int) -> bool:
    """Whether the card has room for its overhead, its compute buffer and a single unit."""
    last = range(job.n_units - 1, job.n_units)
    shape = Shape(n_devices=n_devices, host_layers=job.n_units - 1)
    return job.device(last, shape, gpu).total <= gpu.usable_bytes


def _slowest(gpus: Sequence[Gpu]) -> int:
    return min(gpu.bandwidth_bytes_per_s or 0 for gpu in gpus)


def _fill(
    job: Job, gpus: Sequence[Gpu], shape: Shape, *, slack: int, guess: tuple[int, ...] = ()
) -> tuple[int, ...] | None:
    """Units on each card, filled in turn but for `slack` on the slowest; None: they do not hold all.

    `guess`: the units they may take, if anything is known of it. The answer does not depend on it, the time does.
    """
    start, counts = shape.host_layers, list[int]()
    slowest = _slowest(gpus)
    for position, gpu in enumerate(gpus):
        room = gpu.usable_bytes - (slack if (gpu.bandwidth_bytes_per_s or 0) == slowest else 0)
        later = len(gpus) - 1 - position  # every later card gets at least one
        most = job.n_units - start - later
        if not later:
            fits = most > 0 and job.device(range(start, start + most), shape, gpu).total <= room
            return (*counts, most) if fits else None
        likely = guess[position] if guess else counts[-1] if counts else most // (later + 1)
        count = _most_that_fits(job, gpu, shape, span=range(start, start + most), room=room, likely=likely)
        if count == 0:
            return None
        counts.append(count)
        start += count
    return None


def _most_that_fits(job: Job, gpu: Gpu, shape: Shape, *, span: range, room: int, likely: int) -> int:
    """How many units of `span`, from its first, the card has room for.

    Sizes grow nearly in proportion to units, so the next to ask about is read off a line through what is known.
    """
    low, high, at = 0, len(span), likely
    fits, fails = (0, 0), (0, 0)  # units, bytes: the most known to fit, the fewest known not to
    while low < high:
        at = min(max(at, low + 1), high)
        size = job.device(span[:at], shape, gpu).total
        if size <= room:
            low, fits = at, (at, size)
        else:
            high, fails = at - 1, (at, size)
        (n, used), (m, needed) = (fits, fails) if fails[0] else ((0, 0), fits)
        at = n + (room - used) * (m - n) // max(needed - used, 1)
    return low


def _smallest(low: int, high: int, good: Callable[[int], bool]) -> int | None:
    """The smallest n in [low, high] that is good, where all above a good one are good; None when none is."""
    if low > high or not good(high):
        return None
    while low < high:
        middle = (low + high) // 2
        if good(middle):
            high = middle
        else:
            low = middle + 1
    return low
