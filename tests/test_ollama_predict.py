"""What Ollama's scheduler does, by era: the figures of its formula, every branch of its rules, and properties."""

from __future__ import annotations

from typing import Any, Final

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from mgpu.errors import UsageError
from mgpu.model import Hyperparameters, Model, ModelFile, Tensor, TensorClass
from mgpu.rig import Gpu, Rig
from mgpu.units import GIB, MIB
from mgpu_adapters.ollama.predict import Prediction, predict, predict_server_vram
from mgpu_adapters.ollama.server import Options, default_ctx, era_of, parse_version
from planning import card, rig_of

OLD, MIDDLE, NEW = "0.11.4", "0.24.0", "0.32.15"
SPREAD: Final = Options(sched_spread=True)
#: Tensors outside of the blocks, in per cent of the file.
ENDS: Final[tuple[tuple[str, int, TensorClass], ...]] = (("token_embd", 2, "token_embedding"), ("output", 3, "output"))


def gguf(file_gib: float, *, n_layer: int, n_embd: int, n_head: int, n_head_kv: int, **more: Any) -> Model:
    """A GGUF of that size: 95 % of it in equal blocks, the rest embedding and head."""
    size = round(file_gib * GIB)
    block = size * 95 // 100 // n_layer
    tensors = [
        Tensor(name=f"blk.{n}.all", shape=(block,), type="I8", n_bytes=block, layer=n, kind="ffn")
        for n in range(n_layer)
    ]
    for name, percent, kind in ENDS:
        n_bytes = size * percent // 100
        tensors.append(
            Tensor(name=f"{name}.weight", shape=(n_bytes,), type="I8", n_bytes=n_bytes, layer=None, kind=kind)
        )
    return Model(
        path="/models/test.gguf",
        files=(ModelFile(path="/models/test.gguf", n_bytes=size),),
        format="gguf",
        architecture=more.pop("architecture", "llama"),
        name="test",
        quantization="Q4_K_M",
        parameters=0,
        hyper=Hyperparameters(
            n_layer=n_layer,
            n_ctx_train=131072,
            n_embd=n_embd,
            n_vocab=128256,
            n_ff=(4 * n_embd,) * n_layer,
            n_head=(n_head,) * n_layer,
            n_head_kv=(n_head_kv,) * n_layer,
            head_dim_k=n_embd // n_head,
            head_dim_v=n_embd // n_head,
        ),
        tensors=tuple(tensors),
        metadata=more,
    )


LLAMA_8B = gguf(4.5755, n_layer=32, n_embd=4096, n_head=32, n_head_kv=8)
LLAMA_70B = gguf(39.593, n_layer=80, n_embd=8192, n_head=64, n_head_kv=8)


def cards(*gib: float, **more: Any) -> Rig:
    return rig_of(*(card(index, size, 936, **more) for index, size in enumerate(gib)))


# --- the formula


@pytest.mark.parametrize(("model", "mib"), [(LLAMA_8B, 5709), (LLAMA_70B, 43103)], ids=["8B", "70B"])
def test_formula(model: Model, mib: int) -> None:
    """File and f16 cache at 8192 tokens; llama.cpp b10434 itself projects 5651 and 42970 MiB for the same files."""
    assert round(predict_server_vram(model, 8192) / MIB) == mib


def test_formula_takes_the_heads_the_file_states() -> None:
    """Per layer: the least, 0 counts as 1 (HeadCountKVMin); heads: the most."""
    model = gguf(1, n_layer=10, n_embd=1024, n_head=8, n_head_kv=4, **{"llama.attention.head_count_kv": (0, 4, 2)})
    assert predict_server_vram(model, 100) == model.file_bytes + 2 * 10 * 1 * 128 * 100 * 2
    hybrid = gguf(1, n_layer=10, n_embd=1024, n_head=8, n_head_kv=4, **{"llama.attention.head_count_kv": 4})
    hybrid = replace(hybrid, hyper=replace(hybrid.hyper, n_head_kv=(0, 4) * 5))  # what the layers really keep
    assert predict_server_vram(hybrid, 100) == hybrid.file_bytes + 2 * 10 * 4 * 128 * 100 * 2


def test_slots_multiply_the_context_and_training_caps_it() -> None:
    rig = cards(24, 24)
    one, four = (predict(LLAMA_8B, rig, version=NEW, ctx=8192, parallel=n) for n in (1, 4))
    assert four.predicted_bytes - one.predicted_bytes == 3 * GIB
    assert predict(LLAMA_8B, rig, version=NEW, ctx=1_000_000).ctx == 131072
    single = replace(LLAMA_8B, architecture="qwen35")
    assert predict(single, rig, version=NEW, ctx=8192, parallel=4).predicted_bytes == one.predicted_bytes


# --- from 0.30


def test_one_card_that_fits_has_the_model_alone() -> None:
    found = predict(LLAMA_8B, cards(24, 24), version=NEW, ctx=8192)
    assert found == Prediction(
        version_era=">=0.30",
        predicted_bytes=predict_server_vram(LLAMA_8B, 8192),
        ctx=8192,
        gpus=(0,),
        reason="5.6 GiB predicted is at most 80 % of the 24.0 GiB free on GPU 0, "
        "which has most free memory of those: it alone",
    )


def test_the_emptiest_card_is_taken_not_the_fastest() -> None:
    rig = rig_of(card(0, 24, 1792, name="fast"), card(1, 32, 360, name="slow"))
    assert predict(LLAMA_8B, rig, version=NEW, ctx=8192).gpus == (1,)


def test_eighty_percent_to_the_byte() -> None:
    predicted = predict_server_vram(LLAMA_8B, 8192)
    enough = -(-predicted * 100 // 80)
    for free, gpus in ((enough, (1,)), (enough - 1, (0, 1))):
        rig = rig_of(card(0, 4, 936), replace(card(1, 24, 936), free_bytes=free))
        assert predict(LLAMA_8B, rig, version=NEW, ctx=8192).gpus == gpus


def test_a_needless_split_is_predicted_with_its_reason() -> None:
    """ollama#16599: about 20 GB on a card with 24, and a second one beside."""
    model = gguf(19, n_layer=48, n_embd=5120, n_head=40, n_head_kv=8)
    found = predict(model, cards(23.5, 15.5), version=NEW, ctx=8192)
    assert found.gpus == (0, 1)
    assert found.reason.startswith("20.5 GiB predicted is over 80 % of the 23.5 GiB free on the best card: all 2 CUDA")
    assert predict(model, cards(23.5), version=NEW, ctx=8192).gpus == (0,)


def test_the_default_context_alone_can_split() -> None:
    """Two cards of 24 GiB: 48 in total make 262144 the default, which training caps at 131072 (16 GiB of cache)."""
    found = predict(LLAMA_8B, cards(24, 24), version=NEW)
    assert (found.ctx, found.gpus) == (131072, (0, 1))
    assert found.predicted_bytes == LLAMA_8B.file_bytes + 16 * GIB
    assert predict(LLAMA_8B, cards(26, 24), version=NEW).gpus == (0,)


def test_never_a_subset() -> None:
    assert predict(LLAMA_70B, cards(24, 24, 24, 24), version=NEW, ctx=8192).gpus == (0, 1, 2, 3)


@pytest.mark.parametrize(
    ("options", "gpus", "words"),
    [
        (Options(main_gpu=1), (1,), "main_gpu is 1: it alone"),
        (Options(main_gpu=7), (0, 1), "main_gpu is 7, which is no card"),
        (Options(main_gpu=-1), (0, 1), "main_gpu is -1, which is no card"),
        (Options(sched_spread=True), (0, 1), "OLLAMA_SCHED_SPREAD"),
        (Options(sched_spread=True, main_gpu=0), (0,), "main_gpu is 0"),
        (Options(num_gpu=0), (), "num_gpu is 0: on the CPU"),
        (Options(num_gpu=10), (0,), "it alone"),
        (Options(gpu_overhead=20 * GIB), (0,), "it alone"),  # not used for placement any more
    ],
    ids=["main_gpu", "too large", "negative", "spread", "main_gpu wins", "no layers", "some layers", "overhead"],
)
def test_options(options: Options, gpus: tuple[int, ...], words: str) -> None:
    found = predict(LLAMA_8B, cards(24, 12), version=NEW, ctx=8192, options=options)
    assert found.gpus == gpus
    assert words in found.reason


def test_no_card_and_one_card() -> None:
    assert predict(LLAMA_8B, rig_of(), version=NEW, ctx=8192).gpus == ()
    only = predict(LLAMA_70B, cards(24), version=NEW, ctx=8192)
    assert only.gpus == (0,)
    assert "fit decides" in only.reason


def test_groups_are_backends_and_the_largest_is_taken() -> None:
    rig = _mixed()
    assert predict(LLAMA_70B, rig, version=NEW, ctx=8192).gpus == (0, 2)
    named = predict(LLAMA_70B, rig, version=NEW, ctx=8192, options=Options(main_gpu=0))
    assert named.gpus == (1,)  # of the first CUDA and the first ROCm card: the one with more free memory
    assert predict(LLAMA_8B, rig, version=NEW, ctx=8192).gpus == (1,)


def _mixed() -> Rig:
    return rig_of(card(0, 16, 936), replace(card(1, 24, 960), vendor="amd"), card(2, 16, 936))


def test_integrated_cards_come_last_and_share_the_ram() -> None:
    shared = replace(card(0, 96, 256), unified=True, vendor="amd")
    rig = rig_of(shared, card(1, 12, 360), ram_gib=128)
    assert predict(LLAMA_8B, rig, version=NEW, ctx=8192).gpus == (1,)
    large = predict(LLAMA_70B, rig, version=NEW, ctx=8192)
    assert large.gpus == (0,)  # 80 % of 96 GiB
    assert predict(LLAMA_70B, replace(rig, ram_free_bytes=40 * GIB), version=NEW, ctx=8192).gpus == (1,)


# --- before


def test_the_three_eras_differ() -> None:
    """70B on four cards of 24 GiB: all four; the two it needs; all four. 8B: one, in every era."""
    rig = cards(24, 24, 24, 24)
    old, middle, new = (predict(LLAMA_70B, rig, version=version, ctx=8192) for version in (OLD, MIDDLE, NEW))
    assert old.gpus == (0, 1, 2, 3)
    assert middle.gpus == (0, 1)
    assert new.gpus == (0, 1, 2, 3)
    assert sum(old.layers) == sum(middle.layers) == 81
    assert new.layers == ()
    for version in (OLD, MIDDLE, NEW):
        assert len(predict(LLAMA_8B, rig, version=version, ctx=8192).gpus) == 1


#: Its graph is reckoned from the cache: 8 heads of 4, so a third of it.
SMALL: Final = gguf(1, n_layer=10, n_embd=1024, n_head=8, n_head_kv=4, architecture="starcoder2")
LAYER: Final = SMALL.tensors[0].n_bytes + 2 * 128 * 4 * 4096 * 2
EVERYTHING: Final = 10 * LAYER + SMALL.tensors[-1].n_bytes
GRAPH: Final = 2 * (10 * 2 * 128 * 4 * 4096 * 2) // 6


@pytest.mark.parametrize(
    ("version", "needed", "predicted"),
    [
        (OLD, EVERYTHING + GRAPH + 457 * MIB + LAYER + 1, EVERYTHING + GRAPH + 457 * MIB + LAYER),
        (MIDDLE, EVERYTHING + GRAPH + 457 * MIB + LAYER, EVERYTHING + GRAPH),
    ],
)
def test_before_030_to_the_byte(version: str, needed: int, predicted: int) -> None:
    """Layers, output and graph; 457 MiB and one more layer are kept free."""
    for free, layers in ((needed, 11), (needed - 1, 10)):
        rig = rig_of(replace(card(0, 24, 936), free_bytes=free))
        found = predict(SMALL, rig, version=version, ctx=4096)
        assert found.layers == (layers,)
        assert (found.predicted_bytes == predicted) == (layers == 11)


def test_the_first_era_deals_layers_out_until_a_card_is_full() -> None:
    """A small second card has its turn until it is full; the first has the rest."""
    even = predict(SMALL, rig_of(card(0, 8, 936), card(1, 8, 936)), version=OLD, ctx=4096, options=SPREAD)
    assert even.layers == (6, 5)
    small = 457 * MIB + GRAPH + 4 * LAYER  # one of them kept free
    rig = rig_of(card(0, 8, 936), replace(card(1, 8, 936), free_bytes=small))
    assert predict(SMALL, rig, version=OLD, ctx=4096, options=SPREAD).layers == (9, 2)
    none = replace(rig, gpus=(rig.gpus[0], replace(rig.gpus[1], free_bytes=457 * MIB)))
    assert predict(SMALL, none, version=OLD, ctx=4096, options=SPREAD).gpus == (0,)


def test_before_030_a_card_is_filled_further_than_80_percent() -> None:
    model = gguf(19, n_layer=48, n_embd=5120, n_head=40, n_head_kv=8, architecture="qwen3")
    rig = cards(23.5, 15.5)
    assert predict(model, rig, version=NEW, ctx=8192).gpus == (0, 1)
    assert predict(model, rig, version=MIDDLE, ctx=2048).gpus == (0,)


@pytest.mark.parametrize("version", [OLD, MIDDLE])
def test_spread_uses_every_card(version: str) -> None:
    found = predict(LLAMA_8B, cards(24, 24, 24), version=version, ctx=8192, options=Options(sched_spread=True))
    assert found.gpus == (0, 1, 2)
    assert sum(found.layers) == 33


@pytest.mark.parametrize("version", [OLD, MIDDLE])
def test_overhead_was_subtracted_from_every_card(version: str) -> None:
    rig = cards(8, 8)
    assert len(predict(LLAMA_8B, rig, version=version, ctx=2048).gpus) == 1
    assert len(predict(LLAMA_8B, rig, version=version, ctx=2048, options=Options(gpu_overhead=3 * GIB)).gpus) == 2


@pytest.mark.parametrize("version", [OLD, MIDDLE])
def test_some_layers_stay_on_the_cpu(version: str) -> None:
    found = predict(LLAMA_70B, cards(24), version=version, ctx=8192)
    assert found.gpus == (0,)
    assert 20 < found.layers[0] < 60
    assert "the rest on the CPU" in found.reason
    assert 12 * GIB < found.predicted_bytes <= 24 * GIB


@pytest.mark.parametrize("version", [OLD, MIDDLE])
def test_nothing_fits_a_tiny_card(version: str) -> None:
    found = predict(LLAMA_70B, cards(1), version=version, ctx=8192)
    assert (found.gpus, found.layers, found.predicted_bytes) == ((), (), 0)
    assert "no card has room" in found.reason


@pytest.mark.parametrize("version", [OLD, MIDDLE])
def test_layers_asked_for(version: str) -> None:
    rig = cards(24, 24)
    found = predict(LLAMA_8B, rig, version=version, ctx=8192, options=Options(num_gpu=10))
    assert sum(found.layers) == 10
    assert predict(LLAMA_8B, rig, version=version, ctx=8192, options=Options(num_gpu=0)).gpus == ()


def test_asked_for_layers_are_forced_in_the_second_era() -> None:
    found = predict(LLAMA_70B, cards(8), version=MIDDLE, ctx=8192, options=Options(num_gpu=81))
    assert found.layers == (81,)
    assert found.predicted_bytes > 8 * GIB


def test_cards_are_filled_evenly_in_the_second_era() -> None:
    found = predict(LLAMA_70B, cards(48, 48), version=MIDDLE, ctx=32768)
    assert abs(found.layers[0] - found.layers[1]) <= 2


def test_one_library_is_used_before_030() -> None:
    for version in (OLD, MIDDLE):
        found = predict(LLAMA_70B, _mixed(), version=version, ctx=8192)
        assert set(found.gpus) in ({0, 2}, {1})


def test_kv_type_was_reckoned_with_before_030() -> None:
    rig = cards(80)
    for version, shrinks in ((OLD, True), (MIDDLE, True), (NEW, False)):
        f16, q8 = (
            predict(LLAMA_8B, rig, version=version, ctx=65536, options=Options(kv_type=kind)).predicted_bytes
            for kind in ("f16", "q8_0")
        )
        assert (q8 < f16) == shrinks


def test_windows_make_gemma3_smaller() -> None:
    full = gguf(8, n_layer=48, n_embd=3840, n_head=16, n_head_kv=8, architecture="gemma3")
    windowed = replace(full, metadata={"gemma3.attention.sliding_window": 1024})
    rig = cards(80)
    less, more = (predict(model, rig, version=MIDDLE, ctx=65536).predicted_bytes for model in (windowed, full))
    assert less < more


# --- versions


@pytest.mark.parametrize(
    ("version", "era"),
    [
        ("0.9.0", "<=0.11.4"),
        ("0.11.4", "<=0.11.4"),
        ("v0.11.5-rc2", "0.11.5-0.29"),
        ("0.24.0", "0.11.5-0.29"),
        ("0.30.0-rc3", ">=0.30"),
        ("0.34.1", ">=0.30"),
        ("1.0.0", ">=0.30"),
    ],
)
def test_eras(version: str, era: str) -> None:
    assert era_of(version) == era


@pytest.mark.parametrize("text", ["", "latest", "0.30", "0.30.x", "30", "0.30.0.1"])
def test_what_is_no_version_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="not a version of Ollama") as caught:
        parse_version(text)
    assert caught.value.hint


@pytest.mark.parametrize(
    ("version", "gib", "ctx"),
    [
        ("0.6.6", (24, 24), 2048),
        ("0.6.7", (24, 24), 4096),
        ("0.15.4", (24, 24), 4096),
        ("0.15.5", (24, 24), 262144),
        ("0.15.5", (24,), 32768),
        ("0.15.5", (12,), 4096),
        ("0.32.0", (23,), 32768),
        ("0.32.0", (22.9,), 4096),
        ("0.32.0", (12, 12, 12, 12), 262144),
        ("0.32.0", (), 4096),
    ],
)
def test_default_context(version: str, gib: tuple[float, ...], ctx: int) -> None:
    assert default_ctx(version, cards(*gib).gpus) == ctx


def test_overhead_lowers_the_default_context() -> None:
    assert default_ctx("0.32.0", cards(24, 24).gpus, gpu_overhead=GIB) == 32768


def test_only_gguf_and_only_sizes() -> None:
    with pytest.raises(UsageError, match="GGUF only, not safetensors"):
        predict(replace(LLAMA_8B, format="safetensors"), cards(24), version=NEW)
    for ctx, parallel in ((0, 1), (-5, 1), (8192, 0)):
        with pytest.raises(UsageError, match="not a context"):
            predict(LLAMA_8B, cards(24), version=NEW, ctx=ctx, parallel=parallel)


# --- properties

sizes = st.floats(1, 96)
rigs = st.lists(st.tuples(sizes, st.sampled_from(["nvidia", "nvidia", "amd"]), st.booleans()), max_size=6)
models = st.sampled_from([LLAMA_8B, LLAMA_70B, replace(LLAMA_8B, architecture="qwen3")])


def rig_from(drawn: list[tuple[float, str, bool]]) -> Rig:
    gpus: list[Gpu] = []
    for index, (gib, vendor, unified) in enumerate(drawn):
        gpus.append(replace(card(index, gib, 500), vendor=vendor, unified=unified and vendor == "amd"))
    return rig_of(*gpus)


@settings(deadline=None)
@given(models, rigs, st.sampled_from([OLD, MIDDLE, NEW]), st.integers(1, 131072), st.integers(1, 4))
def test_any_prediction_makes_sense(
    model: Model, drawn: list[tuple[float, str, bool]], version: str, ctx: int, parallel: int
) -> None:
    rig = rig_from(drawn)
    found = predict(model, rig, version=version, ctx=ctx, parallel=parallel)
    assert found == predict(model, rig, version=version, ctx=ctx, parallel=parallel)
    assert len(set(found.gpus)) == len(found.gpus)
    assert set(found.gpus) <= {gpu.index for gpu in rig.gpus}
    assert len({rig.gpus[index].vendor for index in found.gpus}) <= 1
    assert found.reason
    if version != NEW:
        assert len(found.layers) == len(found.gpus)
        assert all(found.layers)
        assert sum(found.layers) <= model.hyper.n_layer + 1
        assert found.predicted_bytes <= sum(rig.gpus[index].free_bytes for index in found.gpus) or version == OLD


@given(models, rigs, st.integers(1, 131072))
def test_a_card_alone_has_80_percent_and_no_fitting_one_is_passed_over(
    model: Model, drawn: list[tuple[float, str, bool]], ctx: int
) -> None:
    rig = rig_from(drawn)
    found = predict(model, rig, version=NEW, ctx=ctx)
    fitting = {gpu.index for gpu in rig.gpus if found.predicted_bytes * 100 <= min(gpu.free_bytes, 64 * GIB) * 80}
    fitting |= {gpu.index for gpu in rig.gpus if found.predicted_bytes * 100 <= gpu.free_bytes * 80 and not gpu.unified}
    if len(rig.gpus) > 1 and fitting:
        assert found.gpus[0] in fitting
        assert len(found.gpus) == 1


@given(models, rigs, st.integers(1, 131072), st.integers(1, 131072))
def test_more_context_is_never_predicted_smaller(
    model: Model, drawn: list[tuple[float, str, bool]], a: int, b: int
) -> None:
    rig = rig_from(drawn)
    less, more = (predict(model, rig, version=NEW, ctx=ctx).predicted_bytes for ctx in sorted((a, b)))
    assert less <= more


@settings(deadline=None)
@given(models, st.lists(sizes, min_size=1, max_size=6), st.integers(1, 131072))
def test_the_second_era_takes_the_emptiest_cards(model: Model, gib: list[float], ctx: int) -> None:
    rig = cards(*gib)
    found = predict(model, rig, version=MIDDLE, ctx=ctx)
    if sum(found.layers) == model.hyper.n_layer + 1:
        left = [gpu.free_bytes for gpu in rig.gpus if gpu.index not in found.gpus]
        least = min(rig.gpus[index].free_bytes for index in found.gpus)
        assert len(found.gpus) == len(rig.gpus) or all(free <= least for free in left)
