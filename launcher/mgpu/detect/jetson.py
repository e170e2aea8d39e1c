"""NVIDIA's Jetson boards: up to Orin their driver has no NVML, so the board's own description tells."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from msgspec import Struct

from mgpu.detect.host import read_memory
from mgpu.detect.sysfs import read_text
from mgpu.rig import Gpu
from mgpu.units import GB


class _Board(Struct, frozen=True):
    """Words of the board's name, CUDA's compute capability, memory bandwidth in GB/s (NVIDIA's data sheets)."""

    words: str
    compute_capability: str
    bandwidth_gbs: float


#: In order: the first whose words are in the name.
_BOARDS: Final = (
    _Board("AGX Thor", "11.0", 273),
    _Board("AGX Orin", "8.7", 204.8),
    _Board("Orin NX", "8.7", 102.4),
    _Board("Developer Kit Super", "8.7", 102.4),  # an Orin Nano
    _Board("Orin Nano", "8.7", 68.3),
    _Board("AGX Xavier", "7.2", 136.5),
    _Board("Xavier NX", "7.2", 59.7),
)


def read_jetson(root: Path) -> Gpu | None:
    """The GPU of a Jetson, in the board's memory; None on any other machine."""
    model = read_text(root / "proc/device-tree/model")
    if "Jetson" not in model and not (root / "etc/nv_tegra_release").exists():
        return None
    memory = read_memory(root)
    board = next((board for board in _BOARDS if board.words in model), None)
    return Gpu(
        index=0,
        name=model.partition("\n")[0].partition(" Developer")[0] or "NVIDIA Jetson",
        vendor="nvidia",
        total_bytes=memory.total_bytes,
        free_bytes=memory.available_bytes,
        bandwidth_bytes_per_s=round(board.bandwidth_gbs * GB) if board else None,
        compute_capability=board.compute_capability if board else None,
        unified=True,
    )
