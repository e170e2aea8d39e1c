"""Replicas before anything starts: their ports, their part of the plan, the one line that starts them, what is said."""

from __future__ import annotations

import contextlib
import fcntl
import io
import os
import pty
import shutil
import signal
import socket
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mgpu.adapter import Buffer, Command, Endpoint
from mgpu.decide.choose import choose
from mgpu.decide.replicas import Replica, commands_at, replicas_of
from mgpu.errors import RuntimeFailedError, UsageError
from mgpu.launch.fleet import FleetReady
from mgpu.launch.planned import proxied_commands, proxy_name
from mgpu.launch.ports import choose_ports, free_port, held, is_free
from mgpu.launch.progress import JointLine, describe_all
from mgpu.launch.proxy import Proxy
from mgpu.launch.ready import Loading
from mgpu.launch.serve import Ready
from mgpu.launch.together import Copy, ready_lines
from mgpu.launch.verify import Launched
from mgpu.plan import Plan, Shape
from mgpu.report.lines import joint_line
from mgpu.request import Request
from mgpu.rig import Rig
from mgpu.units import GIB
from mgpu_adapters.llamacpp.adapter import LlamaCpp
from planning import read, rig_named

Header = Callable[[str], Path]
SMALL = "Llama-3.1-8B-Instruct-Q4_K_M"
SHELLS = [shell for shell in ("dash", "bash", "zsh") if shutil.which(shell)]


#: A test run in the background ignores SIGINT, and so would its children.
INTERRUPTIBLE = (
    sys.executable,
    "-c",
    "import os, signal, sys; signal.signal(signal.SIGINT, signal.SIG_DFL); os.execvp(sys.argv[1], sys.argv[1:])",
)


def planned(header: Header, rig: Rig, users: int) -> tuple[Plan, tuple[Replica, ...]]:
    adapter, request = LlamaCpp(), Request(users=users)
    job = adapter.job(read(str(header(SMALL))), request, adapter.assumed())
    plan = choose(request, rig, job)
    return plan, replicas_of(plan, job.at_ctx(plan.ctx), rig)


class TestPlan:
    def test_each_has_its_card_its_users_and_a_plan_of_its_own(self, header: Header) -> None:
        plan, replicas = planned(header, rig_named("2x3090"), users=5)
        assert plan.placement == "replicas"
        assert [replica.gpu.index for replica in replicas] == [0, 1]
        for place, replica in enumerate(replicas):
            own = replica.plan
            assert (own.placement, own.users, own.ctx) == ("single", 3, plan.ctx)
            assert own.layout.gpus == (place,)
            assert own.layout.shape == Shape(n_devices=1)
            assert own.devices == (plan.devices[place],)
            assert own.devices[0].memory == replica.job.device(own.layout.spans()[0], Shape(n_devices=1), replica.gpu)
        assert sum(replica.plan.host.memory.total for replica in replicas) == plan.host.memory.total

    def test_each_has_its_command(self, header: Header) -> None:
        _, replicas = planned(header, rig_named("2x3090"), users=5)
        first, second = commands_at(replicas, (8080, 8090), host="127.0.0.1", api_key="sk-1")
        assert (first.env["CUDA_VISIBLE_DEVICES"], second.env["CUDA_VISIBLE_DEVICES"]) == ("0", "1")
        assert [_after(command, "--port") for command in (first, second)] == ["8080", "8090"]
        for command in (first, second):
            assert _after(command, "--device") == "CUDA0"
            assert _after(command, "--parallel") == "3"
            assert int(_after(command, "--ctx-size")) == 3 * 8192
            assert command.env["LLAMA_API_KEY"] == "sk-1"

    def test_one_runtime_is_no_replicas(self, header: Header) -> None:
        plan, replicas = planned(header, rig_named("2x3090"), users=1)
        assert plan.placement == "single"
        assert replicas == ()


def _after(command: Command, flag: str) -> str:
    return command.argv[command.argv.index(flag) + 1]


class TestPorts:
    def test_without_a_proxy_the_first_replica_is_in_front(self) -> None:
        wanted = free_port("127.0.0.1", start=21000)
        ports = choose_ports("127.0.0.1", wanted, 3, proxied=False)
        assert ports.front == ports.members[0] == wanted
        assert sorted(set(ports.members)) == list(ports.members)

    def test_behind_a_proxy_none_is(self) -> None:
        wanted = free_port("127.0.0.1", start=21000)
        ports = choose_ports("127.0.0.1", wanted, 2, proxied=True)
        assert ports.front == wanted
        assert wanted not in ports.members

    def test_ports_in_use_are_stepped_over(self) -> None:
        start = free_port("127.0.0.1", start=22000)
        with socket.create_server(("127.0.0.1", start + 1)):
            ports = choose_ports("127.0.0.1", start, 2, proxied=True)
        assert start + 1 not in ports.members

    def test_the_last_port_of_all(self) -> None:
        ports = choose_ports("127.0.0.1", 65535, 2, proxied=True)
        assert ports.front == 65535
        assert all(8080 <= port < 65535 for port in ports.members)

    def test_a_wanted_one_in_use(self) -> None:
        server = socket.create_server(("127.0.0.1", 0))
        with server, pytest.raises(RuntimeFailedError, match="is in use by"):
            choose_ports("127.0.0.1", int(server.getsockname()[1]), 2, proxied=True)

    @given(st.integers(1, 8), st.booleans())
    def test_no_two_are_the_same(self, n: int, proxied: bool) -> None:  # Hypothesis passes it by name
        ports = choose_ports("127.0.0.1", None, n, proxied=proxied, start=23000)
        everyone = {ports.front, *ports.members}
        assert len(everyone) == n + proxied
        assert all(is_free("127.0.0.1", port) for port in everyone)

    def test_a_held_port_is_nobody_elses_and_says_nothing(self) -> None:
        port = free_port("127.0.0.1", start=24000)
        with held("127.0.0.1", port) as hold:
            assert not is_free("127.0.0.1", port)
            assert not is_free("0.0.0.0", port)
            with socket.socket() as client:
                assert client.connect_ex(("127.0.0.1", port)) != 0
            hold.close()
            assert is_free("127.0.0.1", port)

    def test_a_port_that_cannot_be_held_is_left_alone(self) -> None:
        with socket.create_server(("127.0.0.1", 0)) as server:
            with held("127.0.0.1", int(server.getsockname()[1])):
                pass
            assert server.fileno() >= 0


def command(port: int, *words: str) -> Command:
    base = f"http://127.0.0.1:{port}"
    return Command(
        argv=words or ("llama-server", "--port", str(port)),
        env={"WORD": "it's $HOME"},
        scrub=(),
        files={},
        ready_url=f"{base}/health",
        endpoint=f"{base}/v1",
    )


class TestLine:
    """`eval "$(mgpu run … --dry-run)"`."""

    #: Writes its word and its process id, then waits.
    CODE = "import os, sys, time; open(sys.argv[1], 'w').write(os.environ['WORD'] + str(os.getpid())); time.sleep(60)"

    def test_it_is_one(self) -> None:
        line = joint_line((command(8080), command(8081)), ("CUDA_VISIBLE_DEVICES",))
        assert "\n" not in line
        assert line.count("env -u CUDA_VISIBLE_DEVICES WORD='it'\"'\"'s $HOME' llama-server --port 808") == 2

    @pytest.mark.parametrize("shell", SHELLS)
    @pytest.mark.parametrize("scrubbed", [(), ("PATHEXT",)])
    @pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
    def test_all_run_and_all_end(
        self, shell: str, scrubbed: tuple[str, ...], number: signal.Signals, tmp_path: Path
    ) -> None:
        files = [tmp_path / f"{place}" for place in range(3)]
        line = joint_line([command(1, sys.executable, "-c", self.CODE, str(file)) for file in files], scrubbed)
        script = tmp_path / "line"
        script.write_text(line)
        process = subprocess.Popen([*INTERRUPTIBLE, shell, "-c", f'eval "$(cat {script})"'], start_new_session=True)
        until(lambda: all(file.exists() and file.read_text() for file in files))
        assert {file.read_text().rstrip("0123456789") for file in files} == {"it's $HOME"}
        pids = [int(file.read_text().removeprefix("it's $HOME")) for file in files]
        os.killpg(process.pid, number)
        process.wait(10)
        until(lambda: not any(exists(pid) for pid in pids))

    @pytest.mark.parametrize("shell", SHELLS)
    def test_it_leaves_the_callers_own_group_alone(self, shell: str, tmp_path: Path) -> None:
        """A script that goes on after its replicas have ended is not ended with them."""
        line = joint_line([command(1, "true"), command(2, "true")])
        done = subprocess.run([shell, "-c", f"{line}; echo on"], capture_output=True, text=True, check=True, timeout=20)
        assert done.stdout == "on\n"


def until(condition: Callable[[], bool], seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "not in time"
        time.sleep(0.02)


def exists(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


def loading(seconds: float, stage: str, gib: float, *, ready: bool = False) -> Loading:
    return Loading(stage=stage, seconds=seconds, rss_bytes=int(gib * GIB), ready=ready)


class TestProgress:
    NAMES = ("GPU 0", "GPU 1")

    def test_in_words(self) -> None:
        pair = (loading(12.3, "warming up", 1.5, ready=True), loading(12.2, "loading the weights", 1.6))
        assert describe_all(self.NAMES, pair, int(9.2 * GIB)) == (
            "  12.3 s  ~3.1 of 9.2 GiB  1 of 2 ready, GPU 1: loading the weights"
        )
        both = tuple(loading(9, "x", 0, ready=True) for _ in self.NAMES)
        assert describe_all(self.NAMES, both, 0) == "   9.0 s  2 of 2 ready"

    def test_a_file_gets_one_line_for_each_stage_of_each(self) -> None:
        stream = io.StringIO()
        line = JointLine(stream, self.NAMES, expected_bytes=GIB)
        for seconds, first, second in ((0.1, "a", "a"), (1, "a", "a"), (2, "a", "b"), (3, "a", "b")):
            line((loading(seconds, first, 1, ready=seconds > 2.5), loading(seconds, second, 1)))
        line.close()
        assert stream.getvalue().splitlines() == [
            "   1.0 s  GPU 0: a", "   1.0 s  GPU 1: a", "   2.0 s  GPU 1: b", "   3.0 s  GPU 0: ready",
        ]  # fmt: skip

    def test_a_terminal_gets_one_line_for_all(self) -> None:
        ours, theirs = pty.openpty()
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 50, 0, 0))
        with os.fdopen(theirs, "w") as stream:
            line = JointLine(stream, self.NAMES, expected_bytes=8 * GIB)
            line((loading(1, "loading the weights of a large model", 1), loading(1, "x", 1)))
            line.close()
        drawn = b""
        with contextlib.suppress(OSError):  # EIO is how a terminal without writers ends
            while piece := os.read(ours, 4096):
                drawn += piece
        os.close(ours)
        text = drawn.decode()
        assert "\n" not in text
        assert "0 of 2 ready" in text
        assert max(len(part) for part in text.split("\r")) < 50


class TestWords:
    """What is said when all are ready."""

    def ready(self, copies: list[Copy], proxy: Proxy | None, buffers: tuple[Buffer, ...] = ()) -> FleetReady:
        commands = [copy.command_for(Endpoint(host="127.0.0.1", port=8081 + i)) for i, copy in enumerate(copies)]
        members = tuple(
            Ready(
                command=own, port=0, pid=0, seconds=2.0, buffers=buffers, log_path=Path(f"/logs/{place}"), proven=True
            )
            for place, own in enumerate(commands)
        )
        front = command(8080) if proxy else commands[0]
        return FleetReady(command=front, seconds=2.0, members=members, proxy=proxy, proven=True)

    def copies(self, header: Header) -> list[Copy]:
        rig, adapter = rig_named("2x3090"), LlamaCpp()
        _, replicas = planned(header, rig, users=2)
        launched = [
            Launched(
                adapter=adapter,
                installed=adapter.assumed(),
                rig=rig,
                model=read(str(header(SMALL))),
                request=Request(users=2),
                plan=replica.plan,
            )
            for replica in replicas
        ]
        pairs = zip(launched, replicas, strict=True)
        return [Copy(launched=own, command_for=replica.command) for own, replica in pairs]

    def test_behind_a_proxy(self, header: Header) -> None:
        copies = self.copies(header)
        proxy = Proxy(name="nginx", executable="/usr/sbin/nginx")
        assert ready_lines(copies, self.ready(copies, proxy), stays="Ctrl-C stops it") == (
            "  ready after 2.0 s: http://127.0.0.1:8080/v1, nginx before 2 replicas",
            "    GPU 0: http://127.0.0.1:8081/v1   log: /logs/0",
            "    GPU 1: http://127.0.0.1:8082/v1   log: /logs/1",
            "  Ctrl-C stops them all",
        )

    @pytest.mark.parametrize("wanted", ["", "none"])
    def test_without_one(self, header: Header, monkeypatch: pytest.MonkeyPatch, wanted: str) -> None:
        monkeypatch.setenv("MGPU_PROXY", wanted)
        copies = self.copies(header)
        lines = ready_lines(copies, self.ready(copies, None), stays="")
        assert lines[0] == "  ready after 2.0 s: 2 replicas, each at an address of its own"
        assert any("apt-get install nginx-light" in line for line in lines) == (wanted == "")

    def test_each_is_compared_with_its_own_plan(self, header: Header) -> None:
        copies = self.copies(header)
        buffers = (Buffer(device="CUDA0", kind="weights", n_bytes=GIB),)
        lines = ready_lines(copies, self.ready(copies, None, buffers), stays="")
        for gpu in (0, 1):
            assert sum(line.startswith(f"  warning: GPU {gpu} holds 1.0 GiB, ") for line in lines) == 1
        assert sum("plan and report are in" in line for line in lines) == 1


class TestPlanned:
    def test_with_a_proxy_it_comes_first(self, tmp_path: Path) -> None:
        (tmp_path / "haproxy").touch(mode=0o755)
        environ = {"PATH": str(tmp_path), "MGPU_PROXY": "haproxy"}
        assert proxy_name(environ) == "haproxy"
        fors = [lambda endpoint: command(endpoint.port)] * 2
        front, *replicas = proxied_commands(fors, Request(port=free_port("127.0.0.1", start=25000)), environ)
        ((path, text),) = front.files.items()
        assert path.startswith(os.environ["XDG_STATE_HOME"])
        assert front.argv == (str(tmp_path / "haproxy"), "-db", "-f", path)
        for replica in replicas:
            assert replica.ready_url.removeprefix("http://").removesuffix("/health") in text
            assert replica.endpoint != front.endpoint

    def test_replicas_behind_a_proxy_are_for_it_alone(self, tmp_path: Path) -> None:
        (tmp_path / "haproxy").touch(mode=0o755)
        seen: list[Endpoint] = []

        def command_for(endpoint: Endpoint) -> Command:
            seen.append(endpoint)
            return command(endpoint.port)

        environ = {"PATH": str(tmp_path), "MGPU_PROXY": "haproxy"}
        proxied_commands([command_for, command_for], Request(host="0.0.0.0", api_key="sk-1"), environ)
        assert [endpoint.host for endpoint in seen] == ["0.0.0.0", "127.0.0.1", "127.0.0.1"]
        assert {endpoint.api_key for endpoint in seen} == {"sk-1"}

    def test_without_one_there_is_nothing(self) -> None:
        assert proxied_commands([], Request(), {"MGPU_PROXY": "none"}) == ()
        assert proxy_name({"MGPU_PROXY": "none"}) is None

    def test_a_wrong_name(self) -> None:
        with pytest.raises(UsageError):
            proxy_name({"MGPU_PROXY": "squid"})
