"""Which placements of a model are worth measuring on a rig. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from msgspec import Struct
from msgspec.structs import replace

from mgpu.adapter import Job
from mgpu.decide.case import paces_of
from mgpu.decide.place import by_room, fastest_first, on_each, on_one
from mgpu.decide.speed import forecast
from mgpu.decide.weigh import weigh
from mgpu.plan import Layout, Plan, Speed
from mgpu.rig import Gpu, Rig


class Trial(Struct, frozen=True, kw_only=True):
    """One placement to measure. `gpus` are the cards of its layout, in that order."""

    name: str  # "plan", "one card", "needless split" …
    layout: Layout
    gpus: tuple[Gpu, ...]
    needless: bool = False  # a split of what one card holds


def find_trials(plan: Plan, job: Job, rig: Rig, gpus: Sequence[Gpu], *, quick: bool = False) -> tuple[Trial, ...]:
    """The plan's placement first; then, most telling first, what else of `gpus` holds the model. Each layout once.

    Where one card holds it: the needless splits over the two fastest cards and over all, and each kind of card alone.
    Where none does: the same cards split as the runtime would by itself, and all cards. Each split as tensor ranks,
    too, where the runtime can. `quick`: the plan and one needless split.
    """
    chosen = Trial(name="plan", layout=plan.layout, gpus=_cards_of(plan.layout, rig))
    found = [chosen]
    if not (plan.layout.shape.host_layers or plan.layout.shape.host_experts):
        ordered = fastest_first(gpus, paces_of(job, gpus, rig))
        singles = [trial for trial in _singles(job, ordered) if _fits(trial, job, rig)]
        splits = list(_splits(job, ordered, chosen, needless=bool(singles)))
        ranks = [trial for split in (*splits, chosen) for trial in _ranks(job, split)]
        fitting = [trial for trial in (*splits, *ranks) if _fits(trial, job, rig)]
        found += [*fitting[:1], *singles, *fitting[1:]]
    if quick:
        needless = (trial for trial in found if trial.needless and trial.layout.shape.mode == "pipeline")
        found = [chosen, *list(needless)[:1]]
    return _distinct(found)


def predict(trial: Trial, job: Job, rig: Rig) -> Speed | None:
    """What is predicted for the trial with as many tokens in the cache as `job` has; never what was measured before."""
    return forecast(job, trial.layout, trial.gpus, replace(rig, measured=())).tok_s


def _singles(job: Job, ordered: Sequence[Gpu]) -> Iterator[Trial]:
    """Of cards of one kind, the first speaks for all."""
    kinds = set[tuple[object, ...]]()
    for gpu in ordered:
        kind = (gpu.name, gpu.total_bytes, gpu.bandwidth_bytes_per_s)
        if kind not in kinds:
            kinds.add(kind)
            yield Trial(name="one card", layout=on_one(job, gpu), gpus=(gpu,))


def _splits(job: Job, ordered: Sequence[Gpu], chosen: Trial, *, needless: bool) -> Iterator[Trial]:
    """In proportion to free memory, as llama.cpp splits by itself."""
    if needless:
        sets = [("needless split", ordered[:2]), ("needless split, all cards", ordered)]
    else:
        sets = [("runtime's own split", chosen.gpus), ("all cards", ordered)]
    for name, cards in sets:
        if len(cards) > 1:
            yield Trial(name=name, layout=by_room(job, cards), gpus=tuple(cards), needless=needless)


def _ranks(job: Job, split: Trial) -> Iterator[Trial]:
    if len(split.gpus) > 1 and job.why_not_tensor(split.gpus) is None:
        layout = on_each(job, split.gpus, "tensor")
        yield Trial(name="tensor", layout=layout, gpus=split.gpus, needless=split.needless)


def _fits(trial: Trial, job: Job, rig: Rig) -> bool:
    return min(trial.layout.counts) > 0 and weigh(job, trial.layout, trial.gpus, rig).fits


def _cards_of(layout: Layout, rig: Rig) -> tuple[Gpu, ...]:
    by_index = {gpu.index: gpu for gpu in rig.gpus}
    return tuple(by_index[index] for index in layout.gpus)


def _distinct(trials: Sequence[Trial]) -> tuple[Trial, ...]:
    """Each layout once; of tensor ranks, where the order says nothing, each set of cards."""
    seen = set[tuple[object, ...]]()
    kept: list[Trial] = []
    for trial in trials:
        layout = trial.layout
        cards = tuple(sorted(layout.gpus)) if layout.shape.mode == "tensor" else layout.gpus
        key = (cards, layout.counts, layout.shape.mode)
        if key not in seen:
            seen.add(key)
            kept.append(trial)
    return tuple(kept)
