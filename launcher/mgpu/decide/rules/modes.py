"""Rules about how cards share: in a pipeline, as tensor ranks, or each with a copy of its own."""

from __future__ import annotations

from typing import Final

from mgpu.decide.matched import link_pays, slow_slots, why_unmatched
from mgpu.decide.rules.ruling import BENCH, GUIDE, Ruling, about, label, n_cards, quiet
from mgpu.decide.weigh import Weighed
from mgpu.plan import RuleVerdict, Verdict
from mgpu.rig import Gpu, Rig
from mgpu.units import GB, gib

#: Where each runtime's way of splitting by layers is written down.
_SOURCES: Final = {
    "llama.cpp": "llama.cpp b11434 src/llama-model.cpp",
    "vllm": "vLLM 0.32.0 distributed/utils.py get_pp_indices",
}
_TENSOR_BENCH: Final = "sudoingX/qwen38-mtp@c7bc415: 27B on 2x RTX 5060 Ti 22.1 by layers, 37.1 tok/s as tensor ranks"


def mixed_is_pipeline(ruling: Ruling) -> RuleVerdict:
    """Cards of different memory, speed or generation: by layers only."""
    rule, chosen = "mixed-is-pipeline", ruling.chosen
    if not ruling.is_split:
        return quiet(rule, "no split")
    why = why_unmatched(chosen.gpus)
    if why is None:
        return quiet(rule, "the cards are matched")
    smallest = min(gpu.total_bytes for gpu in chosen.gpus)
    figures = ", ".join(f"{label(gpu)} {_figures(gpu)}" for gpu in chosen.gpus[:3])
    ranks = f"tensor ranks would get {len(chosen.gpus)} x {gib(smallest)} and wait for the slowest"
    if chosen.kind == "tensor":
        ranks = f"tensor ranks all the same, by request: {len(chosen.gpus)} x {gib(smallest)}, and the slowest's pace"
        return RuleVerdict(id=rule, verdict="warns", text=f"{why}: {figures}; {ranks}", source=GUIDE)
    return RuleVerdict(id=rule, verdict="applies", text=f"{why}, so by layers: {figures}; {ranks}", source=GUIDE)


def _figures(gpu: Gpu) -> str:
    speed = "" if gpu.bandwidth_bytes_per_s is None else f" at {gpu.bandwidth_bytes_per_s / GB:.0f} GB/s"
    return f"{gib(gpu.total_bytes)}{speed}"


def tensor_when_matched(ruling: Ruling) -> RuleVerdict:
    """Tensor ranks need matched cards, divisible heads, a runtime and a model that can, and a link that pays."""
    rule, source = "tensor-when-matched", f"{GUIDE}; {_TENSOR_BENCH}"
    chosen, options, job = ruling.chosen, ruling.options, ruling.case.job
    experimental = f"; experimental in {job.runtime}" if job.tensor_is_experimental else ""
    if chosen.kind == "tensor":
        pipeline = options.split
        text = f"{_alike(chosen.gpus)}, {link_words(chosen.gpus, ruling.case.rig)}"
        if pipeline is not None:
            text += f": {_both(chosen, pipeline)}"
        verdict: Verdict = "warns" if job.tensor_is_experimental or _doubtful(ruling) else "applies"
        return RuleVerdict(id=rule, verdict=verdict, text=text + experimental, source=source)
    if not ruling.is_split or chosen.kind == "offload":
        return quiet(rule, "no split without the CPU", source)
    if options.tensor is not None:
        text = f"tensor ranks on {n_cards(len(options.tensor.gpus))}: {_both(options.tensor, chosen)}"
        if _is_faster(options.tensor, chosen):
            text += f"{experimental}, and without NVLink or P2P only by request: --split tensor"
        else:
            text += ", not enough more"
        return RuleVerdict(id=rule, verdict="passes", text=text, source=source)
    return RuleVerdict(id=rule, verdict="passes", text=f"no tensor ranks: {_why_no_ranks(ruling)}", source=source)


def _alike(gpus: tuple[Gpu, ...]) -> str:
    """`"2 matched cards"`, or how they differ."""
    return why_unmatched(gpus) or f"{len(gpus)} matched cards"


def _is_faster(ranks: Weighed, chosen: Weighed) -> bool:
    """Whether tensor ranks are predicted to be faster at all."""
    return bool(ranks.total and chosen.total and ranks.total.expected > chosen.total.expected)


def _why_no_ranks(ruling: Ruling) -> str:
    """What kept tensor ranks out of the choice."""
    cards = ruling.chosen.gpus
    if not ruling.options.singles:
        return "the layout was given by hand"
    if ruling.options.single is not None:
        return "one card holds it"
    unmatched = why_unmatched(cards)
    if unmatched is not None:
        return unmatched
    why = ruling.case.job.why_not_tensor(cards)
    if why is not None:
        return why
    if not link_pays(cards, ruling.case.rig):
        link = link_words(cards, ruling.case.rig)
        slow = f"over {link}" if "unknown" in link else f"{link} is too slow a link"
        return f"{slow}; NVLink, P2P or PCIe 4.0 x8 would do"
    return "the cards would not hold them"


def _both(ranks: Weighed, pipeline: Weighed) -> str:
    together = " together" if ranks.forecast.total_tok_s is not None else ""
    return f"{about(ranks.total)} tok/s{together}, by layers {about(pipeline.total)} (predicted)"


def _doubtful(ruling: Ruling) -> bool:
    cards = ruling.chosen.gpus
    return why_unmatched(cards) is not None or not link_pays(cards, ruling.case.rig)


def link_words(gpus: tuple[Gpu, ...], rig: Rig) -> str:
    """`"NVLink"`, `"P2P over PCIe"`, `"PCIe 4.0 x8"`: the slowest way among these cards."""
    kinds = {rig.link(a.index, b.index) for i, a in enumerate(gpus) for b in gpus[i + 1 :]}
    if kinds == {"nvlink"}:
        return "xGMI" if gpus[0].vendor == "amd" else "NVLink"
    if "pcie" not in kinds:
        return "P2P over PCIe"
    slots = [gpu.pcie for gpu in gpus if gpu.pcie is not None]
    return f"PCIe {min(slots, key=lambda slot: slot.width * 2**slot.gen)}" if slots else "PCIe of unknown width"


def split_by_layers(ruling: Ruling) -> RuleVerdict:
    """The split is computed from real layer sizes, cache, buffers, free memory and speed."""
    rule, chosen = "split-by-layers", ruling.chosen
    source = _SOURCES.get(ruling.case.job.runtime, GUIDE)
    if not ruling.is_split or chosen.kind == "tensor" or not chosen.fits:
        return quiet(rule, "nothing is split by layers", source)
    counts = "+".join(str(count) for count in chosen.layout.counts)
    if ruling.case.job.pinned.tensor_split is not None:
        text = f"{counts} whole layers (the last card's include the output layer), as demanded after `--`"
        return RuleVerdict(id=rule, verdict="applies", text=text, source=source)
    text = f"{counts} whole layers (the last card's include the output layer), from real layer sizes and free memory"
    options = ruling.options
    if options.balanced is not None and chosen.layout == options.balanced.layout:
        text += "; in proportion to speed, so that no card waits for another"
    elif len({ruling.case.paces[gpu.index] for gpu in chosen.gpus}) > 1:
        text += "; fastest card filled first"
    else:
        text += "; equal cards keep equal room"
    return RuleVerdict(id=rule, verdict="applies", text=text, source=source)


def many_users(ruling: Ruling) -> RuleVerdict:
    """Several users: a model that fits one card is replicated, one that does not is split for throughput."""
    rule, chosen, users = "many-users", ruling.chosen, ruling.case.job.users
    source = f"{GUIDE}: 50 requests on 8 GPUs ~800 tok/s together; {BENCH}"
    if users == 1:
        return quiet(rule, "one user", source)
    together = "" if chosen.total is None else f": {about(chosen.total)} tok/s together (predicted)"
    if chosen.kind == "replicas":
        each = -(-users // len(chosen.gpus))
        text = f"{users} users on {n_cards(len(chosen.gpus))}, a replica for {each} on each{together}"
        single = ruling.options.single
        if single is not None and single.total is not None:
            text += f", {about(single.total)} on {label(single.gpus[0])} alone"
        return RuleVerdict(id=rule, verdict="applies", text=text, source=source)
    where = "the CPU" if not chosen.gpus else n_cards(len(chosen.gpus))
    text = f"{users} users share one runtime on {where}{together}"
    return RuleVerdict(id=rule, verdict="applies" if ruling.is_split else "passes", text=text, source=source)


def slow_words(gpus: tuple[Gpu, ...]) -> str:
    """`"GPU 1 (RTX 3060) is in a PCIe 3.0 x1 slot"`."""
    slow = slow_slots(gpus)
    named = ", ".join(f"{label(gpu)} in PCIe {gpu.pcie}" for gpu in slow)
    return f"slow slot{'s' if len(slow) > 1 else ''}: {named}"
