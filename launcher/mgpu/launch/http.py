"""The HTTP side of a talk with a service: JSON, NDJSON and server-sent events, bounded in size and time.

With http.client, as `mgpu.launch.client`: a stop must break off what another thread waits for, which takes the socket.
Redirects are not followed and proxies not asked: a service is where its address says, or it is not there.
"""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import suppress
from http.client import HTTPConnection, HTTPException, IncompleteRead
from pathlib import Path
from typing import Any, Final
from urllib.parse import SplitResult, urlsplit

import msgspec

from mgpu.errors import UNREADABLE
from mgpu.launch.wire import Answering, read_lines, read_whole, receive
from mgpu.service import Answer, Call

MAX_BODY: Final = 32 << 20  # bytes of an answer
MAX_LINE: Final = 4 << 20  # bytes of one object of a stream

_BLOCK: Final = 1 << 20
_CONNECT_S: Final = 10.0
_SHOWN: Final = 200


class Caller:
    """Makes the calls of one talk, one at a time; `abort` may be called from any other thread.

    Nothing here raises: who could not be asked, or broke off, is an `Answer` with status 0 that says why.
    """

    def __init__(self) -> None:
        self.aborted = threading.Event()
        self.sent, self.to_send = 0, 0  # bytes of the file on its way up; read by other threads
        self._connection: HTTPConnection | None = None
        self._socket: socket.socket | None = None
        self._objects: Iterator[Any] | None = None
        self._status = 0

    def abort(self) -> None:
        """Break off the request under way, if any, and all later ones."""
        self.aborted.set()
        if self._socket is not None:
            with suppress(OSError):  # closed meanwhile
                self._socket.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """End the stream that is open, if any."""
        self._objects = None
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def ask(self, call: Call) -> Answer:
        """The whole answer; of a stream with status 200, its first object."""
        self.close()
        try:
            response = self._send(call)
            self._status = response.status
            if response.status // 100 == 3:
                return _nothing(f"redirects to {_shown(response.headers.get('Location', ''))}, which is not followed")
            if call.stream and response.status == 200:
                response.unhurry()
                self._objects = _objects(response)
                return self.more()
            body = _decoded(read_whole(response, MAX_BODY))
        except (OSError, HTTPException, ValueError) as error:
            self.close()
            return _nothing(_words(error, call.timeout_s))
        self.close()
        return Answer(status=self._status, body=body)

    def more(self) -> Answer:
        """The next object of the stream; with `end` and no body when it is over."""
        if self._objects is None:
            return Answer(status=self._status)
        try:
            return Answer(status=self._status, body=next(self._objects), end=False)
        except StopIteration:
            self.close()
            return Answer(status=self._status)
        except (OSError, HTTPException, ValueError) as error:
            self.close()
            return _nothing(f"broke off: {_words(error, None)}")

    def _send(self, call: Call) -> Answering:
        """The head of the answer. Raises OSError, HTTPException or ValueError."""
        parts = urlsplit(call.url)
        connection = self._connection = _connection(parts)
        connection.connect()
        self._socket = connection.sock  # `connection` forgets it as soon as the answer begins
        self._socket.settimeout(call.timeout_s)
        if self.aborted.is_set():
            raise ConnectionAbortedError("given up")
        path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        headers = {"Connection": "close", "Accept": "*/*", **call.headers}
        if call.upload is not None:
            self._upload(connection, call.method, path, call.upload, headers)
        elif call.body is not None:
            data = msgspec.json.encode(call.body)
            connection.request(call.method, path, data, headers | {"Content-Type": "application/json"})
        else:
            connection.request(call.method, path, None, headers)
        return receive(connection, call.timeout_s)

    def _upload(self, connection: HTTPConnection, method: str, path: str, file: str, headers: dict[str, str]) -> None:
        with Path(file).open("rb") as source:
            self.sent, self.to_send = 0, source.seek(0, 2)
            source.seek(0)
            connection.putrequest(method, path)
            for name, value in headers.items():
                connection.putheader(name, value)
            connection.putheader("Content-Type", "application/octet-stream")
            connection.putheader("Content-Length", str(self.to_send))
            connection.endheaders()
            left = self.to_send  # a file that grows meanwhile must not spoil the request
            with suppress(BrokenPipeError, ConnectionResetError):  # it has answered before the end: its answer says why
                while left and (block := source.read(min(_BLOCK, left))):
                    connection.send(block)
                    left -= len(block)
                    self.sent = self.to_send - left
        self.sent = self.to_send = 0


def _connection(parts: SplitResult) -> HTTPConnection:
    """Raises ValueError for what is no address of a web service."""
    if parts.scheme not in {"http", "https"} or not parts.hostname:
        raise ValueError(f"{_shown(parts.geturl())} is not an http(s) address")
    if parts.scheme == "http":
        return HTTPConnection(parts.hostname, parts.port, timeout=_CONNECT_S)
    from http.client import HTTPSConnection  # with ssl, 20 ms: for services on other machines only

    return HTTPSConnection(parts.hostname, parts.port, timeout=_CONNECT_S)


def _objects(response: Answering) -> Iterator[Any]:
    """The JSON objects of an NDJSON or event stream; text where one is none. `[DONE]` ends it (OpenAI's APIs)."""
    events = response.headers.get_content_type() == "text/event-stream"
    for line in read_lines(response, MAX_LINE):
        data = line.strip()
        if events:
            field, _, data = data.partition(b":")
            data = data.strip()
            if field not in {b"data", b"error"}:  # names, numbers, comments; llama.cpp has a field for errors
                continue
            if data == b"[DONE]":
                return
        if data:
            yield _decoded(data)


def _decoded(text: bytes) -> Any:
    if not text:
        return None
    try:
        return msgspec.json.decode(text)
    except UNREADABLE:
        return text.decode("utf-8", "replace")


def _nothing(why: str) -> Answer:
    return Answer(status=0, body=why)


def _words(error: Exception, timeout_s: float | None) -> str:
    if isinstance(error, TimeoutError):
        return "no answer" if timeout_s is None else f"no answer within {timeout_s:.0f} s"
    if isinstance(error, ConnectionRefusedError):
        return "connection refused"
    if isinstance(error, IncompleteRead):
        return "connection lost"
    if isinstance(error, OSError):
        return (error.strerror or str(error) or "connection lost").lower()
    return _shown(str(error)) or "connection lost"


def _shown(text: str) -> str:
    text = text if text.isprintable() else ascii(text)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"
