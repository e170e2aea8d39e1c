"""Limits of this process, which runtimes inherit."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from mgpu.doctor.facts import Facts
from mgpu.doctor.finding import Finding, ok
from mgpu.units import GIB, MIB, gib

_UNLIMITED: Final = -1

#: 64 clients, their connections to a proxy and its to replicas, libraries, model shards.
_ENOUGH_FILES: Final = 4096
_FEW_FILES: Final = 512

#: NCCL takes some tens of MiB for each rank, vLLM more; Docker gives 64 MiB in all.
_ENOUGH_SHARED: Final = GIB


def locked_memory(facts: Facts) -> Iterator[Finding]:
    """`--mlock`, and libraries that pin memory by themselves (RDMA, older ROCm)."""
    limit = facts.limits.memlock
    if limit is None:
        return
    if limit == _UNLIMITED or limit >= facts.host.machine_ram > 0:
        yield ok("limits", "memlock", "memory can be locked without limit")
        return
    if "mlock" not in facts.environ.get("LLAMA_ARG_LOAD_MODE", "") and "LLAMA_ARG_MLOCK" not in facts.environ:
        yield ok("limits", "memlock", f"{gib(limit)} of memory can be locked: enough without --mlock")
        return
    yield Finding(
        severity="warning",
        area="limits",
        id="memlock",
        text=f"{gib(limit)} of memory can be locked (ulimit -l): --mlock keeps no model in RAM",
        fix="'* - memlock unlimited' in /etc/security/limits.d, LimitMEMLOCK=infinity in units",
    )


def open_files(facts: Facts) -> Iterator[Finding]:
    """Each client is one."""
    limit, hard = facts.limits.nofile, facts.limits.nofile_hard
    if limit is None:
        return
    if limit == _UNLIMITED or limit >= _ENOUGH_FILES:
        yield ok("limits", "open-files", f"{'any number of' if limit == _UNLIMITED else limit} open files")
        return
    more = hard is None or hard == _UNLIMITED or hard > limit
    yield Finding(
        severity="warning" if limit < _FEW_FILES else "note",
        area="limits",
        id="open-files",
        text=f"{limit} files can be open at a time (ulimit -n): too few for hundreds of clients, or vLLM's workers",
        fix=f"ulimit -n {_ENOUGH_FILES if hard in {None, _UNLIMITED} else hard}" if more else "raise the hard limit",
    )


def core_dumps(facts: Facts) -> Iterator[Finding]:
    """A crash writes the whole of a runtime's memory to disk."""
    limit, pattern = facts.limits.core, facts.limits.core_pattern
    if limit is None or not pattern:
        return
    if limit == 0 or pattern.startswith("|"):
        yield ok("limits", "core-dumps", "a crash writes no core file by itself")
        return
    size = "all of its memory" if limit == _UNLIMITED else f"up to {gib(limit)}"
    yield Finding(
        severity="note",
        area="limits",
        id="core-dumps",
        text=f"a runtime that crashes writes {size} to {pattern!r}: tens of GB for a model on the CPU",
        fix="ulimit -c 0",
    )


def address_space(facts: Facts) -> Iterator[Finding]:
    """CUDA cannot start below a limit: it reserves room for all cards and the RAM."""
    limit = facts.limits.address_space
    if limit is None:
        return
    if limit == _UNLIMITED:
        yield ok("limits", "address-space", "no limit on address space")
        return
    yield Finding(
        severity="error" if facts.cards.rig.gpus else "warning",
        area="limits",
        id="address-space",
        text=f"{gib(limit)} of address space (ulimit -v): CUDA and mapped models need far more than they use",
        fix="ulimit -v unlimited",
    )


def shared_memory(facts: Facts) -> Iterator[Finding]:
    """vLLM's workers and NCCL meet in /dev/shm."""
    size, cards = facts.host.shared_memory, [gpu for gpu in facts.cards.rig.gpus if not gpu.integrated]
    if size is None:
        return
    if size >= _ENOUGH_SHARED or (len(cards) < 2 and size >= 64 * MIB):
        yield ok("limits", "shared-memory", f"{gib(size)} of /dev/shm")
        return
    docker = "start the container with --ipc host, or --shm-size 10g"
    yield Finding(
        severity="warning" if len(cards) > 1 else "note",
        area="limits",
        id="shared-memory",
        text=f'{gib(size)} of /dev/shm: vLLM\'s workers and NCCL die of that ("Bus error") with several cards',
        fix=docker if facts.host.container else "sudo mount -o remount,size=8G /dev/shm",
        source="NCCL user guide, Troubleshooting: Shared memory",
    )


def logout(facts: Facts) -> Iterator[Finding]:
    """What was left running with `--detach` is meant to outlive the session."""
    kills = facts.host.kills_at_logout
    if kills is None:
        return
    if not kills:
        yield ok("limits", "logout", "what is left running outlives a logout")
        return
    yield Finding(
        severity="note",
        area="limits",
        id="logout",
        text="systemd-logind ends this user's processes at logout: launches left by --detach, too",
        fix="mgpu run … --unit and loginctl enable-linger; or KillUserProcesses=no in /etc/systemd/logind.conf",
        source="logind.conf(5), KillUserProcesses=",
    )


CHECKS: Final = (locked_memory, open_files, core_dumps, address_space, shared_memory, logout)
