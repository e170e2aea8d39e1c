"""`mgpu run MODEL --ctx 512 --prompt …` with the decision replaced: one replica on each of the first two devices.

replicas_driver.py MODEL PROMPT
"""

from __future__ import annotations

import sys

from msgspec.structs import replace

from mgpu import commands
from mgpu.adapter import Job
from mgpu.commands import Decided
from mgpu.decide.claims import Claim
from mgpu.decide.replicas import replicas_of
from mgpu.errors import MgpuError
from mgpu.plan import DevicePlan, Layout, Plan, Shape
from mgpu.request import Request
from mgpu.rig import Gpu, Rig
from mgpu.running import Wish, run


def replicated(plan: Plan, job: Job, rig: Rig) -> Plan:
    """The plan, as if replicas had been chosen."""
    gpus, n_units = rig.gpus[:2], job.n_units
    layout = Layout(gpus=(0, 1), counts=(n_units, n_units), shape=Shape(n_devices=2, mode="replicas"))
    devices = tuple(_device(gpu, job) for gpu in gpus)
    return replace(plan, placement="replicas", layout=layout, devices=devices, users=2, users_each=1)


def _device(gpu: Gpu, job: Job) -> DevicePlan:
    return DevicePlan(
        gpu=gpu.index,
        name=gpu.name,
        uuid=gpu.uuid,
        blocks=range(job.n_units - 1),
        has_output=True,
        memory=job.device(range(job.n_units), Shape(n_devices=1), gpu),
        free_bytes=gpu.free_bytes,
        reserve_bytes=0,
    )


def main() -> int:
    model, prompt = sys.argv[1:]
    request = Request(ctx=512, runtime_args=("--temp", "0"))

    def decide(_wish: Wish, claims: tuple[Claim, ...]) -> Decided:
        one = commands.decide(model, request, rig_name=None, launching=True, explicit=None, claims=claims)
        plan = replicated(one.plan, one.job, one.facts.rig)
        return replace(one, plan=plan, replicas=replicas_of(plan, one.job, one.facts.rig))

    try:
        run(Wish(argument=model, request=request, prompt=prompt), decide=decide)
    except MgpuError as error:
        sys.stderr.write(f"mgpu: {error.message}\n")
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
