"""For tests of decisions: rigs by name, models from headers, and one call that plans."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

from mgpu.decide.choose import choose
from mgpu.decide.consider import with_reserves
from mgpu.inspect.source import read_model
from mgpu.plan import Plan, RuleVerdict
from mgpu.request import Request
from mgpu.rig import Gpu, Rig
from mgpu.units import GB, GIB
from mgpu_adapters.llamacpp.adapter import LlamaCpp
from mgpu_profiles.store import BUNDLED, Store


def rig_named(name: str) -> Rig:
    """A bundled rig."""
    return Store(BUNDLED).load(name)


read = functools.cache(read_model)


def decide(model: Path, rig: Rig | str, **asked: Any) -> Plan:
    """The plan for a model file on a rig, as asked."""
    adapter, request = LlamaCpp(), Request(**asked)
    job = adapter.job(read(str(model)), request, adapter.assumed())
    machine = with_reserves(request, rig_named(rig) if isinstance(rig, str) else rig)
    return choose(request, machine, job)


def verdict(plan: Plan, rule: str) -> RuleVerdict | None:
    """What a rule said, or None if it had nothing to say."""
    return next((said for said in plan.rules if said.id == rule and not said.quiet), None)


def card(index: int, gib: float, gbs: int | None, **more: Any) -> Gpu:
    """A card of `gib` free GiB and `gbs` GB/s."""
    size = int(gib * GIB)
    return Gpu(
        index=index,
        name=more.pop("name", f"NVIDIA Test {gib:g}G"),
        vendor="nvidia",
        total_bytes=size,
        free_bytes=size,
        bandwidth_bytes_per_s=None if gbs is None else gbs * GB,
        **more,
    )


def rig_of(*gpus: Gpu, ram_gib: int = 64) -> Rig:
    """A machine with these cards and 64 GiB of RAM at 51 GB/s."""
    return Rig(
        name="test",
        source="profile",
        gpus=gpus,
        ram_bytes=ram_gib * GIB,
        ram_free_bytes=ram_gib * GIB,
        ram_bandwidth_bytes_per_s=51 * GB,
    )
