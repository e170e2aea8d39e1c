"""Rules about the rest of the machine: the CPU, the slots, the power supply, other machines, the runtimes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from mgpu.decide.matched import slow_slots, why_unmatched
from mgpu.decide.rules.modes import slow_words
from mgpu.decide.rules.ruling import GUIDE, MIN_TOK_S, Ruling, quiet, speed_text
from mgpu.plan import RuleVerdict, Verdict
from mgpu.rig import Gpu
from mgpu.units import gib

#: What the rest of a machine draws (guide's rule `psu`), in watts.
_REST_WATTS: Final = 150

#: No card runs well below this share of its board limit.
_LEAST_SHARE: Final = 0.55


def cpu_offload_last(ruling: Ruling) -> RuleVerdict:
    """The CPU's help is the last resort; experts go first where there are any."""
    rule, chosen, with_cpu = "cpu-offload-last", ruling.chosen, ruling.options.with_cpu
    if chosen.kind in {"offload", "cpu"}:
        text = f"{_on_the_cpu(ruling)} on the CPU {speed_text(chosen.speed)}"
        if ruling.refused_by == rule:
            text += _below()
        elif ruling.offers:
            text += f"; on the GPUs alone: {', '.join(ruling.offers)}"
        return RuleVerdict(id=rule, verdict="warns", text=text, source=GUIDE)
    if chosen.fits or with_cpu is None:
        return RuleVerdict(id=rule, verdict="passes", text="every layer is on a GPU", source=GUIDE)
    text = f"the GPUs do not hold it; with the CPU's help {speed_text(with_cpu.speed)}"
    if not with_cpu.fits:
        text += f", and RAM short by {gib(with_cpu.host_short)}"
    elif ruling.case.request.offload == "never":
        text += ", which --offload never rules out"
    elif ruling.refused_by == rule:
        text += _below()
    verdict: Verdict = "warns" if ruling.case.request.force else "refuses"
    return RuleVerdict(id=rule, verdict=verdict, text=text, source=GUIDE)


def _on_the_cpu(ruling: Ruling) -> str:
    """`"38 of 80 layers"`, `"the experts of 20 of 48 layers"`, or both."""
    shape, n_blocks = ruling.chosen.layout.shape, ruling.case.job.n_units - 1
    layers = min(shape.host_layers, n_blocks)
    if layers == n_blocks or ruling.chosen.kind == "cpu":
        return "all layers"
    experts = max(shape.host_experts - layers, 0)
    if not experts:
        return f"{layers} of {n_blocks} layers"
    if layers:
        return f"{layers} of {n_blocks} layers and the experts of {experts} more"
    return f"the experts of {experts} of {n_blocks} layers"


def _below() -> str:
    return f": below {MIN_TOK_S:.0f} tok/s it starts only with --offload allow"


def more_quant(ruling: Ruling) -> RuleVerdict:
    """A higher quantisation is a real reason for a second card: said by `plan`, which looks for one beside the file."""
    del ruling
    return quiet("more-quant", "no larger quantisation was looked for")


def runtime_choice(ruling: Ruling) -> RuleVerdict:
    """Mixed cards or control: llama.cpp; several users on matched cards: vLLM; EXL2 and EXL3: ExLlama.

    For a runtime without rivals. Where several were weighed, `mgpu.decide.runtime` has the last word.
    """
    rule, job, cards = "runtime-choice", ruling.case.job, ruling.case.gpus
    if ruling.case.request.runtime != "auto":
        return quiet(rule, f"{job.runtime} was asked for")
    if job.runtime != "llama.cpp":
        text = f"{job.runtime}: what reads {job.work.model.format}"
        return RuleVerdict(id=rule, verdict="passes", text=text, source=GUIDE)
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
