"""Rules about which cards: one if it will do, the fastest, the fewest; and what cards people own or think of buying."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from msgspec.structs import replace

from mgpu.adapter import Job
from mgpu.decide.options import Sketch
from mgpu.decide.place import fastest_first, on_one
from mgpu.decide.rules.ruling import BENCH, GUIDE, Ruling, about, compared, label, n_cards, quiet, speed_text
from mgpu.decide.speed import forecast
from mgpu.decide.weigh import Weighed, in_the_way
from mgpu.plan import Layout, RuleVerdict, Shape, Speed
from mgpu.rig import Gpu, Rig
from mgpu.units import GIB, gib, gib_of

#: More free cards than this are counted, not named.
_NAMED: Final = 3

#: "Two cheap cards": up to 16 GB each. Instead of them, the one card of a size that people buy (name as in gpus.csv).
_CHEAP: Final = 17 * GIB
_ONE_CARD: Final = (
    (16, "NVIDIA GeForce RTX 4060 Ti"),
    (24, "NVIDIA GeForce RTX 3090"),
    (32, "NVIDIA GeForce RTX 5090"),
    (48, "NVIDIA RTX A6000"),
    (96, "NVIDIA RTX PRO 6000 Blackwell Workstation Edition"),
)

#: One card of the summed size is worth a word where it is at least this much faster.
_WORTH_A_WORD: Final = 1.1


def fits_one_card(ruling: Ruling) -> RuleVerdict:
    """Refuse needless splits: a model that fits on one card runs on one."""
    rule, source = "fits-one-card", f"{GUIDE}; {BENCH}"
    chosen, options = ruling.chosen, ruling.options
    best = options.single
    if not options.singles:
        return quiet(rule, "there is no card" if not ruling.case.gpus else "the layout was given by hand", source)
    if chosen.kind == "replicas":
        text = f"a copy fits on each of {n_cards(len(chosen.gpus))}: replicated, not split"
        return RuleVerdict(id=rule, verdict="applies", text=text, source=source)
    if best is None:
        short_of_ram = next((one for one in options.singles if one.host_short and not any(one.short)), None)
        if short_of_ram is not None:
            text = f"{label(short_of_ram.gpus[0])} would hold it, but RAM is short by {gib(short_of_ram.host_short)}"
        else:
            text = "no single card holds it" + (": a split is justified" if ruling.is_split and chosen.fits else "")
            culprits = next((found for one in options.singles if (found := in_the_way(one))), None)
            text += f"; one would, but for {culprits}" if culprits else ""
        return RuleVerdict(id=rule, verdict="passes", text=text, source=source)
    gpu = best.gpus[0]
    rest = "the rest " if best.kind == "offload" else ""  # flags after `--` leave something to the CPU
    text = f"{rest}fits on {label(gpu)}: {gib_of(best.devices[0].total, gpu.usable_bytes)}"
    if ruling.is_split:
        text += f"; split over {len(chosen.gpus)} all the same, by request{compared(chosen, best)}"
        return RuleVerdict(id=rule, verdict="warns", text=text, source=source)
    if options.needless is not None:
        text += f"; {_needless(options.needless, best)}"
    return RuleVerdict(id=rule, verdict="applies", text=text, source=source)


def _needless(split: Sketch, single: Weighed) -> str:
    """What a split would change; where the cards without the one that holds it are that much faster, how to have it."""
    over = f"a split over {len(split.gpus)} would be"
    if split.speed and single.speed and split.speed.expected > single.speed.expected:
        return f"{over} faster{compared(split, single)}, by request: --split pipeline --force"
    return f"{over} needless{compared(split, single)}"


def fastest_card(ruling: Ruling) -> RuleVerdict:
    """Among the cards that hold it the fastest wins, not the roomiest."""
    rule, chosen, fitting = "fastest-card", ruling.chosen, ruling.options.fitting
    if chosen.kind != "single" or len(fitting) < 2:
        return quiet(rule, "there is no choice between cards that hold it")
    others = [other for other in fitting if other.gpus[0].index != chosen.gpus[0].index]
    roomiest = max(fitting, key=lambda w: w.gpus[0].usable_bytes)
    text = f"{label(chosen.gpus[0])} {speed_text(chosen.speed)}, of {len(fitting)} cards that hold it"
    differs = roomiest.gpus[0].index != chosen.gpus[0].index and chosen.speed and roomiest.speed
    if differs:
        text += f"; {label(roomiest.gpus[0])} has more room, but {speed_text(roomiest.speed)}"
    elif all(other.gpus[0].name == chosen.gpus[0].name for other in others):
        text += ", all alike"
    return RuleVerdict(id=rule, verdict="applies" if differs else "passes", text=text, source=GUIDE)


def fewest_cards(ruling: Ruling) -> RuleVerdict:
    """Where one is not enough: the fewest that hold it, and which are left free."""
    rule, chosen, considered = "fewest-cards", ruling.chosen, ruling.case.gpus
    if len(considered) < 2 or not chosen.gpus:
        return quiet(rule, "there is one card" if len(considered) == 1 else "no card takes part")
    if not chosen.fits:
        return quiet(rule, "they do not hold it")
    used = {gpu.index for gpu in chosen.gpus}
    free = [gpu for gpu in considered if gpu.index not in used]
    if free:
        names = ", ".join(label(gpu) for gpu in free) if len(free) <= _NAMED else f"the other {len(free)}"
        text = f"uses {len(used)} of {len(considered)} cards; left free and hidden from the runtime: {names}"
        return RuleVerdict(id=rule, verdict="applies", text=text, source=GUIDE)
    both = "both" if len(considered) == 2 else f"all {len(considered)}"
    return RuleVerdict(id=rule, verdict="passes", text=f"{both} cards are in use", source=GUIDE)


def use_what_you_own(ruling: Ruling) -> RuleVerdict:
    """An unequal second card still beats the CPU."""
    rule, chosen = "use-what-you-own", ruling.chosen
    if not ruling.is_split or not _are_unequal(chosen.gpus) or chosen.layout.shape.mode != "pipeline":
        return quiet(rule, "no unequal cards share the model")
    if not chosen.fits or ruling.options.single is not None:
        return quiet(rule, "one card holds it" if chosen.fits else "the cards do not hold it")
    main, *others = fastest_first(chosen.gpus, ruling.case.paces)
    kept = sum(len(span) for span, gpu in zip(chosen.layout.spans(), chosen.gpus, strict=True) if gpu is not main)
    names = " and ".join(label(gpu) for gpu in others) if len(others) <= _NAMED else f"{len(others)} slower cards"
    text = f"{names} keep{'s' if len(others) == 1 else ''} {kept} layers off the CPU"
    alone = _with_cpu_instead(ruling, main)
    if alone is not None and chosen.speed is not None:
        text += f": {about(chosen.speed)} instead of {about(alone)} tok/s with {label(main)} and the CPU (predicted)"
    return RuleVerdict(id=rule, verdict="applies", text=text, source=GUIDE)


def _with_cpu_instead(ruling: Ruling, main: Gpu) -> Speed | None:
    """The speed with as many layers as `main` may hold on it and the rest on the CPU: by weights and cache alone."""
    job, chosen = ruling.case.job, ruling.chosen
    if not job.computes_on_cpu:
        return None
    at = chosen.gpus.index(main)
    span, shape = chosen.layout.spans()[at], chosen.layout.shape
    room = main.usable_bytes - chosen.devices[at].total + job.stored(span, shape, main)

    def left(host_layers: int) -> Shape:
        return Shape(n_devices=1, host_layers=host_layers)

    n = next((n for n in range(job.n_units) if job.stored(range(n, job.n_units), left(n), main) <= room), job.n_units)
    layout = Layout(gpus=(main.index,), counts=(job.n_units - n,), shape=left(n))
    return forecast(job, layout, (main,), ruling.case.rig).tok_s if n < job.n_units else None


def _are_unequal(gpus: Sequence[Gpu]) -> bool:
    return len({(gpu.bandwidth_bytes_per_s, gpu.total_bytes) for gpu in gpus}) > 1


def two_cheap_cards(ruling: Ruling) -> RuleVerdict:
    """Two small cards give VRAM, not speed: what one card of the summed size would give."""
    rule, chosen = "two-cheap-cards", ruling.chosen
    source = f"{GUIDE}: 32B Q4 18-22 tok/s on 2x 3060, 35-40 on one 3090"
    if not ruling.is_split or any(gpu.total_bytes > _CHEAP or gpu.unified for gpu in chosen.gpus):
        return quiet(rule, "no small cards share the model", source)
    if ruling.options.single is not None:
        return quiet(rule, "one card holds it", source)
    one = _one_card_instead(ruling.case.job, chosen.gpus)
    speed = None if one is None else _speed_alone(ruling.case.job, one, ruling.case.rig)
    if one is None or speed is None or chosen.speed is None:
        return quiet(rule, "no single card of the summed size is known", source)
    if speed.expected < _WORTH_A_WORD * chosen.speed.expected:
        return quiet(rule, f"one {label_of(one)} would be no faster", source)
    text = (
        f"{n_cards(len(chosen.gpus))} of {gib(chosen.gpus[0].total_bytes)} give memory, not speed: "
        f"one {label_of(one)} would run it at {about(speed)} instead of {about(chosen.speed)} tok/s predicted"
    )
    return RuleVerdict(id=rule, verdict="applies", text=text, source=source)


def _one_card_instead(job: Job, gpus: Sequence[Gpu]) -> Gpu | None:
    """The smallest of those people buy that has the summed size and holds the whole model."""
    needed = sum(gpu.total_bytes for gpu in gpus)
    cards = (_bought(name, size * GIB) for size, name in _ONE_CARD if size * GIB * 1.02 >= needed)
    everything, shape = range(job.n_units), Shape(n_devices=1)
    return next((gpu for gpu in cards if gpu and job.device(everything, shape, gpu).total <= gpu.usable_bytes), None)


def _bought(name: str, size: int) -> Gpu | None:
    from mgpu_profiles.gpus import find_spec
    from mgpu_profiles.rigs import idle_free_bytes

    spec = find_spec(name, size)
    if spec is None or spec.bandwidth_bytes_per_s is None or spec.vram_bytes is None:
        return None
    return Gpu(
        index=0, name=name, vendor=spec.vendor, total_bytes=spec.vram_bytes,
        free_bytes=idle_free_bytes(spec.vram_bytes), bandwidth_bytes_per_s=spec.bandwidth_bytes_per_s,
        compute_capability=spec.compute_capability,
    )  # fmt: skip


def _speed_alone(job: Job, gpu: Gpu, rig: Rig) -> Speed | None:
    """Of a card that is not there: nothing was measured on it."""
    return forecast(job, on_one(job, gpu), (gpu,), replace(rig, gpus=(gpu,), links=(), measured=())).tok_s


def label_of(gpu: Gpu) -> str:
    """`"RTX 3090 (24 GB)"`."""
    return f"{gpu.name.removeprefix('NVIDIA ').removeprefix('GeForce ')} ({gpu.total_bytes / GIB:.0f} GB)"


def display_card(ruling: Ruling) -> RuleVerdict:
    """A card that drives a desktop loses 0.5-1 GB."""
    shown = [gpu for gpu in ruling.chosen.gpus if gpu.display and not gpu.unified]
    if not shown:
        return quiet("display-card", "no card of the plan drives a display")
    names = ", ".join(f"{label(gpu)} keeps {gib(gpu.reserve_bytes)} free" for gpu in shown)
    return RuleVerdict(id="display-card", verdict="applies", text=f"drives a display: {names}", source=GUIDE)
