"""`mgpu run --users 4` on a machine with two RTX 3090: a FAKE NVML, two FAKE llama-servers, and a real nginx."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from conftest import Mgpu, write_program
from fake_build import SERVER, build_program
from fakenvml.machine import Machine, rtx_3090

Header = Callable[[str], Path]
Env = dict[str, str]
SMALL = "Llama-3.1-8B-Instruct-Q4_K_M"
NGINX = shutil.which("nginx", path=f"{os.environ.get('PATH', '')}{os.pathsep}/usr/sbin{os.pathsep}/usr/local/sbin")
needs_nginx = pytest.mark.skipif(NGINX is None, reason="no nginx: apt-get install nginx-light")

#: A test run in the background ignores SIGINT, and so would its children.
INTERRUPTIBLE = (
    sys.executable,
    "-c",
    "import os, signal, sys; signal.signal(signal.SIGINT, signal.SIG_DFL); os.execvp(sys.argv[1], sys.argv[1:])",
)

#: Started with a model, it writes down how, in a file for its port, and becomes the fake server.
_STARTED = """\
port = words[words.index("--port") + 1]
kept = {{name: os.environ[name] for name in os.environ if name.startswith(("CUDA", "LLAMA"))}}
with open(os.path.join({record!r}, port + ".json"), "w") as out:
    json.dump({{"argv": words, "env": kept}}, out)
key = ["--api-key", kept["LLAMA_API_KEY"]] if "LLAMA_API_KEY" in kept else []
os.execv(sys.executable, [sys.executable, {fake!r}, "--port", port, "--fault", {fault!r}, *key])
"""


@pytest.fixture
def machine(fake_nvml: Path, tmp_path: Path) -> Callable[..., Env]:
    """`machine(fault=…)`: the environment of a machine with two 3090 and a llama-server."""

    def make(fault: str = "none") -> Env:
        config = tmp_path / "machine.toml"
        config.write_text(Machine(rtx_3090(0), rtx_3090(1)).toml(), encoding="utf-8")
        (tmp_path / "started").mkdir()
        started = _STARTED.format(record=str(tmp_path / "started"), fault=fault, fake=SERVER)
        server = write_program(tmp_path / "llama-server", build_program(started))
        return {
            "LD_LIBRARY_PATH": str(fake_nvml),
            "FAKE_NVML_CONFIG": str(config),
            "MGPU_LLAMA_SERVER": str(server),
            "MGPU_PROXY": "none",
        }

    return make


def started(tmp_path: Path) -> list[dict[str, Any]]:
    return [json.loads(file.read_text()) for file in sorted((tmp_path / "started").glob("*.json"))]


def after(words: list[str], flag: str) -> str:
    return words[words.index(flag) + 1]


@pytest.mark.parametrize("proxy", [pytest.param("nginx", marks=needs_nginx), "none"])
def test_one_replica_on_each_card(
    mgpu: Mgpu, header: Header, machine: Callable[..., Env], tmp_path: Path, proxy: str
) -> None:
    env = machine() | {"MGPU_PROXY": proxy}
    done = mgpu("run", str(header(SMALL)), "--users", "4", "--prompt", "Hello?", env=env)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "plain: Hello?"  # these headers have no chat template: the text is continued
    replicas = started(tmp_path)
    assert [replica["env"]["CUDA_VISIBLE_DEVICES"] for replica in replicas] == [
        rtx_3090(0)["uuid"],
        rtx_3090(1)["uuid"],
    ]
    for replica in replicas:
        assert after(replica["argv"], "--device") == "CUDA0"
        assert after(replica["argv"], "--parallel") == "2"
    assert ("nginx before 2 replicas" in done.stderr) == (proxy == "nginx")
    assert "GPU 0: http://127.0.0.1:" in done.stderr
    assert "GPU 1: http://127.0.0.1:" in done.stderr
    assert "apt-get install" not in done.stderr  # there is one, or none is wanted


@needs_nginx
def test_a_key_guards_the_one_address(mgpu: Mgpu, header: Header, machine: Callable[..., Env], tmp_path: Path) -> None:
    env = machine() | {"MGPU_PROXY": "nginx"}
    done = mgpu("run", str(header(SMALL)), "--users", "2", "--api-key", "sk-1", "--prompt", "Hello?", env=env)
    assert done.returncode == 0, done.stderr
    assert {replica["env"]["LLAMA_API_KEY"] for replica in started(tmp_path)} == {"sk-1"}
    assert not any("sk-1" in word for replica in started(tmp_path) for word in replica["argv"])


@pytest.mark.parametrize("proxy", ["apache", "haproxy-that-is-not-there"])
def test_a_proxy_nobody_knows(mgpu: Mgpu, header: Header, machine: Callable[..., Env], proxy: str) -> None:
    done = mgpu("run", str(header(SMALL)), "--users", "2", "--prompt", "x", env=machine() | {"MGPU_PROXY": proxy})
    assert done.returncode == 2
    assert "is no proxy mgpu knows" in done.stderr


@pytest.mark.parametrize(("fault", "words"), [("out-of-memory", "out of memory"), ("exit-at-once", "--nonsense")])
def test_a_replica_that_fails_is_exit_7(
    mgpu: Mgpu, header: Header, machine: Callable[..., Env], fault: str, words: str
) -> None:
    done = mgpu("run", str(header(SMALL)), "--users", "2", "--prompt", "x", env=machine(fault))
    assert done.returncode == 7
    assert words in done.stderr
    assert "on GPU 0" in done.stderr or "on GPU 1" in done.stderr
    assert "Traceback" not in done.stderr


def test_the_line_of_a_dry_run_starts_both_and_stops_both(
    mgpu: Mgpu, header: Header, machine: Callable[..., Env], tmp_path: Path
) -> None:
    env = machine()
    done = mgpu("run", str(header(SMALL)), "--users", "2", "--dry-run", env=env)
    assert done.returncode == 0
    assert done.stdout.count("\n") == 1
    shell = subprocess.Popen(
        [*INTERRUPTIBLE, "sh", "-c", 'eval "$LINE"'],
        env={**os.environ, **env, "LINE": done.stdout},
        start_new_session=True,
        stderr=subprocess.DEVNULL,
    )
    try:
        ports = [word.split()[0] for word in done.stdout.split("--port ")[1:]]
        assert len(ports) == 2
        for port in ports:
            until_answers(f"http://127.0.0.1:{port}/health", shell)
        children = psutil.Process(shell.pid).children(recursive=True)
        os.killpg(shell.pid, signal.SIGINT)
        shell.wait(10)
        _, left = psutil.wait_procs(children, timeout=10)
        assert left == []
    finally:
        if shell.poll() is None:
            os.killpg(shell.pid, signal.SIGKILL)
            shell.wait()


@needs_nginx
def test_a_dry_run_says_that_there_would_be_a_proxy(mgpu: Mgpu, header: Header, machine: Callable[..., Env]) -> None:
    env = machine() | {"MGPU_PROXY": "nginx"}
    done = mgpu("run", str(header(SMALL)), "--users", "2", "--dry-run", env=env)
    assert "puts nginx in front" in done.stderr
    assert "nginx" not in done.stdout
    elsewhere = mgpu("run", str(header(SMALL)), "--users", "2", "--dry-run", "--rig", "2x3090", env=env)
    assert "nginx" not in elsewhere.stderr


@needs_nginx
def test_json_has_the_proxy_first_and_all_commands(mgpu: Mgpu, header: Header, machine: Callable[..., Env]) -> None:
    env = machine() | {"MGPU_PROXY": "nginx", "LLAMA_ARG_CTX_SIZE": "1"}
    told = json.loads(mgpu("run", str(header(SMALL)), "--users", "2", "--json", env=env).stdout)
    assert told["plan"]["placement"] == "replicas"
    front, *replicas = told["commands"]
    assert told["command"] == front
    ((path, text),) = front["files"].items()
    assert path in front["argv"]
    assert [replica["endpoint"].split("/")[2] in text for replica in replicas] == [True, True]
    assert [replica["unset"] for replica in replicas] == [["LLAMA_ARG_CTX_SIZE"]] * 2


def test_json_without_a_proxy_has_the_first_replica(mgpu: Mgpu, header: Header, machine: Callable[..., Env]) -> None:
    told = json.loads(mgpu("plan", str(header(SMALL)), "--users", "2", "--json", env=machine()).stdout)
    assert told["command"] == told["commands"][0]
    endpoints = [command["endpoint"] for command in told["commands"]]
    assert len(set(endpoints)) == 2
    assert all(after(command["argv"], "--parallel") == "1" for command in told["commands"])


def test_one_user_has_one_command(mgpu: Mgpu, header: Header, machine: Callable[..., Env]) -> None:
    told = json.loads(mgpu("plan", str(header(SMALL)), "--json", env=machine()).stdout)
    assert told["plan"]["placement"] == "single"
    assert "commands" not in told


def until_answers(url: str, process: subprocess.Popen[bytes]) -> None:
    for _ in range(400):
        assert process.poll() is None
        try:
            with urllib.request.urlopen(url, timeout=5) as answer:
                if answer.status == 200:
                    return
        except OSError:
            time.sleep(0.05)
    pytest.fail(f"{url} did not answer")
