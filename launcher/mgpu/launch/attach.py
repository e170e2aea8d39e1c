"""A model on a service that runs by itself: made ready, used, given back. This end of an adapter's talks does the I/O.

`use` is the whole of it. Talks run in a thread of their own, so that a signal is heard at once; whatever happens in
between, `Attachment.end` is asked at the end.
"""

from __future__ import annotations

import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Final, NoReturn, TextIO

from mgpu.errors import InterruptedLaunchError, MgpuError, OutOfMemoryError, RuntimeFailedError
from mgpu.launch.ask import discard, write_text
from mgpu.launch.background import Background
from mgpu.launch.digests import Stopped, sha256
from mgpu.launch.http import Caller
from mgpu.launch.progress import ToldLine, say
from mgpu.launch.signals import StopSignals
from mgpu.launch.stream import read_event
from mgpu.launch.watch import Watch
from mgpu.service import Answer, Asked, Attachment, Call, Digest, More, Pause, Said, Space, Talk, Told

CHECK_S: Final = 5.0  # between two looks at a service in use
_AGAIN_S: Final = 2.0  # from a look that found nothing to the one that counts
_END_S: Final = 30.0  # for giving back
_TICK_S: Final = 0.1
_PATIENCE_S: Final = 0.2  # for a thread whose connection was broken off
_ANSWER_S: Final = 600.0  # between two pieces of an answer
_ANSWER_TOKENS: Final = 4096  # as `mgpu.launch.client`


def attach(
    attachment: Attachment,
    *,
    prompt: str | None,
    stop: StopSignals,
    on_ready: Callable[[float], None],
    tend: Callable[[], float | None],
) -> None:
    """`use` in the foreground of the main thread, with the streams of the process.

    Returns only after a `prompt` was answered; raises as `use` does.
    """
    use(attachment, stop=stop, out=sys.stdout, err=sys.stderr, prompt=prompt, on_ready=on_ready, tend=tend)


def use(  # noqa: PLR0913 - all by keyword, from one call in two places
    attachment: Attachment,
    *,
    stop: StopSignals,
    out: TextIO,
    err: TextIO,
    prompt: str | None = None,
    on_ready: Callable[[float], None] = lambda _: None,
    watch: Watch | None = None,
    tend: Callable[[], float | None] = lambda: None,
    loading: Callable[[], None] = lambda: None,
) -> None:
    """Begin, then answer `prompt` or stay, then end. `on_ready` is told after how many seconds it answered.

    `watch`: the process behind the service, where mgpu has started it; its death ends everything. `tend` is called
    between two looks at the service, `loading` again and again until it is ready.
    Returns after a `prompt` was answered. Raises `InterruptedLaunchError` on a stop signal, what a talk raises, and
    `RuntimeFailedError` when `Attachment.check` has failed twice, or the process has died.
    """
    session = _Session(attachment, stop, out, err, watch)
    started = time.monotonic()
    try:
        session.run(attachment.begin(), loading)
        on_ready(time.monotonic() - started)
        if prompt is None:
            session.stay(tend)
        else:
            session.answer(prompt)
    except InterruptedLaunchError:
        say(err, f"giving {attachment.model_name} back (once more: leave at once)")
        raise
    finally:
        session.end()


class _Session:
    """The talks of one attachment."""

    def __init__(
        self, attachment: Attachment, stop: StopSignals, out: TextIO, err: TextIO, watch: Watch | None
    ) -> None:
        self._attachment = attachment
        self._stop = stop
        self._out = out
        self._err = err
        self._watch = watch
        self._line = ToldLine(err)
        self._kept: set[str] = set()

    def run(self, talk: Talk, meanwhile: Callable[[], None] = lambda: None) -> None:
        """Up to its end. Raises what it raises, and for a stop or the death of the process."""
        with closing(_Turn(talk, self._stop.wake)) as turn:
            try:
                while turn.goes_on():
                    self._show(turn)
                    self._heed()
                    meanwhile()
                    self._stop.wait(_TICK_S)
            except RuntimeFailedError as error:
                raise self._with_log(error) from error
            finally:
                self._line.close()

    def answer(self, prompt: str) -> None:
        """The answer on `out` as it comes, and a newline. A reader that goes away (`| head`) ends it quietly."""
        attachment = self._attachment
        talk = attachment.answer(prompt) if isinstance(attachment, Asked) else _completion(attachment, prompt)
        try:
            self.run(talk)
            write_text(self._out, "\n")
        except BrokenPipeError:
            discard(self._out)

    def stay(self, tend: Callable[[], float | None]) -> NoReturn:
        """Until it is gone, or we are asked to stop: both end in an exception."""
        while True:
            tend()
            self._pause(CHECK_S)
            try:
                self.run(self._attachment.check())
            except RuntimeFailedError:  # perhaps it was just being loaded again
                self._pause(_AGAIN_S)
                self.run(self._attachment.check())

    def end(self) -> None:
        """Give back, as far as there is somebody to give to. Raises nothing; a second stop signal ends it at once."""
        if self._watch is not None and self._watch.child.poll() is not None:
            return
        deadline = time.monotonic() + _END_S
        try:
            with closing(_Turn(self._attachment.end(), self._stop.wake)) as turn:
                while turn.goes_on():
                    self._show(turn)
                    if self._stop.hurried or time.monotonic() > deadline:
                        say(self._err, f"  warning: {self._attachment.model_name} was not given back")
                        return
                    self._stop.wait(_TICK_S)
        except MgpuError as error:
            say(self._err, f"  warning: {error.message}")
        finally:
            self._line.close()

    def _pause(self, seconds: float) -> None:
        """Raises for a stop or a death at once."""
        until = time.monotonic() + seconds
        while (left := until - time.monotonic()) > 0:
            self._heed()
            self._stop.wait(left)
        self._heed()

    def _heed(self) -> None:
        self._stop.check()
        if self._watch is not None:
            self._watch.update()
            if self._watch.child.poll() is not None:
                raise self._watch.death(f"with {self._attachment.model_name} on it")

    def _show(self, turn: _Turn) -> None:
        for event in turn.events():
            if isinstance(event, Said):
                write_text(self._out, event.text)
            elif not event.stays:
                self._line(event)
            elif event.text not in self._kept:
                self._kept.add(event.text)
                self._line.close()
                say(self._err, f"  {event.text}")
        self._line.update(*turn.progress)

    def _with_log(self, error: RuntimeFailedError) -> RuntimeFailedError:
        """Of a process that is ours, the last words."""
        if self._watch is None or error.log_tail:
            return error
        hint = error.hint or f"the whole log: {self._watch.child.log_path}"
        tail = self._watch.failure("").log_tail
        if isinstance(error, OutOfMemoryError):
            return OutOfMemoryError(
                error.message, hint=hint, log_tail=tail, devices=error.devices, wanted_bytes=error.wanted_bytes
            )
        return RuntimeFailedError(error.message, hint=hint, log_tail=tail)


class _Turn:
    """One talk under way in its thread."""

    def __init__(self, talk: Talk, wake: Callable[[], None]) -> None:
        self._caller = Caller()
        self._hashed = (0, 0)
        self._events: list[Told | Said] = []
        self._doing = Background(self._held(talk), wake)

    def goes_on(self) -> bool:
        """Whether there is more to show or to come. Raises what the talk has raised."""
        done = self._doing.done  # read before `take`: nothing comes between the two when it is true
        self._events += self._doing.take()
        return bool(self._events) or not done

    def events(self) -> list[Told | Said]:
        """What came since the last call."""
        events, self._events = self._events, []
        return events

    @property
    def progress(self) -> tuple[int, int]:
        """Bytes done and in all, of the file that is sent or read just now."""
        caller = self._caller
        return (caller.sent, caller.to_send) if caller.to_send else self._hashed

    def close(self) -> None:
        self._caller.abort()
        self._doing.join(_PATIENCE_S)

    def _held(self, talk: Talk) -> Iterator[Told | Said]:
        """Our half: does what it asks for, yields what it says."""
        answer: Answer | None = None
        with closing(talk), closing(self._caller):
            while not self._caller.aborted.is_set():
                try:
                    asked = talk.send(answer)
                except StopIteration:
                    return
                answer = None
                if isinstance(asked, Told | Said):
                    yield asked
                else:
                    answer = self._done(asked)

    def _done(self, asked: Call | More | Digest | Space | Pause) -> Answer | None:
        if isinstance(asked, Call):
            return self._caller.ask(asked)
        if isinstance(asked, More):
            return self._caller.more()
        if isinstance(asked, Digest):
            return self._digest(Path(asked.path))
        if isinstance(asked, Space):
            return Answer(status=200, body=_free_bytes(asked.directories))
        self._caller.aborted.wait(asked.seconds)
        return None

    def _digest(self, path: Path) -> Answer:
        def told(done: int, total: int) -> bool:
            self._hashed = (done, total)
            return not self._caller.aborted.is_set()

        try:
            return Answer(status=200, body=sha256(path, told=told))
        except Stopped:
            return Answer(status=0, body="given up")
        except OSError as error:
            return Answer(status=0, body=str(error.strerror or error).lower())
        finally:
            self._hashed = (0, 0)


def _free_bytes(directories: tuple[str, ...]) -> int | None:
    for name in directories:
        path = os.path.expandvars(Path(name).expanduser())
        if "$" not in str(path) and Path(path).is_dir():
            return shutil.disk_usage(path).free
    return None


def _completion(attachment: Attachment, prompt: str) -> Talk:
    """A chat by OpenAI's API. Reasoning is left out, unless there is nothing else."""
    body = {
        "model": attachment.model_name,
        "messages": [{"role": "user", "content": prompt}],
        "max_tokens": _ANSWER_TOKENS,
        "stream": True,
    }
    url = f"{attachment.endpoint.rstrip('/')}/chat/completions"
    answer = yield Call(method="POST", url=url, body=body, timeout_s=_ANSWER_S, stream=True)
    assert answer is not None  # noqa: S101 - a call is always answered
    answered, reasoning = False, []
    while not answer.end:
        for piece in read_event(answer.body):
            if piece.reasoning:
                reasoning.append(piece.text)
            else:
                answered = True
                yield Said(text=piece.text)
        answer = yield More()
        assert answer is not None  # noqa: S101 - as above
    if answer.status != 200:
        raise RuntimeFailedError(f"{attachment.model_name} does not answer: {_refusal(answer)}")
    if not answered:
        yield Said(text="".join(reasoning))


def _refusal(answer: Answer) -> str:
    body = answer.body.get("error", answer.body) if isinstance(answer.body, dict) else answer.body
    message = body.get("message", body) if isinstance(body, dict) else body
    return f"{f'HTTP {answer.status}: ' if answer.status else ''}{str(message)[:300]}"
