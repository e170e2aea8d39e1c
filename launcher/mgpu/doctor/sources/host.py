"""The machine around the cards: memory, control groups, the processor, limits of this process."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Final

from mgpu.detect.host import read_host, read_memory
from mgpu.detect.sysfs import list_names, read_number, read_text
from mgpu.doctor.facts import HostFacts, Limits
from mgpu.doctor.sources.logind import kills_at_logout
from mgpu.units import KIB

_MEMINFO: Final = 1 << 14
_CPUINFO: Final = 1 << 14  # the first processor's flags are in there
_CPU: Final = re.compile(r"cpu[0-9]+")
_NODE: Final = re.compile(r"node[0-9]+")
_FIELD: Final = re.compile(r"^(\w+):\s+([0-9]{1,18})(?: kB)?$", re.MULTILINE)


def look_at_host(environ: Mapping[str, str], root: Path) -> HostFacts:
    """What /proc and /sys say below `root`; on other systems little more than the memory."""
    host, fields = read_host(root), _meminfo(root)
    sysctl, cpus = root / "proc/sys", tuple(_cpus(root))
    return HostFacts(
        container=_container(environ, root),
        wsl="microsoft" in read_text(sysctl / "kernel/osrelease").lower(),
        ram=host.memory.total_bytes,
        available=host.memory.available_bytes,
        machine_ram=read_memory(root).total_bytes,
        swap=_kib(fields, "SwapTotal"),
        swap_free=_kib(fields, "SwapFree") or 0,
        swaps=tuple(line.split()[0] for line in read_text(root / "proc/swaps").splitlines()[1:] if line.strip()),
        swappiness=read_number(sysctl / "vm/swappiness"),
        overcommit=read_number(sysctl / "vm/overcommit_memory"),
        commit_limit=_kib(fields, "CommitLimit") or 0,
        set_aside=fields.get("HugePages_Total", 0) * fields.get("Hugepagesize", 0) * KIB,
        shared_memory=_size(root / "dev/shm"),
        cpu_cores=host.cpu_cores,
        cpu_quota=_quota(root),
        cpu_flags=_flags(root),
        governors=frozenset(filter(None, (read_text(cpu / "cpufreq/scaling_governor") for cpu in cpus))),
        governor_driver=next(filter(None, (read_text(cpu / "cpufreq/scaling_driver") for cpu in cpus)), ""),
        numa_nodes=sum(1 for name in list_names(root / "sys/devices/system/node") if _NODE.fullmatch(name)) or 1,
        numa_balancing=read_number(sysctl / "kernel/numa_balancing"),
        kills_at_logout=kills_at_logout(root),
    )


def look_at_limits(root: Path) -> Limits:
    """This process's own, which what it starts inherits."""
    import resource

    def soft(name: int) -> int:
        return _plain(resource.getrlimit(name)[0])

    return Limits(
        memlock=soft(resource.RLIMIT_MEMLOCK),
        nofile=soft(resource.RLIMIT_NOFILE),
        nofile_hard=_plain(resource.getrlimit(resource.RLIMIT_NOFILE)[1]),
        core=soft(resource.RLIMIT_CORE),
        address_space=soft(resource.RLIMIT_AS),
        core_pattern=read_text(root / "proc/sys/kernel/core_pattern"),
    )


def _plain(limit: int) -> int:
    import resource

    return -1 if limit == resource.RLIM_INFINITY else limit


def _meminfo(root: Path) -> dict[str, int]:
    text = read_text(root / "proc/meminfo", _MEMINFO)
    return {name: int(number) for name, number in _FIELD.findall(text)}


def _kib(fields: Mapping[str, int], name: str) -> int | None:
    return fields[name] * KIB if name in fields else None


def _container(environ: Mapping[str, str], root: Path) -> str:
    if (root / ".dockerenv").exists():
        return "Docker"
    if (root / "run/.containerenv").exists():
        return "Podman"
    return "a container" if environ.get("container") else ""


def _size(directory: Path) -> int | None:
    try:
        status = os.statvfs(directory)
    except OSError:
        return None
    return status.f_blocks * status.f_frsize


def _cpus(root: Path) -> Iterator[Path]:
    folder = root / "sys/devices/system/cpu"
    return (folder / name for name in list_names(folder) if _CPU.fullmatch(name))


def _flags(root: Path) -> frozenset[str]:
    match = re.search(r"^flags\s*:(.*)$", read_text(root / "proc/cpuinfo", _CPUINFO), re.MULTILINE)
    return frozenset(match[1].split()) if match else frozenset()


def _quota(root: Path) -> float | None:
    """Cores' worth of time: the least that this process's control groups grant; None where they set no limit."""
    quotas = [quota for folder in _groups(root) if (quota := _quota_of(folder)) is not None]
    return min(quotas, default=None)


def _groups(root: Path) -> Iterator[Path]:
    """This process's control groups and those above: version 2, and version 1's for the processor."""
    for line in read_text(root / "proc/self/cgroup").splitlines():
        controllers, _, path = line.partition(":")[2].partition(":")
        if controllers and "cpu" not in controllers.split(","):
            continue
        group = PurePosixPath(path.replace("..", ""))
        mounts = ("sys/fs/cgroup/cpu", "sys/fs/cgroup/cpu,cpuacct") if controllers else ("sys/fs/cgroup",)
        for mount in mounts:
            for ancestor in (group, *group.parents):
                yield root / mount / str(ancestor).lstrip("/")


def _quota_of(folder: Path) -> float | None:
    """From "200000 100000" (version 2; "max" is none), or from two files (version 1; -1 is none)."""
    words = read_text(folder / "cpu.max").split() or [
        read_text(folder / "cpu.cfs_quota_us"),
        read_text(folder / "cpu.cfs_period_us"),
    ]
    if len(words) != 2 or not all(re.fullmatch(r"[0-9]{1,12}", word) for word in words) or int(words[1]) == 0:
        return None
    return int(words[0]) / int(words[1]) or None
