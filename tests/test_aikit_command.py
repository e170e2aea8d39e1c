"""AIKit's command lines: one card, two equal, mixed, many users."""

from __future__ import annotations

from typing import Any

import pytest
from msgspec.structs import replace

from mgpu.adapter import Command, Endpoint
from mgpu.decide.choose import choose
from mgpu.decide.replicas import commands_at, replicas_of
from mgpu.errors import BadModelError, RefusedError, UsageError
from mgpu.model import Model
from mgpu.plan import Layout, Shape
from mgpu.request import Request
from mgpu.rig import Rig
from mgpu_adapters.aikit.adapter import AIKit
from mgpu_adapters.aikit.container import mounted
from planning import card, rig_named, rig_of
from vllm_models import dense

LLAMA = dense()
NEMO = dense(layers=40, n_embd=5120, n_vocab=131072)  # 12 B: no 24 GiB card holds it in 16 bits
HERE = Endpoint(host="127.0.0.1", port=8080)


def commands_of(model: Model, rig: Rig | str, *arguments: str, **asked: Any) -> tuple[Command, ...]:
    rig = rig_named(rig) if isinstance(rig, str) else rig
    adapter, request = AIKit(), Request(runtime="aikit", runtime_args=arguments, **asked)
    job = adapter.job(model, request, adapter.assumed())
    plan = choose(request, rig, job)
    assert plan.refusal is None
    assert plan.runtime == "aikit"
    job = job.at_ctx(plan.ctx)
    replicas = replicas_of(plan, job, rig)
    if replicas:
        return commands_at(replicas, range(8080, 8080 + len(replicas)), host="127.0.0.1", api_key=None)
    return (job.command(plan.layout, rig, HERE),)


def line(gpus: str, variables: str, flags: str, port: int = 8080) -> str:
    """What all have in common."""
    return (
        f'docker run --rm --init --name mgpu-aikit-{port} --gpus "device={gpus}" --shm-size 10.24g '
        f"--publish 127.0.0.1:{port}:8000 --mount type=bind,source=/models/m,target=/models/m,readonly "
        f"--env HF_HUB_OFFLINE=1 --env CUDA_DEVICE_ORDER=PCI_BUS_ID {variables} razerofficial/aikit:latest "
        f"vllm serve /models/m --host 0.0.0.0 --port 8000 {flags}"
    )


def test_one_card() -> None:
    (command,) = commands_of(LLAMA, "3090")
    assert " ".join(command.argv) == line(
        "0",
        "--env CUDA_VISIBLE_DEVICES=0",
        "--tensor-parallel-size 1 --pipeline-parallel-size 1 --max-model-len 8192 --max-num-seqs 1 "
        "--max-num-batched-tokens 2048 --kv-cache-dtype auto --gpu-memory-utilization 0.9200",
    )
    assert command.env == {}
    assert command.files == {}
    assert (command.ready_url, command.endpoint) == ("http://127.0.0.1:8080/health", "http://127.0.0.1:8080/v1")
    assert command.after == ("docker", "rm", "--force", "mgpu-aikit-8080")
    assert command.elsewhere


def test_two_equal_cards() -> None:
    (command,) = commands_of(NEMO, "2x3090-nvlink")
    assert " ".join(command.argv) == line(
        "0,1",
        "--env CUDA_VISIBLE_DEVICES=0,1",
        "--tensor-parallel-size 2 --pipeline-parallel-size 1 --max-model-len 8192 --max-num-seqs 1 "
        "--max-num-batched-tokens 2048 --kv-cache-dtype auto --gpu-memory-utilization 0.9200",
    )


def test_mixed_cards() -> None:
    (command,) = commands_of(NEMO, "3090+3060", "--enforce-eager")
    text = " ".join(command.argv)
    assert "--env CUDA_VISIBLE_DEVICES=0,1 --env VLLM_PP_LAYER_PARTITION=" in text
    assert "--tensor-parallel-size 1 --pipeline-parallel-size 2" in text
    assert command.argv[-1] == "--enforce-eager"
    (partition,) = [word for word in command.argv if word.startswith("VLLM_PP_LAYER_PARTITION=")]
    first, second = (int(count) for count in partition.partition("=")[2].split(","))
    assert first + second == 40
    assert first > second


def test_many_users_get_a_container_on_each_card() -> None:
    first, second = commands_of(LLAMA, "2x3090", users=4)
    flags = (
        "--tensor-parallel-size 1 --pipeline-parallel-size 1 --max-model-len 8192 --max-num-seqs 2 "
        "--max-num-batched-tokens 2048 --kv-cache-dtype auto --gpu-memory-utilization 0.9200"
    )
    assert " ".join(first.argv) == line("0", "--env CUDA_VISIBLE_DEVICES=0", flags)
    assert " ".join(second.argv) == line("1", "--env CUDA_VISIBLE_DEVICES=0", flags, port=8081)


def command_at(rig: Rig, *gpus: int, endpoint: Endpoint = HERE, model: Model = LLAMA) -> Command:
    adapter = AIKit()
    job = adapter.job(model, Request(runtime="aikit"), adapter.assumed())
    counts = (job.n_units - len(gpus) + 1, *(1 for _ in gpus[1:]))
    return job.command(Layout(gpus=gpus, counts=counts, shape=Shape(n_devices=len(gpus))), rig, endpoint)


def test_the_order_is_said_inside_where_cards_are_numbered_anew() -> None:
    cards = [card(n, 24, 936, uuid=f"GPU-0000000{n}-1111-2222-3333-444444444444") for n in range(4)]
    argv = command_at(rig_of(*cards), 3, 1).argv
    uuids = f"{cards[3].uuid},{cards[1].uuid}"
    assert argv[argv.index("--gpus") + 1] == f'"device={uuids}"'
    assert "CUDA_VISIBLE_DEVICES=1,0" in argv


def test_a_key_is_in_no_argument() -> None:
    command = command_at(rig_named("3090"), 0, endpoint=Endpoint(host="::1", port=8080, api_key="s3cret"))
    assert "s3cret" not in " ".join(command.argv)
    assert command.env == {"VLLM_API_KEY": "s3cret"}
    assert command.argv[command.argv.index("VLLM_API_KEY") - 1] == "--env"
    assert command.argv[command.argv.index("--publish") + 1] == "[::1]:8080:8000"


def test_what_does_not_fit_and_what_is_no_safetensors() -> None:
    adapter, request = AIKit(), Request(runtime="aikit")
    large = dense(layers=80, n_embd=8192, n_ff=28672, heads=64)  # 70 B in 16 bits
    plan = choose(request, rig_named("2x3090"), adapter.job(large, request, adapter.assumed()))
    assert plan.refusal is not None
    assert plan.refusal.exit_code == 5
    with pytest.raises(BadModelError, match="no GGUF"):
        adapter.job(replace(LLAMA, format="gguf"), request, adapter.assumed())


def test_a_name_is_no_address() -> None:
    argv = command_at(rig_named("3090"), 0, endpoint=Endpoint(host="localhost", port=9)).argv
    assert argv[argv.index("--publish") + 1] == "127.0.0.1:9:8000"
    with pytest.raises(UsageError, match="--host example"):
        command_at(rig_named("3090"), 0, endpoint=Endpoint(host="example.org", port=8080))


def test_cards_of_others_are_refused() -> None:
    with pytest.raises(RefusedError, match="NVIDIA cards only"):
        command_at(rig_of(replace(card(0, 24, 960), vendor="amd", name="AMD Radeon RX 7900 XTX")), 0)


@pytest.mark.parametrize(
    ("path", "source", "target", "inside"),
    [
        ("/models/m", "/models/m", "/models/m", "/models/m"),
        ("/home/me/a b/", "/home/me/a b", "/models/a b", "/models/a b"),
        (
            "/c/hub/models--org--m/snapshots/0123abc",
            "/c/hub/models--org--m",
            "/models/models--org--m",
            "/models/models--org--m/snapshots/0123abc",
        ),
    ],
)
def test_links_of_the_hugging_face_cache_stay_whole(path: str, source: str, target: str, inside: str) -> None:
    assert mounted(path) == ((source, target), inside)


def test_a_path_with_commas_is_quoted() -> None:
    argv = command_at(rig_named("3090"), 0, model=replace(LLAMA, path="/models/a,b")).argv
    assert argv[argv.index("--mount") + 1] == 'type=bind,"source=/models/a,b","target=/models/a,b",readonly'
