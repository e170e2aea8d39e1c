"""Plans as TabbyAPI's command: golden files, and lists that make the loaders do what is planned."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from exllama_models import ExFormat, exl_model
from fake_tabby import read_yaml
from mgpu.adapter import Adapter, Command, Endpoint
from mgpu.decide.choose import choose
from mgpu.decide.replicas import commands_at, replicas_of
from mgpu.errors import BadModelError, DoesNotFitError, RefusedError
from mgpu.inspect.source import read_model
from mgpu.model import Model
from mgpu.plan import Layout, Plan, Shape
from mgpu.report.lines import shell_line
from mgpu.request import Request
from mgpu.rig import Gpu, Rig
from mgpu.units import GIB, MIB
from mgpu_adapters.exllama.adapter import ExLlamaV2, ExLlamaV3
from mgpu_adapters.exllama.config import NO_ADMIN, quoted
from mgpu_adapters.exllama.engines import V2, V3, Engine
from mgpu_adapters.exllama.memory import CUDA_CONTEXT
from mgpu_adapters.exllama.settings import Settings
from mgpu_adapters.exllama.split import fill, unit_counts, v2_manual, v3_layers, v3_use_budgets
from planning import card, rig_named, rig_of

ADAPTERS: Final[dict[ExFormat, Adapter]] = {"exl2": ExLlamaV2(), "exl3": ExLlamaV3()}
HERE: Final = Endpoint(host="127.0.0.1", port=8080)

Models = Callable[..., Model]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    """`models("exl3", "70B", 3)`: read from a directory with the model in full length."""
    directory = tmp_path_factory.mktemp("exl")
    read: dict[tuple[Any, ...], Model] = {}

    def model(format_: ExFormat, size: str = "8B", bits: float = 4) -> Model:
        if (format_, size, bits) not in read:
            read[format_, size, bits] = read_model(str(exl_model(directory, format_, size, bits)))
        return read[format_, size, bits]

    return model


def decide(model: Model, rig: str | Rig, endpoint: Endpoint = HERE, **asked: Any) -> tuple[Plan, Command, Rig]:
    """As `mgpu run` does it."""
    adapter, request = ADAPTERS["exl2" if model.format == "exl2" else "exl3"], Request(**asked)
    machine = rig_named(rig) if isinstance(rig, str) else rig
    job = adapter.job(model, request, adapter.assumed())
    plan = choose(request, machine, job)
    assert plan.refusal is None, plan.refusal
    return plan, job.at_ctx(plan.ctx).command(plan.layout, machine, endpoint), machine


def config_of(command: Command, tmp_path: Path) -> dict[str, dict[str, Any]]:
    path = tmp_path / "read.yml"
    path.write_text(command.files["config.yml"], encoding="utf-8")
    return read_yaml(path)


# Golden: argv, environment and files.

_CONFIG: Final = """\
network:
  host: "127.0.0.1"
  port: 8080
  disable_auth: false
model:
  model_dir: "{parent}"
  model_name: "Llama-70B-exl3-4bpw"
  max_seq_len: 8192
  cache_size: 8192
  cache_mode: "8,8"
  chunk_size: 2048
  max_batch_size: 1
  tensor_parallel: true
  tensor_parallel_backend: "nccl"
  gpu_split_auto: false
  gpu_split: [22.823242, 22.823242]
"""


def test_a_whole_command(models: Models) -> None:
    model = models("exl3", "70B")
    endpoint = Endpoint(host="127.0.0.1", port=8080, api_key='se"cret')
    _, command, _ = decide(model, "2x3090-nvlink", endpoint, kv_type="q8_0")
    assert command.argv == ("/opt/tabbyAPI/venv/bin/python", "/opt/tabbyAPI/main.py", "--config", "config.yml")
    assert command.files == {
        "config.yml": _CONFIG.format(parent=str(Path(model.path).parent)),
        "api_tokens.yml": f'api_key: "se\\"cret"\nadmin_key: "{NO_ADMIN}"\n',
    }
    assert command.env == {
        "CUDA_DEVICE_ORDER": "PCI_BUS_ID",
        "CUDA_VISIBLE_DEVICES": "0,1",
        "TABBY_LOG_CONSOLE_WIDTH": "1000",
    }
    assert command.ready_url == "http://127.0.0.1:8080/health"
    assert command.endpoint == "http://127.0.0.1:8080/v1"
    assert "TABBY_" in command.scrub


def test_nobody_can_send_the_key_of_administration() -> None:
    """Headers are read as Latin-1."""
    with pytest.raises(UnicodeEncodeError):
        NO_ADMIN.encode("latin-1")


_BY_LAYERS = {"gpu_split_auto": False}
_RANKS = {"gpu_split_auto": False, "tensor_parallel": True}
_ONE: dict[str, Any] = {"max_batch_size": 1, "cache_size": 8192, "cache_mode": "FP16"}
_FOUR: dict[str, Any] = {"max_batch_size": 4, "cache_size": 32768, "cache_mode": "FP16"}


@pytest.mark.parametrize(
    ("format_", "size", "bits", "rig", "asked", "cards", "expected"),
    [
        pytest.param("exl3", "8B", 4, "3090", {}, "0", _ONE, id="V3 one card"),
        pytest.param(
            "exl3", "70B", 4, "2x3090", {"split": "pipeline"}, "0,1",
            _ONE | _BY_LAYERS | {"gpu_split": [18.767578, 22.823242]}, id="V3 two equal by layers",
        ),
        pytest.param(
            "exl3", "70B", 4, "2x3090-nvlink", {}, "0,1",
            _ONE | _RANKS | {"tensor_parallel_backend": "nccl", "gpu_split": [22.823242, 22.823242]},
            id="V3 two equal with NVLink",
        ),
        pytest.param(
            "exl3", "70B", 3, "3090+3060", {}, "0,1",
            _ONE | _BY_LAYERS | {"gpu_split": [22.823242, 11.063477]}, id="V3 mixed",
        ),
        pytest.param(
            "exl3", "70B", 4, "2x3090", {"users": 4}, "0,1",
            _FOUR | _RANKS | {"tensor_parallel_backend": "native", "gpu_split": [22.823242, 22.823242]},
            id="V3 many users",
        ),
        pytest.param("exl2", "8B", 4, "3090", {}, "0", _ONE, id="V2 one card"),
        pytest.param(
            "exl2", "70B", 4, "2x3090", {}, "0,1",
            _ONE | _BY_LAYERS | {"gpu_split": [17.329102, 18.541016]}, id="V2 two equal by layers",
        ),
        pytest.param(
            "exl2", "70B", 4, "2x3090", {"split": "tensor"}, "0,1",
            _ONE | _RANKS | {"gpu_split": [23.073242, 23.073242]}, id="V2 two equal as ranks",
        ),
        pytest.param(
            "exl2", "70B", 3, "3090+3060", {}, "0,1",
            _ONE | _BY_LAYERS | {"gpu_split": [20.789062, 7.103516]}, id="V2 mixed",
        ),
        pytest.param(
            "exl2", "70B", 4, "2x3090", {"users": 4, "kv_type": "q4_0"}, "0,1",
            _FOUR | {"cache_mode": "Q4"} | _BY_LAYERS | {"gpu_split": [17.329102, 18.541016]}, id="V2 many users",
        ),
    ],
)  # fmt: skip
def test_golden(
    models: Models,
    tmp_path: Path,
    format_: ExFormat,
    size: str,
    bits: float,
    rig: str,
    asked: dict[str, Any],
    cards: str,
    expected: dict[str, Any],
) -> None:
    model = models(format_, size, bits)
    _, command, _ = decide(model, rig, **asked)
    path = Path(model.path)
    common = {"model_dir": str(path.parent), "model_name": path.name, "max_seq_len": 8192, "chunk_size": 2048}
    assert config_of(command, tmp_path)["model"] == common | expected
    assert command.env["CUDA_VISIBLE_DEVICES"] == cards
    assert set(command.files) == {"config.yml"}


def test_a_model_for_several_users_is_replicated(models: Models, tmp_path: Path) -> None:
    adapter, rig, request = ADAPTERS["exl3"], rig_named("2x3090"), Request(users=8)
    job = adapter.job(models("exl3"), request, adapter.assumed())
    plan = choose(request, rig, job)
    replicas = replicas_of(plan, job, rig)
    commands = commands_at(replicas, (8080, 8081), host="127.0.0.1", api_key=None)
    assert [command.env["CUDA_VISIBLE_DEVICES"] for command in commands] == ["0", "1"]
    assert [config_of(command, tmp_path)["network"]["port"] for command in commands] == [8080, 8081]
    assert [config_of(command, tmp_path)["model"]["max_batch_size"] for command in commands] == [4, 4]


# The lists, read as the loaders read them.


def _free(*gib: float) -> Rig:
    return rig_of(*(card(index, each, 900, compute_capability="8.6") for index, each in enumerate(gib)))


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    free=st.lists(st.floats(9, 30), min_size=2, max_size=4),
    format_=st.sampled_from(["exl2", "exl3"]),
    ctx=st.sampled_from([2048, 8192, 20480]),
)
def test_the_loader_places_what_is_planned(models: Models, free: list[float], format_: ExFormat, ctx: int) -> None:
    model = models(format_, "70B", 3)
    adapter, rig, request = ADAPTERS[format_], _free(*free), Request(ctx=ctx, split="pipeline")
    job = adapter.job(model, request, adapter.assumed())
    plan = choose(request, rig, job)
    if plan.refusal is not None or plan.placement != "pipeline":
        return
    try:
        command = job.command(plan.layout, rig, HERE)
    except DoesNotFitError as error:
        pytest.fail(f"{plan.layout}: {error.message}")
    words = next(line for line in command.files["config.yml"].splitlines() if "gpu_split:" in line)
    split = [float(each) for each in words.partition("[")[2].rstrip("]").split(",")]
    asked = Settings(ctx=ctx)
    usable = [next(gpu.usable_bytes for gpu in rig.gpus if gpu.index == index) for index in plan.layout.gpus]
    if format_ == "exl2":
        loader, budgets = v2_manual(V2(model, asked).footprint), [each * GIB for each in split]
    else:
        loader = v3_layers(V3(model, asked, (1, 4, 2)).footprint, "1.4.1")
        budgets = list(v3_use_budgets(split, usable, "1.6.5"))
        assert all(each * GIB <= most - CUDA_CONTEXT for each, most in zip(split, usable, strict=True))
    counts = unit_counts(loader, fill(loader, budgets), len(split))
    assert counts == tuple(count for count in plan.layout.counts if count)


def test_a_card_with_nothing_on_it_is_hidden(models: Models, tmp_path: Path) -> None:
    adapter = ADAPTERS["exl3"]
    model, rig = models("exl3"), rig_named("2x3090")
    job = adapter.job(model, Request(), adapter.assumed())
    layout = Layout(gpus=(0, 1), counts=(0, 33), shape=Shape(n_devices=2))
    command = job.command(layout, rig, HERE)
    assert command.env["CUDA_VISIBLE_DEVICES"] == "1"
    assert "gpu_split" not in config_of(command, tmp_path)["model"]


# Ranks.


@pytest.mark.parametrize("n_ranks", [2, 3, 4, 8])
def test_ranks_hold_the_model_together(models: Models, n_ranks: int) -> None:
    for engine in _engines(models, "70B"):
        whole, rank = engine.span(range(engine.n_units)), engine.rank(n_ranks)
        assert rank.weights * n_ranks >= whole.weights
        assert rank.kv * n_ranks >= whole.kv
        assert rank.weights < whole.weights * 1.5 / n_ranks
        assert rank.total < whole.total


def _engines(models: Models, size: str) -> tuple[Engine, ...]:
    asked = Settings(ctx=8192)
    return V2(models("exl2", size), asked), V3(models("exl3", size), asked, (1, 4, 2))


def test_what_is_against_ranks(models: Models) -> None:
    for engine in _engines(models, "70B"):
        assert engine.flaw(8) is None
        assert "8" in (engine.flaw(9) or "")
    mistral = replace(models("exl3"), architecture="mistral4")
    assert "mistral4" in (V3(mistral, Settings(ctx=4096), (1, 4, 2)).flaw(2) or "")
    deepseek = replace(models("exl3"), architecture="deepseek_v3")
    assert V3(deepseek, Settings(ctx=4096), (1, 4, 2)).flaw(2) is not None
    assert V3(deepseek, Settings(ctx=4096), (1, 6, 5)).flaw(2) is None
    gemma = replace(models("exl2"), architecture="gemma2")
    assert "gemma2" in (V2(gemma, Settings(ctx=4096)).flaw(2) or "")


def test_ranks_of_unequal_cards_are_told_equal_parts(models: Models, tmp_path: Path) -> None:
    adapter, rig = ADAPTERS["exl3"], _free(24, 22)
    job = adapter.job(models("exl3", "70B"), Request(), adapter.assumed())
    layout = Layout(gpus=(0, 1), counts=(81, 81), shape=Shape(n_devices=2, mode="tensor"))
    first, second = config_of(job.command(layout, rig, HERE), tmp_path)["model"]["gpu_split"]
    assert first == second < 22


# Cards.


def _uuid(number: int) -> str:
    return f"GPU-0000000{number}-1111-2222-3333-444444444444"


def test_cards_by_uuid_for_v3_and_by_number_for_v2(models: Models) -> None:
    gpus = tuple(card(index, 24, 936, uuid=_uuid(index)) for index in range(3))
    for format_, expected in (("exl3", _uuid(2)), ("exl2", "2")):
        _, command, _ = decide(models(format_), rig_of(gpus[2]))
        assert command.env["CUDA_VISIBLE_DEVICES"] == expected
    # An Intel card before it does not count; a hidden NVIDIA card does.
    intel = replace(card(0, 8, 256, name="Intel Arc"), vendor="intel")
    adapter = ADAPTERS["exl2"]
    job = adapter.job(models("exl2"), Request(), adapter.assumed())
    layout = Layout(gpus=(2,), counts=(33,), shape=Shape(n_devices=1))
    assert job.command(layout, rig_of(intel, gpus[2]), HERE).env["CUDA_VISIBLE_DEVICES"] == "1"


@pytest.mark.parametrize(
    ("gpu", "words"),
    [
        (card(0, 24, 347, name="Tesla P40", compute_capability="6.1"), "8.0, and this is 6.1"),
        (replace(card(0, 24, 960, name="AMD Radeon RX 7900 XTX"), vendor="amd"), "NVIDIA"),
    ],
)
def test_cards_without_kernels_are_refused(models: Models, gpu: Gpu, words: str) -> None:
    for format_ in ("exl2", "exl3"):
        with pytest.raises(RefusedError, match=words):
            decide(models(format_), rig_of(gpu))


# The file.


@pytest.mark.parametrize("text", ['a "b" \\c', "naïve — ✓", "tab\tand\nnewline", "\x7f\x85\u2028", "#: {}[]"])
def test_strings_are_one_line_and_read_back(text: str) -> None:
    import ast

    assert quoted(text).isprintable()
    assert ast.literal_eval(quoted(text)) == text


def test_a_path_that_is_no_text_is_refused() -> None:
    with pytest.raises(BadModelError, match="no text"):
        quoted("/models/\udcff")


def test_an_address_for_everybody_is_asked_by_loopback(models: Models) -> None:
    _, command, _ = decide(models("exl3"), "3090", Endpoint(host="0.0.0.0", port=9))
    assert command.ready_url == "http://127.0.0.1:9/health"
    _, command, _ = decide(models("exl3"), "3090", Endpoint(host="::", port=9))
    assert command.endpoint == "http://[::1]:9/v1"


def test_the_line_to_paste_is_one_line(models: Models) -> None:
    _, command, _ = decide(models("exl3"), "3090")
    line = shell_line(command, ("TABBY_MODEL_CACHE_MODE",))
    assert "\n" not in line
    assert line.startswith('( cd "$(mktemp -d)" && printf')
    assert "exec env -u TABBY_MODEL_CACHE_MODE CUDA_DEVICE_ORDER=PCI_BUS_ID" in line
    assert line.endswith("--config config.yml )")


def test_options_after_the_dashes_are_in_the_file(models: Models, tmp_path: Path) -> None:
    words = ("--chunk-size", "1024", "--vision", "true", "--draft-model-name", "small", "--max-batch-size", "3")
    _, command, _ = decide(models("exl3"), "3090", runtime_args=words)
    config = config_of(command, tmp_path)
    assert config["model"]["chunk_size"] == 1024
    assert config["model"]["vision"] is True
    assert (config["model"]["max_batch_size"], config["model"]["cache_size"]) == (3, 3 * 8192)
    assert config["draft_model"] == {"draft_model_name": "small"}


def test_a_smaller_chunk_takes_less(models: Models) -> None:
    for format_, adapter in ADAPTERS.items():
        small, usual = (
            adapter.job(models(format_), Request(runtime_args=words), adapter.assumed())
            for words in (("--chunk-size=512",), ())
        )
        gpu, shape, span = card(0, 24, 936), Shape(n_devices=1), range(usual.n_units)
        assert usual.device(span, shape, gpu).compute - small.device(span, shape, gpu).compute > 16 * MIB
