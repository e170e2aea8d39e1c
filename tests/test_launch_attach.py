"""Talks driven: shown, heeded, given back, whatever happens."""

from __future__ import annotations

import io
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from mgpu.errors import InterruptedLaunchError, RuntimeFailedError
from mgpu.launch import attach
from mgpu.launch.attach import use
from mgpu.launch.digests import sha256
from mgpu.launch.signals import StopSignals
from mgpu.service import Answer, Call, Digest, Pause, Said, Space, Talk, Told

Begin = Callable[[], Talk]


def nothing() -> Talk:
    yield from ()


class Attachment:
    """Does what its talks say; keeps in which order they were asked."""

    endpoint = "http://127.0.0.1:9/v1"
    model_name = "it"

    def __init__(self, begin: Begin = nothing, check: Begin = nothing, end: Begin = nothing) -> None:
        self.asked: list[str] = []
        self._talks = {"begin": begin, "check": check, "end": end}

    def begin(self) -> Talk:
        return self._talk("begin")

    def check(self) -> Talk:
        return self._talk("check")

    def end(self) -> Talk:
        return self._talk("end")

    def _talk(self, name: str) -> Talk:
        self.asked.append(name)
        yield from self._talks[name]()


class Speaking(Attachment):
    def __init__(self, answer: Callable[[str], Talk], begin: Begin = nothing) -> None:
        super().__init__(begin)
        self._answer = answer

    def answer(self, prompt: str) -> Talk:
        return self._answer(prompt)


def failing(*words: str) -> Begin:
    """Says, then fails with the last."""

    def talk() -> Talk:
        for word in words[:-1]:
            yield Told(text=word)
        raise RuntimeFailedError(words[-1])

    return talk


def echo(prompt: str) -> Talk:
    for word in prompt.split():
        yield Pause(seconds=0.01)
        yield Said(text=word)


class Used:
    """One `use`, and what came of it."""

    def __init__(
        self, attachment: Attachment, prompt: str | None = None, after: Callable[[], object] | None = None
    ) -> None:
        self.out, self.err = io.StringIO(), io.StringIO()
        self.ready: list[float] = []
        self.error: Exception | None = None
        timer = threading.Timer(0.3, after) if after else None
        with StopSignals() as stop:
            if timer is not None:
                timer.start()
            started = time.monotonic()
            try:
                use(attachment, stop=stop, out=self.out, err=self.err, prompt=prompt, on_ready=self.ready.append)
            except (RuntimeFailedError, InterruptedLaunchError) as error:
                self.error = error
            self.seconds = time.monotonic() - started
        if timer is not None:
            timer.join()


def interrupt() -> None:
    os.kill(os.getpid(), signal.SIGINT)


def test_asked_in_its_own_words() -> None:
    attachment = Speaking(echo)
    used = Used(attachment, "one two")
    assert used.error is None
    assert used.out.getvalue() == "onetwo\n"
    assert attachment.asked == ["begin", "end"]
    assert len(used.ready) == 1


def test_what_is_told_is_shown_and_what_stays_once() -> None:
    def begin() -> Talk:
        yield Told(text="first stage")
        yield Told(text="warning: careful", stays=True)
        yield Told(text="second stage", done=1, total=2)
        yield Told(text="warning: careful", stays=True)

    used = Used(Speaking(echo, begin), "x")
    said = used.err.getvalue()
    assert said.count("  warning: careful\n") == 1
    assert said.index("first stage") < said.index("warning") < said.index("second stage")


def test_a_begin_that_fails_is_given_back() -> None:
    attachment = Attachment(failing("loading", "it does not load"))
    used = Used(attachment)
    assert str(used.error) == "it does not load"
    assert attachment.asked == ["begin", "end"]
    assert used.ready == []


def test_an_end_that_fails_does_not_hide_why() -> None:
    used = Used(Attachment(failing("first"), end=failing("second")))
    assert str(used.error) == "first"
    assert "warning: second" in used.err.getvalue()


def test_a_stop_while_it_begins_is_heard_at_once() -> None:
    def begin() -> Talk:
        yield Pause(seconds=30)

    attachment = Attachment(begin)
    used = Used(attachment, after=interrupt)
    assert isinstance(used.error, InterruptedLaunchError)
    assert used.seconds < 3
    assert attachment.asked == ["begin", "end"]
    assert "giving it back" in used.err.getvalue()


def test_a_second_stop_ends_the_end() -> None:
    def end() -> Talk:
        yield Pause(seconds=30)

    def twice() -> None:
        interrupt()
        time.sleep(0.5)
        interrupt()

    used = Used(Attachment(end=end), after=twice)
    assert isinstance(used.error, InterruptedLaunchError)
    assert used.seconds < 5
    assert "it was not given back" in used.err.getvalue()


def test_an_end_has_its_time(monkeypatch: pytest.MonkeyPatch) -> None:
    def end() -> Talk:
        while True:
            yield Pause(seconds=0.01)

    monkeypatch.setattr(attach, "_END_S", 0.3)
    used = Used(Speaking(echo, nothing), "x")
    assert used.error is None
    attachment = Speaking(echo)
    attachment._talks["end"] = end
    used = Used(attachment, "x")
    assert used.error is None
    assert "it was not given back" in used.err.getvalue()


def test_one_check_that_fails_is_not_yet_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attach, "CHECK_S", 0.02)
    monkeypatch.setattr(attach, "_AGAIN_S", 0.02)
    checks: list[int] = []

    def check() -> Talk:
        checks.append(1)
        if len(checks) == 2 or len(checks) > 4:
            raise RuntimeFailedError(f"gone at {len(checks)}")
        yield Told(text="fine")

    attachment = Attachment(check=check)
    used = Used(attachment)
    assert str(used.error) == "gone at 6"
    assert attachment.asked == ["begin", *["check"] * 6, "end"]


def test_files_and_disks_are_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_bytes(b"abc")
    monkeypatch.setenv("SOMEWHERE", str(tmp_path))
    answers: list[Answer | None] = []

    def begin() -> Talk:
        answers.append((yield Digest(path=str(tmp_path / "file"))))
        answers.append((yield Digest(path=str(tmp_path / "none"))))
        answers.append((yield Space(directories=("$NOT_SET_AT_ALL/x", str(tmp_path / "none"), "$SOMEWHERE"))))
        answers.append((yield Space(directories=("/none",))))
        answers.append((yield Call(method="GET", url="http://127.0.0.1:9/")))
        answers.append((yield Told(text="x")))

    Used(Speaking(echo, begin), "x")
    digest, none, space, nowhere, refused, told = answers
    assert digest is not None
    assert digest.body == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert none is not None
    assert (none.status, none.body) == (0, "no such file or directory")
    assert space is not None
    assert space.body > 0
    assert nowhere is not None
    assert nowhere.body is None
    assert refused is not None
    assert refused.status == 0
    assert told is None


def test_a_digest_is_reckoned_once(tmp_path: Path) -> None:
    path, cache = tmp_path / "file", tmp_path / "digests.json"
    path.write_bytes(b"a" * (9 << 20))
    read: list[int] = []

    def told(done: int, total: int) -> bool:
        read.append(done)
        return True

    first = sha256(path, told=told, cache=cache)
    assert read == [4 << 20, 8 << 20, 9 << 20]
    assert sha256(path, told=told, cache=cache) == first
    assert len(read) == 3
    path.write_bytes(b"b" * (9 << 20))
    assert sha256(path, told=told, cache=cache) != first
    cache.write_text("{", encoding="utf-8")
    assert sha256(path, told=told, cache=cache) != first


def test_a_reader_that_goes_away_ends_it(monkeypatch: pytest.MonkeyPatch) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    attachment = Speaking(echo)
    with os.fdopen(writer, "w", encoding="utf-8") as out, StopSignals() as stop:
        use(attachment, stop=stop, out=out, err=io.StringIO(), prompt="one two three")
    assert attachment.asked == ["begin", "end"]
