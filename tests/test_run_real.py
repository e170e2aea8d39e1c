"""`mgpu run` with a real llama-server and a real model: the main job, and the plan against the buffers it printed."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from conftest import Mgpu
from mgpu.adapter import Buffer
from mgpu.units import MIB
from mgpu_adapters.llamacpp.log import read_line

Start = Callable[..., "subprocess.Popen[str]"]


def _until(condition: Callable[[], Any], seconds: float = 120) -> Any:
    """The condition's first true value."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        value = condition()
        if value:
            return value
        time.sleep(0.05)
    pytest.fail(f"not within {seconds} s")


def _log() -> str:
    logs = sorted((Path(os.environ["XDG_STATE_HOME"]) / "mgpu" / "logs").glob("*.log"))
    return logs[-1].read_text(errors="replace") if logs else ""


@pytest.fixture
def start(python_path: str, llama_server: str) -> Iterator[Start]:
    """`start(*args, env=…)`: `mgpu` in the background; whatever the test does, nothing of it is left."""
    started: list[subprocess.Popen[str]] = []

    def call(*args: str, env: dict[str, str] | None = None) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-m", "mgpu", *args],
            env={**os.environ, "PYTHONPATH": python_path, "MGPU_LLAMA_SERVER": llama_server, **(env or {})},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        started.append(process)
        return process

    yield call
    for process in started:
        if process.poll() is None:
            process.kill()
        process.communicate()


@pytest.mark.runtime
def test_one_question_answered_and_nothing_left(mgpu: Mgpu, real_gguf: Path, llama_server: str, tmp_path: Path) -> None:
    model = tmp_path / "a model of this test.gguf"
    model.symlink_to(real_gguf)
    done = mgpu(
        "run", str(model), "--ctx", "512", "--prompt", "Water boils at", "--", "--temp", "0",
        env={"MGPU_LLAMA_SERVER": llama_server}, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "100 degrees" in done.stdout
    assert "on the CPU" in done.stderr
    assert "ready after" in done.stderr
    assert not [p for p in psutil.process_iter(["cmdline"]) if str(model) in (p.info["cmdline"] or [])]


@pytest.mark.runtime
def test_the_printed_line_starts_the_real_thing(mgpu: Mgpu, real_gguf: Path, llama_server: str, tmp_path: Path) -> None:
    line = mgpu("run", str(real_gguf), "--dry-run", "--ctx", "512", env={"MGPU_LLAMA_SERVER": llama_server}).stdout
    port = line.split("--port ")[1].split()[0]
    with (tmp_path / "log").open("w") as log:
        shell = subprocess.Popen(["sh", "-c", f"exec {line}"], stdout=log, stderr=log)
    try:

        def healthy() -> bool:
            assert shell.poll() is None, (tmp_path / "log").read_text()
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5) as answer:
                    return bool(answer.status == 200)
            except OSError:
                return False

        _until(healthy)
    finally:
        shell.kill()
        shell.wait()


@pytest.mark.runtime
@pytest.mark.parametrize("stage", ["loading", "serving"])
@pytest.mark.parametrize(
    ("signals", "code"),
    [
        pytest.param((signal.SIGINT,), 130, id="Ctrl-C"),
        pytest.param((signal.SIGINT, signal.SIGINT), 130, id="Ctrl-C twice"),
        pytest.param((signal.SIGTERM,), 130, id="SIGTERM"),
        pytest.param((signal.SIGHUP,), 130, id="closed terminal"),
        pytest.param((signal.SIGKILL,), -signal.SIGKILL, id="SIGKILL"),
    ],
)
def test_stopped_at_any_stage_nothing_is_left(
    start: Start, real_gguf: Path, stage: str, signals: tuple[signal.Signals, ...], code: int
) -> None:
    process = start("run", str(real_gguf), "--ctx", "512")
    _until(lambda: _children(process) if stage == "loading" else _serving(process))
    children = _children(process)
    ports = [c.laddr.port for child in children for c in child.net_connections() if c.status == psutil.CONN_LISTEN]
    for number in signals:
        process.send_signal(number)
        time.sleep(0.15)  # closer together they count as one
    assert process.wait(20) == code
    _until(lambda: not any(_alive(child) for child in children), 20)
    for port in ports:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(("127.0.0.1", port))


def _children(process: subprocess.Popen[str]) -> list[psutil.Process]:
    """The runtime's processes; the `--help` and `--list-devices` that come before are none."""
    found = psutil.Process(process.pid).children(recursive=True)
    return [child for child in found if "--model" in _words(child)]


def _words(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.NoSuchProcess:
        return []


def _alive(process: psutil.Process) -> bool:
    return process.is_running() and process.status() != psutil.STATUS_ZOMBIE


def _serving(process: subprocess.Popen[str]) -> bool:
    return any(
        connection.status == psutil.CONN_LISTEN
        for child in _children(process)
        for connection in child.net_connections()
    )


@pytest.mark.runtime
def test_a_killed_runtime_is_exit_7_with_its_last_lines(start: Start, real_gguf: Path) -> None:
    process = start("run", str(real_gguf), "--ctx", "512")
    _until(lambda: _serving(process))
    for child in _children(process):
        child.kill()
    _, err = process.communicate(timeout=30)
    assert process.returncode == 7
    assert "signal 9" in err or "SIGKILL" in err


@pytest.mark.runtime
def test_a_model_cut_short_is_said_before_anything_starts(mgpu: Mgpu, real_gguf: Path, tmp_path: Path) -> None:
    short = tmp_path / "short.gguf"
    with real_gguf.open("rb") as whole, short.open("wb") as out:
        out.write(whole.read(100_000_000))
    done = mgpu("run", str(short))
    assert done.returncode == 4
    assert f"{real_gguf.stat().st_size - 100_000_000} of {real_gguf.stat().st_size} bytes are missing" in done.stderr


class TestTwoDevices:
    """Two software Vulkan devices: a real split, without a GPU."""

    pytestmark = pytest.mark.vulkan

    def test_placed_on_one(self, mgpu: Mgpu, real_gguf: Path, llama_server: str, two_vulkan_devices: Any) -> None:
        env = {"MGPU_LLAMA_SERVER": llama_server, **two_vulkan_devices}
        told = json.loads(mgpu("plan", str(real_gguf), "--json", env=env).stdout)
        assert [gpu["name"].split()[0] for gpu in told["rig"]["gpus"]] == ["llvmpipe", "llvmpipe"]
        assert told["plan"]["placement"] == "single"
        argv = told["command"]["argv"]
        assert argv[argv.index("--device") + 1] == "Vulkan0"

    @pytest.mark.parametrize(
        "arguments",
        [
            pytest.param(("--split", "pipeline", "--force", "--ctx", "4096"), id="split"),
            pytest.param(("--ctx", "2048"), id="one"),
            pytest.param(("--split", "pipeline", "--force", "--ctx", "1024", "--users", "3"), id="three users"),
            pytest.param(("--split", "pipeline", "--force", "--kv-type", "q8_0"), id="q8_0 cache"),
            pytest.param(("--force", "--", "-ts", "3,1"), id="split by hand"),
            pytest.param(("--offload", "allow", "--", "-ngl", "9"), id="half on the host"),
        ],
    )
    def test_every_buffer_is_the_planned_one(
        self,
        mgpu: Mgpu,
        start: Start,
        real_gguf: Path,
        llama_server: str,
        two_vulkan_devices: dict[str, str],
        arguments: tuple[str, ...],
    ) -> None:
        split = arguments.index("--") if "--" in arguments else len(arguments)
        ours, theirs = arguments[:split], arguments[split + 1 :]
        told = json.loads(
            mgpu(
                "plan", str(real_gguf), *ours, "--json", "--", *theirs,
                env={"MGPU_LLAMA_SERVER": llama_server, **two_vulkan_devices},
            ).stdout
        )  # fmt: skip
        process = start("run", str(real_gguf), *ours, "--", *theirs, "--no-warmup", env=two_vulkan_devices)
        _until(lambda: "reserve took" in _log() or process.poll() is not None)
        process.terminate()
        _, err = process.communicate(timeout=60)
        real = _sums(_log())
        argv = told["command"]["argv"]
        names = argv[argv.index("--device") + 1].split(",")
        for name, device in zip(names, told["plan"]["devices"], strict=True):
            for kind in ("weights", "kv", "compute"):
                planned = device[f"{kind}_bytes"]
                assert planned == pytest.approx(real.get((name, kind), 0), abs=0.01 * MIB * 3), (name, kind, err)


def _sums(log: str) -> dict[tuple[str, str], int]:
    """Bytes by device and kind. The log prints hundredths of a MiB, and a cache may be in two parts."""
    sums: dict[tuple[str, str], int] = {}
    for line in log.splitlines():
        fact = read_line(line)
        if isinstance(fact, Buffer):
            key = (fact.device, fact.kind)
            sums[key] = sums.get(key, 0) + fact.n_bytes
    return sums
