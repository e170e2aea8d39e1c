"""How fast a placement will generate for one user: a physical model with few constants. Always a prediction.

One token takes: the bytes each device reads, at its bandwidth times an efficiency; a fixed cost for each layer (kernel
launches) and for each hop from one device to the next (copy, synchronise); and the bytes the CPU reads, at RAM speed.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Final

from mgpu.adapter import Job
from mgpu.plan import Forecast, Layout, Speed
from mgpu.rig import Gpu, Rig

# Least squares on the relative error over 196 rows of XiongjieDai/GPU-Benchmarks@aa72e0e (Llama-3 8B and 70B, Q4_K_M
# and F16, 1-4 CUDA cards, llama.cpp b2824-b2833, May 2024). `benchmarks/speed_accuracy.py` computes the error over the
# 120 Q4_K_M rows: median 4.7 %, nine of ten within 17 %, worst 30 % (four A100 SXM).
_EFFICIENCY_GDDR: Final = 0.897
_EFFICIENCY_HBM: Final = 0.504
_SECONDS_PER_LAYER: Final = 70.5e-6
_SECONDS_PER_HOP: Final = 301e-6
_SECONDS_PER_TOKEN: Final = 728e-6

#: Cards with HBM, by the model number in their name.
_HBM: Final = r"\b(?:A100|A800|A30|H20|H100|H200|H800|V100S?|P100|B200|GH200|GB200|TITAN V|MI\d{2,3}X?|Radeon VII)\b"

#: A CPU reaches about this share of its RAM's nominal bandwidth when generating; and what to assume of a machine whose
#: bandwidth nobody told us: dual-channel DDR4-3200 (51 GB/s), with a wide band around it.
_EFFICIENCY_RAM: Final = 0.8
_ASSUMED_RAM_BANDWIDTH: Final = 51 * 10**9

_BAND: Final = 0.17  # nine of ten rows lie within it
_BAND_ASSUMED_RAM: Final = 0.6


def forecast(job: Job, layout: Layout, gpus: Sequence[Gpu], rig: Rig) -> Forecast:
    """The speed of `layout`, whose devices are `gpus`, in order. Empty when a card's bandwidth is unknown."""
    device_seconds = _device_seconds(job, layout, gpus)
    if device_seconds is None:
        return Forecast()
    ram_bandwidth = rig.ram_bandwidth_bytes_per_s
    host_seconds = host_seconds_per_token(job, layout, ram_bandwidth)
    seconds = device_seconds + host_seconds
    expected = 1 / seconds
    unsure = host_seconds / seconds if ram_bandwidth is None else 0.0
    band = _BAND + (_BAND_ASSUMED_RAM - _BAND) * unsure
    speed = Speed(expected=expected, low=expected * (1 - band), high=expected * (1 + band))
    return Forecast(tok_s=speed)


def host_seconds_per_token(job: Job, layout: Layout, ram_bandwidth: int | None) -> float:
    """Seconds the CPU needs for its layers or experts; 0 when it has none."""
    traffic = job.host_traffic(layout.shape)
    return traffic / ((ram_bandwidth or _ASSUMED_RAM_BANDWIDTH) * _EFFICIENCY_RAM)


def _device_seconds(job: Job, layout: Layout, gpus: Sequence[Gpu]) -> float | None:
    seconds = _SECONDS_PER_TOKEN + (job.n_units - 1) * _SECONDS_PER_LAYER
    seconds += max(len(gpus) - 1, 0) * _SECONDS_PER_HOP
    for span, gpu in zip(layout.spans(), gpus, strict=True):
        if gpu.bandwidth_bytes_per_s is None:
            return None
        seconds += job.traffic(span, layout.shape) / (gpu.bandwidth_bytes_per_s * _efficiency(gpu))
    return seconds


def _efficiency(gpu: Gpu) -> float:
    return _EFFICIENCY_HBM if re.search(_HBM, gpu.name) else _EFFICIENCY_GDDR
