"""What a machine has. Types only: detection and profiles fill them in."""

from __future__ import annotations

from typing import Literal

from msgspec import Struct

Vendor = Literal["nvidia", "amd", "intel", "apple", "unknown"]
LinkKind = Literal["nvlink", "pcie-p2p", "pcie"]
RigSource = Literal["detected", "profile"]


class Pcie(Struct, frozen=True, kw_only=True):
    """The slot as it can run: highest generation of card and board, lanes as wired. `"4.0 x16"` in a profile."""

    gen: int
    width: int

    def __str__(self) -> str:
        return f"{self.gen}.0 x{self.width}"


class Gpu(Struct, frozen=True, kw_only=True):
    """One card (or MIG slice, or unified-memory GPU).

    `free_bytes` is what the driver says is free now, before any reserve. `reserve_bytes` is kept free by request.
    `device` is the name the runtime gives this card ("Vulkan0"), where the runtime's own list is how it was found.
    """

    index: int
    name: str
    vendor: Vendor
    total_bytes: int
    free_bytes: int
    uuid: str | None = None
    bandwidth_bytes_per_s: int | None = None
    pcie: Pcie | None = None
    compute_capability: str | None = None
    reserve_bytes: int = 0
    enabled: bool = True
    display: bool = False
    unified: bool = False  # shares the host's RAM (Apple, GB10, integrated)
    integrated: bool = False  # part of the processor: far slower than any card, and there for the display
    numa_node: int | None = None  # the processor (socket) its slot belongs to
    device: str | None = None
    pci_bus_id: str | None = None
    power_limit_watts: int | None = None
    max_tensor_bytes: int | None = None  # a tensor larger than this cannot live on the device (Vulkan storage buffers)
    processes: tuple[str, ...] = ()  # who holds VRAM now: "4242 python (3.1 GiB)"

    @property
    def usable_bytes(self) -> int:
        """Free now, less the reserve; never negative."""
        return max(self.free_bytes - self.reserve_bytes, 0)


def short_name(name: str) -> str:
    """`"RTX 3090"`, `"llvmpipe"`: without the brand and what stands in parentheses, which say nothing more."""
    return name.removeprefix("NVIDIA ").removeprefix("GeForce ").removeprefix("AMD ").partition(" (")[0]


class Link(Struct, frozen=True, kw_only=True):
    """The best way from one card to another; `gpus` are rig indices, smaller first. Pairs not listed are plain PCIe.

    `path` is the way over PCIe, in `nvidia-smi topo`'s words: PIX, PXB, PHB, NODE or SYS; empty when unknown.
    """

    gpus: tuple[int, int]
    kind: LinkKind
    n_links: int = 0  # NVLink bridges between the two
    path: str = ""


class Finding(Struct, frozen=True, kw_only=True):
    """Something about the machine a person should know: a lost card, a missing driver, a mismatch.

    `usual`: nothing is wrong; said by `rig show`, not at each run.
    """

    text: str
    hint: str = ""
    usual: bool = False


class Measured(Struct, frozen=True, kw_only=True):
    """A speed that was measured on this rig (`mgpu bench`), and what was running: enough to find it again.

    `gpus` are rig indices in the runtime's order, `counts` the units on each (as in a plan's layout). `depth`: tokens
    in the cache while generating, on average. `predicted`: what was predicted at the time, in tokens per second.
    """

    model: str
    architecture: str
    quantization: str
    weights_bytes: int
    runtime: str
    version: str
    mode: str  # pipeline (one card, too) or tensor
    gpus: tuple[int, ...]
    counts: tuple[int, ...]
    host_layers: int = 0
    host_experts: int = 0
    kv_type: str = "f16"
    depth: int
    tok_s: float
    prompt_tok_s: float | None = None
    predicted: float | None = None
    date: str  # ISO 8601


class Rig(Struct, frozen=True, kw_only=True):
    """A machine, as detected or as a profile describes it. `gpus` in driver order (PCI bus order)."""

    name: str
    source: RigSource
    gpus: tuple[Gpu, ...]
    links: tuple[Link, ...] = ()
    ram_bytes: int = 0
    ram_free_bytes: int = 0
    ram_bandwidth_bytes_per_s: int | None = None
    cpu_cores: int | None = None
    psu_watts: int | None = None
    driver: str = ""  # "NVIDIA 580.95.05, CUDA 13.0", or the runtime that listed the devices
    findings: tuple[Finding, ...] = ()
    measured: tuple[Measured, ...] = ()

    def link(self, a: int, b: int) -> LinkKind:
        """How cards `a` and `b` (rig indices) reach each other."""
        pair = (min(a, b), max(a, b))
        return next((link.kind for link in self.links if link.gpus == pair), "pcie")
