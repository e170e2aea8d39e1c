"""Which cards ExLlama can use, how they are shown to it alone, and how they reach each other."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import combinations
from typing import Final

from mgpu.errors import RefusedError
from mgpu.rig import Gpu, Rig, short_name

#: TabbyAPI `common/hardware.py`: paged attention and ExLlamaV3's kernels.
LEAST_CAPABILITY: Final = (8, 0)

_FULL_UUID: Final = re.compile(r"(GPU|MIG)-[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}")


def why_not(gpu: Gpu) -> str | None:
    """What keeps ExLlama from using this card, in a few words; None: nothing, as far as is known."""
    if gpu.vendor != "nvidia":
        return "it needs NVIDIA cards"
    capability = _capability(gpu)
    if capability is not None and capability < LEAST_CAPABILITY:
        return f"it needs compute capability 8.0, and this is {gpu.compute_capability}"
    return None


def check_cards(gpus: Sequence[Gpu], title: str) -> None:
    """Raises `RefusedError` for a card it cannot use."""
    for gpu in gpus:
        reason = why_not(gpu)
        if reason is not None:
            raise RefusedError(
                f"{title} cannot use GPU {gpu.index} ({short_name(gpu.name)}): {reason}",
                hint="leave it out with --gpus, or use llama.cpp with a GGUF of the model",
            )


def visibility(gpus: Sequence[Gpu], rig: Rig, version: int) -> dict[str, str]:
    """Variables that show it only `gpus`, in this order. UUIDs where they are known, for V3.

    V2 reads the list itself, and takes numbers alone (`exllamav2/util.py` get_visible_devices); slices of a card (MIG)
    have none.
    """
    uuids = [gpu.uuid for gpu in gpus if gpu.uuid is not None and _FULL_UUID.fullmatch(gpu.uuid)]
    named = len(uuids) == len(gpus) and (version == 3 or any(uuid.startswith("MIG-") for uuid in uuids))
    numbers = [str(_number(gpu, rig)) for gpu in gpus]
    return {"CUDA_DEVICE_ORDER": "PCI_BUS_ID", "CUDA_VISIBLE_DEVICES": ",".join(uuids if named else numbers)}


def has_nvlink(gpus: Sequence[Gpu], rig: Rig) -> bool:
    """Whether each of them reaches each other over NVLink."""
    return all(rig.link(a.index, b.index) == "nvlink" for a, b in combinations(gpus, 2))


def _number(gpu: Gpu, rig: Rig) -> int:
    """Its number among NVIDIA's cards, those counted that the caller hides from us."""
    return gpu.index - sum(other.index < gpu.index and other.vendor != "nvidia" for other in rig.gpus)


def _capability(gpu: Gpu) -> tuple[int, int] | None:
    major, dot, minor = (gpu.compute_capability or "").partition(".")
    return (int(major), int(minor)) if dot and major.isdecimal() and minor.isdecimal() else None
