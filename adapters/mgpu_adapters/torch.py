"""PyTorch's words for too little memory, under whichever runtime it works.

Formats: torch 2.0 to 2.11, c10/cuda/CUDACachingAllocator.cpp, c10/core/impl/alloc_cpu.cpp; NCCL 2.2x.
"""

from __future__ import annotations

import re
from typing import Final

from mgpu.adapter import Cause
from mgpu_adapters.words import shortage, shortage_of_ram, size

_LESS: Final = "use a smaller --ctx, fewer --users or a smaller cache type, or keep more free with --reserve"

_ANY: Final = re.compile(r"[Mm]emory|ALLOC_FAILED|MemoryAllocation|No space left")

#: The device stands behind the size: "GPU 1 has a total capacity", before 2.1 "(GPU 1; 23.69 GiB total".
_ALLOCATOR: Final = re.compile(
    r"\b(?:CUDA|HIP|XPU) out of memory\. Tried to allocate ([0-9]{1,15}(?:\.[0-9]{1,6})?) (bytes|[KMG]iB)"
    r"(?:\.? \(?GPU ([0-9]{1,3})\b)?"
)
_DEVICE: Final = re.compile(
    r"\bOutOfMemoryError\b|\b(?:CUDA|HIP|XPU) out of memory|\b(?:CUDA|HIP)(?: driver)? error: out of memory"
    r"|(?:CUBLAS|HIPBLAS)_STATUS_ALLOC_FAILED|\b(?:cuda|hip)Error(?:MemoryAllocation|OutOfMemory)\b"
    r"|Cuda failure (?:[0-9]{1,4} )?'out of memory'"
)
_HOST: Final = re.compile(
    r"you tried to allocate ([0-9]{1,18}) bytes|(?:^|[\s.])_?(?:Array)?MemoryError(?::|$)|\[Errno 12\]"
    r"|Cannot allocate memory \(12\)"
)
_SHARED: Final = re.compile(
    r"creating shared memory segment (\S{1,200})|unable to (?:write to|allocate shared memory).{0,200}No space left"
)


def read_shortage(line: str) -> Cause | None:
    """What a line says of memory that was not there. Devices are named as torch does: `"cuda:1"`."""
    if not _ANY.search(line):
        return None
    match = _ALLOCATOR.search(line)
    if match is not None:
        device = f"cuda:{int(match[3])}" if match[3] else ""
        return shortage(device or "a GPU", (device,) if device else (), size(match[1], match[2]), _LESS)
    if _DEVICE.search(line):
        return shortage("a GPU", (), 0, _LESS)
    if _SHARED.search(line):
        return Cause(
            text="the memory that processes share (/dev/shm) is full",
            hint="`df -h /dev/shm` shows its size; files that are left there by what has ended can be removed",
        )
    match = _HOST.search(line)
    return None if match is None else shortage_of_ram(size(match[1], "B"))
