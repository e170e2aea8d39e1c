"""Which cards of the rig are in play, and how much of each: `--gpus`, `--reserve`, disabled and display cards."""

from __future__ import annotations

from typing import Final

from msgspec.structs import replace

from mgpu.errors import ProfileError, UsageError
from mgpu.request import Request
from mgpu.rig import Gpu, Rig
from mgpu.units import MIB

#: A desktop takes 0.5-1 GB of its card (guide; rule `display-card`). What it holds now is not free already; this is for
#: the windows opened later.
DISPLAY_RESERVE: Final = 512 * MIB


def consider(request: Request, rig: Rig) -> tuple[Gpu, ...]:
    """The cards a plan may use, in rig order, each with its reserve. Raises `UsageError` for a card there is not."""
    enabled = tuple(gpu for gpu in rig.gpus if gpu.enabled)
    chosen = enabled
    if request.gpus:
        wanted = [_find(text, rig) for text in request.gpus]
        for gpu in wanted:
            if not gpu.enabled:
                raise ProfileError(
                    f"GPU {gpu.index} ({gpu.name}) is disabled in rig {rig.name!r}",
                    hint="set enabled = true in the profile, or leave it out of --gpus",
                )
        indices = {gpu.index for gpu in wanted}
        chosen = tuple(gpu for gpu in enabled if gpu.index in indices)
    reserves = {_find(text, rig).index: size for text, size in request.reserve if text}
    everywhere = max((size for text, size in request.reserve if not text), default=None)
    return tuple(_reserved(gpu, reserves.get(gpu.index, everywhere)) for gpu in chosen)


def _reserved(gpu: Gpu, asked: int | None) -> Gpu:
    if asked is not None:
        return replace(gpu, reserve_bytes=asked)
    if gpu.display and not gpu.reserve_bytes and not gpu.unified:
        return replace(gpu, reserve_bytes=DISPLAY_RESERVE)
    return gpu


def _find(text: str, rig: Rig) -> Gpu:
    """The card meant by an index, a UUID (or its unique beginning), a device name or a part of the card's name."""
    if text.isdigit():
        found = [gpu for gpu in rig.gpus if gpu.index == int(text)]
    else:
        word = text.lower()
        found = [gpu for gpu in rig.gpus if word == (gpu.device or "").lower()]
        found = found or [gpu for gpu in rig.gpus if (gpu.uuid or "").lower().startswith(word)]
        found = found or [gpu for gpu in rig.gpus if word in gpu.name.lower()]
    if len(found) == 1:
        return found[0]
    listing = ", ".join(f"{gpu.index} {gpu.name}" for gpu in rig.gpus) or "it has none"
    if found:
        raise UsageError(f"{text!r} means {len(found)} GPUs", hint=f"use an index: {listing}")
    raise UsageError(f"no GPU {text!r} in rig {rig.name!r}", hint=f"its GPUs: {listing}")
