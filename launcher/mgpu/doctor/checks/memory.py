"""RAM and swap: where a model's file is cached, and what is lost to others."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from mgpu.doctor.facts import Facts
from mgpu.doctor.finding import Finding, ok
from mgpu.units import GIB, gib, gib_of

#: Linux's own default is 60.
_EAGER: Final = 80

_STRICT: Final = 2  # vm.overcommit_memory
_LITTLE: Final = 2 * GIB
_KERNEL: Final = "Linux Documentation/admin-guide/sysctl/vm.rst"


def limited(facts: Facts) -> Iterator[Finding]:
    """A container's share of the RAM."""
    host = facts.host
    if not host.ram:
        return
    if host.ram < host.machine_ram:
        largest = _largest(facts)
        short = largest > host.ram
        text = f"this process may use {gib_of(host.ram, host.machine_ram)} of RAM (a control group's limit)"
        text += f", less than the {gib(largest)} of the largest card" if short else ""
        fix = "raise it: docker run --memory, systemd MemoryMax=, Kubernetes limits"
        severity: Final = "warning" if short else "note"
        yield Finding(severity=severity, area="memory", id="ram-limit", text=text, fix=fix)
    else:
        yield ok("memory", "ram-limit", f"{gib_of(host.available, host.ram)} of RAM to be had")


def room_for_files(facts: Facts) -> Iterator[Finding]:
    """A model that fills the cards passes through the page cache on its way."""
    host, cards = facts.host, sum(gpu.total_bytes for gpu in facts.cards.rig.gpus if not gpu.unified)
    if not host.machine_ram or not cards:
        return
    if host.ram < cards:
        yield Finding(
            severity="note",
            area="memory",
            id="page-cache",
            text=f"{gib(host.ram)} of RAM, {gib(cards)} of VRAM: a model that fills the cards is read from disk anew"
            " at each start",
            fix="more RAM, or a fast disk for the models",
        )
    else:
        yield ok("memory", "page-cache", f"{gib(host.ram)} of RAM for {gib(cards)} of VRAM")


def swap(facts: Facts) -> Iterator[Finding]:
    """In use while RAM is short, everything crawls; without any, the first to ask too much is killed."""
    host = facts.host
    if host.swap is None:
        return
    used = host.swap - host.swap_free
    short = host.available < max(_LITTLE, host.ram // 10)
    if host.swap and short and used * 4 > host.swap:
        yield Finding(
            severity="warning",
            area="memory",
            id="swap",
            text=f"{gib_of(used, host.swap)} of swap are in use, {gib(host.available)} of RAM is left",
            fix="end what holds the memory (ps aux --sort -rss), then: sudo swapoff -a && sudo swapon -a",
        )
    elif not host.swap and not host.container:
        yield Finding(
            severity="note",
            area="memory",
            id="swap",
            text=f"no swap: beyond {gib(host.available)} the kernel kills, and often the runtime, the largest",
            fix="sudo fallocate -l 8G /swap && sudo chmod 600 /swap && sudo mkswap /swap && sudo swapon /swap",
        )
    elif host.swap:
        yield ok("memory", "swap", f"{gib(host.swap)} of swap, {gib(used)} in use")


def compressed_swap(facts: Facts) -> Iterator[Finding]:
    """zram takes RAM from what it should help; weights do not compress."""
    names = [name for name in facts.host.swaps if "zram" in name]
    if names:
        yield Finding(
            severity="note",
            area="memory",
            id="zram",
            text=f"swap is compressed RAM ({', '.join(names)}): weights do not shrink, so it makes no room",
            fix="with much of a model on the CPU: sudo swapoff " + " ".join(names),
        )


def swappiness(facts: Facts) -> Iterator[Finding]:
    """How gladly the kernel swaps programs out to keep files cached, of which a model is the largest."""
    value = facts.host.swappiness
    if value is None or not facts.host.swap:
        return
    if value > _EAGER and not any("zram" in name for name in facts.host.swaps):
        yield Finding(
            severity="note",
            area="memory",
            id="swappiness",
            text=f"vm.swappiness is {value}: reading a large model pushes programs out to swap",
            fix="sudo sysctl vm.swappiness=10; for good: in /etc/sysctl.d",
            source=_KERNEL,
        )
    else:
        yield ok("memory", "swappiness", f"vm.swappiness is {value}")


def overcommit(facts: Facts) -> Iterator[Finding]:
    """CUDA reserves address space by the terabyte, and never uses most of it."""
    mode = facts.host.overcommit
    if mode is None:
        return
    if mode != _STRICT:
        yield ok("memory", "overcommit", f"vm.overcommit_memory is {mode}")
        return
    yield Finding(
        severity="warning",
        area="memory",
        id="overcommit",
        text=f"vm.overcommit_memory is 2: all programs together may reserve {gib(facts.host.commit_limit)}, and CUDA"
        " and mapped models reserve much that they never use",
        fix="sudo sysctl vm.overcommit_memory=0; for good: in /etc/sysctl.d",
        source=_KERNEL,
    )


def huge_pages(facts: Facts) -> Iterator[Finding]:
    """RAM that is set aside and that no runtime asks for, but CUDA on chips with unified memory."""
    host, unified = facts.host, any(gpu.unified and not gpu.integrated for gpu in facts.cards.rig.gpus)
    if not host.set_aside or host.set_aside * 20 < host.machine_ram:
        return
    text = f"{gib_of(host.set_aside, host.machine_ram)} of RAM are set aside as huge pages"
    if unified:
        text += ", and CUDA takes only those on this chip"
    yield Finding(
        severity="warning",
        area="memory",
        id="huge-pages",
        text=text + ("" if unified else ", which no runtime uses"),
        fix="sudo sysctl vm.nr_hugepages=0; for good: in /etc/sysctl.d",
        source="llama.cpp b11434 ggml-cuda.cu" if unified else _KERNEL,
    )


def _largest(facts: Facts) -> int:
    return max((gpu.total_bytes for gpu in facts.cards.rig.gpus if not gpu.unified), default=0)


CHECKS: Final = (limited, room_for_files, swap, compressed_swap, swappiness, overcommit, huge_pages)
