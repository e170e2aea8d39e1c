"""A program that does with `serve` what `mgpu run` does, for tests that stop it from outside.

launch_driver.py [--prompt TEXT] [--port N] LOG -- RUNTIME ARGS...   ("{port}" in an argument becomes the port)
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import cast

from mgpu.adapter import Adapter, Command
from mgpu.errors import MgpuError
from mgpu.launch.progress import say
from mgpu.launch.serve import Launch, Ready, serve


def command_for(argv: list[str], port: int) -> Command:
    return Command(
        argv=tuple(argument.format(port=port) for argument in argv),
        env={},
        scrub=(),
        files={},
        ready_url=f"http://127.0.0.1:{port}/health",
        endpoint=f"http://127.0.0.1:{port}/v1",
    )


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--prompt")
    parser.add_argument("--port", type=int)
    parser.add_argument("log", type=Path)
    parser.add_argument("argv", nargs="+")
    options = parser.parse_args()
    launch = Launch(
        command_for=lambda port: command_for(options.argv, port),
        adapter=cast("Adapter", SimpleNamespace(read_log=lambda _line: None)),
        environ=os.environ,
        log_path=options.log,
        port=options.port,
        prompt=options.prompt,
    )
    try:
        return serve(launch, on_ready=announce)
    except MgpuError as error:
        say(sys.stderr, f"error: {error.message}")
        return error.exit_code


def announce(ready: Ready) -> None:
    say(sys.stderr, f"ready: {ready.port} {ready.pid} {ready.seconds:.3f}")


if __name__ == "__main__":
    sys.exit(main())
