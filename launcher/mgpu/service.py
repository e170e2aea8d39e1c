"""What mgpu and a service that runs by itself say to each other: a conversation as types, without I/O.

A runtime that people leave running (Ollama, Exo, mycoSwarm) is attached to, not started: its adapter's `Talk` yields
what to ask, and `launch` holds the other end.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping
from typing import Any, Final, Literal, Protocol, runtime_checkable

from msgspec import Struct


class Call(Struct, frozen=True, kw_only=True):
    """One HTTP request to a service that is already running. `body` goes as JSON; `upload` is a file sent as it is.

    `stream`: the answer is a JSON object a line (NDJSON), or server-sent events; each comes as an `Answer` of its own.
    """

    method: Literal["GET", "HEAD", "POST", "DELETE"]
    url: str
    body: Mapping[str, Any] | None = None
    upload: str | None = None
    headers: Mapping[str, str] = {}
    timeout_s: float = 30.0
    stream: bool = False


class More(Struct, frozen=True, kw_only=True):
    """Asks for the next object of the stream that the last `Call` opened."""


class Digest(Struct, frozen=True, kw_only=True):
    """Asks for the sha256 of a file on this machine: the answer's `body` is 64 hex digits."""

    path: str


class Space(Struct, frozen=True, kw_only=True):
    """Asks how many bytes are free where the first of these directories is that exists: `body`, or None.

    `~` and `$NAME` stand for the person's own.
    """

    directories: tuple[str, ...]


class Told(Struct, frozen=True, kw_only=True):
    """Something to show while a service works: a stage, and how far it is where that is known (`total` 0: unknown).

    `stays`: a line to keep, like a warning; said once, however often it is told.
    """

    text: str
    done: int = 0
    total: int = 0
    stays: bool = False


class Pause(Struct, frozen=True, kw_only=True):
    """Waits before it asks again. A talk counts its pauses where it must give up: it has no clock."""

    seconds: float


class Said(Struct, frozen=True, kw_only=True):
    """A piece of the answer to a person's question, for stdout."""

    text: str


class Answer(Struct, frozen=True, kw_only=True):
    """What came back: `body` is the decoded JSON, or the text where it is none. `end`: the stream has no more.

    `status` 0: nobody answered; `body` says why.
    """

    status: int
    body: Any = None
    end: bool = True


#: A conversation with a service, without I/O: yields what to ask or to show, is sent the answer to each `Call` and
#: `More`, `Digest` and `Space` (None after anything else), and raises an `MgpuError` for what went wrong.
#: `mgpu.launch.attach` holds the other end.
Talk = Generator[Call | More | Digest | Space | Told | Pause | Said, "Answer | None", None]


class Service(Struct, frozen=True, kw_only=True):
    """A runtime that people leave running: where it listens unless `variable` says otherwise, and how to ask for it.

    `probe` is asked of the base URL with GET; the adapter's `installed` finds the answer in `Probe.outputs` by path.
    `token_header` is sent with what `token_file` holds, where there is one; `installed` finds that as
    `Probe.outputs[TOKEN]`.
    """

    variable: str
    url: str  # "http://127.0.0.1:11434"
    probe: tuple[str, ...]  # paths: "/api/version"
    start: str = ""  # how to start it, for whoever finds it not running
    token_file: str = ""  # "~/.config/mycoswarm/swarm-token"
    token_header: str = ""


#: Where `Probe.outputs` has what a service's token file holds.
TOKEN: Final = "token"  # noqa: S105 - a key, and no secret


class Attachment(Protocol):
    """A model made ready on a service that runs by itself, used, and given back. Three talks; immutable."""

    @property
    def endpoint(self) -> str:
        """The base URL for OpenAI-compatible clients, once it has begun."""
        ...

    @property
    def model_name(self) -> str:
        """What clients call the model."""
        ...

    def begin(self) -> Talk:
        """Up to a model that answers: proven by a token."""
        ...

    def check(self) -> Talk:
        """Asked now and then while it is used: raises when the service or the model has gone."""
        ...

    def end(self) -> Talk:
        """Gives back what `begin` took, as far as it got; asked also after a failed `begin`."""
        ...


@runtime_checkable
class Undone(Protocol):
    """An attachment that others can give back where whoever began it was killed: by plain requests, in this order."""

    @property
    def undo(self) -> tuple[Call, ...]:
        """What there is to give back by now; asked before `begin` and once it is ready."""
        ...


@runtime_checkable
class Asked(Protocol):
    """An attachment whose service speaks no OpenAI API: it is asked in its own words."""

    def answer(self, prompt: str) -> Talk:
        """The answer to `prompt`, as `Said` pieces."""
        ...
