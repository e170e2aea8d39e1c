"""How long a person waits: `mgpu run --dry-run`, and launch to ready, as ratios to peers measured in the same run.

    python benchmarks/startup.py MODEL.gguf [--fit-params PATH] [--server PATH] [--rounds N]

Each round runs every command once, in turn, so that a busy machine slows all of them alike; ratios are of medians.
`gguf-dump` is measured where the `gguf` package is installed, `llama-fit-params` and llama-server where given.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path

Timed = Callable[[], float]


def timed(argv: list[str]) -> Timed:
    """Seconds until the process has ended."""

    def run() -> float:
        started = time.perf_counter()
        subprocess.run(argv, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=True)
        return time.perf_counter() - started

    return run


def direct_to_first_token(server: str, model: str, arguments: list[str]) -> Timed:
    """Seconds from starting llama-server by hand until it has generated one token."""

    def run() -> float:
        started = time.perf_counter()
        port = "18080"
        process = subprocess.Popen(
            [server, "-m", model, "--port", port, *arguments], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        try:
            base = f"http://127.0.0.1:{port}"
            while not _answers(f"{base}/health"):
                time.sleep(0.02)
            body = json.dumps({"prompt": "Hello", "n_predict": 1}).encode()
            urllib.request.urlopen(urllib.request.Request(f"{base}/completion", body), timeout=60).read()
            return time.perf_counter() - started
        finally:
            process.kill()
            process.wait()

    return run


def mgpu_to_ready(model: str, server: str) -> Timed:
    """Seconds from starting `mgpu run` until it says that the runtime is ready (it has generated one token)."""

    def run() -> float:
        started = time.perf_counter()
        process = subprocess.Popen(
            [sys.executable, "-m", "mgpu", "run", model, "--llama-server", server, "--ctx", "4096"],
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        try:
            assert process.stderr is not None
            for line in process.stderr:
                if "ready after" in line:
                    return time.perf_counter() - started
            raise SystemExit("mgpu run ended without being ready")
        finally:
            process.terminate()
            process.communicate()

    return run


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


def medians(cases: dict[str, Timed], rounds: int) -> dict[str, float]:
    """Every case once for warmth, then `rounds` times in turn."""
    for case in cases.values():
        case()
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    for _ in range(rounds):
        for name, case in cases.items():
            seconds[name].append(case())
    return {name: statistics.median(values) for name, values in seconds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--fit-params")
    parser.add_argument("--server")
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    model = str(Path(options.model).absolute())
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # an installed program has its bytecode

    python = sys.executable
    ours = "mgpu run --dry-run --rig 2x3090"
    cases: dict[str, Timed] = {
        ours: timed([python, "-m", "mgpu", "run", model, "--rig", "2x3090", "--dry-run"]),
        'python -c "import click"': timed([python, "-c", "import click"]),
    }
    dump = shutil.which("gguf-dump", path=str(Path(python).parent) + os.pathsep + os.environ["PATH"])
    if dump:
        cases["gguf-dump"] = timed([python, dump, "--no-tensors", model])
    if options.fit_params:
        cases["llama-fit-params"] = timed([options.fit_params, "-m", model])
    result = medians(cases, options.rounds)
    print(f"{ours}: {result[ours] * 1e3:.0f} ms here, as ratios:")
    for name, seconds in result.items():
        if name != ours:
            print(f"  {result[ours] / seconds:5.2f}x of {name}")
    if options.server:
        arguments = ["-c", "4096", "-np", "1", "-fit", "off", "-fa", "on"]
        launch = medians(
            {
                "mgpu": mgpu_to_ready(model, options.server),
                "direct": direct_to_first_token(options.server, model, arguments),
            },
            max(options.rounds // 2, 3),
        )
        by_hand = launch["direct"]
        print(f"launch to first token: {by_hand:.2f} s by hand, {launch['mgpu'] / by_hand:.2f}x with mgpu run")


if __name__ == "__main__":
    main()
