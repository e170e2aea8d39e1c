"""A runtime's HTTP side.

With http.client, not requests: a stop must break off a request that another thread waits for (llama-server does not end
while an answer is being read), which takes the socket; and 50 ms less of import compete with the loading model.
"""

from __future__ import annotations

import json
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from http.client import HTTPConnection, HTTPException
from typing import Any, Final
from urllib.parse import SplitResult, urlsplit

import msgspec
from msgspec import Struct

from mgpu.adapter import Command
from mgpu.errors import UNREADABLE, RuntimeFailedError
from mgpu.launch.stream import LostError, Piece, error_message, read_pieces
from mgpu.launch.wire import Answering, TooMuchError, read_lines, read_whole, receive

_HEALTH_TIMEOUT_S: Final = 5.0  # a request that hangs is asked again
_TOKEN_TIMEOUT_S: Final = 600.0  # a first batch may compile kernels or page a model in
_OK: Final = 200

#: Bytes of an answer, and of one event of a stream: a token takes some hundred.
MAX_BODY: Final = 8 << 20
MAX_LINE: Final = 4 << 20

#: Bounds on `--prompt`: a model may repeat itself for ever, and one without a chat template has no reason to stop.
_ANSWER_TOKENS: Final = 4096
_CONTINUATION_TOKENS: Final = 32

#: Refusals that say nothing about the model: a key given after `--`, a server for embeddings only.
_CANNOT_ASK: Final = frozenset({401, 403, 404, 405, 501})

#: What a proxy says when the replica that it asked has gone.
_LOST_BEHIND: Final = frozenset({502, 504})
_NOT_FOUND: Final = 404


class LateError(RuntimeFailedError):
    """Nothing came in time, on a connection that stands: it may be at work for others."""


class _Usage(Struct, frozen=True):
    completion_tokens: int = 0


class _Completion(Struct, frozen=True):
    """An answer without streaming: llama-server's own, or OpenAI's."""

    content: str = ""
    tokens_predicted: int = 0
    usage: _Usage | None = None
    system_fingerprint: str | None = None


class Client:
    """One runtime as `command` says where it answers. Errors are `RuntimeFailedError`s whose subject is the runtime.

    Used by one thread at a time; `abort` may be called from any other.
    """

    def __init__(self, command: Command, api_key: str | None) -> None:
        self._ready_url = command.ready_url
        self._completion_url = f"{command.ready_url.rpartition('/')[0]}/completion"
        self._open_url = f"{command.endpoint.rstrip('/')}/completions"
        self._chat_url = f"{command.endpoint.rstrip('/')}/chat/completions"
        self._chat = command.chat
        self._fingerprint = command.fingerprint
        self._has_model = command.attachment is None
        self._headers = {"Connection": "close"} | ({"Authorization": f"Bearer {api_key}"} if api_key else {})
        self._socket: socket.socket | None = None
        self.aborted = threading.Event()

    def abort(self) -> None:
        """Break off the request under way, if any, and all later ones."""
        self.aborted.set()
        if self._socket is not None:
            with suppress(OSError):  # closed meanwhile
                self._socket.shutdown(socket.SHUT_RDWR)

    def knock(self, is_ours: Callable[[], bool]) -> Iterator[bool]:
        """Poll until it is up and `is_ours()`, then yield what `generate_one` returns."""
        started = time.monotonic()
        while not (self.is_up() and is_ours() and self.is_up()):  # the first may have been another's that has gone
            if self.aborted.wait(_pause(time.monotonic() - started)):
                return
        yield self.generate_one()

    def is_up(self) -> bool:
        """Whether the ready URL answers 200 now. llama-server: refused, then 503 while loading, then 200."""
        try:
            with self._request("GET", self._ready_url, None, _HEALTH_TIMEOUT_S) as response:
                return response.status == _OK
        except (OSError, HTTPException):
            return False

    def generate_one(self, *, timeout_s: float = _TOKEN_TIMEOUT_S) -> bool:
        """Ask for one token. False when the server says that it cannot be asked; raises when none comes."""
        if not self._has_model:
            return False
        own = {"prompt": "Hello", "n_predict": 1, "cache_prompt": False}
        openai = {"prompt": "Hello", "max_tokens": 1}
        try:
            for url, body in ((self._completion_url, own), (self._open_url, openai)):
                with self._request("POST", url, body, timeout_s) as response:
                    if response.status not in _CANNOT_ASK:
                        _check_token(response.status, read_whole(response, MAX_BODY), self._fingerprint)
                        return True
                    if response.status != _NOT_FOUND:
                        return False
        except (OSError, HTTPException) as error:
            raise _lost(error, "the first token", timeout_s) from error
        return False

    def answer(self, prompt: str) -> Iterator[Piece]:
        """The answer to `prompt` as it comes: through the model's chat template, or without where it has none."""
        chat = {"messages": [{"role": "user", "content": prompt}], "max_tokens": _ANSWER_TOKENS, "stream": True}
        plain = {"prompt": prompt, "n_predict": _CONTINUATION_TOKENS, "stream": True}
        openai = {"prompt": prompt, "max_tokens": _CONTINUATION_TOKENS, "stream": True}
        ways = ((self._chat_url, chat), (self._completion_url, plain), (self._open_url, openai))
        refusal = ""
        try:
            for url, body in ways[0 if self._chat else 1 :]:
                with self._request("POST", url, body, _TOKEN_TIMEOUT_S) as response:
                    if response.status == _OK:
                        response.unhurry()
                        yield from read_pieces(read_lines(response, MAX_LINE))
                        return
                    if response.status in _LOST_BEHIND:
                        raise LostError(f"lost the question (HTTP {response.status})")
                    if response.status != _NOT_FOUND or not refusal:
                        refusal = f"HTTP {response.status}: {error_message(read_whole(response, MAX_BODY))}"
        except (OSError, HTTPException) as error:
            raise _lost(error, "the answer", _TOKEN_TIMEOUT_S) from error
        raise RuntimeFailedError(f"refused the question with {refusal}")

    @contextmanager
    def _request(self, method: str, url: str, body: dict[str, Any] | None, timeout_s: float) -> Iterator[Answering]:
        """The head of the answer; its connection is closed at the end. Raises OSError or HTTPException."""
        parts = urlsplit(url)
        data = None if body is None else json.dumps(body).encode()
        headers = self._headers | ({} if data is None else {"Content-Type": "application/json"})
        with closing(_connection(parts, timeout_s)) as connection:
            connection.connect()
            self._socket = connection.sock  # `connection` forgets it as soon as the answer begins
            if self.aborted.is_set():
                raise ConnectionAbortedError
            connection.request(method, parts.path or "/", data, headers)
            with receive(connection, timeout_s) as response:
                yield response


def _pause(elapsed_s: float) -> float:
    """20 ms at first; later about 1 % of the time gone by, at most 100 ms: never what one waits for."""
    return min(0.02 + elapsed_s / 100, 0.1)


def _connection(parts: SplitResult, timeout_s: float) -> HTTPConnection:
    host = parts.hostname or "127.0.0.1"
    if parts.scheme != "https":
        return HTTPConnection(host, parts.port, timeout=timeout_s)
    import ssl  # 20 ms, for --ssl-cert-file only
    from http.client import HTTPSConnection  # as above

    unverified = ssl.create_default_context()
    unverified.check_hostname = False  # our own child on this machine, whose certificate names its public host
    unverified.verify_mode = ssl.CERT_NONE
    return HTTPSConnection(host, parts.port, timeout=timeout_s, context=unverified)


def _check_token(status: int, body: bytes, fingerprint: str) -> None:
    """Raises `RuntimeFailedError` for an answer without a token, or of a runtime that is not split as planned."""
    if status != _OK:
        raise RuntimeFailedError(f"answered the first request with HTTP {status}: {error_message(body)}")
    try:
        completion = msgspec.json.decode(body, type=_Completion)
    except UNREADABLE as error:
        raise RuntimeFailedError(f"answered the first request with something else than JSON: {body[:80]!r}") from error
    counted = completion.tokens_predicted or (completion.usage is not None and completion.usage.completion_tokens)
    if not (completion.content or counted):
        raise RuntimeFailedError("answered the first request without a token")
    told = completion.system_fingerprint
    if fingerprint and told and re.search(fingerprint, told) is None:
        raise RuntimeFailedError(f"does not run as planned: it answers as {told!r}")


def _lost(error: OSError | HTTPException, what: str, timeout_s: float) -> RuntimeFailedError:
    if isinstance(error, TimeoutError):
        return LateError(f"sent nothing of {what} for {timeout_s:.0f} s")
    if isinstance(error, TooMuchError):
        return RuntimeFailedError(f"{error} in place of {what}")
    return LostError(f"broke off {what}")
