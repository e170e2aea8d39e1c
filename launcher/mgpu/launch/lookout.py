"""Looks of one kind, taken in a thread: whatever hangs or fails there, what is looked at goes on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

from mgpu.launch.background import Background

T = TypeVar("T")


class Lookout(Generic[T]):
    """Takes one look at a time: while one hangs, no other is begun, so that there is never more than one such thread.

    `subject` is what cannot be seen then. Trouble is told as lines worth saying, once, until a look has come to its
    end again. `now` is any clock's seconds.
    """

    def __init__(self, subject: str) -> None:
        self._subject = subject
        self._look: Background[T] | None = None
        self._begun_at: float | None = None
        self._trouble = False

    @property
    def is_out(self) -> bool:
        """A look is under way."""
        return self._look is not None

    def is_overdue(self, now: float, within_s: float) -> bool:
        """A look is under way, and has been for longer than that."""
        return self._look is not None and now - (self._begun_at or 0.0) > within_s

    def due_in(self, now: float, every_s: float) -> float:
        """Seconds until the next one may begin; those until one is looked after that is under way."""
        if self._look is not None:
            return every_s
        return 0.0 if self._begun_at is None else max(every_s - (now - self._begun_at), 0.0)

    def rest(self, now: float) -> None:
        """Nothing needs to be seen for a while: as if a look had begun just now."""
        if self._look is None:
            self._begun_at = now

    def begin(self, look: Iterator[T], now: float, wake: Callable[[], None] = lambda: None) -> None:
        """Begin one, if none is under way; `wake` is called at its end. Raises RuntimeError: no thread is to be had."""
        if self._look is None:
            self._begun_at = now
            self._look = Background(look, wake)

    def join(self, seconds: float) -> None:
        """Wait for the one that is under way, so long at most."""
        if self._look is not None:
            self._look.join(seconds)

    def take(self) -> T | None:
        """What was seen, once it has been. Raises what the look raised."""
        if self._look is None or not self._look.done:
            return None
        look, self._look = self._look, None
        return next(iter(look.take()), None)

    def late(self, now: float, within_s: float, why: str) -> tuple[str, ...]:
        """The look that is under way has taken longer than that."""
        if not self.is_overdue(now, within_s):
            return ()
        return self._tell(f"{why} ({now - (self._begun_at or 0.0):.0f} s so far)")

    def fail(self, error: Exception) -> tuple[str, ...]:
        """A look has ended so, or what was made of it."""
        return self._tell(f"{type(error).__name__}: {error}")

    def well(self) -> tuple[str, ...]:
        """A look has come to its end, and was taken in."""
        was, self._trouble = self._trouble, False
        return (f"can see {self._subject} again",) if was else ()

    def _tell(self, why: str) -> tuple[str, ...]:
        was, self._trouble = self._trouble, True
        return () if was else (f"cannot see {self._subject}: {why}",)
