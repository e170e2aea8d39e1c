"""ExLlamaV2's and V3's memory by the sources' arithmetic; `gpu_split` lists as the loaders' own rules read them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Final

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from mgpu.errors import BadModelError, DoesNotFitError, UsageError
from mgpu.model import Format, Hyperparameters, Model, Tensor, TensorClass
from mgpu.units import GIB, MIB
from mgpu_adapters.exllama import split
from mgpu_adapters.exllama.memory import (
    CUDA_CONTEXT,
    V3_MARGIN,
    FootprintV2,
    FootprintV3,
    V2Cache,
    V2Settings,
    V3Settings,
    pages,
)
from mgpu_adapters.exllama.modules import host_bytes, modules, torch_slack

LLAMA_8B: Final[dict[str, Any]] = {
    "n_layer": 32,
    "hidden": 4096,
    "n_head": 32,
    "n_head_kv": 8,
    "ffn": 14336,
    "vocab": 128256,
}
LLAMA_70B: Final[dict[str, Any]] = {
    "n_layer": 80,
    "hidden": 8192,
    "n_head": 64,
    "n_head_kv": 8,
    "ffn": 28672,
    "vocab": 128256,
}


def _exl2(name: str, n_in: int, n_out: int, bits: float) -> Iterator[tuple[str, tuple[int, ...], str, int]]:
    """The tensors of one linear layer (exllamav2/conversion/compile.py), in groups of 128 rows."""
    rows = int(n_in * bits / 32)
    yield f"{name}.q_weight", (rows, n_out), "I32", 4 * rows * n_out
    yield f"{name}.q_invperm", (n_in,), "I32", 4 * n_in
    yield f"{name}.q_scale", (n_in // 128, n_out // 8), "I32", n_in // 128 * n_out // 2
    yield f"{name}.q_scale_max", (n_in // 128,), "F16", n_in // 64
    yield f"{name}.q_groups", (n_in // 64,), "I16", n_in // 32


def _exl3(name: str, n_in: int, n_out: int, bits: float) -> Iterator[tuple[str, tuple[int, ...], str, int]]:
    """As exllamav3/modules/quant/exl3.py reads it."""
    yield f"{name}.trellis", (n_in // 16, n_out // 16, int(16 * bits)), "I16", int(n_in * n_out * bits / 8)
    yield f"{name}.suh", (n_in,), "F16", 2 * n_in
    yield f"{name}.svh", (n_out,), "F16", 2 * n_out


def exl(
    format_: Format,
    *,
    n_layer: int,
    hidden: int,
    n_head: int,
    n_head_kv: int,
    ffn: int,
    vocab: int,
    bits: float = 4,
    head_bits: float = 6,
    tied: bool = False,
    **more: Any,
) -> Model:
    """A Llama as its quantised files have it."""
    head_dim = hidden // n_head
    linear = _exl2 if format_ == "exl2" else _exl3
    tensors: list[Tensor] = []

    def add(found: Iterator[tuple[str, tuple[int, ...], str, int]], layer: int | None, kind: TensorClass) -> None:
        for name, shape, type_, n_bytes in found:
            tensors.append(Tensor(name=name, shape=shape, type=type_, n_bytes=n_bytes, layer=layer, kind=kind))

    def norm(name: str) -> Iterator[tuple[str, tuple[int, ...], str, int]]:
        yield f"{name}.weight", (hidden,), "F16", 2 * hidden

    embedding = ("model.embed_tokens.weight", (vocab, hidden), "F16", 2 * vocab * hidden)
    add(iter([embedding]), None, "token_embedding")
    for layer in range(n_layer):
        block = f"model.layers.{layer}"
        q, kv = n_head * head_dim, n_head_kv * head_dim
        for name, n_in, n_out in (("q", hidden, q), ("k", hidden, kv), ("v", hidden, kv), ("o", q, hidden)):
            add(linear(f"{block}.self_attn.{name}_proj", n_in, n_out, bits), layer, "attention")
        add(norm(f"{block}.input_layernorm"), layer, "attention")
        for name, n_in, n_out in (("gate", hidden, ffn), ("up", hidden, ffn), ("down", ffn, hidden)):
            add(linear(f"{block}.mlp.{name}_proj", n_in, n_out, bits), layer, "ffn")
        add(norm(f"{block}.post_attention_layernorm"), layer, "ffn")
    add(norm("model.norm"), None, "output")
    if not tied:
        add(linear("lm_head", hidden, vocab, head_bits), None, "output")
    hyper = Hyperparameters(
        n_layer=n_layer,
        n_ctx_train=131072,
        n_embd=hidden,
        n_vocab=vocab,
        n_ff=(ffn,) * n_layer,
        n_head=(n_head,) * n_layer,
        n_head_kv=(n_head_kv,) * n_layer,
        head_dim_k=head_dim,
        head_dim_v=head_dim,
    )
    return Model(
        path="/models/test",
        files=(),
        format=format_,
        architecture=more.pop("architecture", "llama"),
        name="test",
        quantization=f"{bits} bpw",
        parameters=0,
        hyper=hyper,
        tensors=tuple(tensors),
        metadata=more,
    )


EXL2_70B = exl("exl2", **LLAMA_70B)
EXL3_70B = exl("exl3", **LLAMA_70B)
EXL2_8B = exl("exl2", **LLAMA_8B)
EXL3_8B = exl("exl3", **LLAMA_8B)


@pytest.mark.parametrize(("cache", "kib_a_token"), [("FP16", 320), ("FP8", 160), ("Q8", 170), ("Q6", 130), ("Q4", 90)])
def test_v2_cache_of_80_layers_of_8_heads_of_128(cache: V2Cache, kib_a_token: int) -> None:
    """ExLlamaV2 0.3.2 cache.py: 8, 8 or 4 bits for K, 8, 4 or 4 for V, and 2 B for 32 elements."""
    footprint = FootprintV2(EXL2_70B, V2Settings(max_seq_len=4096, cache=cache))
    assert 80 * footprint.kv_layer == 4096 * kib_a_token * 1024


@pytest.mark.parametrize(("bits", "kib_a_token"), [((16, 16), 320), ((8, 8), 170), ((6, 6), 130), ((4, 4), 90)])
def test_v3_cache_of_80_layers_of_8_heads_of_128(bits: tuple[int, int], kib_a_token: int) -> None:
    """ExLlamaV3 cache/quant.py: k and v bits, and 2 B for 32 elements."""
    footprint = FootprintV3(EXL3_70B, V3Settings(cache_tokens=4096, k_bits=bits[0], v_bits=bits[1]))
    assert sum(footprint.kv) == 4096 * kib_a_token * 1024


def test_v3_cache_bits_of_k_and_v_may_differ() -> None:
    footprint = FootprintV3(EXL3_70B, V3Settings(cache_tokens=256, k_bits=8, v_bits=4))
    assert footprint.kv[0] == 256 * 8 * 128 * (8.5 + 4.5) / 8


@pytest.mark.parametrize("bits", [(1, 8), (9, 9), (16, 4), (0, 0)])
def test_v3_refuses_a_cache_it_does_not_have(bits: tuple[int, int]) -> None:
    with pytest.raises(UsageError, match=f"no cache of {bits[0]},{bits[1]} bits"):
        FootprintV3(EXL3_8B, V3Settings(cache_tokens=4096, k_bits=bits[0], v_bits=bits[1]))


@pytest.mark.parametrize(("tokens", "paged"), [(1, 256), (256, 256), (257, 512), (8000, 8192)])
def test_contexts_are_rounded_up_to_pages(tokens: int, paged: int) -> None:
    assert pages(tokens) == paged
    assert V2Settings(max_seq_len=tokens).tokens == paged
    assert V3Settings(cache_tokens=tokens).tokens == paged


def test_weights_on_the_card_are_the_files_less_the_embedding() -> None:
    embedding = 2 * 128256 * 8192
    v3 = FootprintV3(EXL3_70B, V3Settings(cache_tokens=4096))
    assert v3.device(range(81)).weights == EXL3_70B.weights_bytes - embedding
    assert host_bytes(EXL3_70B).weights == embedding
    v2 = FootprintV2(EXL2_70B, V2Settings(max_seq_len=4096))
    rows = 80 * (3 * 8192 + 8192 + 2 * 8192 + 28672) + 8192  # input rows of every linear layer, and of the head
    assert v2.device(range(81)).weights == EXL2_70B.weights_bytes - embedding + 4 * rows


def test_a_tied_head_is_loaded_from_the_embedding_a_second_time() -> None:
    model = exl("exl3", **LLAMA_8B, tied=True)
    last = FootprintV3(model, V3Settings(cache_tokens=4096)).device(range(32, 33))
    assert last.weights == 2 * 128256 * 4096 + 2 * 4096
    assert last.kv == 0


def test_parts_of_a_split_add_up_to_the_whole() -> None:
    """And a context for the second card; V3 1.6.5 wants 256 MiB free on each besides."""
    v3 = FootprintV3(EXL3_70B, V3Settings(cache_tokens=8192))
    v2 = FootprintV2(EXL2_70B, V2Settings(max_seq_len=8192, cache="Q4"))
    for whole, stated in ((v3, CUDA_CONTEXT + 2 * 256 * MIB), (v2, CUDA_CONTEXT)):
        together, apart = whole.device(range(81)), [whole.device(span) for span in (range(30), range(30, 81))]
        assert sum(each.weights for each in apart) == together.weights
        assert sum(each.kv for each in apart) == together.kv
        assert sum(each.overhead for each in apart) == together.overhead + stated


def test_v2_quantised_cache_needs_a_layer_in_fp16_beside() -> None:
    """ExLlamaV2 0.3.2 cache.py touch_device: K and V of one layer, on devices with attention."""
    fp16 = FootprintV2(EXL2_8B, V2Settings(max_seq_len=32768))
    q4 = FootprintV2(EXL2_8B, V2Settings(max_seq_len=32768, cache="Q4"))
    assert q4.device(range(16)).compute - fp16.device(range(16)).compute == 4 * 32768 * 8 * 128
    assert q4.device(range(32, 33)).compute == fp16.device(range(32, 33)).compute


def test_v2_head_takes_the_largest_scratch() -> None:
    """ExLlamaV2 0.3.2 linear.py temp_dq_size: 512 Mi elements at most, which an 8192 x 128256 head reaches."""
    footprint = FootprintV2(EXL2_70B, V2Settings(max_seq_len=4096))
    assert footprint.scratch("head").fixed == GIB
    assert footprint.device(range(80, 81)).compute > GIB


def test_v2_manual_reckoning_by_hand() -> None:
    """ExLlamaV2 0.3.2 attn.py scratch_space, temp_attn_size; model.py set_device_map. Llama 8B, 8192 tokens."""
    footprint = FootprintV2(EXL2_8B, V2Settings(max_seq_len=8192))
    assert footprint.counted_once == 128 * 8192 * 4 + 4096 * 2048 * 2 + 2048**2 * 2
    attention = footprint.scratch("attention")
    state = 2048 * 4096 * 2 + 128
    assert attention.fixed == state + 2 * 4096 * 4096
    assert attention.counted == 2 * state + 2 * (2048 * 1024 * 2 + 128) + 2 * 4096**2 + 2 * 8192 * 4096 * 2 + 128
    assert attention.scores == 2 * int(2048**2 // (2048 / 190)) * 32 * 2 + 128
    without = FootprintV2(EXL2_8B, V2Settings(max_seq_len=8192, flash_attn=False))
    assert without.scratch("attention").scores == 2 * 2048**2 * 32 * 2 + 128


def test_v2_scratch_of_experts() -> None:
    """ExLlamaV2 0.3.2 moe_mlp.py scratch_space: state and gathered state, two of one expert's width, the router."""
    hyper = replace(EXL2_8B.hyper, n_expert=128, n_expert_used=8, n_ff_expert=768)
    footprint = FootprintV2(replace(EXL2_8B, hyper=hyper), V2Settings(max_seq_len=4096))
    rows = 2048
    expected = 2 * (rows * 4096 * 2 + 128) + 2 * (rows * 768 * 2 + 128) + rows * 128 * 2 + 128 + 2 * 4096 * 768
    assert footprint.scratch("ffn").fixed == expected


def test_v3_readme_example_fits_sixteen_gib() -> None:
    """ExLlamaV3's README: Llama-3.1-70B at 1.6 bpw with a head of 3, cache of 4096 tokens, "under 16 GB"."""
    model = exl("exl3", **LLAMA_70B, bits=1.625, head_bits=3)
    footprint = FootprintV3(model, V3Settings(cache_tokens=4096, chunk=256))
    memory = footprint.device(range(81))
    assert 13 * GIB < memory.weights < 13.4 * GIB
    assert memory.kv == 1.25 * GIB
    assert memory.total < 16 * GIB


def test_v3_latent_cache() -> None:
    """ExLlamaV3 cache/mla.py: 1152 B a token and layer for a rank of 512 and a rope key of 64."""
    model = exl("exl3", **LLAMA_8B, architecture="deepseek_v3", kv_lora_rank=512, qk_rope_head_dim=64)
    assert FootprintV3(model, V3Settings(cache_tokens=256)).kv[0] == 256 * 1152
    quantised = FootprintV3(model, V3Settings(cache_tokens=256, k_bits=4, v_bits=4))
    assert quantised.kv[0] == 256 * (512 * 4.5 / 8 + 128)


def test_v3_keeps_only_the_window_where_it_has_a_ring() -> None:
    """ExLlamaV3 modules/sliding_attn.py: whole pages of window and 512 more, for each sequence. Gemma 3 keeps all."""
    model = exl("exl3", **LLAMA_8B, architecture="gpt_oss", sliding_window=128)
    footprint = FootprintV3(model, V3Settings(cache_tokens=65536, slots=1))
    assert footprint.kv[0] == 768 * 4 * 8 * 128
    assert footprint.kv[1] == 65536 * 4 * 8 * 128
    gemma = exl("exl3", **LLAMA_8B, architecture="gemma3_text", sliding_window=1024)
    assert len(set(FootprintV3(gemma, V3Settings(cache_tokens=65536)).kv)) == 1


def test_v3_recurrent_layers_keep_a_state_that_does_not_grow() -> None:
    numbers: dict[str, Any] = {"linear_key_head_dim": 128, "linear_value_head_dim": 128, "linear_num_key_heads": 16}
    numbers |= {"linear_num_value_heads": 32, "linear_conv_kernel_dim": 4}
    model = exl("exl3", **LLAMA_8B, architecture="qwen3_next", **numbers)
    heads = tuple(0 if layer % 4 else 8 for layer in range(32))
    model = replace(model, hyper=replace(model.hyper, n_head_kv=heads))
    short, long = (FootprintV3(model, V3Settings(cache_tokens=tokens, slots=2)).kv for tokens in (4096, 65536))
    assert short[1] == long[1] == 2 * (4 * 32 * 128 * 128 + 2 * 4 * (2 * 16 * 128 + 32 * 128))
    assert long[0] == 16 * short[0]


@given(st.integers(1, 200_000), st.integers(1, 200_000), st.sampled_from(["FP16", "FP8", "Q8", "Q6", "Q4"]))
def test_more_context_never_needs_less(a: int, b: int, cache: V2Cache) -> None:
    less, more = sorted((a, b))
    for span in (range(10), range(20, 33)):
        sizes = [FootprintV2(EXL2_8B, V2Settings(max_seq_len=n, cache=cache)).device(span).total for n in (less, more)]
        assert sizes[0] <= sizes[1]
        sizes = [FootprintV3(EXL3_8B, V3Settings(cache_tokens=n)).device(span).total for n in (less, more)]
        assert sizes[0] <= sizes[1]


@given(st.integers(0, 31), st.integers(1, 33))
def test_more_layers_never_need_less(start: int, stop: int) -> None:
    v2 = FootprintV2(EXL2_8B, V2Settings(max_seq_len=8192, cache="Q4"))
    v3 = FootprintV3(EXL3_8B, V3Settings(cache_tokens=8192))
    if start < stop < 33 and stop + 1 - start < 33:  # all of them on one card spares V3 its margin
        assert v2.device(range(start, stop)).total <= v2.device(range(start, stop + 1)).total
        assert v3.device(range(start, stop)).total <= v3.device(range(start, stop + 1)).total


@given(st.integers(1, 1 << 32))
def test_torch_rounds_up(n_bytes: int) -> None:
    whole = n_bytes + torch_slack(n_bytes)
    assert whole % (2 * MIB if n_bytes >= 10 * MIB else 512) == 0
    assert 0 <= whole - n_bytes < 2 * MIB


def test_the_wrong_version_is_refused() -> None:
    with pytest.raises(UsageError, match="is exl3, not exl2"):
        FootprintV2(EXL3_8B, V2Settings(max_seq_len=4096))
    with pytest.raises(UsageError, match="is exl2, not exl3"):
        FootprintV3(EXL2_8B, V3Settings(cache_tokens=4096))


def test_v2_places_attention_and_feed_forward_apart_v3_whole_blocks() -> None:
    def stored(model: Model, kind: TensorClass) -> int:
        return sum(tensor.n_bytes for tensor in model.tensors if tensor.layer == 0 and tensor.kind == kind)

    halves, whole = modules(EXL2_8B, "exl2", halves=True), modules(EXL3_8B, "exl3", halves=False)
    assert [module.kind for module in halves] == ["attention", "ffn"] * 32 + ["norm", "head"]
    assert [module.stored for module in halves[:2]] == [stored(EXL2_8B, "attention"), stored(EXL2_8B, "ffn")]
    assert [module.kind for module in whole] == ["block"] * 32 + ["norm", "head"]
    assert whole[0].stored == stored(EXL3_8B, "attention") + stored(EXL3_8B, "ffn")
    cohere = FootprintV2(replace(EXL2_8B, architecture="cohere"), V2Settings(max_seq_len=4096))
    assert [module.kind for module in cohere.modules] == ["block"] * 32 + ["norm", "head"]


def test_a_block_without_tensors_is_refused() -> None:
    broken = replace(EXL3_8B, tensors=tuple(tensor for tensor in EXL3_8B.tensors if tensor.layer != 3))
    with pytest.raises(BadModelError, match="a block without tensors"):
        modules(broken, "exl3", halves=False)


# --- the loaders


def device_map(footprint: FootprintV2, allocation: Sequence[float]) -> list[int]:
    """`ExLlamaV2.set_device_map` as its source describes it, device by device: a second opinion on `fill`."""
    room = [each * GIB - footprint.counted_once for each in allocation]
    scratch, scores = [0] * len(room), [0] * len(room)
    where, current = [], 0
    for module in footprint.modules:
        need = footprint.scratch(module.kind)
        while True:
            assert current < len(room)
            most = max(need.counted, scratch[current]), max(need.scores, scores[current])
            if module.stored + sum(most) <= room[current]:
                break
            current += 1
        scratch[current], scores[current] = most
        room[current] -= module.stored
        where.append(current)
    return where


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(0, 30), min_size=1, max_size=6), st.integers(512, 65536))
def test_v2_fills_as_set_device_map_does(allocation: list[float], tokens: int) -> None:
    footprint = FootprintV2(EXL2_8B, V2Settings(max_seq_len=tokens))
    loader = split.v2_manual(footprint)
    budgets = [each * GIB for each in allocation]
    try:
        expected = device_map(footprint, allocation)
    except AssertionError:
        with pytest.raises(DoesNotFitError, match="Insufficient space in device allocation"):
            split.fill(loader, budgets)
    else:
        assert list(split.fill(loader, budgets)) == expected


@st.composite
def loaders(draw: st.DrawFn) -> split.Loader:
    """Any loader: blocks of one or two parts, then a norm and a head."""
    size = st.integers(1, 1 << 34)
    parts: list[split.Part] = []
    n_units = draw(st.integers(1, 12))
    for unit in range(n_units):
        n_parts = draw(st.integers(1, 2))
        parts += [split.Part(unit=unit, held=draw(size), scratch=draw(size), scores=draw(size)) for _ in range(n_parts)]
    parts += [
        split.Part(
            unit=n_units, held=draw(st.integers(0, 1 << 16)), scratch=draw(st.integers(0, 1 << 20)), floats=True
        ),
        split.Part(unit=n_units, held=draw(size), scratch=draw(size)),
    ]
    return split.Loader(parts=tuple(parts), once=draw(st.integers(1, 1 << 30)), complaint="no")


@st.composite
def plans(draw: st.DrawFn, n_units: int) -> list[int]:
    """Units on each of one to eight devices, some of which have none."""
    n_devices = draw(st.integers(1, 8))
    cuts = sorted(draw(st.lists(st.integers(0, n_units), min_size=n_devices - 1, max_size=n_devices - 1)))
    return [stop - start for start, stop in zip([0, *cuts], [*cuts, n_units], strict=True)]


@given(st.data(), loaders())
def test_the_list_makes_any_loader_place_what_is_planned(data: st.DataObject, loader: split.Loader) -> None:
    counts = data.draw(plans(loader.parts[-1].unit + 1))
    budgets = [each * GIB for each in split.gpu_split(loader, counts)]
    placed = split.fill(loader, budgets)
    assert list(split.unit_counts(loader, placed, len(counts))) == counts
    inside = [(part.unit, device) for part, device in zip(loader.parts, placed, strict=True) if not part.floats]
    assert len(set(inside)) == len({unit for unit, _ in inside}), "a block is torn apart"


@settings(max_examples=40, deadline=None)
@given(st.data(), st.sampled_from(["v2", "v3 1.6.5", "v3 1.4.1"]), st.sampled_from([4096, 32768]))
def test_the_list_makes_the_loader_place_what_is_planned(data: st.DataObject, which: str, tokens: int) -> None:
    counts = data.draw(plans(81))
    if which == "v2":
        loader = split.v2_manual(FootprintV2(EXL2_70B, V2Settings(max_seq_len=tokens)))
        budgets: tuple[float, ...] = tuple(each * GIB for each in split.gpu_split(loader, counts))
    else:
        release: split.V3Release = "1.4.1" if which.endswith("1.4.1") else "1.6.5"
        loader = split.v3_layers(FootprintV3(EXL3_70B, V3Settings(cache_tokens=tokens)), release)
        free = [80 * GIB] * len(counts)
        use = split.gpu_split(loader, counts, [each - CUDA_CONTEXT - V3_MARGIN for each in free])
        budgets = split.v3_use_budgets(use, free, release)
    placed = split.fill(loader, budgets)
    assert list(split.unit_counts(loader, placed, len(counts))) == counts


@settings(max_examples=30, deadline=None)
@given(st.data(), st.floats(-0.4, 0.4))
def test_an_error_of_less_than_half_a_part_changes_nothing(data: st.DataObject, error: float) -> None:
    """An attention module is V2's smallest part: with every entry off by 0.4 of one, the layers stay."""
    footprint = FootprintV2(EXL2_70B, V2Settings(max_seq_len=8192))
    loader = split.v2_manual(footprint)
    smallest = min(module.stored for module in footprint.modules if module.kind == "attention")
    counts = data.draw(plans(81))
    budgets = [each * GIB + error * smallest if each else 0 for each in split.gpu_split(loader, counts)]
    assert list(split.unit_counts(loader, split.fill(loader, budgets), len(counts))) == counts


def test_lists_of_the_two_versions_for_one_plan() -> None:
    """V2 leaves the cache out of its list, V3 has it in: at 32768 tokens of FP16 that is 10 GiB over both cards."""
    counts, free = (40, 41), [48 * GIB] * 2
    v2 = FootprintV2(EXL2_70B, V2Settings(max_seq_len=32768))
    v3 = FootprintV3(EXL3_70B, V3Settings(cache_tokens=32768))
    v2_list = split.gpu_split(split.v2_manual(v2), counts)
    v3_list = split.gpu_split(split.v3_layers(v3), counts, free)
    assert v2.device(range(40)).kv == v3.device(range(40)).kv == 5 * GIB
    weights = v3.device(range(40)).weights / GIB
    assert weights + 5 < v3_list[0] < weights + 8
    assert v2_list[0] < v2.device(range(40)).weights / GIB + 3
    assert v3_list[1] == 48


def test_v2_counts_the_repeated_cache_that_flash_attention_never_makes() -> None:
    """Once it is the largest temporary, V2's list grows by 4 B x heads x head_dim a token, and by sin and cos."""
    lists = [
        split.gpu_split(split.v2_manual(FootprintV2(EXL2_70B, V2Settings(max_seq_len=tokens))), (40, 41))[0]
        for tokens in (32768, 65536)
    ]
    assert lists[1] - lists[0] == pytest.approx((4 * 32768 * 64 * 128 + 4 * 32768 * 128) / GIB, abs=0.002)


def test_a_plan_that_does_not_fit_says_so() -> None:
    loader = split.v3_layers(FootprintV3(EXL3_70B, V3Settings(cache_tokens=8192)))
    with pytest.raises(DoesNotFitError, match="device 0 of the split needs") as caught:
        split.gpu_split(loader, (70, 11), [24 * GIB, 24 * GIB])
    assert caught.value.hint
    with pytest.raises(DoesNotFitError, match="Insufficient VRAM in split for model and cache"):
        split.fill(loader, [10 * GIB, 10 * GIB])


def test_a_loader_that_cannot_be_stopped_is_said() -> None:
    """Where only the last part's temporary counts, a small part after a greedy one always fits."""
    parts = (split.Part(unit=0, held=10, scratch=1000), split.Part(unit=1, held=10, scratch=1))
    loader = split.Loader(parts=parts, keeps_largest=False, complaint="no")
    with pytest.raises(DoesNotFitError, match="cannot be kept from placing unit 1 on device 0"):
        split.gpu_split(loader, (1, 1))


def test_v3_budgets() -> None:
    free = [24 * GIB, 24 * GIB, 12 * GIB]
    assert split.v3_use_budgets([20, 0], free) == (20 * GIB, 0, 0)
    assert split.v3_use_budgets([30], free, "1.4.1") == (30 * GIB, 0, 0)
    assert split.v3_use_budgets([30], free) == (24 * GIB - CUDA_CONTEXT - 256 * MIB, 0, 0)
    kept = [24 * GIB - CUDA_CONTEXT - GIB // 2, 0, 12 * GIB - CUDA_CONTEXT - 4 * GIB]
    assert split.v3_reserve_budgets(free, [0.5, -1, 4]) == tuple(kept)
    assert split.v3_reserve_budgets(free)[2] == 12 * GIB - CUDA_CONTEXT - GIB // 2


def test_v2_auto_fills_the_first_card_first() -> None:
    """Two of 24 GiB, 70B at 4 bits: the first is full, the second holds the rest; 192 and 64 MiB are kept free."""
    free = [24 * GIB, 24 * GIB]
    loader = split.v2_auto(FootprintV2(EXL2_70B, V2Settings(max_seq_len=8192, cache="Q4")))
    budgets = split.v2_auto_budgets(free)
    assert budgets[1] - budgets[0] == 128 * MIB
    counts = split.unit_counts(loader, split.fill(loader, budgets), 2)
    assert counts[0] > 1.2 * counts[1]
    assert sum(counts) == 81


# --- tensor parallelism


def test_v2_tensor_shares_of_equal_cards() -> None:
    shares = split.v2_tensor_shares(FootprintV2(EXL2_70B, V2Settings(max_seq_len=8192)), (24, 24))
    assert shares.kv_heads == (4, 4)
    assert shares.ffn == (14336, 14336)
    assert shares.vocab == (64128, 64128)


@given(st.lists(st.floats(8, 48), min_size=1, max_size=6))
def test_v2_tensor_shares_are_whole(gib: list[float]) -> None:
    footprint = FootprintV2(EXL2_8B, V2Settings(max_seq_len=8192))
    shares = split.v2_tensor_shares(footprint, gib)
    assert (sum(shares.kv_heads), sum(shares.ffn)) == (8, 14336)
    assert (sum(shares.hidden), sum(shares.vocab)) == (4096, 128256)
    assert all(width % 128 == 0 and (width == 0 or width >= 256) for width in shares.ffn)
    assert all(width % 32 == 0 for width in (*shares.hidden, *shares.vocab))


def test_v2_tensor_parallel_is_refused_where_it_is_missing() -> None:
    with pytest.raises(UsageError, match="no tensor parallelism for mixtral"):
        split.v2_tensor_shares(
            FootprintV2(replace(EXL2_8B, architecture="mixtral"), V2Settings(max_seq_len=4096)), (24, 24)
        )
    odd = replace(EXL2_8B, hyper=replace(EXL2_8B.hyper, n_ff=(14300,) * 32))
    with pytest.raises(UsageError, match="14300: no multiple of 128"):
        split.v2_tensor_shares(FootprintV2(odd, V2Settings(max_seq_len=4096)), (24, 24))
    with pytest.raises(UsageError, match="not a split of memory"):
        split.v2_tensor_shares(FootprintV2(EXL2_8B, V2Settings(max_seq_len=4096)), (0, 0))
    with pytest.raises(DoesNotFitError, match="no room beside cache and attention"):
        split.v2_tensor_shares(FootprintV2(EXL2_8B, V2Settings(max_seq_len=131072)), (1, 1))


def test_v3_tensor_targets_are_what_is_left_of_the_card() -> None:
    assert split.v3_tensor_targets([24 * GIB, 100 * MIB]) == ((24 * 1024 - 457 - 256) / 1024, 0)
