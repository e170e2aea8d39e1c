"""What the doctor knows of a machine. Types only; a part that could not be had is left at its defaults.

Sizes are bytes. None and empty mean "not told": no check says anything of that.
"""

from __future__ import annotations

from collections.abc import Mapping

from msgspec import Struct

from mgpu.adapter import Adapter, Installed, ListedDevice
from mgpu.detect.nvidia_state import NvidiaState
from mgpu.rig import Rig, Vendor


class Graphics(Struct, frozen=True, kw_only=True):
    """A graphics card on the PCI bus, whether or not anything can use it. `driver`: the kernel's, or empty.

    `translated`: the IOMMU stands between it and its peers. `visible`: of `vram`, what the processor reaches (BAR).
    """

    address: str
    vendor: Vendor
    driver: str = ""
    translated: bool = False
    vram: int | None = None
    visible: int | None = None


class Node(Struct, frozen=True, kw_only=True):
    """A device file that programs open. `allowed`: this user may read and write it."""

    path: str
    exists: bool
    allowed: bool = False
    group: str = ""


class CardFacts(Struct, frozen=True, kw_only=True):
    """The cards. `module` and `libraries`: versions of NVIDIA's kernel module and of its libraries on the disk."""

    rig: Rig
    nvidia: NvidiaState | None = None
    graphics: tuple[Graphics, ...] = ()
    nodes: tuple[Node, ...] = ()
    module: str = ""
    libraries: tuple[str, ...] = ()
    nouveau: bool = False


class HostFacts(Struct, frozen=True, kw_only=True):
    """The machine around the cards.

    `ram` is what this process may use, `machine_ram` what there is. `swaps` are the files and devices of /proc/swaps.
    `set_aside`: huge pages that only those who ask for them can use. `cpu_quota`: cores' worth of time that the control
    group grants. `numa_balancing` is what /proc/sys/kernel/numa_balancing says.
    `kills_at_logout`: systemd-logind ends what this user has started when the session ends.
    """

    container: str = ""  # "Docker", "Podman", "a container"
    wsl: bool = False
    ram: int = 0
    available: int = 0
    machine_ram: int = 0
    swap: int | None = None
    swap_free: int = 0
    swaps: tuple[str, ...] = ()
    swappiness: int | None = None
    overcommit: int | None = None
    commit_limit: int = 0
    set_aside: int = 0
    shared_memory: int | None = None  # size of /dev/shm
    cpu_cores: int | None = None
    cpu_quota: float | None = None
    cpu_flags: frozenset[str] = frozenset()
    governors: frozenset[str] = frozenset()
    governor_driver: str = ""
    numa_nodes: int = 1
    numa_balancing: int | None = None
    kills_at_logout: bool | None = None


class Limits(Struct, frozen=True, kw_only=True):
    """What `ulimit` says, soft: bytes, or numbers; -1 is no limit. `core_pattern`: what becomes of core dumps."""

    memlock: int | None = None
    nofile: int | None = None
    nofile_hard: int | None = None
    core: int | None = None
    address_space: int | None = None
    core_pattern: str = ""


class Disk(Struct, frozen=True, kw_only=True):
    """A directory and the file system it is on. `purpose`: "launches", "models of Ollama"."""

    path: str
    purpose: str
    exists: bool = True
    free: int | None = None
    files_left: int | None = None
    kind: str = ""  # "ext4", "nfs4"
    read_only: bool = False
    spinning: bool = False
    ours: bool = False  # mgpu writes there


class Folder(Struct, frozen=True, kw_only=True):
    """A directory of ours. `used`: launches are kept there, or would be now; `owned`: by this user."""

    path: str
    exists: bool
    owned: bool = True
    mode: int = 0o700
    writable: bool = True
    used: bool = False


class OwnFacts(Struct, frozen=True, kw_only=True):
    """mgpu's own. `differences`: (severity, text) of the default profile beside the machine; `flaw`: why it cannot be
    read. `leftovers`: directories of launches that are over."""

    folders: tuple[Folder, ...] = ()
    profile: str = ""
    flaw: str = ""
    flaw_hint: str = ""
    psu_watts: int | None = None
    leftovers: tuple[str, ...] = ()
    default: Rig | None = None


class Program(Struct, frozen=True, kw_only=True):
    """A runtime as it is here; `missing` and `hint`: what is wrong with one that was found and cannot be used."""

    runtime: str
    adapter: Adapter | None = None
    installed: Installed | None = None
    listed: tuple[ListedDevice, ...] | None = None
    missing: str = ""
    hint: str = ""


class Facts(Struct, frozen=True, kw_only=True):
    """All of it. `silent`: parts that gave no answer in time, or broke: (part, what happened)."""

    cards: CardFacts
    host: HostFacts = HostFacts()
    limits: Limits = Limits()
    disks: tuple[Disk, ...] = ()
    programs: tuple[Program, ...] = ()
    own: OwnFacts = OwnFacts()
    environ: Mapping[str, str] = {}
    silent: tuple[tuple[str, str], ...] = ()
