"""Layers onto devices: every placement worth considering, as layouts. Pure search; the scales are in `weigh`."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import combinations

from mgpu.adapter import Job
from mgpu.plan import Layout, Shape
from mgpu.rig import Gpu
from mgpu.units import MIB

#: Slack between equal cards is evened out to this much; finer would move no whole layer.
_EVEN_TO = 32 * MIB

_NONE: Mapping[int, int] = {}


#: Seconds for one token with the whole model on the card, by rig index; infinite for a card of unknown speed.
Paces = Mapping[int, float]


def fastest_first(gpus: Sequence[Gpu], paces: Paces) -> tuple[Gpu, ...]:
    """By predicted speed; then room, then no desktop on it, then the index."""
    return tuple(sorted(gpus, key=lambda gpu: (paces[gpu.index], -gpu.usable_bytes, gpu.display, gpu.index)))


def pinned_shape(job: Job, n_devices: int) -> Shape:
    """The shape that flags after `--` leave: nothing on the host unless they say so."""
    pinned = job.pinned
    layers = min(pinned.host_layers or 0, job.n_units)
    return Shape(n_devices=n_devices, host_layers=layers, host_experts=pinned.host_experts or 0)


def cards_of(layout: Layout, gpus: Sequence[Gpu]) -> tuple[Gpu, ...]:
    """The cards of a layout, in its order."""
    by_index = {gpu.index: gpu for gpu in gpus}
    return tuple(by_index[index] for index in layout.gpus)


def roughly_hold(job: Job, gpus: Sequence[Gpu]) -> bool:
    """False only where all these cards together have less room than weights and cache take. Quick to ask."""
    shape = pinned_shape(job, len(gpus))
    everything = range(shape.host_layers, job.n_units)
    needed = min((job.stored(everything, shape, gpu) for gpu in gpus), default=1)
    return sum(gpu.usable_bytes for gpu in gpus) >= needed


def on_one(job: Job, gpu: Gpu) -> Layout:
    """Everything on one card, whether it fits or not."""
    shape = pinned_shape(job, 1)
    return Layout(gpus=(gpu.index,), counts=(job.n_units - shape.host_layers,), shape=shape)


def on_host(job: Job) -> Layout:
    """Everything computed by the CPU."""
    return Layout(gpus=(), counts=(), shape=Shape(n_devices=0, host_layers=job.n_units))


def on_each(job: Job, gpus: Sequence[Gpu], mode: str) -> Layout:
    """Every unit on every card: as tensor ranks, or as replicas."""
    shape = Shape(n_devices=len(gpus), mode="tensor" if mode == "tensor" else "replicas")
    return Layout(gpus=tuple(gpu.index for gpu in gpus), counts=(job.n_units,) * len(gpus), shape=shape)


def alike(gpu: Gpu) -> tuple[object, ...]:
    """Cards of the same key are interchangeable in a plan."""
    return (gpu.name, gpu.usable_bytes, gpu.bandwidth_bytes_per_s, gpu.pcie, gpu.max_tensor_bytes, gpu.reserve_bytes)


def subsets(gpus: Sequence[Gpu], size: int) -> Iterator[tuple[Gpu, ...]]:
    """Sets of `size` cards, each in the order of `gpus`; of sets that differ only in which identical cards, one."""
    seen: set[tuple[object, ...]] = set()
    kinds = {gpu.index: alike(gpu) for gpu in gpus}
    for subset in combinations(gpus, size):
        key = tuple(kinds[gpu.index] for gpu in subset)
        if key not in seen:
            seen.add(key)
            yield subset


def net_room(job: Job, gpu: Gpu, shape: Shape) -> int:
    """What a card has for weights and cache, at the most: its room less what even one unit brings along."""
    first = range(shape.host_layers, shape.host_layers + 1)
    last = range(job.n_units - 1, job.n_units)
    least = min(job.device(span, shape, gpu).total - job.stored(span, shape, gpu) for span in {first, last})
    return gpu.usable_bytes - least


def could_hold(job: Job, gpus: Sequence[Gpu], shape: Shape) -> bool:
    """False only where these cards cannot hold it, however it is split."""
    needed = min(job.stored(range(shape.host_layers, job.n_units), shape, gpu) for gpu in gpus)
    return sum(net_room(job, gpu, shape) for gpu in gpus) >= needed


def pipeline(job: Job, gpus: Sequence[Gpu], shape: Shape | None = None, *, reorder: bool = True) -> Layout | None:
    """Whole layers over all of `gpus`, each filled in turn; None when they do not hold it.

    In their order, which is the fastest; or, as the first layers and the output are not of a size, with another last
    (`reorder`).
    """
    shape = shape or pinned_shape(job, len(gpus))
    if not could_hold(job, gpus, shape):
        return None
    for order in _orders(gpus) if reorder else (tuple(gpus),):
        counts = _fill(job, order, shape)
        if counts is not None:
            return Layout(gpus=tuple(gpu.index for gpu in order), counts=counts, shape=shape)
    return None


def _orders(gpus: Sequence[Gpu]) -> Iterator[tuple[Gpu, ...]]:
    yield tuple(gpus)
    for last in gpus[:-1]:
        yield (*(gpu for gpu in gpus if gpu is not last), last)


def evened(job: Job, gpus: Sequence[Gpu], layout: Layout, paces: Paces) -> Layout:
    """The same, with equal room left on cards of equal speed: no speed is lost, and no card is filled to the brim.

    Only the slowest of the cards' speeds is evened; faster cards stay full, as that is what makes the split fast.
    """
    by_index = {gpu.index: gpu for gpu in gpus}
    slowest = {gpu.index for gpu in gpus if paces[gpu.index] == max(paces[other.index] for other in gpus)}

    def spares(counted: Layout) -> list[int]:
        """What is left on each of the slowest cards."""
        cards = [by_index[index] for index in counted.gpus]
        return [
            card.usable_bytes - job.device(span, counted.shape, card).total
            for card, span in zip(cards, counted.spans(), strict=True)
            if card.index in slowest
        ]

    left = spares(layout)
    if len(left) == 1:
        return layout
    low, high, best = max(min(left), 0), sum(left) // len(left), layout  # at best, all have the same left
    while high - low > _EVEN_TO:
        middle = (low + high) // 2
        counts = _fill(job, gpus, layout.shape, slack=dict.fromkeys(slowest, middle), guess=best.counts)
        if counts is None:
            high = middle
        else:
            best = Layout(gpus=layout.gpus, counts=counts, shape=layout.shape)
            low = max(middle, min(spares(best)))
    return best


def balanced(job: Job, gpus: Sequence[Gpu], paces: Paces) -> Layout | None:
    """Units in proportion to each card's speed, as far as its room goes: all stages of a pipeline take equally long.

    None where the cards do not hold it so, or where a speed is unknown.
    """
    shape = pinned_shape(job, len(gpus))
    shares = [1 / paces[gpu.index] for gpu in gpus]
    full: dict[int, int] = {}  # position: the units that fill it
    while min(shares) > 0:
        left = job.n_units - shape.host_layers - sum(full.values())
        free = [i for i in range(len(gpus)) if i not in full]
        parts = dict(zip(free, _apportioned(left, [shares[i] for i in free]), strict=True))
        counts = tuple(full.get(i, parts.get(i, 0)) for i in range(len(gpus)))
        if min(counts) < 1 or sum(counts) != job.n_units - shape.host_layers:
            return None
        layout = Layout(gpus=tuple(gpu.index for gpu in gpus), counts=counts, shape=shape)
        over = _overfull(job, gpus, layout)
        if not over:
            return layout
        if set(over) <= set(full):
            return None
        full |= over
    return None


def _overfull(job: Job, gpus: Sequence[Gpu], layout: Layout) -> dict[int, int]:
    """Of cards that hold too much, how many of their units they would hold."""
    over: dict[int, int] = {}
    for position, (gpu, span) in enumerate(zip(gpus, layout.spans(), strict=True)):
        if job.device(span, layout.shape, gpu).total > gpu.usable_bytes:
            likely = len(span) - 1
            over[position] = _most_that_fits(
                job, gpu, layout.shape, span=span[:-1], room=gpu.usable_bytes, likely=likely
            )
    return over


def _apportioned(total: int, weights: Sequence[float]) -> list[int]:
    """`total` in whole parts, in proportion to `weights`, by largest remainders."""
    exact = [total * weight / sum(weights) for weight in weights]
    parts = [int(part) for part in exact]
    by_remainder = sorted(range(len(exact)), key=lambda i: parts[i] - exact[i])
    for i in by_remainder[: total - sum(parts)]:
        parts[i] += 1
    return parts


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
    if not all(holds_one(job, gpu, len(gpus)) for gpu in gpus):
        return None
    n, given = len(gpus), job.pinned.host_experts
    n_blocks = job.n_units - 1
    beside = sum(gpu.usable_bytes - net_room(job, gpu, Shape(n_devices=n, host_layers=n_blocks)) for gpu in gpus)
    room = sum(gpu.usable_bytes for gpu in gpus) - beside

    def could(shape: Shape) -> bool:
        return job.stored(range(shape.host_layers, job.n_units), shape, gpus[0]) <= room

    def least(low: int, high: int, shaped: Callable[[int], Shape]) -> Layout | None:
        """The layout with the smallest count that fits, from the first that could by weights and cache alone."""
        first = bisect_left(range(low, high + 1), 1, key=lambda count: int(could(shaped(count)))) + low
        return _first(first, high, lambda count: pipeline(job, gpus, shaped(count), reorder=False))

    layout = None
    if job.has_experts and given is None:
        layout = least(1, n_blocks, lambda count: Shape(n_devices=n, host_experts=count))
    return layout or least(
        0, job.n_units - n, lambda count: Shape(n_devices=n, host_layers=count, host_experts=given or 0)
    )


def holds_one(job: Job, gpu: Gpu, n_devices: int) -> bool:
    """Whether the card has room for its overhead, its compute buffer and a single unit."""
    last = range(job.n_units - 1, job.n_units)
    shape = Shape(n_devices=n_devices, host_layers=job.n_units - 1)
    return job.device(last, shape, gpu).total <= gpu.usable_bytes


def _fill(
    job: Job, gpus: Sequence[Gpu], shape: Shape, *, slack: Mapping[int, int] = _NONE, guess: tuple[int, ...] = ()
) -> tuple[int, ...] | None:
    """Units on each card, filled in turn but for `slack` (by rig index); None: they do not hold all.

    `guess`: the units they may take, if anything is known of it. The answer does not depend on it, the time does.
    """
    start, counts = shape.host_layers, list[int]()
    for position, gpu in enumerate(gpus):
        room = gpu.usable_bytes - slack.get(gpu.index, 0)
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

    What comes beside weights and cache hardly changes with one unit more: with what is known of it, the next number to
    ask about is read off weights and cache alone.
    """
    low, high, at = 0, len(span), likely
    while low < high:
        at = min(max(at, low + 1), high)
        size = job.device(span[:at], shape, gpu).total
        if size <= room:
            low = at
        else:
            high = at - 1
        beside = size - job.stored(span[:at], shape, gpu)
        at = bisect_right(
            range(low + 1, high + 1), room - beside, key=lambda n: job.stored(span[:n], shape, gpu)
        ) + low  # fmt: skip
    return low


def _first(low: int, high: int, found: Callable[[int], Layout | None]) -> Layout | None:
    """What is found at the smallest n in [low, high] at which anything is; where it is, it is at all above, too.

    The nearest to `low` are asked first, then ever larger steps: that is where it is likely to be.
    """
    step, best = 1, None
    while best is None and low <= high:
        at = min(low + step - 1, high)
        best = found(at)
        if best is None:
            low, step = at + 1, step * 2
        else:
            high = at
    while best is not None and low < high:
        middle = (low + high) // 2
        other = found(middle)
        if other is None:
            low = middle + 1
        else:
            best, high = other, middle
    return best
