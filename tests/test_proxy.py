"""Proxies: which is taken, what it is told, and that the real ones pass requests as promised."""

from __future__ import annotations

import functools
import http.client
import json
import os
import shutil
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from pathlib import Path

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mgpu.adapter import Cause, Command, Endpoint
from mgpu.errors import RuntimeMissingError, UsageError
from mgpu.launch import proxy_config
from mgpu.launch.process import GRACE_S, Child, environment
from mgpu.launch.proxy import (
    PROXY_NAMES,
    VARIABLE,
    Proxy,
    ProxyLog,
    ProxyName,
    find_proxy,
    planned_directory,
    private_directory,
    proxy_command,
)
from mgpu.launch.proxy_config import Front

FAKE = Path(__file__).with_name("fake_llama_server.py")
SBIN = f"{os.environ.get('PATH', '')}{os.pathsep}/usr/local/sbin{os.pathsep}/usr/sbin"


def program(directory: Path, name: str) -> Path:
    path = directory / name
    path.write_text("#!/bin/sh\necho 'nginx version: nginx/1.18.0' >&2\n")
    path.chmod(0o755)
    return path


class TestFinding:
    @pytest.fixture(autouse=True)
    def _no_sbin(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("mgpu.launch.proxy._SBIN", ())

    def test_none_installed(self, tmp_path: Path) -> None:
        assert find_proxy({"PATH": str(tmp_path)}) is None

    @pytest.mark.parametrize("place", range(len(PROXY_NAMES)))
    def test_the_first_in_order_is_taken(self, tmp_path: Path, place: int) -> None:
        for name in PROXY_NAMES[place:]:
            program(tmp_path, name)
        found = find_proxy({"PATH": str(tmp_path)})
        assert found is not None
        assert found.name == PROXY_NAMES[place]
        assert found.executable == str(tmp_path / PROXY_NAMES[place])

    def test_the_variable_chooses(self, tmp_path: Path) -> None:
        for name in PROXY_NAMES:
            program(tmp_path, name)
        found = find_proxy({"PATH": str(tmp_path), VARIABLE: " Caddy "})
        assert found is not None
        assert found.name == "caddy"
        assert find_proxy({"PATH": str(tmp_path), VARIABLE: "none"}) is None
        assert find_proxy({"PATH": str(tmp_path), VARIABLE: ""}) is not None

    def test_a_name_that_is_none(self) -> None:
        with pytest.raises(UsageError, match="'apache' is no proxy mgpu knows") as error:
            find_proxy({"PATH": "", VARIABLE: "apache"})
        assert "nginx, haproxy, caddy, litellm, none" in error.value.hint

    def test_one_that_is_not_installed(self, tmp_path: Path) -> None:
        program(tmp_path, "nginx")
        with pytest.raises(RuntimeMissingError, match="names haproxy, which is not on PATH") as error:
            find_proxy({"PATH": str(tmp_path), VARIABLE: "haproxy"})
        assert "apt-get install haproxy" in error.value.hint

    def test_a_version_is_asked_of_nginx(self, tmp_path: Path) -> None:
        program(tmp_path, "nginx")
        found = find_proxy({"PATH": str(tmp_path)})
        assert found is not None
        assert found.version == (1, 18, 0)


def replica(endpoint: Endpoint) -> Command:
    host = {"0.0.0.0": "127.0.0.1"}.get(endpoint.host, endpoint.host)
    return Command(
        argv=("/usr/bin/llama-server", "--host", endpoint.host, "--port", str(endpoint.port)),
        watch_argv=("--log-verbosity", "4"),
        devices=("CUDA0",),
        env={"LLAMA_API_KEY": "sk-secret", "CUDA_VISIBLE_DEVICES": "GPU-1"},
        scrub=("LLAMA_ARG_",),
        files={},
        chat=False,
        ready_url=f"http://{host}:{endpoint.port}/health",
        endpoint=f"http://{host}:{endpoint.port}/v1",
    )


def told(name: ProxyName, directory: Path, *, host: str = "127.0.0.1", api_key: str | None = "sk-secret") -> Command:
    proxy = Proxy(name=name, executable=f"/usr/sbin/{name}", version=(1, 22, 1))
    endpoint = Endpoint(host=host, port=8080, api_key=api_key)
    return proxy_command(proxy, replica, endpoint, (8081, 8082), directory)


@pytest.mark.parametrize("name", PROXY_NAMES)
def test_a_proxy_answers_where_a_replica_would_and_knows_nothing_of_cards(name: ProxyName, tmp_path: Path) -> None:
    command = told(name, tmp_path, host="0.0.0.0")
    assert command.endpoint == "http://127.0.0.1:8080/v1"
    assert command.ready_url.startswith("http://127.0.0.1:8080/health")
    assert not command.chat  # the model's, not the proxy's
    assert (command.devices, command.watch_argv) == ((), ())
    assert "CUDA_VISIBLE_DEVICES" not in command.env
    (path,) = command.files
    assert Path(path).parent == tmp_path
    assert path in command.argv


@pytest.mark.parametrize("name", PROXY_NAMES)
def test_a_key_is_neither_in_arguments_nor_in_files(name: ProxyName, tmp_path: Path) -> None:
    command = told(name, tmp_path)
    assert "sk-secret" not in " ".join(command.argv)
    assert not any("sk-secret" in text for text in command.files.values())
    assert ("sk-secret" in command.env.values()) == (name == "litellm")  # the others pass the header on


def test_an_old_nginx_is_not_told_what_it_does_not_know(tmp_path: Path) -> None:
    assert "-e" in told("nginx", tmp_path).argv
    proxy = Proxy(name="nginx", executable="nginx", version=(1, 18, 0))
    command = proxy_command(proxy, replica, Endpoint(host="127.0.0.1", port=8080), (8081,), tmp_path)
    assert "-e" not in command.argv


def test_an_unknown_host_is_bad_usage(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="not a known name"):
        told("nginx", tmp_path, host="no such host")


@pytest.mark.parametrize("host", ["127.0.0.1; } evil {", 'a"b', "$host", "localhost"])
def test_only_numbers_get_into_a_configuration(host: str) -> None:
    with pytest.raises(ValueError, match="does not appear to be an IPv4 or IPv6 address"):
        Front(addresses=(host,), port=8080, replicas=(8081,))


ADDRESSES = st.lists(st.ip_addresses().map(str), min_size=1, max_size=3, unique=True).map(tuple)
PORTS = st.integers(1, 65535)


@given(ADDRESSES, PORTS, st.lists(PORTS, min_size=1, max_size=16, unique=True))
def test_every_replica_and_every_address_is_told(addresses: tuple[str, ...], port: int, replicas: list[int]) -> None:
    front = Front(addresses=addresses, port=port, replicas=tuple(replicas))
    for text in (proxy_config.nginx(front), proxy_config.haproxy(front), proxy_config.caddy(front, since_2_7=True)):
        for address in addresses:
            assert (f"[{address}]:{port}" if ":" in address else f"{address}:{port}") in text
        for replica_port in replicas:
            assert text.count(f"127.0.0.1:{replica_port}") >= 1
    assert text.count('"dial"') == len(replicas)
    models = json.loads(proxy_config.litellm(front, keyed=True))["model_list"]
    bases = [model["litellm_params"]["api_base"] for model in models]
    assert bases == [f"http://127.0.0.1:{replica_port}/v1" for replica_port in replicas]


FRONT = Front(addresses=("127.0.0.1", "::1"), port=8080, replicas=(8081, 8082))


def test_what_caddy_is_told() -> None:
    """Golden: validated with Caddy 2.6.2 (`caddy validate`) where it is installed, below."""
    said = json.loads(proxy_config.caddy(FRONT, since_2_7=False))
    assert said["admin"] == {"disabled": True, "config": {"persist": False}}
    (server,) = said["apps"]["http"]["servers"].values()
    assert server["listen"] == ["127.0.0.1:8080", "[::1]:8080"]
    (route,) = server["routes"]
    _, proxy = route["handle"]
    assert "flush_interval" not in proxy
    assert proxy["buffer_requests"]
    assert proxy["load_balancing"] == {"selection_policy": {"policy": "least_conn"}, "retries": 2}
    assert proxy["upstreams"] == [{"dial": "127.0.0.1:8081"}, {"dial": "127.0.0.1:8082"}]
    assert proxy["transport"]["keep_alive"] == {"enabled": False}
    newer = proxy_config.caddy(FRONT, since_2_7=True)
    assert '"request_buffers": 268435456' in newer
    assert "buffer_requests" not in newer


def test_what_litellm_is_told() -> None:
    """Golden: tried by hand with LiteLLM 1.106.2, whose package is too large for a test."""
    said = json.loads(proxy_config.litellm(FRONT, keyed=True))
    assert [model["model_name"] for model in said["model_list"]] == ["*", "*"]
    assert {model["litellm_params"]["api_key"] for model in said["model_list"]} == {"os.environ/LITELLM_MASTER_KEY"}
    assert said["router_settings"]["routing_strategy"] == "least-busy"
    assert said["general_settings"] == {"master_key": "os.environ/LITELLM_MASTER_KEY"}
    open_to_all = json.loads(proxy_config.litellm(FRONT, keyed=False))
    assert open_to_all["general_settings"] == {}
    assert {model["litellm_params"]["api_key"] for model in open_to_all["model_list"]} == {"none"}


@pytest.mark.parametrize(
    ("line", "text"),
    [
        ("2026/11/23 17:00:00 [emerg] 42#42: bind() to 0.0.0.0:80 failed (13: denied)", "bind() to 0.0.0.0:"),
        ('nginx: [emerg] unknown directive "x" in /a/nginx.conf:3', 'unknown directive "x"'),
        ("[ALERT]    (42) : config : Fatal errors found in configuration.", "config : Fatal errors"),
        ("Error: loading initial config: loading new config: http app", "loading initial config"),
        ("ValueError: no", "no"),
    ],
)  # fmt: skip
def test_why_a_proxy_ended(line: str, text: str) -> None:
    cause = ProxyLog().read_log(line)
    assert isinstance(cause, Cause)
    assert cause.text.startswith(text)
    assert "MGPU_PROXY=none" in cause.hint


def test_a_port_in_use_and_lines_that_say_nothing() -> None:
    cause = ProxyLog().read_log("nginx: [emerg] bind() to 127.0.0.1:80 failed (98: Address already in use)")
    assert isinstance(cause, Cause)
    assert "--port" in cause.hint
    assert ProxyLog().read_log("2026/11/23 17:00:00 [warn] 42#42: slow") is None
    assert ProxyLog().read_log('{"level":"warn","msg":"automatic HTTPS is disabled"}') is None


def test_the_directory_is_private_and_goes_away() -> None:
    with private_directory() as made:
        assert stat.S_IMODE(made.stat().st_mode) == 0o700
        assert made.parent == planned_directory(1).parent
        (made / "body").mkdir()
        (made / "body" / "part").write_text("a prompt")
    assert not made.exists()


def test_a_home_that_cannot_be_written_is_no_obstacle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "file"))
    with private_directory() as made:
        assert stat.S_IMODE(made.stat().st_mode) == 0o700
    assert not made.exists()


# With the real programs.

REAL: tuple[ProxyName, ...] = ("nginx", "haproxy", "caddy")


def installed(name: ProxyName) -> Proxy:
    if shutil.which(name, path=SBIN) is None:
        pytest.skip(f"no {name}: apt-get install {'nginx-light' if name == 'nginx' else name}")
    found = find_proxy({**os.environ, VARIABLE: name})
    assert found is not None
    return found


CHECKS: dict[ProxyName, Callable[[str, Path], tuple[str, ...]]] = {
    "nginx": lambda executable, file: (executable, "-p", f"{file.parent}/", "-e", "stderr", "-c", str(file), "-t"),
    "haproxy": lambda executable, file: (executable, "-c", "-f", str(file)),
    "caddy": lambda executable, file: (executable, "validate", "--config", str(file)),
}


@pytest.mark.parametrize("name", REAL)
@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0", "localhost", "::", "::1"])
def test_the_program_itself_accepts_its_configuration(name: ProxyName, host: str, tmp_path: Path) -> None:
    if ":" in host and not socket.has_dualstack_ipv6():
        pytest.skip("no IPv6 here")
    proxy = installed(name)
    directory = tmp_path / 'a $config; {of} "mgpu"'
    directory.mkdir()
    command = proxy_command(proxy, replica, Endpoint(host=host, port=free_number()), (8081, 8082), directory)
    ((path, text),) = command.files.items()
    file = Path(path)
    file.write_text(text)
    done = subprocess.run(CHECKS[name](proxy.executable, file), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "deprecated" not in done.stderr


def free_number() -> int:
    with closing(socket.create_server(("127.0.0.1", 0))) as server:
        return int(server.getsockname()[1])


class Proxied:
    """A real proxy before two fake servers."""

    def __init__(self, stack: ExitStack, directory: Path, name: ProxyName, *arguments: str) -> None:
        self.stack = stack
        self.ports = (free_number(), free_number())
        self.port = free_number()
        self.servers = [
            Child.start((sys.executable, str(FAKE), "--port", str(port), *arguments), os.environ, directory / f"{port}")
            for port in self.ports
        ]
        for server in self.servers:
            stack.callback(server.stop)
        self.directory = stack.enter_context(private_directory())
        endpoint = Endpoint(host="127.0.0.1", port=self.port)
        command = proxy_command(installed(name), replica, endpoint, self.ports, self.directory)
        for path, text in command.files.items():
            Path(path).write_text(text)
        self.log = directory / "proxy"
        self.proxy = Child.start(command.argv, environment(command, os.environ), self.log)
        stack.callback(self.proxy.stop)
        for port in (*self.ports, self.port):
            wait_for(functools.partial(self.healthy, port))

    def healthy(self, port: int) -> bool:
        try:
            return self.ask("GET", "/health", port=port).status == 200
        except OSError:
            return False

    def ask(
        self, method: str, path: str, body: object = None, *, port: int = 0, headers: dict[str, str] | None = None
    ) -> http.client.HTTPResponse:
        connection = http.client.HTTPConnection("127.0.0.1", port or self.port, timeout=30)
        self.connection = connection
        self.stack.callback(connection.close)
        connection.request(method, path, None if body is None else json.dumps(body), headers or {})
        response = connection.getresponse()
        self.stack.callback(response.close)
        return response

    def chat(self) -> http.client.HTTPResponse:
        return self.ask("POST", "/v1/chat/completions", {"messages": [], "stream": True})


def wait_for(condition: Callable[[], bool], seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "not in time"
        time.sleep(0.02)


@pytest.fixture(params=REAL)
def front(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Callable[..., Proxied]]:
    installed(request.param)
    with ExitStack() as stack:
        yield lambda *arguments: Proxied(stack, tmp_path, request.param, *arguments)


def test_requests_are_shared_and_pieces_come_as_they_are_made(front: Callable[..., Proxied]) -> None:
    proxied = front("--piece-s", "0.2")
    answers: list[tuple[str, list[float]]] = []

    def read() -> None:
        response = proxied.chat()
        times = []
        while response.readline():
            times.append(time.monotonic())
        answers.append((response.headers["X-Served-By"], times))

    readers = [threading.Thread(target=read) for _ in range(6)]
    for reader in readers:
        reader.start()
    for reader in readers:
        reader.join(30)
    served = [by for by, _ in answers]
    assert sorted(served.count(str(port)) for port in proxied.ports) == [3, 3]
    for _, times in answers:
        assert times[-1] - times[0] > 0.5  # four pieces 0.2 s apart, not all at the end


def test_a_request_goes_to_the_idle_replica(front: Callable[..., Proxied]) -> None:
    proxied = front("--piece-s", "0.3")
    long = proxied.chat()  # occupies one of them
    others = set()
    for _ in range(4):
        answer = proxied.ask("POST", "/completion", {"prompt": "x", "n_predict": 1})
        others.add(answer.headers["X-Served-By"])
        answer.read()
        time.sleep(0.05)  # a moment for the proxy to see that it is over
    assert others == {str(port) for port in proxied.ports} - {long.headers["X-Served-By"]}
    long.read()


def test_headers_and_large_bodies_pass_untouched(front: Callable[..., Proxied]) -> None:
    proxied = front("--api-key", "sk-1")
    body = {"prompt": "x" * (8 << 20), "n_predict": 1}
    assert proxied.ask("POST", "/completion", body).status == 401
    assert proxied.ask("POST", "/completion", body, headers={"Authorization": "Bearer sk-1"}).status == 200


def test_a_dead_replica_is_passed_over_before_the_first_byte(front: Callable[..., Proxied]) -> None:
    proxied = front()
    proxied.servers[0].stop()
    assert [proxied.chat().status for _ in range(4)] == [200] * 4


def test_an_answer_under_way_is_not_asked_for_again(front: Callable[..., Proxied]) -> None:
    proxied = front("--fault", "die-while-answering")
    response = proxied.chat()
    try:
        answered = response.read()  # Caddy 2.6 ends it as if it were whole
    except http.client.IncompleteRead as error:
        answered = error.partial
    assert answered.count(b"The answer") == 1
    assert b"[DONE]" not in answered
    wait_for(lambda: sorted(server.poll() is None for server in proxied.servers) == [False, True])


def test_a_reader_that_goes_away_frees_the_replica(front: Callable[..., Proxied]) -> None:
    proxied = front("--fault", "stall-while-answering")
    response = proxied.chat()
    assert b"assistant" in response.readline()
    proxied.connection.close()
    response.close()
    begin = time.monotonic()
    for server in proxied.servers:  # neither ends by itself while somebody reads from it
        server.stop()
    assert time.monotonic() - begin < GRACE_S


def test_it_stops_at_once_even_while_somebody_reads(front: Callable[..., Proxied]) -> None:
    proxied = front("--piece-s", "2")
    response = proxied.chat()
    begin = time.monotonic()
    proxied.proxy.stop()
    assert time.monotonic() - begin < 3
    response.close()


def test_nothing_is_written_outside_of_its_directory(front: Callable[..., Proxied], tmp_path: Path) -> None:
    proxied = front()
    proxied.ask("POST", "/completion", {"prompt": "x" * (4 << 20), "n_predict": 1})
    process = psutil.Process(proxied.proxy.pid)
    held = [Path(file.path) for file in process.open_files()]
    assert [path for path in held if proxied.directory not in path.parents and path != proxied.log] == []
    assert process.children() == []  # no workers that could outlive it
    listening = [c.laddr for c in process.net_connections("tcp") if c.status == psutil.CONN_LISTEN]
    assert [(address.ip, address.port) for address in listening] == [("127.0.0.1", proxied.port)]
    assert proxied.log.read_text().count("\n") < 5  # no access log


def test_it_ends_with_whoever_started_it(tmp_path: Path) -> None:
    """As mgpu's runtimes do: the kernel signals it when its parent is gone."""
    proxy = installed("nginx")
    code = (
        "import sys, os, time; from pathlib import Path; from mgpu.launch.process import Child\n"
        "child = Child.start(tuple(sys.argv[2:]), os.environ, Path(sys.argv[1]))\n"
        "print(child.pid, flush=True); time.sleep(60)"
    )
    front = Front(addresses=("127.0.0.1",), port=free_number(), replicas=(1, 2))
    (tmp_path / "nginx.conf").write_text(proxy_config.nginx(front))
    argv = (proxy.executable, "-p", f"{tmp_path}/", "-e", "stderr", "-c", "nginx.conf")
    roots = os.pathsep.join(path for path in sys.path if path)
    parent = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / "log"), *argv],
        env=os.environ | {"PYTHONPATH": roots},
        stdout=subprocess.PIPE,
    )
    assert parent.stdout is not None
    child = psutil.Process(int(parent.stdout.readline()))
    parent.send_signal(signal.SIGKILL)
    parent.communicate()
    wait_for(lambda: not child.is_running() or child.status() == psutil.STATUS_ZOMBIE)
