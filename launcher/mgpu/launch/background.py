"""HTTP beside the main thread: a signal is heard at once, however long a server takes to answer."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

T = TypeVar("T")


class Background(Generic[T]):
    """An iterator that runs in a thread; `wake` is called for each item and at the end.

    The thread is a daemon: one that hangs in a read never keeps mgpu from ending.
    """

    def __init__(self, items: Iterator[T], wake: Callable[[], None]) -> None:
        self._items = items
        self._wake = wake
        self._ready: deque[T] = deque()
        self._error: BaseException | None = None
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True, name="mgpu-http")
        self._thread.start()

    @property
    def done(self) -> bool:
        """Nothing more will come; what is left to `take` has come already."""
        return self._done.is_set()

    def take(self) -> list[T]:
        """The items that came since the last call. Raises what the iterator raised, after its last item."""
        done = self.done
        items = [self._ready.popleft() for _ in range(len(self._ready))]
        if done and not items and self._error is not None:
            raise self._error
        return items

    def join(self, seconds: float) -> None:
        self._thread.join(seconds)

    def _run(self) -> None:
        try:
            for item in self._items:
                self._ready.append(item)
                self._wake()
        except BaseException as error:  # noqa: BLE001  # raised again in the main thread, by `take`
            self._error = error
        self._done.set()
        self._wake()
