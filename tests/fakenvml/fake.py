"""A FAKE NVIDIA driver for tests: a Python object in place of the library that `pynvml` loads.

The real `pynvml` stays above it, with its structures, its error classes and its traps. `fakenvml.c` is the same driver
as a shared library, for tests that start a process.
"""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final

import pynvml

from fakenvml.machine import Machine, Table

OK: Final = 0
UNINITIALIZED: Final = 1
INVALID_ARGUMENT: Final = 2
NOT_SUPPORTED: Final = 3
NOT_FOUND: Final = 6
INSUFFICIENT_SIZE: Final = 7
ARGUMENT_VERSION_MISMATCH: Final = 25

_P2P_STATUS_NOT_SUPPORTED: Final = 5
_FIRST_INSTANCE: Final = 1001


@contextlib.contextmanager
def installed(machine: Machine) -> Iterator[FakeLibrary]:
    """Inside of the `with`, `pynvml` talks to the fake."""
    fake = FakeLibrary(machine)
    before = pynvml.nvmlLib
    pynvml.nvmlLib = fake
    pynvml._nvmlGetFunctionPointer_cache.clear()
    try:
        yield fake
    finally:
        pynvml.nvmlLib = before
        pynvml._nvmlGetFunctionPointer_cache.clear()


class _AnswerError(Exception):
    """A call ends with this return code."""

    def __init__(self, code: int) -> None:
        super().__init__(code)
        self.code = code


class FakeLibrary:
    """What `ctypes.CDLL("libnvidia-ml.so.1")` would be: functions take ctypes arguments and return NVML codes.

    Handles are small numbers: cards from 1, instances from 1001. `opened` counts init less shutdown.
    """

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self.opened = 0

    def __getattr__(self, name: str) -> Callable[..., int]:
        if not name.startswith("nvml"):
            raise AttributeError(name)

        answer: Callable[..., None] = FUNCTIONS.get(name, _not_supported)

        def function(*args: Any) -> int:
            try:
                self._check(name)
                answer(self, *args)
            except _AnswerError as error:
                return error.code
            return OK

        return function

    def _check(self, name: str) -> None:
        if name in self.machine.fail:
            raise _AnswerError(self.machine.fail[name])
        if not self.opened and name != "nvmlInitWithFlags":
            raise _AnswerError(UNINITIALIZED)

    def table(self, handle: Any) -> Table:
        number = _number_of(handle)
        return (
            self.machine.migs[number - _FIRST_INSTANCE] if number >= _FIRST_INSTANCE else self.machine.gpus[number - 1]
        )

    def link(self, a: Any, b: Any) -> Table:
        pair = {_number_of(a) - 1, _number_of(b) - 1}
        return next((link for link in self.machine.links if {link["a"], link["b"]} == pair), {})

    def peer(self, handle: Any, link: int) -> int | None:
        """The card at the other end of NVLink number `link`; None is a switch."""
        me = _number_of(handle) - 1
        peers: list[int | None] = [None] * int(self.machine.gpus[me].get("switch_links", 0))
        for pair in self.machine.links:
            ends = {int(pair["a"]), int(pair["b"])}
            if me in ends:
                peers += [*(ends - {me})] * int(pair.get("nvlinks", 0))
        if link >= len(peers):
            raise _AnswerError(INVALID_ARGUMENT if peers else NOT_SUPPORTED)
        return peers[link]


def _number_of(handle: Any) -> int:
    return ctypes.cast(handle, ctypes.c_void_p).value or 0


def _set_handle(out: Any, number: int) -> None:
    ctypes.memmove(out, ctypes.byref(ctypes.c_void_p(number)), ctypes.sizeof(ctypes.c_void_p))


def _value(table: Mapping[str, int | str], key: str) -> int | str:
    value = table.get(key)
    if value is None:
        raise _AnswerError(NOT_SUPPORTED)
    if isinstance(value, str) and value.startswith("!"):
        raise _AnswerError(int(value[1:]))
    return value


def _not_supported(*_args: Any) -> None:
    raise _AnswerError(NOT_SUPPORTED)


def _number(key: str) -> Callable[..., None]:
    def function(fake: FakeLibrary, handle: Any, out: Any) -> None:
        out._obj.value = _value(fake.table(handle), key)

    return function


def _text(key: str) -> Callable[..., None]:
    def function(fake: FakeLibrary, handle: Any, out: Any, _length: Any) -> None:
        out.value = str(_value(fake.table(handle), key)).encode("latin-1")

    return function


def _init(fake: FakeLibrary, _flags: int) -> None:
    if code := int(fake.machine.system["init_error"]):
        raise _AnswerError(code)
    fake.opened += 1


def _shutdown(fake: FakeLibrary) -> None:
    fake.opened -= 1


def _driver_version(fake: FakeLibrary, out: Any, _length: Any) -> None:
    out.value = str(_value(fake.machine.system, "driver_version")).encode()


def _cuda_version(fake: FakeLibrary, out: Any) -> None:
    out._obj.value = _value(fake.machine.system, "cuda_driver_version")


def _count(fake: FakeLibrary, out: Any) -> None:
    out._obj.value = len(fake.machine.gpus)


def _handle_by_index(fake: FakeLibrary, index: Any, out: Any) -> None:
    if code := int(fake.machine.gpus[index.value].get("handle_error", 0)):
        raise _AnswerError(code)
    _set_handle(out, index.value + 1)


def _handle_by(key: str) -> Callable[..., None]:
    """Of a card or, by its UUID, an instance. One that is lost is still known by its name."""

    def function(fake: FakeLibrary, wanted: Any, out: Any) -> None:
        name = getattr(wanted, "value", wanted)
        name = name.decode() if isinstance(name, bytes) else name
        cards = [(number, table) for number, table in enumerate(fake.machine.gpus, 1)]
        cards += [(number, table) for number, table in enumerate(fake.machine.migs, _FIRST_INSTANCE)]
        for number, table in cards:
            if table.get(key) == name:
                if code := int(table.get("handle_error", 0)):
                    raise _AnswerError(code)
                return _set_handle(out, number)
        raise _AnswerError(NOT_FOUND)

    return function


def _memory(fake: FakeLibrary, handle: Any, out: Any) -> None:
    table, memory = fake.table(handle), out._obj
    memory.total = _value(table, "mem_total")
    memory.used = int(table.get("mem_used", 0)) + int(table.get("mem_reserved", 0))
    memory.free = memory.total - memory.used


def _memory_v2(fake: FakeLibrary, handle: Any, out: Any) -> None:
    if out._obj.version != pynvml.nvmlMemory_v2:
        raise _AnswerError(ARGUMENT_VERSION_MISMATCH)
    _memory(fake, handle, out)
    out._obj.reserved = int(fake.table(handle).get("mem_reserved", 0))
    out._obj.used -= out._obj.reserved


def _clock(fake: FakeLibrary, handle: Any, kind: Any, out: Any) -> None:
    if getattr(kind, "value", kind) != pynvml.NVML_CLOCK_MEM:
        raise _AnswerError(NOT_SUPPORTED)
    out._obj.value = _value(fake.table(handle), "mem_clock_max_mhz")


def _capability(fake: FakeLibrary, handle: Any, major: Any, minor: Any) -> None:
    major._obj.value, minor._obj.value = divmod(int(_value(fake.table(handle), "compute_capability")), 10)


def _fill_pci(table: Table, out: Any) -> None:
    bus_id = str(_value(table, "pci_bus_id"))
    pci = out._obj
    pci.busId = bus_id.encode()
    pci.busIdLegacy = bus_id[4:].encode()
    pci.domain, pci.bus, pci.device = (int(part, 16) for part in bus_id.partition(".")[0].split(":"))


def _pci(fake: FakeLibrary, handle: Any, out: Any) -> None:
    _fill_pci(fake.table(handle), out)


def _p2p_status(fake: FakeLibrary, a: Any, b: Any, index: int, out: Any) -> None:
    link = fake.link(a, b)
    if index == pynvml.NVML_P2P_CAPS_INDEX_NVLINK:
        linked = int(link.get("nvlinks", 0)) > 0
        out._obj.value = link.get("p2p_nvlink", OK if linked else _P2P_STATUS_NOT_SUPPORTED)
    else:
        out._obj.value = link.get("p2p", _P2P_STATUS_NOT_SUPPORTED)


def _common_ancestor(fake: FakeLibrary, a: Any, b: Any, out: Any) -> None:
    out._obj.value = _value(fake.link(a, b), "level")


def _nvlink_state(fake: FakeLibrary, handle: Any, link: int, out: Any) -> None:
    if link < int(fake.table(handle).get("idle_links", 0)):
        out._obj.value = 0
        return
    fake.peer(handle, link)
    out._obj.value = 1


def _nvlink_type(fake: FakeLibrary, handle: Any, link: int, out: Any) -> None:
    out._obj.value = 2 if fake.peer(handle, link) is None else 0


def _nvlink_pci(fake: FakeLibrary, handle: Any, link: int, out: Any) -> None:
    peer = fake.peer(handle, link)
    _fill_pci({"pci_bus_id": "00000000:C1:00.0"} if peer is None else fake.machine.gpus[peer], out)


def _bar1(fake: FakeLibrary, handle: Any, out: Any) -> None:
    out._obj.bar1Total = _value(fake.table(handle), "bar1_total")


def _ecc_mode(fake: FakeLibrary, handle: Any, current: Any, pending: Any) -> None:
    current._obj.value = pending._obj.value = _value(fake.table(handle), "ecc")


def _ecc_errors(fake: FakeLibrary, handle: Any, _kind: Any, _counter: Any, out: Any) -> None:
    out._obj.value = _value(fake.table(handle), "ecc_errors")


def _remapped_rows(fake: FakeLibrary, handle: Any, _fixed: Any, _lost: Any, pending: Any, failed: Any) -> None:
    pending._obj.value = _value(fake.table(handle), "rows_pending")
    failed._obj.value = int(fake.table(handle).get("rows_failed", 0))


def _mig_mode(fake: FakeLibrary, handle: Any, current: Any, pending: Any) -> None:
    current._obj.value = pending._obj.value = _value(fake.table(handle), "mig_mode")


def _mig_handle(fake: FakeLibrary, handle: Any, slot: Any, out: Any) -> None:
    wanted = (_number_of(handle) - 1, slot.value)
    for number, mig in enumerate(fake.machine.migs):
        if (mig["gpu"], mig["slot"]) == wanted:
            return _set_handle(out, _FIRST_INSTANCE + number)
    raise _AnswerError(NOT_FOUND)


def _processes(fake: FakeLibrary, handle: Any, count: Any, out: Any) -> None:
    table = fake.table(handle)
    if "proc_pid" not in table:
        count._obj.value = 0
        return
    if out is None:
        count._obj.value = 1
        raise _AnswerError(INSUFFICIENT_SIZE)
    count._obj.value = 1
    out[0].pid = table["proc_pid"]
    out[0].usedGpuMemory = table.get("proc_mem", pynvml.NVML_VALUE_NOT_AVAILABLE_ulonglong.value)


FUNCTIONS: Final[dict[str, Callable[..., None]]] = {
    "nvmlInitWithFlags": _init,
    "nvmlShutdown": _shutdown,
    "nvmlSystemGetDriverVersion": _driver_version,
    "nvmlSystemGetCudaDriverVersion_v2": _cuda_version,
    "nvmlDeviceGetCount_v2": _count,
    "nvmlDeviceGetHandleByIndex_v2": _handle_by_index,
    "nvmlDeviceGetHandleByUUID": _handle_by("uuid"),
    "nvmlDeviceGetHandleByPciBusId_v2": _handle_by("pci_bus_id"),
    "nvmlDeviceGetName": _text("name"),
    "nvmlDeviceGetUUID": _text("uuid"),
    "nvmlDeviceGetPciInfo_v3": _pci,
    "nvmlDeviceGetMemoryInfo": _memory,
    "nvmlDeviceGetMemoryInfo_v2": _memory_v2,
    "nvmlDeviceGetCurrPcieLinkGeneration": _number("pcie_gen"),
    "nvmlDeviceGetCurrPcieLinkWidth": _number("pcie_width"),
    "nvmlDeviceGetMaxPcieLinkGeneration": _number("pcie_gen_max"),
    "nvmlDeviceGetMaxPcieLinkWidth": _number("pcie_width_max"),
    "nvmlDeviceGetGpuMaxPcieLinkGeneration": _number("pcie_gen_card"),
    "nvmlDeviceGetEnforcedPowerLimit": _number("power_limit_mw"),
    "nvmlDeviceGetPowerManagementLimit": _number("power_limit_mw"),
    "nvmlDeviceGetPowerManagementDefaultLimit": _number("power_default_mw"),
    "nvmlDeviceGetPersistenceMode": _number("persistence"),
    "nvmlDeviceGetCurrentClocksThrottleReasons": _number("slowed"),
    "nvmlDeviceGetBAR1MemoryInfo": _bar1,
    "nvmlDeviceGetEccMode": _ecc_mode,
    "nvmlDeviceGetTotalEccErrors": _ecc_errors,
    "nvmlDeviceGetRemappedRows": _remapped_rows,
    "nvmlDeviceGetMemoryBusWidth": _number("mem_bus_width"),
    "nvmlDeviceGetMaxClockInfo": _clock,
    "nvmlDeviceGetDisplayActive": _number("display_active"),
    "nvmlDeviceGetCudaComputeCapability": _capability,
    "nvmlDeviceGetP2PStatus": _p2p_status,
    "nvmlDeviceGetTopologyCommonAncestor": _common_ancestor,
    "nvmlDeviceGetNvLinkState": _nvlink_state,
    "nvmlDeviceGetNvLinkRemoteDeviceType": _nvlink_type,
    "nvmlDeviceGetNvLinkRemotePciInfo_v2": _nvlink_pci,
    "nvmlDeviceGetMigMode": _mig_mode,
    "nvmlDeviceGetMaxMigDeviceCount": _number("mig_max"),
    "nvmlDeviceGetMigDeviceHandleByIndex": _mig_handle,
    "nvmlDeviceGetComputeRunningProcesses_v3": _processes,
}
