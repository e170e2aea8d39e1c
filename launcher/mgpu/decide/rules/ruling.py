"""What a rule is given to judge, and the words rules share."""

from __future__ import annotations

from typing import Final

from msgspec import Struct

from mgpu.decide.case import Case
from mgpu.decide.options import Options, Sketch
from mgpu.decide.weigh import Weighed
from mgpu.plan import RuleVerdict, Speed
from mgpu.rig import Gpu, short_name

GUIDE: Final = "insiderllm.com/guides/multi-gpu-worth-it (2026-02-08)"
BENCH: Final = "XiongjieDai/GPU-Benchmarks@aa72e0e: 8B on 1/2/4x 3090 111.7/108.1/104.9 tok/s"

#: Below this, generation is not usable: the guide calls 3-5 tok/s painful and 1 tok/s unusable.
MIN_TOK_S: Final = 3.0


class Ruling(Struct, frozen=True, kw_only=True):
    """The case, what was chosen of it, and what else there was. `refused_by`: the rule that is against the plan."""

    case: Case
    chosen: Weighed
    options: Options
    offers: tuple[str, ...] = ()  # what would keep it all on the GPUs
    refused_by: str | None = None

    @property
    def is_split(self) -> bool:
        """Whether one model lies across several cards."""
        return len(self.chosen.gpus) > 1 and self.chosen.kind != "replicas"


def quiet(rule: str, text: str, source: str = GUIDE) -> RuleVerdict:
    """A rule that has nothing to say here, and why."""
    return RuleVerdict(id=rule, verdict="passes", text=text, source=source, quiet=True)


def label(gpu: Gpu) -> str:
    """`"GPU 0 (RTX 3090)"`."""
    return f"GPU {gpu.index} ({short_name(gpu.name)})"


def speed_text(speed: Speed | None) -> str:
    """`"(101-137 tok/s predicted)"`, to follow a noun."""
    return "(speed unknown)" if speed is None else f"({speed.words})"


def about(speed: Speed | None) -> str:
    """`"~108"`, with a decimal where it matters."""
    if speed is None:
        return "unknown"
    return f"~{speed.expected:.{speed.digits}f}"


def compared(chosen: Weighed | Sketch, other: Weighed | Sketch) -> str:
    """`": ~105 instead of ~112 tok/s predicted (-6%)"`: `chosen` in place of `other`; empty where unknown."""
    if chosen.speed is None or other.speed is None:
        return ""
    change = chosen.speed.expected / other.speed.expected - 1
    both = f"{about(chosen.speed)} instead of {about(other.speed)} tok/s {_how(chosen.speed, other.speed)}"
    return f": {both} ({change:+.0%})"


def _how(*speeds: Speed) -> str:
    return "measured" if all(speed.measured for speed in speeds) else "predicted"


def n_cards(count: int) -> str:
    return "1 card" if count == 1 else f"{count} cards"
