"""`mgpu run` of EXL2 and EXL3 models: a FAKE NVML and a FAKE TabbyAPI in a folder like its clone."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from conftest import Mgpu
from exllama_machine import Branch, write_clone
from exllama_models import ExFormat, exl_model
from fakenvml.machine import Machine, rtx_3090, tesla_p40
from mgpu.launch.ports import free_port

Rig = dict[str, str]
MakeMachine = Callable[..., Rig]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[ExFormat, str], Path]:
    """`models("exl3", "70B")`: a directory with the model in full length."""
    directory = tmp_path_factory.mktemp("exl")
    made: dict[tuple[ExFormat, str], Path] = {}

    def model(format_: ExFormat, size: str) -> Path:
        if (format_, size) not in made:
            made[format_, size] = exl_model(directory, format_, size)
        return made[format_, size]

    return model


@pytest.fixture
def machine(fake_nvml: Path, tmp_path: Path) -> MakeMachine:
    """`machine(branch, fault=…)`: the environment of a machine with two 3090 and a TabbyAPI of that branch."""

    def make(branch: Branch = "main", fault: str = "none", cards: tuple[Any, ...] | None = None) -> Rig:
        config = tmp_path / "machine.toml"
        config.write_text(Machine(*(cards or (rtx_3090(0), rtx_3090(1)))).toml(), encoding="utf-8")
        folder = tmp_path / f"tabby {branch}"
        return {
            "LD_LIBRARY_PATH": str(fake_nvml),
            "FAKE_NVML_CONFIG": str(config),
            "MGPU_TABBYAPI": str(folder if folder.exists() else write_clone(folder, branch)),
            "FAKE_TABBY_RECORD": str(tmp_path / "record.json"),
            "FAKE_TABBY_FAULT": fault,
        }

    return make


def _recorded(tmp_path: Path) -> dict[str, Any]:
    recorded: dict[str, Any] = json.loads((tmp_path / "record.json").read_text())
    return recorded


Models = Callable[[ExFormat, str], Path]


def test_exl3_on_one_card(mgpu: Mgpu, models: Models, machine: MakeMachine, tmp_path: Path) -> None:
    env = machine() | {"TABBY_MODEL_CACHE_SIZE": "131072", "TABBY_LOG_LEVEL": "ERROR"}
    done = mgpu("run", str(models("exl3", "8B")), "--prompt", "Hello there?", env=env)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "tabby: Hello there?"
    started = _recorded(tmp_path)
    assert started["env"] == {
        "CUDA_DEVICE_ORDER": "PCI_BUS_ID",
        "CUDA_VISIBLE_DEVICES": str(rtx_3090(0)["uuid"]),
        "TABBY_LOG_CONSOLE_WIDTH": "1000",
    }
    assert started["config"]["network"]["disable_auth"] is True
    model = started["config"]["model"]
    assert Path(model["model_dir"], model["model_name"]) == models("exl3", "8B")
    assert (model["max_seq_len"], model["cache_size"]) == (8192, 8192)
    assert "gpu_split" not in model
    assert "on GPU 0 (RTX 3090)" in done.stderr
    assert "left free and hidden" in done.stderr


def test_its_files_are_private_and_gone_afterwards(
    mgpu: Mgpu, models: Models, machine: MakeMachine, tmp_path: Path
) -> None:
    done = mgpu("run", str(models("exl3", "8B")), "--api-key", "s3cret: «x»", "--prompt", "Hi", env=machine())
    assert done.returncode == 0, done.stderr
    started = _recorded(tmp_path)
    assert started["config"]["network"]["disable_auth"] is False
    assert started["files"] == {"config.yml": 0o600, "api_tokens.yml": 0o600}
    assert started["mode"] == 0o700
    assert not Path(started["cwd"]).exists()
    assert "s3cret" not in " ".join(started["argv"])


def test_a_persons_own_settings_do_not_join(mgpu: Mgpu, models: Models, machine: MakeMachine, tmp_path: Path) -> None:
    """TabbyAPI merges config.yml of its working directory under the file it is given."""
    env = machine()
    own = Path(env["MGPU_TABBYAPI"]) / "config.yml"
    own.write_text("model:\n  gpu_split: [10, 20]\ndraft_model:\n  draft_model_name: big\n")
    command = [sys.executable, "-m", "mgpu", "run", str(models("exl3", "8B")), "--prompt", "Hi"]
    roots = os.pathsep.join(str(Path(__file__).parents[1] / root) for root in ("launcher", "adapters", "profiles"))
    ran = subprocess.run(
        command, cwd=own.parent, env={**os.environ, "PYTHONPATH": roots, **env}, capture_output=True, check=False
    )
    assert ran.returncode == 0, ran.stderr
    assert "gpu_split" not in _recorded(tmp_path)["config"]["model"]
    assert "draft_model" not in _recorded(tmp_path)["config"]


@pytest.mark.parametrize(("format_", "branch"), [("exl3", "main"), ("exl2", "exl2")])
def test_a_70b_is_split_over_both(
    mgpu: Mgpu, models: Models, machine: MakeMachine, tmp_path: Path, format_: ExFormat, branch: Branch
) -> None:
    done = mgpu("run", str(models(format_, "70B")), "--split", "pipeline", "--prompt", "Hi", env=machine(branch))
    assert done.returncode == 0, done.stderr
    started = _recorded(tmp_path)
    shown = started["env"]["CUDA_VISIBLE_DEVICES"]
    assert shown == ("0,1" if format_ == "exl2" else f"{rtx_3090(0)['uuid']},{rtx_3090(1)['uuid']}")
    model = started["config"]["model"]
    assert model["gpu_split_auto"] is False
    assert len(model["gpu_split"]) == 2
    assert 15 < model["gpu_split"][0] < 23.7


def test_replicas_for_several_users(mgpu: Mgpu, models: Models, machine: MakeMachine, tmp_path: Path) -> None:
    env = machine() | {"PATH": "/usr/bin:/bin"}
    done = mgpu("run", str(models("exl3", "8B")), "--users", "8", "--prompt", "Hi", env=env)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "tabby: Hi"
    assert _recorded(tmp_path)["config"]["model"]["max_batch_size"] in {4, 8}


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        pytest.param("insufficient", "no room for model and cache", id="does not fit after all"),
        pytest.param("out-of-memory", "out of memory on a GPU", id="out of memory"),
        pytest.param("old-card", "compute capability 8.0", id="old card"),
        pytest.param("wrong-branch", "serves no exl2", id="wrong branch"),
        pytest.param("no-module", "has no fastapi", id="a package is missing"),
        pytest.param("dies-later", "TabbyAPI", id="dies at the second request"),
    ],
)
def test_a_runtime_that_fails_is_exit_7(
    mgpu: Mgpu, models: Models, machine: MakeMachine, fault: str, words: str
) -> None:
    done = mgpu("run", str(models("exl3", "8B")), "--prompt", "Hi", env=machine(fault=fault))
    assert done.returncode == 7
    assert words in done.stderr
    assert "mgpu/cli.py" not in done.stderr  # TabbyAPI's traceback is among its last lines, none of ours
    assert not list(Path(os.environ["XDG_STATE_HOME"]).glob("mgpu/run-*"))


def test_when_its_port_is_taken_meanwhile_it_starts_anew(
    mgpu: Mgpu, models: Models, machine: MakeMachine, tmp_path: Path
) -> None:
    """The real one would serve on the next port, and nobody would know."""
    done = mgpu("run", str(models("exl3", "8B")), "--prompt", "Hi", env=machine(fault="taken"))
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "tabby: Hi"


def test_a_port_asked_for_and_taken_meanwhile(mgpu: Mgpu, models: Models, machine: MakeMachine) -> None:
    port = free_port("127.0.0.1", wanted=None, start=18080)
    words = ("--port", str(port), "--prompt", "Hi")
    done = mgpu("run", str(models("exl3", "8B")), *words, env=machine(fault="taken"), timeout=60)
    assert done.returncode == 7
    assert f"port {port} was taken" in done.stderr
    assert "leave --port out" in done.stderr


@pytest.fixture
def running(models: Models, machine: MakeMachine, python_path: str) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """`running()`: mgpu with a runtime that is ready."""
    started: list[subprocess.Popen[str]] = []

    def start(**env: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-m", "mgpu", "run", str(models("exl3", "8B"))],
            env={**os.environ, "PYTHONPATH": python_path, **machine(), **env},
            stderr=subprocess.PIPE,
            text=True,
        )
        started.append(process)
        assert process.stderr is not None
        said: list[str] = []
        for line in process.stderr:
            said.append(line)
            if "Ctrl-C stops it" in line:
                return process
        pytest.fail(f"it never got ready: {''.join(said)}")

    yield start
    for process in started:
        process.kill()
        process.wait()
        assert process.stderr is not None
        process.stderr.close()


def _runtime_of(process: subprocess.Popen[str]) -> psutil.Process:
    return next(
        child for child in psutil.Process(process.pid).children(recursive=True) if "--config" in child.cmdline()
    )


def test_ctrl_c_leaves_nothing(running: Callable[..., subprocess.Popen[str]], tmp_path: Path) -> None:
    process = running()
    runtime = _runtime_of(process)
    process.send_signal(signal.SIGINT)
    assert process.wait(15) == 130
    assert not runtime.is_running()
    assert not Path(_recorded(tmp_path)["cwd"]).exists()


def test_dying_while_it_serves_is_exit_7(running: Callable[..., subprocess.Popen[str]], tmp_path: Path) -> None:
    process = running()
    _runtime_of(process).kill()
    assert process.wait(15) == 7
    assert process.stderr is not None
    assert "TabbyAPI was killed by SIGKILL (out of memory?) while it was serving" in process.stderr.read()
    assert not Path(_recorded(tmp_path)["cwd"]).exists()


# Before anything starts.


def test_no_tabbyapi_says_the_commands(mgpu: Mgpu, models: Models, machine: MakeMachine) -> None:
    env = machine() | {"MGPU_TABBYAPI": ""}
    for format_, branch in (("exl3", "tabbyAPI ~/tabbyAPI"), ("exl2", "--branch exl2-checkpoint")):
        done = mgpu("run", str(models(format_, "8B")), env=env)  # type: ignore[arg-type]
        assert done.returncode == 6
        assert "no TabbyAPI found in $MGPU_TABBYAPI or ~/tabbyAPI" in done.stderr.replace("~/tabbyAPI-exl2, ", "")
        assert branch in done.stderr
        assert "venv/bin/pip install '.[cu12]'" in done.stderr


def test_main_serves_no_exl2(mgpu: Mgpu, models: Models, machine: MakeMachine) -> None:
    done = mgpu("run", str(models("exl2", "8B")), env=machine("main"))
    assert done.returncode == 6
    assert "serves no EXL2" in done.stderr
    assert "--branch exl2-checkpoint" in done.stderr


def test_a_variable_that_names_nothing(mgpu: Mgpu, models: Models, machine: MakeMachine, tmp_path: Path) -> None:
    done = mgpu("run", str(models("exl3", "8B")), env=machine() | {"MGPU_TABBYAPI": str(tmp_path / "gone")})
    assert done.returncode == 6
    assert f"$MGPU_TABBYAPI {tmp_path / 'gone'}: no such directory" in done.stderr


def test_an_old_card_is_left_out_or_refused(mgpu: Mgpu, models: Models, machine: MakeMachine, tmp_path: Path) -> None:
    model = str(models("exl3", "8B"))
    mixed = machine(cards=(tesla_p40(0), rtx_3090(1)))
    done = mgpu("run", model, "--prompt", "Hi", env=mixed)
    assert done.returncode == 0, done.stderr
    assert "ExLlama cannot use GPU 0 (Tesla P40)" in done.stderr
    assert _recorded(tmp_path)["env"]["CUDA_VISIBLE_DEVICES"] == str(rtx_3090(1)["uuid"])
    alone = machine(cards=(tesla_p40(0),))
    done = mgpu("run", model, "--prompt", "Hi", env=alone)
    assert done.returncode == 3
    assert "GPU 0 (Tesla P40): it needs compute capability 8.0, and this is 6.1" in done.stderr


def test_what_does_not_fit_is_exit_5(mgpu: Mgpu, models: Models, machine: MakeMachine) -> None:
    done = mgpu("run", str(models("exl3", "70B")), env=machine(cards=(rtx_3090(0),)))
    assert done.returncode == 5
    assert "short by" in done.stderr


def test_the_dry_run_runs(mgpu: Mgpu, models: Models, machine: MakeMachine, tmp_path: Path) -> None:
    """The line that is printed makes the files and starts the very same."""
    port = free_port("127.0.0.1", wanted=None, start=18180)
    words = ("--port", str(port), "--api-key", "it's a key", "--split", "pipeline")
    env = {**os.environ, **machine(), "TABBY_MODEL_CACHE_SIZE": "1"}
    line = mgpu("run", str(models("exl3", "70B")), *words, "--dry-run", env=env).stdout
    assert line.count("\n") == 1
    process = subprocess.Popen(["sh", "-c", f"eval {shlex.quote(line)}"], env=env, stdout=subprocess.DEVNULL)
    record = tmp_path / "record.json"
    deadline = time.monotonic() + 20
    while not record.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    for child in psutil.Process(process.pid).children(recursive=True):
        child.terminate()
    process.terminate()
    process.wait(10)
    by_hand = _recorded(tmp_path)
    record.unlink()
    assert mgpu("run", str(models("exl3", "70B")), *words, "--prompt", "Hi", env=env).returncode == 0
    launched = _recorded(tmp_path)
    assert by_hand["config"] == launched["config"]
    assert by_hand["env"] == launched["env"]
    assert by_hand["argv"] == launched["argv"]
    assert by_hand["files"].keys() == launched["files"].keys()
