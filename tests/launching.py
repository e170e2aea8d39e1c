"""Launches from outside: mgpu as a person types it, in a house of its own, and all that is left of it there.

The machine has two RTX 3090 (a FAKE NVML) and a FAKE llama-server; every process started in the house, however far it
has gone from its parents, carries the house's name in its environment.
"""

from __future__ import annotations

import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

import psutil

from fake_build import SERVER, build_program
from fakenvml.machine import Machine, rtx_3090

TUNED: Final = Path(__file__).parent / "tuned"

#: What outlives all launches: locks that nobody holds, and what was measured.
LASTING: Final = ("launches/planning", "launches/ports", "measured.jsonl")

#: Looks and waits in tenths of seconds.
FAST: Final = {"mgpu.launch.keeper.BEAT_S": 0.15, "mgpu.launch.health._ANSWER_S": 0.3}

_MARK: Final = "MGPU_TEST_HOUSE"
_PATIENCE_S: Final = 30.0

#: Before the answers: a build that takes its time to list its devices, as one whose driver is asleep.
_SLOW: Final = """\
import os, sys, time
while "--list-devices" in sys.argv and os.path.exists(os.environ["FAKE_SLOW"]):
    time.sleep(0.02)
"""

#: After them: the server, told by the environment how to behave.
_STARTED: Final = """\
import shlex
port = words[words.index("--port") + 1]
more = shlex.split(os.environ.get("FAKE_SERVER", ""))
os.execv(sys.executable, [sys.executable, {server!r}, "--port", port, "--mood", {mood!r}, *more])
"""


class House:
    """Homes, temporary files and programs below `folder`. `model`: what to run."""

    def __init__(self, folder: Path, python_path: str, nvml: Path, model: Path) -> None:
        self.folder = folder
        self._started: list[Started] = []
        self.model = str(model)
        self.state = folder / "state" / "mgpu"
        self.temporary = folder / "tmp"
        self.temporary.mkdir()
        self.mood = folder / "mood"
        self.slow = folder / "slow"
        self.machine(Machine(rtx_3090(0), rtx_3090(1)))
        self.server(_SLOW + build_program(_STARTED.format(server=SERVER, mood=str(self.mood))))
        self.env = {
            **{name: value for name, value in os.environ.items() if name != "MGPU_API_KEY"},
            _MARK: str(folder),
            "PYTHONPATH": python_path,
            "HOME": str(folder),
            "XDG_STATE_HOME": str(folder / "state"),
            "XDG_CACHE_HOME": str(folder / "cache"),
            "XDG_CONFIG_HOME": str(folder / "config"),
            "TMPDIR": str(self.temporary),
            "LD_LIBRARY_PATH": str(nvml),
            "FAKE_NVML_CONFIG": str(folder / "machine.toml"),
            "FAKE_SLOW": str(self.slow),
            "MGPU_LLAMA_SERVER": str(folder / "llama-server"),
        }

    def machine(self, machine: Machine) -> None:
        """From now on the driver says this."""
        draft = self.folder / "machine.draft"
        draft.write_text(machine.toml(), encoding="utf-8")
        draft.replace(self.folder / "machine.toml")

    def server(self, code: str) -> None:
        """From now on this is llama-server."""
        from conftest import write_program  # which imports us

        write_program(self.folder / "llama-server", code)

    def tuned(self, settings: Mapping[str, object] = FAST, **env: str) -> dict[str, str]:
        """The environment of an mgpu with other waits."""
        path = f"{TUNED}{os.pathsep}{self.env['PYTHONPATH']}"
        return {"PYTHONPATH": path, "MGPU_TUNED": json.dumps(dict(settings)), **env}

    def call(
        self,
        *args: str,
        env: Mapping[str, str] | None = None,
        timeout: float = 60,
        inside: Sequence[str] = (),
        cwd: Path | None = None,
    ) -> subprocess.CompletedProcess[str]:
        """mgpu, to its end. `inside`: what it is started by."""
        return subprocess.run(
            (*inside, sys.executable, "-m", "mgpu", *args),
            env={**self.env, **(env or {})},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout,
            cwd=cwd,
            check=False,
        )

    def run(self, *more: str, env: Mapping[str, str] | None = None, inside: Sequence[str] = ()) -> Started:
        """`mgpu run MODEL` in the foreground."""
        return self.start("run", self.model, *more, env=env, inside=inside)

    def start(self, *args: str, env: Mapping[str, str] | None = None, inside: Sequence[str] = ()) -> Started:
        """mgpu, as it goes on."""
        started = Started((*inside, sys.executable, "-m", "mgpu", *args), {**self.env, **(env or {})})
        return self.keep(started)

    def keep(self, started: Started) -> Started:
        """Ended with the house."""
        self._started.append(started)
        return started

    def detach(self, *more: str, env: Mapping[str, str] | None = None) -> subprocess.CompletedProcess[str]:
        """`mgpu run MODEL --detach`, which must succeed."""
        done = self.call("run", self.model, "--detach", *more, env=env)
        assert done.returncode == 0, done.stderr
        return done

    def launches(self, env: Mapping[str, str] | None = None) -> list[dict[str, Any]]:
        """What `mgpu ps --json` says."""
        done = self.call("ps", "--json", env=env)
        assert done.returncode == 0, done.stderr
        launches: list[dict[str, Any]] = json.loads(done.stdout)["launches"]
        return launches

    def launch(self, env: Mapping[str, str] | None = None) -> dict[str, Any]:
        """The only one there is."""
        (launch,) = self.launches(env)
        return launch

    def processes(self) -> dict[int, str]:
        """All that was started in this house and lives: pids, and their command lines."""
        mark = f"{_MARK}={self.folder}".encode()
        found: dict[int, str] = {}
        for pid in (int(path.name) for path in Path("/proc").iterdir() if path.name.isdecimal()):
            with suppress(OSError):
                if mark in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"):
                    words = Path(f"/proc/{pid}/cmdline").read_bytes().rstrip(b"\0").split(b"\0")
                    found[pid] = shlex.join(word.decode("utf-8", "replace") for word in words)
        return found

    def runtimes(self) -> list[int]:
        """Pids of the fake servers."""
        return [pid for pid, line in self.processes().items() if SERVER in line]

    def files(self) -> set[str]:
        """What lies in the state directory and among the temporary files, logs and reports aside."""
        roots = (self.state, self.temporary)
        found = {str(path.relative_to(self.folder)) for root in roots for path in root.rglob("*") if path.is_file()}
        return {name for name in found if not name.startswith(("state/mgpu/logs/", "state/mgpu/reports/"))}

    def assert_clean(self) -> None:
        """No process of ours, and no file but what outlives all launches."""
        wait_for(lambda: not self.processes(), f"processes left: {self.processes()}")
        assert self.files() <= {f"state/mgpu/{name}" for name in LASTING}

    def close(self) -> None:
        for pid in self.processes():
            with suppress(OSError):
                os.kill(pid, signal.SIGKILL)
        for started in self._started:
            started.process.kill()
            started.process.wait()


class Started:
    """One mgpu under way. `said`: what it has written so far, both outputs."""

    def __init__(self, argv: Sequence[str], env: Mapping[str, str]) -> None:
        self._said = Path(env["HOME"]) / f"said-{time.monotonic_ns()}"
        with self._said.open("wb") as out:
            self.process = subprocess.Popen(
                argv, env=dict(env), stdin=subprocess.DEVNULL, stdout=out, stderr=out, start_new_session=True
            )

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def said(self) -> str:
        return self._said.read_text(errors="replace")

    def until(self, words: str) -> str:
        """Wait for these words, and return the line they are in."""
        wait_for(lambda: words in self.said or self.process.poll() is not None, lambda: f"no {words!r}: {self.said}")
        lines = [line for line in self.said.splitlines() if words in line]
        assert lines, self.said
        return lines[-1]

    def end(self, number: signal.Signals | None = None, *, within: float = _PATIENCE_S) -> int:
        """Its exit code, after it was sent a signal."""
        if number is not None:
            self.process.send_signal(number)
        return self.process.wait(within)


def wait_for(
    condition: Callable[[], object], otherwise: str | Callable[[], object], within: float = _PATIENCE_S
) -> None:
    """Until it is so. AssertionError where it does not come to that."""
    deadline = time.monotonic() + within
    while not condition():
        if time.monotonic() > deadline:
            raise AssertionError(otherwise if isinstance(otherwise, str) else str(otherwise()))
        time.sleep(0.02)


def listening() -> dict[str, int | None]:
    """Where anybody listens on this machine, and the pid of who does, as far as we may know."""
    connections = psutil.net_connections(kind="inet")
    return {str(one.laddr): one.pid for one in connections if one.status == psutil.CONN_LISTEN}


def free_port() -> int:
    """One that nobody is likely to take next: not from 8080 up."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def descriptors(pid: int) -> int:
    return sum(1 for _ in Path(f"/proc/{pid}/fd").iterdir())


def ask(endpoint: str, path: str = "/health") -> int:
    """The status that a server answers with."""
    from http.client import HTTPConnection
    from urllib.parse import urlsplit

    connection = HTTPConnection(urlsplit(endpoint).netloc, timeout=10)
    try:
        connection.request("GET", path)
        return connection.getresponse().status
    finally:
        connection.close()
