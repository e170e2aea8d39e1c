"""A plan of replicas, launched in the foreground: what is said when all are ready, and that each is as planned."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Final

from msgspec import Struct

from mgpu.adapter import Command, Endpoint
from mgpu.launch.fleet import Fleet, FleetReady, Member, serve_fleet
from mgpu.launch.foreground import placement_lines
from mgpu.launch.keeper import Keeper
from mgpu.launch.logs import LogPlace, new_log
from mgpu.launch.progress import say
from mgpu.launch.proxy import VARIABLE, Proxy
from mgpu.launch.signals import StopSignals
from mgpu.launch.verify import Launched, Reported, reported

_NAME: Final = 60  # characters of the model's name in a log's, so that the replica's own fits behind it


class Copy(Struct, frozen=True, kw_only=True):
    """One replica: its own part of the decision, and its command for where it is to listen."""

    launched: Launched
    command_for: Callable[[Endpoint], Command]

    @property
    def name(self) -> str:
        return " + ".join(f"GPU {device.gpu}" for device in self.launched.plan.devices)


def launch_copies(  # noqa: PLR0913 - all by keyword, from the one run that has them
    copies: Sequence[Copy],
    proxy: Proxy | None,
    *,
    prompt: str | None,
    keeper: Keeper,
    stop: StopSignals,
    stays: str,
    on_ready: Callable[[], None],
) -> None:
    """Start them and stay; returns only after a `prompt` was answered. Raises as `serve_fleet` does.

    `stays`: how a person ends them, said once they are ready; empty where they end by themselves.
    """
    first = copies[0].launched
    model, request = first.model, first.request
    *places, proxy_log = _logs(model.name, (*(copy.name for copy in copies), "proxy" if proxy is None else proxy.name))
    for note in dict.fromkeys(place.note for place in (*places, proxy_log) if place.note):
        say(sys.stderr, f"  note: {note}")
    keeper.logged(*(str(place.path) for place in (*places, proxy_log)))

    def settle(ready: FleetReady) -> None:
        pids = [member.pid for member in ready.members]
        told: dict[int, Reported] = {}
        for copy, member in zip(copies, ready.members, strict=True):
            told |= reported(copy.launched.plan, member.command.devices, member.buffers)
        held = keeper.ready(ready.command.endpoint, str(places[0].path), pids, told)
        for line in ready_lines(copies, ready, held=held, stays=stays):
            say(sys.stderr, line)
        on_ready()

    rows = zip(copies, places, strict=True)
    fleet = Fleet(
        members=tuple(Member(name=copy.name, command_for=copy.command_for, log_path=log.path) for copy, log in rows),
        proxy=proxy,
        proxy_log=proxy_log.path,
        adapter=first.adapter,
        environ=os.environ,
        host=request.host,
        port=request.port,
        api_key=request.api_key,
        expected_bytes=model.weights_bytes * len(copies),
        prompt=prompt,
        care=keeper,
    )
    serve_fleet(fleet, on_ready=settle, stop=stop)


def ready_lines(
    copies: Sequence[Copy], ready: FleetReady, *, stays: str, held: tuple[str, ...] = ()
) -> tuple[str, ...]:
    """What is said once all answer. Plans and reports are kept for the rig on the way."""
    lines = [f"  ready after {ready.seconds:.1f} s: {_where(ready)}"]
    lines += [
        f"    {copy.name}: {member.command.endpoint}   log: {member.log_path}"
        for copy, member in zip(copies, ready.members, strict=True)
    ]
    lines += [*held, *dict.fromkeys(_placement(copies, ready))]
    if not ready.proven:
        lines.append("  note: they listen, but could not be asked for a token")
    if ready.proxy is None and os.environ.get(VARIABLE, "").strip().lower() != "none":
        lines.append("  note: no nginx, HAProxy, Caddy or LiteLLM found to make them one address;")
        lines.append("        spread the users over these, or install one: apt-get install nginx-light")
    if stays:
        lines.append(f"  {stays.replace(' it', ' them all')}")
    return tuple(lines)


def _where(ready: FleetReady) -> str:
    if ready.proxy is None:
        return f"{len(ready.members)} replicas, each at an address of its own"
    return f"{ready.command.endpoint}, {ready.proxy.name} before {len(ready.members)} replicas"


def _placement(copies: Sequence[Copy], ready: FleetReady) -> Iterator[str]:
    for copy, member in zip(copies, ready.members, strict=True):
        yield from placement_lines(copy.launched, member)


def _logs(model_name: str, owns: Iterable[str]) -> list[LogPlace]:
    places: list[LogPlace] = []
    for own in owns:  # of many, the last must not clear the first away
        places.append(new_log(f"{model_name[:_NAME]}-{own}", kept=[str(place.path) for place in places]))
    return places
