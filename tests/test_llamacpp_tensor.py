"""llama.cpp's tensor mode: bytes of every rank against real loads, what it refuses, and the command that starts it."""

from __future__ import annotations

import csv
import gzip
from functools import cache
from pathlib import Path
from typing import Any, Final

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec import Struct
from msgspec.structs import replace

from gguf_writer import TensorSpec
from mgpu.adapter import Buffer, Endpoint, Probe
from mgpu.errors import UsageError
from mgpu.model import Model
from mgpu.plan import Layout, Shape
from mgpu.request import Request
from mgpu.rig import Gpu
from mgpu.units import MIB
from mgpu_adapters.llamacpp.adapter import LlamaCpp
from mgpu_adapters.llamacpp.job import LlamaJob
from mgpu_adapters.llamacpp.log import read_line
from mgpu_adapters.llamacpp.memory import footprint
from mgpu_adapters.llamacpp.overhead import exchange
from mgpu_adapters.llamacpp.projection import FitParams
from mgpu_adapters.llamacpp.refusals import TENSOR
from mgpu_adapters.llamacpp.settings import Settings
from mgpu_adapters.llamacpp.shortage import RANKS
from mgpu_adapters.llamacpp.traits import traits_of
from mgpu_adapters.llamacpp.weights import HOST_RULES, Rules
from oracle import gpu_of, model_names, model_of, small_model
from planning import card, rig_of
from tensor_models import MODELS, model_named
from tensor_models import model_of as made_of

_GOLDEN: Final = Path(__file__).parent / "data" / "oracle" / "tensor.csv.gz"
HERE: Final = Endpoint(host="127.0.0.1", port=8080)
PAIR: Final = (card(0, 24, 936), card(1, 24, 936))
FOUR: Final = tuple(card(i, 24, 936) for i in range(4))


class Loaded(Struct, frozen=True, kw_only=True):
    """One real load: what was asked, and the bytes on each rank (weights, cache, compute); on the host in MiB."""

    model: str
    settings: Settings
    ranks: tuple[tuple[int, int, int], ...]
    host: tuple[float, float]  # weights, compute


@cache
def loads() -> tuple[Loaded, ...]:
    with gzip.open(_GOLDEN, "rt") as file:
        groups: list[list[dict[str, str]]] = []
        for row in csv.DictReader(file):
            if row["model"]:
                groups.append([])
            groups[-1].append(row)
    return tuple(_loaded(rows) for rows in groups)


def _loaded(rows: list[dict[str, str]]) -> Loaded:
    first, last = rows[0], rows[-1]
    split = tuple(float(share) for share in first["ts"].split(",")) if first["ts"] else None
    return Loaded(
        model=first["model"],
        settings=Settings(
            n_ctx=int(first["ctx"]),
            n_parallel=int(first["np"]),
            kv_unified=first["kvu"] == "1",
            n_ubatch=int(first["ub"]),
            type_k=first["ctk"],
            type_v=first["ctv"],
            split_mode="tensor",
            tensor_split=split,
        ),
        ranks=tuple((int(row["weights"]), int(row["kv"]), int(row["compute"])) for row in rows[:-1]),
        host=(float(last["weights"]), float(last["compute"])),
    )


def model_loaded(load: Loaded) -> Model:
    return model_named(load.model) if load.model in MODELS else small_model(load.model)


def tensor(n: int) -> Shape:
    return Shape(n_devices=n, mode="tensor")


def job_of(model: Model, *arguments: str, **asked: Any) -> LlamaJob:
    """`model` asked of the newest llama.cpp known; `arguments` come after `--`."""
    adapter = LlamaCpp()
    job = adapter.job(model, Request(runtime_args=arguments, **asked), adapter.assumed())
    assert isinstance(job, LlamaJob)
    return job


# Memory.


def test_the_golden_loads_are_many_and_of_all_kinds() -> None:
    assert len(loads()) > 180
    assert {len(load.ranks) for load in loads()} == {2, 3, 4}
    assert len({model_loaded(load).architecture for load in loads()}) > 55


def test_weights_and_cache_of_every_rank_to_the_byte() -> None:
    wrong = []
    for load in loads():
        ranks = footprint(model_loaded(load), load.settings).ranks(len(load.ranks))
        planned = zip(ranks.weights(HOST_RULES), ranks.cache(load.settings, HOST_RULES), strict=True)
        if tuple(planned) != tuple(rank[:2] for rank in load.ranks):
            wrong.append((load.model, len(load.ranks), load.settings))
    assert wrong == []


def test_compute_buffers_are_as_large_as_if_nothing_were_cut() -> None:
    gpu, off = gpu_of("rpc"), []
    for load in loads():
        model = model_loaded(load)
        planned = footprint(model, load.settings).device(range(model.hyper.n_layer + 1), tensor(len(load.ranks)), gpu)
        for _, _, real in load.ranks:
            error = planned.compute / real - 1
            if not 0 <= error < (0.0005 if traits_of(model.architecture).supported else 0.45):
                off.append((load.model, len(load.ranks), planned.compute, real))
    assert {name for name, *_ in off} == {"smallthinker"}  # 8 % less with two users, on one device alone, too
    assert len(off) == 3


def test_the_host_holds_the_embedding_and_the_inputs() -> None:
    gpu, off = gpu_of("rpc"), []
    for load in loads():
        model = model_loaded(load)
        host = footprint(model, load.settings).host(tensor(len(load.ranks)), (gpu,) * len(load.ranks))
        assert host.kv == 0
        if host.weights / MIB != pytest.approx(load.host[0], abs=0.0051):
            off.append((load.model, "weights", host.weights / MIB, load.host[0]))
        slack = 0.0051 if traits_of(model.architecture).supported else 0.3 * load.host[1]
        if host.compute / MIB != pytest.approx(load.host[1], abs=slack):
            off.append((load.model, "compute", host.compute / MIB, load.host[1]))
    assert off == []


def test_a_device_is_planned_with_what_the_largest_rank_holds() -> None:
    for load in loads():
        model = model_loaded(load)
        need, units, n = footprint(model, load.settings), range(model.hyper.n_layer + 1), len(load.ranks)
        planned = need.device(units, tensor(n), gpu_of("rpc"))
        assert planned.weights == max(rank[0] for rank in load.ranks)
        assert planned.kv == max(rank[1] for rank in load.ranks)
        assert need.stored(units, tensor(n), gpu_of("rpc")) == planned.weights + planned.kv


@pytest.mark.parametrize("name", model_names())
@pytest.mark.parametrize("n", [2, 3, 4, 8])
def test_ranks_hold_all_there_is_and_no_less_than_their_share(name: str, n: int) -> None:
    """Whatever the model: together they hold the whole, and what all hold is held as often."""
    need = footprint(model_of(name), Settings(n_ctx=4096))
    units, gpu = range(need.n_units), gpu_of("rpc")
    if not need.settings.flash_attn or need.anatomy.is_mla:
        return
    ranks = need.ranks(n)
    whole = need.device(units, Shape(n_devices=1), gpu)
    assert sum(ranks.weights(HOST_RULES)) >= whole.weights
    assert sum(ranks.cache(need.settings, HOST_RULES)) >= whole.kv
    assert max(ranks.weights(HOST_RULES)) <= whole.weights


@given(
    heads=st.integers(1, 12),
    group=st.integers(1, 4),
    n_ff=st.integers(2, 60),
    n_layer=st.integers(1, 6),
    n=st.integers(2, 16),
    split=st.one_of(st.none(), st.lists(st.integers(0, 9), min_size=2, max_size=15).filter(any)),
)
def test_nothing_is_lost_in_cutting(
    heads: int, group: int, n_ff: int, n_layer: int, n: int, split: list[int] | None
) -> None:
    sizes = MODELS["llama"]._replace(
        n_layer=n_layer, n_head_kv=heads, n_head=heads * group, n_embd=heads * group * 64, n_ff=n_ff * 32
    )
    shares = tuple(float(share) for share in split) if split else None
    if shares and not any(shares[:n]):
        return
    settings = Settings(n_ctx=1024, split_mode="tensor", tensor_split=shares)
    need = footprint(made_of(sizes), settings)
    anatomy, ranks = need.anatomy, need.ranks(n)
    for name, item in anatomy.blocks[0].items():
        elements = ranks.elements(0, name)
        if elements is not None:
            assert len(elements) == n
            assert sum(elements) in item.shape
            assert min(elements) >= 0
    assert sum(ranks.cache(settings, HOST_RULES)) == need.device_kv(range(need.n_units), gpu_of("rpc"))


def test_cuda_pads_the_rows_of_every_slice() -> None:
    need = footprint(model_named("llama"), Settings(n_ctx=4096))
    plain, padded = (sum(need.ranks(3).weights(rules)) for rules in (HOST_RULES, Rules(alignment=128, pad_rows=True)))
    # attn_output reads 128 of 512 columns on a rank: 34 bytes for each 32 of the 384 that are missing, a slice
    assert padded - plain > 5 * 3 * 384 // 32 * 34


def test_tensors_too_large_for_a_device_stay_on_the_host() -> None:
    model = made_of(MODELS["llama_tied"]._replace(n_ff=512))
    embedding = model.tensors[0].n_bytes
    gpu = replace(gpu_of("rpc"), max_tensor_bytes=embedding - 1)
    need, units = footprint(model, Settings(n_ctx=4096)), range(model.hyper.n_layer + 1)
    small = need.device(units, tensor(2), gpu)
    assert need.device(units, tensor(2), gpu_of("rpc")).weights - small.weights == embedding


def test_partial_sums_have_room_on_every_rank() -> None:
    """Seen behind ggml-rpc-server when asked for five tokens: 10240 bytes for 512 columns, once for each step."""
    settings = Settings(n_ctx=4096, n_ubatch=5)
    for name, n, seen in (
        ("llama", 2, 10240),
        ("llama", 3, 2 * 10240),
        ("qwen3moe", 2, 20480),
        ("qwen2moe_shared", 4, 40960),
    ):
        assert exchange(footprint(model_named(name), settings).anatomy, settings, n, gpu_of("rpc")) == seen
    cuda = exchange(footprint(model_named("llama"), settings).anatomy, settings, 2, gpu_of("cuda"))
    assert 64 * MIB < cuda < 512 * MIB


@given(ctx=st.integers(256, 30_000), more=st.integers(0, 5000), users=st.integers(1, 9), n=st.integers(2, 8))
def test_more_context_never_needs_less(ctx: int, more: int, users: int, n: int) -> None:
    job = job_of(model_named("llama_kv3"), ctx=ctx, users=users)
    low, high = (each.stored(range(job.n_units), tensor(n), PAIR[0]) for each in (job, job.at_ctx(ctx + more)))
    assert low <= high


# What keeps a model from it.


def reason(job: LlamaJob, gpus: tuple[Gpu, ...] = PAIR) -> str:
    return job.why_not_tensor(gpus) or ""


@pytest.mark.parametrize("name", ["llama_mqa", "qwen2_bias", "qwen3", "qwen3moe"])
def test_what_answered_behind_two_and_three_servers_is_fine(name: str) -> None:
    job = job_of(model_named(name))
    assert job.why_not_tensor(PAIR) is None
    assert job.why_not_tensor(FOUR[:3]) is None


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("-fa", "off"), "--flash-attn off after `--`"),
        (("-sm", "layer"), "--split-mode layer"),
        (("-sm", "none"), "--split-mode none"),
        (("-ts", "3,1"), "splits by layers"),
        (("-ngl", "4"), "leaves 2 of 6 layers to the CPU"),
        (("-ncmoe", "1"), "experts on the host"),
        (("-cmoe",), "experts on the host"),
        (("-ot", "ffn=CPU"), "--override-tensor"),
        (("-nkvo",), "cache on the host"),
        (("-ctk", "q5_1", "-ctv", "q5_1"), "a q5_1 cache aborts"),
        (("-ctk", "f16", "-ctv", "iq4_nl"), "a iq4_nl cache aborts"),
        (("-ctk", "q8_0"), "caches of q8_0 and f16"),
    ],
)
def test_flags_that_leave_no_ranks_are_named(arguments: tuple[str, ...], said: str) -> None:
    job = job_of(model_named("llama"), *arguments)
    assert said in reason(job)
    assert "\n" not in reason(job)


@pytest.mark.parametrize(
    "arguments", [("-ngl", "99"), ("-ngl", "all"), ("-sm", "tensor"), ("-sm", "tensor", "-ts", "1,1"), ("-fa", "on")]
)
def test_flags_that_go_with_ranks(arguments: tuple[str, ...]) -> None:
    assert job_of(model_named("llama"), *arguments).why_not_tensor(PAIR) is None


@pytest.mark.parametrize("kv_type", ["f32", "f16", "bf16", "q8_0", "q4_0"])
def test_caches_that_work(kv_type: str) -> None:
    assert job_of(model_named("llama"), kv_type=kv_type).why_not_tensor(PAIR) is None


def test_caches_of_two_types_are_cudas_trouble_alone() -> None:
    job = job_of(model_named("llama"), "-ctk", "q8_0")
    assert job.why_not_tensor((gpu_of("rpc", 0), gpu_of("rpc", 1))) is None


def test_cards_that_cannot_be_ranks_together() -> None:
    job = job_of(model_named("llama"))
    assert "two cards, not 1" in reason(job, PAIR[:1])
    assert "two cards, not 0" in reason(job, ())
    assert "16 tensor ranks at the most, not 17" in reason(job, tuple(card(i, 24, 936) for i in range(17)))
    other = replace(card(1, 24, 960), vendor="amd", name="AMD Radeon RX 7900 XTX")
    assert "not CUDA and ROCm" in reason(job, (PAIR[0], other))
    vulkan = tuple(replace(gpu, device=f"Vulkan{i}") for i, gpu in enumerate((PAIR[0], other)))
    assert job.why_not_tensor(vulkan) is None


def test_a_build_without_the_mode_is_not_asked_for_it() -> None:
    adapter, model = LlamaCpp(), model_named("llama")
    assumed = adapter.assumed()
    old = replace(assumed, version="b8000", flags=assumed.flags - {TENSOR})
    assert old.flags != assumed.flags
    job = adapter.job(model, Request(), old)
    assert job.why_not_tensor(PAIR) == "llama.cpp b8000 has no --split-mode tensor"


HELP: Final = """
-m,    --model FNAME
-dev,  --device <dev1,dev2,..>
-ts,   --tensor-split N0,N1,N2,...
-fa,   --flash-attn [on|off|auto]
-sm,   --split-mode {MODES}   how to split
"""


@pytest.mark.parametrize(
    ("modes", "has"), [("{none,layer,row,tensor}", True), ("{none,layer,row}", False), ("{none,layer,tensor}", True)]
)
def test_the_help_text_tells_whether_a_build_has_the_mode(modes: str, has: bool) -> None:
    outputs = {"--version": "version: 9890 (74976e1ae)", "--help": HELP.replace("{MODES}", modes)}
    installed = LlamaCpp().installed(Probe(executable="x", origin="PATH", outputs=outputs))
    assert (TENSOR in installed.flags) == has


@pytest.mark.parametrize("name", ["deepseek2", "jamba", "kimi-linear", "mamba", "mpt", "nemotron_h_moe", "plamo2"])
def test_architectures_that_llama_cpp_refuses(name: str) -> None:
    assert f"no tensor mode for {name}" in reason(job_of(small_model(name)))


def test_refused_are_those_that_did_not_load() -> None:
    """Of the small models, those without a golden load ended with llama.cpp's own refusal, one with an assertion."""
    loaded = {load.model for load in loads()}
    names = {path.name.partition(".gguf")[0] for path in (_GOLDEN.parent / "architectures").iterdir()}
    refused = {name for name in names if "no tensor mode" in reason(job_of(small_model(name)))}
    assert refused | {"qwen"} == names - loaded
    assert "cannot cut blk.0.attn_qkv.weight" in reason(job_of(small_model("qwen")))


def test_one_kv_head_with_a_norm_aborts_at_the_first_token() -> None:
    """ggml-backend-meta.cpp:547 of b11434, with this model and with Gemma 3 270M; without the norm it answers."""
    assert "one KV head" in reason(job_of(model_named("qwen3_mqa")))
    assert reason(job_of(model_named("llama_mqa"))) == ""


def test_cut_states_abort_behind_servers_alone() -> None:
    """ggml-rpc.cpp:1416 of b11434, at the first two tokens; cards of this machine are said to run Qwen 3.5 so."""
    servers = tuple(gpu_of("rpc", i) for i in range(2))
    for name in ("qwen35", "qwen35moe"):
        job = job_of(small_model(name))
        assert "ggml-rpc-server" in reason(job, servers)
        assert job.why_not_tensor(PAIR) is None
    for name in ("lfm2moe", "gemma4", "openelm"):
        assert job_of(small_model(name)).why_not_tensor(servers) is None


def test_heads_without_a_kernel_need_the_cpu() -> None:
    sizes = MODELS["llama"]._replace(head_dim=48)
    assert "no kernel for heads of 48" in reason(job_of(made_of(sizes)))
    assert "no kernel for heads of 48" in reason(job_of(made_of(sizes), "-fa", "on"))


def test_a_block_without_attention_cannot_be_cut() -> None:
    """b11434 divides by its zero heads, and dies while loading."""

    def without(each: TensorSpec) -> TensorSpec | None:
        return None if str(each.name).startswith("blk.1.attn") else each

    sizes = MODELS["llama"]._replace(architecture="deci", n_layer=3)
    heads = {"attention__head_count": [8, 0, 8], "attention__head_count_kv": [4, 0, 4]}
    model = made_of(sizes, without, **heads, feed_forward_length=[1408] * 3)
    assert "block 1, which has no attention" in reason(job_of(model))


@pytest.mark.parametrize(("n_head_kv", "n", "aborts"), [(4, 2, False), (4, 3, True), (2, 3, True), (2, 2, False)])
def test_norms_of_single_heads_must_be_cut_like_the_heads(n_head_kv: int, n: int, aborts: bool) -> None:
    """As seen with b11434: StableLM 2 has a norm for each head, cut without regard to the heads' own step."""
    sizes = MODELS["llama"]._replace(architecture="stablelm", n_head_kv=n_head_kv, norm=True)

    def by_head(each: TensorSpec) -> TensorSpec:
        heads = {"attn_q_norm": 8, "attn_k_norm": n_head_kv}
        found = next((n for name, n in heads.items() if name in str(each.name)), None)
        return each if found is None else each._replace(shape=(64, found))

    assert ("heads and their norms differently" in reason(job_of(made_of(sizes, by_head)), FOUR[:n])) == aborts


def test_latent_attention_is_not_cut() -> None:
    def renamed(each: TensorSpec) -> TensorSpec:
        return each._replace(name=str(each.name).replace("attn_k.", "attn_kv_a_mqa."))

    model = made_of(MODELS["llama"]._replace(architecture="plm"), renamed)
    assert "latent attention" in reason(job_of(model))


def test_blocks_weights_too_large_for_a_device() -> None:
    job = job_of(model_named("llama"))
    gpus = tuple(replace(gpu_of("rpc", i), max_tensor_bytes=500_000) for i in range(2))
    assert "blk.0.ffn_gate.weight is larger than a tensor may be on GPU 0" in reason(job, gpus)


@pytest.mark.parametrize("name", model_names())
def test_any_model_gets_an_answer(name: str) -> None:
    for n in (2, 3, 8):
        said = job_of(model_of(name)).why_not_tensor(tuple(card(i, 24, 936) for i in range(n)))
        assert said is None or said.strip()


# The command.


def ranks_of(job: LlamaJob, n: int) -> Layout:
    return Layout(gpus=tuple(range(n)), counts=(job.n_units,) * n, shape=tensor(n))


def test_the_command_says_all_that_tensor_mode_needs() -> None:
    job = job_of(model_named("llama"), ctx=4096, users=2)
    command = job.command(ranks_of(job, 2), rig_of(*PAIR), HERE)
    assert " ".join(command.argv) == (
        "llama-server --model /models/m.gguf --device CUDA0,CUDA1 --n-gpu-layers 6 --split-mode tensor --fit off "
        "--ctx-size 8192 --parallel 2 --cache-type-k f16 --cache-type-v f16 --flash-attn on --batch-size 2048 "
        "--ubatch-size 512 --host 127.0.0.1 --port 8080"
    )
    assert command.devices == (RANKS, RANKS)


def test_the_mode_given_by_hand_is_planned_with() -> None:
    job = job_of(model_named("llama"), "-sm", "tensor")
    assert job.pinned.mode == "tensor"
    assert not job.pinned.single
    command = job.command(ranks_of(job, 2), rig_of(*PAIR), HERE)
    assert "--split-mode" not in command.argv
    assert command.argv[-2:] == ("-sm", "tensor")
    assert job_of(model_named("llama"), "-sm", "layer").pinned.mode == "pipeline"
    assert job_of(model_named("llama")).pinned.mode is None


def test_proportions_given_by_hand_are_planned_with() -> None:
    even, uneven = (job_of(model_named("llama"), "-sm", "tensor", "-ts", split) for split in ("1,1", "3,1"))
    plain = job_of(model_named("llama"))
    sizes = [job.stored(range(6), tensor(2), PAIR[0]) for job in (plain, even, uneven)]
    assert sizes[0] == sizes[1] < sizes[2]
    assert any("what the fullest holds" in warning for warning in uneven.warnings)
    assert not any("what the fullest holds" in warning for warning in even.warnings)


def test_rows_are_refused_with_the_reason() -> None:
    with pytest.raises(UsageError, match="b9890") as caught:
        job_of(model_named("llama"), "-sm", "row")
    assert "tensor" in caught.value.hint
    with pytest.raises(UsageError, match="'diagonal'"):
        job_of(model_named("llama"), "-sm", "diagonal")


def test_the_log_tells_the_largest_rank_by_whatever_name() -> None:
    for name in ("Meta()", "Meta(CUDA0,CUDA1)"):
        fact = read_line(f"0.00.023.120 I load_tensors:       {name} model buffer size =     7.85 MiB")
        assert fact == Buffer(device=RANKS, kind="weights", n_bytes=round(7.85 * MIB))


def test_the_projection_tool_is_not_asked_about_ranks() -> None:
    job, rig = job_of(model_named("llama")), rig_of(*PAIR)
    command = job.command(ranks_of(job, 2), rig, HERE)
    with pytest.raises(UsageError, match="tensor ranks"):
        FitParams().question(job, ranks_of(job, 2), rig, command, "--fit-print --model")


# Users.


@pytest.mark.parametrize("arguments", [(), ("-kvu",), ("-c", "8192"), ("-c", "8192", "-kvu")])
def test_at_users_is_the_same_as_asking_for_as_many(arguments: tuple[str, ...]) -> None:
    for users in (1, 3, 8):
        other, asked = (
            job_of(model_named("llama"), *arguments, ctx=2048, users=7).at_users(users),
            job_of(model_named("llama"), *arguments, ctx=2048, users=users),
        )
        assert (other.users, other.ctx) == (users, asked.ctx)
        assert other.settings == asked.settings
        gpu = PAIR[0]
        assert other.device(range(6), Shape(n_devices=1), gpu) == asked.device(range(6), Shape(n_devices=1), gpu)


def test_a_number_of_slots_given_by_hand_stays() -> None:
    for arguments in (("-np", "4"), ("-np", "-1"), ("-np", "4", "-c", "8192")):
        job = job_of(model_named("llama"), *arguments, users=2)
        assert job.users == 4
        assert job.at_users(1) is job
