"""How a launch is, now and over the months: looked at by a thread, judged here. Judging is pure; time is passed in."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from typing import Final

from msgspec import Struct

from mgpu.adapter import Adapter, Command, Stats
from mgpu.detect.live import CardNow, read_now
from mgpu.rig import Finding, Gpu
from mgpu.service import Call

BEAT_S: Final = 15.0  # between two looks

#: A real request takes a slot, and with it the cache of whoever was the last to use it: only of servers long idle.
IDLE_S: Final = 900.0

#: For a token: an idle GPU wakes, weights may have been paged out.
TOKEN_S: Final = 120.0

_ANSWER_S: Final = 10.0  # for "are you there?"
_HUNG_S: Final = 600.0  # one token after the other is waited for in vain, and nothing is done
_WORKS: Final = 0.01  # of a core: an idle llama-server took 0.0003 at most, what feeds a GPU takes most of one
_TWICE: Final = 2  # looks in a row before anything is said: one may be a hiccup


class Asked(Struct, frozen=True, kw_only=True):
    """What to look at: a runtime or a proxy by its name, and how to ask it."""

    name: str
    command: Command


class Look(Struct, frozen=True, kw_only=True):
    """What was seen. `silent`: those that did not answer, and how; `token`: how one did not come, None: not asked.

    `late`: it did not come in time, though nobody refused it. `stats`: by the same names; `flaw`: why some are missing.
    """

    silent: Mapping[str, str] = {}
    stats: Mapping[str, Stats] = {}
    token: str | None = None
    late: bool = False
    flaw: str = ""


class Looking(Struct, frozen=True, kw_only=True):
    """One look: whom to ask and with which key. `wants_token`: for a token as well, from the first."""

    asked: tuple[Asked, ...]
    adapter: Adapter
    api_key: str | None
    wants_token: bool = False


def look(looking: Looking) -> Iterator[Look]:
    """Take one look. Blocks for as long as they do: to be run in a thread."""
    from mgpu.launch.http import Caller  # http.client: imported by then

    headers = {"Authorization": f"Bearer {looking.api_key}"} if looking.api_key else {}
    silent: dict[str, str] = {}
    stats: dict[str, Stats] = {}
    flaw = ""
    with closing(Caller()) as caller:
        for one in looking.asked:
            answer = caller.ask(Call(method="GET", url=one.command.ready_url, headers=headers, timeout_s=_ANSWER_S))
            if answer.status != 200:
                silent[one.name] = f"answers HTTP {answer.status}" if answer.status else str(answer.body)[:200]
            elif one.command.metrics_url:
                told = caller.ask(Call(method="GET", url=one.command.metrics_url, headers=headers, timeout_s=_ANSWER_S))
                try:
                    read = looking.adapter.read_metrics(told.body) if isinstance(told.body, str) else None
                except Exception as error:  # noqa: BLE001 - an adapter may be anybody's: the rest is still to be seen
                    read, flaw = None, f"the metrics of {one.name}: {type(error).__name__}: {error}"
                if read is not None:
                    stats[one.name] = read
    wants_token = looking.wants_token and looking.asked and not silent
    token, late = _token(looking) if wants_token else (None, False)
    yield Look(silent=silent, stats=stats, token=token, late=late, flaw=flaw)


def look_at_cards(gpus: tuple[Gpu, ...]) -> Iterator[tuple[CardNow, ...]]:
    """As `look`, for the driver: one that hangs must not keep anybody from seeing that the server answers."""
    yield read_now(gpus)


def _token(looking: Looking) -> tuple[str, bool]:
    """Why no token came, empty when one did; and whether it was only too late."""
    from mgpu.errors import RuntimeFailedError
    from mgpu.launch.client import Client, LateError  # http.client: imported by then

    try:
        Client(looking.asked[0].command, looking.api_key).generate_one(timeout_s=TOKEN_S)
    except RuntimeFailedError as error:
        return error.message, isinstance(error, LateError)
    return "", False


class Effort:
    """Processor time of some processes, from look to look."""

    def __init__(self) -> None:
        self._last: Mapping[int, float] = {}
        self._at: float | None = None

    def is_work(self, seconds: Mapping[int, float], now: float) -> bool | None:
        """Whether they did more than to answer "are you there?" since the call before. None: that is not known.

        `seconds`: of each process so far, by pid; none where they cannot be seen.
        """
        last, self._last = self._last, seconds
        at, self._at = self._at, now
        if at is None or now <= at or not last or not seconds:
            return None
        spent = sum(max(own - last.get(pid, 0.0), 0.0) for pid, own in seconds.items())
        return spent / (now - at) > _WORKS


class Vitals:
    """What has been seen so far, in constant memory. `unwell_since`: since when it does not do its work.

    The rule. It is not well when two looks in a row found that the server does not answer, or that it refuses a token:
    with an error, a broken connection, an answer without one. A token that does not come in time, while the server
    says that it is there, waits behind somebody's work, as a rule: that is no complaint. Only where it is known that
    nothing is done (no token counted, no request finished, hardly any processor time used), and that for `_HUNG_S` with
    one token after the other asked in vain, it is: then all its requests hang. A runtime that spins without end, or
    whose processes cannot be seen, is given the benefit of the doubt.
    """

    def __init__(self, name: str) -> None:
        self.unwell_since: float | None = None
        self.lost: Finding | None = None  # a card of ours has gone: there is no going on
        self._name = name
        self._why = ""
        self._bad = 0
        self._first_bad = 0.0
        self._late_since: float | None = None
        self._lost = 0
        self._blind = ""
        self._flaw = ""

    def see(self, seen: Look, now: float, *, rests: bool = False) -> tuple[str, ...]:
        """Take it in; what is worth saying about it. `rests`: it is known to have done nothing since the last look."""
        complaint = next((f"{name}: {how}" for name, how in seen.silent.items()), "")
        if not rests or not seen.late:
            self._late_since = None
        elif self._late_since is None:
            self._late_since = now - TOKEN_S
        if not complaint and seen.late:
            if rests and not self._is_hung(now):
                return self._note(seen.flaw)  # neither well nor ill
            complaint = f"{self._name} {seen.token}, and does nothing" if rests else ""
        elif not complaint and seen.token:
            complaint = f"{self._name} {seen.token}"
        return (*self._note(seen.flaw), *self._judge(complaint, now))

    @property
    def is_waiting(self) -> bool:
        """It was asked for a token, gave none, and did nothing: to be asked again."""
        return self._late_since is not None

    def _is_hung(self, now: float) -> bool:
        return self._late_since is not None and now - self._late_since >= _HUNG_S

    def _note(self, flaw: str) -> tuple[str, ...]:
        was, self._flaw = self._flaw, flaw
        return (f"cannot read {flaw}",) if flaw and not was else ()

    def _judge(self, complaint: str, now: float) -> Iterator[str]:
        if complaint:
            self._first_bad = self._first_bad if self._bad else now
            self._bad += 1
            if self._bad == _TWICE:
                self.unwell_since, self._why = self._first_bad, complaint
                yield f"not well: {complaint}"
            return
        if self.unwell_since is not None:
            yield f"well again after {now - self.unwell_since:.0f} s"
        self._bad, self.unwell_since = 0, None

    @property
    def why(self) -> str:
        """What it was last said to suffer from."""
        return self._why

    def see_cards(self, cards: Sequence[CardNow]) -> tuple[str, ...]:
        """A driver that has become blind is worth a word, once: what runs may run on."""
        lost = next((card.lost for card in cards if card.lost is not None), None)
        self._lost = self._lost + 1 if lost is not None else 0
        if self._lost >= _TWICE:
            self.lost = lost
        blind = next((card.blind.text for card in cards if card.blind is not None), "")
        was, self._blind = self._blind, blind
        return (f"cannot see the cards any more: {blind}",) if blind and not was else ()


#: Take a look, in a thread: `look` and `look_at_cards`, or what a test puts in their place.
Looker = Callable[[Looking], Iterator[Look]]
CardLooker = Callable[[tuple[Gpu, ...]], Iterator[tuple[CardNow, ...]]]


class Lookers(Struct, frozen=True, kw_only=True):
    """Who looks at what."""

    health: Looker = look
    cards: CardLooker = look_at_cards
