"""What would change the answer: a smaller context or cache, another quantisation beside the file, one more card.

Each is a decision of its own, made like the first; only those that change something are told. For `plan`, which has the
time; `run` does without.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Final

from msgspec import Struct
from msgspec.structs import replace

from mgpu.adapter import Job
from mgpu.decide.choose import choose
from mgpu.errors import UsageError
from mgpu.model import Model
from mgpu.plan import Plan, RuleVerdict, Speed
from mgpu.report.lines import indices
from mgpu.request import Request
from mgpu.rig import Gpu, Rig, short_name
from mgpu_profiles.rigs import idle_free_bytes

#: Smaller contexts to try, as shares of the one asked for; and the least worth offering.
_SHARES: Final = (2, 4, 8)
_LEAST_CTX: Final = 2048

#: A change worth a line makes it this much faster, or takes fewer cards, or keeps the CPU out of it.
_FASTER: Final = 1.15

#: Somebody else uses a card that has less than this share of an idle one's memory free.
_BUSY: Final = 0.9

_RANKS: Final = {"cpu": 0, "offload": 1, "pipeline": 2, "tensor": 2, "attach": 2, "single": 3, "replicas": 3}
_GUIDE: Final = "insiderllm.com/guides/multi-gpu-worth-it (2026-02-08)"


class Question(Struct, frozen=True, kw_only=True):
    """What was decided, and how to decide it again. `job_of` makes the job of another file of the same model."""

    request: Request
    rig: Rig
    job: Job
    plan: Plan
    model: Model
    siblings: tuple[Model, ...]
    job_of: Callable[[Model], Job]

    def again(self, *, job: Job | None = None, rig: Rig | None = None) -> Plan:
        return choose(self.request, rig or self.rig, job or self.job, offering=False)


def changes(question: Question) -> tuple[str, ...]:
    """One line for each thing that would change the answer for the better."""
    lines = (
        _ranks(question),
        _faster_split(question),
        _idle_cards(question),
        _smaller_context(question),
        _smaller_cache(question),
        _next_quant_down(question),
        _one_more_card(question),
    )
    return tuple(line for line in lines if line is not None)


def more_quant(question: Question) -> RuleVerdict:
    """Rule `more-quant`: the best quantisation lying beside the file that the rig's cards would hold by themselves."""
    rule = "more-quant"
    for other in reversed(question.siblings):
        if other.weights_bytes <= question.model.weights_bytes:
            break
        better = question.again(job=question.job_of(other))
        if better.refusal is None and better.placement in {"single", "pipeline", "tensor"}:
            text = f"{os.path.basename(other.path)} ({other.quantization}) lies beside it and fits: {outcome(better)}"  # noqa: PTH119 - no path is opened
            return RuleVerdict(id=rule, verdict="applies", text=text, source=_GUIDE)
    text = "no larger quantisation that would fit lies beside the file"
    return RuleVerdict(id=rule, verdict="passes", text=text, source=_GUIDE, quiet=True)


def _ranks(question: Question) -> str | None:
    """Tensor ranks by request, where they are faster and nothing but being experimental is against them."""
    plan = question.plan
    ranks = next((other for other in plan.alternatives if other.placement == "tensor" and other.fits), None)
    if ranks is None or ranks.tok_s is None or plan.placement != "pipeline":
        return None
    if not _is_faster(ranks.tok_s, plan.tok_s):
        return None
    return f"--split tensor: GPU {indices(ranks.gpus)} as tensor ranks, {ranks.tok_s.words}; experimental"


def _faster_split(question: Question) -> str | None:
    """A split, where the one card that holds it is much slower than others together."""
    plan, request = question.plan, question.request
    split = next((other for other in plan.alternatives if other.placement == "pipeline" and other.fits), None)
    if (
        split is None
        or request.split != "auto"
        or plan.placement != "single"
        or not _is_faster(split.tok_s, plan.tok_s)
    ):
        return None
    other = choose(replace(request, split="pipeline", force=True), question.rig, question.job, offering=False)
    return f"--split pipeline --force: {outcome(other)}" if _is_faster(other.tok_s, plan.tok_s) else None


def _idle_cards(question: Question) -> str | None:
    """Cards that somebody else uses now."""
    rig = question.rig
    idle = {gpu.index: idle_free_bytes(gpu.total_bytes) for gpu in rig.gpus if not gpu.unified}
    busy = {gpu.index for gpu in rig.gpus if gpu.free_bytes < _BUSY * idle.get(gpu.index, 0)}
    if not busy:
        return None
    gpus = (replace(gpu, free_bytes=idle[gpu.index]) if gpu.index in busy else gpu for gpu in rig.gpus)
    other = question.again(rig=replace(rig, gpus=tuple(gpus)))
    freed = [gpu for gpu in other.layout.gpus if gpu in busy]
    return f"with GPU {indices(freed)} idle: {outcome(other)}" if freed and _is_better(other, question.plan) else None


def _smaller_context(question: Question) -> str | None:
    for share in _SHARES:
        job = question.job.at_ctx(question.plan.ctx // share)
        if job.ctx < _LEAST_CTX or job.ctx >= question.plan.ctx:
            return None
        other = question.again(job=job)
        if _takes_less(other, question.plan):
            return f"--ctx {job.ctx}: {outcome(other)}"
    return None


def _smaller_cache(question: Question) -> str | None:
    if question.job.kv_type not in {"f16", "auto"}:
        return None
    try:
        other = question.again(job=question.job.at_kv_type("q8_0"))
    except UsageError:
        return None
    return f"--kv-type q8_0: {outcome(other)}" if _takes_less(other, question.plan) else None


def _next_quant_down(question: Question) -> str | None:
    smaller = [other for other in question.siblings if other.weights_bytes < question.model.weights_bytes]
    for other in reversed(smaller):
        plan = question.again(job=question.job_of(other))
        if _is_better(plan, question.plan):
            return f"{os.path.basename(other.path)}, beside it: {outcome(plan)}"  # noqa: PTH119 - no path is opened
    return None


def _one_more_card(question: Question) -> str | None:
    """One more of the plan's last card; or of the rig's best, where the plan uses none."""
    rig = question.rig
    cards = {gpu.index: gpu for gpu in rig.gpus if gpu.enabled and not gpu.unified and not gpu.integrated}
    used = [cards[index] for index in question.plan.layout.gpus if index in cards] or list(cards.values())
    if not used or question.plan.placement in {"single", "replicas"}:
        return None
    best = max(used, key=lambda gpu: (gpu.bandwidth_bytes_per_s or 0, gpu.total_bytes))
    another = _another(best, max(gpu.index for gpu in rig.gpus) + 1)
    other = question.again(rig=replace(rig, gpus=(*rig.gpus, another)))
    return (
        f"one more {short_name(best.name)}: {outcome(other, named=False)}" if _is_better(other, question.plan) else None
    )


def _another(gpu: Gpu, index: int) -> Gpu:
    """A card like `gpu`, idle."""
    return replace(
        gpu, index=index, uuid=None, device=None, pci_bus_id=None, display=False, reserve_bytes=0, processes=(),
        free_bytes=max(gpu.free_bytes, int(gpu.total_bytes * 0.98)),
    )  # fmt: skip


def _is_better(other: Plan, plan: Plan) -> bool:
    """Takes less, or is clearly faster."""
    return _takes_less(other, plan) or (other.refusal is None and _is_faster(other.tok_s, plan.tok_s))


def _is_faster(other: Speed | None, speed: Speed | None) -> bool:
    return other is not None and speed is not None and other.expected >= _FASTER * speed.expected


def _takes_less(other: Plan, plan: Plan) -> bool:
    """Runs where the plan does not, keeps the CPU out of it, or takes fewer cards."""
    if other.refusal is not None:
        return False
    if plan.refusal is not None:
        return True
    ours, theirs = _RANKS[plan.placement], _RANKS[other.placement]
    if ours != theirs:
        return theirs > ours
    return len(other.devices) < len(plan.devices) and theirs == _RANKS["pipeline"]


def outcome(plan: Plan, *, named: bool = True) -> str:
    """`"GPU 0 alone, 36-42 tok/s predicted"`; `"2 cards by layers, …"` where the cards are not to be `named`."""
    cards = f"GPU {indices([device.gpu for device in plan.devices])}" if named else f"{len(plan.devices)} cards"
    words = {
        "single": f"{cards} alone" if named else "one card alone",
        "pipeline": f"{cards} by layers",
        "tensor": f"{cards} as tensor ranks",
        "replicas": f"a replica on each of {cards}",
        "offload": f"{cards} with the CPU's help",
        "cpu": "the CPU alone",
    }
    return words.get(plan.placement, plan.placement) + (f", {plan.tok_s.words}" if plan.tok_s else "")
