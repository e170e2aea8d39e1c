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

_ANSWER_S: Final = 10.0  # for "are you there?"
_TOKEN_S: Final = 120.0  # for a token: an idle GPU wakes, weights may have been paged out
_TWICE: Final = 2  # looks in a row before anything is said: one may be a hiccup


class Asked(Struct, frozen=True, kw_only=True):
    """What to look at: a runtime or a proxy by its name, and how to ask it."""

    name: str
    command: Command


class Look(Struct, frozen=True, kw_only=True):
    """What was seen. `silent`: those that did not answer, and how; `token`: how one did not come, None: not asked.

    `stats`: by the same names.
    """

    silent: Mapping[str, str] = {}
    stats: Mapping[str, Stats] = {}
    cards: tuple[CardNow, ...] = ()
    token: str | None = None


class Looking(Struct, frozen=True, kw_only=True):
    """One look: whom to ask and with which key, and which cards. `wants_token`: for a token as well, from the first."""

    asked: tuple[Asked, ...]
    adapter: Adapter
    api_key: str | None
    gpus: tuple[Gpu, ...]
    wants_token: bool = False


def look(looking: Looking) -> Iterator[Look]:
    """Take one look. Blocks for as long as they do: to be run in a thread."""
    from mgpu.launch.http import Caller  # http.client: imported by then

    headers = {"Authorization": f"Bearer {looking.api_key}"} if looking.api_key else {}
    silent: dict[str, str] = {}
    stats: dict[str, Stats] = {}
    with closing(Caller()) as caller:
        for one in looking.asked:
            answer = caller.ask(Call(method="GET", url=one.command.ready_url, headers=headers, timeout_s=_ANSWER_S))
            if answer.status != 200:
                silent[one.name] = f"answers HTTP {answer.status}" if answer.status else str(answer.body)[:200]
            elif one.command.metrics_url:
                told = caller.ask(Call(method="GET", url=one.command.metrics_url, headers=headers, timeout_s=_ANSWER_S))
                read = looking.adapter.read_metrics(told.body) if isinstance(told.body, str) else None
                if read is not None:
                    stats[one.name] = read
    token = _token(looking) if looking.wants_token and not silent else None
    yield Look(silent=silent, stats=stats, cards=read_now(looking.gpus), token=token)


def _token(looking: Looking) -> str:
    """Why no token came; empty when one did."""
    from mgpu.errors import RuntimeFailedError
    from mgpu.launch.client import Client  # http.client: imported by then

    try:
        Client(looking.asked[0].command, looking.api_key).generate_one(timeout_s=_TOKEN_S)
    except RuntimeFailedError as error:
        return error.message
    return ""


class Vitals:
    """What has been seen so far, in constant memory. `unwell_since`: since when it does not do its work."""

    def __init__(self, name: str) -> None:
        self.unwell_since: float | None = None
        self.lost: Finding | None = None  # a card of ours has gone: there is no going on
        self._name = name
        self._why = ""
        self._bad = 0
        self._first_bad = 0.0
        self._lost = 0
        self._blind = ""
        self._missed = False

    def see(self, seen: Look, now: float) -> tuple[str, ...]:
        """Take it in; what is worth saying about it."""
        self._missed = False
        news = self._see_cards(seen.cards)
        complaint = next((f"{name}: {how}" for name, how in seen.silent.items()), "")
        if not complaint and seen.token:
            complaint = f"{self._name} {seen.token}"
        return (*news, *self._judge(complaint, now))

    def miss(self, seconds: float) -> tuple[str, ...]:
        """The last look has not come back for so long: a driver that hangs, as a rule."""
        if self._missed:
            return ()
        self._missed = True
        return (f"cannot see how it is: looking has taken {seconds:.0f} s so far; a driver that does not answer?",)

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

    def _see_cards(self, cards: Sequence[CardNow]) -> tuple[str, ...]:
        """A driver that has become blind is worth a word, once: what runs may run on."""
        lost = next((card.lost for card in cards if card.lost is not None), None)
        self._lost = self._lost + 1 if lost is not None else 0
        if self._lost >= _TWICE:
            self.lost = lost
        blind = next((card.blind.text for card in cards if card.blind is not None), "")
        was, self._blind = self._blind, blind
        return (f"cannot see the cards any more: {blind}",) if blind and not was else ()


#: Takes a look, in a thread: `look`, or what a test puts in its place.
Looker = Callable[[Looking], Iterator[Look]]
