"""What bytes, layers and hops cost on one card, in seconds."""

from __future__ import annotations

from functools import lru_cache
from typing import Final

from msgspec import Struct
from msgspec.structs import replace

from mgpu.decide.speed import families
from mgpu.decide.speed.families import Family
from mgpu.rig import Gpu
from mgpu_profiles.gpus import find_spec

#: vLLM starts a step's kernels as one CUDA graph: seconds a layer. Qwen 27B INT4 on an RTX 3090, 46 tok/s alone
#: (syv-ai/qwen38-27b-rtx3090#135), is what its bytes take with hardly more.
_VLLM_LAYER: Final = 10e-6


#: How sure a prediction is for a card whose multiprocessors nobody knows.
_BAND_WITHOUT_RATE: Final = 0.2


class Pace(Struct, frozen=True, kw_only=True):
    """Seconds: for a byte of weights, of slow types' extra, of cache; a layer and what comes with some; a head looking
    back at one token; a hop to the next device. `flops`, `attention_flops`: operations a second on prompts.
    """

    weight: float
    unpack: float
    cache: float
    layer: float
    recurrent: float
    routed: float
    head: float
    hop: float
    flops: float
    attention_flops: float
    band: float
    family: str


@lru_cache(maxsize=256)
def pace_of(gpu: Gpu, runtime: str, older: bool) -> Pace | None:  # noqa: FBT001  # a key of the memory
    """None for a card of unknown bandwidth. `older`: under llama.cpp b2824-b2833, where the card had such a build."""
    if gpu.bandwidth_bytes_per_s is None or gpu.bandwidth_bytes_per_s <= 0:
        return None
    spec = find_spec(gpu.name, gpu.total_bytes)
    family = family_of_device(gpu)
    generation = families.capability(gpu, spec)
    bandwidth = gpu.bandwidth_bytes_per_s * families.bandwidth_share(gpu)
    per_flop = 1e12 / families.lanes_of(family, gpu, spec)
    rate = spec.fp32_tflops if spec is not None else None
    clocks = rate * per_flop if rate else gpu.bandwidth_bytes_per_s / family.starved
    clocks *= families.clock_factor(gpu)
    issue = families.issue_clocks(gpu, generation)
    pace = Pace(
        weight=family.read / bandwidth + issue / clocks,
        unpack=issue / clocks,
        cache=family.cache / bandwidth,
        layer=_VLLM_LAYER if runtime == "vllm" else family.layer,
        recurrent=_VLLM_LAYER if runtime == "vllm" else family.recurrent,
        routed=_VLLM_LAYER if runtime == "vllm" else family.routed,
        head=0.0,
        hop=family.hop,
        flops=clocks * family.prompt,
        attention_flops=clocks * family.attention,
        band=family.band if rate else max(family.band, _BAND_WITHOUT_RATE),
        family=family.name,
    )
    if older and family.older is not None and families.had_older_builds(gpu, generation):
        return _as_older(pace, family, clocks)
    return pace


def family_of_device(gpu: Gpu) -> Family:
    """The card's family, by the backend that drives it."""
    family = families.family_of(gpu, find_spec(gpu.name, gpu.total_bytes))
    device = gpu.device or ""
    if gpu.vendor == "nvidia" and device.startswith("Vulkan"):
        return replace(family, band=max(family.band, 0.15))
    if gpu.vendor == "amd" and device.startswith("ROCm"):
        return replace(family, layer=families.LAYER_ROCM)
    return family


def _as_older(pace: Pace, family: Family, clocks: float) -> Pace:
    older = family.older
    if older is None:
        return pace
    return replace(pace, layer=older.layer, cache=0.0, head=older.cell + older.cell_clocks / clocks)
