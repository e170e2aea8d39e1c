"""A whole launch, in this process, of a fake llama-server that works or fails in every way it can."""

from __future__ import annotations

import io
import os
import re
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import psutil
import pytest

from mgpu.adapter import Adapter, Buffer, Cause, Command, LogFact, Stage
from mgpu.errors import InterruptedLaunchError, RuntimeFailedError
from mgpu.launch.ports import is_free
from mgpu.launch.process import GRACE_S, Child
from mgpu.launch.ready import wait_ready
from mgpu.launch.serve import Launch, Ready, serve
from mgpu.launch.signals import StopSignals
from mgpu.launch.watch import Watch

FAKE = Path(__file__).with_name("fake_llama_server.py")


def read_log(line: str) -> LogFact | None:
    """A small adapter's view of the fake's log."""
    if buffer := re.search(r"(\w+) (model|KV) buffer size = ([\d.]+) MiB", line):
        kind = {"model": "weights", "KV": "kv"}[buffer[2]]
        return Buffer(device=buffer[1], kind=kind, n_bytes=int(float(buffer[3]) * (1 << 20)))
    if "out of memory" in line:
        return Cause(text="the GPU is out of memory", hint="a smaller --ctx")
    if "error loading model" in line:
        return Cause(text="the model cannot be loaded", hint="")
    if "load_tensors: trying" in line or "load_model" in line:
        return Stage(text=line.partition(": ")[2])
    return None


ADAPTER = cast("Adapter", SimpleNamespace(read_log=read_log))


class Bench:
    """Launches of the fake, and what came of them."""

    def __init__(self, directory: Path) -> None:
        self.log = directory / "log"
        self.marker = f"marker-{os.getpid()}-{directory.name}"
        self.out, self.err = io.StringIO(), io.StringIO()
        self.ready: list[Ready] = []
        self.ports: list[int] = []
        self.on_ready: Callable[[Ready], None] = lambda _: None

    def command(self, port: int, *arguments: str) -> Command:
        self.ports.append(port)
        return Command(
            argv=(sys.executable, str(FAKE), "--port", str(port), "--marker", self.marker, *arguments),
            env={"PYTHONDONTWRITEBYTECODE": "1"},
            scrub=(),
            files={},
            ready_url=f"http://127.0.0.1:{port}/health",
            endpoint=f"http://127.0.0.1:{port}/v1",
        )

    def serve(
        self, *arguments: str, prompt: str | None = None, port: int | None = None, api_key: str | None = None
    ) -> int:
        launch = Launch(
            command_for=lambda port: self.command(port, *arguments),
            adapter=ADAPTER,
            environ=os.environ,
            log_path=self.log,
            port=port,
            prompt=prompt,
            api_key=api_key,
        )
        return serve(launch, on_ready=self._is_ready, out=self.out, err=self.err)

    def _is_ready(self, ready: Ready) -> None:
        self.ready.append(ready)
        self.on_ready(ready)

    def processes(self) -> list[psutil.Process]:
        return [p for p in psutil.process_iter(["cmdline"]) if self.marker in (p.info["cmdline"] or ())]

    def when_logged(self, text: str, act: Callable[[], None]) -> None:
        """Do `act` in a thread once the log contains `text`."""

        def wait() -> None:
            deadline = time.monotonic() + 20
            while not (self.log.exists() and text in self.log.read_text(errors="replace")):
                if time.monotonic() > deadline:
                    return
                time.sleep(0.01)
            act()

        threading.Thread(target=wait, daemon=True).start()


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    bench = Bench(tmp_path)
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGCHLD)]
    yield bench
    assert bench.processes() == []
    assert all(is_free("127.0.0.1", port) for port in bench.ports[-1:])
    assert handlers == [
        signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGCHLD)
    ]


def interrupt(_: object = None) -> None:
    os.kill(os.getpid(), signal.SIGINT)


def test_one_question(bench: Bench) -> None:
    assert bench.serve(prompt="How many?") == 0
    assert bench.out.getvalue() == "The answer is fünf.\n"
    (ready,) = bench.ready
    assert ready.proven
    assert ready.port == bench.ports[0] >= 8080
    assert 0 < ready.seconds < 20
    assert ready.log_path == bench.log
    assert ready.buffers == (
        Buffer(device="CPU", kind="weights", n_bytes=12 << 20),
        Buffer(device="CPU", kind="kv", n_bytes=3 << 20),
    )
    assert "cleaning up before exit" in bench.log.read_text()


@pytest.mark.parametrize("fault", ["none", "late-bind", "garbage-log", "embeddings-only", "grandchild"])
def test_it_stays_until_asked_to_stop(bench: Bench, fault: str) -> None:
    bench.on_ready = interrupt
    with pytest.raises(InterruptedLaunchError, match="Ctrl-C"):
        bench.serve("--fault", fault)
    assert len(bench.ready) == 1
    assert bench.ready[0].proven == (fault != "embeddings-only")
    assert "stopping python" in bench.err.getvalue()


def test_an_api_key(bench: Bench) -> None:
    assert bench.serve("--api-key", "sk-1", prompt="x", api_key="sk-1") == 0
    assert bench.ready[0].proven


def test_a_key_that_only_the_runtime_knows(bench: Bench) -> None:
    bench.on_ready = interrupt
    with pytest.raises(InterruptedLaunchError):
        bench.serve("--api-key", "sk-1")
    assert not bench.ready[0].proven


@pytest.mark.parametrize(
    ("fault", "message", "hint"),
    [
        ("exit-at-once", "exited with status 1 before it was ready", "whole log"),
        ("exit-while-loading", "exited with status 1 before it was ready", "whole log"),
        ("out-of-memory", "exited with status 1 before it was ready: the GPU is out of memory", "a smaller --ctx"),
        ("recovers-then-dies", "exited with status 3 before it was ready", "whole log"),
        ("abort-at-first-token", "was killed by SIGABRT .*: the GPU is out of memory", "a smaller --ctx"),
        ("error-at-first-token", "answered the first request with HTTP 500: Compute error.", "whole log"),
        ("no-token", "answered the first request without a token", "whole log"),
    ],
)
def test_it_never_gets_ready(bench: Bench, fault: str, message: str, hint: str) -> None:
    with pytest.raises(RuntimeFailedError, match=message) as error:
        bench.serve("--fault", fault)
    assert hint in error.value.hint
    assert bench.ready == []
    assert error.value.log_tail
    assert error.value.log_tail[-1] in bench.log.read_text().splitlines()[-2:]


@pytest.mark.parametrize(
    ("fault", "printed", "message"),
    [
        ("die-while-answering", "The answer", "was killed by SIGKILL .* and broke off the answer"),
        ("error-while-answering", "The answer", "broke off the answer: context is full"),
        ("no-answer-at-all", "", "refused the question with HTTP 500: no answer"),
    ],
)
def test_it_fails_while_answering(bench: Bench, fault: str, printed: str, message: str) -> None:
    with pytest.raises(RuntimeFailedError, match=message):
        bench.serve("--fault", fault, prompt="x")
    assert bench.out.getvalue() == printed


@pytest.mark.parametrize(
    ("fault", "answer"),
    [
        ("no-chat-template", "plain: How?\n"),
        ("reasoning", "The answer is fünf.\n"),
        ("reasoning-only", "Let me think.\n"),
    ],
)
def test_other_answers(bench: Bench, fault: str, answer: str) -> None:
    assert bench.serve("--fault", fault, prompt="How?") == 0
    assert bench.out.getvalue() == answer


def test_an_answer_fits_the_terminal(bench: Bench) -> None:
    raw = io.BytesIO()
    bench.out = cast("io.StringIO", io.TextIOWrapper(raw, encoding="ascii"))
    assert bench.serve(prompt="x") == 0
    assert raw.getvalue() == b"The answer is f?nf.\n"


def test_a_reader_that_goes_away_ends_it_quietly(bench: Bench) -> None:
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "w") as out:
        bench.out = cast("io.StringIO", out)
        assert bench.serve(prompt="x") == 0


def test_death_while_serving(bench: Bench) -> None:
    bench.on_ready = lambda ready: os.kill(ready.pid, signal.SIGKILL)
    with pytest.raises(RuntimeFailedError, match=r"killed by SIGKILL \(out of memory\?\) while it was serving"):
        bench.serve()


def test_a_caller_that_fails_leaves_nothing_behind(bench: Bench) -> None:
    def fail(_: Ready) -> None:
        raise ZeroDivisionError

    bench.on_ready = fail
    with pytest.raises(ZeroDivisionError):
        bench.serve()


@pytest.mark.parametrize(
    ("fault", "line", "prompt"),
    [
        ("none", "load_model", None),
        ("hang-in-health", "health: hanging", None),
        ("idle-for-ever", "load_model", None),
        ("stall-while-answering", "answer: stalling", "x"),
    ],
)
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_stop_is_honoured_at_once(
    bench: Bench, fault: str, line: str, prompt: str | None, number: signal.Signals
) -> None:
    asked: list[float] = []

    def ask() -> None:
        asked.append(time.monotonic())
        os.kill(os.getpid(), number)

    bench.when_logged(line, ask)
    with pytest.raises(InterruptedLaunchError):
        bench.serve("--fault", fault, "--load-s", "99" if fault == "none" else "0.05", prompt=prompt)
    assert time.monotonic() - asked[0] < 2


def test_a_stop_before_there_is_a_runtime(bench: Bench) -> None:
    def stop_first(port: int) -> Command:
        interrupt()
        return bench.command(port, "--load-s", "99")

    launch = Launch(command_for=stop_first, adapter=ADAPTER, environ=os.environ, log_path=bench.log)
    with pytest.raises(InterruptedLaunchError):
        serve(launch, on_ready=bench.ready.append, err=bench.err)
    assert bench.ready == []


def test_a_second_request_kills_at_once(bench: Bench) -> None:
    def twice(_: Ready) -> None:
        interrupt()
        threading.Timer(0.3, interrupt).start()

    bench.on_ready = twice
    begin = time.monotonic()
    with pytest.raises(InterruptedLaunchError):
        bench.serve("--fault", "ignore-sigterm")
    assert time.monotonic() - begin < GRACE_S


def test_a_stolen_port_is_left_to_the_thief(bench: Bench, tmp_path: Path) -> None:
    """The port is taken between our look and the runtime's bind."""
    gate = tmp_path / "gate"
    thieves: list[socket.socket] = []

    def steal() -> None:
        while not gate.exists():
            time.sleep(0.01)
        thieves.append(socket.create_server(("127.0.0.1", bench.ports[0])))
        gate.unlink()

    threading.Thread(target=steal, daemon=True).start()
    launch = Launch(
        command_for=lambda port: bench.command(port, *(() if bench.ports else ("--steal", str(gate)))),
        adapter=ADAPTER,
        environ=os.environ,
        log_path=bench.log,
        prompt="x",
    )
    assert serve(launch, on_ready=bench.ready.append, out=bench.out, err=bench.err) == 0
    assert len(bench.ports) == 2
    assert bench.ready[0].port == bench.ports[1] > bench.ports[0]
    assert "couldn't bind" in bench.log.read_text()
    thieves[0].close()


def test_a_wanted_port_is_not_moved(bench: Bench, tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    with socket.create_server(("127.0.0.1", 0)) as placeholder:
        port = int(placeholder.getsockname()[1])
    thieves: list[socket.socket] = []

    def steal() -> None:
        while not gate.exists():
            time.sleep(0.01)
        thieves.append(socket.create_server(("127.0.0.1", port)))
        gate.unlink()

    threading.Thread(target=steal, daemon=True).start()
    with pytest.raises(RuntimeFailedError, match="exited with status 1") as error:
        bench.serve("--steal", str(gate), port=port)
    assert any("couldn't bind" in line for line in error.value.log_tail)
    thieves[0].close()


def test_somebody_elses_server_is_not_ours(bench: Bench, tmp_path: Path) -> None:
    """Another llama-server answers on the port, while ours lives and has not tried to bind it yet."""
    with socket.create_server(("127.0.0.1", 0)) as placeholder:
        port = int(placeholder.getsockname()[1])
    theirs = Child.start((sys.executable, str(FAKE), "--port", str(port)), os.environ, tmp_path / "theirs")
    gate = tmp_path / "gate"
    command = bench.command(port, "--steal", str(gate))
    ours = Child.start(command.argv, os.environ, bench.log)
    try:
        with StopSignals() as stop, Watch(ours, ADAPTER) as watch:

            def open_the_gate() -> None:
                time.sleep(0.5)  # long enough for several looks at a server that says it is ready
                gate.unlink()

            def once_both_are_there() -> None:
                while "listening" not in (tmp_path / "theirs").read_text() or not gate.exists():
                    time.sleep(0.01)
                open_the_gate()

            threading.Thread(target=once_both_are_there, daemon=True).start()
            with pytest.raises(RuntimeFailedError, match="exited with status 1"):
                wait_ready(watch, command, stop=stop)
    finally:
        ours.stop()
        theirs.stop()
    assert not gate.exists()


def test_a_runtime_that_does_nothing_is_given_up(bench: Bench) -> None:
    command = bench.command(free_number(), "--fault", "idle-for-ever")
    child = Child.start(command.argv, os.environ, bench.log)
    try:
        with (
            StopSignals() as stop,
            Watch(child, ADAPTER) as watch,
            pytest.raises(RuntimeFailedError, match="has done nothing for 1 s"),
        ):
            wait_ready(watch, command, stop=stop, stall_s=1.0)
    finally:
        child.stop()


def free_number() -> int:
    with closing(socket.create_server(("127.0.0.1", 0))) as server:
        return int(server.getsockname()[1])


def test_files_are_written_first(bench: Bench, tmp_path: Path) -> None:
    path = tmp_path / "sub" / "config.yml"

    def command_for(port: int) -> Command:
        plain = bench.command(port)
        return Command(
            argv=plain.argv,
            env={},
            scrub=(),
            files={str(path): "größe: 1\n"},
            ready_url=plain.ready_url,
            endpoint=plain.endpoint,
        )

    launch = Launch(command_for=command_for, adapter=ADAPTER, environ=os.environ, log_path=bench.log, prompt="x")
    assert serve(launch, on_ready=bench.ready.append, out=bench.out, err=bench.err) == 0
    assert path.read_text(encoding="utf-8") == "größe: 1\n"
