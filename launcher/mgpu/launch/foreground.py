"""A plan, launched in the foreground: what is said when it is ready, and that it is placed as planned."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable

from mgpu.adapter import Command
from mgpu.launch.logs import new_log
from mgpu.launch.progress import say
from mgpu.launch.serve import Launch, Ready, serve
from mgpu.launch.verify import Launched, default_log, keep, measure


def launch_plan(command_at: Callable[[int], Command], launched: Launched, *, prompt: str | None) -> None:
    """Start it and stay; returns only after a `prompt` was answered. Raises as `serve` does."""
    model, request = launched.model, launched.request

    def on_ready(ready: Ready) -> None:
        for line in ready_lines(launched, ready, stays=prompt is None):
            say(sys.stderr, line)

    place = new_log(model.name)
    if place.note:
        say(sys.stderr, f"  note: {place.note}")
    launch = Launch(
        command_for=command_at,
        adapter=launched.adapter,
        environ=os.environ,
        log_path=place.path,
        host=request.host,
        port=request.port,
        api_key=request.api_key,
        expected_bytes=model.weights_bytes,
        prompt=prompt,
    )
    serve(launch, on_ready=on_ready)


def ready_lines(launched: Launched, ready: Ready, *, stays: bool) -> tuple[str, ...]:
    """What is said once it answers. Plan and report are kept for the rig on the way."""
    attachment = ready.command.attachment
    model = f"   model {attachment.model_name}" if attachment is not None else ""
    lines = [f"  ready after {ready.seconds:.1f} s: {ready.command.endpoint}{model}"]
    lines += placement_lines(launched, ready)
    if not ready.proven:
        lines.append("  note: it listens, but could not be asked for a token")
    if stays:
        lines.append(f"  log: {ready.log_path}   Ctrl-C stops it")
    return tuple(lines)


def placement_lines(launched: Launched, ready: Ready) -> list[str]:
    """Where it is not placed as planned, and the log that has it. A log that cannot be written is a note."""
    places = measure(launched.plan, ready.command.devices, ready.buffers)
    if not places:
        return []
    lines = [f"  warning: {place.warning}" for place in places if place.warning is not None]
    log = default_log()
    flaw = keep(launched, places, log)
    if flaw is not None:
        lines.append(f"  note: cannot keep plan and report in {log}: {flaw}")
    elif lines:
        lines.append(f"  plan and report are in {log}")
    return lines
