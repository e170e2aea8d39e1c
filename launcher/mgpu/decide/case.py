"""What is to be decided: the job, the cards considered, what was asked."""

from __future__ import annotations

from collections.abc import Sequence
from math import inf
from typing import Final, Literal

from msgspec import Struct
from msgspec.structs import replace

from mgpu.adapter import Job
from mgpu.decide import place
from mgpu.decide.speed import forecast
from mgpu.request import Request
from mgpu.rig import Gpu, Rig

#: From this context on, prompts are expected to be so long that reading them matters as much as answering.
LONG_CTX: Final = 65536


class Case(Struct, frozen=True, kw_only=True):
    """What is to be decided: a job, on these cards of this rig, as asked. `gpus` are those considered, in rig order."""

    request: Request
    rig: Rig
    job: Job
    gpus: tuple[Gpu, ...]
    paces: place.Paces
    offering: bool = True  # whether to look for what the cards would hold instead

    @property
    def ordered(self) -> tuple[Gpu, ...]:
        """The cards considered, fastest first."""
        return place.fastest_first(self.gpus, self.paces)

    @property
    def one_card_only(self) -> bool:
        return self.request.split == "none" or self.job.pinned.single

    @property
    def asked_mode(self) -> Literal["pipeline", "tensor"] | None:
        """The kind of split that was asked for, by option or by flags after `--`."""
        if self.job.pinned.mode == "tensor":
            return "tensor"
        split = self.request.split
        return split if split in {"pipeline", "tensor"} else None

    @property
    def wants_balance(self) -> bool:
        """Whether stages that take equally long are worth more than the fastest answer to one short question.

        Batches of many users, and of one long prompt, follow each other through a pipeline at its slowest stage's pace.
        """
        return self.job.users > 1 or self.job.ctx >= LONG_CTX

    def with_job(self, job: Job) -> Case:
        return replace(self, job=job)


def paces_of(job: Job, gpus: Sequence[Gpu], rig: Rig) -> dict[int, float]:
    """How long each card alone would take for one token of one user."""
    speeds = {gpu.index: forecast(job, place.on_one(job, gpu), (gpu,), rig).tok_s for gpu in gpus}
    return {index: inf if speed is None else 1 / speed.expected for index, speed in speeds.items()}
