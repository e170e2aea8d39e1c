"""Two replicas of a real model in a real llama-server, behind a real nginx."""

from __future__ import annotations

import http.client
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from itertools import pairwise
from pathlib import Path

import psutil
import pytest

pytestmark = pytest.mark.runtime

HERE = Path(__file__).parent
NGINX = shutil.which("nginx", path=f"{os.environ.get('PATH', '')}{os.pathsep}/usr/sbin{os.pathsep}/usr/local/sbin")

#: Compiled shaders, which outlive a test: without them, software Vulkan is busy for a minute and a half.
SHADERS = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))


class Running:
    """Two replicas on the CPU, ready. `port` is the proxy's."""

    def __init__(self, process: subprocess.Popen[bytes], directory: Path) -> None:
        self.process = process
        self.err = directory / "err"
        self.logs = [directory / f"log-{place}" for place in range(2)]
        until(lambda: "ready: " in self.err.read_text() or process.poll() is not None)
        assert process.poll() is None, self.err.read_text()
        self.port = int(re.findall(r"ready: http://127\.0\.0\.1:(\d+)/v1", self.err.read_text())[0])
        self.children = psutil.Process(process.pid).children(recursive=True)

    def generated(self) -> list[int]:
        """How many answers each replica has logged; it does so in a thread of its own."""
        return [log.read_text(errors="replace").count("prompt eval time") for log in self.logs]

    def stream(self) -> list[float]:
        """When each piece of an answer came."""
        times = []
        body = json.dumps({"prompt": "Water boils at", "n_predict": 64, "stream": True, "ignore_eos": True})
        with closing(http.client.HTTPConnection("127.0.0.1", self.port, timeout=120)) as connection:
            connection.request("POST", "/completion", body)
            with connection.getresponse() as response:
                assert response.status == 200
                while line := response.readline():
                    if line.startswith(b"data:"):
                        times.append(time.monotonic())
        return times


@pytest.fixture
def running(tmp_path: Path, python_path: str, llama_server: str, real_gguf: Path) -> Iterator[Callable[[], Running]]:
    if NGINX is None:
        pytest.skip("no nginx: apt-get install nginx-light")
    server = (llama_server, "--model", str(real_gguf), "--device", "none", "--ctx-size", "512", "--port", "{port}")
    with ExitStack() as stack:

        def start() -> Running:
            with (tmp_path / "err").open("w") as err:
                process = subprocess.Popen(
                    [sys.executable, str(HERE / "fleet_driver.py"), str(tmp_path), "--", *server, "-lv", "4"],
                    env={**os.environ, "PYTHONPATH": python_path, "MGPU_PROXY": "nginx"},
                    stderr=err,
                )
            stack.callback(process.wait)
            stack.callback(process.kill)
            return Running(process, tmp_path)

        yield start


def until(condition: Callable[[], bool], seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "not in time"
        time.sleep(0.1)


def test_both_answer_in_pieces_and_the_death_of_one_ends_all(running: Callable[[], Running]) -> None:
    run = running()
    assert sorted(child.name() for child in run.children) == ["llama-server", "llama-server", "nginx"]
    answers: list[list[float]] = []
    readers = [threading.Thread(target=lambda: answers.append(run.stream())) for _ in range(2)]
    for reader in readers:
        reader.start()
    for reader in readers:
        reader.join(100)
    assert all(len(times) >= 64 for times in answers)
    gaps = [sum(late - early > 0.0005 for early, late in pairwise(times)) for times in answers]
    assert min(gaps) > 40  # one by one, not all at the end
    until(lambda: min(run.generated()) >= 2, 10)  # the token that proved it, and a person's question

    next(child for child in run.children if child.name() == "llama-server").kill()
    assert run.process.wait(30) == 7
    assert "llama-server on GPU 0 was killed by SIGKILL" in run.err.read_text()
    assert psutil.wait_procs(run.children, timeout=10)[1] == []


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGKILL, -9)])
def test_stopped_nothing_is_left(running: Callable[[], Running], number: signal.Signals, code: int) -> None:
    run = running()
    run.process.send_signal(number)
    assert run.process.wait(30) == code
    until(lambda: not any(alive(child) for child in run.children), 30)


def alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


@pytest.mark.vulkan
def test_each_is_placed_as_planned(
    python_path: str, llama_server: str, real_gguf: Path, two_vulkan_devices: dict[str, str]
) -> None:
    """On two software Vulkan devices, through all that `mgpu run` does after the decision."""
    own = {"PYTHONPATH": python_path, "MGPU_LLAMA_SERVER": llama_server, "MESA_SHADER_CACHE_DIR": str(SHADERS)}
    done = subprocess.run(
        [sys.executable, str(HERE / "replicas_driver.py"), str(real_gguf), "Water boils at"],
        env={**os.environ, **own, **two_vulkan_devices},
        capture_output=True,
        text=True,
        timeout=550,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "100 degrees" in done.stdout
    assert "warning" not in done.stderr
    kept = (Path(os.environ["XDG_STATE_HOME"]) / "mgpu" / "measured.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in kept]
    assert [record["devices"][0]["device"] for record in records] == ["Vulkan0", "Vulkan1"]
    for record in records:
        device = record["devices"][0]
        assert sum(device["reported"].values()) == pytest.approx(sum(device["planned"].values()), rel=0.02)
