"""Pairs of figures that people measured on one machine: the sign and the size of what a split or a mode does."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from msgspec import Struct
from msgspec.structs import replace

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.public_rows import cards, job_of

from mgpu.adapter import Job
from mgpu.decide.place import by_room, on_each, on_host, on_one, pipeline
from mgpu.decide.speed import forecast
from mgpu.plan import Layout, Shape
from mgpu.rig import Gpu, Rig
from mgpu.units import GB, GIB

_EPISODE_3 = 'LocalLLaMA "Episode 3", May 2025; Q8_0 by its speed'
#: Figures whose model is not on record; a 27B of 4 bits by their speed.
_UNNAMED = "public, 2026; taken to be a Qwen 27B"
_MIXED = "1x RTX 3090 24GB + 2x RTX 3060 12GB"


class Pair(Struct, frozen=True, kw_only=True):
    """Two figures: before and after. `cards` are those of the second."""

    model: str
    quant: str
    cards: str
    before: float
    after: float
    source: str
    ctx: int = 1024


#: One card, and a split over several that it did not need: layers by memory, as the runtime does it.
NEEDLESS = (
    Pair(model="Llama-3-8B", quant="Q4_K_M", cards="2x RTX 3090 24GB", before=111.7, after=108.1, source="guide"),
    Pair(model="Llama-3-8B", quant="Q4_K_M", cards="4x RTX 3090 24GB", before=111.7, after=104.9, source="guide"),
    Pair(model="Llama-3-8B", quant="Q4_K_M", cards="2x RTX 4090 24GB", before=127.7, after=122.6, source="b2833"),
    Pair(model="Llama-3-8B", quant="Q4_K_M", cards="4x RTX 4090 24GB", before=127.7, after=117.6, source="b2833"),
    Pair(model="Llama-3-8B", quant="F16", cards="2x RTX 4090 24GB", before=54.34, after=53.27, source="b2833"),
    Pair(model="Llama-3-8B", quant="F16", cards="4x RTX 4090 24GB", before=54.34, after=52.69, source="b2833"),
    Pair(model="Llama-3-8B", quant="Q4_K_M", cards="4x RTX 4000 Ada 20GB", before=58.59, after=56.14, source="b2833"),
    Pair(model="Llama-3-8B", quant="Q4_K_M", cards="4x RTX 6000 Ada 48GB", before=131.0, after=119.0, source="b2833"),
    Pair(model="Llama-3-70B", quant="Q4_K_M", cards="4x RTX 6000 Ada 48GB", before=18.36, after=17.96, source="b2833"),
    Pair(model="Llama-3-8B", quant="Q4_K_M", cards="4x A40 48GB", before=88.95, after=83.79, source="b2833"),
    Pair(model="Llama-3-8B", quant="Q4_K_M", cards="4x A100 PCIe 80GB", before=138.3, after=117.3, source="b2833"),
    Pair(model="Llama-3-8B", quant="Q4_K_M", cards="4x A100 SXM 80GB", before=133.4, after=97.7, source="b2833"),
    Pair(model="Qwen3-8B", quant="Q8_0", cards=_MIXED, before=82, after=48, source=_EPISODE_3),
    Pair(model="Qwen3-14B", quant="Q8_0", cards=_MIXED, before=48, after=28, source=_EPISODE_3),
)

#: Layers by memory, and the fastest card filled first.
TUNED = (
    Pair(model="Qwen3-32B", quant="Q8_0", cards=_MIXED, before=13.0, after=15.6, source=_EPISODE_3),
    Pair(model="Llama-3-70B", quant="Q4_0", cards=_MIXED, before=10.3, after=12.1, source=_EPISODE_3),
    Pair(model="gemma-3-27b", quant="Q8_0", cards=_MIXED, before=14.9, after=18.9, source=_EPISODE_3),
)

#: Layers, and tensor ranks, under llama.cpp.
TENSOR = (
    Pair(model="Qwen3.8-27B", quant="UD-Q4_K_XL", cards="2x RTX 5060 Ti 16GB", before=22.1, after=37.1,
         source="sudoingX/qwen38-mtp"),
    Pair(model="gpt-oss-120b", quant="MXFP4", cards="4x RTX 4090 24GB", before=180.4, after=179.8,
         source="public, April-September 2026"),
    Pair(model="Qwen3.6-27B", quant="Q4_K_M", cards="2x RX 9070 XT 16GB", before=27.4, after=34.9,
         source=_UNNAMED),
    Pair(model="Qwen3.6-27B", quant="Q4_K_M", cards="1x RTX 3060 12GB + 1x RTX 4070 SUPER 12GB", before=21.2,
         after=30.1, source=_UNNAMED),
    Pair(model="Qwen3.5-27B", quant="Q4_K_M", cards="2x RX 7900 XTX 24GB", before=34.5, after=41.57,
         source="llama.cpp #25051, Vulkan"),
)  # fmt: skip


class Known(Struct, frozen=True, kw_only=True):
    """One of the guide's figures: a range of tokens a second for one user."""

    what: str
    model: str
    quant: str
    cards: str
    low: float
    high: float
    on_gpu: int | None = None  # units; the rest is the CPU's
    ram_gbs: int | None = None


GUIDE = (
    Known(what="8B on one 3090", model="Llama-3-8B", quant="Q4_K_M", cards="RTX 3090 24GB", low=111.7, high=111.7),
    Known(what="8B on two 3090", model="Llama-3-8B", quant="Q4_K_M", cards="2x RTX 3090 24GB", low=108.1, high=108.1),
    Known(what="8B on four 3090", model="Llama-3-8B", quant="Q4_K_M", cards="4x RTX 3090 24GB", low=104.9, high=104.9),
    Known(what="32B on one 3090", model="Qwen2.5-32B", quant="Q4_K_M", cards="RTX 3090 24GB", low=35, high=40),
    Known(what="32B on two 3060", model="Qwen2.5-32B", quant="Q4_K_M", cards="2x RTX 3060 12GB", low=18, high=22),
    Known(what="70B on two 3090", model="Llama-3-70B", quant="Q4_K_M", cards="2x RTX 3090 24GB", low=16, high=21),
    Known(what="70B on a 4090 and the CPU", model="Llama-3-70B", quant="Q4_K_M", cards="RTX 4090 24GB", low=3, high=5,
          on_gpu=43, ram_gbs=96),
    Known(what="70B on the CPU", model="Llama-3-70B", quant="Q4_K_M", cards="", low=0.8, high=1.2, ram_gbs=51),
)  # fmt: skip


def speed(job: Job, layout: Layout, gpus: Sequence[Gpu], ram: int | None = None) -> float:
    """The expected speed on a machine of these cards."""
    rig = Rig(name="public", source="profile", gpus=tuple(gpus), ram_bandwidth_bytes_per_s=ram)
    said = forecast(job, layout, gpus, rig).tok_s
    assert said is not None
    return said.expected


def predicted(pair: Pair, kind: str) -> tuple[float, float]:
    """The two figures of a pair, as predicted."""
    job, gpus = job_of(pair.model, pair.quant, pair.ctx), cards(pair.cards)
    split = speed(job, by_room(job, gpus), gpus)
    if kind == "needless":
        return speed(job, on_one(job, gpus[0]), gpus[:1]), split
    if kind == "tensor":
        return split, speed(job, on_each(job, gpus, "tensor"), gpus)
    roomy = [replace(gpu, free_bytes=gpu.total_bytes - GIB // 2) for gpu in gpus]  # the fastest is named first
    layout = pipeline(job, roomy)
    assert layout is not None
    by_index = {gpu.index: gpu for gpu in roomy}
    return split, speed(job, layout, [by_index[index] for index in layout.gpus])


def of_guide(known: Known) -> float:
    """A figure of the guide, as predicted for a conversation of a thousand tokens."""
    job = job_of(known.model, known.quant, 1024)
    ram = None if known.ram_gbs is None else known.ram_gbs * GB
    if not known.cards:
        return speed(job, on_host(job), (), ram)
    gpus = cards(known.cards)
    if known.on_gpu is None:
        return speed(job, by_room(job, gpus), gpus, ram)
    shape = Shape(n_devices=1, host_layers=job.n_units - known.on_gpu)
    return speed(job, Layout(gpus=(0,), counts=(known.on_gpu,), shape=shape), gpus, ram)


def print_pairs() -> None:
    for title, kind, pairs in (
        ("Needless splits", "needless", NEEDLESS), ("The fastest card first", "tuned", TUNED),
        ("Tensor ranks", "tensor", TENSOR),
    ):  # fmt: skip
        print(f"\n{title:38} {'measured':>22} {'predicted':>22} {'points':>7}")
        for pair in pairs:
            before, after = predicted(pair, kind)
            real, said = pair.after / pair.before - 1, after / before - 1
            figures = f"{pair.before:6g} -> {pair.after:5g} {real:+7.1%} {before:7.1f} -> {after:5.1f} {said:+7.1%}"
            print(f"{pair.model + ' ' + pair.quant:19} {pair.cards[:34]:34} {figures} {100 * (said - real):+6.1f}")
    print(f"\n{'The guide':28} {'says':>14} {'predicted':>10} {'error':>7}")
    for known in GUIDE:
        said = of_guide(known)
        error = (
            0.0
            if known.low <= said <= known.high
            else min(said / known.low, said / known.high, key=lambda r: abs(r - 1)) - 1
        )
        span = f"{known.low:g}" if known.low == known.high else f"{known.low:g}-{known.high:g}"
        print(f"{known.what:28} {span:>14} {said:10.1f} {error:+7.1%}")
