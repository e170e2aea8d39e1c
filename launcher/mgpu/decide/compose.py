"""The chosen placement, the verdicts and what else was considered, put together as a `Plan`."""

from __future__ import annotations

from collections.abc import Iterator

from mgpu.decide import rules
from mgpu.decide.misfit import offers
from mgpu.decide.options import Case, Options, Sketch
from mgpu.decide.weigh import Weighed
from mgpu.plan import Alternative, DevicePlan, HostPlan, Plan, Refusal, RuleVerdict
from mgpu.request import RuntimeName
from mgpu.units import gib


def compose(case: Case, chosen: Weighed, options: Options, refusal: Refusal | None) -> Plan:
    """The plan of `chosen`; with a `refusal`, what it would have been."""
    job, layout = case.job, chosen.layout
    n_blocks = job.n_units - 1
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
        tensor_split=layout.counts if len(layout.counts) > 1 else None,
        forecast=chosen.forecast,
        rules=_verdicts(case, chosen, options, n_blocks),
        alternatives=tuple(_alternatives(case, chosen, options)),
        warnings=(*job.warnings, *_warnings(case, chosen)),
        refusal=refusal,
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


def _verdicts(case: Case, chosen: Weighed, options: Options, n_blocks: int) -> tuple[RuleVerdict, ...]:
    verdicts: list[RuleVerdict | None] = []
    if options.singles:
        verdicts.append(rules.fits_one_card(chosen, options.singles, options.single, options.needless))
        verdicts.append(rules.fastest_card(chosen, options.fitting))
        verdicts.append(rules.fewest_cards(chosen, case.gpus))
    verdicts += [
        rules.split_by_layers(chosen) if chosen.fits else None,
        rules.cpu_offload_last(chosen, options.with_cpu, n_blocks, offers(case) if chosen.kind == "offload" else []),
        rules.display_card(chosen),
    ]
    return tuple(verdict for verdict in verdicts if verdict is not None)


def _alternatives(case: Case, chosen: Weighed, options: Options) -> Iterator[Alternative]:
    seen = set[tuple[object, ...]]()
    for other in (*options.singles, options.split, options.offload, options.cpu):
        if other is None or other.layout == chosen.layout:
            continue
        kind = (other.kind, other.short_bytes, other.speed, tuple(gpu.name for gpu in other.gpus))
        if kind in seen:  # of identical cards, one speaks for all
            continue
        seen.add(kind)
        yield Alternative(
            runtime=case.job.runtime,
            placement=other.kind,
            gpus=other.layout.gpus,
            fits=other.fits,
            short_bytes=other.short_bytes,
            tok_s=other.speed,
            why_not=_why_not(chosen, other),
        )
    if options.needless is not None and chosen.kind == "single":
        yield _needless(case.job.runtime, options.needless)


def _warnings(case: Case, chosen: Weighed) -> Iterator[str]:
    if case.request.ctx == "max" and case.gpus and chosen.kind in {"offload", "cpu"}:
        yield f"--ctx max: the GPUs do not hold the model, so the context stays at {case.job.ctx}"
    if case.request.offload == "never" and chosen.kind in {"offload", "cpu"} and case.gpus:
        yield "--offload never is overruled by what comes after `--`"


def _needless(runtime: RuntimeName, sketch: Sketch) -> Alternative:
    return Alternative(
        runtime=runtime,
        placement="pipeline",
        gpus=sketch.layout.gpus,
        fits=True,
        short_bytes=0,
        tok_s=sketch.speed,
        why_not="needless split",
    )


def _why_not(chosen: Weighed, other: Weighed) -> str:
    if not other.fits:
        return f"short by {gib(other.short_bytes)}"
    if other.kind in {"offload", "cpu"}:
        return "the CPU comes last"
    if other.speed and chosen.speed and other.speed.expected < chosen.speed.expected * 0.995:
        return "slower"
    return "no faster; comes after by room or index"
