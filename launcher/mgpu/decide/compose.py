"""The chosen placement, the verdicts and what else was considered, put together as a `Plan`."""

from __future__ import annotations

from collections.abc import Iterator

from mgpu.decide import rules
from mgpu.decide.misfit import offers
from mgpu.decide.options import Case, Options, Sketch
from mgpu.decide.speed import complete
from mgpu.decide.weigh import Weighed, users_each
from mgpu.plan import Alternative, DevicePlan, HostPlan, Plan, Refusal
from mgpu.request import RuntimeName
from mgpu.units import gib


def compose(case: Case, chosen: Weighed, options: Options, refusal: Refusal | None) -> Plan:
    """The plan of `chosen`; with a `refusal`, what it would have been."""
    job, layout = case.job, chosen.layout
    n_blocks = job.n_units - 1
    ruling = rules.Ruling(
        case=case,
        chosen=chosen,
        options=options,
        offers=tuple(offers(case)) if chosen.kind == "offload" and options.singles else (),
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
            why_not=_why_not(case, chosen, other),
        )
    if options.needless is not None and chosen.kind == "single":
        yield _sketched(case.job.runtime, options.needless, "needless split")
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


def _why_not(case: Case, chosen: Weighed, other: Weighed) -> str:
    if not other.fits:
        return f"short by {gib(other.short_bytes)}"
    if other.kind in {"offload", "cpu"}:
        return "the CPU comes last"
    slower = _slower(case, chosen, other)
    if chosen.kind == "pipeline" and other.kind in {"tensor", "pipeline"}:
        return _why_not_this_split(case, other, slower=slower)
    if slower:
        return "slower for all users together" if case.job.users > 1 else "slower"
    return "no faster; comes after by room or index"


def _why_not_this_split(case: Case, other: Weighed, *, slower: bool) -> str:
    if other.kind == "pipeline":
        return "evenly timed: for long prompts, many users" if slower else "fastest card first: for one user"
    if slower or not case.job.tensor_is_experimental:
        return "not enough faster"
    return "experimental: --split tensor asks for it"


def _slower(case: Case, chosen: Weighed, other: Weighed) -> bool:
    ours, theirs = (chosen.total, other.total) if case.job.users > 1 else (chosen.speed, other.speed)
    return bool(ours and theirs and theirs.expected < ours.expected * 0.995)
