"""When nothing fits: by how much, and what would."""

from __future__ import annotations

from collections.abc import Callable

from mgpu.adapter import Job
from mgpu.decide import rules
from mgpu.decide.case import Case
from mgpu.decide.options import gpus_hold, on_gpus
from mgpu.decide.weigh import Weighed, in_the_way
from mgpu.errors import UsageError
from mgpu.units import gib, gib_of

#: Cache types to offer instead of f16, by how little they cost in quality.
_SMALLER = ("q8_0", "q5_1", "q4_0")

#: A context smaller than this is no offer worth making.
_LEAST_CTX = 1024


def explain_misfit(case: Case, closest: Weighed, with_cpu: Weighed | None) -> tuple[str, str]:
    """One line that says what lacks, and one that says what would fit."""
    helped = with_cpu if with_cpu is not None and with_cpu.fits and case.request.offload != "allow" else None
    message = _lack(closest)
    if with_cpu is not None and with_cpu.host_short:
        message += f"; for the CPU's help RAM is short by {gib(with_cpu.host_short)}"
    elif helped is not None and helped.speed is not None and closest.gpus and case.request.offload == "auto":
        message += f"; with the CPU's help it would run at {helped.speed.words}"
    would = offers(case) if closest.gpus else []
    culprits = in_the_way(closest)
    if culprits is not None:
        would.insert(0, f"it would fit but for {culprits}: stop that")
    if helped is not None:
        would.append("--offload allow runs it with the CPU's help")
    return message, "; ".join(would) or "use a smaller quantisation of the model, or free some memory"


def largest_ctx(job: Job, holds: Callable[[Job], bool], *, at_most: int) -> int | None:
    """The largest context per user that `holds` accepts, in the runtime's steps; None when not even one step."""
    if holds(job.at_ctx(at_most)):
        return at_most
    step = job.ctx_step
    low, high = 0, at_most // step
    while low < high:
        middle = (low + high + 1) // 2
        if holds(job.at_ctx(middle * step)):
            low = middle
        else:
            high = middle - 1
    return low * step or None


def _lack(closest: Weighed) -> str:
    if closest.gpus and any(closest.short):
        need = sum(device.total for device in closest.devices)
        room = sum(gpu.usable_bytes for gpu in closest.gpus)
        where = rules.label(closest.gpus[0]) if len(closest.gpus) == 1 else f"{len(closest.gpus)} GPUs"
        kept = sum(min(gpu.reserve_bytes, gpu.free_bytes) for gpu in closest.gpus)
        after = f" after {gib(kept)} reserved" if kept else ""
        return (
            f"does not fit: needs {gib(need)} on {where}, {gib(room)} free{after}; short by {gib(sum(closest.short))}"
        )
    if closest.host_short:
        free = closest.host.total - closest.host_short
        return f"does not fit: needs {gib(closest.host.total)} of RAM, {gib(free)} free"
    speed = "" if closest.speed is None else f" at {closest.speed.words}"
    return f"too slow to start unasked: the CPU alone would run it{speed}"


def offers(case: Case) -> list[str]:
    """What the GPUs alone would hold: a smaller context, a smaller cache."""
    would: list[str] = []
    if not case.offering:
        return would

    def holds(job: Job) -> bool:
        return gpus_hold(case.with_job(job))

    at_most = min(case.job.ctx, case.job.ctx_train)
    ctx = largest_ctx(case.job, holds, at_most=at_most) if holds(case.job.at_ctx(min(_LEAST_CTX, at_most))) else None
    if ctx is not None and _LEAST_CTX <= ctx < case.job.ctx:
        would.append(f"--ctx {ctx} would fit")
    if case.job.kv_type == "f16":
        would += _smaller_cache(case)
    return would


def _smaller_cache(case: Case) -> list[str]:
    """The first cache type, from the best down, with which the GPUs hold it; with what it takes of what there is."""
    for kv_type in _SMALLER:
        try:
            smaller = case.with_job(case.job.at_kv_type(kv_type))
        except UsageError:
            continue
        best = on_gpus(smaller) if gpus_hold(smaller) else None
        if best is not None:
            taken = sum(need.total for need in best.devices)
            room = sum(gpu.usable_bytes for gpu in best.gpus)
            return [f"--kv-type {kv_type} would fit ({gib_of(taken, room)})"]
    return []
