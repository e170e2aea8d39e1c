"""vLLM built for the CPU: stages that take equally long, memory of all workers, the command, and what it refuses."""

from __future__ import annotations

from itertools import accumulate, combinations, pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from mgpu.adapter import Command, Endpoint
from mgpu.decide.choose import choose
from mgpu.errors import MgpuError, RefusedError, RuntimeMissingError, UsageError
from mgpu.model import Model
from mgpu.plan import Layout, Shape
from mgpu.request import Request
from mgpu.rig import Rig
from mgpu.units import GIB, MIB
from mgpu_adapters.vllm.adapter import Vllm
from mgpu_adapters.vllm.cpu import balanced
from mgpu_adapters.vllm.job import VllmJob
from mgpu_adapters.vllm.log import read_line
from planning import rig_named
from vllm_models import dense

SMALL = dense(layers=16, n_embd=2048, n_ff=8192, heads=32, head_dim=64, context=8192)  # Llama 3.2 1B, untied
RIG = replace(rig_named("cpu-only"), cpu_cores=8)
HERE = Endpoint(host="127.0.0.1", port=8080)
ON_HOST = Layout(gpus=(), counts=(), shape=Shape(n_devices=0, host_layers=17))


def job_of(*arguments: str, version: str = "0.32.0+cpu", model: Model = SMALL, **asked: Any) -> VllmJob:
    adapter = Vllm()
    installed = replace(adapter.assumed(), version=version)
    job = adapter.job(model, Request(runtime_args=arguments, **asked), installed)
    assert isinstance(job, VllmJob)
    return job


def command_of(*arguments: str, rig: Rig = RIG, **more: Any) -> Command:
    return job_of(*arguments, **more).command(ON_HOST, rig, HERE)


def cost(costs: list[float], counts: tuple[int, ...]) -> float:
    """The sum of squares over the stages; the output is with the last."""
    ends = [*accumulate(counts, initial=0)]
    stages = [sum(costs[start:stop]) for start, stop in pairwise(ends)]
    stages[-1] += costs[-1]
    return sum(stage * stage for stage in stages)


@given(st.lists(st.floats(1, 100), min_size=2, max_size=9), st.integers(1, 4))
def test_no_other_stages_are_more_even(costs: list[float], n_stages: int) -> None:
    n_layers = len(costs) - 1
    n_stages = min(n_stages, n_layers)
    found = balanced(costs, n_stages)
    assert sum(found) == n_layers
    assert min(found) >= 1
    every = [
        tuple(stop - start for start, stop in pairwise((0, *cuts, n_layers)))
        for cuts in combinations(range(1, n_layers), n_stages - 1)
    ]
    assert cost(costs, found) == pytest.approx(min(cost(costs, counts) for counts in every))


def test_the_output_is_worth_layers() -> None:
    """The head of a 1B model reads as much as four of its layers."""
    assert command_of("-pp", "2").env["VLLM_PP_LAYER_PARTITION"] == "10,6"


def test_one_worker() -> None:
    plan = choose(Request(offload="allow"), RIG, job_of())
    assert (plan.placement, plan.refusal) == ("cpu", None)
    assert " ".join(command_of().argv) == (
        "vllm serve /models/m --host 127.0.0.1 --port 8080 --tensor-parallel-size 1 --pipeline-parallel-size 1 "
        "--max-model-len 8192 --max-num-seqs 1 --max-num-batched-tokens 2048 --kv-cache-dtype auto "
        "--kv-cache-memory-bytes 272629760"  # 64 blocks of 128 tokens, and the null block
    )
    assert command_of().env == {"VLLM_TARGET_DEVICE": "cpu"}
    assert job_of().warnings == ()


def test_ranks_share_the_processor() -> None:
    command = command_of("-tp", "2", users=3)
    assert command.env == {
        "VLLM_TARGET_DEVICE": "cpu",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "OMP_NUM_THREADS": "4",
    }
    assert "--tensor-parallel-size" not in command.argv
    assert command.argv[-2:] == ("-tp", "2")
    assert "OMP_NUM_THREADS" not in command_of("-tp", "2", rig=replace(RIG, cpu_cores=None)).env
    assert "tensor ranks share the CPU" in job_of("-tp", "2").warnings[0]
    assert "10 + 6 layers" in job_of("-pp", "2").warnings[0]


def test_memory_is_of_all_workers() -> None:
    one, ranks, stages = (job_of(*words).host(ON_HOST.shape, ()) for words in ((), ("-tp", "2"), ("-pp", "2")))
    assert one.weights == pytest.approx(SMALL.weights_bytes, rel=0.001)
    assert ranks.weights == pytest.approx(one.weights, rel=0.001)
    assert stages.weights == pytest.approx(one.weights, rel=0.001)
    assert ranks.kv == pytest.approx(one.kv, rel=0.001)
    assert stages.kv == pytest.approx(one.kv * 2 * 10 / 16, rel=0.001)  # both are told the larger stage's
    assert one.compute < ranks.compute == stages.compute
    assert 1 * GIB < one.compute < 3 * GIB


def test_older_versions_are_told_whole_gib() -> None:
    command = command_of(version="0.20.0+cpu")
    assert command.env["VLLM_CPU_KVCACHE_SPACE"] == "1"
    assert "--kv-cache-memory-bytes" not in command.argv
    assert "VLLM_CPU_KVCACHE_SPACE" in command_of().scrub


def test_what_was_said_of_memory_by_hand_stays() -> None:
    assert "--kv-cache-memory-bytes" not in command_of("--gpu-memory-utilization", "0.1").argv
    assert command_of("--kv-cache-memory-bytes", "100M").argv.count("--kv-cache-memory-bytes") == 1


@pytest.mark.parametrize(
    ("arguments", "model", "kind", "text"),
    [
        (("-tp", "3"), SMALL, UsageError, "32 attention heads are no multiple of 3"),
        (("-pp", "17"), SMALL, RefusedError, "17 stages are more than the model's 16 layers"),
        (("-pp", "2", "--enforce-eager"), SMALL, UsageError, "--enforce-eager"),
        (("-tp", "2", "-pp", "2"), SMALL, UsageError, "together"),
        ((), dense(layers=4, head_dim=16), UsageError, "no heads of 16"),
    ],
)
def test_what_it_would_refuse_after_loading_is_refused_before(
    arguments: tuple[str, ...], model: Model, kind: type[MgpuError], text: str
) -> None:
    with pytest.raises(kind, match=text) as caught:
        command_of(*arguments, model=model)
    assert caught.value.hint


def test_cards_need_another_build() -> None:
    rig = rig_named("3090")
    plan = choose(Request(), rig, job_of())
    with pytest.raises(RuntimeMissingError, match="built for the CPU") as caught:
        job_of().command(plan.layout, rig, HERE)
    assert "uv tool install vllm" in caught.value.hint


@pytest.mark.parametrize(
    ("arguments", "good", "bad"),
    [
        ((), "vllm-0.32.0-b63883ee", "vllm-0.32.0-tp2-b63883ee"),
        (("-tp", "2"), "vllm-0.32.0-tp2-e7592f3b", "vllm-0.32.0-e7592f3b"),
        (("-pp", "2"), "vllm-0.32.0-pp2-ep-e7592f3b", "vllm-0.32.0-pp4-e7592f3b"),
        (("-tp", "2", "-dp", "2"), "vllm-0.1.dev2+g8e68-tp2-dp2-nohash", "vllm-0.32.0-dp2-e7592f3b"),
    ],
)
def test_fingerprints(arguments: tuple[str, ...], good: str, bad: str) -> None:
    import re

    pattern = command_of(*arguments).fingerprint
    assert re.search(pattern, good)
    assert not re.search(pattern, bad)


def test_a_fingerprint_of_the_persons_own_says_nothing() -> None:
    assert command_of("--fingerprint-mode", "hash").fingerprint == ""


MEETING = (
    "(Worker pid=16506) INFO 11-23 18:57:59 [parallel_state.py:1906] world_size=2 rank=1 local_rank=1 "
    "distributed_init_method=file:///tmp/vllm_dist_a3f26d08b4124231b9e15a70b1447115 backend=gloo"
)


def test_where_workers_meet_is_read() -> None:
    from mgpu.adapter import Left

    name = "vllm_dist_a3f26d08b4124231b9e15a70b1447115"
    assert read_line(MEETING) == Left(paths=(f"/tmp/{name}", f"/dev/shm/{name}*"))


@pytest.mark.parametrize(
    "line",
    [
        MEETING.replace("(Worker pid=16506) ", ""),
        MEETING.replace("file:///tmp/vllm_dist_a3f26d08b4124231b9e15a70b1447115", "file:///home/me/thesis.tex"),
        MEETING.replace("file:///tmp/vllm_dist_", "file:///tmp/*/vllm_dist_"),
        MEETING.replace("7115 ", "7115* "),
        "(APIServer pid=1) INFO Received request: prompt: '" + MEETING.partition(") ")[2],
    ],
)
def test_nothing_else_is_taken_for_a_leftover(line: str) -> None:
    assert read_line(line) is None


def test_a_gib_is_not_taken_for_less() -> None:
    assert command_of(version="0.20.0+cpu", users=64).env["VLLM_CPU_KVCACHE_SPACE"] == str(
        -(-64 * 256 * MIB // GIB) + 1
    )
