"""AMD's compute driver (KFD) in /sys/class/kfd: what each GPU is called by compilers, who uses it, how they are joined.

Linux 5.x to 6.x drivers/gpu/drm/amd/amdkfd/kfd_topology.c and kfd_process.c.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from msgspec import Struct

from mgpu.detect.sysfs import list_names, read_number, read_text
from mgpu.rig import LinkKind

#: `HSA_IOLINKTYPE_*` of the thunk's hsakmttypes.h.
_PCIE: Final = 2
_XGMI: Final = 11

_LINE: Final = re.compile(r"^(\w+) ([0-9]{1,20})$", re.MULTILINE)


class KfdNode(Struct, frozen=True, kw_only=True):
    """A GPU as KFD counts it. `number` is that of the node among CPUs and GPUs, `gpu_id` names it in other files."""

    number: int
    gpu_id: int
    render: str  # "renderD128"
    target: str  # "gfx1100"


class KfdLink(Struct, frozen=True, kw_only=True):
    """Two nodes that reach each other's memory."""

    nodes: tuple[int, int]  # smaller number first
    kind: LinkKind


def kfd_nodes(root: Path) -> tuple[KfdNode, ...]:
    """The GPUs, in the order in which ROCm counts them."""
    folder = root / "sys/class/kfd/kfd/topology/nodes"
    numbers = sorted(int(name) for name in list_names(folder) if name.isdecimal())
    nodes = (_node(folder / str(number), number) for number in numbers)
    return tuple(node for node in nodes if node is not None)


def _node(directory: Path, number: int) -> KfdNode | None:
    facts = _properties(directory)
    if not facts.get("simd_count"):  # a CPU
        return None
    return KfdNode(
        number=number,
        gpu_id=read_number(directory / "gpu_id") or 0,
        render=f"renderD{facts.get('drm_render_minor', 0)}",
        target=_target(facts.get("gfx_target_version", 0)),
    )


def _target(version: int) -> str:
    """`110000` as `"gfx1100"`, `90010` as `"gfx90a"`: the last two parts are hexadecimal digits."""
    if not version:
        return ""
    major, rest = divmod(version, 10_000)
    return f"gfx{major}{rest // 100:x}{rest % 100:x}"


def kfd_links(nodes: tuple[KfdNode, ...], root: Path) -> tuple[KfdLink, ...]:
    """xGMI, and PCIe between cards that may read each other's memory."""
    folder = root / "sys/class/kfd/kfd/topology/nodes"
    numbers = {node.number for node in nodes}
    kinds: dict[tuple[int, int], LinkKind] = {}
    for node in nodes:
        for group in ("p2p_links", "io_links"):
            for name in list_names(folder / str(node.number) / group):
                facts = _properties(folder / str(node.number) / group / name)
                pair = (min(node.number, facts.get("node_to", 0)), max(node.number, facts.get("node_to", 0)))
                if not numbers.issuperset(pair) or pair[0] == pair[1]:
                    continue
                if facts.get("type") == _XGMI:
                    kinds[pair] = "nvlink"  # a bridge of AMD's own, as fast as NVIDIA's
                elif facts.get("type") == _PCIE:
                    kinds.setdefault(pair, "pcie-p2p")
    return tuple(KfdLink(nodes=pair, kind=kinds[pair]) for pair in sorted(kinds))


def kfd_holders(node: KfdNode, root: Path) -> Iterator[tuple[int, int]]:
    """(pid, bytes) of every ROCm process on the GPU, whoever's it is."""
    folder = root / "sys/class/kfd/kfd/proc"
    for pid in list_names(folder):
        if pid.isdecimal():
            yield int(pid), read_number(folder / pid / f"vram_{node.gpu_id}") or 0


def _properties(directory: Path) -> dict[str, int]:
    return {key: int(value) for key, value in _LINE.findall(read_text(directory / "properties"))}
