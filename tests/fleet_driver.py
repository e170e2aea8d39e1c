"""A program that does with `serve_fleet` what `mgpu run` does with replicas, for tests that stop it from outside.

fleet_driver.py [--prompt TEXT] [--port N] DIRECTORY -- RUNTIME ARGS...   ("{port}" in an argument becomes the port)
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import cast

from mgpu.adapter import Adapter, Command, Endpoint
from mgpu.errors import MgpuError
from mgpu.launch.fleet import Fleet, FleetReady, Member, serve_fleet
from mgpu.launch.progress import say
from mgpu.launch.proxy import find_proxy


def command_for(argv: list[str], endpoint: Endpoint) -> Command:
    return Command(
        argv=tuple(argument.replace("{port}", str(endpoint.port)) for argument in argv),
        env={},
        scrub=(),
        files={},
        ready_url=f"http://127.0.0.1:{endpoint.port}/health",
        endpoint=f"http://127.0.0.1:{endpoint.port}/v1",
    )


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--prompt")
    parser.add_argument("--port", type=int)
    parser.add_argument("directory", type=Path)
    parser.add_argument("argv", nargs="+")
    options = parser.parse_args()
    members = [
        Member(
            name=f"GPU {place}",
            command_for=lambda endpoint: command_for(options.argv, endpoint),
            log_path=options.directory / f"log-{place}",
        )
        for place in range(2)
    ]
    fleet = Fleet(
        members=tuple(members),
        proxy=find_proxy(os.environ),
        proxy_log=options.directory / "log-proxy",
        adapter=cast("Adapter", SimpleNamespace(read_log=lambda _line: None)),
        environ=os.environ,
        port=options.port,
        prompt=options.prompt,
    )
    try:
        return serve_fleet(fleet, on_ready=announce)
    except MgpuError as error:
        say(sys.stderr, f"error: {error.message}")
        return error.exit_code


def announce(ready: FleetReady) -> None:
    pids = " ".join(str(member.pid) for member in ready.members)
    say(sys.stderr, f"ready: {ready.command.endpoint} {pids}")


if __name__ == "__main__":
    sys.exit(main())
