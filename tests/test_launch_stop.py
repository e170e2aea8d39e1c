"""Stopped from outside at every stage, by every signal: the exit code is right and nothing is left behind.

A program (`launch_driver.py`) that launches as `mgpu run` does is started, and its processes are counted afterwards.
The tests marked `runtime` do the same with a real llama-server.
"""

from __future__ import annotations

import os
import pty
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from mgpu.launch.ports import is_free
from mgpu.launch.process import GRACE_S

HERE = Path(__file__).parent
FAKE = (sys.executable, str(HERE / "fake_llama_server.py"), "--port", "{port}")
#: The first terminal that a session's leader opens becomes its controlling one, whose closing is SIGHUP.
ADOPT_TERMINAL = "import os, sys; os.open(os.ttyname(0), os.O_RDWR); os.execv(sys.argv[1], sys.argv[1:])"
STOPS = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]


class Driven:
    """One run of the driver, with its outputs in files."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.log = directory / "log"
        self.marker = str(self.log)
        self.process: subprocess.Popen[bytes] | None = None

    def start(self, *runtime: str, options: tuple[str, ...] = (), terminal: int | None = None) -> None:
        env = os.environ | {"PYTHONPATH": os.pathsep.join(str(HERE.parent / root) for root in ("launcher", "adapters"))}
        driver = (sys.executable, str(HERE / "launch_driver.py"), *options, str(self.log), "--", *runtime)
        if terminal is not None:
            driver = (sys.executable, "-c", ADOPT_TERMINAL, *driver)
        with (self.directory / "out").open("wb") as out, (self.directory / "err").open("wb") as err:
            self.process = subprocess.Popen(
                driver,
                env=env,
                stdin=subprocess.DEVNULL if terminal is None else terminal,
                stdout=out if terminal is None else terminal,
                stderr=err if terminal is None else terminal,
                start_new_session=True,
            )

    @property
    def out(self) -> str:
        return (self.directory / "out").read_text()

    @property
    def err(self) -> str:
        return (self.directory / "err").read_text()

    @property
    def logged(self) -> str:
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    def send(self, number: signal.Signals) -> None:
        assert self.process is not None
        self.process.send_signal(number)

    def exit_code(self) -> int:
        assert self.process is not None
        return self.process.wait(20)

    def ready(self) -> re.Match[str]:
        """Waits for it; groups: port, pid, seconds."""
        wait_for(lambda: "ready: " in self.err, "ready")
        match = re.search(r"ready: (\d+) (\d+) ([\d.]+)", self.err)
        assert match is not None
        return match

    def relatives(self) -> list[int]:
        """The driver, and every process whose standard output is the log or whose arguments name it."""
        return [
            p.pid for p in psutil.process_iter(["cmdline"]) if self.marker in (p.info["cmdline"] or ()) or self._logs(p)
        ]

    def _logs(self, process: psutil.Process) -> bool:
        try:
            return Path(f"/proc/{process.pid}/fd/2").readlink() == self.log
        except OSError:
            return False


def wait_for(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline, f"waited in vain: {what}"
        time.sleep(0.01)


@pytest.fixture
def driven(tmp_path: Path) -> Iterator[Driven]:
    driven = Driven(tmp_path)
    yield driven
    if driven.process is not None:
        driven.process.kill()
        driven.process.wait()
    wait_for(lambda: driven.relatives() == [], "the end of all that was started")


@pytest.mark.parametrize("number", STOPS)
def test_while_serving(driven: Driven, number: signal.Signals) -> None:
    driven.start(*FAKE, "--fault", "grandchild", "--marker", driven.marker)
    port = int(driven.ready()[1])
    assert len(driven.relatives()) == 4
    driven.send(number)
    assert driven.exit_code() == 130
    assert driven.relatives() == []
    assert is_free("127.0.0.1", port)
    assert "error: " in driven.err
    assert "Traceback" not in driven.err


@pytest.mark.parametrize("number", STOPS)
def test_while_loading(driven: Driven, number: signal.Signals) -> None:
    driven.start(*FAKE, "--load-s", "99")
    wait_for(lambda: "load_model" in driven.logged, "loading")
    driven.send(number)
    assert driven.exit_code() == 130
    assert driven.relatives() == []
    assert "ready" not in driven.err


def test_while_answering(driven: Driven) -> None:
    driven.start(*FAKE, "--fault", "stall-while-answering", options=("--prompt", "x"))
    wait_for(lambda: driven.out == "The answer", "half of an answer")
    begin = time.monotonic()
    driven.send(signal.SIGINT)
    assert driven.exit_code() == 130
    assert time.monotonic() - begin < GRACE_S
    assert driven.out == "The answer"
    assert driven.relatives() == []


def test_twice_for_one_that_is_deaf(driven: Driven) -> None:
    driven.start(*FAKE, "--fault", "ignore-sigterm")
    driven.ready()
    begin = time.monotonic()
    driven.send(signal.SIGINT)
    wait_for(lambda: "stopping" in driven.err, "the first request")
    time.sleep(0.15)  # closer together, they are one request passed on by a wrapper
    driven.send(signal.SIGINT)
    assert driven.exit_code() == 130
    assert time.monotonic() - begin < GRACE_S
    assert driven.relatives() == []


@pytest.mark.parametrize("loading", [True, False])
def test_a_closed_terminal(driven: Driven, loading: bool) -> None:
    ours, theirs = pty.openpty()
    driven.start(*FAKE, "--load-s", "99" if loading else "0.05", terminal=theirs)
    os.close(theirs)
    wait_for(lambda: ("load_model" if loading else "server is listening") in driven.logged, "the fake")
    if not loading:
        assert b"ready: " in os.read(ours, 4096)
    os.close(ours)
    assert driven.exit_code() == 130
    assert driven.relatives() == []


@pytest.mark.skipif(sys.platform != "linux", reason="PR_SET_PDEATHSIG is Linux's")
@pytest.mark.parametrize("loading", [True, False])
def test_killed(driven: Driven, loading: bool) -> None:
    driven.start(*FAKE, "--load-s", "99" if loading else "0.05")
    wait_for(lambda: ("load_model" if loading else "server is listening") in driven.logged, "the fake")
    driven.send(signal.SIGKILL)
    assert driven.exit_code() == -signal.SIGKILL
    wait_for(lambda: driven.relatives() == [], "the end of the runtime")


def test_a_failure_is_exit_7(driven: Driven) -> None:
    driven.start(*FAKE, "--fault", "out-of-memory")
    assert driven.exit_code() == 7
    assert "exited with status 1" in driven.err


def test_a_missing_executable_is_exit_6(driven: Driven) -> None:
    driven.start(str(driven.directory / "absent"))
    assert driven.exit_code() == 6


def test_a_taken_port_is_exit_7(driven: Driven) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        driven.start(*FAKE, options=("--port", str(server.getsockname()[1])))
        assert driven.exit_code() == 7
    assert "in use" in driven.err
    assert driven.logged == ""


@pytest.fixture
def real(llama_server: str, real_gguf: Path) -> tuple[str, ...]:
    return (llama_server, "-m", str(real_gguf), "--port", "{port}", "-c", "512", "-np", "1", "-t", "2", "-ngl", "0")


@pytest.mark.runtime
def test_a_real_answer(driven: Driven, real: tuple[str, ...]) -> None:
    driven.start(*real, "-n", "8", options=("--prompt", "Say hello."))
    assert driven.exit_code() == 0
    assert driven.out.strip()
    assert driven.relatives() == []


@pytest.mark.runtime
@pytest.mark.parametrize(
    ("stage", "number"),
    [
        ("start", signal.SIGINT),
        ("loading", signal.SIGTERM),
        ("serving", signal.SIGINT),
        ("serving", signal.SIGHUP),
        ("answering", signal.SIGINT),
        ("answering", signal.SIGTERM),
    ],
)
def test_a_real_one_stopped(driven: Driven, real: tuple[str, ...], stage: str, number: signal.Signals) -> None:
    prompt = ("--prompt", "Count from one to a thousand, in words.") if stage == "answering" else ()
    driven.start(*real, options=prompt)
    if stage == "start":
        wait_for(driven.log.exists, "its start")
    elif stage == "loading":
        wait_for(lambda: "load" in driven.logged, "its loading")
    elif stage == "serving":
        assert not is_free("127.0.0.1", int(driven.ready()[1]))
    else:
        wait_for(lambda: driven.out != "", "the beginning of its answer")
    begin = time.monotonic()
    driven.send(number)
    assert driven.exit_code() == 130
    assert time.monotonic() - begin < GRACE_S  # it was not necessary to kill it
    assert driven.relatives() == []


@pytest.mark.runtime
@pytest.mark.skipif(sys.platform != "linux", reason="PR_SET_PDEATHSIG is Linux's")
def test_a_real_one_does_not_outlive_us(driven: Driven, real: tuple[str, ...]) -> None:
    driven.start(*real)
    port, pid, _ = (driven.ready()[i] for i in (1, 2, 3))
    driven.send(signal.SIGKILL)
    driven.exit_code()
    wait_for(lambda: not psutil.pid_exists(int(pid)), "the end of llama-server")
    assert is_free("127.0.0.1", int(port))


@pytest.mark.runtime
def test_a_real_one_refuses(driven: Driven, real: tuple[str, ...]) -> None:
    driven.start(*real, "--no-such-flag")
    assert driven.exit_code() == 7
    assert "exited with status 1 before it was ready" in driven.err
    assert "invalid argument: --no-such-flag" in driven.logged
