"""`--runtime auto`: of the runtimes that read the model's format, the one with the best predicted plan. Pure.

Rule `runtime-choice`. Where two are predicted alike, the order in which they are given decides: the order of
preference.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from msgspec import Struct
from msgspec.structs import replace

from mgpu.decide.rules.ruling import GUIDE, about
from mgpu.plan import Alternative, Plan, RuleVerdict, Speed
from mgpu.request import RuntimeName

#: A runtime further down in the order of preference must be predicted this much faster to be taken.
_MARGIN: Final = 1.05

_RULE: Final = "runtime-choice"


class Candidate(Struct, frozen=True, kw_only=True):
    """A runtime that reads the format. `plan`: what it would do here; None where it cannot, and `why_not` says why."""

    runtime: RuntimeName
    installed: bool  # or running
    install: str  # the command
    plan: Plan | None = None
    why_not: str = ""


def best(candidates: Sequence[Candidate]) -> Candidate | None:
    """The one to use, whether it is installed or not; None where none of them can do anything with the model.

    A plan that is refused is better than none: it says what is wrong.
    """
    chosen: Candidate | None = None
    for candidate in candidates:
        if candidate.plan is not None and (chosen is None or chosen.plan is None or beats(candidate, chosen)):
            chosen = candidate
    return chosen


def beats(one: Candidate, other: Candidate) -> bool:
    """Whether `one` is predicted to be clearly better: it runs at all, without the CPU's help, or it is faster."""
    a, b = one.plan, other.plan
    if a is None or b is None:
        return a is not None
    if _rank(a) != _rank(b):
        return _rank(a) > _rank(b)
    fast, slow = speed_of(a), speed_of(b)
    return fast is not None and slow is not None and fast.expected >= _MARGIN * slow.expected


def speed_of(plan: Plan) -> Speed | None:
    """What counts: all users together, or the only one."""
    return plan.forecast.total_tok_s if plan.users > 1 else plan.forecast.tok_s


def told(plan: Plan, candidates: Sequence[Candidate]) -> Plan:
    """`plan`, which is that of one of the `candidates`, with the verdict of the rule and the others as alternatives."""
    others = [candidate for candidate in candidates if candidate.runtime != plan.runtime]
    spoken = _verdict(plan, others)
    return replace(
        plan,
        rules=tuple(spoken if verdict.id == _RULE else verdict for verdict in plan.rules),
        alternatives=(*plan.alternatives, *(_alternative(plan, other) for other in others if other.plan is not None)),
    )


def advice(plan: Plan, candidates: Sequence[Candidate]) -> str | None:
    """What a runtime that is not installed would gain over `plan`, and how to install it; None where none would."""
    ours = next((candidate for candidate in candidates if candidate.runtime == plan.runtime), None)
    if ours is None or not ours.installed:
        return None
    missing = [candidate for candidate in candidates if not candidate.installed and beats(candidate, ours)]
    better = best(missing)
    if better is None or better.plan is None or _rank(better.plan) == 0:
        return None
    gain = _gain(better.plan, plan)
    return f"{better.runtime} is not installed, and would {gain}; install it: {better.install}"


def _rank(plan: Plan) -> int:
    """Refused, with the CPU's help, on cards alone."""
    if plan.refusal is not None:
        return 0
    return 1 if plan.placement in {"cpu", "offload"} else 2


def _gain(plan: Plan, ours: Plan) -> str:
    speed, less = speed_of(plan), speed_of(ours)
    figure = "run it" if speed is None else f"run it at {about(speed)} tok/s{_together(plan)}"
    if ours.refusal is not None or less is None:
        return f"{figure} (predicted)"
    return f"{figure} instead of {about(less)} (predicted)"


def _together(plan: Plan) -> str:
    return " together" if plan.users > 1 else ""


def _verdict(plan: Plan, others: Sequence[Candidate]) -> RuleVerdict:
    """Why this runtime: against each other that reads the format, by its figure or by what keeps it out."""
    reasons = "; ".join(_against(plan, other) for other in others)
    speed = speed_of(plan)
    figure = "" if speed is None else f", {about(speed)} tok/s{_together(plan)} (predicted)"
    text = f"{plan.runtime}{figure}" + (f"; {reasons}" if reasons else "")
    return RuleVerdict(id=_RULE, verdict="applies", text=text, source=GUIDE)


def _against(plan: Plan, other: Candidate) -> str:
    absent = "" if other.installed else ", not installed"
    if other.plan is None:
        return other.why_not if other.why_not.startswith(other.runtime) else f"{other.runtime}{absent}: {other.why_not}"
    speed = speed_of(other.plan)
    if other.plan.refusal is not None:
        return f"{other.runtime}{absent}: {other.plan.refusal.message}"
    figure = f" {about(speed)}" if speed is not None else ""
    ours = speed_of(plan)
    same = speed is not None and ours is not None and speed.expected == ours.expected
    return f"{other.runtime}{' the same' if same else figure}{absent}"


def _alternative(plan: Plan, other: Candidate) -> Alternative:
    theirs = other.plan
    assert theirs is not None  # noqa: S101 - the caller has left those out
    if not other.installed:
        why_not = "not installed"
    elif theirs.refusal is not None:
        why_not = theirs.refusal.message
    else:
        mine, speed = speed_of(plan), speed_of(theirs)
        why_not = "slower" if mine and speed and speed.expected < mine.expected else f"no faster than {plan.runtime}"
    return Alternative(
        runtime=other.runtime,
        placement=theirs.placement,
        gpus=theirs.layout.gpus,
        fits=theirs.refusal is None,
        short_bytes=0 if theirs.refusal is None else max(-sum(min(d.spare_bytes, 0) for d in theirs.devices), 1),
        tok_s=theirs.forecast.tok_s,
        total_tok_s=theirs.forecast.total_tok_s,
        why_not=why_not,
    )
