"""`mgpu run --runtime aikit` with a FAKE docker and a FAKE NVML: what lacks, a container's life, and its end."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

import aikit_docker as said
from conftest import Mgpu
from fakenvml.machine import Machine, rtx_3090
from tiny_llama import write_tiny

Env = dict[str, str]

_FAKE = Path(__file__).parent / "fake_docker.py"


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    return write_tiny(tmp_path / "tiny")


@pytest.fixture
def docker(tmp_path: Path, fake_nvml: Path) -> Callable[..., Env]:
    """`docker(info=…, fault=…)`: a machine with two 3090 and a Docker that says so."""

    def make(fault: str = "", refusal: str = "", **texts: str) -> Env:
        daemon = tmp_path / "daemon"
        daemon.mkdir()
        for name, text in ({"version": said.VERSION, "info": said.INFO, "image": said.IMAGE_NOW} | texts).items():
            status = int(text.startswith(("Cannot", "permission", "[]\n")))
            (daemon / name).write_text(f"{status}\n{text}", encoding="utf-8")
        if refusal:
            (daemon / "refusal").write_text(f"{refusal}\n", encoding="utf-8")
        program = tmp_path / "docker"
        program.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{_FAKE}" "$@"\n')
        program.chmod(0o755)
        config = tmp_path / "machine.toml"
        config.write_text(Machine(rtx_3090(0), rtx_3090(1)).toml(), encoding="utf-8")
        return {
            "MGPU_DOCKER": str(program),
            "FAKE_DOCKER": str(daemon),
            "FAKE_VLLM": fault,
            "LD_LIBRARY_PATH": str(fake_nvml),
            "FAKE_NVML_CONFIG": str(config),
        }

    return make


def _record(tmp_path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((tmp_path / "daemon" / "record.json").read_text())
    return found


def _containers(tmp_path: Path) -> list[Path]:
    return list((tmp_path / "daemon").glob("*.pid"))


def test_it_answers_and_the_container_is_gone(
    mgpu: Mgpu, tiny: Path, docker: Callable[..., Env], tmp_path: Path
) -> None:
    done = mgpu("run", str(tiny), "--runtime", "aikit", "--prompt", "Hello?", "--api-key", "s3cret", env=docker())
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "chat: Hello?"
    record = _record(tmp_path)
    assert record["key"] == "s3cret"
    assert f'"device={rtx_3090(0)["uuid"]}"' in record["argv"]
    assert not _containers(tmp_path)


@pytest.mark.parametrize(
    ("texts", "lacks"),
    [
        ({"version": said.NO_DAEMON, "info": said.NO_DAEMON}, "the Docker daemon does not answer"),
        ({"version": said.NO_PERMISSION, "info": said.NO_PERMISSION}, "this user may not use Docker"),
        ({"info": said.WITHOUT_TOOLKIT}, "no NVIDIA Container Toolkit"),
        ({"image": said.NO_IMAGE}, "is not on this machine"),
    ],
)
def test_what_lacks_is_one_line(
    mgpu: Mgpu, tiny: Path, docker: Callable[..., Env], texts: Env, lacks: str, tmp_path: Path
) -> None:
    env = docker(**texts)
    done = mgpu("run", str(tiny), "--runtime", "aikit", env=env)
    assert done.returncode == 6, done.stderr
    assert lacks in done.stderr
    assert "Traceback" not in done.stderr
    for name, text in (("version", said.VERSION), ("info", said.INFO), ("image", said.IMAGE_NOW)):
        (tmp_path / "daemon" / name).write_text(f"0\n{text}")
    assert mgpu("run", str(tiny), "--runtime", "aikit", "--dry-run", env=env).returncode == 0  # asked anew each time


def test_no_docker(mgpu: Mgpu, tiny: Path) -> None:
    done = mgpu("run", str(tiny), "--runtime", "aikit", env={"PATH": "/nowhere"})
    assert done.returncode == 6
    assert "no docker found" in done.stderr
    assert "NVIDIA Container Toolkit" in done.stderr


def test_a_refusal_of_the_daemon_is_the_cause(mgpu: Mgpu, tiny: Path, docker: Callable[..., Env]) -> None:
    refusal = 'docker: Error response from daemon: could not select device driver "" with capabilities: [[gpu]].'
    done = mgpu("run", str(tiny), "--runtime", "aikit", env=docker(refusal=refusal))
    assert done.returncode == 7
    assert "exited with status 125 before it was ready: Docker has no NVIDIA Container Toolkit" in done.stderr
    assert "nvidia-ctk" in done.stderr


def test_vllm_that_dies_inside_is_the_cause(mgpu: Mgpu, tiny: Path, docker: Callable[..., Env], tmp_path: Path) -> None:
    done = mgpu("run", str(tiny), "--runtime", "aikit", env=docker(fault="oom"))
    assert done.returncode == 7
    assert "out of memory on a GPU" in done.stderr
    assert not _containers(tmp_path)


@pytest.mark.parametrize("fault", ["", "deaf"])
def test_ctrl_c_ends_the_container_whatever_it_does(
    tiny: Path, docker: Callable[..., Env], python_path: str, tmp_path: Path, fault: str
) -> None:
    log = tmp_path / "err"
    with log.open("w") as err:
        process = subprocess.Popen(
            [sys.executable, "-m", "mgpu", "run", str(tiny), "--runtime", "aikit"],
            env={**os.environ, **docker(fault=fault), "PYTHONPATH": python_path},
            stderr=err,
        )
    try:
        deadline = time.monotonic() + 30
        while "ready after" not in log.read_text() and time.monotonic() < deadline:
            time.sleep(0.05)
        (pid_file,) = _containers(tmp_path)
        container = psutil.Process(int(pid_file.read_text()))
        assert container not in psutil.Process(process.pid).children(recursive=True)
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == 130, log.read_text()
        assert not container.is_running() or container.status() == psutil.STATUS_ZOMBIE
        assert not _containers(tmp_path)
    finally:
        process.kill()
        process.wait()
