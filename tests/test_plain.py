"""`PlainJob`: what adapters of other packages begin with."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headers import write_model
from mgpu.adapter import Installed
from mgpu.decide.choose import choose
from mgpu.errors import UsageError
from mgpu.plain import PlainJob
from mgpu.plan import Layout, Plan, Shape
from mgpu.request import Request
from planning import decide, read, rig_named

SMALL, LARGE, MOE = "Llama-3.1-8B-Instruct-Q4_K_M", "Llama-3.3-70B-Instruct-Q4_K_M", "Qwen3-30B-A3B-Q4_K_M"
INSTALLED = Installed(runtime="echo", executable="echo-server", origin="PATH", version="1.0", flags=frozenset())
JobOf = Callable[..., PlainJob]


@pytest.fixture(scope="module")
def job_of(tmp_path_factory: pytest.TempPathFactory) -> JobOf:
    folder = tmp_path_factory.mktemp("models")
    return lambda name, **asked: PlainJob(read(str(write_model(name, folder))), Request(**asked), INSTALLED)


def plan_of(job: PlainJob, where: str, **asked: Any) -> Plan:
    return choose(Request(**asked), rig_named(where), job)


@given(split=st.lists(st.floats(0.01, 100), min_size=1, max_size=8))
def test_every_unit_is_on_some_device_once(job_of: JobOf, split: list[float]) -> None:
    job = job_of(LARGE)
    counts = job.counts(tuple(split), 0)
    assert sum(counts) == job.n_units
    assert min(counts) >= 0
    shape = Shape(n_devices=len(counts))
    spans = [span for span in Layout(gpus=tuple(range(len(counts))), counts=counts, shape=shape).spans() if span]
    gpu = rig_named("3090").gpus[0]
    bytes_ = [job.device(span, shape, gpu) for span in spans]
    assert sum(each.weights for each in bytes_) == job.model.weights_bytes
    hyper = job.model.hyper
    assert sum(each.kv for each in bytes_) == hyper.n_layer * 8 * (128 + 128) * 2 * job.ctx


@given(ctx=st.integers(1, 131072), users=st.integers(1, 64))
def test_the_cache_grows_with_both(job_of: JobOf, ctx: int, users: int) -> None:
    job = job_of(SMALL)
    whole, shape, gpu = range(job.n_units), Shape(n_devices=1), rig_named("3090").gpus[0]
    other = job.at_ctx(ctx).at_users(users)
    assert (other.ctx, other.users, job.users) == (ctx, users, 1)
    assert other.device(whole, shape, gpu).kv * job.ctx == job.device(whole, shape, gpu).kv * ctx * users
    assert other.work.users == users


def test_is_placed_as_others_are(job_of: JobOf) -> None:
    assert plan_of(job_of(SMALL), "2x3090").placement == "single"
    plan = plan_of(job_of(LARGE), "2x3090")
    assert plan.placement == "pipeline"
    assert sum(plan.layout.counts) == 81
    assert plan_of(job_of(LARGE), "3060").refusal is not None
    assert plan_of(job_of(SMALL, users=4), "2x3090", users=4).placement == "replicas"


@pytest.mark.parametrize("name", [SMALL, LARGE, MOE])
def test_is_predicted_near_to_llamacpp(job_of: JobOf, tmp_path: Path, name: str) -> None:
    """The same bytes are read; of llama.cpp's kernels more is known."""
    ours, theirs = plan_of(job_of(name), "2x3090").tok_s, decide(write_model(name, tmp_path), "2x3090").tok_s
    assert ours is not None
    assert theirs is not None
    assert ours.expected == pytest.approx(theirs.expected, rel=0.25)


def test_knows_one_type_of_cache(job_of: JobOf) -> None:
    with pytest.raises(UsageError, match="q8_0"):
        job_of(SMALL, kv_type="q8_0")
    with pytest.raises(UsageError, match=r"echo keeps its cache as f16"):
        job_of(SMALL).at_kv_type("q4_0")
    assert job_of(SMALL).why_not_tensor(()) == "echo has no tensor ranks"
