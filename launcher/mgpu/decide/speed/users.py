"""Several users at once: the step that makes a token for each of them."""

from __future__ import annotations

from collections.abc import Sequence

from mgpu.adapter import Work
from mgpu.decide.speed.decode import (
    ASSUMED_RAM_BANDWIDTH,
    RAM_SHARE,
    decode_seconds,
    host_experts,
    host_seconds,
)
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
    step = alone + _more_users(work, layout, paces, each) + _more_on_host(work, layout.shape, rig, each)
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
    n_host_experts = host_experts(work, layout.shape)
    seconds = 0.0
    for pace, span in zip(paces, layout.spans(), strict=True):
        i, j = span.start, span.stop
        first = min(max(i, n_host_experts), j)
        looks = (work.cache[j] - work.cache[i]) * pace.cache + (work.heads[j] - work.heads[i]) * pace.head
        compute = (work.flops[j] - work.flops[i]) / pace.flops
        experts = (work.experts[j] - work.experts[first]) * (touched(work, users) - 1) * pace.weight
        part = (more * (looks + compute) + experts) / ranks
        seconds = max(seconds, part) if ranks > 1 else seconds + part
    return seconds


def _more_on_host(work: Work, shape: Shape, rig: Rig, users: int) -> float:
    """The same for what the CPU computes: whole layers, or routed experts alone.

    It reads the weights of a step once, and is hidden behind that until its cores have more to compute.
    """
    whole = work.n_units if not shape.n_devices else shape.host_layers
    routed = max(host_experts(work, shape), whole) if shape.n_devices else whole
    if users < 2 or not (routed or work.cache_on_host):
        return 0.0
    bandwidth = (rig.ram_bandwidth_bytes_per_s or ASSUMED_RAM_BANDWIDTH) * RAM_SHARE
    experts = work.experts[routed] * touched(work, users)
    looks = work.cache[-1 if work.cache_on_host else whole] * users
    reading = (work.weights[whole] + experts + looks) / bandwidth
    computing = users * _host_flops(work, whole, routed) / (CORE_FLOPS * (rig.cpu_cores or ASSUMED_CORES))
    alone = host_seconds(work, shape, rig.ram_bandwidth_bytes_per_s)
    return max(min(max(reading, computing), users * alone) - alone, 0.0)  # no worse than one after the other


def _host_flops(work: Work, whole: int, routed: int) -> float:
    """Operations on the CPU for one token: whole layers, and the routed experts of some more."""
    flops = work.flops[whole]
    if routed > whole:
        experts = work.experts[routed] - work.experts[whole]
        flops += (work.flops[routed] - flops) * experts / (experts + work.weights[routed] - work.weights[whole])
    return flops
