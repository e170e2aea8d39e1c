"""One candidate placement on the scales: its memory per device, what is short, and its speed."""

from __future__ import annotations

from collections.abc import Sequence

from msgspec import Struct

from mgpu.adapter import Job
from mgpu.decide.speed import forecast
from mgpu.plan import DeviceBytes, Forecast, HostBytes, Layout, PlacementKind, Speed
from mgpu.rig import Gpu, Rig


class Weighed(Struct, frozen=True, kw_only=True):
    """A layout with its figures. `gpus` are its cards in runtime order."""

    kind: PlacementKind
    layout: Layout
    gpus: tuple[Gpu, ...]
    devices: tuple[DeviceBytes, ...]
    host: HostBytes
    short: tuple[int, ...]  # bytes each device lacks, 0 where it fits
    host_short: int
    forecast: Forecast

    @property
    def speed(self) -> Speed | None:
        """For one user alone."""
        return self.forecast.tok_s

    @property
    def fits(self) -> bool:
        return not any(self.short) and not self.host_short

    @property
    def short_bytes(self) -> int:
        """What all devices and the host lack together."""
        return sum(self.short) + self.host_short

    @property
    def least_spare(self) -> int:
        """Free bytes left on the fullest device; 0 without devices."""
        spare = (gpu.usable_bytes - need.total for gpu, need in zip(self.gpus, self.devices, strict=True))
        return min(spare, default=0)


def weigh(job: Job, layout: Layout, gpus: Sequence[Gpu], rig: Rig) -> Weighed:
    """Figures for `layout` on `gpus` (the cards of `layout.gpus`, in that order)."""
    pairs = tuple(zip(layout.spans(), gpus, strict=True))
    devices = tuple(job.device(span, layout.shape, gpu) if span else _NOTHING for span, gpu in pairs)
    host = job.host(layout.shape, tuple(gpus))
    short = tuple(max(need.total - gpu.usable_bytes, 0) for need, gpu in zip(devices, gpus, strict=True))
    # What a unified device holds is in the same RAM. Unknown RAM (0) is no reason to refuse.
    in_ram = host.total + sum(need.total for need, gpu in zip(devices, gpus, strict=True) if gpu.unified)
    host_short = max(in_ram - rig.ram_free_bytes, 0) if rig.ram_free_bytes else 0
    return Weighed(
        kind=_kind(layout),
        layout=layout,
        gpus=tuple(gpus),
        devices=devices,
        host=host,
        short=short,
        host_short=host_short,
        forecast=forecast(job, layout, gpus, rig),
    )


_NOTHING = DeviceBytes(weights=0, kv=0, compute=0, overhead=0)


def _kind(layout: Layout) -> PlacementKind:
    if not layout.gpus:
        return "cpu"
    if layout.shape.host_layers or layout.shape.host_experts:
        return "offload"
    return "single" if len(layout.gpus) == 1 else "pipeline"
