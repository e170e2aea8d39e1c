"""The processor: what is left on it computes there."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from mgpu.doctor.facts import Facts
from mgpu.doctor.finding import Finding, ok

#: Drivers whose "powersave" is the usual, and lets the clock rise.
_ACTIVE: Final = frozenset({"intel_pstate", "amd-pstate-epp"})


def governor(facts: Facts) -> Iterator[Finding]:
    """With a lowered clock the card waits for the processor: one thread feeds it."""
    governors, driver = facts.host.governors, facts.host.governor_driver
    if not governors:
        return
    if "powersave" in governors and driver not in _ACTIVE:
        yield Finding(
            severity="warning",
            area="cpu",
            id="governor",
            text=f"the CPU's governor is powersave ({driver or 'driver unknown'}): it stays at its lowest clock",
            fix="sudo cpupower frequency-set -g performance (or schedutil)",
            source="Linux Documentation/admin-guide/pm/cpufreq.rst",
        )
    else:
        yield ok("cpu", "governor", f"the CPU's governor is {', '.join(sorted(governors))} ({driver})")


def numa_balancing(facts: Facts) -> Iterator[Finding]:
    """The kernel moves pages between sockets while the model is read."""
    host = facts.host
    if host.numa_nodes < 2 or host.numa_balancing is None:
        return
    if host.numa_balancing:
        yield Finding(
            severity="warning",
            area="cpu",
            id="numa-balancing",
            text=f"the kernel moves memory between {host.numa_nodes} NUMA nodes: what the CPU computes gets slower",
            fix="sudo sysctl kernel.numa_balancing=0; and llama-server's --numa distribute",
            source="llama.cpp b11434 ggml-cpu.c",
        )
    else:
        yield ok("cpu", "numa-balancing", f"off, with {host.numa_nodes} NUMA nodes")


def quota(facts: Facts) -> Iterator[Finding]:
    """A control group's share of time: threads beyond it stand still, and the card with them."""
    cores, granted = facts.host.cpu_cores, facts.host.cpu_quota
    if granted is None:
        if cores:
            yield ok("cpu", "quota", f"all of {cores} cores" if cores > 1 else "one core")
        return
    slow = granted < 2
    if cores is not None and granted >= cores:
        return
    of_cores = f" of {cores}" if cores else ""
    yield Finding(
        severity="warning" if slow else "note",
        area="cpu",
        id="quota",
        text=f"a control group grants {granted:g}{of_cores} cores: runtimes start a thread for each core they see",
        fix=f"raise it (docker run --cpus), or pass the runtime --threads {max(int(granted), 1)}",
    )


CHECKS: Final = (governor, numa_balancing, quota)
