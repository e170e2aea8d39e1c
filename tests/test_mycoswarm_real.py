"""The real mycoSwarm daemon (PyPI), in a network of the test's own: it binds every interface and multicasts.

Two daemons: one without Ollama, which is asked, and one beside a FAKE Ollama, to which it must route. Skipped with a
word where there is no daemon ($MGPU_TEST_MYCOSWARM, or `mycoswarm` on PATH) or no namespace to put it in.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

pytestmark = pytest.mark.runtime

#: A link with an address, whose other end is up, and a default route: what the daemon takes for a LAN.
_LAN = """\
set -e
ip link set lo up
ip link add myco0 type veth peer name myco1
ip addr add 10.77.0.2/24 dev myco0
ip link set myco0 up
ip link set myco1 up
ip route add default via 10.77.0.1
echo ready
exec sleep 600
"""

#: As much of Ollama as mycoSwarm asks: its models, and a chat as NDJSON.
_OLLAMA = """\
import json
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.say({"models": [{"name": "tiny:1b", "size": 1 << 30, "details": {}}]})

    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        words = f"{asked['model']} at {asked['options']['num_ctx']}: {asked['messages'][-1]['content']}".split(" ")
        parts = [{"message": {"content": f"{word} "}, "done": False} for word in words]
        self.say(*parts, {"message": {"content": ""}, "done": True, "eval_count": len(words), "eval_duration": 10**9})

    def say(self, *objects):
        self.send_response(200)
        self.end_headers()
        self.wfile.write("".join(f"{json.dumps(one)}\\n" for one in objects).encode())

    def log_message(self, *_):
        pass

ThreadingHTTPServer(("127.0.0.1", 11434), Handler).serve_forever()
"""

Inside = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def daemon() -> str:
    """The real daemon's program."""
    given = os.environ.get("MGPU_TEST_MYCOSWARM") or shutil.which("mycoswarm")
    if given is None or not Path(given).is_file():
        pytest.skip("no mycoSwarm: pip install mycoswarm, and set MGPU_TEST_MYCOSWARM to its program")
    return str(Path(given).absolute())


class _Network:
    """A namespace with a LAN of one machine, and the processes in it."""

    def __init__(self, stack: ExitStack) -> None:
        self._stack = stack
        lan = ("unshare", "--map-root-user", "--net", "sh", "-c", _LAN)
        holder = self._keep(subprocess.Popen(lan, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True))
        assert holder.stdout is not None
        first = holder.stdout.readline().strip()
        if first != "ready":
            pytest.skip(f"no network namespace here: {first or 'unshare failed'}")
        self._enter = ("nsenter", "-t", str(holder.pid), "--user", "--preserve-credentials", "--net")

    def start(self, *words: str, env: dict[str, str], log: Path) -> None:
        with log.open("w") as out:
            command = (*self._enter, *words)
            environ = {**os.environ, **env}
            process = subprocess.Popen(command, env=environ, stdout=out, stderr=subprocess.STDOUT, text=True)
            self._keep(process)

    def run(self, *words: str, env: dict[str, str]) -> subprocess.CompletedProcess[str]:
        command = (*self._enter, *words)
        return subprocess.run(
            command, env={**os.environ, **env}, capture_output=True, text=True, timeout=120, check=False
        )

    def _keep(self, process: subprocess.Popen[str]) -> subprocess.Popen[str]:
        def end() -> None:
            process.kill()
            process.communicate()

        self._stack.callback(end)
        return process


@pytest.fixture(scope="module")
def network() -> Iterator[_Network]:
    if sys.platform != "linux" or not all(map(shutil.which, ("unshare", "nsenter", "ip"))):
        pytest.skip("no unshare, nsenter or ip here")
    with ExitStack() as stack:
        yield _Network(stack)


def _home(folder: Path) -> Path:
    """Where a daemon keeps its id; all have one token."""
    (folder / ".config/mycoswarm").mkdir(parents=True)
    (folder / ".config/mycoswarm/swarm-token").write_text("0123456789abcdef")
    return folder


@pytest.fixture(scope="module")
def asked(daemon: str, network: _Network, tmp_path_factory: pytest.TempPathFactory, python_path: str) -> Inside:
    """`asked(…)`: mgpu beside a daemon without Ollama, which knows one other."""
    folder = tmp_path_factory.mktemp("swarm")
    tools = folder / "bin"
    tools.mkdir()
    (tools / "ollama").write_text("#!/bin/sh\n")  # the daemon looks for Ollama's program first
    (tools / "ollama").chmod(0o755)
    network.start(sys.executable, "-c", _OLLAMA, env={}, log=folder / "ollama.log")
    path = os.environ["PATH"]
    one, two = _home(folder / "one"), _home(folder / "two")
    with_ollama = {"HOME": str(two), "PATH": f"{tools}:{path}", "PYTHONUNBUFFERED": "1"}
    network.start(daemon, "daemon", "--port", "7891", env=with_ollama, log=folder / "two.log")
    network.start(daemon, "daemon", "--port", "7890", env={"HOME": str(one), "PATH": path}, log=folder / "one.log")
    ours = {"HOME": str(one), "PYTHONPATH": python_path}

    def inside(*words: str, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
        return network.run(sys.executable, "-m", "mgpu", *words, env=ours | (env or {}))

    _wait_for_peer(network, folder)
    return inside


def _wait_for_peer(network: _Network, folder: Path) -> None:
    header = "X-Swarm-Token: 0123456789abcdef"
    for _ in range(60):
        seen = network.run("curl", "-s", "-H", header, "http://127.0.0.1:7890/peers", env={})
        if "tiny:1b" in seen.stdout:
            return
        time.sleep(0.5)
    logs = [(folder / name).read_text()[-2000:] for name in ("one.log", "two.log")]
    pytest.fail(f"the daemons have not found each other: {seen.stdout}\n{logs[0]}\n{logs[1]}")


def test_the_nodes_are_listed(asked: Inside) -> None:
    done = asked("runtimes", "--json")
    row = next(one for one in json.loads(done.stdout)["runtimes"] if one["runtime"] == "mycoswarm")
    assert (row["found"], row["origin"], len(row["devices"])) == (True, "running", 2), done.stderr


def test_a_request_is_routed_to_the_node_that_has_the_model(asked: Inside) -> None:
    done = asked("run", "tiny:1b", "--runtime", "mycoswarm", "--ctx", "4096", "--prompt", "one two three")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "tiny:1b at 4096: one two three"
    assert "routed to " in done.stderr


def test_a_model_that_nobody_has_is_refused(asked: Inside) -> None:
    done = asked("run", "large:70b", "--runtime", "mycoswarm", "--prompt", "one")
    assert done.returncode == 4
    assert "has the model large:70b" in done.stderr


def test_a_wrong_token_is_refused(asked: Inside, tmp_path: Path) -> None:
    home = tmp_path / "stranger"
    (home / ".config/mycoswarm").mkdir(parents=True)
    (home / ".config/mycoswarm/swarm-token").write_text("not-this-one")
    done = asked("run", "tiny:1b", "--runtime", "mycoswarm", "--prompt", "one", env={"HOME": str(home)})
    assert done.returncode == 6
    assert "does not accept the token" in done.stderr


def test_no_daemon_on_that_port(asked: Inside) -> None:
    done = asked("run", "tiny:1b", "--runtime", "mycoswarm", env={"MGPU_MYCOSWARM_URL": "127.0.0.1:7999"})
    assert done.returncode == 6
    assert "no mycoswarm answers" in done.stderr
