"""What vLLM would refuse: each check fires on the flaw, and not beside it."""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from mgpu.errors import BadModelError, RefusedError, UsageError
from mgpu.model import Model
from mgpu.rig import Gpu
from mgpu_adapters.vllm.checks import (
    capability_of,
    check_cards,
    check_model,
    check_pipeline,
    check_tensor_parallel,
    has_pipeline,
    needs_half,
    why_not_tensor,
)
from mgpu_adapters.vllm.job import VllmJob
from planning import card
from vllm_models import dense, job_of

LLAMA = dense()


def of_method(method: str, **more: Any) -> Model:
    named = {f"quantization_config.{key}": value for key, value in ({"quant_method": method} | more).items()}
    return dense(metadata=named)


def sm(capability: str, index: int = 0, gib: float = 24, **more: Any) -> Gpu:
    return card(index, gib, 900, compute_capability=capability, **more)


# Formats and quantisations.


@pytest.mark.parametrize("method", ["awq", "gptq", "fp8", "compressed-tensors", "mxfp4", "modelopt"])
def test_methods_of_vllm_are_taken(method: str) -> None:
    check_model(of_method(method))


@pytest.mark.parametrize(
    ("model", "said"),
    [
        (replace(LLAMA, format="gguf"), "no GGUF"),
        (replace(LLAMA, format="exl3"), "no EXL3"),
        (of_method("bitsandbytes"), "bitsandbytes to a plugin"),
        (of_method("aqlm"), "no quantisation 'aqlm'"),
    ],
)
def test_what_vllm_does_not_load_is_said(model: Model, said: str) -> None:
    with pytest.raises(BadModelError, match=said) as caught:
        job_of(model)
    assert caught.value.hint


# Requests.


@pytest.mark.parametrize(
    ("ask", "said"),
    [
        (lambda: job_of(LLAMA, ctx=131073), "131073"),
        (lambda: job_of(LLAMA, "--max-model-len", "200k"), "200000"),
        (lambda: job_of(LLAMA, "--max-model-len", "auto"), "auto"),
        (lambda: job_of(LLAMA, kv_type="q8_0"), "'q8_0'"),
        (lambda: job_of(LLAMA, "--kv-cache-dtype", "nvfp4"), "'nvfp4'"),
        (lambda: job_of(LLAMA, "-tp", "2", "-pp", "2"), "--tensor-parallel-size 2"),
        (lambda: job_of(LLAMA, "-pp", "two"), "'two'"),
        (lambda: job_of(LLAMA, "-pp"), "lacks its value"),
        (lambda: job_of(LLAMA, "--gpu-memory-utilization", "92"), "'92'"),
        (lambda: job_of(LLAMA, "--gpu-memory-utilization", "nan"), "'nan'"),
        (lambda: job_of(LLAMA, "--port", "1"), "--port"),
        (lambda: job_of(LLAMA, "--api-key=x"), "--api-key"),
        (lambda: job_of(LLAMA, "--max-num-batched-tokens", "8", users=9), "less than the 9 users"),
        (lambda: job_of(dense(metadata={"architectures": "Gemma3nForCausalLM"}), "-pp", "2"), "splits no model"),
    ],
)
def test_requests_without_meaning_are_usage_errors(ask: Callable[[], object], said: str) -> None:
    with pytest.raises(UsageError) as caught:
        ask()
    assert said in caught.value.message
    assert caught.value.hint
    assert "\n" not in caught.value.message


def test_requests_at_the_limits_are_fine() -> None:
    assert job_of(LLAMA, ctx=131072).ctx == 131072
    assert job_of(LLAMA, "--max-model-len", "128K").ctx == 131072
    assert job_of(LLAMA, "--max-model-len=8k").ctx == 8000
    assert job_of(LLAMA, "--max-num-batched-tokens", "9", users=9).users == 9
    assert job_of(LLAMA, "--gpu-memory-util", "1.0").settings.utilization == 10_000
    assert job_of(LLAMA, "--kv_cache_dtype", "fp8").kv_type == "fp8"
    assert job_of(LLAMA, "-tp", "1", "-pp=1").pinned.single


@given(arguments=st.lists(st.sampled_from(["-pp", "--max-model-len", "--max-num-seqs", "2", "x", "-1", "=", "--seed"])))
def test_any_arguments_are_read_or_refused(arguments: list[str]) -> None:
    with suppress(UsageError):
        assert job_of(LLAMA, *arguments).users >= 1


# Cards.


@pytest.mark.parametrize(
    ("model", "least", "too_old"),
    [(LLAMA, "7.0", "6.1"), (of_method("awq"), "7.5", "7.0"), (of_method("mxfp4"), "8.0", "7.5"),
     (of_method("fp_quant"), "10.0", "9.0"), (of_method("gptq"), "7.0", "6.1")],
)  # fmt: skip
def test_cards_need_the_kernels(model: Model, least: str, too_old: str) -> None:
    check_cards(model, (sm(least), sm("12.0", 1)))
    with pytest.raises(RefusedError, match=f"need compute capability .*{too_old}") as caught:
        check_cards(model, (sm("12.0"), sm(too_old, 1)))
    assert "--gpus" in caught.value.hint


def test_cards_of_unknown_capability_are_not_refused() -> None:
    check_cards(of_method("fp_quant"), (card(0, 24, 936),))


def test_vendors_that_vllm_does_not_drive_are_refused() -> None:
    with pytest.raises(RefusedError, match="neither"):
        check_cards(LLAMA, (replace(card(0, 24, 936), vendor="apple"),))
    with pytest.raises(RefusedError, match="vendors"):
        check_cards(LLAMA, (card(0, 24, 936), replace(card(1, 24, 936), vendor="amd")))
    check_cards(LLAMA, (replace(card(0, 24, 936), vendor="amd"),))


def test_bfloat16_becomes_half_on_older_cards_only() -> None:
    assert needs_half(LLAMA, (sm("8.6"), sm("7.5", 1)))
    assert not needs_half(LLAMA, (sm("8.0"),))
    assert not needs_half(dense(metadata={"torch_dtype": "float16"}), (sm("7.5"),))
    assert capability_of(sm("12.0")) == 120


# Splits.


@pytest.mark.parametrize(
    "architecture", ["Gemma3nForCausalLM", "DeepseekV32ForCausalLM", "WhisperForConditionalGeneration"]
)
def test_architectures_without_a_pipeline(architecture: str) -> None:
    model = dense(metadata={"architectures": architecture})
    assert not has_pipeline(model)
    assert job_of(model).pinned.single
    with pytest.raises(RefusedError, match=architecture):
        check_pipeline(model, 2)
    check_pipeline(model, 1)


def test_architectures_with_a_pipeline() -> None:
    assert has_pipeline(LLAMA)
    assert not job_of(LLAMA).pinned.single
    check_pipeline(LLAMA, 32)
    with pytest.raises(RefusedError, match="33 stages"):
        check_pipeline(LLAMA, 33)


@pytest.mark.parametrize("tp", [2, 4, 8, 16, 32])
def test_llama_cuts_into_powers_of_two(tp: int) -> None:
    check_tensor_parallel(LLAMA, tp)


@pytest.mark.parametrize(
    ("model", "tp", "said"),
    [
        (LLAMA, 3, "32 attention heads are no multiple of 3"),
        (dense(heads=48, kv_heads=8), 3, "8 key-value heads"),
        (dense(heads=40, kv_heads=10), 4, "10 key-value heads"),
        (dense(n_ff=11001, heads=32), 2, "feed-forward width of 11001"),
        (dense(heads=42, kv_heads=7, n_ff=7 * 256, n_vocab=128256), 7, "a vocabulary of 128256"),
        (of_method("awq", group_size=1024), 8, "groups of 1024"),
        (of_method("fp8", weight_block_size=(128, 128)), 32, "groups of 128"),
        (dense(metadata={"linear_num_key_heads": 16, "linear_num_value_heads": 32}), 32, "16 heads of its recurrent"),
        (dense(metadata={"mamba_num_heads": 128, "n_groups": 8}), 16, "8 groups of its recurrent"),
    ],
)
def test_what_does_not_divide_is_said(model: Model, tp: int, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        check_tensor_parallel(model, tp)


def test_the_numbers_that_would_do_are_named() -> None:
    with pytest.raises(UsageError) as caught:
        check_tensor_parallel(LLAMA, 3)
    assert caught.value.hint == "this model takes 2, 4, 8, 16 tensor ranks"


def test_groups_that_stay_whole_are_fine() -> None:
    check_tensor_parallel(of_method("awq", group_size=128), 8)
    check_tensor_parallel(of_method("gptq", group_size=-1), 32)
    check_tensor_parallel(dense(metadata={"kv_lora_rank": 512}, kv_heads=6), 4)  # a latent is not cut by heads


def test_recurrent_layers_of_one_group_are_cut_by_heads_alone() -> None:
    check_tensor_parallel(dense(metadata={"mamba_num_heads": 128, "n_groups": 1}), 16)


PAIR = (sm("8.6"), sm("8.6", 1))


def test_alike_cards_can_be_ranks_whatever_their_memory() -> None:
    assert job_of(LLAMA).why_not_tensor(PAIR) is None
    assert job_of(LLAMA).why_not_tensor((sm("8.6"), sm("8.6", 1, gib=12))) is None  # a rule's business, and `--force`'s


@pytest.mark.parametrize(
    ("job", "gpus", "said"),
    [
        (job_of(LLAMA), PAIR[:1], "two cards, not 1"),
        (job_of(LLAMA), (*PAIR, sm("8.6", 2)), "32 attention heads are no multiple of 3"),
        (job_of(LLAMA), (sm("8.6"), sm("8.9", 1)), r"8\.6, 8\.9"),
        (job_of(LLAMA), (sm("6.1"), sm("6.1", 1)), r"compute capability 7\.0"),
        (job_of(LLAMA, "-tp", "4"), PAIR, "--tensor-parallel-size 4 after `--`, and 2 cards"),
        (job_of(LLAMA, "-pp", "2"), PAIR, "--pipeline-parallel-size 2"),
        (job_of(of_method("awq", group_size=1024)), tuple(sm("8.6", i) for i in range(8)), "groups of 1024"),
    ],
)
def test_what_keeps_vllm_from_ranks_is_said(job: VllmJob, gpus: tuple[Gpu, ...], said: str) -> None:
    reason = job.why_not_tensor(gpus)
    assert reason is not None
    assert re.search(said, reason)


def test_the_reason_is_what_building_the_command_would_say() -> None:
    for n in range(2, 17):
        reason = why_not_tensor(LLAMA, job_of(LLAMA).settings, tuple(sm("8.6", i) for i in range(n)))
        refused = None
        try:
            check_tensor_parallel(LLAMA, n)
        except UsageError as error:
            refused = error.message
        assert (reason is None) == (refused is None)
        assert refused is None or str(reason) in refused
