"""A streamed answer: the server-sent events of OpenAI's (chat) completions, or of llama.cpp's /completion."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import msgspec
from msgspec import Struct

from mgpu.errors import UNREADABLE, RuntimeFailedError


class LostError(RuntimeFailedError):
    """The connection broke: the process behind it has died, or is about to."""


class Piece(Struct, frozen=True, kw_only=True):
    """A few characters of the answer, or of the reasoning before it."""

    text: str
    reasoning: bool = False


class _Delta(Struct, frozen=True):
    content: str | None = None
    reasoning_content: str | None = None  # llama.cpp tools/server/README.md, --reasoning-format
    reasoning: str | None = None  # Ollama's (openai/openai.go) and newer vLLM's name for it


class _Choice(Struct, frozen=True):
    delta: _Delta = _Delta()
    text: str | None = None  # OpenAI's older /v1/completions


class _Error(Struct, frozen=True):
    message: str = ""


class _Event(Struct, frozen=True):
    choices: tuple[_Choice, ...] = ()
    content: str | None = None  # /completion
    error: _Error | str | None = None


def read_pieces(lines: Iterable[bytes]) -> Iterator[Piece]:
    """The non-empty pieces in the lines of an event stream. Raises `RuntimeFailedError` for an error event."""
    for line in lines:
        field, _, data = line.partition(b":")
        data = data.strip()
        if field == b"error":  # llama.cpp sends errors in a field of their own
            raise RuntimeFailedError(f"broke off the answer: {error_message(data)}")
        if field != b"data" or data == b"[DONE]":
            continue
        yield from _pieces_of(data)


def error_message(body: bytes) -> str:
    """The message in an error object of either API; the body itself (at most 300 characters) when it is none."""
    try:
        error = msgspec.json.decode(body, type=_Event).error
    except UNREADABLE:
        error = None
    if error is None:
        try:
            error = msgspec.json.decode(body, type=_Error)
        except UNREADABLE:
            error = None
    message = error.message if isinstance(error, _Error) else error
    return (message or body.decode("utf-8", "replace").strip() or "no message")[:300]


def _pieces_of(data: bytes) -> Iterator[Piece]:
    try:
        event = msgspec.json.decode(data)
    except UNREADABLE as error:
        raise RuntimeFailedError(f"sent something that is no answer: {data[:80]!r}") from error
    yield from read_event(event)


def read_event(data: object) -> Iterator[Piece]:
    """The non-empty pieces in one decoded event. Raises `RuntimeFailedError` as `read_pieces` does."""
    try:
        event = msgspec.convert(data, type=_Event)
    except msgspec.ValidationError as error:
        raise RuntimeFailedError(f"sent something that is no answer: {str(data)[:80]!r}") from error
    if event.error is not None:
        raise RuntimeFailedError(f"broke off the answer: {error_message(msgspec.json.encode(data))}")
    if event.content:
        yield Piece(text=event.content)
    for choice in event.choices:
        if choice.text:
            yield Piece(text=choice.text)
        if thought := choice.delta.reasoning_content or choice.delta.reasoning:
            yield Piece(text=thought, reasoning=True)
        if choice.delta.content:
            yield Piece(text=choice.delta.content)
