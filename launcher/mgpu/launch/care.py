"""Who looks after a launch while it lives: told what happens, asked where it may listen and when to be woken."""

from __future__ import annotations

from collections.abc import Sequence

from mgpu.adapter import Command
from mgpu.launch.ports import FIRST_PORT, Ports, choose_ports, free_port
from mgpu.launch.process import Child
from mgpu.launch.signals import StopSignals
from mgpu.launch.watch import Watch

#: A runtime under way, and the command it was started by.
Started = tuple[Watch, Command]


class Care:
    """Looks after nothing: for launches that are over in a moment. All of it is called from the main thread."""

    def port(self, host: str, wanted: int | None, start: int = FIRST_PORT) -> int:
        """Where one runtime may listen. Raises as `mgpu.launch.ports.free_port`."""
        return free_port(host, wanted=wanted, start=start)

    def ports(self, host: str, wanted: int | None, n_members: int, *, proxied: bool, start: int = FIRST_PORT) -> Ports:
        """Where several may, and what stands before them. Raises as `mgpu.launch.ports.choose_ports`."""
        return choose_ports(host, wanted, n_members, proxied=proxied, start=start)

    def starting(self, command: Command) -> None:
        """A process is about to be started by it."""

    def started(self, child: Child) -> None:
        """A process runs."""

    def directory(self, path: str) -> None:
        """A private directory was made, which goes with the launch."""

    def loading(self, started: Sequence[Started]) -> None:
        """The logs have been read again."""

    def tend(self, started: Sequence[Started], stop: StopSignals) -> float | None:
        """Look after what is ready; in how many seconds to be called again, None for never. `stop.wake` calls sooner.

        Raises `RuntimeFailedError` when it cannot go on.
        """
        del started, stop
        return None
