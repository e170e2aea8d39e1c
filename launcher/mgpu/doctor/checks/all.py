"""All checks, in the order in which a person should read them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Final

from msgspec.structs import replace

from mgpu.doctor.checks import access, cards, cpu, disks, driver, environment, limits, links, memory, own, runtimes
from mgpu.doctor.facts import Facts
from mgpu.doctor.finding import SEVERITIES, Finding
from mgpu.errors import one_line

_LONGEST: Final = 600

Check = Callable[[Facts], Iterator[Finding]]

CHECKS: Final[tuple[Check, ...]] = (
    *driver.CHECKS,
    *access.CHECKS,
    *cards.CHECKS,
    *links.CHECKS,
    *runtimes.CHECKS,
    *environment.CHECKS,
    *memory.CHECKS,
    *limits.CHECKS,
    *disks.CHECKS,
    *cpu.CHECKS,
    *own.CHECKS,
)


def examine(facts: Facts) -> tuple[Finding, ...]:
    """Every finding, the worst first; those that passed last. The same facts give the same findings."""
    found = [*_silences(facts), *(finding for check in CHECKS for finding in check(facts))]
    plain = dict.fromkeys(_printable(finding) for finding in found)
    return tuple(sorted(plain, key=lambda finding: SEVERITIES.index(finding.severity)))


def _printable(finding: Finding) -> Finding:
    """Paths, names of processes and what runtimes print may hold anything."""
    return replace(finding, text=one_line(finding.text, _LONGEST), fix=one_line(finding.fix, _LONGEST))


def _silences(facts: Facts) -> Iterator[Finding]:
    for part, why in facts.silent:
        drivers = part == "the cards"
        yield Finding(
            severity="error" if drivers else "warning",
            area="driver" if drivers else "mgpu",
            id="no-answer",
            text=f"{part} {why}",
            fix="the driver hangs: see `sudo dmesg | tail`, then reboot" if drivers else "try `mgpu doctor` once more",
        )
