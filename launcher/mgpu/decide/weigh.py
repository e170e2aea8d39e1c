"""One candidate placement on the scales: its memory per device, what is short, and its speed."""

from __future__ import annotations

from collections.abc import Sequence

from msgspec import Struct
from msgspec.structs import replace

from mgpu.adapter import Job
from mgpu.decide.speed import forecast
from mgpu.plan import DeviceBytes, Forecast, HostBytes, Layout, PlacementKind, Shape, Speed
from mgpu.rig import Gpu, Rig
from mgpu_profiles.rigs import idle_free_bytes


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
    def total(self) -> Speed | None:
        """For all users at once; for one user, its own."""
        return self.forecast.total_tok_s or self.forecast.tok_s

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
    each, shape, copies = _one_runtime(job, layout)
    pairs = tuple(zip(layout.spans(), gpus, strict=True))
    devices = tuple(each.device(span, shape, gpu) if span else _NOTHING for span, gpu in pairs)
    host = _times(each.host(shape, tuple(gpus) if copies == 1 else tuple(gpus[:1])), copies)
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


def in_the_way(weighed: Weighed) -> str | None:
    """The processes without which it would fit: `"GPU 0: 4242 python (10.1 GiB)"`. None: it would not, or nobody is."""
    if not any(weighed.short) or weighed.host_short:
        return None
    named: list[str] = []
    for gpu, short in zip(weighed.gpus, weighed.short, strict=True):
        held = idle_free_bytes(gpu.total_bytes) - gpu.free_bytes
        if short and (not gpu.processes or held < short):
            return None
        named += [f"GPU {gpu.index}: {gpu.processes[0]}"] if short else []
    return ", ".join(named)


def users_each(job: Job, layout: Layout) -> int:
    """Users of one runtime of this layout: all of them, or a replica's share."""
    return -(-job.users // len(layout.gpus)) if layout.shape.mode == "replicas" else job.users


_NOTHING = DeviceBytes(weights=0, kv=0, compute=0, overhead=0)


def _one_runtime(job: Job, layout: Layout) -> tuple[Job, Shape, int]:
    """The job and shape of each runtime, and how many runtimes there are."""
    if layout.shape.mode != "replicas":
        return job, layout.shape, 1
    return job.at_users(users_each(job, layout)), replace(layout.shape, n_devices=1, mode="pipeline"), len(layout.gpus)


def _times(host: HostBytes, copies: int) -> HostBytes:
    """What several runtimes take of the host. (The file's pages may be shared: this errs on the safe side.)"""
    return HostBytes(weights=host.weights * copies, kv=host.kv * copies, compute=host.compute * copies)


def _kind(layout: Layout) -> PlacementKind:
    if not layout.gpus:
        return "cpu"
    if layout.shape.mode != "pipeline":
        return layout.shape.mode
    if layout.shape.host_layers or layout.shape.host_experts:
        return "offload"
    return "single" if len(layout.gpus) == 1 else "pipeline"


def tok_s(weighed: Weighed) -> float:
    """The expected speed for one user; 0 where it is unknown."""
    return weighed.speed.expected if weighed.speed else 0.0


def total(weighed: Weighed) -> float:
    """The expected speed for all users together; 0 where it is unknown."""
    return weighed.total.expected if weighed.total else 0.0
