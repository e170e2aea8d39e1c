"""What cards took up in the end, against the plan, and whether the driver quietly put the rest into system RAM. Pure.

Drivers that do so: NVIDIA's for Windows and WSL since 536.40 ("CUDA - Sysmem Fallback Policy"), amdgpu (GTT), and any
of NVIDIA's where llama.cpp is told GGML_CUDA_ENABLE_UNIFIED_MEMORY. All works, at a tenth of the speed.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Final

from msgspec import Struct

from mgpu.detect.live import CardNow
from mgpu.plan import Plan
from mgpu.rig import Gpu, short_name
from mgpu.units import MIB, gib

#: A card that lacks more than this, and more than this share, of its weights and cache holds them elsewhere.
_SHORT_BYTES: Final = 512 * MIB
_SHORT_SHARE: Final = 0.1

#: What another program may take or give back without a doubt about whose memory it is.
_OTHERS: Final = 256 * MIB

_ROOM: Final = "end what else holds the card, use a smaller --ctx, or keep more free with --reserve"


class HostSeen(Struct, frozen=True, kw_only=True):
    """System RAM. `private_bytes`: of the runtime's processes, no file behind it (`mgpu.launch.tree.host_bytes`).

    `taken_bytes`: by how much less is free than before the launch. `unified`: the variable above is set. `wsl`: the
    driver's share of RAM lies outside of what Linux sees.
    """

    private_bytes: int | None = None
    taken_bytes: int | None = None
    unified: bool = False
    wsl: bool = False


class Place(Struct, frozen=True, kw_only=True):
    """A card of the plan (`gpu`: rig index). `held_bytes`: what the runtime holds there; None: nobody can tell.

    `spilled_bytes`: of what was to be there, what seems to be in RAM; then there is a `warning`, and a `hint`.
    """

    gpu: int
    name: str
    planned_bytes: int
    held_bytes: int | None
    spilled_bytes: int = 0
    warning: str = ""
    hint: str = ""


def judge(
    plans: Sequence[Plan],
    gpus: Sequence[Gpu],
    *,
    before: Sequence[CardNow],
    after: Sequence[CardNow],
    host: HostSeen,
    pids: Collection[int],
) -> tuple[Place, ...]:
    """One place for each card of `plans` (several for replicas), in their order.

    `before`: when it was planned; `after`: when it was ready. `pids`: the runtime's processes, children among them.
    """
    was, now = {card.index: card for card in before}, {card.index: card for card in after}
    by_index = {gpu.index: gpu for gpu in gpus}
    places: list[Place] = []
    missing: dict[int, int] = {}
    for index, (planned, stored) in _promised(plans).items():
        gpu, card = by_index[index], now.get(index, CardNow(index=index))
        held = _held(was.get(index), card, pids)
        places.append(Place(gpu=index, name=short_name(gpu.name), planned_bytes=planned, held_bytes=held))
        if held is not None and not gpu.unified and stored - held > max(_SHORT_BYTES, _SHORT_SHARE * stored):
            missing[index] = stored - held
    extra = _extra(plans, host)
    return tuple(
        _warned(place, missing[place.gpu], sum(missing.values()), extra, host, _lent(was, now, place.gpu))
        if place.gpu in missing
        else place
        for place in places
    )


def _promised(plans: Sequence[Plan]) -> Mapping[int, tuple[int, int]]:
    """Rig index to (all bytes, weights and cache alone)."""
    sums: dict[int, tuple[int, int]] = {}
    for plan in plans:
        for device in plan.devices:
            planned, stored = sums.get(device.gpu, (0, 0))
            memory = device.memory
            sums[device.gpu] = (planned + memory.total, stored + memory.weights + memory.kv)
    return sums


def _held(before: CardNow | None, after: CardNow, pids: Collection[int]) -> int | None:
    """By the driver's word on our processes; else by what has gone from the card, unless others moved meanwhile."""
    own = [size for pid, size in after.by_pid.items() if pid in pids]
    if own:
        return sum(own)
    if before is None or before.free_bytes is None or after.free_bytes is None:
        return None
    moved = [abs(after.by_pid.get(pid, 0) - size) for pid, size in before.by_pid.items()]
    gone = before.free_bytes - after.free_bytes
    return None if sum(moved) > _OTHERS or gone < 0 else gone


def _extra(plans: Sequence[Plan], host: HostSeen) -> int | None:
    """RAM in use beyond the plan; None where it cannot be seen."""
    if host.wsl:
        return None
    seen = [size for size in (host.private_bytes, host.taken_bytes) if size is not None]
    planned = sum(plan.host.memory.total for plan in plans)
    return max(seen) - planned if seen else None


def _lent(before: Mapping[int, CardNow], after: Mapping[int, CardNow], index: int) -> int:
    """By how much more RAM AMD's driver lends the card than before."""
    was = before[index].gtt_used_bytes if index in before else None
    now = after[index].gtt_used_bytes if index in after else None
    return now - was if was is not None and now is not None else 0


def _warned(place: Place, short: int, all_short: int, extra: int | None, host: HostSeen, lent: int) -> Place:
    """With a warning, where as much as it lacks (or half: the rest may be the plan's error) is seen in RAM."""
    by_gtt = lent * 2 >= short
    in_ram = extra is not None and extra * 2 >= all_short
    if not (by_gtt or in_ram or host.wsl):
        return place
    subject = (
        f"GPU {place.gpu} ({place.name}) holds {gib(place.held_bytes or 0)}, {gib(place.planned_bytes)} was planned"
    )
    where = "seems to be" if host.wsl and not by_gtt else "is"
    return Place(
        gpu=place.gpu,
        name=place.name,
        planned_bytes=place.planned_bytes,
        held_bytes=place.held_bytes,
        spilled_bytes=short,
        warning=f"{subject}: {gib(short)} {where} in system RAM, which is many times slower",
        hint=_fix(host, by_gtt=by_gtt),
    )


def _fix(host: HostSeen, *, by_gtt: bool) -> str:
    if by_gtt:
        return f"amdgpu moves to RAM (GTT) what does not fit: {_ROOM}"
    if host.unified:
        return f"unset GGML_CUDA_ENABLE_UNIFIED_MEMORY, then it fails where it does not fit; or {_ROOM}"
    if host.wsl:
        return (
            "in Windows: NVIDIA Control Panel, Manage 3D settings, CUDA - Sysmem Fallback Policy: "
            f"Prefer No Sysmem Fallback; or {_ROOM}"
        )
    return _ROOM
