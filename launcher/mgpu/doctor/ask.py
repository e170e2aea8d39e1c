"""Many questions at once, none of which can hold up the others: a driver or a network mount may never answer."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Mapping

from msgspec import Struct


class Silence(Struct, frozen=True):
    """No answer, and why."""

    why: str


def ask_all(questions: Mapping[str, Callable[[], object]], timeout_s: float) -> dict[str, object]:
    """The answers by the questions' names; a `Silence` for each that had none within `timeout_s` in all, or failed.

    A thread that hangs is left behind: the system ends it with this process.
    """
    answers: queue.SimpleQueue[tuple[str, object]] = queue.SimpleQueue()
    deadline = time.monotonic() + timeout_s
    for name, question in questions.items():
        threading.Thread(target=_ask, args=(name, question, answers), name=f"doctor {name}", daemon=True).start()
    found: dict[str, object] = {}
    while len(found) < len(questions):
        try:
            name, answer = answers.get(timeout=max(deadline - time.monotonic(), 0.001))
        except queue.Empty:
            break
        found[name] = answer
    silence = Silence(f"gave no answer within {timeout_s:.0f} s")
    return {name: found.get(name, silence) for name in questions}


def _ask(name: str, question: Callable[[], object], answers: queue.SimpleQueue[tuple[str, object]]) -> None:
    try:
        answers.put((name, question()))
    except Exception as error:  # noqa: BLE001 - one part that breaks must not hide what the others found
        answers.put((name, Silence(f"cannot be looked at: {type(error).__name__}: {error}")))
