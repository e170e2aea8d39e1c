"""vLLM's memory, against what vLLM has printed, and by its properties."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from mgpu.inspect.source import read_model
from mgpu.model import Model
from mgpu.plan import Shape
from mgpu.rig import Gpu
from mgpu.units import GIB, MIB
from mgpu_adapters.vllm.cache import plan_cache, token_bytes
from mgpu_adapters.vllm.config import derived_max_len, recurrent_state_bytes, windowed_layers
from mgpu_adapters.vllm.memory import SHARES, Footprint, budget, n_graphs, outside_bytes, smallest_total
from mgpu_adapters.vllm.settings import Settings
from mgpu_adapters.vllm.weights import Weights, padded_vocabulary
from planning import card
from safetensors_writer import decoder, gpt_oss, plain, read_config, stored, write_model
from vllm_models import dense, job_of

LLAMA = dense()
ALL = range(33)
ONE = Shape(n_devices=1)


def gpt_oss_20b(tmp_path: Path) -> Model:
    config = read_config("gpt-oss-20b")
    return read_model(str(write_model(tmp_path / "m", config, gpt_oss(config))))


def settings(*, max_model_len: int = 8192, max_num_seqs: int = 1) -> Settings:
    return Settings(max_model_len=max_model_len, max_num_seqs=max_num_seqs)


# Weights.


def test_llama_3_1_8b_takes_what_vllm_prints() -> None:
    """`Model loading took 14.9889 GiB` (vLLM PR #17122, one L40S)."""
    assert Weights(LLAMA).stage(ALL) / GIB == pytest.approx(14.9889, abs=0.0002)


def test_mistral_7b_takes_what_vllm_prints() -> None:
    """`Model loading took 13.5084 GiB`: 7.25 B parameters, a table for 32768 positions."""
    mistral = dense(n_vocab=32768, context=32768)
    assert Weights(mistral).stage(ALL) / GIB == pytest.approx(13.5084, abs=0.0005)


def test_gpt_oss_20b_takes_what_vllm_prints(tmp_path: Path) -> None:
    """`Model loading took 13.72 GiB`: its MXFP4 experts, 12.8 GiB with the rest in the files, are padded."""
    model = gpt_oss_20b(tmp_path)
    assert model.weights_bytes / GIB < 12.9
    assert Weights(model).stage(range(25)) / GIB == pytest.approx(13.72, rel=0.004)


def test_stages_add_up_and_the_ends_hold_embedding_and_head() -> None:
    weights = Weights(LLAMA)
    first, last = weights.stage(range(10)), weights.stage(range(10, 33))
    assert first + last == weights.stage(ALL) + weights.rotary
    assert weights.stage(range(10, 20)) < first - weights.embedding + 1
    assert last - weights.stage(range(10, 32)) == weights.head + weights.norm


def test_a_tied_embedding_is_held_twice_only_if_split() -> None:
    weights = Weights(dense(tied=True))
    assert weights.tied
    whole, halves = weights.stage(ALL), weights.stage(range(16)) + weights.stage(range(16, 33))
    assert halves - whole == weights.embedding + weights.rotary
    untied = Weights(LLAMA)
    assert untied.stage(range(16)) + untied.stage(range(16, 33)) - untied.stage(ALL) == untied.rotary


def test_multi_token_prediction_layers_are_not_loaded() -> None:
    more = replace(LLAMA, hyper=replace(LLAMA.hyper, n_layer_nextn=2))
    assert Footprint(more, settings()).n_units == 31
    assert Weights(more).stage(range(31)) < Weights(LLAMA).stage(ALL)


@pytest.mark.parametrize("tp", [2, 4, 8])
def test_ranks_hold_their_share_and_whole_norms(tp: int) -> None:
    whole, rank = Weights(LLAMA), Weights(LLAMA, tp)
    norms = 65 * 4096 * 2
    assert rank.stage(ALL) - rank.rotary - norms == (whole.stage(ALL) - whole.rotary - norms) // tp


def test_keys_and_values_are_replicated_beyond_the_kv_heads() -> None:
    narrow = dense(kv_heads=2)
    kv = sum(each.n_bytes for each in narrow.tensors if "k_proj" in each.name or "v_proj" in each.name)
    rest = Weights(narrow).stage(ALL) - kv
    norms = 65 * 4096 * 2 + Weights(narrow).rotary
    assert Weights(narrow, 8).stage(ALL) == (rest - norms) // 8 + kv // 2 + norms


@pytest.mark.parametrize(("rows", "padded"), [(128256, 128256), (32000, 32000), (32003, 32064), (1, 64)])
def test_vocabularies_are_padded_to_64(rows: int, padded: int) -> None:
    assert padded_vocabulary(rows) == padded


def test_experts_in_use_alone_are_read() -> None:
    expert = replace(LLAMA.tensors[5], kind="expert", n_bytes=8 * GIB)
    hyper = replace(LLAMA.hyper, n_expert=8, n_expert_used=2)
    mixture = Weights(replace(LLAMA, tensors=(*LLAMA.tensors, expert), hyper=hyper))
    assert sum(mixture.read_by_layer[1]) - sum(Weights(LLAMA).read_by_layer[1]) == 2 * GIB
    assert sum(mixture.read_by_layer[0]) == sum(Weights(LLAMA).read_by_layer[0])
    assert mixture.stage(ALL) - Weights(LLAMA).stage(ALL) == 8 * GIB


# The cache.


def test_llama_3_1_8b_caches_as_many_tokens_as_vllm_prints() -> None:
    """`Available KV cache memory: 56.21 GiB`, `GPU KV cache size: 460,496 tokens` (vLLM 0.32, one A100)."""
    cache = plan_cache(LLAMA, 2)
    tokens = int(56.21 * GIB) // cache.block_bytes(range(32)) * cache.block_size
    assert tokens == pytest.approx(460_496, abs=16 * 3)  # 56.21 is rounded by as much


def test_tokens_per_rank_as_measured() -> None:
    """Two layers, two KV heads of 32, bfloat16, two ranks: 256 bytes a token (vLLM 0.32.0, CPU build)."""
    small = dense(layers=2, kv_heads=2, head_dim=32, heads=4)
    assert 2 * token_bytes(small, 2, tp=2) == 256
    assert token_bytes(small, 2, tp=4) == token_bytes(small, 2, tp=2)  # one head at least


def test_gpt_oss_needs_what_vllm_prints(tmp_path: Path) -> None:
    """`max seq len (131072), (3.1 GiB KV cache is needed`: half of the layers keep 128 tokens and two batches."""
    cache = plan_cache(gpt_oss_20b(tmp_path), 2)
    blocks = cache.blocks_per_request(131072, 2 * 2048)
    assert blocks == 131072 // 16 + (127 + 4096 + 15) // 16 + 1
    assert blocks * cache.block_bytes(range(24)) / GIB == pytest.approx(3.1, abs=0.05)


@pytest.mark.parametrize(("element_bytes", "block_size"), [(2, 784), (1, 1568)])
def test_blocks_of_qwen3_5_are_as_long_as_vllm_prints(element_bytes: int, block_size: int) -> None:
    """`Setting attention block size to 784 tokens` (27B; LMCache PR #5079), 1568 with FP8 (vllm-windows-build #17)."""
    numbers = {
        "linear_num_value_heads": 48,
        "linear_num_key_heads": 16,
        "linear_key_head_dim": 128,
        "linear_value_head_dim": 128,
        "linear_conv_kernel_dim": 4,
    }
    model = dense(layers=64, kv_heads=(0, 0, 0, 4) * 16, head_dim=256, metadata=numbers)
    assert recurrent_state_bytes(model) == 3_207_168
    cache = plan_cache(model, element_bytes)
    assert cache.block_size == block_size
    assert [group.kind for group in cache.groups].count("recurrent") == 3
    assert cache.blocks_per_request(block_size * 5, 4096) == 5 + 3 * 2


def test_a_latent_is_cached_once_on_every_rank() -> None:
    model = dense(metadata={"kv_lora_rank": 512, "qk_rope_head_dim": 64})
    assert token_bytes(model, 2) == token_bytes(model, 2, tp=8) == 576 * 2
    assert plan_cache(model, 2).block_size == 64


def test_a_stage_caches_its_own_layers() -> None:
    cache = plan_cache(LLAMA, 2)
    parts = [range(10), range(10, 20), range(20, 32)]
    assert sum(cache.block_bytes(part) for part in parts) == cache.block_bytes(range(32))


def test_windows_follow_the_pattern() -> None:
    gemma = dense(layers=12, architecture="gemma3_text", metadata={"sliding_window": 1024})
    window, layers = windowed_layers(gemma)
    assert window == 1024
    assert layers == frozenset(range(12)) - {5, 11}
    assert windowed_layers(dense(metadata={"sliding_window": 4096}))[1] == frozenset()  # no pattern: not less
    off = dense(architecture="qwen2", metadata={"sliding_window": 4096, "use_sliding_window": False})
    assert windowed_layers(off) == (0, frozenset())
    qwen = {"sliding_window": 4096, "use_sliding_window": True, "max_window_layers": 30}
    assert windowed_layers(dense(metadata=qwen))[1] == {30, 31}


def test_contexts_longer_than_the_window_cost_the_full_layers_alone() -> None:
    gemma = dense(layers=12, architecture="gemma3_text", metadata={"sliding_window": 1024})
    cache, full = plan_cache(gemma, 2), plan_cache(dense(layers=12), 2)
    grown = cache.bytes_for(range(12), 1, 65536, 4096) - cache.bytes_for(range(12), 1, 32768, 4096)
    assert grown == (full.bytes_for(range(12), 1, 65536, 0) - full.bytes_for(range(12), 1, 32768, 0)) // 6


def test_rope_factors_lengthen_only_where_vllm_says_so() -> None:
    assert (
        derived_max_len(dense(context=4096, metadata={"rope_scaling.type": "linear", "rope_scaling.factor": 4}))
        == 16384
    )
    llama3 = {"rope_scaling.rope_type": "llama3", "rope_scaling.factor": 8.0}
    assert derived_max_len(dense(metadata=llama3)) == 131072
    gemma = {"rope_scaling.rope_type": "linear", "rope_scaling.factor": 8.0}
    assert derived_max_len(dense(architecture="gemma3", metadata=gemma)) == 131072


# The trial run.


def test_the_sampler_peaks_as_vllm_prints() -> None:
    """`1.44 GiB for peak activation`, CUDA graphs of 0.23 GiB with it, for 256 users (vLLM 0.32, one A100)."""
    gpu = card(0, 79.25, 2000, name="NVIDIA A100-SXM4-80GB")
    need = Footprint(LLAMA, settings(max_num_seqs=256))
    eager = Footprint(LLAMA, replace(need.settings, enforce_eager=True))
    few = Footprint(LLAMA, replace(eager.settings, max_num_seqs=1))
    assert need.working_bytes(ALL, gpu) / GIB >= 1.44 + 0.26  # with what it has beside weights and cache
    peak = eager.working_bytes(ALL, gpu) - few.working_bytes(ALL, gpu) + 2 * 2048 * (3 * 4096 + 3 * 14336)
    assert peak / GIB == pytest.approx(1.44 - 0.23, abs=0.02)


def test_large_cards_take_large_batches() -> None:
    need = Footprint(LLAMA, settings())
    assert need.batch_tokens(card(0, 24, 936)) == 2048
    assert need.batch_tokens(card(0, 80, 3000, name="NVIDIA H100")) == 8192
    assert need.batch_tokens(card(0, 80, 2000, name="NVIDIA A100")) == 2048


@pytest.mark.parametrize(("users", "graphs"), [(1, 2 + 1), (4, 4 + 3), (256, 51 + 35)])
def test_graphs_are_counted_as_vllm_captures_them(users: int, graphs: int) -> None:
    """`PIECEWISE=51 (largest=512), FULL=35 (largest=256)` (vLLM PR #39559)."""
    assert n_graphs(users) == graphs


# Shares of a card.


def crowded(gpu: Gpu, free: int) -> Gpu:
    return replace(gpu, free_bytes=free)


@given(free=st.integers(17 * GIB, 24 * GIB), ctx=st.integers(1, 131072), users=st.integers(1, 8))
def test_a_card_holds_it_if_and_only_if_some_share_does(free: int, ctx: int, users: int) -> None:
    gpu = crowded(card(0, 24, 936), free)
    need = Footprint(LLAMA, settings(max_model_len=ctx, max_num_seqs=users))
    share = need.share(ALL, 1, gpu)
    total = need.device(ALL, ONE, gpu).total
    assert (total <= gpu.usable_bytes) == (share.least <= share.most)
    assert total == outside_bytes(gpu, 1) + budget(gpu, share.least)


@given(free=st.integers(1 * GIB, 24 * GIB), reserve=st.integers(0, 4 * GIB))
def test_the_largest_share_starts_and_one_more_might_not(free: int, reserve: int) -> None:
    gpu = replace(crowded(card(0, 24, 936), free), reserve_bytes=reserve)
    most = Footprint(LLAMA, settings()).share(ALL, 1, gpu).most
    room = gpu.usable_bytes - outside_bytes(gpu, 1)
    assert most == 0 or budget(gpu, most) <= room
    assert budget(gpu, most + 1) > room


def test_the_least_share_covers_the_need_by_cudas_smaller_total() -> None:
    gpu = card(0, 24, 936)
    need = Footprint(LLAMA, settings())
    device, share = need.device(ALL, ONE, gpu), need.share(ALL, 1, gpu)
    wanted = device.weights + device.kv + device.compute
    assert smallest_total(gpu) * (share.least - 1) // SHARES < wanted <= smallest_total(gpu) * share.least // SHARES


def test_a_share_given_by_hand_is_what_is_taken() -> None:
    gpu = card(0, 24, 936)
    job = job_of(LLAMA, "--gpu-memory-utilization", "0.8")
    assert job.device(ALL, ONE, gpu).total == outside_bytes(gpu, 1) + budget(gpu, 8000)
    small = job_of(LLAMA, "--gpu-memory-utilization=0.5").device(ALL, ONE, gpu)
    assert small.total > gpu.usable_bytes  # half of the card does not hold the weights, though the card would


# Properties.


@given(ctx=st.integers(16, 131072), more=st.integers(0, 65536), users=st.integers(1, 16), others=st.integers(0, 16))
def test_more_context_and_more_users_never_need_less(ctx: int, more: int, users: int, others: int) -> None:
    gpu = card(0, 24, 936)
    less = Footprint(LLAMA, settings(max_model_len=ctx, max_num_seqs=users)).device(ALL, ONE, gpu)
    greater = Footprint(LLAMA, settings(max_model_len=ctx + more, max_num_seqs=users + others)).device(ALL, ONE, gpu)
    assert greater.kv >= less.kv
    assert greater.compute >= less.compute
    assert greater.total >= less.total


@given(start=st.integers(0, 32), layers=st.tuples(st.integers(1, 33), st.integers(1, 33)))
def test_more_layers_never_need_less(start: int, layers: tuple[int, int]) -> None:
    gpu, shape = card(0, 24, 936), Shape(n_devices=2)
    need = Footprint(LLAMA, settings())
    ends = sorted(min(start + count, 33) for count in layers)
    totals = [need.device(range(start, end), shape, gpu).total for end in ends if end > start]
    assert all(before <= after for before, after in pairwise(totals))


@given(ctx=st.integers(16, 131072), users=st.integers(1, 32))
def test_the_cache_holds_its_users_and_not_one_more(ctx: int, users: int) -> None:
    need = Footprint(LLAMA, settings(max_model_len=ctx, max_num_seqs=users))
    kv = need.kv_bytes(ALL, 1, 2048)
    assert need.users_in(kv, ALL, 1, 2048) == users
    assert need.users_in(kv - 1, ALL, 1, 2048) == users - 1


def test_an_output_left_alone_gets_a_layer() -> None:
    need, gpu = Footprint(LLAMA, settings()), card(0, 24, 936)
    shape = Shape(n_devices=2)
    assert need.device(range(32, 33), shape, gpu) == need.device(range(31, 33), shape, gpu)


def test_a_whole_model_from_its_files(tmp_path: Path) -> None:
    """What the reader of directories finds and what is made by hand agree."""
    config = read_config("Llama-3.1-8B")
    model = read_model(
        str(write_model(tmp_path / "m", config, stored(decoder(config), plain("BF16"), "BF16"), n_shards=4))
    )
    assert Weights(model).stage(ALL) == Weights(LLAMA).stage(ALL)
    assert plan_cache(model, 2) == plan_cache(LLAMA, 2)


def test_ranks_need_less_of_each_card() -> None:
    gpu = card(0, 24, 936)
    whole = Footprint(LLAMA, settings()).device(ALL, ONE, gpu)
    rank = job_of(LLAMA).device(ALL, Shape(n_devices=2, mode="tensor"), gpu)
    assert rank.weights < whole.weights * 0.51
    assert rank.kv * 2 == whole.kv
    assert rank.total < whole.total


@pytest.mark.parametrize("n", [2, 4, 8])
def test_a_rank_is_a_stage_of_its_own_share_and_nccl(n: int) -> None:
    gpu, shape = card(0, 24, 936), Shape(n_devices=n, mode="tensor")
    job = job_of(LLAMA, users=3)
    rank = job.device(ALL, shape, gpu)
    alone = Footprint(LLAMA, job.settings, tp=n).device(ALL, ONE, gpu)
    assert (rank.weights, rank.kv, rank.compute) == (alone.weights, alone.kv, alone.compute)
    assert rank.overhead > alone.overhead
    assert job.stored(ALL, shape, gpu) == rank.weights + rank.kv


def test_tensor_ranks_are_one_stage_to_the_scheduler(tmp_path: Path) -> None:
    """Windowed layers keep the tokens in flight: two batches for ranks, however many (max_concurrent_batches)."""
    need = Footprint(gpt_oss_20b(tmp_path), settings(max_model_len=131072))
    ranks = [need.ranked(n).kv_bytes(range(25), n, 2048) for n in (2, 4, 8)]
    assert ranks == [need.kv_bytes(range(25), 1, 2048) // n for n in (2, 4, 8)]


@given(ctx=st.integers(1, 100_000), users=st.integers(1, 64), n=st.sampled_from([2, 4, 8, 16]))
def test_more_ranks_never_need_more_of_a_card(ctx: int, users: int, n: int) -> None:
    gpu, need = card(0, 80, 2000), Footprint(LLAMA, settings(max_model_len=ctx, max_num_seqs=users))
    fewer, more = (need.ranked(k).stored(ALL, Shape(n_devices=k, mode="tensor"), gpu) for k in (n, 2 * n))
    assert more < fewer


# Several users.


def test_every_user_has_the_full_context() -> None:
    gpu = card(0, 80, 2000)
    one, nine = (job_of(LLAMA, users=n).device(ALL, ONE, gpu) for n in (1, 9))
    block = Footprint(LLAMA, settings()).device(ALL, ONE, gpu).kv - 8192 * 131072  # the one that is never used
    assert nine.kv - block == 9 * (one.kv - block)


def test_at_users_is_the_same_as_asking_for_as_many() -> None:
    gpu = card(0, 80, 2000)
    for users in (1, 2, 50, 300):
        other, asked = job_of(LLAMA, users=7).at_users(users), job_of(LLAMA, users=users)
        assert other.users == users
        assert other.ctx == asked.ctx
        assert other.device(ALL, ONE, gpu) == asked.device(ALL, ONE, gpu)


def test_a_number_of_users_given_by_hand_stays() -> None:
    job = job_of(LLAMA, "--max-num-seqs", "5", users=2)
    assert job.users == 5
    assert job.at_users(1) is job


def test_a_batch_has_a_token_for_every_user() -> None:
    need = Footprint(LLAMA, settings(max_num_seqs=3000, max_model_len=64))
    assert need.batch_tokens(card(0, 24, 936)) == 3000
    assert need.batch_tokens(card(0, 80, 2000)) == 8192


def test_one_block_of_the_pool_is_never_used() -> None:
    cache = plan_cache(LLAMA, 2)
    assert cache.bytes_for(range(32), 1, 16, 4096) == 2 * 16 * 131072
    assert cache.bytes_for(range(32), 3, 17, 4096) == (3 * 2 + 1) * 16 * 131072


def test_groups_of_nearly_equal_size_are_padded_and_not_halved() -> None:
    """10 full and 13 windowed layers: two groups of 13 places, not three of 10 (vLLM's rule of 1.5)."""
    numbers = {"sliding_window": 128, "use_sliding_window": True, "max_window_layers": 10}
    cache = plan_cache(dense(layers=23, metadata=numbers), 2)
    assert [(group.kind, group.counts[-1]) for group in cache.groups] == [("full", 10), ("window", 13)]
    assert cache.block_bytes(range(23)) == 13 * cache.page_bytes
    more = plan_cache(dense(layers=25, metadata=numbers), 2)
    assert [(group.kind, group.counts[-1]) for group in more.groups] == [("full", 10), ("window", 8), ("window", 7)]


@pytest.mark.parametrize(
    ("total", "cuda", "free"), [(24576, 24240, 24240), (23034, 22559, 22000), (24564, 24095, 23000)]
)
def test_cudas_total_is_no_less_than_assumed(total: int, cuda: int, free: int) -> None:
    """MiB by the driver and by CUDA: RTX 3090, L4, RTX 4090 as vLLM and llama.cpp print them."""
    gpu = replace(card(0, 1, 900), total_bytes=total * MIB, free_bytes=free * MIB)
    assert gpu.free_bytes <= smallest_total(gpu) <= cuda * MIB
    assert smallest_total(gpu) >= total * MIB * 0.975


@pytest.mark.parametrize(("free", "total"), [(78.84, 79.25), (78.66, 79.19)])
def test_the_context_is_no_less_than_vllm_prints(free: float, total: float) -> None:
    """`Free memory on device (78.84/79.25 GiB) on startup`: an A100, and an H100."""
    assert outside_bytes(card(0, total, 2000), 1) / GIB >= total - free
    assert outside_bytes(card(0, total, 2000), 2) > outside_bytes(card(0, total, 2000), 1)
