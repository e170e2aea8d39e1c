"""`mgpu run --runtime ollama` with a FAKE Ollama of each era: attached to, or started; answered, stopped, failed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

from conftest import Mgpu, write_program
from fakenvml.machine import Machine, rtx_3090
from gguf_writer import small_llama
from mgpu.launch.ports import is_free
from ollama_server import FAKE, VERSIONS, Server, put_in_store, seen, serving

Header = Callable[[str], Path]
Run = Callable[..., "subprocess.CompletedProcess[str]"]

SMALL = "Llama-3.1-8B-Instruct-Q4_K_M"
NAME = "registry.ollama.ai/library/llama3.1/8b"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.gguf"
    path.write_bytes(small_llama())
    return path


@pytest.fixture
def store(tmp_path: Path, header: Header, monkeypatch: pytest.MonkeyPatch) -> Path:
    """$OLLAMA_MODELS with llama3.1:8b in it."""
    put_in_store(tmp_path / "store", NAME, header(SMALL))
    monkeypatch.setenv("OLLAMA_MODELS", str(tmp_path / "store"))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "store"


@pytest.fixture
def ollama(tmp_path: Path) -> Path:
    """A program that is a fake Ollama."""
    return write_program(
        tmp_path / "ollama",
        f"import runpy, sys\nsys.argv[0] = {str(FAKE)!r}\nrunpy.run_path(sys.argv[0], run_name='__main__')\n",
    )


@pytest.fixture
def run(mgpu: Mgpu, tmp_path: Path) -> Run:
    """`run(server, *arguments)`: attached to `server`, or else with nothing but what the environment names."""

    def call(server: Server | None, *arguments: str, **more: str) -> subprocess.CompletedProcess[str]:
        env = {"OLLAMA_HOST": server.url if server is not None else "127.0.0.1:9", **more}
        return mgpu("run", "--runtime", "ollama", *arguments, env={"PATH": "/usr/bin:/bin", **env})

    return call


@pytest.mark.parametrize("version", VERSIONS)
def test_a_name_is_asked_and_given_back(run: Run, store: Path, tmp_path: Path, version: str) -> None:
    with serving(tmp_path, version=version) as server:
        done = run(server, "llama3.1:8b", "--prompt", "Hello")
        assert (done.returncode, done.stdout) == (0, "You said: Hello Grüße!\n")
        (load,) = server.seen("load")  # once: the proof and the question had it not loaded anew
        name = load["model"]
        assert name.startswith("mgpu-llama3.1-8b:")
        assert f"{server.url}/v1   model {name}" in done.stderr
        assert load["runner"]["num_ctx"] == 8192
        assert server.requests() == [
            "GET /api/version",
            "POST /api/create",
            "POST /api/generate",
            "POST /v1/completions",
            "GET /api/ps",
            "POST /v1/chat/completions",
            "POST /api/generate",
            "GET /api/ps",
            "DELETE /api/delete",
        ]
        assert server.ask("/api/ps") == {"models": []}
        assert server.ask("/api/tags") == {"models": []}


@pytest.mark.parametrize("version", VERSIONS)
def test_a_file_is_imported_once(run: Run, model: Path, tmp_path: Path, version: str) -> None:
    with serving(tmp_path, version=version) as server:
        first = run(server, str(model), "--prompt", "a")
        assert first.returncode == 0
        assert "note: imported into Ollama as mgpu-tiny:import-" in first.stderr
        (left,) = [row["name"] for row in server.ask("/api/tags")["models"]]
        assert left in first.stderr
        again = run(server, str(model), "--prompt", "b")
        assert again.returncode == 0
        assert "imported" not in again.stderr
        assert sum(request.startswith("POST /api/blobs/") for request in server.requests()) == 1


def test_an_import_is_removed_on_request(run: Run, model: Path, tmp_path: Path) -> None:
    with serving(tmp_path) as server:
        done = run(server, str(model), "--prompt", "a", "--", "--rm", "temperature=0")
        assert done.returncode == 0
        assert server.ask("/api/tags") == {"models": []}
        bodies = [entry["body"] for entry in server.seen("request") if entry["path"] == "/api/create"]
        assert bodies[1]["parameters"]["temperature"] == 0


def test_a_server_of_our_own(run: Run, store: Path, ollama: Path, tmp_path: Path) -> None:
    journal = tmp_path / "own.jsonl"
    done = run(
        None, "llama3.1:8b", "--prompt", "Hi", "--users", "2", MGPU_OLLAMA=str(ollama), FAKE_OLLAMA_JOURNAL=str(journal)
    )
    assert (done.returncode, done.stdout) == (0, "You said: Hi Grüße!\n")
    (start,) = seen(journal, "start")
    assert start["env"]["OLLAMA_NUM_PARALLEL"] == "2"
    assert start["env"]["OLLAMA_MODELS"] == str(store)
    assert start["env"]["OLLAMA_HOST"] in done.stderr
    host, _, port = start["env"]["OLLAMA_HOST"].rpartition(":")
    assert is_free(host, int(port))


def test_the_running_one_is_not_touched_where_it_will_not_do(
    run: Run, store: Path, ollama: Path, tmp_path: Path
) -> None:
    own = tmp_path / "own.jsonl"
    with serving(tmp_path) as server:
        more = {"MGPU_OLLAMA": str(ollama), "FAKE_OLLAMA_JOURNAL": str(own)}
        done = run(server, "llama3.1:8b", "--prompt", "Hi", "--kv-type", "q8_0", **more)
        assert done.returncode == 0
        assert server.requests() == ["GET /api/version"]
    (start,) = seen(own, "start")
    assert start["env"]["OLLAMA_KV_CACHE_TYPE"] == "q8_0"


def test_where_there_is_no_other_it_is_said(run: Run, store: Path, tmp_path: Path) -> None:
    with serving(tmp_path) as server:
        done = run(server, "llama3.1:8b", "--prompt", "Hi", "--kv-type", "q8_0")
        assert done.returncode == 0
        assert "warning: the Ollama that runs cannot be held to this plan: its cache may not be q8_0" in done.stderr


@pytest.mark.parametrize(
    ("fault", "words", "hint"),
    [
        ("load-fails", "cudaMalloc failed: out of memory", "use a smaller --ctx or --kv-type q8_0"),
        ("busy", "server busy", "try again"),
        ("no-token", "without a token", "see its log"),
        ("dies-while-loading", "does not answer", "is it still running?"),
        ("create-breaks-off", "broke off: connection lost", ""),
        ("read-only", "permission denied", "set OLLAMA_MODELS to a store of your own"),
    ],
)
def test_what_fails_is_exit_7(run: Run, store: Path, tmp_path: Path, fault: str, words: str, hint: str) -> None:
    with serving(tmp_path, fault=fault) as server:
        done = run(server, "llama3.1:8b", "--prompt", "Hi")
        assert done.returncode == 7
        error, *rest = done.stderr[done.stderr.index("mgpu: ") :].splitlines()
        assert words in error
        assert hint in "".join(rest)
        assert "Traceback" not in done.stderr
        if fault != "dies-while-loading":
            assert server.ask("/api/ps") == {"models": []}
            assert server.ask("/api/tags") == {"models": []}


@pytest.mark.parametrize(
    ("fault", "words", "hint"),
    [
        ("not-valid", "unknown model architecture: 'strange'", "update Ollama"),
        ("spoilt-upload", "digest mismatch", "must not change"),
    ],
)
def test_an_import_that_fails(run: Run, model: Path, tmp_path: Path, fault: str, words: str, hint: str) -> None:
    with serving(tmp_path, fault=fault) as server:
        done = run(server, str(model), "--prompt", "Hi")
        assert done.returncode == 7
        assert words in done.stderr
        assert hint in done.stderr


@pytest.mark.parametrize(
    ("fault", "version", "words"),
    [
        ("no-ollama", "0.33.0", "is not Ollama"),
        ("", "0.5.1", "0.5.1 is too old"),
        ("redirect", "0.33.0", "no ollama answers"),
    ],
)
def test_what_is_missing_or_too_old_is_exit_6(
    run: Run, store: Path, tmp_path: Path, fault: str, version: str, words: str
) -> None:
    with serving(tmp_path, fault=fault, version=version) as server:
        done = run(server, "llama3.1:8b", "--prompt", "Hi")
    assert done.returncode == 6
    assert words in done.stderr
    assert "Traceback" not in done.stderr


def test_nothing_there_is_exit_6(run: Run, store: Path) -> None:
    done = run(None, "llama3.1:8b", "--prompt", "Hi")
    assert done.returncode == 6
    assert "no ollama answers at http://127.0.0.1:9 ($OLLAMA_HOST)" in done.stderr
    assert "install it: curl -fsSL https://ollama.com/install.sh" in done.stderr


def test_a_name_that_its_own_store_lacks(run: Run, store: Path, tmp_path: Path) -> None:
    with serving(tmp_path, OLLAMA_MODELS=str(tmp_path / "another")) as server:
        done = run(server, "llama3.1:8b", "--prompt", "Hi")
    assert done.returncode == 7
    assert "model 'llama3.1:8b' not found" in done.stderr
    assert "`ollama pull llama3.1:8b` fetches it" in done.stderr


def test_an_unknown_parameter(run: Run, store: Path, tmp_path: Path) -> None:
    with serving(tmp_path) as server:
        done = run(server, "llama3.1:8b", "--prompt", "Hi", "--", "temprature=1")
    assert done.returncode == 7
    assert "unknown parameter 'temprature'" in done.stderr


def test_our_own_that_dies_at_start(run: Run, store: Path, ollama: Path) -> None:
    more = {"MGPU_OLLAMA": str(ollama), "FAKE_OLLAMA_FAULT": "dies-at-start"}
    done = run(None, "llama3.1:8b", "--prompt", "Hi", **more)
    assert done.returncode == 7
    assert "Error: listen tcp: something is wrong" in done.stderr


def test_a_model_for_embeddings_is_ready_without_a_token(run: Run, store: Path, tmp_path: Path) -> None:
    with serving(tmp_path, fault="embeddings") as server:
        done = run(server, "llama3.1:8b", "--prompt", "Hi")
        assert "could not be asked for a token" in done.stderr


@pytest.fixture
def two_3090(fake_nvml: Path, tmp_path: Path) -> dict[str, str]:
    config = tmp_path / "machine.toml"
    config.write_text(Machine(rtx_3090(0), rtx_3090(1)).toml(), encoding="utf-8")
    return {"LD_LIBRARY_PATH": str(fake_nvml), "FAKE_NVML_CONFIG": str(config)}


def test_what_it_holds_is_held_against_the_plan(
    run: Run, store: Path, tmp_path: Path, two_3090: dict[str, str]
) -> None:
    with serving(tmp_path, FAKE_OLLAMA_VRAM=str(3 << 30), FAKE_OLLAMA_SIZE=str(6 << 30)) as server:
        done = run(server, "llama3.1:8b", "--prompt", "Hi", **two_3090)
        assert done.returncode == 0
        assert "warning: Ollama holds 3.0 GiB of 6.0 GiB in RAM; all of it was planned on cards" in done.stderr
        (load,) = server.seen("load")
        assert load["runner"]["num_gpu"] == 33
        assert load["runner"]["main_gpu"] in {0, 1}


def test_as_planned_there_is_nothing_to_say(run: Run, store: Path, tmp_path: Path, two_3090: dict[str, str]) -> None:
    with serving(tmp_path) as probe:
        told = run(probe, "llama3.1:8b", "--json", **two_3090)
    device = json.loads(told.stdout)["plan"]["devices"][0]
    held = device["total_bytes"] - device["overhead_bytes"]
    with serving(tmp_path / "store", FAKE_OLLAMA_VRAM=str(held)) as server:
        done = run(server, "llama3.1:8b", "--prompt", "Hi", **two_3090)
    assert done.returncode == 0
    assert "warning" not in done.stderr


def test_the_dry_run_does_the_same_by_hand(run: Run, model: Path, tmp_path: Path) -> None:
    if subprocess.run(["which", "curl", "sha256sum"], capture_output=True, check=False).returncode:
        pytest.skip("no curl or sha256sum here")
    with serving(tmp_path) as server:
        line = run(server, str(model), "--dry-run").stdout
        assert line.count("\n") == 1
        subprocess.run(["sh", "-c", line], check=True, capture_output=True, timeout=30)
        by_hand = server.seen("load")[0]
        assert run(server, str(model), "--prompt", "Hi").returncode == 0
        assert by_hand == server.seen("load")[0]
        assert (
            by_hand["model"]
            == json.loads(run(server, str(model), "--json").stdout)["command"]["argv"][-1]
            .split('"model": "')[1]
            .split('"')[0]
        )


@contextmanager
def staying(python_path: str, tmp_path: Path, *arguments: str, **more: str) -> Iterator[subprocess.Popen[bytes]]:
    """`mgpu run …` that stays, with what it says in `tmp_path / "err"`."""
    with (tmp_path / "err").open("wb") as err:
        process = subprocess.Popen(
            [sys.executable, "-m", "mgpu", "run", *arguments, "--runtime", "ollama"],
            env={**os.environ, "PYTHONPATH": python_path, "PATH": "/usr/bin:/bin", **more},
            stdout=subprocess.DEVNULL,
            stderr=err,
            start_new_session=True,
        )
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def wait_for(condition: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline, f"waited in vain: {what}"
        time.sleep(0.02)


def said(tmp_path: Path) -> str:
    return (tmp_path / "err").read_text(encoding="utf-8")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_stop_gives_it_back(python_path: str, store: Path, tmp_path: Path, number: signal.Signals) -> None:
    with serving(tmp_path) as server, staying(python_path, tmp_path, "llama3.1:8b", OLLAMA_HOST=server.url) as process:
        wait_for(lambda: "ready after" in said(tmp_path), "ready")
        assert len(server.ask("/api/ps")["models"]) == 1
        process.send_signal(number)
        assert process.wait(20) == 130
        assert server.ask("/api/ps") == {"models": []}
        assert server.ask("/api/tags") == {"models": []}
        assert psutil.pid_exists(server.pid)
    assert "Traceback" not in said(tmp_path)


def test_a_stop_while_it_loads(python_path: str, store: Path, tmp_path: Path) -> None:
    with (
        serving(tmp_path, fault="slow-load") as server,
        staying(python_path, tmp_path, "llama3.1:8b", OLLAMA_HOST=server.url) as process,
    ):
        wait_for(lambda: "POST /api/generate" in server.requests(), "loading")
        started = time.monotonic()
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == 130
        assert time.monotonic() - started < 5
        assert server.requests()[-1] == "DELETE /api/delete"


def test_a_stop_ends_our_own_server(python_path: str, store: Path, ollama: Path, tmp_path: Path) -> None:
    journal = tmp_path / "own.jsonl"
    more = {"OLLAMA_HOST": "127.0.0.1:9", "MGPU_OLLAMA": str(ollama), "FAKE_OLLAMA_JOURNAL": str(journal)}
    with staying(python_path, tmp_path, "llama3.1:8b", **more) as process:
        wait_for(lambda: "ready after" in said(tmp_path), "ready")
        children = psutil.Process(process.pid).children(recursive=True)
        assert children
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == 130
        assert not [child for child in children if child.is_running()]
    paths = [entry["path"] for entry in seen(journal, "request")]
    assert paths[-1] == "/api/delete"


@pytest.mark.parametrize(("fault", "words"), [("dies-later", "does not answer"), ("evicted", "holds mgpu-llama3.1-8b")])
def test_what_is_lost_later_is_exit_7(python_path: str, store: Path, tmp_path: Path, fault: str, words: str) -> None:
    with (
        serving(tmp_path, fault=fault) as server,
        staying(python_path, tmp_path, "llama3.1:8b", OLLAMA_HOST=server.url) as process,
    ):
        assert process.wait(30) == 7
    assert words in said(tmp_path)
    assert "Traceback" not in said(tmp_path)


def test_our_own_that_dies_later_is_exit_7(python_path: str, store: Path, ollama: Path, tmp_path: Path) -> None:
    more = {"OLLAMA_HOST": "127.0.0.1:9", "MGPU_OLLAMA": str(ollama), "FAKE_OLLAMA_FAULT": "dies-later"}
    with staying(python_path, tmp_path, "llama3.1:8b", **more) as process:
        started = time.monotonic()
        assert process.wait(30) == 7
        assert time.monotonic() - started < 15
    assert "ollama" in said(tmp_path)
    assert "exited with status 1" in said(tmp_path)


def test_a_client_that_has_it_loaded_anew_is_said(python_path: str, store: Path, tmp_path: Path) -> None:
    from urllib.request import urlopen

    with serving(tmp_path) as server, staying(python_path, tmp_path, "llama3.1:8b", OLLAMA_HOST=server.url) as process:
        wait_for(lambda: "ready after" in said(tmp_path), "ready")
        name = server.ask("/api/ps")["models"][0]["name"]
        body: dict[str, Any] = {"model": name, "prompt": "x", "options": {"num_ctx": 2048}}
        urlopen(f"{server.url}/api/generate", json.dumps(body).encode(), timeout=5).close()
        wait_for(lambda: "loaded anew with a context of 2048" in said(tmp_path), "the warning")
        assert process.poll() is None
