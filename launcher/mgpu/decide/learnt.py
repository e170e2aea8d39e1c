"""What a launch that ran out of memory has taught: with how much of which card to plan the next time.

A runtime that asked in vain for its last buffer has told how much there really was: less than it then had and wanted
together. A plan that is not smaller than that would fail in the same way, whatever the driver says is free.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Final

from msgspec import Struct

from mgpu.decide.claims import HOST, Claim
from mgpu.plan import DevicePlan, Plan
from mgpu.units import MIB

#: The step below what did not fit: of its bytes, and at least; twice as much the second time.
_STEP: Final = 0.05
_LEAST_STEP: Final = 128 * MIB

#: Of the weights: what is asked for in one piece before there is anything else.
_WEIGHTS: Final = 0.8

#: The host among a runtime's devices (`mgpu.adapter.Cause`).
_CPU: Final = "CPU"

_WHY: Final = "it ran out of memory with more"


class Shortage(Struct, frozen=True, kw_only=True):
    """What is known of one failure. `names`: the runtime's, of the plan's devices in order.

    `short`: those that were too small, by these names; empty where nobody says which. `wanted_bytes`: what it asked for
    in vain, 0 where it does not say; `held_bytes`: what its log says it had there by then.
    """

    names: Sequence[str]
    short: Collection[str] = ()
    held_bytes: int = 0
    wanted_bytes: int = 0


def learnt(plan: Plan, shortage: Shortage, *, keys: Mapping[int, str], tries: int) -> tuple[Claim, ...]:
    """What to leave to the next plan of the devices that `plan` has found too small.

    `keys`: of the rig's cards by index (`mgpu.decide.claims.card_key`). `tries`: how often this has happened.
    """
    if _CPU in shortage.short:
        return (Claim(key=HOST, n_bytes=_below(plan.host.memory.total, tries), why=_WHY, leaves=True),)
    return tuple(
        Claim(
            key=keys[device.gpu],
            n_bytes=_below(_needed(device, shortage), tries) + device.reserve_bytes,
            why=_WHY,
            leaves=True,
        )
        for device in _too_small(plan, shortage)
    )


def merged(old: Sequence[Claim], new: Sequence[Claim]) -> tuple[Claim, ...]:
    """One for each card: what was learnt last is about a smaller plan."""
    return tuple({claim.key: claim for claim in (*old, *new)}.values())


def _too_small(plan: Plan, shortage: Shortage) -> tuple[DevicePlan, ...]:
    """All of them where it was not said which; of replicas, too: the same is planned on each."""
    pairs = zip(plan.devices, shortage.names, strict=False)
    named = tuple(device for device, name in pairs if name in shortage.short)
    return named if named and plan.placement != "replicas" else plan.devices


def _needed(device: DevicePlan, shortage: Shortage) -> int:
    """What was not there: all that was planned, or what it had come to by then, where it tells what it has."""
    planned, wanted = device.memory, shortage.wanted_bytes
    if not wanted or not (shortage.held_bytes or wanted >= _WEIGHTS * planned.weights):
        return planned.total
    return min(planned.total, shortage.held_bytes + wanted + planned.overhead)


def _below(n_bytes: int, tries: int) -> int:
    return max(n_bytes - tries * max(int(_STEP * n_bytes), _LEAST_STEP), 1)
