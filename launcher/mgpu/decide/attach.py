"""The plan for a service that places a model by itself: what is known of its nodes, held against the rules. Pure."""

from __future__ import annotations

from typing import Final

from mgpu.cluster import Outlook, Remote
from mgpu.decide.rules.ruling import GUIDE, label, quiet
from mgpu.errors import DoesNotFitError, MgpuError, RefusedError
from mgpu.plan import Forecast, HostBytes, HostPlan, Layout, Plan, Refusal, RuleVerdict, Shape
from mgpu.request import Request
from mgpu.rig import Gpu, Rig
from mgpu.units import gib, gib_of

#: What a runtime takes on a card beside the weights, at the least: a card that has this much more would do.
_BESIDE: Final = 1.1


def attach_plan(request: Request, rig: Rig, job: Remote) -> Plan:
    """No card of this machine, no split of ours: who gets the model, the rules that still mean something, warnings."""
    outlook = job.outlook
    refusal = _refusal(request, outlook)
    return Plan(
        placement="attach",
        runtime=job.runtime,
        ctx=job.ctx,
        users=job.users,
        kv_type=job.kv_type,
        layout=Layout(gpus=(), counts=(), shape=Shape(n_devices=0)),
        devices=(),
        host=HostPlan(
            blocks=range(0),
            expert_blocks=range(0),
            memory=HostBytes(weights=0, kv=0, compute=0),
            free_bytes=rig.ram_free_bytes,
        ),
        tensor_split=None,
        forecast=Forecast(),
        rules=(
            _fits_one_node(request, outlook, refusal),
            quiet("runtime-choice", f"{job.runtime} was asked for"),
            _network_last(rig, outlook),
        ),
        warnings=job.warnings,
        refusal=refusal,
        users_each=job.users,
        attached=attached_words(outlook),
    )


def attached_words(outlook: Outlook) -> str:
    """`"the Exo cluster at http://…: 2 nodes (studio, mini), 71.2 of 96.0 GiB free"`."""
    if outlook.nodes is None:
        return f"{outlook.service} (not asked)"
    names = ", ".join(node.name for node in outlook.nodes)
    words = f"{outlook.service}: {_count(len(outlook.nodes))} ({names})"
    total = sum(node.total_bytes for node in outlook.nodes)
    return f"{words}, {gib_of(outlook.free_bytes, total)} free" if total and outlook.free_bytes else words


def _refusal(request: Request, outlook: Outlook) -> Refusal | None:
    """What can be seen before the service is asked: too little memory on all its nodes, or a split without need."""
    needed, roomiest = outlook.needed_bytes, outlook.roomiest
    if needed is None or roomiest is None or not outlook.free_bytes:
        return None
    split = request.split in {"pipeline", "tensor"}
    alone = roomiest.free_bytes >= needed
    if split and len(outlook.nodes or ()) < 2:
        return _refused(DoesNotFitError, f"--split {request.split} needs two nodes, and there is {roomiest.name} alone")
    if split and alone and not request.force:
        return _refused(
            RefusedError,
            f"--split {request.split} is needless: {roomiest.name} alone holds the {gib(needed)} of weights, "
            f"with {gib(roomiest.free_bytes)} free",
            hint="leave --split out, or add --force",
            rule="fits-one-card",
        )
    if request.split == "none" and not alone:
        return _refused(
            DoesNotFitError,
            f"no node holds the {gib(needed)} of weights alone: {roomiest.name} has {gib(roomiest.free_bytes)} free",
            hint="leave --split none out, and several share it",
        )
    if outlook.free_bytes < needed:
        return _refused(
            DoesNotFitError,
            f"the {gib(needed)} of weights do not fit: {_count(len(outlook.nodes or ()))} "
            f"with {gib(outlook.free_bytes)} free together, short by {gib(needed - outlook.free_bytes)}",
        )
    return None


def _refused(kind: type[MgpuError], message: str, *, hint: str = "", rule: str | None = None) -> Refusal:
    return Refusal(
        code=kind.code,
        exit_code=kind.exit_code,
        message=message,
        hint=hint or "free memory on the nodes, add one, or give a smaller quantisation",
        rule=rule,
    )


def _fits_one_node(request: Request, outlook: Outlook, refusal: Refusal | None) -> RuleVerdict:
    """The same rule as for cards: what one node holds, one node gets."""
    rule = "fits-one-card"
    if outlook.unsharded is not None:
        text, source = outlook.unsharded
        return RuleVerdict(id=rule, verdict="applies", text=text, source=source)
    needed, roomiest = outlook.needed_bytes, outlook.roomiest
    if needed is None or roomiest is None:
        return quiet(rule, "the model's size or the nodes' memory is not known")
    figures = f"{gib(needed)} of weights, {gib(roomiest.free_bytes)} free on {roomiest.name}"
    if refusal is not None and refusal.rule == rule:
        return RuleVerdict(id=rule, verdict="refuses", text=f"{figures}: one node is enough", source=GUIDE)
    if roomiest.free_bytes < needed:
        text = f"{figures}: several nodes share it, each further one costs a round trip per token"
        return RuleVerdict(id=rule, verdict="passes", text=text, source=GUIDE)
    if request.split in {"pipeline", "tensor"}:
        return RuleVerdict(id=rule, verdict="warns", text=f"{figures}: --force splits it all the same", source=GUIDE)
    return RuleVerdict(id=rule, verdict="applies", text=f"{figures}: one node is enough", source=GUIDE)


def _network_last(rig: Rig, outlook: Outlook) -> RuleVerdict:
    """Another machine comes after every local card; here it was asked for by name, so it is said and done."""
    rule, needed = "network-last", outlook.needed_bytes
    cards = [gpu for gpu in rig.gpus if gpu.enabled and not gpu.integrated]
    holding = [] if needed is None else [gpu for gpu in cards if gpu.usable_bytes >= needed * _BESIDE]
    if holding:
        best = max(holding, key=_bandwidth)
        text = f"{label(best)} of this machine holds it alone, and a local card is faster than any network"
        return RuleVerdict(id=rule, verdict="warns", text=text, source=GUIDE)
    if cards and needed is None:
        text = f"the size of the model is not known here: whether {label(cards[0])} holds it was not weighed"
        return RuleVerdict(id=rule, verdict="passes", text=text, source=GUIDE)
    text = "no card of this machine holds it" if cards else "this machine has no card of its own"
    return RuleVerdict(id=rule, verdict="passes", text=text, source=GUIDE)


def _bandwidth(gpu: Gpu) -> int:
    return gpu.bandwidth_bytes_per_s or 0


def _count(n_nodes: int) -> str:
    return "1 node" if n_nodes == 1 else f"{n_nodes} nodes"
