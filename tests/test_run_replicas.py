"""Replicas and a proxy launched as one: ready together, stopped together, and the one that fails is told.

With a FAKE llama-server; the proxy is a real nginx where it is installed, and else none.
"""

from __future__ import annotations

import io
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import psutil
import pytest

from conftest import write_program
from mgpu.adapter import Adapter, Cause, Command, Endpoint, LogFact, Stage
from mgpu.errors import InterruptedLaunchError, RuntimeFailedError
from mgpu.launch.fleet import Fleet, FleetReady, Member, serve_fleet
from mgpu.launch.ports import is_free
from mgpu.launch.process import GRACE_S
from mgpu.launch.proxy import VARIABLE, Proxy, find_proxy

HERE = Path(__file__).parent
FAKE = HERE / "fake_llama_server.py"
NGINX = shutil.which("nginx", path=f"{os.environ.get('PATH', '')}{os.pathsep}/usr/sbin{os.pathsep}/usr/local/sbin")
needs_nginx = pytest.mark.skipif(NGINX is None, reason="no nginx: apt-get install nginx-light")


def read_log(line: str) -> LogFact | None:
    """A small adapter's view of the fake's log."""
    if "out of memory" in line:
        return Cause(text="the GPU is out of memory", hint="a smaller --ctx")
    if "load_model" in line:
        return Stage(text=line.partition(": ")[2])
    return None


ADAPTER = cast("Adapter", SimpleNamespace(read_log=read_log))


class Bench:
    """Launches of two fakes, and what came of them."""

    def __init__(self, directory: Path, proxy: Proxy | None) -> None:
        self.directory = directory
        self.proxy = proxy
        self.marker = f"marker-{os.getpid()}-{directory.name}"
        self.out, self.err = io.StringIO(), io.StringIO()
        self.ready: list[FleetReady] = []
        self.ports: list[list[int]] = [[], []]
        self.on_ready: Callable[[FleetReady], None] = lambda _: None

    def member(self, place: int, arguments: tuple[str, ...]) -> Member:
        def command_for(endpoint: Endpoint) -> Command:
            self.ports[place].append(endpoint.port)
            base = f"http://127.0.0.1:{endpoint.port}"
            words = (sys.executable, str(FAKE), "--port", str(endpoint.port), "--marker", self.marker, *arguments)
            return Command(argv=words, env={}, scrub=(), files={}, ready_url=f"{base}/health", endpoint=f"{base}/v1")

        return Member(name=f"GPU {place}", command_for=command_for, log_path=self.log(place))

    def log(self, place: int | str) -> Path:
        return self.directory / f"log-{place}"

    def serve(
        self,
        *arguments: tuple[str, ...],
        prompt: str | None = None,
        port: int | None = None,
        api_key: str | None = None,
    ) -> int:
        """`arguments`: of each fake, in order; of all of them, where there is one."""
        each = arguments if len(arguments) > 1 else arguments * 2 or ((), ())
        fleet = Fleet(
            members=tuple(self.member(place, own) for place, own in enumerate(each)),
            proxy=self.proxy,
            proxy_log=self.log("proxy"),
            adapter=ADAPTER,
            environ=os.environ,
            port=port,
            api_key=api_key,
            prompt=prompt,
        )
        return serve_fleet(fleet, on_ready=self._is_ready, out=self.out, err=self.err)

    def _is_ready(self, ready: FleetReady) -> None:
        self.ready.append(ready)
        self.on_ready(ready)

    def processes(self) -> list[psutil.Process]:
        found = psutil.process_iter(["cmdline"])
        return [p for p in found if self.marker in (p.info["cmdline"] or ()) or _is_child(p)]

    def when_logged(self, place: int, text: str, act: Callable[[], None]) -> None:
        """Do `act` in a thread once that replica's log contains `text`."""

        def wait() -> None:
            deadline = time.monotonic() + 20
            log = self.log(place)
            while not (log.exists() and text in log.read_text(errors="replace")):
                if time.monotonic() > deadline:
                    return
                time.sleep(0.01)
            act()

        threading.Thread(target=wait, daemon=True).start()


def _is_child(process: psutil.Process) -> bool:
    try:
        return process.ppid() == os.getpid() and process.name() == "nginx"
    except psutil.Error:
        return False


@pytest.fixture(params=[pytest.param(True, id="nginx", marks=needs_nginx), pytest.param(False, id="no proxy")])
def proxy(request: pytest.FixtureRequest) -> Proxy | None:
    return find_proxy({**os.environ, VARIABLE: "nginx"}) if request.param else None


@pytest.fixture
def bench(tmp_path: Path, proxy: Proxy | None) -> Iterator[Bench]:
    bench = Bench(tmp_path, proxy)
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGCHLD)]
    yield bench
    assert bench.processes() == []
    assert not list((Path(os.environ["XDG_STATE_HOME"]) / "mgpu").glob("proxy-*"))
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
    assert [member.proven for member in ready.members] == [True, True]
    ports = [member.port for member in ready.members]
    front = int(re.findall(r":(\d+)/v1", ready.command.endpoint)[0])
    assert (front not in ports) == (bench.proxy is not None)
    assert front < ports[1]
    assert len({*ports, front}) == (3 if bench.proxy else 2)
    assert all("cleaning up before exit" in bench.log(place).read_text() for place in (0, 1))


def test_the_wanted_port_is_where_people_go(bench: Bench) -> None:
    port = free_number()
    assert bench.serve(prompt="x", port=port) == 0
    assert bench.ready[0].command.endpoint == f"http://127.0.0.1:{port}/v1"
    assert is_free("127.0.0.1", port)


def test_a_wanted_port_in_use_is_said_before_anything_starts(bench: Bench) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = int(server.getsockname()[1])
        with pytest.raises(RuntimeFailedError, match=f"port {port} on 127.0.0.1 is in use by"):
            bench.serve(port=port)
    assert not bench.log(0).exists()


def test_they_stay_until_asked_to_stop(bench: Bench) -> None:
    bench.on_ready = interrupt
    with pytest.raises(InterruptedLaunchError, match="Ctrl-C"):
        bench.serve()
    before = "nginx and 2 replicas" if bench.proxy else "2 replicas"
    assert f"stopping {before} (once more: kill them)" in bench.err.getvalue()


def test_they_load_at_the_same_time(bench: Bench) -> None:
    begin = time.monotonic()
    assert bench.serve(("--load-s", "1.5"), prompt="x") == 0
    assert time.monotonic() - begin < 2.9


def test_a_key_passes_through(bench: Bench) -> None:
    assert bench.serve(("--api-key", "sk-1"), prompt="x", api_key="sk-1") == 0
    assert bench.ready[0].proven


def test_a_runtime_with_openai_completions_alone_is_proven_too(bench: Bench) -> None:
    assert bench.serve(("--open-completions",), prompt="x") == 0
    assert bench.ready[0].proven


@pytest.mark.parametrize("place", [0, 1])
@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("exit-at-once", "exited with status 1 before it was ready"),
        ("out-of-memory", "exited with status 1 before it was ready: the GPU is out of memory"),
        ("abort-at-first-token", "was killed by SIGABRT .*: the GPU is out of memory"),
        ("error-at-first-token", "answered the first request with HTTP 500: Compute error."),
    ],
)
def test_the_one_that_does_not_start_is_told_and_ends_all(bench: Bench, place: int, fault: str, message: str) -> None:
    slow, bad = ("--load-s", "99"), ("--fault", fault)
    begin = time.monotonic()
    with pytest.raises(RuntimeFailedError, match=f"on GPU {place} {message}") as error:
        bench.serve(*((bad, slow) if place == 0 else (slow, bad)))
    assert time.monotonic() - begin < 10
    assert error.value.log_tail[-1] in bench.log(place).read_text().splitlines()[-2:]
    assert bench.ready == []


def test_one_that_was_ready_and_dies_while_the_other_loads(bench: Bench) -> None:
    def kill_first() -> None:
        time.sleep(0.5)
        (pid,) = [p.pid for p in bench.processes() if str(bench.ports[0][0]) in p.cmdline()]
        os.kill(pid, signal.SIGKILL)

    bench.when_logged(0, "listening", kill_first)
    with pytest.raises(RuntimeFailedError, match=r"on GPU 0 was killed by SIGKILL .* while others were loading"):
        bench.serve((), ("--load-s", "99"))


@pytest.mark.parametrize("place", [0, 1])
def test_death_while_serving(bench: Bench, place: int) -> None:
    bench.on_ready = lambda ready: os.kill(ready.members[place].pid, signal.SIGKILL)
    with pytest.raises(RuntimeFailedError, match=f"on GPU {place} was killed by SIGKILL .* while it was serving"):
        bench.serve()


def test_death_while_answering(bench: Bench) -> None:
    with pytest.raises(RuntimeFailedError, match=r"on GPU \d was killed by SIGKILL .* and broke off the answer"):
        bench.serve(("--fault", "die-while-answering"), prompt="x")
    assert bench.out.getvalue() == "The answer"


@pytest.mark.parametrize("fault", ["idle-for-ever", "hang-in-health", "none"])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_stop_is_honoured_at_once(bench: Bench, fault: str, number: signal.Signals) -> None:
    asked: list[float] = []

    def ask() -> None:
        asked.append(time.monotonic())
        os.kill(os.getpid(), number)

    bench.when_logged(1, "load_model", ask)
    with pytest.raises(InterruptedLaunchError):
        bench.serve((), ("--fault", fault, "--load-s", "99" if fault == "none" else "0.05"))
    assert time.monotonic() - asked[0] < 2


def test_deaf_ones_are_stopped_at_the_same_time(bench: Bench) -> None:
    bench.on_ready = interrupt
    begin = 0.0

    def at(_: FleetReady) -> None:
        nonlocal begin
        begin = time.monotonic()
        interrupt()

    bench.on_ready = at
    with pytest.raises(InterruptedLaunchError):
        bench.serve(("--fault", "ignore-sigterm"))
    assert GRACE_S <= time.monotonic() - begin < 2 * GRACE_S


def test_a_second_request_kills_at_once(bench: Bench) -> None:
    begin = 0.0

    def twice(_: FleetReady) -> None:
        nonlocal begin
        begin = time.monotonic()
        interrupt()
        threading.Timer(0.3, interrupt).start()

    bench.on_ready = twice
    with pytest.raises(InterruptedLaunchError):
        bench.serve(("--fault", "ignore-sigterm"))
    assert time.monotonic() - begin < GRACE_S


def test_a_stolen_port_is_left_to_the_thief(bench: Bench, tmp_path: Path) -> None:
    """A replica's port is taken between our look and its bind: all move on."""
    gate = tmp_path / "gate"
    thieves: list[socket.socket] = []

    def steal() -> None:
        while not gate.exists():
            time.sleep(0.01)
        thieves.append(socket.create_server(("127.0.0.1", bench.ports[1][0])))
        gate.unlink()
        while thieves:  # the second try finds no gate keeper
            if gate.exists():
                gate.unlink()
            time.sleep(0.01)

    threading.Thread(target=steal, daemon=True).start()
    assert bench.serve((), ("--steal", str(gate)), prompt="x") == 0
    assert bench.ready[0].members[1].port != bench.ports[1][0]
    assert "couldn't bind" in bench.log(1).read_text()
    thieves.pop().close()


class TestProxy:
    """What can go wrong with it."""

    @pytest.fixture
    def bench(self, tmp_path: Path) -> Iterator[Bench]:
        bench = Bench(tmp_path, None)
        yield bench
        assert bench.processes() == []
        assert not list((Path(os.environ["XDG_STATE_HOME"]) / "mgpu").glob("proxy-*"))

    def fake(self, bench: Bench, code: str) -> Proxy:
        program = write_program(bench.directory / "nginx", code)
        return Proxy(name="nginx", executable=str(program), version=(1, 22, 1))

    def test_it_refuses_its_configuration(self, bench: Bench) -> None:
        code = "import sys; sys.exit('nginx: [emerg] unknown directive \"least_conn\" in nginx.conf:22')"
        bench.proxy = self.fake(bench, code)
        with pytest.raises(RuntimeFailedError, match=r'nginx exited with status 1 .* "least_conn" in nginx') as error:
            bench.serve()
        assert "MGPU_PROXY=none" in error.value.hint

    def test_it_cannot_be_run(self, bench: Bench) -> None:
        bench.proxy = Proxy(name="haproxy", executable=str(bench.directory / "gone"))
        with pytest.raises(Exception, match=r"cannot run .*gone: No such file"):
            bench.serve()

    def test_a_replica_dies_while_it_starts(self, bench: Bench) -> None:
        bench.proxy = self.fake(bench, "import time; time.sleep(99)")

        def kill() -> None:
            time.sleep(1)
            for process in bench.processes():
                if str(bench.ports[1][0]) in process.cmdline():
                    process.kill()

        bench.when_logged(1, "listening", kill)
        with pytest.raises(RuntimeFailedError, match=r"on GPU 1 was killed by SIGKILL .* while nginx was starting"):
            bench.serve()

    @needs_nginx
    def test_it_dies_while_serving(self, bench: Bench) -> None:
        bench.proxy = find_proxy({**os.environ, VARIABLE: "nginx"})

        def kill(_: FleetReady) -> None:
            (process,) = [p for p in psutil.Process().children() if p.name() == "nginx"]
            process.kill()

        bench.on_ready = kill
        with pytest.raises(RuntimeFailedError, match=r"nginx was killed by SIGKILL .* while it was serving"):
            bench.serve()

    @needs_nginx
    def test_its_port_is_kept_for_it_while_the_replicas_load(self, bench: Bench) -> None:
        bench.proxy = find_proxy({**os.environ, VARIABLE: "nginx"})
        port, seen = free_number(), []

        def look() -> None:
            seen.append(is_free("127.0.0.1", port))
            with socket.socket() as client:
                seen.append(client.connect_ex(("127.0.0.1", port)) == 0)

        bench.when_logged(1, "load_model", look)
        assert bench.serve(("--load-s", "1"), prompt="x", port=port) == 0
        assert seen == [False, False]  # nobody else can have it, and nobody answers

    @needs_nginx
    def test_a_home_with_odd_characters(self, bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("XDG_STATE_HOME", str(bench.directory / 'a "$home"; {of} mine'))
        bench.proxy = find_proxy({**os.environ, VARIABLE: "nginx"})
        assert bench.serve(prompt="x") == 0


def free_number() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


# From outside: whatever ends mgpu, nothing of it is left.


@pytest.fixture
def driven(tmp_path: Path, python_path: str) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    with ExitStack() as stack:

        def start(*runtime: str, **env: str) -> subprocess.Popen[str]:
            fake = (sys.executable, str(FAKE), "--port", "{port}", "--marker", str(tmp_path), *runtime)
            process = subprocess.Popen(
                [sys.executable, str(HERE / "fleet_driver.py"), str(tmp_path), "--", *fake],
                env={**os.environ, "PYTHONPATH": python_path, **env},
                stderr=subprocess.PIPE,
                text=True,
            )
            stack.callback(process.communicate)
            stack.callback(process.kill)
            return process

        yield start


@pytest.mark.parametrize("stage", ["loading", "serving"])
@pytest.mark.parametrize(
    ("number", "code"),
    [
        (signal.SIGINT, 130),
        (signal.SIGTERM, 130),
        (signal.SIGHUP, 130),
        pytest.param(
            signal.SIGKILL, -9, marks=pytest.mark.skipif(sys.platform != "linux", reason="only Linux ties children")
        ),
    ],
)
@needs_nginx
def test_stopped_from_outside_nothing_is_left(
    driven: Callable[..., subprocess.Popen[str]], stage: str, number: signal.Signals, code: int
) -> None:
    process = driven("--load-s", "99" if stage == "loading" else "0.05", MGPU_PROXY="nginx")
    assert process.stderr is not None
    if stage == "serving":
        while "ready:" not in process.stderr.readline():
            assert process.poll() is None
    expected = 2 if stage == "loading" else 3
    family = psutil.Process(process.pid)
    wait_for(lambda: len(family.children()) == expected)
    children = family.children()
    process.send_signal(number)
    assert process.wait(20) == code
    wait_for(lambda: not any(alive(child) for child in children))


def alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


def wait_for(condition: Callable[[], bool], seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "not in time"
        time.sleep(0.02)
