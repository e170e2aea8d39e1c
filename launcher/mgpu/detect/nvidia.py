"""NVIDIA cards, as the driver's management library (NVML) describes them through `nvidia-ml-py`.

Whatever the driver does, there is an answer: a metric it does not give is None, a card it cannot read is a finding.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final, Literal

from msgspec import Struct

from mgpu.detect.host import process_name, read_unified
from mgpu.detect.nvml import (
    CLOCK_MEM,
    DRIVER_NOT_LOADED,
    FUNCTION_NOT_FOUND,
    INVALID_ARGUMENT,
    LIB_RM_VERSION_MISMATCH,
    LIBRARY_NOT_FOUND,
    MEMORY_V2,
    NOT_SUPPORTED,
    NVLINK_DEVICE_TYPE_SWITCH,
    NVLINK_MAX_LINKS,
    P2P_CAPS_INDEX_NVLINK,
    P2P_CAPS_INDEX_READ,
    P2P_STATUS_OK,
    NoAnswerError,
    Nvml,
    decode,
)
from mgpu.detect.sysfs import ROOT, numa_node, plain_address, read_number, slot_finding
from mgpu.rig import Finding, Gpu, Link, Pcie
from mgpu.units import gib
from mgpu_profiles.gpus import GpuSpec, find_spec

State = Literal["ok", "no-gpu", "no-driver", "mismatch", "error"]

#: `nvmlGpuTopologyLevel_t` in the words of `nvidia-smi topo`; two chips on one board (0) share its switch.
_PATHS: Final = {0: "PIX", 10: "PIX", 20: "PXB", 30: "PHB", 40: "NODE", 50: "SYS"}

_Address = tuple[int, int, int]  # PCI domain, bus, device


class NvidiaProbe(Struct, frozen=True, kw_only=True):
    """What NVML says. `gpus` are the usable cards by NVML's own numbers; then MIG instances, numbered after all cards.

    `links` name pairs of `Gpu.index`. `driver` is `"NVIDIA 580.95.05, CUDA 13.0"`, or empty.
    """

    state: State
    gpus: tuple[Gpu, ...] = ()
    links: tuple[Link, ...] = ()
    findings: tuple[Finding, ...] = ()
    driver: str = ""
    count: int = 0  # numbers in use: cards that could not be read have theirs, too


class _Card(Struct, frozen=True, kw_only=True):
    """A whole card while the driver is open. `peers`: NVLinks by the address they lead to; None is a switch."""

    gpu: Gpu
    handle: Any
    address: _Address | None
    peers: dict[_Address | None, int]
    finding: Finding | None


def probe_nvidia(root: Path = ROOT) -> NvidiaProbe:
    """Asks the driver once. Never raises for driver trouble: `state` and `findings` tell. `root`: where /sys is."""
    try:
        with warnings.catch_warnings(action="ignore"):  # PyPI's `pynvml` warns whoever imports the module of that name
            import pynvml
    except ImportError as error:
        found = Finding(text=f"cannot import pynvml: {error}", hint="pip install --force-reinstall nvidia-ml-py")
        return NvidiaProbe(state="error", findings=(*_old_binding(), found))
    findings = () if hasattr(pynvml, "nvmlMemory_v2") else _old_binding()
    try:
        with Nvml(pynvml) as nvml:
            return _survey(nvml, findings, root)
    except NoAnswerError as error:
        return NvidiaProbe(state=_state(error.code), findings=(*findings, error.finding("NVIDIA")))


def open_nvml() -> Nvml | None:
    """NVML, to be opened by `with`, for what is no part of a rig; None where the binding cannot be imported."""
    try:
        with warnings.catch_warnings(action="ignore"):  # as above
            import pynvml
    except ImportError:
        return None
    return Nvml(pynvml)


def memory_now(nvml: Nvml, gpu: Gpu, root: Path) -> tuple[int, int, dict[int, int]]:
    """(used, free, bytes by pid) of a card or instance that a rig has. Raises `NoAnswerError` where it is not there."""
    if gpu.uuid:
        handle = nvml.call("DeviceGetHandleByUUID", gpu.uuid)
    elif gpu.pci_bus_id:
        handle = nvml.call("DeviceGetHandleByPciBusId", gpu.pci_bus_id)
    else:
        handle = nvml.call("DeviceGetHandleByIndex", gpu.index)
    total, free, _ = _memory(nvml, handle, root)
    return total - free, free, _held(nvml, handle)


def _survey(nvml: Nvml, findings: tuple[Finding, ...], root: Path) -> NvidiaProbe:
    """Every card that can be read. Raises `NoAnswerError` only if the driver does not say how many there are."""
    count = nvml.call("DeviceGetCount")
    cards: list[_Card] = []
    instances: list[Gpu] = []
    found = list(findings)
    for index in range(count):
        try:
            card = _read_card(nvml, index, root)
        except NoAnswerError as error:
            found.append(error.finding(f"GPU {index}"))
            continue
        handles = _mig_handles(nvml, card.handle)
        if handles is None:
            cards.append(card)
            found += [card.finding] if card.finding else []
            continue
        found.append(_mig_finding(index, len(handles)))
        for handle in handles:
            try:
                instances.append(_read_instance(nvml, handle, count + len(instances), card.gpu))
            except NoAnswerError as error:
                found.append(error.finding(f"a MIG instance of GPU {index}"))
    gpus = (*(card.gpu for card in cards), *instances)
    state: State = "ok" if gpus else "error" if count else "no-gpu"
    links = tuple(_links(nvml, cards))
    return NvidiaProbe(
        state=state,
        gpus=gpus,
        links=links,
        findings=tuple(found),
        driver=_driver(nvml),
        count=count + len(instances),
    )


def _driver(nvml: Nvml) -> str:
    version = nvml.ask("SystemGetDriverVersion")
    cuda = nvml.ask("SystemGetCudaDriverVersion_v2")
    name = f"NVIDIA {version}" if version else "NVIDIA"
    return f"{name}, CUDA {cuda // 1000}.{cuda % 1000 // 10}" if cuda else name


def _read_card(nvml: Nvml, index: int, root: Path) -> _Card:
    """Raises `NoAnswerError` when the card cannot be opened or its memory told: there is no planning without it."""
    handle = nvml.call("DeviceGetHandleByIndex", index)
    total, free, unified = _memory(nvml, handle, root)
    name = nvml.ask("DeviceGetName", handle) or "NVIDIA GPU"
    pci = nvml.ask("DeviceGetPciInfo", handle)
    power = nvml.ask("DeviceGetEnforcedPowerLimit", handle) or nvml.ask("DeviceGetPowerManagementLimit", handle)
    bus_id = decode(pci.busId) if pci else None
    device = root / "sys/bus/pci/devices" / (plain_address(bus_id or "") or "none")
    spec = find_spec(name, total)
    gpu = Gpu(
        index=index,
        name=name,
        vendor="nvidia",
        total_bytes=total,
        free_bytes=free,
        uuid=nvml.ask("DeviceGetUUID", handle),
        bandwidth_bytes_per_s=_bandwidth(nvml, handle, spec),
        pcie=_pcie(nvml, handle),
        compute_capability=_compute_capability(nvml, handle, spec),
        display=nvml.ask("DeviceGetDisplayActive", handle) == 1,
        unified=unified,
        numa_node=numa_node(device),
        pci_bus_id=bus_id,
        power_limit_watts=power // 1000 if power else None,
        processes=tuple(_processes(nvml, handle)),
    )
    finding = slot_finding(index, name, gpu.pcie, _own_link(nvml, handle, device))
    return _Card(gpu=gpu, handle=handle, address=_address(pci), peers=_nvlink_peers(nvml, handle), finding=finding)


def _memory(nvml: Nvml, handle: Any, root: Path) -> tuple[int, int, bool]:
    """(total, free, unified). Chips without memory of their own (GB10, Jetson) answer NotSupported, or 0 bytes.

    Theirs is the host's, and page cache gives way to it.
    """
    try:
        total, free = _own_memory(nvml, handle)
    except NoAnswerError as error:
        if error.code != NOT_SUPPORTED:
            raise
        total = 0
    if total:
        return total, free, False
    memory = read_unified(root)
    return memory.total_bytes, memory.available_bytes, True


def _own_memory(nvml: Nvml, handle: Any) -> tuple[int, int]:
    """(total, free) in bytes; what the driver reserves is not free. Drivers before 510 lack version 2 of the call."""
    answer = nvml.ask("DeviceGetMemoryInfo", handle, MEMORY_V2) or nvml.call("DeviceGetMemoryInfo", handle)
    return answer.total, answer.free


def _bandwidth(nvml: Nvml, handle: Any, spec: GpuSpec | None) -> int | None:
    """Bytes per second: the vendor's figure, unless the card's own clock and bus differ from it by more than a tenth
    (overclocked, an odd variant, a laptop part). NVML's memory clock counts half of the transfers, for HBM too."""
    stated = spec.bandwidth_bytes_per_s if spec else None
    width = nvml.ask("DeviceGetMemoryBusWidth", handle)  # bits
    clock = nvml.ask("DeviceGetMaxClockInfo", handle, CLOCK_MEM)  # MHz; the current clock is low at idle
    if not width or not clock:
        return stated
    computed: int = 2 * clock * 1_000_000 * width // 8
    return stated if stated and abs(computed - stated) * 10 <= stated else computed


def _pcie(nvml: Nvml, handle: Any) -> Pcie | None:
    """The generation drops at idle, so it is what card and system can do; lanes do not: a x4 riser shows."""
    gen = nvml.ask("DeviceGetMaxPcieLinkGeneration", handle) or nvml.ask("DeviceGetCurrPcieLinkGeneration", handle)
    width = nvml.ask("DeviceGetCurrPcieLinkWidth", handle) or nvml.ask("DeviceGetMaxPcieLinkWidth", handle)
    return Pcie(gen=gen, width=width) if gen and width else None


def _own_link(nvml: Nvml, handle: Any, device: Path) -> Pcie | None:
    """What the card could do in the best of slots: NVML's other figures are for the card in this one."""
    gen = nvml.ask("DeviceGetGpuMaxPcieLinkGeneration", handle) or nvml.ask("DeviceGetMaxPcieLinkGeneration", handle)
    width = read_number(device / "max_link_width") or nvml.ask("DeviceGetMaxPcieLinkWidth", handle)
    return Pcie(gen=gen, width=width) if gen and width else None


def _compute_capability(nvml: Nvml, handle: Any, spec: GpuSpec | None) -> str | None:
    answer = nvml.ask("DeviceGetCudaComputeCapability", handle)
    if answer is None:
        return spec.compute_capability if spec else None
    return f"{answer[0]}.{answer[1]}"


def _processes(nvml: Nvml, handle: Any) -> Iterator[str]:
    """Who holds memory, most first."""
    for pid, size in sorted(_held(nvml, handle).items(), key=lambda item: -item[1]):
        yield f"{pid} {process_name(pid) or '?'} ({gib(size)})"


def _held(nvml: Nvml, handle: Any) -> dict[int, int]:
    """Bytes by pid. Windows and WSL give no sizes: nobody is there."""
    held: dict[int, int] = {}
    for kind in ("Compute", "Graphics"):
        listed = nvml.ask(f"DeviceGet{kind}RunningProcesses", handle)
        if listed is None:  # a driver without version 3 of the call
            listed = nvml.ask(f"DeviceGet{kind}RunningProcesses_v2", handle)
        for process in listed or ():
            held[process.pid] = max(held.get(process.pid, 0), process.usedGpuMemory or 0)
    return {pid: size for pid, size in held.items() if size}


def _mig_handles(nvml: Nvml, handle: Any) -> tuple[Any, ...] | None:
    """The instances of a card in MIG mode (slots may be empty); None for a whole card."""
    mode = nvml.ask("DeviceGetMigMode", handle)  # [now, after a reset]
    if not mode or mode[0] != 1:
        return None
    slots = range(nvml.ask("DeviceGetMaxMigDeviceCount", handle) or 0)
    handles = (nvml.ask("DeviceGetMigDeviceHandleByIndex", handle, slot) for slot in slots)
    return tuple(handle for handle in handles if handle is not None)


def _read_instance(nvml: Nvml, handle: Any, index: int, card: Gpu) -> Gpu:
    """A MIG instance of `card`. Raises `NoAnswerError` when its memory cannot be told.

    Its share of the card's bandwidth is that of the memory: a slice has its own controllers (NVIDIA MIG User Guide).
    """
    total, free = _own_memory(nvml, handle)
    whole = card.bandwidth_bytes_per_s
    return Gpu(
        index=index,
        name=nvml.ask("DeviceGetName", handle) or f"{card.name} MIG",
        vendor="nvidia",
        total_bytes=total,
        free_bytes=free,
        uuid=nvml.ask("DeviceGetUUID", handle),
        bandwidth_bytes_per_s=whole * total // card.total_bytes if whole else None,
        pcie=card.pcie,
        compute_capability=card.compute_capability,
        numa_node=card.numa_node,
        pci_bus_id=card.pci_bus_id,
        processes=tuple(_processes(nvml, handle)),
    )


def _mig_finding(index: int, n_instances: int) -> Finding:
    if n_instances:
        return Finding(
            text=f"GPU {index} is divided by MIG: {n_instances} instances stand in its place",
            hint=f"a process can use one instance; sudo nvidia-smi -i {index} -mig 0 gives the whole card back",
        )
    return Finding(
        text=f"GPU {index} is in MIG mode and has no instances: it cannot be used",
        hint=f"sudo nvidia-smi -i {index} -mig 0, or create instances with nvidia-smi mig -cgi",
    )


def _nvlink_peers(nvml: Nvml, handle: Any) -> dict[_Address | None, int]:
    """How many active NVLinks lead to which PCI address, or to a switch (None)."""
    peers: dict[_Address | None, int] = {}
    for link in range(NVLINK_MAX_LINKS):
        try:
            active = nvml.call("DeviceGetNvLinkState", handle, link) == 1
        except NoAnswerError as error:
            if error.code in {NOT_SUPPORTED, INVALID_ARGUMENT, FUNCTION_NOT_FOUND}:  # no NVLink, or past the last
                break
            continue
        if active:
            switch = nvml.ask("DeviceGetNvLinkRemoteDeviceType", handle, link) == NVLINK_DEVICE_TYPE_SWITCH
            peer = None if switch else _address(nvml.ask("DeviceGetNvLinkRemotePciInfo", handle, link))
            if switch or peer:
                peers[peer] = peers.get(peer, 0) + 1
    return peers


def _links(nvml: Nvml, cards: list[_Card]) -> Iterator[Link]:
    for position, a in enumerate(cards):
        for b in cards[position + 1 :]:
            pair = (a.gpu.index, b.gpu.index)
            n_links = a.peers.get(b.address, 0) if b.address else 0
            path = _PATHS.get(nvml.ask("DeviceGetTopologyCommonAncestor", a.handle, b.handle), "")
            n_links = n_links or min(a.peers.get(None, 0), b.peers.get(None, 0))
            status = nvml.ask("DeviceGetP2PStatus", a.handle, b.handle, P2P_CAPS_INDEX_NVLINK)
            # A bridge counts only if the driver lets the cards use it; where it does not say, the bridge itself counts.
            if status == P2P_STATUS_OK or (status is None and n_links):
                yield Link(gpus=pair, kind="nvlink", n_links=n_links, path=path)
            elif nvml.ask("DeviceGetP2PStatus", a.handle, b.handle, P2P_CAPS_INDEX_READ) == P2P_STATUS_OK:
                yield Link(gpus=pair, kind="pcie-p2p", path=path)
            elif path:
                yield Link(gpus=pair, kind="pcie", path=path)


def _address(pci: Any) -> _Address | None:
    return (pci.domain, pci.bus, pci.device) if pci else None


def _state(code: int) -> State:
    if code in {DRIVER_NOT_LOADED, LIBRARY_NOT_FOUND}:
        return "no-driver"
    return "mismatch" if code == LIB_RM_VERSION_MISMATCH else "error"


def _old_binding() -> tuple[Finding, ...]:
    """PyPI's `pynvml` before version 12 brought a module of the same name, which lacks newer calls."""
    import importlib.metadata

    try:
        version = importlib.metadata.version("pynvml")
    except importlib.metadata.PackageNotFoundError:
        return ()
    if int(version.split(".")[0]) >= 12:
        return ()
    text = f"the package pynvml {version} hides nvidia-ml-py: some figures may be missing"
    return (Finding(text=text, hint="pip uninstall pynvml; pip install --force-reinstall nvidia-ml-py"),)
