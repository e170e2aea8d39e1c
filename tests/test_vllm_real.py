"""Real vLLM, built for the CPU, under `mgpu run`: one rank, two tensor ranks, two uneven stages; `make test-vllm`.

One at a time: each takes half a minute to import and some 2.5 GB of RAM.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from conftest import Mgpu
from mgpu.launch.find import find_runtime
from mgpu.launch.ports import free_port
from mgpu_adapters.vllm.adapter import Vllm
from tiny_llama import write_tiny

pytestmark = pytest.mark.vllm

_READY_S = 300.0
_STOP_S = 30.0
_PROMPT = "hello world this is"


@pytest.fixture(scope="module")
def vllm() -> str:
    """A real vLLM for the CPU, or a skip that says how to get it."""
    found = find_runtime(Vllm.search, explicit=None, environ=os.environ)
    if found is None:
        pytest.skip("no vllm: set MGPU_VLLM to one built for the CPU, or run `make test-vllm`")
    return found.executable


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("models") / "tiny")


class Running:
    """`mgpu run` in the background."""

    def __init__(self, process: subprocess.Popen[str], port: int, log: Path) -> None:
        self.process = process
        self.port = port
        self._log = log

    @property
    def said(self) -> str:
        return self._log.read_text(encoding="utf-8")

    def wait_ready(self) -> None:
        deadline = time.monotonic() + _READY_S
        while "ready after" not in self.said:
            assert self.process.poll() is None, self.said
            assert time.monotonic() < deadline, self.said
            time.sleep(0.2)

    def complete(self) -> dict[str, Any]:
        body = {"prompt": _PROMPT, "max_tokens": 12, "temperature": 0, "ignore_eos": True, "return_token_ids": True}
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}/v1/completions",
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=60) as response:
            answer: dict[str, Any] = json.load(response)
            return answer

    def children(self, name: str = "") -> list[psutil.Process]:
        family = psutil.Process(self.process.pid).children(recursive=True)
        return [process for process in family if name in " ".join(process.cmdline())]

    def wait(self) -> int:
        return self.process.wait(_STOP_S)


@pytest.fixture
def running(vllm: str, tiny: Path, python_path: str, tmp_path: Path) -> Iterator[Callable[..., Running]]:
    """`running("-tp", "2")`: mgpu with vLLM, started. What is left of it in the end is a failure, and removed."""
    started: list[Running] = []
    before = _leftovers()

    def start(*arguments: str) -> Running:
        port = free_port("127.0.0.1", wanted=None, start=8200)
        log = tmp_path / f"{port}.err"
        env = {**os.environ, "PYTHONPATH": python_path, "MGPU_VLLM": vllm, "HF_HUB_OFFLINE": "1"}
        command = [sys.executable, "-m", "mgpu", "run", str(tiny), "--runtime", "vllm", "--ctx", "512"]
        with log.open("w") as err:
            process = subprocess.Popen(
                [*command, "--port", str(port), "--", *arguments],
                env=env | {"VLLM_NO_USAGE_STATS": "1", "VLLM_PP_LAYER_PARTITION": "1,1,1,1"},  # ours counts, not this
                stderr=err,
                text=True,
            )
        started.append(Running(process, port, log))
        return started[-1]

    yield start
    for each in started:
        if each.process.poll() is None:
            for child in each.children():
                child.kill()
            each.process.kill()
            each.process.wait()
    left = _leftovers() - before
    for path in left:
        path.unlink()
    assert not left


def _leftovers() -> set[Path]:
    names = ("psm_", "sem.mp-", "vllm_dist_")
    places = (Path("/dev/shm"), Path(tempfile.gettempdir()))
    return {path for place in places if place.is_dir() for path in place.iterdir() if path.name.startswith(names)}


@pytest.fixture(scope="module")
def reference() -> dict[str, list[int]]:
    """What one rank answered, for the others to be compared with."""
    return {}


def _alive(family: list[psutil.Process]) -> list[psutil.Process]:
    """Those that run; a zombie waits for init, which a container may not have."""
    running = [process for process in family if process.is_running()]
    return [process for process in running if process.status() != psutil.STATUS_ZOMBIE]


def _tokens(answer: dict[str, Any]) -> list[int]:
    tokens: list[int] = answer["choices"][0]["token_ids"]
    assert len(tokens) == 12
    return tokens


def test_one_rank_answers_and_stops_with_ctrl_c(
    running: Callable[..., Running], reference: dict[str, list[int]]
) -> None:
    one = running("--enforce-eager")
    one.wait_ready()
    answer = one.complete()
    reference["tokens"] = _tokens(answer)
    assert re.fullmatch(r"vllm-[\d.]+-[0-9a-f]{8}", answer["system_fingerprint"])
    family = one.children()
    one.process.send_signal(signal.SIGINT)
    assert one.wait() == 130
    assert not _alive(family)


def test_two_tensor_ranks_answer_the_same_and_a_killed_one_is_a_failure(
    running: Callable[..., Running], reference: dict[str, list[int]]
) -> None:
    two = running("-tp", "2", "--enforce-eager")
    two.wait_ready()
    answer = two.complete()
    assert "-tp2-" in answer["system_fingerprint"]
    if reference:
        assert _tokens(answer) == reference["tokens"]
    (worker,) = two.children("Worker_TP1")
    family = two.children()
    worker.kill()
    assert two.wait() == 7
    assert "a worker of vLLM was killed, or crashed" in two.said
    assert not _alive(family)


def test_two_uneven_stages_answer_the_same_and_leave_nothing_when_killed(
    running: Callable[..., Running], reference: dict[str, list[int]]
) -> None:
    stages = running("-pp", "2")
    stages.wait_ready()
    assert "2 stages (3 + 1 layers)" in stages.said
    assert len(stages.children("Worker_PP")) == 2
    (server,) = stages.children("bin/vllm serve")  # the others write their names over their environment
    assert server.environ()["VLLM_PP_LAYER_PARTITION"] == "3,1"
    answer = stages.complete()
    assert "-pp2-" in answer["system_fingerprint"]
    if reference:
        assert _tokens(answer) == reference["tokens"]
    family = stages.children()
    assert _leftovers()
    for _ in range(2):  # the second kills at once: nobody tidies up after himself
        stages.process.send_signal(signal.SIGTERM)
        time.sleep(0.05)
    assert stages.wait() == 130
    assert not _alive(family)


def test_a_flag_it_does_not_know_is_the_cause(mgpu: Mgpu, vllm: str, tiny: Path) -> None:
    env = {"MGPU_VLLM": vllm, "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
    done = mgpu("run", str(tiny), "--runtime", "vllm", "--", "--swap-space", "4", env=env, timeout=_READY_S)
    assert done.returncode == 7
    assert "this vLLM does not know --swap-space 4" in done.stderr
