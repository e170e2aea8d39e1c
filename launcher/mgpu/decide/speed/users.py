"""Several users at once: the step that makes a token for each of them."""

from __future__ import annotations

from collections.abc import Sequence

from mgpu.adapter import Work
from mgpu.decide.speed.decode import decode_seconds
from mgpu.decide.speed.links import all_reduce
from mgpu.decide.speed.pace import Pace, pace_of
from mgpu.decide.speed.prompt import ASSUMED_CORES, CORE_FLOPS, touched
from mgpu.plan import Layout, Shape
from mgpu.rig import Gpu, Rig


def total_tok_s(work: Work, layout: Layout, gpus: Sequence[Gpu], rig: Rig, *, older: bool) -> float | None:
    """Tokens a second of `work.users` together. None where a card's bandwidth is unknown."""
    if layout.shape.mode == "replicas":
        return _replicas(work, layout, gpus, rig, older=older)
    paces = [pace for gpu in gpus if (pace := pace_of(gpu, work.runtime, older)) is not None]
    alone = decode_seconds(work, layout, gpus, rig, older=older)
    if alone is None or len(paces) < len(gpus):
        return None
    users = work.users
    groups = 1
    if work.runtime == "vllm" and layout.shape.mode == "pipeline":  # each stage works for another group of users
        groups = min(max(len(gpus), 1), users)
    each = -(-users // groups)
    step = alone + _more_users(work, layout, paces, each)
    if layout.shape.mode == "tensor":
        step += all_reduce(work, gpus, rig, each) - all_reduce(work, gpus, rig)
    return users / step


def _replicas(work: Work, layout: Layout, gpus: Sequence[Gpu], rig: Rig, *, older: bool) -> float | None:
    """Each with its part of the users; the last ones may have one less."""
    n, shape = len(gpus), Shape(n_devices=1)
    total = 0.0
    for place, gpu in enumerate(gpus):
        users = work.users // n + (place < work.users % n)
        if not users:
            continue
        own = Layout(gpus=(gpu.index,), counts=(layout.counts[place],), shape=shape)
        speed = _alone_or_not(work, users, own, gpu, rig, older=older)
        if speed is None:
            return None
        total += speed
    return total


def _alone_or_not(work: Work, users: int, own: Layout, gpu: Gpu, rig: Rig, *, older: bool) -> float | None:
    pace = pace_of(gpu, work.runtime, older)
    alone = decode_seconds(work, own, (gpu,), rig, older=older)
    return None if alone is None or pace is None else users / (alone + _more_users(work, own, (pace,), users))


def _more_users(work: Work, layout: Layout, paces: Sequence[Pace], users: int) -> float:
    """What a step takes longer for `users` than for one: their caches, the experts they go to, and operations."""
    more = users - 1
    ranks = len(paces) if layout.shape.mode == "tensor" else 1
    seconds = 0.0
    for pace, span in zip(paces, layout.spans(), strict=True):
        i, j = span.start, span.stop
        looks = (work.cache[j] - work.cache[i]) * pace.cache + (work.heads[j] - work.heads[i]) * pace.head
        compute = (work.flops[j] - work.flops[i]) / pace.flops
        experts = (work.experts[j] - work.experts[i]) * (touched(work, users) - 1) * pace.weight
        part = (more * (looks + compute) + experts) / ranks
        seconds = max(seconds, part) if ranks > 1 else seconds + part
    if not paces:
        seconds += more * work.flops[-1] / (CORE_FLOPS * ASSUMED_CORES)
    return seconds
