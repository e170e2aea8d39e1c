"""Several runtimes that serve one model, and the proxy in front of them: started, watched and stopped as one."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Final, NoReturn, TextIO

from msgspec import Struct

from mgpu.adapter import Adapter, Command, Endpoint
from mgpu.errors import InterruptedLaunchError, RuntimeFailedError
from mgpu.launch.ask import print_answer
from mgpu.launch.care import Care
from mgpu.launch.ports import FIRST_PORT, LOOPBACK, Ports, held, is_free
from mgpu.launch.process import Child
from mgpu.launch.progress import JointLine, say
from mgpu.launch.proxy import Proxy, ProxyLog, private_directory, proxy_command
from mgpu.launch.ready import Loading, first_dead, wait_all_ready, wait_ready
from mgpu.launch.serve import Ready, write_files
from mgpu.launch.signals import StopSignals, entered
from mgpu.launch.watch import Watch

_PORT_TRIES: Final = 3
_LAST_WORDS_S: Final = 0.1  # from the end of an answer to that of its replica, if it has died


class Member(Struct, frozen=True, kw_only=True):
    """One replica. `name` is what people know it by ("GPU 0"); `command_for` is called with where it is to listen."""

    name: str
    command_for: Callable[[Endpoint], Command]
    log_path: Path


class Fleet(Struct, frozen=True, kw_only=True):
    """What to launch together. Without a `proxy`, the first replica is at `port`, the others at the next free ones.

    `port` None: a free one from 8080 up. `prompt`: answer this one question instead of staying.
    `expected_bytes` is what loading will read, all replicas together.
    """

    members: tuple[Member, ...]
    proxy: Proxy | None
    proxy_log: Path
    adapter: Adapter
    environ: Mapping[str, str]
    host: str = "127.0.0.1"
    port: int | None = None
    api_key: str | None = None
    expected_bytes: int = 0
    prompt: str | None = None
    care: Care = Care()


class FleetReady(Struct, frozen=True, kw_only=True):
    """All replicas answer, and so does the proxy if there is one. `members` are in the fleet's order."""

    command: Command  # the proxy's, or the first replica's: where people go
    seconds: float
    members: tuple[Ready, ...]
    proxy: Proxy | None
    proven: bool


class _PortTakenError(Exception):
    """A port was free when we looked, and somebody else's when a replica bound it."""


def serve_fleet(
    fleet: Fleet,
    *,
    on_ready: Callable[[FleetReady], None],
    stop: StopSignals | None = None,
    out: TextIO | None = None,
    err: TextIO | None = None,
) -> int:
    """Run `fleet` in the foreground of the main thread; whatever happens, nothing of it runs afterwards.

    Returns and raises as `mgpu.launch.serve.serve` does; the first replica or proxy that fails ends them all.
    """
    out, err = out or sys.stdout, err or sys.stderr
    start, tries = FIRST_PORT, 0
    with entered(stop) as heard:
        while True:
            proxied = fleet.proxy is not None
            ports = fleet.care.ports(fleet.host, fleet.port, len(fleet.members), proxied=proxied, start=start)
            heard.check()
            tries += 1
            try:
                with held(fleet.host, ports.front) if fleet.proxy else ExitStack() as front:
                    session = _Session(fleet, ports, heard, err)
                    session.run(on_ready, out, release=front.close, may_move=tries < _PORT_TRIES)
            except _PortTakenError:
                start = max(ports.members) + 1
            else:
                return 0


class _Session:
    """One try of a fleet on its ports."""

    def __init__(self, fleet: Fleet, ports: Ports, stop: StopSignals, err: TextIO) -> None:
        host = fleet.host if fleet.proxy is None else LOOPBACK
        self.fleet = fleet
        self.ports = ports
        self.stop = stop
        self.err = err
        self.started = time.monotonic()
        self.commands = [
            member.command_for(Endpoint(host=host, port=port, api_key=fleet.api_key))
            for member, port in zip(fleet.members, ports.members, strict=True)
        ]
        self.children: list[Child] = []
        self.watches: list[Watch] = []
        self.proxy: Watch | None = None

    def run(
        self, on_ready: Callable[[FleetReady], None], out: TextIO, *, release: Callable[[], None], may_move: bool
    ) -> None:
        """`release` gives the proxy's port free. Raises `_PortTakenError` only if `may_move`."""
        with ExitStack() as opened:
            opened.callback(self._end, self.children)
            try:
                self._start_members(opened)
                proven = self._load(may_move=may_move)
                front, through = self.commands[0], proven[0]
                if self.fleet.proxy is not None:
                    release()
                    front, through = self._start_proxy(self.fleet.proxy, opened)
                on_ready(self._ready(front, through=through, proven=proven))
                self._use(front, out)
            except InterruptedLaunchError:
                say(self.err, f"stopping {self._names()} (once more: kill them)")
                raise

    def _start_members(self, opened: ExitStack) -> None:
        for member, command in zip(self.fleet.members, self.commands, strict=True):
            self.stop.check()
            child = self._start(command, member.log_path)
            self.children.append(child)
            watch = Watch(child, self.fleet.adapter, name=f"{child.name} on {member.name}")
            self.watches.append(opened.enter_context(watch))

    def _start(self, command: Command, log_path: Path) -> Child:
        write_files(command.files)
        self.fleet.care.starting(command)
        child = Child.of(command, self.fleet.environ, log_path)
        self.fleet.care.started(child)
        return child

    def _load(self, *, may_move: bool) -> tuple[bool, ...]:
        names = [member.name for member in self.fleet.members]
        line = JointLine(self.err, names, expected_bytes=self.fleet.expected_bytes)
        started = tuple(zip(self.watches, self.commands, strict=True))

        def on_progress(loadings: tuple[Loading, ...]) -> None:
            self.fleet.care.loading(started)
            line(loadings)

        try:
            return wait_all_ready(started, stop=self.stop, api_key=self.fleet.api_key, on_progress=on_progress)
        except RuntimeFailedError as error:
            if may_move and self._lost_a_port():
                raise _PortTakenError from error
            raise
        finally:
            line.close()

    def _lost_a_port(self) -> bool:
        """Whether a replica has ended whose port is now somebody else's."""
        host = self.fleet.host if self.fleet.proxy is None else LOOPBACK
        pairs = zip(self.watches, self.ports.members, strict=True)
        return any(
            watch.lost_port or (watch.child.poll() is not None and not is_free(host, port)) for watch, port in pairs
        )

    def _start_proxy(self, proxy: Proxy, opened: ExitStack) -> tuple[Command, bool]:
        """The proxy's command, and whether a token came through it."""
        fleet = self.fleet
        endpoint = Endpoint(host=fleet.host, port=self.ports.front, api_key=fleet.api_key)
        directory = opened.enter_context(private_directory())
        fleet.care.directory(str(directory))
        command = proxy_command(proxy, fleet.members[0].command_for, endpoint, self.ports.members, directory)
        child = self._start(command, fleet.proxy_log)
        opened.callback(self._end, [child])  # before its directory goes, and before the replicas
        self.proxy = opened.enter_context(Watch(child, ProxyLog()))
        self.commands.append(command)

        through = wait_ready(
            self.proxy,
            command,
            stop=self.stop,
            api_key=fleet.api_key,
            on_progress=lambda _: self._check_all(f"while {proxy.name} was starting"),
        )
        return command, through

    def _ready(self, front: Command, *, through: bool, proven: tuple[bool, ...]) -> FleetReady:
        seconds = time.monotonic() - self.started
        commands = self.commands[: len(self.watches)]  # without the proxy's
        rows = zip(self.fleet.members, commands, self.ports.members, self.watches, proven, strict=True)
        members = tuple(
            Ready(
                command=command,
                port=port,
                pid=watch.child.pid,
                seconds=seconds,
                buffers=tuple(watch.buffers),
                log_path=member.log_path,
                proven=own,
            )
            for member, command, port, watch, own in rows
        )
        return FleetReady(command=front, seconds=seconds, members=members, proxy=self.fleet.proxy, proven=through)

    def _use(self, front: Command, out: TextIO) -> None:
        fleet, asked = self.fleet, self.proxy or self.watches[0]
        if fleet.prompt is None:
            self._stay()
        others = [watch for watch in self.watches if watch is not asked]
        print_answer(fleet.prompt, front, api_key=fleet.api_key, watch=asked, stop=self.stop, out=out, others=others)
        if self.proxy is not None:
            self.stop.wait(_LAST_WORDS_S)  # Caddy 2.6 ends an answer whose replica has died as if it were whole
            self._check_all("while it was answering")

    def _stay(self) -> NoReturn:
        """Until one of them dies or we are asked to stop: both end in an exception."""
        while True:
            self.stop.check()
            self._check_all("while it was serving")
            started = tuple(zip(self._all(), self.commands, strict=True))
            self.stop.wait(self.fleet.care.tend(started, self.stop))

    def _check_all(self, when: str) -> None:
        dead = first_dead(self._all())
        if dead is not None:
            self.stop.check()
            raise dead.death(when)

    def _all(self) -> list[Watch]:
        return self.watches if self.proxy is None else [*self.watches, self.proxy]

    def _names(self) -> str:
        replicas = f"{len(self.watches)} replicas"
        return replicas if self.proxy is None else f"{self.proxy.name} and {replicas}"

    def _end(self, children: Sequence[Child]) -> None:
        """All at once: each may take seconds to give its memory back."""
        stopping = [threading.Thread(target=self._end_one, args=(child,), name="mgpu-stop") for child in children]
        for thread in stopping:
            thread.start()
        for thread in stopping:
            thread.join()

    def _end_one(self, child: Child) -> None:
        if child.stop(hurried=lambda: self.stop.hurried) is None:
            say(self.err, f"process {child.pid} does not end, even killed: it is stuck inside a driver or a disk")
