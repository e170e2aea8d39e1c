"""llama.cpp's words for too little memory, of each of its backends: where, and how much was asked for.

Formats: llama.cpp b11434, function by function, and what builds since 2024 said in their place. A failure is told by
several lines; each that is known here is a cause of its own, and some of them have more to say than others.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Final

from mgpu.adapter import Cause
from mgpu_adapters.words import HOST, shortage, shortage_of_ram, size

#: The log's name for tensor ranks together, however it spells them out ("Meta(CUDA0,CUDA1)").
RANKS: Final = "Meta()"

#: What is said of memory that it can do without, or of one request's: it goes on.
_GOES_ON: Final = re.compile(
    r"pinned memory|skipping reorder|host memory fallback|async uploads|prompt cache|mlock|failed to fit params"
)

#: A line without any of these says nothing of memory. (Far quicker than all that follows.)
_ANY: Final = re.compile(r"alloc|ALLOC|memory|Memory|MEMORY|compute pp buffers|output buffer|CL_OUT_OF")

_NUMBER: Final = r"(?P<n>[0-9]{1,15}(?:\.[0-9]{1,6})?)"
_NAME: Final = r"(?P<name>[^\s\[(]{1,60})\S{0,60}"

#: One source for NVIDIA, AMD and Moore Threads (ggml-cuda): its lines have a number and no backend, or none of both.
_CUDA: Final = ("CUDA", "ROCm", "MUSA")

#: What is said (a regex). `n`: how much, in `unit` or the unit beside it. `name`: the buffer type. `number`: the
#: device's, of the backends beside it; HOST is the host's memory; without either, a device that is not named.
_WORDS: Final[Sequence[tuple[str, str, tuple[str, ...]]]] = (
    (rf"allocating {_NUMBER} MiB on device (?P<number>\d{{1,3}}): \w{{1,20}} failed: out of memory", "MiB", _CUDA),
    (rf"allocating {_NUMBER} MiB on device (?P<number>\d{{1,3}}): aclrtMalloc failed", "MiB", ("CANN",)),
    (rf"failed to allocate {_NAME} buffer of size {_NUMBER}", "B", ()),
    (r"unable to allocate backend buffer", "", ()),
    (rf"unable to allocate {_NAME} buffer\b", "", ()),
    (rf"ggml_vulkan: (?:Device m|M)emory allocation of size {_NUMBER} failed", "B", ()),
    (rf"failed to allocate buffer, size = {{1,12}}{_NUMBER} (?P<unit>MiB)", "", ()),
    (rf"failed to allocate Metal buffer of {_NUMBER} bytes", "B", ()),
    (rf"can't allocate {_NUMBER} Bytes of memory on device", "B", ()),
    (rf"failed to allocate {{1,12}}{_NUMBER} MiB \(err=", "MiB", ()),
    (rf"insufficient memory \(attempted to allocate {{1,12}}{_NUMBER} MB", "MiB", (HOST,)),
    (rf"ggml_[mc]alloc: failed to allocate {{1,12}}{_NUMBER} MB", "MiB", (HOST,)),
    (rf"buffer_type_alloc_buffer: failed to allocate buffer of size {_NUMBER}", "B", (HOST,)),
    (rf"can't allocate {_NUMBER} Bytes of memory on host", "B", (HOST,)),
    (r"mmap failed: Cannot allocate memory|Out[oO]fHostMemory|OUT_OF_HOST_MEMORY", "", (HOST,)),
    (
        r"(?:instance of '|what\(\):  |loading model: |the context: )(?:std::bad_alloc|bad allocation)",
        "",
        (HOST,),
    ),
    (rf"failed to allocate output buffer of size {_NUMBER} (?P<unit>MiB)", "", ()),
    (r"OutOf(?:Device|Pool)Memory|OUT_OF_DEVICE_MEMORY|ERROR_OUT_OF_RESOURCES|CallbackErrorOutOfMemory", "", ()),
    (r"CL_OUT_OF_RESOURCES|CL_MEM_OBJECT_ALLOCATION_FAILURE", "", ()),
    (r"error: (?:CUBLAS_STATUS_ALLOC_FAILED|HIPBLAS_STATUS_ALLOC_FAILED|the resource allocation failed)", "", ()),
    (
        r"failed to allocate (?:buffer for (?:kv|rs) cache|buffer for DSV4|compute (?:\S{1,60} )?buffers?\b)",
        "",
        (),
    ),
    (r"failed to reserve (?:initial output buffer|graph buffers)|graph allocation: failed to reserve memory", "", ()),
    (r"\b[Oo]ut of memory\b", "", ()),
)


def read_shortage(line: str) -> Cause | None:
    """What a line says of memory that was not there; None for any other, and for what llama.cpp does without."""
    if not _ANY.search(line) or _GOES_ON.search(line):
        return None
    for pattern, unit, backends in _WORDS:
        match = re.search(pattern, line)
        if match is not None:
            found = match.groupdict()
            wanted = size(found.get("n"), found.get("unit") or unit)
            return _cause(wanted, backends, name=found.get("name"), number=found.get("number"))
    return None


def _cause(wanted: int, backends: tuple[str, ...], *, name: str | None, number: str | None) -> Cause:
    if number is not None:
        return shortage(f"device {number}", tuple(f"{backend}{int(number)}" for backend in backends), wanted)
    if name is not None and not _is_host(name):
        device = RANKS if name == RANKS.rstrip("()") else name.removesuffix("_Split")
        return shortage("the cards together" if device == RANKS else device, (device,), wanted)
    if name is not None or backends == (HOST,):
        return shortage_of_ram(wanted)
    return shortage("a device", (), wanted)


def _is_host(name: str) -> bool:
    """CPU, CPU_Mapped, CPU_REPACK, CUDA_Host, Vulkan_Host; AMX and other packed weights of the CPU."""
    return name.startswith(("CPU", "AMX")) or name.endswith("_Host")
