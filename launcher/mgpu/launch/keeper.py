"""One launch looked after, from its first process to its last: its entry in the store, its health, its log's size."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Final, TextIO

import msgspec
from msgspec import Struct
from msgspec.structs import replace

from mgpu.adapter import Adapter, Command
from mgpu.errors import RuntimeFailedError
from mgpu.launch.after import Before, compare, held_lines, look_before
from mgpu.launch.background import Background
from mgpu.launch.care import Care, Started
from mgpu.launch.health import BEAT_S, IDLE_S, Asked, Look, Looker, Looking, Vitals, look
from mgpu.launch.identity import Identity, identify
from mgpu.launch.logs import shorten
from mgpu.launch.ports import FIRST_PORT, Ports, choose_ports, free_port
from mgpu.launch.process import Child
from mgpu.launch.progress import say
from mgpu.launch.records import Card, State, Undo
from mgpu.launch.signals import StopSignals
from mgpu.launch.stats import Tally
from mgpu.launch.store import Entry, choosing_ports, taken_ports
from mgpu.launch.verify import Reported
from mgpu.plan import DevicePlan, Plan
from mgpu.rig import Gpu
from mgpu.service import Attachment, Undone

_STUCK_S: Final = 120.0  # a look that takes longer is worth a word; unwell for longer is a failure, if it may restart
_NOTHING: Final[Mapping[int, Reported]] = {}
#: In a record, before a try: the ones before it have ended, and left nothing.
_NOTHING_STARTED: Final[Mapping[str, tuple[()]]] = {
    "runtimes": (),
    "members": (),
    "directories": (),
    "leaves": (),
    "after": (),
}

_MOST_MEMBERS: Final = 256
_MOST_SAID: Final = 50  # of the last things said, kept for a report


class Kept(Struct, frozen=True, kw_only=True):
    """What is launched. `parts`: the plans of its runtimes, in the order they start; a proxy comes after them.

    `gpus`: the cards of the plan. `ends_unwell`: one that does not get well is ended, as somebody starts it again.
    """

    plan: Plan
    parts: tuple[Plan, ...]
    gpus: tuple[Gpu, ...]
    adapter: Adapter
    api_key: str | None = None
    ends_unwell: bool = False


class Keeper(Care):
    """Keeps `entry` true. `looker` and `clock` as a test may want them."""

    def __init__(
        self,
        entry: Entry,
        kept: Kept,
        err: TextIO,
        *,
        looker: Looker = look,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.entry = entry
        self.said: list[str] = []
        self._kept = kept
        self._err = err
        self._looker = looker
        self._clock = clock
        self._vitals = Vitals(kept.plan.runtime)
        self._tally = Tally()
        self._looking: Background[Look] | None = None
        self._looked_at = clock()
        self._worked_at = clock()
        self._flaw = ""
        self._before: Before | None = None
        self._tell_flaw()

    def port(self, host: str, wanted: int | None, start: int = FIRST_PORT) -> int:
        """A port that no other launch was promised; ours from now on. What is started again goes where it was."""
        with choosing_ports():
            taken = taken_ports(but=self.entry.record.name)
            port = free_port(host, wanted=wanted, start=self._first(start), taken=taken)
            self._tell_moved(port)
            self.entry.change(ports=(port,), **_NOTHING_STARTED)
        self._before = look_before(self._kept.gpus)
        return port

    def ports(self, host: str, wanted: int | None, n_members: int, *, proxied: bool, start: int = FIRST_PORT) -> Ports:
        """As `port`, for all of them."""
        with choosing_ports():
            taken = taken_ports(but=self.entry.record.name)
            ports = choose_ports(host, wanted, n_members, proxied=proxied, start=self._first(start), taken=taken)
            self._tell_moved(ports.front)
            own = dict.fromkeys((ports.front, *ports.members))
            self.entry.change(ports=tuple(own), **_NOTHING_STARTED)
        self._before = look_before(self._kept.gpus)
        return ports

    def _first(self, start: int) -> int:
        """Where to look for a port from, if nothing is wrong with where we were."""
        was = self.entry.record.ports
        return was[0] if was and start == FIRST_PORT else start

    def _tell_moved(self, port: int) -> None:
        """Clients know the address of what has been ready."""
        record = self.entry.record
        if record.restarts and record.ports and record.ports[0] != port:
            self._say((f"port {record.ports[0]} has been taken by another program: it is at {port} from now on",))

    def started(self, child: Child, command: Command) -> None:
        record, identity = self.entry.record, identify(child.pid)
        own = child.scratch.directory
        self.entry.change(
            runtimes=record.runtimes if identity is None else (*record.runtimes, identity),
            directories=record.directories if own is None else (*record.directories, own),
            leaves=tuple(dict.fromkeys((*record.leaves, *command.leaves))),
            after=(*record.after, command.after) if command.after else record.after,
            log=record.log or str(child.log_path),
        )

    def directory(self, path: str) -> None:
        self.entry.change(directories=(*self.entry.record.directories, path))

    def attached(self, attachment: Attachment) -> None:
        """A model is made ready on a service that outlives us: how to give it back, for whoever comes after us."""
        if isinstance(attachment, Undone):
            calls = (call for call in attachment.undo if call.method in {"POST", "DELETE"})
            undo = [{"method": call.method, "url": call.url, "body": call.body} for call in calls]
            self.entry.change(undo=msgspec.convert(undo, type=tuple[Undo, ...]))

    def loading(self, started: Sequence[Started]) -> None:
        taken: dict[int, int] = {}
        for plan, (watch, command) in zip(self._kept.parts, started, strict=False):
            for device, name in zip(plan.devices, command.devices, strict=False):
                own = sum(buffer.n_bytes for buffer in watch.buffers if buffer.device == name)
                taken[device.gpu] = taken.get(device.gpu, 0) + own
        cards = tuple(_taken(card, taken.get(card.gpu, 0)) for card in self.entry.record.cards)
        if cards != self.entry.record.cards:
            self.entry.change(cards=cards)

    def ready(
        self, endpoint: str, log: str, roots: Sequence[int] = (), reported: Mapping[int, Reported] = _NOTHING
    ) -> tuple[str, ...]:
        """It answers: all that it was promised is its own now. Returns what there is to say of its memory.

        `roots`: the processes that were started, one for each part of the plan. `reported`: by the runtime itself, by
        rig index.
        """
        self._looked_at = self._worked_at = self._clock()
        cards = tuple(_taken(card, card.planned) for card in self.entry.record.cards)
        self.entry.change(state="ready", endpoint=endpoint, log=log, ready=time.time(), cards=cards, promised_host=0)
        self._tell_flaw()
        if self._before is None or not roots:
            return ()
        places = compare(self._before, self._kept.parts, self._kept.gpus, roots, os.environ)
        told = {gpu: one for gpu, one in reported.items() if one.n_bytes}
        self.entry.change(cards=tuple(_reported(card, told.get(card.gpu)) for card in self.entry.record.cards))
        self._hold({place.gpu: place.held_bytes for place in places if place.held_bytes is not None})
        warned = next((place.warning for place in places if place.warning), "")
        if warned:
            self.entry.change(said=warned)
        return held_lines(places, reported)

    def _hold(self, held: Mapping[int, int]) -> None:
        """What each card (by rig index) really holds for this launch; of those that nobody tells, what was known."""
        cards = tuple(replace(card, held=held.get(card.gpu, card.held)) for card in self.entry.record.cards)
        self.entry.change(cards=cards)

    def tend(self, started: Sequence[Started], stop: StopSignals) -> float | None:
        now = self._clock()
        for watch, _ in started:
            watch.settle()
            watch.update()
            shorten(watch.child)
            while watch.served:
                self._tally.add(watch.served.popleft(), now)
                self._worked_at = now
        self._take(started, now)
        if self._looking is None and now - self._looked_at >= BEAT_S:
            self._begin(started, stop, now)
        self._judge()
        if self._looking is not None:
            return BEAT_S
        return max(BEAT_S - (self._clock() - self._looked_at), 0.0)

    def _begin(self, started: Sequence[Started], stop: StopSignals, now: float) -> None:
        asked = tuple(Asked(name=watch.name, command=command) for watch, command in started)
        idle = now - self._worked_at >= IDLE_S
        if idle:
            self._worked_at = now
        looking = Looking(
            asked=asked,
            adapter=self._kept.adapter,
            api_key=self._kept.api_key,
            gpus=self._kept.gpus,
            wants_token=idle or self._vitals.unwell_since is not None,
        )
        self._looked_at = now
        self._looking = Background(self._looker(looking), stop.wake)

    def _take(self, started: Sequence[Started], now: float) -> None:
        if self._looking is None:
            return
        if not self._looking.done:
            if now - self._looked_at > _STUCK_S:
                self._say(self._vitals.miss(now - self._looked_at))
            return
        looks = self._looking.take()
        self._looking = None
        for seen in looks:
            self._say(self._vitals.see(seen, now))
            for name, stats in seen.stats.items():
                self._tally.see(stats, now, source=name)
            if self._tally.is_working:
                self._worked_at = now
            self._note(seen, started, now)

    def _note(self, seen: Look, started: Sequence[Started], now: float) -> None:
        """What is seen, for `mgpu ps`."""
        from mgpu.launch.tree import rss_bytes  # psutil: imported by then

        state: State = "ready" if self._vitals.unwell_since is None else "unwell"
        pids = {pid for watch, _ in started for pid in watch.child.family()}
        held = {card.index: own for card in seen.cards if (own := _own(card.by_pid, pids)) is not None}
        self._hold(held)
        resident = sum(rss_bytes(pid) for pid in pids)
        members = _members(pids, started)
        self.entry.change(state=state, work=self._tally.work(now), ram_held=resident, members=members)
        self._tell_flaw()

    def _judge(self) -> None:
        lost = self._vitals.lost
        if lost is not None:
            raise RuntimeFailedError(lost.text, hint=lost.hint)
        since = self._vitals.unwell_since
        if self._kept.ends_unwell and since is not None and self._clock() - since > _STUCK_S:
            raise RuntimeFailedError(f"not well for {self._clock() - since:.0f} s: {self._vitals.why}")

    def _say(self, lines: Sequence[str]) -> None:
        for line in lines:
            stamp = time.strftime("%Y-%m-%d %H:%M:%S")
            say(self._err, f"  {stamp} {line}")
            self.said = [*self.said[1 - _MOST_SAID :], f"{stamp} {line}"]
            self.entry.change(said=line)

    def _tell_flaw(self) -> None:
        """Once, where the launch cannot be kept: it goes on all the same."""
        if self.entry.flaw and self.entry.flaw != self._flaw:
            say(self._err, f"  note: {self.entry.flaw}: `mgpu ps` may not show it as it is")
        self._flaw = self.entry.flaw


def _members(pids: Iterable[int], started: Sequence[Started]) -> tuple[Identity, ...]:
    """What the runtimes have started: some of it may outlive them, in groups and sessions of its own."""
    roots = {watch.child.pid for watch, _ in started}
    found = (identify(pid) for pid in sorted(set(pids) - roots)[:_MOST_MEMBERS])
    return tuple(identity for identity in found if identity is not None)


def planned_cards(plan: Plan, keys: dict[int, str]) -> tuple[Card, ...]:
    """What a plan promises itself of each card. `keys`: by rig index."""
    return tuple(_card(device, keys.get(device.gpu, "")) for device in plan.devices)


def _card(device: DevicePlan, key: str) -> Card:
    return Card(key=key, gpu=device.gpu, name=device.name, planned=device.memory.total)


def _reported(card: Card, told: Reported | None) -> Card:
    return card if told is None else replace(card, reported=told.n_bytes, reported_planned=told.planned)


def _taken(card: Card, n_bytes: int) -> Card:
    n_bytes = min(n_bytes, card.planned)
    return card if n_bytes == card.taken else replace(card, taken=n_bytes)


def _own(by_pid: object, pids: set[int]) -> int | None:
    """Bytes that these processes hold; None where the driver names none of them."""
    assert isinstance(by_pid, dict)  # noqa: S101 - Mapping[int, int] of CardNow
    own = [size for pid, size in by_pid.items() if pid in pids]
    return sum(own) if own else None
