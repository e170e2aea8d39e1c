"""What it costs to be launched by mgpu, under load: many clients at once on a real llama-server, side by side.

    python benchmarks/load.py MODEL.gguf [--llama-server PATH] [--clients 64] [--rounds 7] [--only launch|nginx|…]

Two comparisons, each of two ways that serve the same model with the same settings at the same time and are asked in
turns, so that a machine that slows down slows both:

* a server that `mgpu run --detach` launched (mgpu puts nothing in front of one, and looks at it now and then), against
  the same command line started by hand;
* two servers behind each proxy that mgpu would put in front of replicas and that is installed, against the same two
  asked directly, the clients shared evenly.

Printed: requests lost, and the ratio of the median latency to the whole answer: of all rounds together, and the span
of the rounds' own ratios.
"""

from __future__ import annotations

import argparse
import http.client
import os
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "launcher"), str(ROOT / "adapters"), str(ROOT / "profiles"), str(ROOT)]

from benchmarks.replicas_proxy import fronted, installed, wait_healthy  # noqa: E402 - the path comes first

from mgpu.launch.ports import free_port  # noqa: E402
from mgpu.launch.process import Child  # noqa: E402

BODY = b'{"messages": [{"role": "user", "content": "Count to ten."}], "max_tokens": %d, "seed": 1, "temperature": 0}'
MGPU = (sys.executable, "-P", "-m", "mgpu")

Way = tuple[str, tuple[int, ...]]  # a name, and the ports clients are shared over


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--llama-server", default=shutil.which("llama-server"))
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--tokens", type=int, default=8)
    parser.add_argument("--only", help="launch, or the name of one proxy")
    options = parser.parse_args()
    if options.llama_server is None:
        parser.error("no llama-server on PATH: name one with --llama-server")
    body = BODY % options.tokens
    print(
        f"{options.clients} clients at once, {options.rounds} rounds each in turn, answers of {options.tokens} tokens"
    )
    lost = 0
    if options.only in {None, "launch"}:
        lost += compare_launch(options, body)
    if options.only != "launch":
        lost += compare_proxies(options, body)
    return 1 if lost else 0


def compare_launch(options: argparse.Namespace, body: bytes) -> int:
    with ExitStack() as stack:
        bare = stack.enter_context(by_hand(options.model, options.llama_server))
        launched = stack.enter_context(by_mgpu(options.model, options.llama_server))
        return compare(("by hand", (bare,)), ("by mgpu", (launched,)), options, body)


def compare_proxies(options: argparse.Namespace, body: bytes) -> int:
    lost = 0
    with ExitStack() as stack:
        ports = tuple(stack.enter_context(by_hand(options.model, options.llama_server)) for _ in range(2))
        for proxy in installed():
            if options.only in {None, proxy.name}:
                with fronted(proxy, ports) as front:
                    lost += compare(("two direct", ports), (proxy.name, (front,)), options, body)
    return lost


@contextmanager
def by_hand(model: str, llama_server: str) -> Iterator[int]:
    """The port of the command line that mgpu's dry run prints."""
    port = free_port("127.0.0.1", start=9500)
    argv = (
        *MGPU,
        "run",
        model,
        "--ctx",
        "1024",
        "--users",
        "4",
        "--port",
        str(port),
        "--llama-server",
        llama_server,
        "--dry-run",
    )
    line = subprocess.run(argv, env=environ(), check=True, capture_output=True, text=True).stdout
    command = [word for word in shlex.split(line) if "=" not in word.partition("/")[0]]
    child = Child.start(tuple(command), environ(), Path(os.devnull))
    try:
        wait_healthy(port)
        yield port
    finally:
        child.stop()


@contextmanager
def by_mgpu(model: str, llama_server: str) -> Iterator[int]:
    """The port of a launch that stays."""
    port = free_port("127.0.0.1", start=9600)
    with tempfile.TemporaryDirectory() as state:
        env = environ() | {"XDG_STATE_HOME": state}
        argv = (
            *MGPU,
            "run",
            model,
            "--ctx",
            "1024",
            "--users",
            "4",
            "--port",
            str(port),
            "--llama-server",
            llama_server,
            "--detach",
        )
        subprocess.run(argv, env=env, check=True, stderr=subprocess.DEVNULL)
        try:
            yield port
        finally:
            subprocess.run((*MGPU, "stop", "--all"), env=env, check=True, stderr=subprocess.DEVNULL)


def environ() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path[:3])}


def compare(base: Way, other: Way, options: argparse.Namespace, body: bytes) -> int:
    """Ask both in turns, and print the ratio. Returns how many requests were lost."""
    seconds: dict[str, list[list[float]]] = {base[0]: [], other[0]: []}
    lost = 0
    for number in range(options.rounds + 1):
        for name, ports in (base, other) if number % 2 else (other, base):
            answered, missing = ask_all(ports, options.clients, body)
            lost += missing
            if number:  # the first round warms both up
                seconds[name].append(answered)
    pairs = zip(seconds[other[0]], seconds[base[0]], strict=True)
    ratios = sorted(statistics.median(mine) / statistics.median(theirs) for mine, theirs in pairs if mine and theirs)
    whole = [statistics.median(one for answered in seconds[name] for one in answered) for name in (other[0], base[0])]
    span = f"rounds {ratios[0]:.3f} to {ratios[-1]:.3f}"
    ways = f"{other[0]:>12} / {base[0]:<12}"
    print(f"{ways} {whole[0] / whole[1]:.3f}   ({span}; {whole[1]:.2f} s {base[0]})   lost {lost}")
    return lost


def ask_all(ports: Sequence[int], clients: int, body: bytes) -> tuple[list[float], int]:
    """Every client once, all at the same time. Seconds of those answered, and how many were not."""
    seconds: list[float] = []
    threads = [threading.Thread(target=ask, args=(ports[i % len(ports)], body, seconds.append)) for i in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return seconds, clients - len(seconds)


def ask(port: int, body: bytes, done: Callable[[float], None]) -> None:
    begin = time.monotonic()
    try:
        with closing(http.client.HTTPConnection("127.0.0.1", port, timeout=600)) as connection:
            connection.request("POST", "/v1/chat/completions", body, {"Content-Type": "application/json"})
            response = connection.getresponse()
            text = response.read()
    except (OSError, http.client.HTTPException):
        return
    if response.status == http.HTTPStatus.OK and b'"choices"' in text:
        done(time.monotonic() - begin)


if __name__ == "__main__":
    sys.exit(main())
