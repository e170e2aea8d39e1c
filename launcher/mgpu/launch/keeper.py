"""One launch looked after, from its first process to its last: its entry in the store, its health, its log's size."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, TextIO

import msgspec
from msgspec import Struct
from msgspec.structs import replace

from mgpu.adapter import Adapter, Command
from mgpu.detect.live import CardNow
from mgpu.errors import RuntimeFailedError
from mgpu.launch.after import Before, compare, held_lines, look_before
from mgpu.launch.care import Care, Started
from mgpu.launch.health import (
    BEAT_S,
    IDLE_S,
    TOKEN_S,
    Asked,
    Effort,
    Look,
    Lookers,
    Looking,
    Vitals,
)
from mgpu.launch.identity import identify
from mgpu.launch.lookout import Lookout
from mgpu.launch.ports import FIRST_PORT, Ports, choose_ports, free_port
from mgpu.launch.process import Child
from mgpu.launch.progress import say
from mgpu.launch.records import Card, State, Undo
from mgpu.launch.signals import StopSignals
from mgpu.launch.stats import Tally
from mgpu.launch.store import Entry, choosing_ports, taken_ports
from mgpu.launch.theirs import held_by, members_of, pids_of, with_reported, with_taken
from mgpu.launch.verify import Reported
from mgpu.plan import DevicePlan, Plan
from mgpu.rig import Gpu
from mgpu.service import Attachment, Undone

_STUCK_S: Final = 120.0  # a look that takes longer is worth a word; unwell for longer is a failure, if it may restart
_DRIVER_S: Final = 10.0  # a driver that takes longer is not waited for
_NO_ANSWER: Final = "the driver does not answer"
_LOADING_S: Final = 3.0  # between two looks at what a loading runtime has taken of its cards by now
#: Where Docker is, for whoever ends a container after us.
_ELSEWHERE: Final = ("DOCKER_HOST", "DOCKER_CONTEXT", "XDG_RUNTIME_DIR")
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
    """Keeps `entry` true. `earlier`: who looked after the try before. `lookers` and `clock` as a test may want them.

    Health and cards are looked at apart, each in a thread: a driver that hangs hides nothing but itself.
    """

    def __init__(
        self,
        entry: Entry,
        kept: Kept,
        err: TextIO,
        *,
        earlier: Keeper | None = None,
        lookers: Lookers | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.entry = entry
        self.said: list[str] = [] if earlier is None else earlier.said
        self._kept = kept
        self._err = err
        self._lookers = lookers or Lookers()
        self._clock = clock
        self._vitals = Vitals(kept.plan.runtime)
        self._tally = Tally()
        self._effort = Effort()
        self._health = Lookout[Look]("how it is")
        #: One that hangs, hangs on: the next try must not begin another.
        self.cards: Lookout[tuple[CardNow, ...]] = Lookout("the cards") if earlier is None else earlier.cards
        self._own: Mapping[int, int] = {}  # bytes of each card that a loading runtime has, as the driver tells
        self._worked_at = self._asked_at = clock()  # for others; for a token
        self._taken_at = clock()  # when health was last seen
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
        self._before = look_before(self._cards_now())
        return port

    def ports(self, host: str, wanted: int | None, n_members: int, *, proxied: bool, start: int = FIRST_PORT) -> Ports:
        """As `port`, for all of them."""
        with choosing_ports():
            taken = taken_ports(but=self.entry.record.name)
            ports = choose_ports(host, wanted, n_members, proxied=proxied, start=self._first(start), taken=taken)
            self._tell_moved(ports.front)
            own = dict.fromkeys((ports.front, *ports.members))
            self.entry.change(ports=tuple(own), **_NOTHING_STARTED)
        self._before = look_before(self._cards_now())
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

    def starting(self, command: Command) -> None:
        record = self.entry.record
        self.entry.change(
            leaves=tuple(dict.fromkeys((*record.leaves, *command.leaves))),
            after=(*record.after, command.after) if command.after else record.after,
            variables={name: os.environ[name] for name in _ELSEWHERE if name in os.environ} if command.after else {},
        )

    def started(self, child: Child) -> None:
        record, identity = self.entry.record, identify(child.pid)
        own = child.scratch.directory
        self.entry.change(
            runtimes=record.runtimes if identity is None else (*record.runtimes, identity),
            directories=record.directories if own is None else (*record.directories, own),
        )
        self.logged(str(child.log_path))

    def logged(self, *paths: str) -> None:
        """Logs that nobody may clear away while it lives."""
        logs = tuple(dict.fromkeys((*self.entry.record.logs, *paths)))
        self.entry.change(logs=logs, log=logs[0])

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
        if not any(taken.values()):  # most logs say nothing of buffers
            self._guarded(lambda: self._look_at_loading(started), self.cards)
        own_of = self._own
        most = {gpu: max(taken.get(gpu, 0), own_of.get(gpu, 0)) for gpu in {*taken, *own_of}}
        cards = tuple(with_taken(card, most.get(card.gpu, 0)) for card in self.entry.record.cards)
        if cards != self.entry.record.cards:
            self.entry.change(cards=cards)

    def _look_at_loading(self, started: Sequence[Started]) -> None:
        """What the driver says that it has taken by now: that is not free any more, and promised no longer."""
        now = self._clock()
        seen = self.cards.take()
        if seen is not None:
            self._own = held_by(seen, pids_of(started))
        if self._kept.gpus and not self.cards.due_in(now, _LOADING_S):
            self.cards.begin(self._lookers.cards(self._kept.gpus), now)

    def _cards_now(self) -> tuple[CardNow, ...]:
        """The cards as they are, or nothing: a driver that hangs must not keep us from hearing a signal."""
        lookout, seen = self.cards, list[tuple[CardNow, ...]]()

        def see() -> None:
            if lookout.is_out and not lookout.is_overdue(self._clock(), _DRIVER_S):
                lookout.join(_DRIVER_S)
            lookout.take()  # of another moment
            if not lookout.is_out:
                lookout.begin(self._lookers.cards(self._kept.gpus), self._clock())
                lookout.join(_DRIVER_S)
            seen.append(lookout.take() or ())
            self._say(lookout.late(self._clock(), _DRIVER_S / 2, _NO_ANSWER))

        if self._kept.gpus:
            self._guarded(see, lookout)
        return seen[0] if seen else ()

    def _guarded(self, see: Callable[[], None], lookout: Lookout[Any]) -> None:
        try:
            see()
        except Exception as error:  # noqa: BLE001 - a look must not end what it looks at
            self._say(lookout.fail(error))

    def ready(
        self, endpoint: str, log: str, roots: Sequence[int] = (), reported: Mapping[int, Reported] = _NOTHING
    ) -> tuple[str, ...]:
        """It answers: all that it was promised is its own now. Returns what there is to say of its memory.

        `roots`: the processes that were started, one for each part of the plan. `reported`: by the runtime itself, by
        rig index.
        """
        now = self._worked_at = self._clock()
        self._tally.expect(len(self.entry.record.runtimes), now)  # each was asked for a token, a proxy too
        self._health.rest(now)
        cards = tuple(with_taken(card, card.planned) for card in self.entry.record.cards)
        self.entry.change(state="ready", endpoint=endpoint, log=log, ready=time.time(), cards=cards, promised_host=0)
        self._tell_flaw()
        if self._before is None or not roots:
            return ()
        after = self._cards_now()
        places = compare(self._before, after, self._kept.parts, self._kept.gpus, roots, os.environ)
        told = {gpu: one for gpu, one in reported.items() if one.n_bytes}
        self.entry.change(cards=tuple(with_reported(card, told.get(card.gpu)) for card in self.entry.record.cards))
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
            while watch.served:
                if self._tally.add(watch.served.popleft(), now):
                    self._worked_at = now
        self._guarded(lambda: self._look_at_health(started, stop, now), self._health)
        if self._kept.gpus:
            self._guarded(lambda: self._look_at_cards(started, stop, now), self.cards)
        self._judge(now)
        now = self._clock()
        lookouts = (self._health, self.cards) if self._kept.gpus else (self._health,)
        return min(lookout.due_in(now, BEAT_S) for lookout in lookouts)

    def _look_at_health(self, started: Sequence[Started], stop: StopSignals, now: float) -> None:
        seen = self._health.take()
        if seen is not None:
            self._take(seen, started, now)
            self._say(self._health.well())
        self._say(self._health.late(now, _STUCK_S + TOKEN_S, "looking takes too long"))
        if not self._health.due_in(now, BEAT_S):
            self._health.begin(self._lookers.health(self._looking(started, now)), now, stop.wake)

    def _looking(self, started: Sequence[Started], now: float) -> Looking:
        idle = now - max(self._worked_at, self._asked_at) >= IDLE_S
        wants_token = idle or self._vitals.is_waiting or self._vitals.unwell_since is not None
        if wants_token:
            self._asked_at = now
            self._tally.expect(1, now, TOKEN_S)
        return Looking(
            asked=tuple(Asked(name=watch.name, command=command) for watch, command in started),
            adapter=self._kept.adapter,
            api_key=self._kept.api_key,
            wants_token=wants_token,
        )

    def _take(self, seen: Look, started: Sequence[Started], now: float) -> None:
        """What is seen of it, for `mgpu ps` and for `_judge`."""
        from mgpu.launch.tree import cpu_seconds, rss_bytes  # psutil: imported by then

        for name, stats in seen.stats.items():
            self._tally.see(stats, now, source=name)
        pids = pids_of(started)
        asked = set(started[0][0].child.family()) if started and not started[0][1].elsewhere else set()
        effort = self._effort.is_work({pid: cpu_seconds(pid) for pid in asked}, now)
        gained = bool(seen.stats) and self._tally.has_gained
        if effort or gained or (effort is None and seen.stats and self._tally.is_working):
            self._worked_at = now
        rests = effort is False and self._worked_at < self._taken_at
        self._taken_at = now
        self._say(self._vitals.see(seen, now, rests=rests))
        state: State = "ready" if self._vitals.unwell_since is None else "unwell"
        resident = sum(rss_bytes(pid) for pid in pids)
        members = members_of(pids, started)
        self.entry.change(state=state, work=self._tally.work(now), ram_held=resident, members=members)
        self._tell_flaw()

    def _look_at_cards(self, started: Sequence[Started], stop: StopSignals, now: float) -> None:
        seen = self.cards.take()
        if seen is not None:
            self._say(self._vitals.see_cards(seen))
            self._hold(held_by(seen, pids_of(started)))
            self._say(self.cards.well())
        self._say(self.cards.late(now, _STUCK_S, _NO_ANSWER))
        if not self.cards.due_in(now, BEAT_S):
            self.cards.begin(self._lookers.cards(self._kept.gpus), now, stop.wake)

    def _judge(self, now: float) -> None:
        lost = self._vitals.lost
        if lost is not None:
            raise RuntimeFailedError(lost.text, hint=lost.hint)
        since = self._vitals.unwell_since
        fresh = self._taken_at == now  # the next look may have begun already, where each takes longer than a beat
        if self._health.is_out and not fresh and not self._health.is_overdue(now, _STUCK_S + TOKEN_S):
            return  # it may just be found well again
        if self._kept.ends_unwell and since is not None and now - since > _STUCK_S:
            raise RuntimeFailedError(f"not well for {now - since:.0f} s: {self._vitals.why}")

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


def planned_cards(plan: Plan, keys: dict[int, str]) -> tuple[Card, ...]:
    """What a plan promises itself of each card. `keys`: by rig index."""
    return tuple(_card(device, keys.get(device.gpu, "")) for device in plan.devices)


def _card(device: DevicePlan, key: str) -> Card:
    return Card(key=key, gpu=device.gpu, name=device.name, planned=device.memory.total)
