"""What llama.cpp does for one token, unit by unit: bytes read, kernels started, operations. From the header alone."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from functools import lru_cache
from itertools import accumulate
from typing import Final

from msgspec import Struct

from mgpu.adapter import Work
from mgpu_adapters.llamacpp.architectures import n_expert_used
from mgpu_adapters.llamacpp.blocks import Anatomy
from mgpu_adapters.llamacpp.cache import unit_reads
from mgpu_adapters.llamacpp.settings import Settings
from mgpu_adapters.llamacpp.weights import Weights

#: Types that take more instructions to unpack: by how much a byte of them is worth more than one of Q4_K. Q2_K and
#: Q3_K: 8B models on a V100 under b10830 (llama.cpp PR #28912; under b1786 they took 5 times as much, PR #4766). The
#: IQ types unpack by table, as Q2_K; nothing was measured.
_SLOW: Final = {
    "Q2_K": 1.1, "Q3_K": 2.3, "IQ1_S": 1.1, "IQ1_M": 1.1, "IQ2_XXS": 1.1, "IQ2_XS": 1.1, "IQ2_S": 1.1,
    "IQ3_XXS": 1.1, "IQ3_S": 1.1,
}  # fmt: skip

#: Kernels beyond a plain block's, in plain blocks: a norm after attention or feed-forward (Gemma; fitted on 4B and
#: 12B Gemma 3 on an RTX 5070 and 3090), and each part of Gemma 3n's side streams (E4B on an RX 7900 XT and M4 Pro).
_POST_NORM: Final = re.compile(r"post_(?:attention|ffw|attn|ffn)_norm|(?:attn|ffn)_post_norm|post_norm")
_SIDE_STREAM: Final = re.compile(r"altup|laurel")
_PER_POST_NORM: Final = 0.18
_PER_SIDE_STREAM: Final = 0.45

_BUILD: Final = re.compile(r"b(\d{3,6})")
#: `"0.6.0-dev (build 1)"`: builds have had versions since about this one (2026).
_VERSIONED: Final = re.compile(r"\d+\.\d+\S* \(build \d+\)")
_FIRST_VERSIONED: Final = 9900


class Effort(Struct, frozen=True, kw_only=True):
    """The part that depends on the model alone: prefix sums over the units."""

    weights: tuple[float, ...]
    experts: tuple[float, ...]
    unpack: tuple[float, ...]
    layers: tuple[float, ...]
    recurrent: tuple[float, ...]
    routed: tuple[float, ...]
    flops: tuple[float, ...]


@lru_cache(maxsize=4)
def effort_of(weights: Weights, anatomy: Anatomy) -> Effort:
    """Of routed experts, the share that works on one token. Remembered: a model is asked at many contexts."""
    n, hyper = weights.n_units, weights.model.hyper
    used = n_expert_used(hyper) / hyper.n_expert if hyper.n_expert else 1.0
    fixed, experts, unpack, flops = [0.0] * n, [0.0] * n, [0.0] * n, [0.0] * n
    for item in weights.placed:
        if item.place in ("host", "every"):
            continue
        tensor, share = item.tensor, used if item.routed else 1.0
        read = tensor.n_bytes * share
        (experts if item.routed else fixed)[item.unit] += read
        unpack[item.unit] += read * _SLOW.get(tensor.type, 0.0)
        if len(tensor.shape) > 1:
            flops[item.unit] += 2 * math.prod(tensor.shape) * share
    trunk = anatomy.blocks[: anatomy.n_trunk]
    idle = [0.0] * (n - len(trunk))  # the output, and blocks that do not run
    return Effort(
        weights=_summed(fixed),
        experts=_summed(experts),
        unpack=_summed(unpack),
        layers=_summed([_kernels(block) for block in trunk] + idle),
        recurrent=_summed([float(recurs) for recurs in anatomy.recurs[: len(trunk)]] + idle),
        routed=_summed([float(any("_exps" in name for name in block)) for block in trunk] + idle),
        flops=_summed(flops),
    )


def work_of(effort: Effort, anatomy: Anatomy, settings: Settings, depth: int, build: int | None) -> Work:
    """With these settings, and `depth` tokens in the cache."""
    hyper = anatomy.hyper
    cache, seen = unit_reads(anatomy.caches, settings, depth)
    k, v = settings.type_k, settings.type_v
    return Work(
        runtime="llama.cpp",
        model=anatomy.model,
        kv_type=k if k == v else f"{k}/{v}",
        users=settings.n_parallel,
        ctx=settings.n_ctx_seq,
        depth=depth,
        weights=effort.weights,
        experts=effort.experts,
        unpack=effort.unpack,
        cache=cache,
        heads=_summed([*(float(n * back) for n, back in zip(hyper.n_head, seen, strict=True)), 0.0]),
        layers=effort.layers,
        recurrent=effort.recurrent,
        routed=effort.routed,
        flops=effort.flops,
        head_dim=hyper.head_dim_k,
        build=build,
        host_experts=settings.n_cpu_moe,
        cache_on_host=not settings.kv_offload,
    )


def build_number(version: str) -> int | None:
    """`"b10434"` as 10434; of a build with a version, the least it can be; None for one that is only assumed."""
    found = _BUILD.fullmatch(version)
    if found is None:
        return _FIRST_VERSIONED if _VERSIONED.fullmatch(version) else None
    return int(found[1])


def _kernels(block: Iterable[str]) -> float:
    """A block's kernels, in plain blocks."""
    names = tuple(block)
    after = sum(_POST_NORM.match(name) is not None for name in names)
    side = sum(_SIDE_STREAM.match(name) is not None for name in names)
    return 1 + _PER_POST_NORM * after + _PER_SIDE_STREAM * side


def _summed(units: list[float]) -> tuple[float, ...]:
    """Prefix sums over the units."""
    return tuple(accumulate(units, initial=0.0))
