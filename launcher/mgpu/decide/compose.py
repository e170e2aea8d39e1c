"""The chosen placement, the verdicts and what else was considered, put together as a `Plan`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from mgpu.decide import rules
from mgpu.decide.case import Case
from mgpu.decide.misfit import offers
from mgpu.decide.options import Options, Sketch
from mgpu.decide.speed import complete
from mgpu.decide.weigh import Weighed, users_each
from mgpu.plan import Alternative, DevicePlan, HostPlan, Plan, Refusal
from mgpu.request import RuntimeName
from mgpu.rig import Gpu
from mgpu.units import gib


def compose(case: Case, chosen: Weighed, options: Options, refusal: Refusal | None) -> Plan:
    """The plan of `chosen`; with a `refusal`, what it would have been."""
    job, layout = case.job, chosen.layout
    n_blocks = job.n_units - 1
    ruling = rules.Ruling(
        case=case,
        chosen=chosen,
        options=options,
        offers=tuple(offers(case)) if chosen.kind == "offload" and not _by_hand(case) else (),
        refused_by=refusal.rule if refusal else None,
    )
    return Plan(
        placement=chosen.kind,
        runtime=job.runtime,
        ctx=job.ctx,
        users=job.users,
        kv_type=job.kv_type,
        layout=layout,
        devices=_devices(chosen, n_blocks),
        host=HostPlan(
            blocks=range(min(layout.shape.host_layers, n_blocks)),
            expert_blocks=range(layout.shape.host_experts),
            memory=chosen.host,
            free_bytes=case.rig.ram_free_bytes,
        ),
        tensor_split=layout.counts if len(layout.counts) > 1 and layout.shape.mode == "pipeline" else None,
        forecast=complete(chosen.forecast, job, layout, chosen.gpus, case.rig),
        rules=rules.verdicts(ruling),
        alternatives=tuple(_alternatives(case, chosen, options)),
        warnings=(*job.warnings, *_warnings(case, chosen)),
        refusal=refusal,
        users_each=users_each(job, layout),
    )


def _by_hand(case: Case) -> bool:
    """Whether flags after `--` say what stays on the host."""
    pinned = case.job.pinned
    return pinned.host_layers is not None or pinned.host_experts is not None


def _devices(chosen: Weighed, n_blocks: int) -> tuple[DevicePlan, ...]:
    return tuple(
        DevicePlan(
            gpu=gpu.index,
            name=gpu.name,
            uuid=gpu.uuid,
            blocks=range(span.start, min(span.stop, n_blocks)),
            has_output=n_blocks in span,
            memory=need,
            free_bytes=gpu.free_bytes,
            reserve_bytes=gpu.reserve_bytes,
        )
        for gpu, span, need in zip(chosen.gpus, chosen.layout.spans(), chosen.devices, strict=True)
    )


def _alternatives(case: Case, chosen: Weighed, options: Options) -> Iterator[Alternative]:
    seen = {_kind(chosen)}
    for other in options.all:
        kind = _kind(other)
        if other.layout == chosen.layout or kind in seen:  # of identical cards, one speaks for all
            continue
        seen.add(kind)
        yield Alternative(
            runtime=case.job.runtime,
            placement=other.kind,
            gpus=other.layout.gpus,
            fits=other.fits,
            short_bytes=other.short_bytes,
            tok_s=other.speed,
            total_tok_s=other.forecast.total_tok_s,
            why_not=_why_not(case, chosen, other, options),
        )
    if options.needless is not None and chosen.kind == "single":
        faster = options.needless.speed and chosen.speed and options.needless.speed.expected > chosen.speed.expected
        why_not = "one card holds it" if faster else "needless split"
        yield _sketched(case.job.runtime, options.needless, why_not)
    unasked = options.unasked
    if unasked is not None and chosen.kind == "pipeline" and unasked.layout.counts != chosen.layout.counts:
        yield _sketched(case.job.runtime, unasked, f"what {case.job.runtime} does unasked: by free memory alone")


def _kind(one: Weighed) -> tuple[object, ...]:
    counts = sorted(zip((gpu.name for gpu in one.gpus), one.layout.counts, strict=True))
    return one.kind, one.short_bytes, one.speed and one.speed.expected, tuple(counts)


def _warnings(case: Case, chosen: Weighed) -> Iterator[str]:
    if case.request.ctx == "max" and case.gpus and chosen.kind in {"offload", "cpu"}:
        yield f"--ctx max: the GPUs do not hold the model, so the context stays at {case.job.ctx}"
    if case.request.offload == "never" and chosen.kind in {"offload", "cpu"} and case.gpus:
        yield "--offload never is overruled by what comes after `--`"


def _sketched(runtime: RuntimeName, sketch: Sketch, why_not: str) -> Alternative:
    return Alternative(
        runtime=runtime,
        placement="pipeline",
        gpus=sketch.layout.gpus,
        fits=True,
        short_bytes=0,
        tok_s=sketch.speed,
        why_not=why_not,
    )


def _why_not(case: Case, chosen: Weighed, other: Weighed, options: Options) -> str:
    if not other.fits:
        return f"short by {gib(other.short_bytes)}"
    if other.kind in {"offload", "cpu"}:
        return "the CPU comes last"
    if case.asked_mode is not None and other.kind != case.asked_mode:
        return f"{_ASKED[case.asked_mode]} asked for"
    if chosen.kind == "pipeline" and other.kind in {"tensor", "pipeline"}:
        return _why_not_this_split(case, chosen, other, options)
    if _slower(case, chosen, other):
        return "slower for all users together" if case.job.users > 1 else "slower"
    return _what_tells(chosen.gpus[0], other.gpus[0]) if other.speed else "its speed is not known"


_ASKED: Final = {"pipeline": "a split by layers was", "tensor": "tensor ranks were"}


def _what_tells(chosen: Gpu, other: Gpu) -> str:
    """Rule `fastest-card`, between cards of one speed."""
    if other.usable_bytes != chosen.usable_bytes:
        return "as fast, less room"
    return "as fast, but drives a display" if other.display and not chosen.display else "as fast, later in the rig"


def _why_not_this_split(case: Case, chosen: Weighed, other: Weighed, options: Options) -> str:
    if other.kind == "pipeline":
        counts = "+".join(map(str, other.layout.counts))
        if options.balanced is not None and other.layout == options.balanced.layout:
            return f"{counts}, evenly timed: for long prompts, many users"
        return f"{counts}, fastest card first: for one user"
    if _slower(case, chosen, other) or not case.job.tensor_is_experimental:
        return "not enough faster"
    return "experimental: --split tensor asks for it"


def _slower(case: Case, chosen: Weighed, other: Weighed) -> bool:
    ours, theirs = (chosen.total, other.total) if case.job.users > 1 else (chosen.speed, other.speed)
    return bool(ours and theirs and theirs.expected < ours.expected * 0.995)
