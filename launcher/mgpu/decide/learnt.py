"""What a launch that ran out of memory has taught: with how much of which card to plan the next time.

A runtime that asked in vain for its last buffer has told how much there really was: less than it then had and wanted
together. A plan that is not smaller than that would fail in the same way, whatever the driver says is free.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Final

from mgpu.decide.claims import HOST, Claim
from mgpu.plan import DevicePlan, Plan
from mgpu.units import MIB

#: The step below what did not fit: of its bytes, and at least; twice as much the second time.
_STEP: Final = 0.05
_LEAST_STEP: Final = 128 * MIB

#: The host among a runtime's devices (`mgpu.adapter.Cause`).
_CPU: Final = "CPU"

_WHY: Final = "it ran out of memory with more"


def learnt(
    plan: Plan,
    *,
    keys: Mapping[int, str],
    names: Sequence[str],
    short: Collection[str],
    asked_bytes: int,
    tries: int,
) -> tuple[Claim, ...]:
    """What to leave to the next plan of the devices that `plan` has found too small.

    `keys`: of the rig's cards by index (`mgpu.decide.claims.card_key`). `names`: the runtime's, of the plan's devices
    in order. `short`: those that were too small, by these names; empty where nobody says which. `asked_bytes`: what it
    had there and wanted beside that, 0 where it does not say; `tries`: how often this has happened.
    """
    return tuple(_learnt(plan, keys, names, short, asked_bytes, tries))


def merged(old: Sequence[Claim], new: Sequence[Claim]) -> tuple[Claim, ...]:
    """One for each card: what was learnt last is about a smaller plan."""
    return tuple({claim.key: claim for claim in (*old, *new)}.values())


def _learnt(
    plan: Plan, keys: Mapping[int, str], names: Sequence[str], short: Collection[str], asked_bytes: int, tries: int
) -> Iterator[Claim]:
    if _CPU in short:
        yield Claim(key=HOST, n_bytes=_below(plan.host.memory.total, tries), why=_WHY, leaves=True)
        return
    for device in _too_small(plan, names, short):
        asked = asked_bytes + device.memory.overhead if asked_bytes else device.memory.total
        usable = _below(min(asked, device.memory.total), tries)
        yield Claim(key=keys[device.gpu], n_bytes=usable + device.reserve_bytes, why=_WHY, leaves=True)


def _too_small(plan: Plan, names: Sequence[str], short: Collection[str]) -> tuple[DevicePlan, ...]:
    """All of them where it was not said which; of replicas, too: the same is planned on each."""
    named = tuple(device for device, name in zip(plan.devices, names, strict=False) if name in short)
    return named if named and plan.placement != "replicas" else plan.devices


def _below(n_bytes: int, tries: int) -> int:
    return max(n_bytes - tries * max(int(_STEP * n_bytes), _LEAST_STEP), 1)
