"""Ollama: what it is found to be, how it is held to plans, and the command lines."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from mgpu.adapter import Command, Endpoint, Installed, Probe
from mgpu.decide.choose import choose
from mgpu.errors import BadModelError, RuntimeFailedError, RuntimeMissingError, UsageError
from mgpu.model import Model
from mgpu.plan import Layout, Plan, Shape
from mgpu.report.lines import shell_line
from mgpu.request import Request
from mgpu.rig import Rig
from mgpu.service import Answer, Call, Digest, Space
from mgpu_adapters.llamacpp.adapter import LlamaCpp
from mgpu_adapters.ollama.adapter import Ollama
from mgpu_adapters.ollama.estimate import MINIMUM_MEMORY
from mgpu_adapters.ollama.hold import Asked, hold
from mgpu_adapters.ollama.job import OllamaJob
from mgpu_adapters.ollama.names import name_of
from mgpu_adapters.ollama.parameters import read_arguments
from mgpu_adapters.ollama.server import Found, era_of
from planning import card, read, rig_named, rig_of
from vllm_models import dense

Header = Callable[[str], Path]

SMALL = "Llama-3.1-8B-Instruct-Q4_K_M"
LARGE = "Llama-3.3-70B-Instruct-Q4_K_M"
MIXED = "Qwen3-30B-A3B-Q4_K_M"
HERE = Endpoint(host="127.0.0.1", port=8080)
URL = "http://127.0.0.1:11434"
STORE = "/models"


def found(version: str = "0.33.0", *, url: str = "", executable: str = "ollama") -> Found:
    return Found(
        runtime="ollama",
        executable=executable,
        origin="PATH",
        version=version,
        flags=frozenset(),
        url=url,
    )


def only_running(version: str = "0.33.0") -> Found:
    return found(version, url=URL, executable=URL)


def stored(path: Path, name: str = "llama3.1:8b") -> Model:
    """The model as it is read by its name in a store."""
    model = read(str(path))
    blob = f"{STORE}/blobs/sha256-{'a' * 64}"
    return replace(model, path=blob, files=(replace(model.files[0], path=blob),), alias=name)


def planned(
    model: Model, rig: Rig | str, installed: Installed, *arguments: str, **asked: Any
) -> tuple[Plan, OllamaJob, Rig]:
    rig = rig_named(rig) if isinstance(rig, str) else rig
    request = Request(runtime="ollama", runtime_args=arguments, **asked)
    job = Ollama().job(model, request, installed)
    plan = choose(request, rig, job)
    at = job.at_ctx(plan.ctx)
    assert isinstance(at, OllamaJob)
    assert plan.refusal is None
    assert plan.runtime == "ollama"
    return plan, at, rig


def command_of(model: Model, rig: Rig | str, installed: Installed, *arguments: str, **asked: Any) -> Command:
    plan, job, rig = planned(model, rig, installed, *arguments, **asked)
    return job.command(plan.layout, rig, HERE)


def parameters_of(command: Command) -> dict[str, Any]:
    """Of the model that a person would create by hand."""
    text = command.argv[-1] if command.argv[0] == "sh" else " && ".join(command.then)
    words = shlex.split(text)
    body = json.loads(words[words.index("-d") + 1])
    parameters: dict[str, Any] = body["parameters"]
    return parameters


# What is found.


@pytest.mark.parametrize(
    ("text", "version"),
    [
        ("Warning: could not connect to a running Ollama instance\nWarning: client version is 0.9.0\n", "0.9.0"),
        ("ollama version is 0.30.6\n", "0.30.6"),
        ("ollama version is 0.33.0-rc2\n", "0.33.0-rc2"),
        ("ollama version is 0.33.0\nWarning: client version is 0.32.15\n", "0.33.0"),
        ("ollama version is 0.0.0\n", "0.33.0"),
    ],
)
def test_its_version(text: str, version: str) -> None:
    installed = Ollama().installed(Probe(executable="/bin/ollama", origin="PATH", outputs={"--version": text}))
    assert (installed.version, installed.url, installed.executable) == (version, "", "/bin/ollama")


def test_the_running_one_counts() -> None:
    outputs = {"--version": "Warning: client version is 0.9.0", "/api/version": '{"version":"0.31.0"}'}
    installed = Ollama().installed(Probe(executable="/bin/ollama", origin="PATH", outputs=outputs, url=URL))
    assert isinstance(installed, Found)
    assert (installed.version, installed.url, installed.startable) == ("0.31.0", URL, True)
    alone = Ollama().installed(
        Probe(executable=URL, origin="running", outputs={"/api/version": '{"version":"0.24.0"}'}, url=URL)
    )
    assert isinstance(alone, Found)
    assert (alone.version, alone.startable) == ("0.24.0", False)


@pytest.mark.parametrize(
    ("outputs", "url", "words"),
    [
        ({"--version": "client version is 0.5.4"}, "", "0.5.4 is too old"),
        ({"--version": "hello"}, "", "does not say which version"),
        ({"/api/version": '"x"'}, URL, "is not Ollama"),
        ({"/api/version": "<html>"}, URL, "is not Ollama"),
        ({}, URL, "is not Ollama"),
        ({"/api/version": '{"version": "0.1.9"}'}, URL, "0.1.9 is too old"),
    ],
)
def test_what_cannot_be_used(outputs: dict[str, str], url: str, words: str) -> None:
    with pytest.raises(RuntimeMissingError, match=words):
        Ollama().installed(Probe(executable=url or "/bin/ollama", origin="PATH", outputs=outputs, url=url))


# What it takes.


def test_from_0_30_on_it_takes_what_llama_cpp_takes_with_its_batch(header: Header) -> None:
    model = read(str(header(SMALL)))
    request = Request(runtime_args=("-b", "512", "-ub", "512"))
    theirs = LlamaCpp().job(model, request, LlamaCpp().assumed())
    ours = Ollama().job(model, Request(), found())
    gpu = rig_named("3090").gpus[0]
    assert ours.device(range(ours.n_units), Shape(n_devices=1), gpu) == theirs.device(
        range(theirs.n_units), Shape(n_devices=1), gpu
    )


@pytest.mark.parametrize("version", ["0.9.0", "0.24.0"])
def test_before_its_own_estimate_counts(header: Header, version: str) -> None:
    model, gpu = read(str(header(SMALL))), rig_named("3090").gpus[0]
    old, new = (Ollama().job(model, Request(), found(each)) for each in (version, "0.33.0"))
    span, shape = range(old.n_units), Shape(n_devices=1)
    before, now = old.device(span, shape, gpu), new.device(span, shape, gpu)
    assert (before.weights, before.kv) == (now.weights, now.kv)
    assert before.overhead >= MINIMUM_MEMORY
    assert before.total > now.total


def test_one_user_at_a_time_for_some_models(header: Header) -> None:
    model = read(str(header("Qwen3-Next-80B-A3B-Instruct-Q4_K_M")))
    job = Ollama().job(model, Request(users=4), found())
    assert job.users == 1
    assert any("one user at a time" in warning for warning in job.warnings)
    assert Ollama().job(read(str(header(SMALL))), Request(users=4), found()).users == 4


@pytest.mark.parametrize(
    ("request_", "words"),
    [
        (Request(runtime_args=("-ngl", "9")), "means nothing to Ollama"),
        (Request(runtime_args=("num_ctx=9",)), "num_ctx after `--` would bypass mgpu"),
        (Request(api_key="k"), "asks nobody for a key"),
    ],
)
def test_what_it_has_no_option_for(header: Header, request_: Request, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        Ollama().job(read(str(header(SMALL))), request_, found())


def test_cache_types_before_0_30(header: Header) -> None:
    model = read(str(header(SMALL)))
    with pytest.raises(UsageError, match=r"Ollama 0\.9\.0 has none but f16"):
        Ollama().job(model, Request(kv_type="q5_1"), found("0.9.0"))
    assert Ollama().job(model, Request(kv_type="q5_1"), found()).kv_type == "q5_1"


def test_it_reads_gguf_alone() -> None:
    with pytest.raises(BadModelError, match="reads no safetensors"):
        Ollama().job(dense(), Request(), found())


@given(st.lists(st.text(max_size=12), max_size=4))
def test_any_arguments_are_parameters_or_refused(arguments: list[str]) -> None:
    try:
        found_ = read_arguments(tuple(arguments))
    except UsageError:
        return
    assert len(found_.parameters) <= len(arguments)


def test_parameters_by_type() -> None:
    given_ = read_arguments(("temperature=0.7", "seed=-3", "use_mmap=false", "stop=</s>", "--rm"))
    assert given_.parameters == {"temperature": 0.7, "seed": -3, "use_mmap": False, "stop": "</s>"}
    assert given_.removes


# A server of our own.


def test_one_card_of_our_own(header: Header) -> None:
    command = command_of(stored(header(SMALL)), "2x3090", found())
    assert shell_line(replace(command, then=())) == (
        "OLLAMA_HOST=127.0.0.1:8080 OLLAMA_MODELS=/models CUDA_DEVICE_ORDER=PCI_BUS_ID CUDA_VISIBLE_DEVICES=0 "
        "OLLAMA_CONTEXT_LENGTH=8192 OLLAMA_NUM_PARALLEL=1 OLLAMA_MAX_LOADED_MODELS=1 OLLAMA_KEEP_ALIVE=-1 "
        "OLLAMA_NOPRUNE=1 LLAMA_ARG_FIT=off LLAMA_ARG_N_GPU_LAYERS=33 ollama serve"
    )
    assert command.ready_url == "http://127.0.0.1:8080/api/version"
    assert command.endpoint == "http://127.0.0.1:8080/v1"
    assert command.attachment is not None
    assert command.attachment.endpoint == command.endpoint
    assert parameters_of(command) == {"num_ctx": 8192, "num_batch": 512, "num_gpu": 33}


@pytest.mark.parametrize(("rig", "name", "ctx"), [("2x3090", LARGE, 4096), ("3090+3060", "Qwen3-32B-Q6_K", 8192)])
def test_a_split_is_the_plans(header: Header, rig: str, name: str, ctx: int) -> None:
    plan, job, machine = planned(stored(header(name)), rig, found(), ctx=ctx)
    assert len(plan.layout.gpus) == 2
    env = job.command(plan.layout, machine, HERE).env
    assert env["LLAMA_ARG_TENSOR_SPLIT"] == ",".join(map(str, plan.layout.counts))
    assert env["OLLAMA_SCHED_SPREAD"] == "1"
    assert env["LLAMA_ARG_N_GPU_LAYERS"] == str(sum(plan.layout.counts))
    assert env["CUDA_VISIBLE_DEVICES"] == ",".join(map(str, plan.layout.gpus))


def test_users_and_cache_types_are_the_servers(header: Header) -> None:
    env = command_of(stored(header(SMALL)), "3090", found(), users=4, kv_type="q8_0").env
    assert (env["OLLAMA_NUM_PARALLEL"], env["OLLAMA_KV_CACHE_TYPE"], env["OLLAMA_FLASH_ATTENTION"]) == (
        "4",
        "q8_0",
        "1",
    )
    assert env["OLLAMA_CONTEXT_LENGTH"] == "8192"  # of each


def test_no_replicas(header: Header) -> None:
    plan, _, _ = planned(stored(header(SMALL)), "4x3090", found(), users=8)
    assert plan.placement != "replicas"


def test_experts_on_the_cpu(header: Header) -> None:
    plan, job, rig = planned(stored(header(MIXED)), "3060", found(), offload="allow")
    assert plan.layout.shape.host_experts > 0
    env = job.command(plan.layout, rig, HERE).env
    assert env["LLAMA_ARG_N_CPU_MOE"] == str(plan.layout.shape.host_experts)
    assert not Ollama().job(read(str(header(MIXED))), Request(), only_running()).has_experts


def test_tensor_ranks(header: Header) -> None:
    plan, job, rig = planned(stored(header(LARGE)), "2x3090-nvlink", found(), split="tensor", ctx=4096)
    assert plan.layout.shape.mode == "tensor"
    env = job.command(plan.layout, rig, HERE).env
    assert env["LLAMA_ARG_SPLIT_MODE"] == "tensor"
    assert env["LLAMA_ARG_FIT"] == "off"
    assert env["OLLAMA_SCHED_SPREAD"] == "1"
    assert "LLAMA_ARG_TENSOR_SPLIT" not in env
    gpus = rig.gpus
    assert "0.24.0 has no tensor ranks" in str(
        Ollama().job(stored(header(LARGE)), Request(), found("0.24.0")).why_not_tensor(gpus)
    )
    assert "cannot be told" in str(Ollama().job(stored(header(LARGE)), Request(), only_running()).why_not_tensor(gpus))


def test_before_0_30_there_is_no_llama_server_to_tell(header: Header) -> None:
    env = command_of(stored(header(SMALL)), "2x3090", found("0.24.0")).env
    assert not [name for name in env if name.startswith("LLAMA_ARG")]
    assert env["CUDA_VISIBLE_DEVICES"] == "0"


def test_nothing_of_the_callers_is_in_the_way(header: Header) -> None:
    command = command_of(stored(header(SMALL)), "3090", found())
    assert "LLAMA_ARG_TENSOR_SPLIT".startswith(command.scrub)
    assert "OLLAMA_SCHED_SPREAD".startswith(command.scrub)
    assert not "OLLAMA_MODELS".startswith(command.scrub)
    assert not "OLLAMA_LLM_LIBRARY".startswith(command.scrub)


# A server that runs.


def test_one_card_of_two_alike_is_pinned(header: Header) -> None:
    rig = rig_of(card(0, 20, 900, name="NVIDIA A"), card(1, 23, 900, name="NVIDIA A"))
    rig = replace(rig, gpus=tuple(replace(gpu, total_bytes=24 << 30) for gpu in rig.gpus))
    plan, job, rig = planned(stored(header(SMALL)), rig, found(url=URL))
    command = job.command(plan.layout, rig, HERE)
    assert plan.layout.gpus == (1,)
    assert parameters_of(command) == {"num_ctx": 8192, "num_batch": 512, "num_gpu": 33, "main_gpu": 1}
    attachment = job.attachment(plan.layout, rig)
    assert attachment is not None
    assert attachment.endpoint == f"{URL}/v1"
    assert attachment.model_name == json.loads(shlex.split(command.argv[-1])[4])["model"]


def test_a_lone_card_needs_no_number(header: Header) -> None:
    command = command_of(stored(header(SMALL)), "3090", found(url=URL))
    assert "main_gpu" not in parameters_of(command)
    assert command.argv[:2] == ("sh", "-c")


def test_by_hand_for_a_name(header: Header) -> None:
    command = command_of(stored(header(SMALL)), "3090", found(url=URL))
    create, preload = command.argv[-1].split(" && ")
    assert shlex.split(create)[:3] == ["curl", "-fsS", f"{URL}/api/create"]
    assert json.loads(shlex.split(create)[4])["from"] == "llama3.1:8b"
    assert json.loads(shlex.split(preload)[4])["keep_alive"] == -1


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"users": 4}, "OLLAMA_NUM_PARALLEL"),
        ({"kv_type": "q8_0"}, "OLLAMA_KV_CACHE_TYPE"),
        ({"port": 9000}, "--port"),
        ({"host": "0.0.0.0"}, "--host"),
    ],
)
def test_what_a_running_server_cannot_be_told(header: Header, asked: dict[str, Any], words: str) -> None:
    model = stored(header(SMALL))
    plan, job, rig = planned(model, "3090", found(url=URL), **asked)
    assert job.attachment(plan.layout, rig) is None  # one of our own
    plan, job, rig = planned(model, "3090", only_running(), **asked)
    attachment = job.attachment(plan.layout, rig)
    assert attachment is not None  # there is no other, and it is said
    assert any(words in told for told in attachment._wish.unheld)


def test_a_split_is_no_running_servers_matter(header: Header) -> None:
    plan, job, rig = planned(stored(header(LARGE)), "2x3090", found(url=URL), ctx=4096)
    assert len(plan.layout.gpus) == 2
    assert job.attachment(plan.layout, rig) is None


def test_unlike_cards_are_pinned_only_where_it_would_choose_the_same(header: Header) -> None:
    model = stored(header(SMALL))
    fast_first = rig_of(card(0, 24, 936, name="NVIDIA A"), card(1, 12, 360, name="NVIDIA B"))
    plan, job, rig = planned(model, fast_first, found(url=URL))
    assert plan.layout.gpus == (0,)  # the fastest, and the one with most free memory
    attachment = job.attachment(plan.layout, rig)
    assert attachment is not None
    assert "main_gpu" not in attachment._wish.parameters
    other = rig_of(card(0, 12, 936, name="NVIDIA A"), card(1, 24, 360, name="NVIDIA B"))
    plan, job, rig = planned(model, other, found(url=URL))
    assert plan.layout.gpus == (0,)  # the fastest; Ollama would take the other
    assert job.attachment(plan.layout, rig) is None


def test_before_0_30_what_it_would_do_unasked_must_do(header: Header) -> None:
    model, rig = stored(header(SMALL)), rig_named("2x3090")
    layout = Layout(gpus=(1,), counts=(33,), shape=Shape(n_devices=1))
    asked = Asked(model=model, version="0.24.0", era=era_of("0.24.0"), ctx=8192, users=1, kv_type="f16")
    held = hold(asked, layout, rig)
    assert held.main_gpu is None
    assert held.num_gpu is None
    assert held.unheld == ("it would use GPU 0, not GPU 1",)
    assert hold(asked, replace(layout, gpus=(0,)), rig).unheld == ()


def test_the_cpu_alone(header: Header) -> None:
    plan, job, rig = planned(stored(header(SMALL)), rig_of(), found(url=URL))
    attachment = job.attachment(plan.layout, rig)
    assert attachment is not None
    assert "num_gpu" not in attachment._wish.parameters
    held = hold(job._asked, plan.layout, rig_named("3090"))
    assert held.num_gpu == 0


def test_another_machine_is_said(header: Header) -> None:
    installed = replace(only_running(), url="http://big:11434", executable="http://big:11434")
    _, job, _ = planned(stored(header(SMALL)), "3090", installed)
    assert any("on another machine" in warning for warning in job.warnings)


# Names.


@given(st.text(min_size=1, max_size=100), st.dictionaries(st.sampled_from(["seed", "top_k"]), st.integers(0, 9)))
def test_names_are_ollamas(alias: str, parameters: dict[str, int]) -> None:
    import re

    model = replace(dense(), alias=alias)
    name = name_of(model, parameters)
    assert re.fullmatch(r"mgpu-[a-z0-9][a-z0-9._-]{0,70}:[0-9a-f]{8}", name)
    assert name == name_of(model, parameters)
    assert name != name_of(model, parameters | {"num_ctx": 1})


def test_a_local_file_is_imported_by_hand_too(header: Header) -> None:
    path = header(SMALL)
    command = command_of(read(str(path)), "3090", found(url=URL))
    text = command.argv[-1]
    assert f"sha256sum {path} | cut -c1-64" in text
    assert f"-T {path} {URL}/api/blobs/$d0" in text


# Talks without a server.


def begun(job: OllamaJob, plan: Plan, rig: Rig, free: int | None) -> list[str]:
    """What `begin` asks for up to its end, where the server has nothing and takes everything."""
    attachment = job.attachment(plan.layout, rig)
    assert attachment is not None
    talk, asked, answer = attachment.begin(), list[str](), None
    while True:
        one = talk.send(answer)
        answer = None
        if isinstance(one, Digest):
            answer = Answer(status=200, body="0" * 64)
        elif isinstance(one, Space):
            answer = Answer(status=200, body=free)
        elif isinstance(one, Call):
            asked.append(f"{one.method} {one.url.removeprefix(URL)}")
            answer = Answer(status=404)
            if one.upload is not None:
                talk.close()
                return asked


@pytest.mark.parametrize(("version", "times"), [("0.33.0", 2), ("0.24.0", 1)])
def test_an_import_needs_room(header: Header, version: str, times: int) -> None:
    model = read(str(header(SMALL)))
    plan, job, rig = planned(model, "3090", found(version, url=URL))
    needed = model.file_bytes * times
    with pytest.raises(RuntimeFailedError, match=r"takes .* in Ollama's store") as raised:
        begun(job, plan, rig, needed - 1)
    assert "--runtime llama.cpp" in raised.value.hint
    for enough in (needed, None):
        assert begun(job, plan, rig, enough)[-1].startswith("POST /api/blobs/sha256:")


def test_another_machines_disk_is_not_asked(header: Header) -> None:
    installed = replace(only_running(), url="http://big:11434", executable="http://big:11434")
    plan, job, rig = planned(read(str(header(SMALL))), "3090", installed)
    assert begun(job, plan, rig, 0)
