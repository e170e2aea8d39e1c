"""Predictions with their bands, and what was measured in their place."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final

from msgspec.structs import replace

from mgpu.adapter import Job, Work
from mgpu.decide.speed.decode import Decoded, decode, decode_seconds, is_older
from mgpu.decide.speed.measured import CORRECTED, SCATTER, correction, find_measured
from mgpu.decide.speed.prompt import prompt_seconds, prompt_tokens
from mgpu.decide.speed.users import total_tok_s
from mgpu.plan import Forecast, Layout, Speed, Wait
from mgpu.rig import Gpu, Rig

#: What makes a prediction less sure, as a share of the speed; shares add up as independent errors do.
_CPU_ONLY: Final = 0.25  # RAM of known bandwidth; what the CPU makes of it differs
_ASSUMED_RAM: Final = 0.6
_RANKS: Final = 0.18
_MIXED: Final = 0.12
_EXPERTS: Final = 0.10
_SLOW_TYPES: Final = 0.20
_MUCH: Final = 0.2  # of the bytes
_USERS: Final = 0.30
_PROMPT: Final = 0.35
_PROMPT_OVER_SEVERAL: Final = 0.5  # how far devices overlap differs by model and build
_MOST: Final = 0.75


def forecast(job: Job, layout: Layout, gpus: Sequence[Gpu], rig: Rig) -> Forecast:
    """The speed of `layout`, whose devices are `gpus`, in order: one user's, and all users' together.

    Empty when a card's bandwidth is unknown. Cheap: a few additions for each device.
    """
    work = job.work
    older = is_older(work, rig)
    measured = find_measured(work, layout, gpus, rig) if rig.measured else None
    total = _total(work, layout, gpus, rig, older=older)
    decoded = decode(work, layout, gpus, rig, older=older)
    if measured is not None:
        ratio = None if decoded is None else measured.tok_s * decoded.seconds
        return Forecast(tok_s=_as_measured(measured.tok_s), total_tok_s=_scaled(total, ratio))
    if decoded is None:
        return Forecast()
    scale = correction(work, layout, rig) if rig.measured else None
    if scale is not None:
        return Forecast(tok_s=_speed(scale / decoded.seconds, CORRECTED), total_tok_s=_scaled(total, scale))
    speed = _speed(1 / decoded.seconds, band_of(work, layout, decoded, rig))
    if older:
        speed = _reaching_up(speed, work, layout, gpus, rig)
    return Forecast(tok_s=speed, total_tok_s=total)


def complete(partial: Forecast, job: Job, layout: Layout, gpus: Sequence[Gpu], rig: Rig) -> Forecast:
    """`partial` (of `forecast`) with prompts and the wait for the first token, for the placement that is shown."""
    work = job.work
    n = prompt_tokens(work)
    seconds = prompt_seconds(work, layout, gpus, rig, n)
    if seconds is None or partial.tok_s is None:
        return partial
    measured = find_measured(work, layout, gpus, rig)
    rate = measured.prompt_tok_s if measured is not None else None
    speed = _as_measured(rate) if rate else _speed(n / seconds, _PROMPT if len(gpus) < 2 else _PROMPT_OVER_SEVERAL)
    wait = Wait(
        prompt_tokens=n,
        expected=n / speed.expected + 1 / partial.tok_s.expected,
        low=n / speed.high + 1 / partial.tok_s.high,
        high=n / speed.low + 1 / partial.tok_s.low,
    )
    return replace(partial, prompt_tok_s=speed, first_token=wait)


def band_of(work: Work, layout: Layout, decoded: Decoded, rig: Rig) -> float:
    """How sure a prediction is: nine of ten times within this share of it."""
    paces, tensor = decoded.paces, layout.shape.mode == "tensor"
    unsure = _ASSUMED_RAM if rig.ram_bandwidth_bytes_per_s is None else _CPU_ONLY
    mixed = len(paces) > 1 and len({pace.family for pace in paces}) > 1
    slow = work.unpack[-1] > _MUCH * work.weights[-1]
    band = math.hypot(
        max([pace.band for pace in paces], default=0.0),
        unsure * decoded.host / decoded.seconds,
        _RANKS if tensor else 0.0,
        _MIXED if mixed else 0.0,
        _EXPERTS if work.model.is_moe else 0.0,
        _SLOW_TYPES if slow else 0.0,
    )
    return min(band, _MOST)


def _reaching_up(speed: Speed, work: Work, layout: Layout, gpus: Sequence[Gpu], rig: Rig) -> Speed:
    """Public figures are of builds of May 2024; today's are faster, and the band says so."""
    newer = decode_seconds(work, layout, gpus, rig, older=False)
    return speed if newer is None else replace(speed, high=max(speed.high, 1 / newer))


def _total(work: Work, layout: Layout, gpus: Sequence[Gpu], rig: Rig, *, older: bool) -> Speed | None:
    if work.users < 2:
        return None
    total = total_tok_s(work, layout, gpus, rig, older=older)
    return None if total is None else _speed(total, _USERS)


def _speed(expected: float, band: float) -> Speed:
    return Speed(expected=expected, low=expected * (1 - band), high=expected * (1 + band))


def _as_measured(tok_s: float) -> Speed:
    return Speed(expected=tok_s, low=tok_s * (1 - SCATTER), high=tok_s * (1 + SCATTER), measured=True)


def _scaled(speed: Speed | None, scale: float | None) -> Speed | None:
    if speed is None or scale is None:
        return speed
    return Speed(expected=speed.expected * scale, low=speed.low * scale, high=speed.high * scale)
