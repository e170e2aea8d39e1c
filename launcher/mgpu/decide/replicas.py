"""A plan of replicas as what it is made of: runtimes of their own, one on each card, with their share of the users."""

from __future__ import annotations

from collections.abc import Sequence

from msgspec import Struct
from msgspec.structs import replace

from mgpu.adapter import Command, Endpoint, Job
from mgpu.plan import HostPlan, Layout, Plan, Shape
from mgpu.rig import Gpu, Rig


class Replica(Struct, frozen=True, kw_only=True):
    """One of several runtimes that hold the same model. `plan`: its own part, a placement on a single card."""

    gpu: Gpu
    rig: Rig
    job: Job
    plan: Plan

    def command(self, endpoint: Endpoint) -> Command:
        return self.job.command(self.plan.layout, self.rig, endpoint)


def replicas_of(plan: Plan, job: Job, rig: Rig) -> tuple[Replica, ...]:
    """The replicas in the order of `plan.layout.gpus`; none where the plan is for one runtime.

    `job` is the one that was planned for (`plan.ctx` tokens for each of `plan.users`).
    """
    if plan.layout.shape.mode != "replicas":
        return ()
    each = job.at_users(plan.users_each)
    return tuple(_replica(place, plan, each, rig) for place in range(len(plan.layout.gpus)))


def commands_at(
    replicas: Sequence[Replica], ports: Sequence[int], *, host: str, api_key: str | None
) -> tuple[Command, ...]:
    """The commands of replicas that listen on `host` at `ports`, one each."""
    pairs = zip(replicas, ports, strict=True)
    return tuple(replica.command(Endpoint(host=host, port=port, api_key=api_key)) for replica, port in pairs)


def _replica(place: int, plan: Plan, job: Job, rig: Rig) -> Replica:
    index = plan.layout.gpus[place]
    gpu = next(gpu for gpu in rig.gpus if gpu.index == index)
    shape = Shape(n_devices=1)
    memory = job.host(shape, (gpu,))
    own = replace(
        plan,
        placement="single",
        users=plan.users_each,
        layout=Layout(gpus=(index,), counts=(plan.layout.counts[place],), shape=shape),
        devices=(plan.devices[place],),
        host=HostPlan(blocks=range(0), expert_blocks=range(0), memory=memory, free_bytes=plan.host.free_bytes),
        tensor_split=None,
    )
    return Replica(gpu=gpu, rig=rig, job=job, plan=own)
