"""The host: memory, cores, the CPU's name. Linux is read from /proc and /sys (25 ms sooner than psutil)."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Final

from msgspec import Struct

from mgpu.detect.dmi import ram_bandwidth
from mgpu.units import KIB

_ROOT: Final = Path("/")


class Memory(Struct, frozen=True, kw_only=True):
    """RAM in bytes. `available_bytes` is what programs can get without swapping, page cache included."""

    total_bytes: int
    available_bytes: int


class Host(Struct, frozen=True, kw_only=True):
    """What this process may use: memory within its container's limits, physical cores it may run on."""

    memory: Memory
    cpu_cores: int | None
    cpu_name: str
    ram_bandwidth_bytes_per_s: int | None = None


def read_host(root: Path = _ROOT) -> Host:
    """The host as seen under `root`, where /proc and /sys are."""
    memory = read_memory(root)
    for limit in _cgroup_limits(root):
        memory = Memory(
            total_bytes=min(memory.total_bytes, limit.total_bytes),
            available_bytes=min(memory.available_bytes, limit.available_bytes),
        )
    return Host(
        memory=memory,
        cpu_cores=_physical_cores(root),
        cpu_name=_cpu_name(root),
        ram_bandwidth_bytes_per_s=ram_bandwidth(root),
    )


def read_memory(root: Path = _ROOT) -> Memory:
    """The machine's own memory, whatever this process may use of it."""
    fields = _fields(root / "proc/meminfo")
    if "MemTotal" not in fields:
        return _psutil_memory()
    # MemAvailable is as old as Linux 3.14; what came before it is a lower bound.
    available = fields.get("MemAvailable", fields.get("MemFree", 0))
    return Memory(total_bytes=fields["MemTotal"] * KIB, available_bytes=available * KIB)


def read_unified(root: Path = _ROOT) -> Memory:
    """What a GPU without memory of its own may use. Where huge pages are set aside, CUDA takes those alone
    (llama.cpp b11434 ggml-cuda.cu, after NVIDIA's guide for such chips)."""
    memory, fields = read_memory(root), _fields(root / "proc/meminfo")
    if not fields.get("HugePages_Total"):
        return memory
    available = fields.get("HugePages_Free", 0) * fields.get("Hugepagesize", 0) * KIB
    return Memory(total_bytes=memory.total_bytes, available_bytes=min(available, memory.total_bytes))


def process_name(pid: int, root: Path = _ROOT) -> str | None:
    """The short name of a running process, if this process may see it (a driver counts pids outside of containers)."""
    name = _read(root / f"proc/{pid}/comm").strip()
    if name or _is_linux(root):
        return name or None
    import psutil

    try:
        return psutil.Process(pid).name()
    except psutil.Error:
        return None


def _psutil_memory() -> Memory:
    import psutil

    memory = psutil.virtual_memory()
    return Memory(total_bytes=memory.total, available_bytes=memory.available)


def _cgroup_limits(root: Path) -> Iterator[Memory]:
    """The memory limit of every control group this process is in, with what is left of each.

    Page cache that has not been used lately does not count as used: the kernel drops it before it refuses memory.
    A limit of "max" (version 2) or of almost 2**63 (version 1) is none, and so is any above the machine's memory.
    """
    for line in _read(root / "proc/self/cgroup").splitlines():
        controllers, _, path = line.partition(":")[2].partition(":")
        if not controllers:
            yield from _limits(root, ("sys/fs/cgroup", "sys/fs/cgroup/unified"), path, "memory.max", "memory.current")
        elif "memory" in controllers.split(","):
            yield from _limits(root, ("sys/fs/cgroup/memory",), path, "memory.limit_in_bytes", "memory.usage_in_bytes")


def _limits(root: Path, mounts: tuple[str, ...], path: str, limit_file: str, usage_file: str) -> Iterator[Memory]:
    # In a container the path may be the host's, and not exist here: then the mount point is the container's own group.
    group = PurePosixPath(path.replace("..", ""))
    for mount in mounts:
        for ancestor in (group, *group.parents):
            directory = root / mount / str(ancestor).lstrip("/")
            limit = _read(directory / limit_file).strip()
            if limit.isdecimal():
                yield _what_is_left(directory, int(limit), usage_file)


def _what_is_left(directory: Path, limit: int, usage_file: str) -> Memory:
    usage = _read(directory / usage_file).strip()
    stat = _fields(directory / "memory.stat")
    cache = stat.get("total_inactive_file", stat.get("inactive_file", 0))
    used = max(int(usage) - cache, 0) if usage.isdecimal() else 0
    return Memory(total_bytes=limit, available_bytes=max(limit - used, 0))


def _physical_cores(root: Path) -> int | None:
    """Groups of sibling threads of which this process may use at least one."""
    siblings = {
        text
        for cpu in (root / "sys/devices/system/cpu").glob("cpu[0-9]*")
        if _may_run_on(int(cpu.name[3:]))
        for text in [_read(cpu / "topology/thread_siblings_list")]
        if text
    }
    if siblings or _is_linux(root):
        return len(siblings) or None
    import psutil

    return psutil.cpu_count(logical=False)


def _may_run_on(cpu: int) -> bool:
    affinity = getattr(os, "sched_getaffinity", None)
    return affinity is None or cpu in affinity(0)


def _cpu_name(root: Path) -> str:
    """As the CPU calls itself; most ARM systems give no name."""
    for line in _read(root / "proc/cpuinfo", limit=4096).splitlines():
        key, _, value = line.partition(":")
        if key.strip() == "model name":
            return value.strip()
    return ""


def _is_linux(root: Path) -> bool:
    return (root / "proc/meminfo").exists()


def _fields(path: Path) -> dict[str, int]:
    """`Name: 123 kB` and `name 123` lines as numbers."""
    words = (line.replace(":", " ").split() for line in _read(path).splitlines())
    return {word[0]: int(word[1]) for word in words if len(word) > 1 and word[1].isdecimal()}


def _read(path: Path, limit: int = -1) -> str:
    """The text of a small system file; empty where there is none to read."""
    try:
        with path.open(encoding="utf-8", errors="replace") as file:
            return file.read(limit)
    except OSError:
        return ""
