"""Which cards of the rig are in play, and how much of each: `--gpus`, `--reserve`, disabled and display cards."""

from __future__ import annotations

import re
from typing import Final

from msgspec.structs import replace

from mgpu.errors import ProfileError, UsageError
from mgpu.request import Request
from mgpu.rig import Gpu, Rig
from mgpu.units import MIB

#: A desktop takes 0.5-1 GB of its card (guide; rule `display-card`). What it holds now is not free already; this is for
#: the windows opened later.
DISPLAY_RESERVE: Final = 512 * MIB

#: An index has one or two digits; more are a model number, like 3090.
_INDEX: Final = re.compile(r"[0-9]{1,2}")
_LEAST_UUID: Final = len("GPU-0000")


def with_reserves(request: Request, rig: Rig) -> Rig:
    """The rig with what `--reserve` keeps free, and what a display card keeps free unasked."""
    named = {gpu.index: size for text, size in request.reserve if text for gpu in _find(text, rig)}
    everywhere = max((size for text, size in request.reserve if not text), default=None)
    gpus = tuple(_reserved(gpu, named.get(gpu.index, everywhere)) for gpu in rig.gpus)
    return replace(rig, gpus=gpus)


def consider(request: Request, rig: Rig) -> tuple[Gpu, ...]:
    """The cards a plan may use, in rig order. Raises `UsageError` for a card there is not."""
    named = {gpu.index for text in request.gpus for gpu in _find_enabled(text, rig)}
    return tuple(gpu for gpu in rig.gpus if gpu.enabled and (gpu.index in named or not request.gpus))


def _reserved(gpu: Gpu, asked: int | None) -> Gpu:
    if asked is not None:
        return replace(gpu, reserve_bytes=asked)
    if gpu.display and not gpu.reserve_bytes and not gpu.unified:
        return replace(gpu, reserve_bytes=DISPLAY_RESERVE)
    return gpu


def _find_enabled(text: str, rig: Rig) -> list[Gpu]:
    found = _find(text, rig)
    usable = [gpu for gpu in found if gpu.enabled]
    if not usable:
        raise ProfileError(
            f"GPU {found[0].index} ({found[0].name}) is disabled in rig {rig.name!r}",
            hint="leave it out of --gpus; `mgpu rig show` says why, a profile may say enabled = true",
        )
    return usable


def _find(text: str, rig: Rig) -> list[Gpu]:
    """The cards meant by an index, a device name, a UUID (or its beginning), or whole words of the cards' name."""
    found = [gpu for gpu in rig.gpus if _means(text.lower(), gpu)]
    if not found:
        listing = ", ".join(f"{gpu.index} {gpu.name}" for gpu in rig.gpus) or "none"
        raise UsageError(f"no GPU {text!r} in rig {rig.name!r}", hint=f"its GPUs: {listing}")
    return found


def _means(word: str, gpu: Gpu) -> bool:
    if _INDEX.fullmatch(word):
        return int(word) == gpu.index
    if word == (gpu.device or "").lower():
        return True
    if len(word) >= _LEAST_UUID and (gpu.uuid or "").lower().startswith(word):
        return True
    return re.search(rf"(?<!\w){re.escape(word)}(?!\w)", gpu.name.lower()) is not None
