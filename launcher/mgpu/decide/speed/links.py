"""What tensor ranks wait for: the all-reduces of every layer, by the way the cards reach each other."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from typing import Final

from msgspec import Struct

from mgpu.adapter import Work
from mgpu.rig import Gpu, LinkKind, Rig

#: One after attention, one after the feed-forward part.
_PER_LAYER: Final = 2

#: Seconds before the first byte of an all-reduce arrives, between two cards; each further card adds a quarter.
#: vLLM (NCCL, custom kernels over NVLink and P2P): Qwen 27B on two RTX 3090, 46 tok/s on one, 54-60 on two without P2P
#: (syv-ai#135, club-3090 MULTI_CARD.md), 22 % more with NVLink on the same box (club-3090 BENCHMARKS.md).
_VLLM: Final[dict[LinkKind, float]] = {"nvlink": 12e-6, "pcie-p2p": 22e-6, "pcie": 42e-6}
#: llama.cpp's own reduce (b9000 and later, no NCCL in its images): 2x RTX 5060 Ti, RX 9070 XT, 3060 + 4070 Super.
_LLAMA: Final[dict[LinkKind, float]] = {"nvlink": 10e-6, "pcie-p2p": 12e-6, "pcie": 14e-6}
#: Through the host under Vulkan (2x RX 7900 XTX, PR #25051).
_VULKAN: Final = 45e-6

#: Bytes a second over one lane of PCIe by generation, and over one NVLink bridge, as attained.
_LANE: Final = {1: 0.2e9, 2: 0.4e9, 3: 0.8e9, 4: 1.6e9, 5: 3.2e9, 6: 6.4e9}
_NVLINK: Final = 45e9
_USUAL_LANES: Final = (4, 8)
_SLOWEST: Final[dict[LinkKind, int]] = {"nvlink": 0, "pcie-p2p": 1, "pcie": 2}
_ACROSS_SOCKETS: Final = 1.5  # the way from one processor to the other


class Way(Struct, frozen=True, kw_only=True):
    """The slowest way between any two of some cards: seconds of latency for an all-reduce, and bytes a second."""

    latency: float
    bandwidth: float


def way_between(gpus: Sequence[Gpu], rig: Rig, runtime: str) -> Way:
    """What all ranks wait for."""
    kinds = [rig.link(a.index, b.index) for a, b in combinations(gpus, 2)]
    kind: LinkKind = max(kinds, key=_SLOWEST.__getitem__, default="pcie")
    table = _VLLM if runtime == "vllm" else _LLAMA
    latency = table[kind] * (1 + (len(gpus) - 2) / 4)
    if any((gpu.device or "").startswith("Vulkan") or gpu.vendor in ("amd", "intel") for gpu in gpus):
        latency = max(latency, _VULKAN if runtime != "vllm" else latency)
    if any(link.path == "SYS" for link in rig.links if set(link.gpus) <= {gpu.index for gpu in gpus}):
        latency *= _ACROSS_SOCKETS
    return Way(latency=latency, bandwidth=_NVLINK if kind == "nvlink" else min(map(_pcie, gpus), default=1e9))


def _pcie(gpu: Gpu) -> float:
    gen, lanes = (gpu.pcie.gen, gpu.pcie.width) if gpu.pcie is not None else _USUAL_LANES
    return _LANE.get(gen, _LANE[4]) * lanes


def all_reduce(work: Work, gpus: Sequence[Gpu], rig: Rig, n_tokens: int = 1) -> float:
    """Seconds for all layers' all-reduces of `n_tokens` tokens."""
    n = len(gpus)
    if n < 2:
        return 0.0
    way = way_between(gpus, rig, work.runtime)
    size = n_tokens * work.model.hyper.n_embd * (2 if work.runtime == "vllm" else 4)
    return _PER_LAYER * (work.n_units - 1) * (way.latency + 2 * (n - 1) / n * size / way.bandwidth)
