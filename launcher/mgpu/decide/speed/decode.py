"""Seconds for one token of one user: what each unit costs where it is, and the ways between."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from msgspec import Struct

from mgpu.adapter import Job, Work
from mgpu.decide.speed import families
from mgpu.decide.speed.links import all_reduce
from mgpu.decide.speed.pace import Pace, pace_of
from mgpu.plan import Layout, Shape
from mgpu.rig import Gpu, Rig

#: A CPU reaches about this share of its RAM's nominal bandwidth when generating (70B on an RTX 4090 and a Ryzen 9
#: 7900X: 3.1 tok/s); and what to assume of a machine whose bandwidth nobody told us: two channels of DDR4-3200.
RAM_SHARE: Final = 0.8
ASSUMED_RAM_BANDWIDTH: Final = 51 * 10**9

#: To the CPU and back for each block whose experts alone it keeps (RTX 2080, Qwen3 30B-A3B, 36 of 48: 36.7 tok/s).
HOST_EXPERTS: Final = 290e-6

#: A layer on the CPU, and what every token takes beside the graph: sampling, the server.
HOST_LAYER: Final = 30e-6

#: More for each layer of routed experts cut into ranks by llama.cpp: gpt-oss-120b on four RTX 4090 180 tok/s either
#: way, Gemma 4 26B A4B 197 as layers and 139 as ranks (PR #19378).
ROUTED_RANKS: Final = 40e-6

#: The architecture whose public figures are of llama.cpp b2824-b2833: all of Llama 1-3. Others' are of later builds.
_OLDER_ARCHITECTURE: Final = "llama"
#: Flash attention by default and fused kernels: the constants of 2026 hold from about here.
_NEWER_BUILD: Final = 6500


def is_older(work: Work, rig: Rig) -> bool:
    """Whether the constants of b2824-b2833 are taken: for the models that public figures of it are of.

    Not on the very machine whose runtime is known to be newer.
    """
    if work.runtime != "llama.cpp" or work.model.architecture != _OLDER_ARCHITECTURE or work.model.is_moe:
        return False
    newer = work.build is not None and work.build >= _NEWER_BUILD
    return not (newer and rig.source == "detected")


def unit_seconds(job: Job, gpu: Gpu, rig: Rig) -> tuple[float, ...] | None:
    """Prefix sums over the units of the seconds each takes on `gpu`, for one token of one user.

    `sums[j] - sums[i]` is what units i … j-1 cost there; a pipeline's token takes the sum over its devices, and a hop
    between each two. None for a card of unknown bandwidth.
    """
    work = job.work
    pace = pace_of(gpu, work.runtime, is_older(work, rig))
    if pace is None:
        return None
    heavy = unpack_factor(work, gpu, older=is_older(work, rig))
    return tuple(span_seconds(work, pace, range(stop), 0, heavy) for stop in range(work.n_units + 1))


class Decoded(Struct, frozen=True):
    """Seconds for one token of one user; of those, the host's; and each device's pace."""

    seconds: float
    host: float
    paces: tuple[Pace, ...]


def decode(work: Work, layout: Layout, gpus: Sequence[Gpu], rig: Rig, *, older: bool) -> Decoded | None:
    """One token of one user. Of replicas, the slowest's. None where a card's bandwidth is unknown."""
    paces: list[Pace] = []
    each: list[float] = []
    shape = layout.shape
    n_host_experts = host_experts(work, shape)
    for gpu, span in zip(gpus, layout.spans(), strict=True):
        pace = pace_of(gpu, work.runtime, older)
        if pace is None:
            return None
        heavy = unpack_factor(work, gpu, older=older)
        paces.append(pace)
        each.append(span_seconds(work, pace, span, n_host_experts, heavy))
    host = host_seconds(work, shape, rig.ram_bandwidth_bytes_per_s)
    if shape.mode == "replicas":
        seconds = max(each)
    elif shape.mode == "tensor":
        seconds = _rank_seconds(work, paces, each) + all_reduce(work, gpus, rig)
    else:
        seconds = sum(each) + sum([pace.hop for pace in paces[1:]])
    return Decoded(seconds + host, host, tuple(paces))


def decode_seconds(work: Work, layout: Layout, gpus: Sequence[Gpu], rig: Rig, *, older: bool) -> float | None:
    """Seconds for one token of one user. None where a card's bandwidth is unknown."""
    decoded = decode(work, layout, gpus, rig, older=older)
    return None if decoded is None else decoded.seconds


def span_seconds(work: Work, pace: Pace, span: range, host_experts: int, heavy: float) -> float:
    """What the units of `span` cost on one card. `heavy`: how much longer its weights take than others' would."""
    i, j = span.start, span.stop
    first = min(max(i, host_experts), j)
    read = work.weights[j] - work.weights[i] + work.experts[j] - work.experts[first]
    seconds = read * pace.weight * heavy + (work.unpack[j] - work.unpack[i]) * pace.unpack
    seconds += (work.layers[j] - work.layers[i]) * pace.layer
    seconds += (work.recurrent[j] - work.recurrent[i]) * pace.recurrent
    seconds += (work.routed[j] - work.routed[i]) * pace.routed
    seconds += (work.heads[j] - work.heads[i]) * pace.head
    return seconds if work.cache_on_host else seconds + (work.cache[j] - work.cache[i]) * pace.cache


def unpack_factor(work: Work, gpu: Gpu, *, older: bool) -> float:
    """How much longer a byte takes for its type on this very chip."""
    slow = older and gpu.vendor == "apple" and families.is_m1(gpu) and "K" in work.model.quantization
    return families.M1_K_QUANTS if slow else 1.0


def _rank_seconds(work: Work, paces: Sequence[Pace], each: Sequence[float]) -> float:
    """The slowest rank: its share of the bytes, every kernel of every layer, and what routing costs in ranks."""
    n = len(paces)
    last = work.n_units
    fixed = [
        work.layers[last] * pace.layer + work.recurrent[last] * pace.recurrent + work.routed[last] * pace.routed
        for pace in paces
    ]
    slowest = max((whole - kernels) / n + kernels for whole, kernels in zip(each, fixed, strict=True))
    return slowest + (work.routed[last] * ROUTED_RANKS if work.runtime == "llama.cpp" else 0.0)


def host_seconds(work: Work, shape: Shape, ram_bandwidth: int | None) -> float:
    """Seconds the CPU needs for its layers or experts, ways there and back included; 0 when it has none."""
    whole = work.n_units if not shape.n_devices else shape.host_layers
    if not (whole or shape.host_experts or work.host_experts or work.cache_on_host):
        return 0.0
    routed = host_experts(work, shape) if shape.n_devices else 0
    read = work.weights[whole] + work.experts[max(whole, routed)]
    read += work.cache[-1 if work.cache_on_host else whole]
    seconds = read / ((ram_bandwidth or ASSUMED_RAM_BANDWIDTH) * RAM_SHARE)
    return seconds + work.layers[whole] * HOST_LAYER + max(routed - whole, 0) * HOST_EXPERTS


def host_experts(work: Work, shape: Shape) -> int:
    """The first blocks whose routed experts the host keeps."""
    if not (shape.host_experts or work.host_experts):
        return 0
    return min(max(shape.host_experts, work.host_experts), work.n_units)


def host_seconds_per_token(job: Job, layout: Layout, ram_bandwidth: int | None) -> float:
    """Seconds the CPU needs for its layers or experts for one token; 0 when it has none."""
    return host_seconds(job.work, layout.shape, ram_bandwidth)
