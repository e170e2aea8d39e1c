"""Is the placement what was planned? The buffers the runtime reports, against the plan; kept for the rig in a log."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from msgspec import Struct

from mgpu.adapter import TOLERANCE, Adapter, Buffer, Installed
from mgpu.launch.private import read_own, write_whole
from mgpu.launch.redact import redact_words
from mgpu.model import Model
from mgpu.plan import Plan
from mgpu.request import Request
from mgpu.rig import Rig
from mgpu.units import gib

#: Launches kept in the log.
KEPT: Final = 500
_MOST: Final = 16 << 20  # bytes of them; what is larger is something else, and begun anew

_KINDS: Final = ("weights", "kv", "compute")

#: Buffers of a mapped file span it from the first to the last tensor used, gaps and repacked tensors included.
_MAPPED: Final = "_Mapped"


class Launched(Struct, frozen=True, kw_only=True):
    """A decision that is to be carried out, with all it rests on."""

    adapter: Adapter
    installed: Installed
    rig: Rig
    model: Model
    request: Request
    plan: Plan


class Measured(Struct, frozen=True, kw_only=True):
    """One place of the plan: bytes by kind as planned, and as the runtime reported them.

    `gpu`: rig index; None is the host, for which a kind that cannot be compared is in neither.
    """

    gpu: int | None
    device: str
    planned: Mapping[str, int]
    reported: Mapping[str, int]

    @property
    def warning(self) -> str | None:
        """One sentence when they differ by more than `TOLERANCE`."""
        planned, real = sum(self.planned.values()), sum(self.reported.values())
        name = "the host" if self.gpu is None else f"GPU {self.gpu}"
        if not real and planned:
            return f"{name} holds nothing, {gib(planned)} was planned"
        if abs(real - planned) <= TOLERANCE * planned:
            return None
        share = f" ({real / planned - 1:+.0%})" if planned else ""
        return f"{name} holds {gib(real)}, {gib(planned)} was planned{share}"


def measure(plan: Plan, devices: Sequence[str], buffers: Sequence[Buffer]) -> tuple[Measured, ...]:
    """Plan against report, the plan's devices in order, then the host. Nothing where the runtime said nothing.

    `devices`: the runtime's names of the plan's devices. Overhead is the driver's: no log tells it.
    """
    if not buffers:
        return ()
    places = [
        Measured(
            gpu=device.gpu,
            device=name,
            planned={kind: getattr(device.memory, kind) for kind in _KINDS},
            reported=_sums([buffer for buffer in buffers if buffer.device == name]),
        )
        for device, name in zip(plan.devices, devices, strict=True)
    ]
    host = _host(plan, [buffer for buffer in buffers if buffer.device not in devices])
    return (*places, *host)


class Reported(Struct, frozen=True, kw_only=True):
    """What a runtime says that it holds of a card, and the same as planned: of its driver's share it says nothing."""

    n_bytes: int
    planned: int


def reported(plan: Plan, devices: Sequence[str], buffers: Sequence[Buffer]) -> dict[int, Reported]:
    """By rig index, of the cards it says something of."""
    return {
        place.gpu: Reported(n_bytes=sum(place.reported.values()), planned=sum(place.planned.values()))
        for place in measure(plan, devices, buffers)
        if place.gpu is not None and place.reported
    }


def _host(plan: Plan, buffers: Sequence[Buffer]) -> Iterator[Measured]:
    """What the runtime said of the host; mapped weights are pages of the file, and their buffers no measure of them."""
    reported = _sums(buffers)
    if any(buffer.device.endswith(_MAPPED) for buffer in buffers):
        reported.pop("weights", None)
    if reported:
        planned = {kind: getattr(plan.host.memory, kind) for kind in reported}
        yield Measured(gpu=None, device="host", planned=planned, reported=reported)


def _sums(buffers: Sequence[Buffer]) -> dict[str, int]:
    """Bytes by kind, of those kinds that occur; llama.cpp's output buffer is none of them."""
    sums: dict[str, int] = {}
    for buffer in buffers:
        if buffer.kind in _KINDS:
            sums[buffer.kind] = sums.get(buffer.kind, 0) + buffer.n_bytes
    return sums


def default_log() -> Path:
    """`measured.jsonl` in the user's state directory."""
    from mgpu.launch.places import state_dir

    return state_dir() / "measured.jsonl"


def keep(launched: Launched, places: Sequence[Measured], path: Path) -> str | None:
    """Append one line of JSON to the log at `path`, which keeps the newest `KEPT`. Returns why it could not, or None.

    The file is replaced as a whole: readers see it before or after. Of two launches in the same instant one may be
    lost. Text is ASCII: a path that is no valid text survives as the escapes of its bytes.
    """
    line = json.dumps(_record(launched, places), separators=(",", ":")).encode("ascii")
    try:
        lines = (read_own(path, at_most=_MOST) or b"").splitlines() if path.exists() else []
        write_whole(path, b"".join(kept + b"\n" for kept in (*lines[1 - KEPT :], line)))
    except OSError as error:
        return str(error.strerror or error)
    return None


def _record(launched: Launched, places: Sequence[Measured]) -> dict[str, Any]:
    plan, model, rig = launched.plan, launched.model, launched.rig
    shape = plan.layout.shape
    return {
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "rig": rig.name,
        "gpus": [gpu.name for gpu in rig.gpus],
        "driver": rig.driver,
        "runtime": plan.runtime,
        "version": launched.installed.version,
        "model": model.name,
        "architecture": model.architecture,
        "quantization": model.quantization,
        "settings": {
            "placement": plan.placement,
            "ctx": plan.ctx,
            "users": plan.users,
            "kv_type": plan.kv_type,
            "gpus": list(plan.layout.gpus),
            "units": list(plan.layout.counts),
            "host_layers": shape.host_layers,
            "host_experts": shape.host_experts,
            "runtime_args": list(redact_words(launched.request.runtime_args)),
        },
        "devices": [
            {
                "gpu": place.gpu,
                "device": place.device,
                "planned": dict(place.planned),
                "reported": dict(place.reported),
            }
            for place in places
        ],
    }
