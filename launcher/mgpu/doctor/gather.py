"""All facts at once, in bounded time: what does not answer is said, and hides nothing else."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

from mgpu.detect.sysfs import ROOT
from mgpu.doctor.ask import Silence, ask_all
from mgpu.doctor.facts import CardFacts, Disk, Facts, HostFacts, Limits, OwnFacts, Program
from mgpu.doctor.sources.cards import look_at_cards
from mgpu.doctor.sources.disks import directories, look_at_disk
from mgpu.doctor.sources.host import look_at_host, look_at_limits
from mgpu.doctor.sources.own import look_at_own
from mgpu.doctor.sources.programs import look_at_program, program_names
from mgpu.rig import Rig

#: Above what the slowest single part may take: three questions to a runtime, and its devices.
_PATIENCE_S: Final = 35.0

_CARDS, _HOST, _LIMITS, _OWN = "the cards", "the host", "this process's limits", "mgpu's own directories"
_DISK, _RUNTIME = "the disk of ", "the runtime "

_NOTHING: Final = Rig(name="this machine", source="detected", gpus=())


def gather(environ: Mapping[str, str], *, root: Path = ROOT, patience_s: float = _PATIENCE_S) -> Facts:
    """This machine. `root`: where /sys, /proc and /dev are."""
    questions: dict[str, Callable[[], object]] = {
        _CARDS: functools.partial(look_at_cards, environ, root),
        _HOST: functools.partial(look_at_host, environ, root),
        _LIMITS: functools.partial(look_at_limits, root),
        _OWN: look_at_own,
    }
    for purpose, path, ours in directories(environ):
        questions[_DISK + purpose] = functools.partial(look_at_disk, purpose, path, ours=ours, root=root)
    for name in program_names():
        questions[_RUNTIME + name] = functools.partial(look_at_program, name, environ)
    answers = ask_all(questions, patience_s)
    return Facts(
        cards=_answer(answers[_CARDS], CardFacts(rig=_NOTHING)),
        host=_answer(answers[_HOST], HostFacts()),
        limits=_answer(answers[_LIMITS], Limits()),
        own=_answer(answers[_OWN], OwnFacts()),
        disks=tuple(answer for answer in answers.values() if isinstance(answer, Disk)),
        programs=tuple(answer for answer in answers.values() if isinstance(answer, Program)),
        environ=dict(environ),
        silent=tuple((name, answer.why) for name, answer in answers.items() if isinstance(answer, Silence)),
    )


def _answer(answer: object, otherwise: Any) -> Any:
    return answer if isinstance(answer, type(otherwise)) else otherwise
