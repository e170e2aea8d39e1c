"""A plan, launched in the foreground: what is said when it is ready, and that it is placed as planned."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable

from mgpu.adapter import Adapter, Command
from mgpu.launch.logs import new_log
from mgpu.launch.progress import say
from mgpu.launch.serve import Launch, Ready, serve
from mgpu.launch.verify import compare
from mgpu.model import Model
from mgpu.plan import Plan
from mgpu.request import Request


def launch_plan(
    command_at: Callable[[int], Command],
    *,
    adapter: Adapter,
    model: Model,
    plan: Plan,
    request: Request,
    prompt: str | None,
) -> None:
    """Start it and stay; returns only after a `prompt` was answered. Raises as `serve` does."""

    def on_ready(ready: Ready) -> None:
        for line in ready_lines(plan, ready, stays=prompt is None):
            say(sys.stderr, line)

    place = new_log(model.name)
    if place.note:
        say(sys.stderr, f"  note: {place.note}")
    launch = Launch(
        command_for=command_at,
        adapter=adapter,
        environ=os.environ,
        log_path=place.path,
        host=request.host,
        port=request.port,
        api_key=request.api_key,
        expected_bytes=model.weights_bytes,
        prompt=prompt,
    )
    serve(launch, on_ready=on_ready)


def ready_lines(plan: Plan, ready: Ready, *, stays: bool) -> tuple[str, ...]:
    """What is said once it answers."""
    lines = [f"  ready after {ready.seconds:.1f} s: {ready.command.endpoint}"]
    lines += [f"  warning: {text}" for text in compare(plan, ready.command.devices, ready.buffers)]
    if not ready.proven:
        lines.append("  note: it listens, but could not be asked for a token")
    if stays:
        lines.append(f"  log: {ready.log_path}   Ctrl-C stops it")
    return tuple(lines)
