"""HTTP as it comes over the wire, to each of mgpu's clients: head, body and chunks are the input's."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import closing, contextmanager
from typing import Any, Final

import urllib3.util.connection

from fuzz.target import Target, check_line
from gguf_writer import small_llama
from mgpu.adapter import Command
from mgpu.errors import BadModelError, RuntimeFailedError
from mgpu.inspect import remote
from mgpu.launch import measure
from mgpu.launch.client import Client
from mgpu.launch.http import Caller
from mgpu.service import Call

_MOST: Final = 100_000  # what a socket pair holds before anybody reads


class _Near(socket.socket):
    """Our end of a pair; TCP's options are none of its."""

    def setsockopt(self, *_: Any) -> None:
        return


@contextmanager
def _answering(data: bytes) -> Iterator[None]:
    """Whoever connects, gets these bytes and the end."""
    ours: list[socket.socket] = []

    def connect(*_: Any, **__: Any) -> socket.socket:
        paired, far = socket.socketpair()
        near = _Near(fileno=paired.detach())
        ours.append(far)
        far.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
        far.setblocking(False)
        far.send(data[:_MOST])
        far.shutdown(socket.SHUT_WR)
        return near

    plain, pooled = socket.create_connection, urllib3.util.connection.create_connection
    socket.create_connection = connect
    urllib3.util.connection.create_connection = connect
    try:
        yield
    finally:
        socket.create_connection, urllib3.util.connection.create_connection = plain, pooled
        for one in ours:
            one.close()


_COMMAND: Final = Command(
    argv=("x",), env={}, scrub=(), files={}, ready_url="http://127.0.0.1:1/health", endpoint="http://127.0.0.1:1/v1"
)


def _client(data: bytes) -> None:
    client = Client(_COMMAND, None)
    with _answering(data):
        client.is_up()
        client.generate_one()
        for piece in client.answer("Hello"):
            assert piece.text


def _timed(data: bytes) -> None:
    with _answering(data):
        list(measure._Timer(_COMMAND).timings([measure.Load(n_prompt=8, n_gen=4, repetitions=1, n_vocab=32)]))


def _caller(data: bytes) -> None:
    with _answering(data), closing(Caller()) as caller:
        for stream in (False, True):
            answer = caller.ask(Call(method="GET", url="http://127.0.0.1:1/x", stream=stream))
            for _ in range(50):
                if answer.status == 0:
                    check_line(str(answer.body))
                if answer.end:
                    break
                answer = caller.more()


def _remote(data: bytes) -> None:
    with _answering(data):
        remote.read_header("http://example.org/m.gguf")


_EVENTS: Final = b'data: {"choices": [{"delta": {"content": "a"}}]}\n\ndata: [DONE]\n\n'
_JSON: Final = b'{"content": "a", "tokens_predicted": 1, "timings": {"predicted_n": 4, "predicted_ms": 12.5}}'


def _plain(body: bytes, kind: bytes = b"application/json", status: bytes = b"200 OK") -> bytes:
    return b"HTTP/1.1 %s\r\nContent-Type: %s\r\nContent-Length: %d\r\n\r\n" % (status, kind, len(body)) + body


def _chunked(body: bytes, kind: bytes) -> bytes:
    head = b"HTTP/1.1 200 OK\r\nContent-Type: %s\r\nTransfer-Encoding: chunked\r\n\r\n" % kind
    return head + b"%x\r\n" % len(body) + body + b"\r\n0\r\n\r\n"


def _wire_seeds() -> Iterator[bytes]:
    yield _plain(_JSON)
    yield _plain(_EVENTS, b"text/event-stream")
    yield _chunked(_EVENTS, b"text/event-stream")
    yield _chunked(b'{"a": 1}\n{"b": 2}\n', b"application/x-ndjson")
    yield _plain(b"no", status=b"404 Not Found")
    yield b"HTTP/1.1 302 Found\r\nLocation: file:///etc/passwd\r\nContent-Length: 0\r\n\r\n"
    yield b"HTTP/1.0 200\r\n\r\n" + _JSON
    yield b"HTTP/1.1 100 Continue\r\n\r\n" * 3 + _plain(_JSON)


def _remote_seeds() -> Iterator[bytes]:
    model = small_llama()[:3000]
    yield b"HTTP/1.1 206 Partial\r\nContent-Range: bytes 0-%d/%d\r\nContent-Length: %d\r\n\r\n" % (
        len(model) - 1, len(small_llama()), len(model)) + model  # fmt: skip
    yield _plain(model, b"application/octet-stream")
    yield from _wire_seeds()


_HEADS: Final = (
    b"\r\n",
    b"\r\n\r\n",
    b"HTTP/1.1 200 OK\r\n",
    b"HTTP/1.1 100 Continue\r\n\r\n",
    b"Content-Length: ",
    b"Transfer-Encoding: chunked\r\n",
    b"Content-Encoding: gzip\r\n",
    b"Location: ",
    b"Content-Range: bytes 0-",
    b"ffffffffffffffff\r\n",
    b"-1\r\n",
    b"0\r\n\r\n",
    b"206",
    b"416",
    b"503",
    b"data: ",
    b"x: y\r\n" * 200,
    b"Content-Type: text/event-stream\r\n",
    b"Content-Type: text/html; charset=\x00\r\n",
    b"Location: //\r\n",
    b"302 Found",
    b"file:///",
    b"http://[::1",
    b"HTTP/9.9 ",
    b"1\r\na\r\n" * 500,
)

TARGETS: Final = (
    Target(
        name="http-client",
        check=_client,
        refuses=(RuntimeFailedError,),
        seeds=_wire_seeds,
        tokens=_HEADS,
        weight=0.2,
        batch=500,
    ),
    Target(
        name="http-measure",
        check=_timed,
        refuses=(RuntimeFailedError,),
        seeds=_wire_seeds,
        tokens=_HEADS,
        weight=0.1,
        batch=500,
    ),
    Target(name="http-service", check=_caller, seeds=_wire_seeds, tokens=_HEADS, weight=0.2, batch=500),
    Target(
        name="http-remote",
        check=_remote,
        refuses=(BadModelError,),
        seeds=_remote_seeds,
        tokens=_HEADS,
        weight=0.1,
        batch=300,
    ),
)
