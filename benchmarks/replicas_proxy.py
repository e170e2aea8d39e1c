"""What a proxy in front of replicas costs: many clients at once, through each proxy that is installed and without one.

    python benchmarks/replicas_proxy.py [--clients 64] [--requests 10]

Two FAKE llama-servers (tests/fake_llama_server.py) stand behind it, so that what is measured is the way, not the model:
each answer is a stream of five events, 10 ms apart. Printed for each way: requests lost, the median and the slowest
1 % of the time to the first event and to the last, and the ratio to the direct way, whose clients share the two
servers evenly by themselves.
"""

from __future__ import annotations

import argparse
import http.client
import os
import statistics
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "launcher"), str(ROOT / "adapters"), str(ROOT / "profiles")]

from mgpu.adapter import Command, Endpoint  # noqa: E402 - the path comes first
from mgpu.errors import RuntimeMissingError  # noqa: E402
from mgpu.launch.ports import free_port  # noqa: E402
from mgpu.launch.process import Child, environment  # noqa: E402
from mgpu.launch.proxy import PROXY_NAMES, VARIABLE, Proxy, find_proxy, private_directory, proxy_command  # noqa: E402

FAKE = ROOT / "tests" / "fake_llama_server.py"
PIECE_S = 0.01
BODY = b'{"messages": [], "stream": true}'


class Times:
    """Seconds of each request that was answered to its end; how many were not."""

    def __init__(self) -> None:
        self.first: list[float] = []
        self.last: list[float] = []
        self.lost = 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--requests", type=int, default=10, help="of each client, one after the other")
    options = parser.parse_args()
    print(f"{options.clients} clients, {options.requests} requests each; milliseconds, and the ratio to direct")
    print(f"{'':>8}  lost  first event: median, 99 %      last event: median, 99 %")
    with ExitStack() as stack:
        ports = [stack.enter_context(server()) for _ in range(2)]
        direct = load(ports, options.clients, options.requests)
        tell("direct", direct, direct)
        lost = direct.lost
        for proxy in installed():
            with fronted(proxy, ports) as port:
                times = load([port], options.clients, options.requests)
            tell(proxy.name, times, direct)
            lost += times.lost
    return 1 if lost else 0


def installed() -> Iterator[Proxy]:
    for name in PROXY_NAMES:
        try:
            found = find_proxy({**os.environ, VARIABLE: name})
        except RuntimeMissingError:
            continue
        if found is not None:
            yield found


@contextmanager
def server() -> Iterator[int]:
    """A fake llama-server's port."""
    port = free_port("127.0.0.1", start=9600)
    child = Child.start(
        (sys.executable, str(FAKE), "--port", str(port), "--piece-s", str(PIECE_S)), os.environ, Path(os.devnull)
    )
    try:
        wait_healthy(port)
        yield port
    finally:
        child.stop()


@contextmanager
def fronted(proxy: Proxy, ports: Sequence[int]) -> Iterator[int]:
    """The port of `proxy` before the servers on `ports`."""

    def command_for(endpoint: Endpoint) -> Command:
        base = f"http://{endpoint.host}:{endpoint.port}"
        return Command(argv=(), env={}, scrub=(), files={}, ready_url=f"{base}/health", endpoint=f"{base}/v1")

    endpoint = Endpoint(host="127.0.0.1", port=free_port("127.0.0.1", start=9700))
    with private_directory() as directory:
        command = proxy_command(proxy, command_for, endpoint, tuple(ports), directory)
        for path, text in command.files.items():
            Path(path).write_text(text, encoding="utf-8")
        child = Child.start(command.argv, environment(command, os.environ), Path(os.devnull))
        try:
            wait_healthy(endpoint.port, "/" + command.ready_url.split("/", 3)[3])
            yield endpoint.port
        finally:
            child.stop()


def wait_healthy(port: int, path: str = "/health") -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        try:
            with closing(http.client.HTTPConnection("127.0.0.1", port, timeout=5)) as connection:
                connection.request("GET", path)
                if connection.getresponse().status == http.HTTPStatus.OK:
                    return
        except (OSError, http.client.HTTPException):
            pass
        time.sleep(0.05)
    raise TimeoutError(f"nothing answers on port {port}")


def load(ports: Sequence[int], clients: int, requests: int) -> Times:
    """All clients at once, client i on port i modulo their number."""
    times = Times()
    threads = [
        threading.Thread(target=ask, args=(ports[place % len(ports)], requests, times)) for place in range(clients)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return times


def ask(port: int, requests: int, times: Times) -> None:
    for _ in range(requests):
        begin = time.monotonic()
        events: list[float] = []
        whole = False
        try:
            with closing(http.client.HTTPConnection("127.0.0.1", port, timeout=60)) as connection:
                connection.request("POST", "/v1/chat/completions", BODY, {"Content-Type": "application/json"})
                response = connection.getresponse()
                while line := response.readline():
                    if line.startswith(b"data:"):
                        events.append(time.monotonic() - begin)
                        whole = b"[DONE]" in line
        except (OSError, http.client.HTTPException):
            whole = False
        if whole:
            times.first.append(events[0])
            times.last.append(events[-1])
        else:
            times.lost += 1


def tell(name: str, times: Times, direct: Times) -> None:
    print(f"{name:>8}  {times.lost:4}  {figures(times.first, direct.first)}  {figures(times.last, direct.last)}")


def figures(seconds: list[float], direct: list[float]) -> str:
    if not seconds or not direct:
        return "-"
    pairs = ((median, slow) for median, slow in (spread(seconds), spread(direct)))
    (median, slow), (direct_median, direct_slow) = pairs
    return f"{median:7.1f} ({median / direct_median:4.2f})  {slow:7.1f} ({slow / direct_slow:4.2f})"


def spread(seconds: list[float]) -> tuple[float, float]:
    """Median and 99 % quantile, in milliseconds."""
    return statistics.median(seconds) * 1000, statistics.quantiles(seconds, n=100)[98] * 1000


if __name__ == "__main__":
    sys.exit(main())
