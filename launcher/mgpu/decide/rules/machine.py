"""Rules about the rest of the machine: the CPU, the slots, the power supply, other machines, the runtimes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from mgpu.decide.matched import slow_slots, why_unmatched
from mgpu.decide.rules.modes import slow_words
from mgpu.decide.rules.ruling import GUIDE, Ruling, quiet, speed_text
from mgpu.plan import RuleVerdict
from mgpu.rig import Gpu
from mgpu.units import gib

#: What the rest of a machine draws (guide's rule `psu`), in watts.
_REST_WATTS: Final = 150

#: No card runs well below this share of its board limit.
_LEAST_SHARE: Final = 0.55


def cpu_offload_last(ruling: Ruling) -> RuleVerdict:
    """The CPU's help is the last resort; experts go first where there are any."""
    rule, chosen, job = "cpu-offload-last", ruling.chosen, ruling.case.job
    shape, n_blocks = chosen.layout.shape, job.n_units - 1
    if chosen.kind not in {"offload", "cpu"}:
        with_cpu = ruling.options.with_cpu
        if not chosen.fits and with_cpu is not None:
            text = f"the GPUs do not hold it; with the CPU's help {speed_text(with_cpu.speed)}"
            text += "" if with_cpu.fits else f", and RAM short by {gib(with_cpu.host_short)}"
            return RuleVerdict(id=rule, verdict="refuses", text=text, source=GUIDE)
        return RuleVerdict(id=rule, verdict="passes", text="every layer is on a GPU", source=GUIDE)
    if chosen.kind == "cpu":
        text = f"all layers on the CPU {speed_text(chosen.speed)}"
    elif shape.host_experts:
        text = f"the experts of {shape.host_experts} of {n_blocks} layers on the CPU {speed_text(chosen.speed)}"
    else:
        text = f"{min(shape.host_layers, n_blocks)} of {n_blocks} layers on the CPU {speed_text(chosen.speed)}"
    if ruling.offers:
        text += f"; on the GPUs alone: {', '.join(ruling.offers)}"
    return RuleVerdict(id=rule, verdict="warns", text=text, source=GUIDE)


def more_quant(ruling: Ruling) -> RuleVerdict:
    """A higher quantisation is a real reason for a second card: said by `plan`, which looks for one beside the file."""
    del ruling
    return quiet("more-quant", "no larger quantisation was looked for")


def runtime_choice(ruling: Ruling) -> RuleVerdict:
    """Mixed cards or control: llama.cpp; several users on matched cards: vLLM; EXL2 and EXL3: ExLlama."""
    rule, job, cards = "runtime-choice", ruling.case.job, ruling.case.gpus
    if ruling.case.request.runtime != "auto":
        return quiet(rule, f"{job.runtime} was asked for")
    if job.runtime != "llama.cpp":
        return RuleVerdict(id=rule, verdict="passes", text=f"{job.runtime} reads this format", source=GUIDE)
    matched = len(cards) > 1 and why_unmatched(cards) is None
    if job.users > 1 and matched:
        text = "llama.cpp, as this is a GGUF; for several users on matched cards vLLM with safetensors does more"
        return RuleVerdict(id=rule, verdict="applies", text=text, source=GUIDE)
    if ruling.is_split and why_unmatched(ruling.chosen.gpus) is not None:
        return RuleVerdict(
            id=rule,
            verdict="applies",
            text=f"llama.cpp: the most control over {len(ruling.chosen.gpus)} mixed cards",
            source=GUIDE,
        )
    return quiet(rule, "llama.cpp reads GGUF and does what the plan says")


def slow_slot(ruling: Ruling) -> RuleVerdict:
    """A card in an x1 or x4 slot, or of PCIe 1 or 2."""
    rule = "slow-slot"
    slow = slow_slots(ruling.chosen.gpus)
    if not slow:
        return quiet(rule, "no card of the plan is in an x1 or x4 slot, or in PCIe 1 or 2")
    if len(ruling.chosen.gpus) == 1 and ruling.chosen.kind == "single":
        return quiet(rule, f"{slow_words(slow)}: only loading is slower, the model is on one card")
    text = f"{slow_words(slow)}: loading and prompts are slower, tensor ranks are ruled out"
    return RuleVerdict(id=rule, verdict="warns", text=text, source=GUIDE)


def psu(ruling: Ruling) -> RuleVerdict:
    """The cards' board limits and 150 W for the rest, against the power supply."""
    rule, watts, cards = "psu", ruling.case.rig.psu_watts, ruling.chosen.gpus
    limits = [gpu.power_limit_watts for gpu in cards]
    if not cards or watts is None or None in limits:
        return quiet(rule, "the power supply's or a card's watts are not known (psu_watts in the rig profile)")
    drawn = sum(limit or 0 for limit in limits) + _REST_WATTS
    sum_text = f"{' + '.join(str(limit) for limit in limits)} W of cards and {_REST_WATTS} W for the rest"
    if drawn <= watts:
        return RuleVerdict(
            id=rule, verdict="passes", text=f"{sum_text}: {drawn} of {watts} W", source=GUIDE, quiet=True
        )
    text = f"{sum_text} are {drawn} W, and the power supply has {watts} W{_limits(cards, drawn, watts)}"
    return RuleVerdict(id=rule, verdict="warns", text=text, source=GUIDE)


def _limits(cards: Sequence[Gpu], drawn: int, watts: int) -> str:
    """Power limits that would do, all cards lowered alike."""
    share = (watts - _REST_WATTS) / (drawn - _REST_WATTS)
    if share < _LEAST_SHARE:
        return ": too little for these cards"
    limited = [(gpu, int((gpu.power_limit_watts or 0) * share)) for gpu in cards]
    if all(gpu.vendor == "nvidia" for gpu in cards):
        by_limit = {limit: [str(gpu.index) for gpu, one in limited if one == limit] for _, limit in limited}
        return "; " + ", ".join(f"nvidia-smi -i {','.join(ids)} -pl {limit}" for limit, ids in by_limit.items())
    return "; limit " + ", ".join(f"GPU {gpu.index} to {limit} W" for gpu, limit in limited)


def network_last(ruling: Ruling) -> RuleVerdict:
    """Another machine comes after every local card."""
    del ruling
    return quiet("network-last", "no other machine takes part")
