"""Tensor mode on two real devices: what llama-server's log says it holds, against the plan, and that it answers."""

from __future__ import annotations

import json
import os
import subprocess
import urllib.request
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from mgpu.adapter import Buffer, Command, Endpoint
from mgpu.gather import Facts, gather
from mgpu.inspect.source import read_model
from mgpu.launch.ports import free_port
from mgpu.plan import DeviceBytes, Layout, Shape
from mgpu.request import Request
from mgpu.units import MIB
from mgpu_adapters.llamacpp.adapter import LlamaCpp
from mgpu_adapters.llamacpp.job import LlamaJob
from mgpu_adapters.llamacpp.log import read_line
from mgpu_adapters.llamacpp.shortage import RANKS
from tensor_models import write_model

pytestmark = pytest.mark.vulkan

RANKS_OF_TWO = Shape(n_devices=2, mode="tensor")


@pytest.fixture
def cards(llama_server: str, two_vulkan_devices: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> Facts:
    """This machine with two devices, as `mgpu run` finds it."""
    for name, value in two_vulkan_devices.items():
        monkeypatch.setenv(name, value)
    return gather(LlamaCpp(), rig_name=None, launching=True, explicit=llama_server, environ=os.environ)


def job_of(cards: Facts, model: Path, *arguments: str, **asked: Any) -> LlamaJob:
    job = cards.adapter.job(read_model(str(model)), Request(runtime_args=arguments, **asked), cards.installed)
    assert isinstance(job, LlamaJob)
    return job


def command_of(cards: Facts, job: LlamaJob) -> Command:
    layout = Layout(gpus=(0, 1), counts=(job.n_units,) * 2, shape=RANKS_OF_TWO)
    return job.command(layout, cards.rig, Endpoint(host="127.0.0.1", port=free_port("127.0.0.1")))


def started(command: Command) -> subprocess.Popen[str]:
    argv = (*command.argv, *command.watch_argv, "--no-warmup")
    env = {**os.environ, **command.env, "GGML_NO_BACKTRACE": "1"}  # else gdb takes its time
    return subprocess.Popen(argv, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def ranks_in(lines: Iterable[str]) -> DeviceBytes:
    """Bytes of the largest rank as the log says them, to hundredths of a MiB."""
    sums = {"weights": 0, "kv": 0, "compute": 0}
    seen = []
    for line in lines:
        seen.append(line)
        fact = read_line(line)
        if isinstance(fact, Buffer) and fact.device == RANKS:
            sums[fact.kind] += fact.n_bytes
        if "reserve took" in line:
            return DeviceBytes(**sums, overhead=0)
    pytest.fail("it ended before it had its buffers:\n" + "".join(seen[-20:]))


@pytest.mark.parametrize(
    ("asked", "arguments"),
    [
        pytest.param({"ctx": 4096}, (), id="4096"),
        pytest.param({"ctx": 20000, "kv_type": "q8_0"}, (), id="q8_0"),
        pytest.param({"ctx": 1000, "users": 3}, ("-ub", "128"), id="three users"),
    ],
)
def test_the_real_model_loads_as_planned(
    cards: Facts, real_gguf: Path, asked: dict[str, Any], arguments: tuple[str, ...]
) -> None:
    """Only loads: it has one KV head with a norm, and would abort at its first token."""
    job = job_of(cards, real_gguf, *arguments, **asked)
    assert "one KV head" in (job.why_not_tensor(cards.rig.gpus) or "")
    planned = job.device(range(job.n_units), RANKS_OF_TWO, cards.rig.gpus[0])
    with started(command_of(cards, job)) as server:
        assert server.stdout is not None
        real = ranks_in(server.stdout)
        server.kill()
    for kind in ("weights", "kv", "compute"):
        assert getattr(planned, kind) / MIB == pytest.approx(getattr(real, kind) / MIB, abs=0.011), kind


def test_ranks_answer(cards: Facts, tmp_path: Path) -> None:
    job = job_of(cards, write_model("qwen3", tmp_path / "m.gguf"), ctx=1024)
    assert job.why_not_tensor(cards.rig.gpus) is None
    command = command_of(cards, job)
    planned = job.device(range(job.n_units), RANKS_OF_TWO, cards.rig.gpus[0])
    with started(command) as server:
        assert server.stdout is not None
        real = ranks_in(server.stdout)
        assert planned.weights / MIB == pytest.approx(real.weights / MIB, abs=0.011)
        assert any("listening on" in line for line in server.stdout)
        assert answer(command) == 3
        server.kill()


def answer(command: Command) -> int:
    """Tokens generated after a prompt of five."""
    body = json.dumps({"prompt": [1, 2, 3, 4, 5], "n_predict": 3, "ignore_eos": True}).encode()
    url = command.ready_url.replace("/health", "/completion")
    request = urllib.request.Request(url, data=body, headers={"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=300) as response:
        return int(json.load(response)["tokens_predicted"])


def test_a_server_that_aborts_says_so(cards: Facts, tmp_path: Path) -> None:
    """The reason why `why_not_tensor` refuses one KV head with a norm: it is still so in this build."""
    job = job_of(cards, write_model("qwen3_mqa", tmp_path / "m.gguf"), ctx=1024)
    assert job.why_not_tensor(cards.rig.gpus) is not None
    command = replace(command_of(cards, job), watch_argv=("-lv", "4"))
    causes = []
    with started(command) as server:
        assert server.stdout is not None
        for line in server.stdout:
            if "listening on" in line:
                with pytest.raises(OSError, match=r"closed|reset"):
                    answer(command)
            causes.append(read_line(line))
    assert server.returncode
    assert any("tensor mode" in getattr(cause, "text", "") for cause in causes)
