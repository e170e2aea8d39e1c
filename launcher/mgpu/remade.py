"""A plan in the place of one that ran out of memory: as little worse as can be, and nothing that was asked for less."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from msgspec.structs import replace

from mgpu import commands
from mgpu.commands import Decided
from mgpu.decide.claims import Claim, card_key
from mgpu.decide.learnt import Shortage, learnt
from mgpu.errors import OutOfMemoryError
from mgpu.plan import Plan
from mgpu.report.lines import indices

_SHORTEST_CTX: Final = 2048  # a smaller context than this is no service to anybody
_AS_FAST: Final = 0.8


def remade(whole: Decided, old: Plan) -> Decided | None:
    """What to launch in the place of `old`. `whole`: the decision for all that was asked, as things are now.

    The same on other cards that are as good; then less context, if the person set none; then over more cards, or with
    the CPU's help. None: there is nothing.
    """
    if _is_as_good(whole.plan, old):
        return whole
    if whole.request.ctx is None:
        for ctx in _shorter(whole.plan.ctx):
            less = commands.redecide(whole, replace(whole.request, ctx=ctx))
            if _is_as_good(less.plan, old) and less.plan.ctx < whole.plan.ctx:
                return less
    return whole if whole.plan.refusal is None and _keeps_pinned(whole, old) else None


def learnt_from(error: OutOfMemoryError, decided: Decided, tries: int) -> tuple[Claim, ...]:
    """What to leave to the next plan, as `decided` ran out of memory. `tries`: how often that has happened."""
    shortage = Shortage(
        names=decided.command.devices if decided.command is not None else (),
        short=error.devices,
        held_bytes=error.held_bytes,
        wanted_bytes=error.wanted_bytes,
    )
    keys = {gpu.index: card_key(gpu) for gpu in decided.facts.rig.gpus}
    return learnt(decided.plan, shortage, keys=keys, tries=tries)


def difference(new: Plan, old: Plan) -> str:
    """What is other than before, in a few words: "context 4096 instead of 8192, as no --ctx was given"; or nothing."""
    return ", ".join(part for part in (_place(new, old), _ctx(new, old)) if part)


def _place(new: Plan, old: Plan) -> str:
    if new.placement == "offload" and old.placement != "offload":
        return "with the CPU's help"
    if new.placement == "cpu" and old.placement != "cpu":
        return "on the CPU alone"
    if new.layout.gpus != old.layout.gpus:
        return _elsewhere(new, old)
    if _cards(new) != _cards(old):
        return f"on another card, which is GPU {indices(new.layout.gpus)} now"
    return "with more on the CPU" if _on_host(new) > _on_host(old) else ""


def _ctx(new: Plan, old: Plan) -> str:
    if new.ctx == old.ctx:
        return ""
    return f"context {new.ctx} instead of {old.ctx}{', as no --ctx was given' if new.ctx < old.ctx else ''}"


def _elsewhere(new: Plan, old: Plan) -> str:
    now, before = indices(new.layout.gpus), indices(old.layout.gpus)
    if not before:
        return f"on GPU {now} instead of the CPU"
    if len(old.layout.gpus) == 1 < len(new.layout.gpus):
        return f"over GPU {now} instead of GPU {before} alone"
    return f"on GPU {now} instead of GPU {before}"


def _is_as_good(plan: Plan, old: Plan) -> bool:
    """The same cards in the same way, or as many others that are about as fast."""
    if plan.refusal is not None or plan.placement != old.placement:
        return False
    if plan.layout.gpus == old.layout.gpus:
        return _on_host(plan) <= _on_host(old)
    if len(plan.layout.gpus) > len(old.layout.gpus):
        return False
    new_speed, old_speed = plan.tok_s, old.tok_s
    return new_speed is None or old_speed is None or new_speed.expected >= _AS_FAST * old_speed.expected


def _keeps_pinned(decided: Decided, old: Plan) -> bool:
    """What flags after `--` leave on the host stays there, and nothing else goes there."""
    pinned = decided.job.pinned
    if pinned.host_layers is None and pinned.host_experts is None:
        return True
    new, had_cards = decided.plan, bool(old.layout.gpus)
    return _on_host(new) == _on_host(old) and bool(new.layout.gpus) == had_cards


def _cards(plan: Plan) -> tuple[str | None, ...]:
    """Numbers change when a card goes."""
    return tuple(device.uuid for device in plan.devices)


def _on_host(plan: Plan) -> tuple[int, int]:
    shape = plan.layout.shape
    return shape.host_layers, shape.host_experts


def _shorter(ctx: int) -> Iterator[int]:
    while (ctx := ctx // 2) >= _SHORTEST_CTX:
        yield ctx
