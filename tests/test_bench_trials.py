"""What `mgpu bench` measures: every placement that tells something, once, the plan's first."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mgpu.adapter import Job
from mgpu.bench.trials import Trial, find_trials, predict
from mgpu.decide.choose import choose
from mgpu.decide.consider import consider
from mgpu.decide.weigh import weigh
from mgpu.request import Request
from mgpu.rig import Measured, Rig
from mgpu_adapters.llamacpp.adapter import LlamaCpp
from planning import card, read, rig_named, rig_of

Header = Callable[[str], Path]

SMALL = "Llama-3.1-8B-Instruct-Q4_K_M"
LARGE = "Llama-3.3-70B-Instruct-Q4_K_M"


class OneByOne:
    """A real job whose runtime has no tensor mode: what is left does not depend on what llama.cpp can do by now."""

    def __init__(self, job: Job) -> None:
        self._job = job

    def __getattr__(self, name: str) -> Any:
        return getattr(self._job, name)

    def why_not_tensor(self, gpus: Any) -> str | None:
        return "this one has no such mode"


def job_of(model: Path, request: Request, *, tensor: bool = False) -> Any:
    adapter = LlamaCpp()
    job = adapter.job(read(str(model)), request, adapter.assumed())
    return job if tensor else OneByOne(job)


def trials_of(model: Path, rig: Rig | str, *, quick: bool = False, tensor: bool = False, **asked: Any) -> list[Trial]:
    request = Request(**asked)
    machine = rig_named(rig) if isinstance(rig, str) else rig
    job = job_of(model, request, tensor=tensor)
    plan = choose(request, machine, job)
    return list(find_trials(plan, job, machine, consider(request, machine), quick=quick))


def said(trials: list[Trial]) -> list[tuple[str, tuple[int, ...]]]:
    return [(trial.name, trial.layout.gpus) for trial in trials]


@pytest.mark.parametrize(
    ("rig", "expected"),
    [
        pytest.param("3090", [("plan", (0,))], id="one card"),
        pytest.param("2x3090", [("plan", (0,)), ("needless split", (0, 1))], id="two alike"),
        pytest.param("3090+3060", [("plan", (0,)), ("needless split", (0, 1)), ("one card", (1,))], id="two kinds"),
        pytest.param(
            "4x3060",
            [("plan", (0,)), ("needless split", (0, 1)), ("needless split, all cards", (0, 1, 2, 3))],
            id="four alike",
        ),
    ],
)
def test_what_one_card_holds(header: Header, rig: str, expected: list[tuple[str, tuple[int, ...]]]) -> None:
    assert said(trials_of(header(SMALL), rig)) == expected


def test_quick_is_the_plan_and_what_a_split_would_cost(header: Header) -> None:
    assert said(trials_of(header(SMALL), "4x3090", quick=True)) == [("plan", (0,)), ("needless split", (0, 1))]
    assert said(trials_of(header(LARGE), "4x3090", quick=True)) == said(trials_of(header(LARGE), "4x3090"))[:1]


def test_what_no_card_holds_is_split_in_other_ways(header: Header) -> None:
    trials = trials_of(header(LARGE), "4x3090")
    assert trials[0].name == "plan"
    assert len(trials[0].layout.gpus) == 2
    assert ("all cards", (0, 1, 2, 3)) in said(trials)
    assert not any(trial.needless for trial in trials)


def test_the_runtimes_own_split_of_unequal_cards_is_another(header: Header) -> None:
    """Filled first, the fast card takes more than its share of the memory."""
    rig = rig_of(card(0, 30, 2000), card(1, 30, 300))
    plan, own = trials_of(header(LARGE), rig)
    assert own.name == "runtime's own split"
    assert own.layout.counts[0] < plan.layout.counts[0]


def test_what_needs_the_cpu_is_measured_as_planned_alone(header: Header) -> None:
    assert said(trials_of(header(LARGE), "2x3060", offload="allow"))[0][0] == "plan"
    assert len(trials_of(header(LARGE), "2x3060", offload="allow")) == 1
    assert said(trials_of(header(SMALL), "cpu-only", offload="allow")) == [("plan", ())]


def test_only_cards_that_were_asked_for(header: Header) -> None:
    trials = trials_of(header(SMALL), "4x3090", gpus=("2", "3"))
    assert {gpu for trial in trials for gpu in trial.layout.gpus} == {2, 3}


@pytest.mark.parametrize("model", [SMALL, LARGE])
def test_tensor_ranks_wherever_the_runtime_can(header: Header, model: str) -> None:
    class Able(OneByOne):
        def why_not_tensor(self, gpus: Any) -> str | None:
            return None if len(gpus) > 1 else "one card"

    request, rig = Request(), rig_named("2x3090")
    one_by_one = job_of(header(model), request)
    job: Any = Able(one_by_one)
    trials = find_trials(choose(request, rig, one_by_one), job, rig, rig.gpus)
    ranks = [trial for trial in trials if trial.layout.shape.mode == "tensor"]
    assert len(ranks) == 1
    assert sorted(ranks[0].layout.gpus) == [0, 1]
    assert ranks[0].layout.counts == (job.n_units, job.n_units)
    assert ranks[0].needless is (model == SMALL)


cards = st.lists(st.tuples(st.integers(6, 80), st.integers(200, 2000)), min_size=1, max_size=5)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=30)
@given(cards=cards, model=st.sampled_from([SMALL, "Qwen2.5-32B-Instruct-Q4_K_M"]), quick=st.booleans())
def test_each_layout_once_and_all_of_them_fit(
    header: Header, cards: list[tuple[int, int]], model: str, quick: bool
) -> None:
    rig = rig_of(*(card(index, gib, gbs) for index, (gib, gbs) in enumerate(cards)))
    request = Request(offload="allow")
    job = job_of(header(model), request)
    plan = choose(request, rig, job)
    trials = find_trials(plan, job, rig, rig.gpus, quick=quick)
    assert trials[0].layout == plan.layout
    assert len(trials) <= (2 if quick else len(cards) + 3)
    keys = [(trial.layout.gpus, trial.layout.counts) for trial in trials]
    assert len(set(keys)) == len(keys)
    for trial in trials:
        assert tuple(gpu.index for gpu in trial.gpus) == trial.layout.gpus
        assert trial.layout.shape.host_layers + sum(trial.layout.counts) == job.n_units
    for trial in trials[1:]:
        assert weigh(job, trial.layout, trial.gpus, rig).fits
        assert min(trial.layout.counts) > 0
        assert trial.needless == (len(trial.gpus) > 1 and any(len(other.gpus) == 1 for other in trials))


class TestPredict:
    def test_deeper_is_no_faster(self, header: Header) -> None:
        rig = rig_named("3090")
        (trial,) = trials_of(header(SMALL), rig)
        shallow, deep = (predict(trial, job_of(header(SMALL), Request(ctx=ctx)), rig) for ctx in (512, 8192))
        assert shallow is not None
        assert deep is not None
        assert shallow.expected > deep.expected

    def test_never_what_was_measured_before(self, header: Header) -> None:
        request, rig = Request(), rig_named("3090")
        job = job_of(header(SMALL), request)
        (trial,) = trials_of(header(SMALL), rig)
        model = read(str(header(SMALL)))
        measured = Measured(
            model=model.name,
            architecture=model.architecture,
            quantization=model.quantization,
            weights_bytes=model.weights_bytes,
            runtime="llama.cpp",
            version="b11434",
            mode="pipeline",
            gpus=trial.layout.gpus,
            counts=trial.layout.counts,
            depth=512,
            tok_s=1.5,
            date="2026-11-23",
        )
        known = msgspec.structs.replace(rig, measured=(measured,))
        assert predict(trial, job, known) == predict(trial, job, rig)
