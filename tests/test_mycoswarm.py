"""mycoSwarm: its adapter alone, and `mgpu run --runtime mycoswarm` against a FAKE daemon."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from conftest import Mgpu
from fake_started import Running, recorded, started
from mgpu.adapter import Endpoint, Probe
from mgpu.errors import RuntimeMissingError
from mgpu.inspect.named import named_model
from mgpu.plan import Layout, Shape
from mgpu.request import Request
from mgpu.rig import Rig
from mgpu.service import TOKEN
from mgpu_adapters.mycoswarm.adapter import MycoSwarm
from mgpu_adapters.mycoswarm.swarm import tagged

_SECRET = "5ecret"
Swarm = Callable[..., dict[str, str]]


@pytest.fixture
def swarm(tmp_path: Path, python_path: str) -> Iterator[Swarm]:
    """`swarm("--own", "gemma3:1b", fault=…)`: the environment for it, its token at home; requests in requests.jsonl."""
    token = Path(os.environ["HOME"]) / ".config/mycoswarm/swarm-token"
    token.parent.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:

        def start(*more: str, fault: str = "none", ours: str | None = _SECRET) -> dict[str, str]:
            if ours is not None:
                token.write_text(f"{ours}\n", encoding="utf-8")
            record = ("--record", str(tmp_path / "requests.jsonl"), "--token", _SECRET, "--fault", fault)
            url = stack.enter_context(started("fake_mycoswarm.py", tmp_path, *record, *more))
            return {"MGPU_MYCOSWARM_URL": url, "PYTHONPATH": python_path}

        yield start


_PEER = ("--peer", "gpu-box=gemma3:1b")


def _run(mgpu: Mgpu, env: dict[str, str], *words: str, model: str = "gemma3:1b") -> subprocess.CompletedProcess[str]:
    return mgpu("run", model, "--runtime", "mycoswarm", *words, "--prompt", "Why so?", env=env)


def _tasks(tmp_path: Path) -> list[dict[str, Any]]:
    return [one["body"]["payload"] for one in recorded(tmp_path / "requests.jsonl") if one["path"] == "/task"]


@pytest.mark.parametrize("where", [_PEER, ("--own", "gemma3:1b")])
def test_a_whole_request_is_routed_and_answered(
    mgpu: Mgpu, swarm: Swarm, tmp_path: Path, where: tuple[str, str]
) -> None:
    done = _run(mgpu, swarm(*where))
    assert (done.returncode, done.stdout.strip()) == (0, "You said: Why so?"), done.stderr
    assert "splits no model" in done.stderr
    assert "no OpenAI API" in done.stderr
    assert "run code on every node" in done.stderr
    first, second = _tasks(tmp_path)
    assert (first["max_tokens"], first["num_ctx"]) == (1, second["num_ctx"])
    assert {one["token"] for one in recorded(tmp_path / "requests.jsonl")} == {_SECRET}


def test_the_context_asked_for_goes_with_each_request(mgpu: Mgpu, swarm: Swarm, tmp_path: Path) -> None:
    assert _run(mgpu, swarm(*_PEER), "--ctx", "16k").returncode == 0
    assert {task["num_ctx"] for task in _tasks(tmp_path)} == {16384}


def test_a_peer_that_cannot_be_reached_is_relayed(mgpu: Mgpu, swarm: Swarm) -> None:
    done = _run(mgpu, swarm(*_PEER, fault="unreachable-peer"))
    assert (done.returncode, done.stdout.strip()) == (0, "You said: Why so?"), done.stderr


@pytest.mark.parametrize(
    ("fault", "code", "words"),
    [
        ("ollama-gone", 7, "cannot run gemma3:1b: Cannot connect to Ollama"),
        ("no-token", 7, "without a token"),
        ("swaps", 7, "answered with tinyllama:latest instead of gemma3:1b"),
        ("no-node", 7, "No node can handle: inference"),
        ("node-gone", 7, "Can't reach gpu-box"),
        ("breaks-off", 7, "broke off the answer"),
        ("error-in-stream", 7, "Ollama timed out"),
        ("not-mycoswarm", 6, "is not mycoSwarm"),
    ],
)
def test_each_failure_is_one_line(mgpu: Mgpu, swarm: Swarm, fault: str, code: int, words: str) -> None:
    done = _run(mgpu, swarm(*_PEER, fault=fault))
    assert done.returncode == code, done.stderr
    assert words in done.stderr.split("mgpu: ")[1].splitlines()[0]
    assert "Traceback" not in done.stderr


def test_no_daemon_says_how_to_start_one(mgpu: Mgpu) -> None:
    done = _run(mgpu, {"MGPU_MYCOSWARM_URL": "127.0.0.1:9"})
    assert done.returncode == 6
    assert "no mycoswarm answers at http://127.0.0.1:9" in done.stderr
    assert "mycoswarm daemon" in done.stderr


@pytest.mark.parametrize(("ours", "words"), [(None, "wants a token"), ("wrong", "does not accept the token")])
def test_the_token_is_missing_or_wrong(mgpu: Mgpu, swarm: Swarm, ours: str | None, words: str) -> None:
    done = _run(mgpu, swarm(*_PEER, ours=ours))
    assert done.returncode == 6
    assert words in done.stderr
    assert "~/.config/mycoswarm/swarm-token" in done.stderr


def test_a_model_that_no_node_has_is_never_swapped(mgpu: Mgpu, swarm: Swarm, tmp_path: Path) -> None:
    done = _run(mgpu, swarm(*_PEER), model="gemma3:27b")
    assert done.returncode == 4
    assert "no node of the swarm (desk, gpu-box) has the model gemma3:27b" in done.stderr
    assert "did you mean gemma3:1b?" in done.stderr
    assert _tasks(tmp_path) == []


def test_a_swarm_without_ollama(mgpu: Mgpu, swarm: Swarm) -> None:
    done = _run(mgpu, swarm())
    assert done.returncode == 6
    assert "none of desk has an Ollama with a model" in done.stderr


def test_a_file_is_no_name(mgpu: Mgpu, swarm: Swarm, header: Callable[[str], Path]) -> None:
    done = _run(mgpu, swarm(*_PEER), model=str(header("Llama-3.1-8B-Instruct-Q4_K_M")))
    assert done.returncode == 4
    assert "know models by Ollama's names" in done.stderr


def test_without_a_prompt_it_stays_until_ctrl_c(swarm: Swarm) -> None:
    running = Running("run", "gemma3:1b", "--runtime", "mycoswarm", env=swarm(*_PEER))
    running.wait_until("ready after")
    assert "/task   model gemma3:1b" in running.stderr
    assert running.interrupt() == 130, running.stderr


@pytest.mark.parametrize(
    ("fault", "words"), [("dies-after-ready", "lost the mycoSwarm"), ("model-goes", "has gemma3:1b any more")]
)
def test_lost_while_it_is_used(swarm: Swarm, fault: str, words: str) -> None:
    running = Running("run", "gemma3:1b", "--runtime", "mycoswarm", env=swarm(*_PEER, fault=fault))
    running.wait_until("ready after")
    assert running.wait() == 7
    assert words in running.stderr.split("mgpu: ")[1]


def test_ctrl_c_while_a_task_never_ends(swarm: Swarm) -> None:
    running = Running("run", "gemma3:1b", "--runtime", "mycoswarm", env=swarm(*_PEER, fault="never-ends"))
    running.wait_until("loading gemma3:1b on gpu-box")
    assert running.interrupt() == 130


def test_the_line_to_paste_works_and_tells_no_token(mgpu: Mgpu, swarm: Swarm, tmp_path: Path) -> None:
    done = mgpu("run", "gemma3:1b", "--runtime", "mycoswarm", "--dry-run", env=swarm(*_PEER))
    assert done.returncode == 0, done.stderr
    assert _SECRET not in done.stdout + done.stderr
    pasted = subprocess.run(["sh", "-c", done.stdout], capture_output=True, text=True, check=False)
    if pasted.returncode == 127:
        pytest.skip("no curl here")
    assert json.loads(pasted.stdout)["message"] == "Routed to gpu-box", pasted.stderr
    assert [task["model"] for task in _tasks(tmp_path)] == ["gemma3:1b"]


def test_a_plan_for_another_rig_asks_nobody(mgpu: Mgpu) -> None:
    env = {"MGPU_MYCOSWARM_URL": "127.0.0.1:9"}
    done = mgpu("plan", "gemma3:1b", "--runtime", "mycoswarm", "--rig", "2x3090", "--json", env=env)
    told = json.loads(done.stdout)["plan"]
    assert (told["placement"], told["attached"][-11:]) == ("attach", "(not asked)")
    assert {rule["id"] for rule in told["rules"]} == {"fits-one-card", "runtime-choice", "network-last"}


@pytest.mark.parametrize(
    ("name", "full"),
    [
        ("gemma3", "gemma3:latest"),
        ("gemma3:1b", "gemma3:1b"),
        ("hf.co/a/b", "hf.co/a/b:latest"),
        ("h:5/a", "h:5/a:latest"),
    ],
)
def test_names_as_ollama_lists_them(name: str, full: str) -> None:
    assert tagged(name) == full


def _probe(**outputs: str) -> Probe:
    return Probe(executable="http://127.0.0.1:7890", origin="running", outputs=outputs)


_HEALTH = '{"node_id": "myco-0", "hostname": "desk", "peer_count": 0, "version": "0.6.0"}'


@pytest.mark.parametrize(
    "outputs",
    [
        {},
        {"/health": "null"},
        {"/health": _HEALTH},
        {"/health": _HEALTH, TOKEN: "x"},
        {"/health": _HEALTH, "/status": "[]"},
        {"/health": _HEALTH, "/status": '{"node_id": "a", "hostname": "b"}', "/peers": '[{"ip": 3}]'},
    ],
)
def test_whatever_answers_otherwise_is_missing(outputs: dict[str, str]) -> None:
    with pytest.raises(RuntimeMissingError) as caught:
        MycoSwarm().installed(_probe(**outputs))
    assert caught.value.hint


def test_a_quote_in_a_name_stays_in_its_word() -> None:
    job = MycoSwarm().job(named_model("it's:1b", "gguf"), Request(), MycoSwarm().assumed())
    nothing, rig = Layout(gpus=(), counts=(), shape=Shape(n_devices=0)), Rig(name="x", source="detected", gpus=())
    command = job.command(nothing, rig, Endpoint(host="127.0.0.1", port=8080))
    script = command.argv[-1].replace("curl ", "printf '%s\\n' ")
    words = subprocess.run(["sh", "-c", script], capture_output=True, text=True, check=True).stdout.splitlines()
    assert json.loads(words[words.index("-d") + 1])["payload"]["model"] == "it's:1b"
