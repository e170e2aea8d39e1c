"""A plan, launched in the foreground: what is said when it is ready, and that it is placed as planned."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable

from mgpu.adapter import Command
from mgpu.launch.keeper import Keeper
from mgpu.launch.logs import new_log
from mgpu.launch.progress import say
from mgpu.launch.serve import Launch, Ready, serve
from mgpu.launch.signals import StopSignals
from mgpu.launch.verify import Launched, default_log, keep, measure, reported


def launch_plan(  # noqa: PLR0913 - all by keyword, from the one run that has them
    command_at: Callable[[int], Command],
    launched: Launched,
    *,
    prompt: str | None,
    keeper: Keeper,
    stop: StopSignals,
    stays: str,
    on_ready: Callable[[], None],
) -> None:
    """Start it and stay; returns only after a `prompt` was answered. Raises as `serve` does.

    `stays`: how a person ends it, said once it is ready; empty where it ends by itself.
    """
    model, request = launched.model, launched.request

    def settle(ready: Ready) -> None:
        told = reported(launched.plan, ready.command.devices, ready.buffers)
        held = keeper.ready(ready.command.endpoint, str(ready.log_path), (ready.pid,), told)
        for line in ready_lines(launched, ready, held=held, stays=stays):
            say(sys.stderr, line)
        on_ready()

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
        care=keeper,
    )
    serve(launch, on_ready=settle, stop=stop)


def ready_lines(launched: Launched, ready: Ready, *, stays: str, held: tuple[str, ...] = ()) -> tuple[str, ...]:
    """What is said once it answers. Plan and report are kept for the rig on the way. `held`: of its memory."""
    attachment = ready.command.attachment
    model = f"   model {attachment.model_name}" if attachment is not None else ""
    lines = [f"  ready after {ready.seconds:.1f} s: {ready.command.endpoint}{model}"]
    lines += [*held, *placement_lines(launched, ready)]
    if not ready.proven:
        lines.append("  note: it listens, but could not be asked for a token")
    if stays:
        lines.append(f"  log: {ready.log_path}   {stays}")
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
