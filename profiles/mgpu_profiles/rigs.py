"""Rig profiles: TOML to and from `mgpu.rig.Rig`. Text in, text out; files are the business of `mgpu_profiles.store`.

A profile says only what cannot be looked up: what it leaves out, the card's name tells (`mgpu_profiles.gpus`).
Sizes are whole MiB, bandwidths whole MB/s. What only a live machine knows (processes, PCI bus ids, driver, free RAM)
is in no profile.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from typing import Any, Final, TypeVar, get_args

import msgspec
from msgspec import Struct
from msgspec.structs import replace

from mgpu.errors import ProfileError
from mgpu.rig import Gpu, Link, Measured, Pcie, Rig, Vendor
from mgpu.units import GIB, MIB
from mgpu_profiles.document import (
    Document,
    GpuTable,
    HostTable,
    LinkPath,
    LinkTable,
    MeasuredTable,
    read_document,
    write_document,
)
from mgpu_profiles.gpus import find_spec

#: What the driver keeps of an idle card: CUDA offers 24077 of an RTX 4090's 24564 MiB, 2 % less. It does not
#: grow for ever with the card.
IDLE_SHARE: Final = 0.02
IDLE_MOST: Final = 640 * MIB

#: What an idle system keeps of the RAM; of a small machine's, at most a quarter.
HOST_RESERVE: Final = 4 * GIB

MEGA: Final = 10**6

_VENDOR_WORDS: Final[tuple[tuple[Vendor, str], ...]] = (
    ("nvidia", r"nvidia|geforce|quadro|tesla|\b[rg]tx\b"),
    ("amd", r"\bamd\b|radeon|instinct|\bgfx\d"),
    ("intel", r"intel|\barc\b"),
    ("apple", r"apple"),
)

#: A slice of a card: `"NVIDIA A100-SXM4-80GB MIG 1g.10gb"`.
_MIG: Final = re.compile(r"\bMIG\b")

T = TypeVar("T")


def parse_rig(text: str, origin: str) -> Rig:
    """The rig that a profile describes. `origin`, the file, is named in errors. Raises `ProfileError`, always one line.

    A missing `free_mib` is what the driver of an idle card calls free; a missing bandwidth, PCIe slot, compute
    capability or board power is the card's own, where its name is known.
    """
    document = read_document(text, origin)
    host = document.host
    ram = round(host.ram_gib * 1024) * MIB
    return Rig(
        name=document.name,
        source="profile",
        gpus=tuple(_gpu(index, table) for index, table in enumerate(document.gpu)),
        links=tuple(_link(table) for table in document.link),
        ram_bytes=ram,
        ram_free_bytes=ram - min(HOST_RESERVE, ram // 4),
        ram_bandwidth_bytes_per_s=_bytes_per_s(host.ram_bandwidth_gbs),
        cpu_cores=host.cores,
        psu_watts=host.psu_watts,
        measured=tuple(_measured(table) for table in document.measured),
    )


def format_rig(rig: Rig) -> str:
    """The profile of a rig, for `parse_rig` and for people. Cards are numbered by position.

    Of a rig that `parse_rig` made, nothing is lost. Of a detected one, sizes are rounded down to MiB and bandwidths to
    the next MB/s, and what the machine did not tell is afterwards what the card's name says.
    """
    positions = {gpu.index: position for position, gpu in enumerate(rig.gpus)}
    document = Document(
        name=rig.name,
        host=HostTable(
            ram_gib=_shortest(rig.ram_bytes // MIB, 1024),
            ram_bandwidth_gbs=_gbs(rig.ram_bandwidth_bytes_per_s),
            cores=rig.cpu_cores,
            psu_watts=rig.psu_watts,
        ),
        gpu=tuple(_gpu_table(gpu) for gpu in rig.gpus),
        link=tuple(
            _link_table(link, positions[a], positions[b])
            for link in rig.links
            for a, b in [link.gpus]
            if a in positions and b in positions  # a link to a card that could not be read says nothing
        ),
        measured=tuple(
            _measured_table(measured, tuple(positions[gpu] for gpu in measured.gpus))
            for measured in rig.measured
            if positions.keys() >= set(measured.gpus)
        ),
    )
    return write_document(document)


def with_measured(text: str, measured: tuple[Measured, ...], origin: str) -> str:
    """A profile's text with these measured figures in place of its own; all else, comments too, stays as written.

    Raises `ProfileError` for a text that is no profile.
    """
    wanted = replace(parse_rig(text, origin), measured=measured)
    made = format_rig(wanted)
    tables = made[_first_table(made) :]
    edited = "".join(_without_tables(text)).rstrip() + "\n" + (f"\n{tables}" if tables else "")
    try:
        same = parse_rig(edited, origin) == wanted
    except ProfileError:  # somebody wrote `measured = [{…}]`, or the like
        same = False
    return edited if same else made


def idle_free_bytes(total_bytes: int) -> int:
    """What the driver of an idle card of this size calls free, in whole MiB."""
    reserved = min(int(total_bytes * IDLE_SHARE), IDLE_MOST)
    return (total_bytes - reserved) // MIB * MIB


class _Known(Struct, frozen=True, kw_only=True):
    """What a card's name and size tell by themselves."""

    vendor: Vendor
    bandwidth_bytes_per_s: int | None = None
    pcie: Pcie | None = None
    compute_capability: str | None = None
    power_watts: int | None = None
    unified: bool = False


def _known(name: str, total_bytes: int) -> _Known:
    spec = find_spec(name, total_bytes)
    if spec is None:
        vendors = (vendor for vendor, words in _VENDOR_WORDS if re.search(words, name, re.IGNORECASE))
        return _Known(vendor=next(vendors, "unknown"))
    bandwidth = spec.bandwidth_bytes_per_s
    if bandwidth and spec.vram_bytes and _MIG.search(name):  # a slice has its share of the memory's controllers
        bandwidth = bandwidth * total_bytes // spec.vram_bytes
    return _Known(
        vendor=spec.vendor,
        bandwidth_bytes_per_s=bandwidth,
        pcie=Pcie(gen=spec.pcie_gen, width=spec.pcie_lanes) if spec.pcie_gen and spec.pcie_lanes else None,
        compute_capability=spec.compute_capability,
        power_watts=spec.tdp_watts,
        unified=spec.unified,
    )


def _gpu(index: int, table: GpuTable) -> Gpu:
    total = table.vram_mib * MIB
    known = _known(table.name, total)
    return Gpu(
        index=index,
        name=table.name,
        vendor=_or(table.vendor, known.vendor),
        total_bytes=total,
        free_bytes=_or(_bytes(table.free_mib), idle_free_bytes(total)),
        uuid=table.uuid,
        bandwidth_bytes_per_s=_or(_bytes_per_s(table.bandwidth_gbs), known.bandwidth_bytes_per_s),
        pcie=known.pcie if table.pcie is None else _pcie(table.pcie),
        compute_capability=_or(table.compute_capability, known.compute_capability),
        reserve_bytes=table.reserve_mib * MIB,
        enabled=table.enabled,
        display=_or(table.display, default=False),
        unified=_or(table.unified, known.unified),
        integrated=_or(table.integrated, default=False),
        numa_node=table.numa_node,
        device=table.device,
        power_limit_watts=_or(table.power_watts, known.power_watts),
        max_tensor_bytes=_bytes(table.max_tensor_mib),
    )


def _gpu_table(gpu: Gpu) -> GpuTable:
    known = _known(gpu.name, gpu.total_bytes)
    return GpuTable(
        name=gpu.name,
        uuid=gpu.uuid,
        vram_mib=gpu.total_bytes // MIB,
        free_mib=min(gpu.free_bytes, gpu.total_bytes) // MIB,
        bandwidth_gbs=_gbs(gpu.bandwidth_bytes_per_s),
        pcie=None if gpu.pcie is None else str(gpu.pcie),
        reserve_mib=gpu.reserve_bytes // MIB,
        enabled=gpu.enabled,
        vendor=None if gpu.vendor == known.vendor else gpu.vendor,
        compute_capability=gpu.compute_capability,
        power_watts=gpu.power_limit_watts,
        unified=None if gpu.unified == known.unified else gpu.unified,
        integrated=gpu.integrated or None,
        display=gpu.display or None,
        numa_node=gpu.numa_node,
        device=gpu.device,
        max_tensor_mib=None if gpu.max_tensor_bytes is None else gpu.max_tensor_bytes // MIB,
    )


def _pcie(text: str) -> Pcie:
    gen, width = text.split(".0 x")
    return Pcie(gen=int(gen), width=int(width))


def _link(table: LinkTable) -> Link:
    a, b = sorted(table.gpus)
    return Link(gpus=(a, b), kind=table.kind, n_links=table.n_links or 0, path=table.path or "")


def _link_table(link: Link, a: int, b: int) -> LinkTable:
    path: LinkPath | None = next((path for path in get_args(LinkPath) if path == link.path), None)
    return LinkTable(gpus=(a, b), kind=link.kind, n_links=link.n_links or None, path=path)


def _measured(table: MeasuredTable) -> Measured:
    fields: dict[str, Any] = msgspec.structs.asdict(table)
    return Measured(**{name: value for name, value in fields.items() if value is not None})


def _measured_table(measured: Measured, positions: tuple[int, ...]) -> MeasuredTable:
    fields: dict[str, Any] = msgspec.structs.asdict(measured)
    fields |= {
        "gpus": positions,
        "host_layers": measured.host_layers or None,
        "host_experts": measured.host_experts or None,
    }
    return MeasuredTable(**fields)


_MEASURED_HEADER: Final = re.compile(r"[ \t]*\[\[[ \t]*measured[ \t]*\]\]", re.MULTILINE)


def _first_table(made: str) -> int:
    """Where the measured figures begin in a text of ours: they come last."""
    header = _MEASURED_HEADER.search(made)
    return len(made) if header is None else header.start()


def _without_tables(text: str) -> Iterator[str]:
    """The lines of a profile that are not its measured figures. Comments among those stay."""
    inside = False
    for line in text.splitlines(keepends=True):
        if line.lstrip().startswith("["):
            inside = _MEASURED_HEADER.match(line) is not None
        if not inside or line.lstrip().startswith("#"):
            yield line


def _or(value: T | None, default: T) -> T:
    return default if value is None else value


def _bytes(mib: int | None) -> int | None:
    return None if mib is None else mib * MIB


def _bytes_per_s(gbs: float | None) -> int | None:
    return None if gbs is None else round(gbs * 1000) * MEGA


def _gbs(bytes_per_s: int | None) -> float | None:
    return None if bytes_per_s is None else _shortest(round(bytes_per_s / MEGA), 1000)


def _shortest(count: int, per: int) -> float:
    """`count / per` with the fewest decimals that still round back to `count`; an `int` when whole."""
    rounded = (round(count / per, digits) for digits in itertools.count())
    value = next(value for value in rounded if round(value * per) == count)
    return int(value) if value.is_integer() else value
