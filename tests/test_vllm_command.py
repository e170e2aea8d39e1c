"""vLLM's command lines, and whole plans with it."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from mgpu.adapter import Command, Endpoint
from mgpu.decide.choose import choose
from mgpu.decide.replicas import commands_at, replicas_of
from mgpu.errors import DoesNotFitError, RefusedError, RuntimeMissingError, UsageError
from mgpu.model import Model
from mgpu.plan import Layout, Plan, Shape
from mgpu.request import Request
from mgpu.rig import Gpu, Rig
from mgpu.units import GIB
from mgpu_adapters.registry import load_adapter, pick_adapter
from mgpu_adapters.vllm.adapter import Vllm
from mgpu_adapters.vllm.command import USUAL_SHARE, allot, stages_of
from mgpu_adapters.vllm.job import VllmJob
from mgpu_adapters.vllm.memory import Footprint, budget, outside_bytes
from mgpu_adapters.vllm.partition import even_partition, layer_partition, proportional, to_units
from planning import card, rig_named, rig_of
from vllm_models import dense, job_of

LLAMA = dense()
NEMO = dense(layers=40, n_embd=5120, n_vocab=131072)  # 12 B: no 24 GiB card holds it in 16 bits
HERE = Endpoint(host="127.0.0.1", port=8080)


def plan_of(model: Model, rig: Rig | str, *arguments: str, **asked: Any) -> tuple[Plan, VllmJob, Rig]:
    rig = rig_named(rig) if isinstance(rig, str) else rig
    job = job_of(model, *arguments, **asked)
    plan = choose(Request(runtime_args=arguments, **asked), rig, job)
    at = job.at_ctx(plan.ctx)
    return plan, at, rig


def command_of(model: Model, rig: Rig | str, *arguments: str, **asked: Any) -> Command:
    plan, job, rig = plan_of(model, rig, *arguments, **asked)
    assert plan.refusal is None
    return job.command(plan.layout, rig, HERE)


def option(command: Command, flag: str) -> str:
    return command.argv[command.argv.index(flag) + 1]


# Command lines.


def test_one_card() -> None:
    command = command_of(LLAMA, "3090")
    assert " ".join(command.argv) == (
        "vllm serve /models/m --host 127.0.0.1 --port 8080 --tensor-parallel-size 1 --pipeline-parallel-size 1 "
        "--max-model-len 8192 --max-num-seqs 1 --max-num-batched-tokens 2048 --kv-cache-dtype auto "
        "--gpu-memory-utilization 0.9200"
    )
    assert command.env == {"CUDA_DEVICE_ORDER": "PCI_BUS_ID", "CUDA_VISIBLE_DEVICES": "0"}
    assert (command.ready_url, command.endpoint) == ("http://127.0.0.1:8080/health", "http://127.0.0.1:8080/v1")


def test_two_equal_cards() -> None:
    command = command_of(NEMO, "2x3090", split="pipeline")
    assert option(command, "--pipeline-parallel-size") == "2"
    assert option(command, "--tensor-parallel-size") == "1"
    assert command.env["CUDA_VISIBLE_DEVICES"] == "0,1"
    assert command.env["VLLM_PP_LAYER_PARTITION"] == "20,20"
    assert command.devices == ("cuda:0", "cuda:1")


def ranks_on(rig: Rig, *arguments: str, n: int = 2, model: Model = NEMO, **asked: Any) -> Command:
    job = job_of(model, *arguments, **asked)
    shape = Shape(n_devices=n, mode="tensor")
    layout = Layout(gpus=tuple(range(n)), counts=(job.n_units,) * n, shape=shape)
    return job.command(layout, rig, HERE)


def test_tensor_ranks() -> None:
    command = ranks_on(rig_named("2x3090"), users=4)
    assert " ".join(command.argv) == (
        "vllm serve /models/m --host 127.0.0.1 --port 8080 --tensor-parallel-size 2 --pipeline-parallel-size 1 "
        "--max-model-len 8192 --max-num-seqs 4 --max-num-batched-tokens 2048 --kv-cache-dtype auto "
        "--gpu-memory-utilization 0.9200"
    )
    assert command.env == {"CUDA_DEVICE_ORDER": "PCI_BUS_ID", "CUDA_VISIBLE_DEVICES": "0,1"}
    assert command.devices == ("cuda:0", "cuda:1")


def test_the_worst_card_decides_the_share_of_all_ranks() -> None:
    full, crowded = card(0, 24, 936), replace(card(1, 24, 936), free_bytes=20 * GIB)
    command = ranks_on(rig_of(full, crowded))
    share = float(option(command, "--gpu-memory-utilization"))
    assert share * 24 * GIB + outside_bytes(crowded, 2) <= 20 * GIB
    assert share == pytest.approx(20 / 24, abs=0.04)


def test_a_number_of_ranks_given_by_hand_is_planned_with() -> None:
    job = job_of(NEMO, "-tp", "2")
    assert (job.pinned.mode, job.pinned.tensor_split, job.pinned.single) == ("tensor", None, False)
    command = ranks_on(rig_named("2x3090"), "-tp", "2")
    assert command.argv[-2:] == ("-tp", "2")
    assert "--tensor-parallel-size" not in command.argv
    assert "--tensor-parallel-size" in job.warnings[0]
    assert job_of(NEMO, "-tp", "1").pinned.mode == "pipeline"
    assert job_of(NEMO).pinned.mode is None


def test_ranks_that_do_not_divide_are_refused_before_loading() -> None:
    with pytest.raises(UsageError, match="32 attention heads are no multiple of 3"):
        ranks_on(rig_named("4x3090"), n=3)


def test_many_users_get_a_replica_on_each_card() -> None:
    plan, job, rig = plan_of(LLAMA, "2x3090", users=4)
    first, second = commands_at(replicas_of(plan, job, rig), (8080, 8081), host="127.0.0.1", api_key=None)
    assert " ".join(first.argv) == (
        "vllm serve /models/m --host 127.0.0.1 --port 8080 --tensor-parallel-size 1 --pipeline-parallel-size 1 "
        "--max-model-len 8192 --max-num-seqs 2 --max-num-batched-tokens 2048 --kv-cache-dtype auto "
        "--gpu-memory-utilization 0.9200"
    )
    assert (first.env["CUDA_VISIBLE_DEVICES"], second.env["CUDA_VISIBLE_DEVICES"]) == ("0", "1")
    assert second.argv[second.argv.index("--port") + 1] == "8081"


def test_vllm_is_given_time_to_load_what_is_large() -> None:
    large = dense(layers=80, n_embd=8192, n_ff=28672, heads=64)  # 70 B
    assert ranks_on(rig_of(*(card(n, 80, 2000) for n in range(4))), n=4, model=large).env[
        "VLLM_ENGINE_READY_TIMEOUT_S"
    ] == ("7200")
    assert "VLLM_ENGINE_READY_TIMEOUT_S" not in command_of(LLAMA, "3090").env


def test_mixed_cards_get_layers_by_their_room() -> None:
    command = command_of(NEMO, "3090+3060", users=2)
    layers = [int(part) for part in command.env["VLLM_PP_LAYER_PARTITION"].split(",")]
    assert sum(layers) == 40
    assert layers[0] > 1.5 * layers[1]


def test_old_cards_get_half_and_keys_stay_out_of_argv() -> None:
    rig = rig_of(card(0, 24, 672, compute_capability="7.5"))
    plan, job, _ = plan_of(LLAMA, rig)
    command = job.command(plan.layout, rig, replace(HERE, api_key="s3cret", host="0.0.0.0"))
    assert option(command, "--dtype") == "half"
    assert "s3cret" not in " ".join(command.argv)
    assert command.env["VLLM_API_KEY"] == "s3cret"
    assert command.ready_url == "http://127.0.0.1:8080/health"
    assert "--dtype" not in command_of(LLAMA, "3090").argv


def test_flags_after_the_dashes_replace_ours() -> None:
    command = command_of(LLAMA, "3090", "--max-model-len", "4k", "--max-num-seqs=3", "--seed", "7")
    assert command.argv[-5:] == ("--max-model-len", "4k", "--max-num-seqs=3", "--seed", "7")
    assert command.argv.count("--max-model-len") == 1
    assert "--max-num-seqs" not in command.argv
    assert job_of(LLAMA, "--max-num-seqs=3").users == 3


def test_flags_that_no_plan_follows_are_named() -> None:
    assert job_of(LLAMA, "--seed", "1").warnings == ()
    assert "--quantization" in job_of(LLAMA, "-q", "fp8").warnings[0]
    assert "--pipeline-parallel-size" in job_of(LLAMA, "-pp", "2").warnings[0]


UUIDS = ("GPU-11111111-2222-3333-4444-555555555555", "GPU-11111111-2222-3333-4444-666666666666")


@pytest.mark.parametrize(
    ("version", "uuids", "visible"),
    [
        ("0.24.0", UUIDS, ",".join(UUIDS)),
        ("0.23.1", UUIDS, "0,1"),
        ("0.1.dev20073+g8e685d198", UUIDS, ",".join(UUIDS)),
        ("0.32.0", (UUIDS[0], None), "0,1"),
        ("0.32.0", (UUIDS[0], "GPU-1111"), "0,1"),
    ],
)
def test_cards_are_named_as_the_version_takes_them(version: str, uuids: tuple[str | None, ...], visible: str) -> None:
    rig = rig_of(*(card(index, 24, 936, uuid=uuid) for index, uuid in enumerate(uuids)))
    adapter = Vllm()
    job = adapter.job(NEMO, Request(), replace(adapter.assumed(), version=version))
    plan = choose(Request(), rig, job)
    assert job.command(plan.layout, rig, HERE).env["CUDA_VISIBLE_DEVICES"] == visible


def test_amd_cards_have_their_own_variable() -> None:
    command = command_of(LLAMA, "7900xtx")
    assert command.env == {"HIP_VISIBLE_DEVICES": "0"}


# Shares of memory.


def layout_of(counts: tuple[int, ...]) -> Layout:
    return Layout(gpus=tuple(range(len(counts))), counts=counts, shape=Shape(n_devices=len(counts)))


def crowd(gpu: Gpu, taken_gib: float) -> Gpu:
    return replace(gpu, free_bytes=gpu.total_bytes - int(taken_gib * GIB))


@given(
    taken=st.tuples(st.floats(0, 6), st.floats(0, 6)),
    sizes=st.tuples(st.sampled_from([12.0, 16.0, 24.0]), st.sampled_from([12.0, 16.0, 24.0])),
    first=st.integers(1, 31),
)
def test_every_layout_that_fits_starts(taken: tuple[float, float], sizes: tuple[float, float], first: int) -> None:
    """Each card's budget is free at the start; and holds the stage, or vLLM is given the cache's bytes instead."""
    gpus = tuple(crowd(card(i, size, 900), gone) for i, (size, gone) in enumerate(zip(sizes, taken, strict=True)))
    need = Footprint(LLAMA, job_of(LLAMA).settings)
    stages = stages_of(layout_of((first, 33 - first)), rig_of(*gpus))
    if any(need.device(stage.span, Shape(n_devices=2), stage.gpu).total > stage.gpu.usable_bytes for stage in stages):
        return
    allotment = allot(need, stages)
    for stage in stages:
        assert budget(stage.gpu, allotment.share) <= stage.gpu.usable_bytes - outside_bytes(stage.gpu, 2)
        if allotment.kv_cache_memory_bytes is None:
            assert allotment.share >= need.share(stage.span, 2, stage.gpu).least
        else:
            assert allotment.kv_cache_memory_bytes >= need.kv_bytes(stage.span, 2, 2048)


def test_the_usual_share_is_left_only_for_a_reason() -> None:
    need = Footprint(LLAMA, job_of(LLAMA).settings)
    roomy = stages_of(layout_of((33,)), rig_of(card(0, 48, 900)))
    assert allot(need, roomy).share == USUAL_SHARE
    tight = stages_of(layout_of((33,)), rig_of(crowd(card(0, 24, 900), 4)))
    assert allot(need, tight).share < 20 / 24 * 10_000
    full = Footprint(LLAMA, job_of(LLAMA, ctx=57_000).settings)
    wanting = stages_of(layout_of((33,)), rig_of(card(0, 24, 900)))
    assert allot(full, wanting).share > USUAL_SHARE


def test_a_crowded_card_beside_a_full_one_needs_the_cache_in_bytes() -> None:
    rig = rig_of(card(0, 24, 900), crowd(card(1, 24, 900), 9))
    plan, job, _ = plan_of(NEMO, rig, users=2, gpus=("0", "1"))
    layout = replace(plan.layout, gpus=(0, 1), counts=(31, 10))
    command = job.command(layout, rig, HERE)
    assert int(option(command, "--kv-cache-memory-bytes")) > 31 * 2 * 8192 * 4096
    adapter = Vllm()
    old = adapter.job(NEMO, Request(users=2), replace(adapter.assumed(), version="0.10.1"))
    with pytest.raises(RuntimeMissingError, match="too old"):
        old.command(layout, rig, HERE)


def test_no_free_memory_is_said() -> None:
    rig = rig_of(crowd(card(0, 24, 900), 23.9))
    with pytest.raises(DoesNotFitError):
        job_of(LLAMA).command(layout_of((33,)), rig, HERE)


# Plans.


def test_the_largest_context_fits_and_one_step_more_does_not() -> None:
    plan, job, rig = plan_of(LLAMA, "3090", ctx="max")
    gpu = rig.gpus[0]
    assert plan.refusal is None
    assert 8192 < plan.ctx < 131072
    at = job.at_ctx(plan.ctx).device(range(33), Shape(n_devices=1), gpu)
    over = job.at_ctx(plan.ctx + job.ctx_step).device(range(33), Shape(n_devices=1), gpu)
    assert at.total <= gpu.usable_bytes < over.total


def test_users_share_the_largest_context() -> None:
    one, _, _ = plan_of(LLAMA, "3090", ctx="max")
    four, _, _ = plan_of(LLAMA, "3090", ctx="max", users=4)
    assert 0.8 * one.ctx < 4 * four.ctx <= one.ctx


def test_an_fp8_cache_holds_twice_the_context() -> None:
    plain, _, _ = plan_of(LLAMA, "3090", ctx="max")
    halved, job, _ = plan_of(LLAMA, "3090", "--kv-cache-dtype", "fp8", ctx="max")
    assert halved.ctx == pytest.approx(2 * plain.ctx, rel=0.01)
    assert job.kv_type == "fp8"


def test_the_fewest_cards_that_hold_it() -> None:
    assert plan_of(LLAMA, "2x3090")[0].layout.gpus == (0,)
    assert len(plan_of(NEMO, "4x3090")[0].layout.gpus) == 2


def test_nothing_is_left_to_the_cpu() -> None:
    plan, _, _ = plan_of(LLAMA, "3060", offload="allow")
    assert plan.refusal is not None
    assert plan.refusal.exit_code == DoesNotFitError.exit_code
    with pytest.raises(UsageError):
        plan_of(LLAMA, "cpu-only")


def test_a_number_of_stages_given_by_hand() -> None:
    command = command_of(LLAMA, "4x3090", "-pp", "3")
    assert command.env["VLLM_PP_LAYER_PARTITION"] == ",".join(map(str, even_partition(32, 3)))
    assert "--pipeline-parallel-size" not in command.argv
    with pytest.raises(UsageError, match="needs 3 GPUs"):
        command_of(LLAMA, "2x3090", "-pp", "3")


def test_a_split_that_the_architecture_has_not_is_refused() -> None:
    model = dense(metadata={"architectures": "Gemma3nForCausalLM"})
    plan, job, rig = plan_of(model, "2x3090", split="pipeline", force=True)
    with pytest.raises(RefusedError, match="no pipeline parallelism"):
        job.command(plan.layout, rig, HERE)


def test_cards_without_the_kernels_are_refused() -> None:
    with pytest.raises(RefusedError, match=r"has 6\.1"):
        command_of(LLAMA, rig_of(card(0, 24, 900, compute_capability="6.1")))


# Partitions.


@pytest.mark.parametrize(
    ("layers", "stages", "split"),
    [(32, 2, (16, 16)), (32, 3, (11, 11, 10)), (10, 4, (2, 3, 3, 2)), (11, 4, (3, 3, 3, 2)), (4, 1, (4,))],
)
def test_even_partitions_are_vllms(layers: int, stages: int, split: tuple[int, ...]) -> None:
    assert even_partition(layers, stages) == split


@given(st.lists(st.floats(0.01, 100), min_size=1, max_size=8), st.integers(8, 128))
def test_partitions_add_up(shares: list[float], layers: int) -> None:
    counts = proportional(shares, layers)
    assert sum(counts) == layers
    assert min(counts) >= 1
    assert layer_partition(to_units(counts)) == counts


@given(st.lists(st.integers(1, 9), min_size=2, max_size=6))
def test_every_stage_has_a_layer(units: list[int]) -> None:
    layers = layer_partition(units)
    assert sum(layers) == sum(units) - 1
    assert min(layers) >= 1 or sum(layers) < len(units)
    if units[-1] > 1:
        assert layers == (*units[:-1], units[-1] - 1)


def test_cards_without_a_share_get_nothing() -> None:
    assert proportional((1.0, 0.0, 3.0), 8) == (3, 0, 5)
    assert to_units((3, 5, 0)) == (3, 6, 0)


# The registry.


def test_auto_takes_vllm_for_safetensors_alone() -> None:
    assert pick_adapter(Request(), LLAMA).name == "vllm"
    assert pick_adapter(Request(), replace(LLAMA, format="gguf")).name == "llama.cpp"
    assert load_adapter("vllm").name == "vllm"
    with pytest.raises(RuntimeMissingError) as caught:
        pick_adapter(Request(runtime="vllm"), replace(LLAMA, format="gguf"))
    assert "0.24" in caught.value.hint
