"""Kinds of cards, and the constants each has. Every figure here is fitted by benchmarks/fit_speed.py, or says whence.

A byte of weights costs `read` of the time it takes at the card's bandwidth, and `ISSUE` clocks of one multiprocessor
for the instructions that load and unpack it. The two add up: on cards with much bandwidth for their multiprocessors
(HBM) the second is as long as the first. With that, one pair of constants serves a GTX, an RTX 5090 and an A100.
"""

from __future__ import annotations

import re
from typing import Final

from msgspec import Struct
from msgspec.structs import replace

from mgpu.rig import Gpu
from mgpu_profiles.gpus import GpuSpec

#: Clocks of one multiprocessor (compute unit, GPU core) to load and unpack a byte of weights. Any vendor's.
ISSUE: Final = 0.067

#: Without DP4A (before compute capability 6.1) it takes so many times as long: RTX 3060 and Tesla P100 share the layers
#: of a 27B Q4_K_M, 13.8 tok/s (sudoingX/qwen38-mtp#78).
WITHOUT_DP4A: Final = 3.8
_DP4A: Final = 6.1

#: A GeForce board's multiprocessors do that much more than their datasheet's clock says: it runs above it, the others
#: below theirs.
GEFORCE_CLOCK: Final = 1.32

#: Error correction within GDDR6 takes a sixteenth of the bandwidth. It is on by default on these (they show 15/16 of
#: their memory, too); workstation boards have it off.
_INLINE_ECC: Final = re.compile(r"\b(?:A40|A10G?|A16|A2|L40S?|L4|T4)\b")
ECC_SHARE: Final = 15 / 16

#: Without CUDA graphs, before Ampere: seconds a layer (RTX 2080, mid-2026; graphs came to Turing with PR #25749).
LAYER_BEFORE_AMPERE: Final = 65e-6

#: AMD under ROCm in place of Vulkan: seconds a layer (RX 7900 XTX, July 2026, llama.cpp PR #26284).
LAYER_ROCM: Final = 115e-6

#: M1 chips unpacked K-quants that much more slowly before 2025 (M1 Max, b2833; 7.3 tok/s of a 70B since).
M1_K_QUANTS: Final = 1.6


class Older(Struct, frozen=True, kw_only=True):
    """What differs under llama.cpp b2824-b2833 (May 2024): no flash attention, slower starts of kernels.

    `cell` seconds, and `cell_clocks` clocks of one multiprocessor, for each attention head and token it looks back at.
    """

    layer: float
    cell: float
    cell_clocks: float


class Family(Struct, frozen=True, kw_only=True):
    """How one kind of card generates under llama.cpp of 2026. Times in seconds.

    `lanes`: operations a multiprocessor does in a clock by the datasheet's FP32 rate. `starved`: bytes of bandwidth
    for a multiprocessor and clock, where the rate is unknown. `cache`: the cost of a byte of cache, at full bandwidth.
    `prompt`, `attention`: operations a multiprocessor gets done in a clock on prompts, and of attention in them.
    `hop`: from one device to the next. `band`: nine of ten rows lie within it, as a share of the speed.
    """

    name: str
    read: float
    lanes: int
    starved: float
    layer: float
    recurrent: float
    routed: float
    cache: float
    hop: float
    prompt: float
    attention: float
    band: float
    older: Older | None = None


_CUDA: Final = {
    "read": 0.855, "layer": 47.5e-6, "recurrent": 40e-6, "routed": 11.5e-6, "cache": 0.9, "attention": 100.0,
}  # fmt: skip

_OLDER_CUDA: Final = Older(layer=95e-6, cell=2.9e-10, cell_clocks=14.6)

#: XiongjieDai/GPU-Benchmarks@aa72e0e, Llama 3 8B and 70B, Q4_K_M and F16 on 1-4 cards (b2824-b2833); layers of 2026 by
#: RTX 5070 (llmfit), RTX 3090, 4090, 5060 Ti, PRO 6000 (qwen38-mtp).
GDDR: Final = Family(
    name="NVIDIA GDDR", lanes=256, starved=5.5, hop=0.20e-3, prompt=290.0, band=0.10,
    older=_OLDER_CUDA, **_CUDA,
)  # fmt: skip
TURING: Final = Family(
    name="NVIDIA before Ampere", lanes=128, starved=6.0, hop=0.20e-3, prompt=250.0, band=0.12,
    older=_OLDER_CUDA, **(_CUDA | {"layer": LAYER_BEFORE_AMPERE}),
)  # fmt: skip
PASCAL: Final = Family(
    name="NVIDIA Pascal", lanes=256, starved=7.5, hop=0.20e-3, prompt=260.0, band=0.15,
    older=_OLDER_CUDA, **(_CUDA | {"layer": LAYER_BEFORE_AMPERE}),
)  # fmt: skip
HBM: Final = Family(
    name="NVIDIA HBM", lanes=128, starved=12.0, hop=0.42e-3, prompt=500.0, band=0.14,
    older=_OLDER_CUDA, **_CUDA,
)  # fmt: skip
#: On a board with others (SXM), a hop takes twice as long: four A100 SXM against four A100 PCIe, b2833.
HBM_BOARD: Final = replace(HBM, hop=0.87e-3)
#: GB10: benches/dgx-spark.md (b6918) and llmfit (mid-2026).
LPDDR: Final = Family(
    name="NVIDIA unified", read=1.2, lanes=256, starved=2.3, layer=2.6e-6, recurrent=122e-6, routed=0.3e-6, cache=1.38,
    hop=0.3e-3, prompt=275.0, attention=100.0, band=0.10,
)  # fmt: skip
#: RX 7900 XT (llmfit, Vulkan, mid-2026), R9700, 8060S (geerlingguy, Vulkan, b7340).
RADEON: Final = Family(
    name="AMD", read=0.927, lanes=256, starved=3.9, layer=45.7e-6, recurrent=82e-6, routed=23.5e-6, cache=1.2,
    hop=1.5e-3, prompt=190.0, attention=60.0, band=0.15,
)  # fmt: skip
#: Radeon 8060S (geerlingguy, late 2025): LPDDR5X, as GB10.
RADEON_UNIFIED: Final = Family(
    name="AMD unified", read=1.12, lanes=256, starved=2.2, layer=45.7e-6, recurrent=82e-6, routed=23.5e-6, cache=1.4,
    hop=1.5e-3, prompt=190.0, attention=60.0, band=0.15,
)  # fmt: skip
#: Arc B580 (intel/ipex-llm#12991, SYCL, 2025) alone: little is known.
ARC: Final = Family(
    name="Intel", read=0.855, lanes=256, starved=8.5, layer=80e-6, recurrent=160e-6, routed=60e-6, cache=1.5,
    hop=0.4e-3, prompt=500.0, attention=50.0, band=0.25,
)  # fmt: skip
#: M2 Ultra, M1 Max (b2824-b2833 and Dec 2023), M3, M3 Max (Dec 2023); layers of 2026 by M4 Pro (llmfit).
APPLE: Final = Family(
    name="Apple", read=0.62, lanes=256, starved=7.5, layer=69e-6, recurrent=151e-6, routed=95e-6, cache=1.2,
    hop=0.5e-3, prompt=145.0, attention=200.0, band=0.12,
    older=Older(layer=175e-6, cell=1.26e-9, cell_clocks=29.5),
)  # fmt: skip
#: A card that nobody knows: as other cards, and less sure.
UNKNOWN: Final = Family(
    name="unknown", read=0.9, lanes=256, starved=6.0, layer=80e-6, recurrent=120e-6, routed=40e-6, cache=1.3,
    hop=0.4e-3, prompt=150.0, attention=50.0, band=0.30,
)  # fmt: skip

_HBM_NAMES: Final = re.compile(r"\b(?:A100|A800|A30|H20|H100|H200|H800|V100S?|P100|B200|GH200|GB200|TITAN V|GV100)\b")
_ON_BOARD: Final = re.compile(r"SXM|80GB HBM3|H200(?! NVL)|B200")
_GEFORCE: Final = re.compile(r"GeForce|\bGTX \d|\bRTX \d0[5-9]0\b|\bTITAN\b")
_HOPPER: Final = 9.0  # from here on, a multiprocessor has twice the FP32 lanes of A100 and V100
_SINGLE_ISSUE: Final = re.compile(r"gfx(?:90|10)")  # GCN, CDNA 1-2 and RDNA 1-2: no dual issue to count
_OLD_APPLE: Final = re.compile(r"\bM[123]\b")


def family_of(gpu: Gpu, spec: GpuSpec | None) -> Family:
    """By vendor, memory and generation."""
    if gpu.vendor == "nvidia":
        return _nvidia(gpu, capability(gpu, spec))
    by_vendor = {"amd": RADEON_UNIFIED if gpu.unified else RADEON, "intel": ARC, "apple": APPLE}
    return by_vendor.get(gpu.vendor, UNKNOWN)


def _nvidia(gpu: Gpu, generation: float | None) -> Family:
    if gpu.unified:
        return LPDDR
    if _HBM_NAMES.search(gpu.name):
        return HBM_BOARD if _ON_BOARD.search(gpu.name) else HBM
    if generation is not None and generation < 8:
        return TURING if generation >= 7 else PASCAL
    return GDDR


def capability(gpu: Gpu, spec: GpuSpec | None) -> float | None:
    """CUDA's, as a number."""
    text = gpu.compute_capability or (spec.compute_capability if spec is not None else None) or ""
    return float(text) if re.fullmatch(r"\d+\.\d", text) else None


def lanes_of(family: Family, gpu: Gpu, spec: GpuSpec | None) -> int:
    """Operations in a clock of one multiprocessor, as the datasheet's rate counts them."""
    generation = capability(gpu, spec)
    if family.name == HBM.name and generation is not None and generation >= _HOPPER:
        return 2 * family.lanes
    target = gpu.compute_capability or (spec.compute_capability if spec is not None else None) or ""
    return family.lanes // 2 if _SINGLE_ISSUE.match(target) else family.lanes


def issue_clocks(gpu: Gpu, generation: float | None) -> float:
    """Clocks of one multiprocessor for a byte of weights."""
    slow = gpu.vendor == "nvidia" and generation is not None and generation < _DP4A
    return ISSUE * (WITHOUT_DP4A if slow else 1.0)


def clock_factor(gpu: Gpu) -> float:
    """How the clock compares with the datasheet's."""
    return GEFORCE_CLOCK if gpu.vendor == "nvidia" and _GEFORCE.search(gpu.name) else 1.0


def bandwidth_share(gpu: Gpu) -> float:
    """Of the nominal bandwidth, what the runtime gets to see."""
    return ECC_SHARE if gpu.vendor == "nvidia" and _INLINE_ECC.search(gpu.name) else 1.0


def had_older_builds(gpu: Gpu, generation: float | None) -> bool:
    """Whether builds of May 2024 run on the card, so that public figures of it may be of those."""
    if gpu.vendor == "apple":
        return _OLD_APPLE.search(gpu.name) is not None
    return gpu.vendor == "nvidia" and not gpu.unified and (generation is None or generation < 10)


def is_m1(gpu: Gpu) -> bool:
    return gpu.vendor == "apple" and re.search(r"\bM1\b", gpu.name) is not None
