"""The guide's rules as verdicts: each a pure function of what was weighed, with the figures it used in its text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from mgpu.decide.options import Sketch
from mgpu.decide.weigh import Weighed
from mgpu.plan import RuleVerdict, Speed
from mgpu.rig import Gpu, short_name
from mgpu.units import gib, gib_of

_GUIDE: Final = "insiderllm.com/guides/multi-gpu-worth-it (2026-02-08)"
_BENCH: Final = "XiongjieDai/GPU-Benchmarks@aa72e0e: 8B on 1/2/4x 3090 111.7/108.1/104.9 tok/s"

#: More free cards than this are counted, not named.
_NAMED: Final = 3

#: Below this, generation is not usable: the guide calls 3-5 tok/s painful and 1 tok/s unusable.
MIN_TOK_S: Final = 3.0


def fits_one_card(
    chosen: Weighed, singles: Sequence[Weighed], best_single: Weighed | None, needless: Sketch | None
) -> RuleVerdict:
    """`singles`: every card alone, fitting or not. `needless`: the split that was avoided, for its speed."""
    source = f"{_GUIDE}; {_BENCH}"
    short_of_ram = next((single for single in singles if single.host_short and not any(single.short)), None)
    if best_single is None and short_of_ram is not None:
        text = f"{label(short_of_ram.gpus[0])} would hold it, but RAM is short by {gib(short_of_ram.host_short)}"
        return RuleVerdict(id="fits-one-card", verdict="passes", text=text, source=source)
    if best_single is None:
        text = "no single card holds it" + (": a split is justified" if chosen.kind == "pipeline" else "")
        return RuleVerdict(id="fits-one-card", verdict="passes", text=text, source=source)
    gpu, need = best_single.gpus[0], best_single.devices[0]
    text = f"fits on {label(gpu)}: {gib_of(need.total, gpu.usable_bytes)}"
    if chosen.kind == "pipeline":
        text += f"; split over {len(chosen.gpus)} all the same, by request{_cost(best_single, chosen)}"
        return RuleVerdict(id="fits-one-card", verdict="warns", text=text, source=source)
    if needless is not None:
        text += f"; a split over {len(needless.gpus)} would be needless{_cost(best_single, needless)}"
    return RuleVerdict(id="fits-one-card", verdict="applies", text=text, source=source)


def fastest_card(chosen: Weighed, fitting: Sequence[Weighed]) -> RuleVerdict | None:
    """Speaks only where several cards hold the model."""
    if len(fitting) < 2 or chosen.kind != "single":
        return None
    others = [other for other in fitting if other.gpus[0].index != chosen.gpus[0].index]
    roomiest = max(fitting, key=lambda w: w.gpus[0].usable_bytes)
    text = f"{label(chosen.gpus[0])} {speed_text(chosen.speed)}, of {len(fitting)} cards that hold it"
    differs = roomiest.gpus[0].index != chosen.gpus[0].index and chosen.speed and roomiest.speed
    if differs:
        text += f"; {label(roomiest.gpus[0])} has more room, but {speed_text(roomiest.speed)}"
    elif all(other.gpus[0].name == chosen.gpus[0].name for other in others):
        text += ", all alike"
    return RuleVerdict(id="fastest-card", verdict="applies" if differs else "passes", text=text, source=_GUIDE)


def fewest_cards(chosen: Weighed, considered: Sequence[Gpu]) -> RuleVerdict | None:
    """Speaks only where the rig has cards that the plan leaves free, or where all are needed."""
    if len(considered) < 2 or not chosen.gpus:
        return None
    used = {gpu.index for gpu in chosen.gpus}
    free = [gpu for gpu in considered if gpu.index not in used]
    if free:
        names = ", ".join(label(gpu) for gpu in free) if len(free) <= _NAMED else f"the other {len(free)}"
        text = f"{len(used)} of {len(considered)} cards hold it; left free and hidden from the runtime: {names}"
        return RuleVerdict(id="fewest-cards", verdict="applies", text=text, source=_GUIDE)
    text = f"all {len(considered)} cards are in use"
    return RuleVerdict(id="fewest-cards", verdict="passes", text=text, source=_GUIDE)


def split_by_layers(chosen: Weighed) -> RuleVerdict | None:
    """Speaks of every layout over more than one card."""
    if len(chosen.gpus) < 2:
        return None
    counts = "+".join(str(count) for count in chosen.layout.counts)
    text = f"{counts} whole layers (the last card's include the output layer), from real layer sizes and free memory"
    speeds = {gpu.bandwidth_bytes_per_s for gpu in chosen.gpus}
    text += "; fastest card filled first" if len(speeds) > 1 else "; equal cards keep equal room"
    return RuleVerdict(
        id="split-by-layers", verdict="applies", text=text, source="llama.cpp b11434 src/llama-model.cpp"
    )


def cpu_offload_last(chosen: Weighed, with_cpu: Weighed | None, n_blocks: int, offers: Sequence[str]) -> RuleVerdict:
    """Always speaks: that nothing is offloaded is worth knowing.

    `with_cpu`: what the CPU's help would bring. `offers`: what would keep it all on the GPUs.
    """
    shape = chosen.layout.shape
    if chosen.kind not in {"offload", "cpu"}:
        if not chosen.fits and with_cpu is not None:
            text = f"the GPUs do not hold it; with the CPU's help {speed_text(with_cpu.speed)}"
            text += "" if with_cpu.fits else f", and RAM short by {gib(with_cpu.host_short)}"
            return RuleVerdict(id="cpu-offload-last", verdict="refuses", text=text, source=_GUIDE)
        text = "every layer is on a GPU"
        return RuleVerdict(id="cpu-offload-last", verdict="passes", text=text, source=_GUIDE)
    if chosen.kind == "cpu":
        text = f"all layers on the CPU {speed_text(chosen.speed)}"
    elif shape.host_experts:
        text = f"the experts of {shape.host_experts} of {n_blocks} layers on the CPU {speed_text(chosen.speed)}"
    else:
        text = f"{min(shape.host_layers, n_blocks)} of {n_blocks} layers on the CPU {speed_text(chosen.speed)}"
    if offers:
        text += f"; on the GPUs alone: {', '.join(offers)}"
    return RuleVerdict(id="cpu-offload-last", verdict="warns", text=text, source=_GUIDE)


def display_card(chosen: Weighed) -> RuleVerdict | None:
    """Speaks where a card of the plan drives a desktop."""
    shown = [gpu for gpu in chosen.gpus if gpu.display and not gpu.unified]
    if not shown:
        return None
    names = ", ".join(f"{label(gpu)} keeps {gib(gpu.reserve_bytes)} free" for gpu in shown)
    return RuleVerdict(id="display-card", verdict="applies", text=f"drives a display: {names}", source=_GUIDE)


def label(gpu: Gpu) -> str:
    """`"GPU 0 (RTX 3090)"`."""
    return f"GPU {gpu.index} ({short_name(gpu.name)})"


def speed_text(speed: Speed | None) -> str:
    """`"(101-137 tok/s predicted)"`, to follow a noun."""
    return "(speed unknown)" if speed is None else f"({speed.words})"


def _cost(single: Weighed, split: Weighed | Sketch) -> str:
    if single.speed is None or split.speed is None:
        return ""
    one, many = single.speed.expected, split.speed.expected
    digits = 0 if many >= 10 else 1
    return f": ~{many:.{digits}f} instead of ~{one:.{digits}f} tok/s predicted ({many / one - 1:+.0%})"
