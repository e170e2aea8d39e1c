"""The work done so far: requests as the log tells them, and what metrics say. Pure, in constant memory; time is given.

A runtime's counters are as old as the runtime: where they go back, it was started again, and they count on.
What we asked it ourselves, to see whether it works, is no work.
"""

from __future__ import annotations

from collections import deque
from typing import Final

from msgspec import Struct
from msgspec.structs import replace

from mgpu.adapter import Served, Stats
from mgpu.launch.records import Work

#: What "lately" is, in seconds, and how far apart what is remembered of it lies at least.
WINDOW_S: Final = 60.0
_APART_S: Final = 5.0

#: How long after it was asked a token of our own shows up in a log and in counters, at the latest.
_OWN_S: Final = 60.0

_MOST_SOURCES: Final = 256
_LEAST_S: Final = 1e-6  # less is no time to tell a speed from

#: llama-server's counters have six digits: from here on, a minute's work may be less than what they round off.
_COARSE: Final = 10_000_000


class _Source(Struct, kw_only=True):
    """One runtime's counters, as last seen."""

    generated: int = 0
    generating_s: float = 0.0
    running: int | None = None
    waiting: int | None = None
    seen_at: float = 0.0


class _Moment(Struct, frozen=True, kw_only=True):
    """Tokens up to then: by the counters, and by the log."""

    at: float
    counted: int
    served: int


class _Own:
    """Requests for one token each that we made: the next few of that size are these."""

    def __init__(self) -> None:
        self._left = 0
        self._until = 0.0

    def expect(self, n: int, until: float) -> None:
        self._left = max(self._left, n)
        self._until = until

    def take(self, n: int, now: float) -> int:
        """How many of `n` are ours."""
        if now > self._until:
            self._left = 0
        ours = min(n, self._left)
        self._left -= ours
        return ours


class Tally:
    """Sums over all requests, and over the last minute. `now` is any clock's seconds."""

    def __init__(self) -> None:
        self.is_working = False  # at the last look, or since the one before
        self.has_gained = False  # tokens, since the one before
        self._sources: dict[str, _Source] = {}
        self._recent: deque[_Moment] = deque(maxlen=int(WINDOW_S / _APART_S) + 2)
        self._requests = 0
        self._served = 0
        self._served_s = 0.0
        self._counted = 0
        self._counted_s = 0.0
        self._worked = self._gained = False
        self._own_served, self._own_counted = _Own(), _Own()
        self._looked_at: float | None = None
        self._place = 0
        self._now = 0.0

    def expect(self, n: int, now: float, within_s: float = 0.0) -> None:
        """We ask for a token, `n` times, and have the answers in so many seconds."""
        for own in (self._own_served, self._own_counted):
            own.expect(n, now + within_s + _OWN_S)

    def add(self, served: Served, now: float) -> bool:
        """A request was answered. False: it was one of our own."""
        self._pass(now)
        if served.n_tokens <= 1 and self._own_served.take(1, now):
            return False
        self._requests += 1
        self._served += served.n_tokens
        self._served_s += served.seconds
        return True

    def see(self, stats: Stats, now: float, source: str = "") -> None:
        """A runtime's counters. `source` is its name; without, the n-th of those seen at the same instant."""
        if now != self._looked_at:
            self._looked_at, self._place, self._worked, self._gained = now, 0, False, False
        self._pass(now)
        name = source or f"#{self._place}"
        is_new = name not in self._sources
        known = self._source(name)
        self._place += 1
        fresh, fresh_s = _gained(stats.generated, known.generated), _gained(stats.generating_s, known.generating_s)
        own = self._own_counted.take(int(fresh), now)
        if own:
            fresh, fresh_s = fresh - own, fresh_s if fresh > own else 0.0
        self._counted += int(fresh)
        self._counted_s += fresh_s
        if is_new:  # what it has counted so far is older than what is looked back at
            self._recent = deque((_later(moment, int(fresh)) for moment in self._recent), maxlen=self._recent.maxlen)
        known.generated = known.generated if stats.generated is None else stats.generated
        known.generating_s = known.generating_s if stats.generating_s is None else stats.generating_s
        known.running, known.waiting, known.seen_at = stats.running, stats.waiting, now
        self._worked = self._worked or bool(fresh or stats.running or stats.waiting)
        self._gained = self._gained or bool(fresh)
        self.is_working, self.has_gained = self._worked, self._gained

    def work(self, now: float | None = None) -> Work:
        """All of it, as of `now`; by default, of the last that was told."""
        if now is not None:
            self._pass(now)
        return Work(
            requests=self._requests or None,
            tok_s=self._tok_s(),
            lately=self._lately(),
            running=_total([source.running for source in self._seen_last()]),
            waiting=_total([source.waiting for source in self._seen_last()]),
        )

    def _source(self, name: str) -> _Source:
        if name not in self._sources and len(self._sources) >= _MOST_SOURCES:
            oldest = min(self._sources, key=lambda known: self._sources[known].seen_at)
            del self._sources[oldest]
        return self._sources.setdefault(name, _Source())

    def _seen_last(self) -> list[_Source]:
        return [source for source in self._sources.values() if source.seen_at == self._looked_at]

    def _tok_s(self) -> float | None:
        """Of one request as it runs: the log's figures are exact, the counters include what is still running."""
        if self._served_s > _LEAST_S:
            return self._served / self._served_s
        return self._counted / self._counted_s if self._counted_s > _LEAST_S else None

    def _lately(self) -> float | None:
        """All requests together, by the clock."""
        if not self._recent or not (self._requests or self._counted):
            return None
        first = self._recent[0]
        seconds = self._now - first.at
        if seconds < _APART_S:
            return None
        coarse = any(source.generated >= _COARSE for source in self._sources.values())
        by_log = not self._sources or (coarse and self._served > 0)
        tokens = self._served - first.served if by_log else self._counted - first.counted
        return tokens / seconds

    def _pass(self, now: float) -> None:
        """Time goes on. A clock that goes back begins a new window."""
        if now < self._now:
            self._recent.clear()
        self._now = now
        if not self._recent or now - self._recent[-1].at >= _APART_S:
            self._recent.append(_Moment(at=now, counted=self._counted, served=self._served))
        while len(self._recent) > 1 and now - self._recent[1].at >= WINDOW_S:
            self._recent.popleft()


def _later(moment: _Moment, tokens: int) -> _Moment:
    return replace(moment, counted=moment.counted + tokens)


def _gained(now: float | None, before: float) -> float:
    """What a counter has gained; all of it, where it began anew."""
    if now is None:
        return 0
    return now - before if now >= before else now


def _total(values: list[int | None]) -> int | None:
    told = [value for value in values if value is not None]
    return sum(told) if told else None
