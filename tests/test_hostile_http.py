"""Real sockets, and whoever is at the other end: huge, endless, slow, broken. Each ends in a line, in little memory."""

from __future__ import annotations

import gzip
import socket
import struct
import threading
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from typing import Final

import pytest

from fuzz.target import check_line, check_said
from gguf_writer import small_llama
from mgpu.adapter import Command
from mgpu.errors import BadModelError, MgpuError, RuntimeFailedError
from mgpu.inspect import remote
from mgpu.inspect.source import read_model
from mgpu.launch import client as client_module
from mgpu.launch import http as http_module
from mgpu.launch import measure
from mgpu.launch.client import Client
from mgpu.launch.http import Caller
from mgpu.launch.services import find_service
from mgpu.service import Call, Service

#: Bytes that may be held at once, whatever is sent: the largest body that is read, twice.
MOST_MEMORY: Final = 80 << 20
#: Seconds in which all of it must be over: for a test that hangs, not a bound of the code's.
PATIENCE_S: Final = 60

Behave = Callable[[socket.socket], None]
OK: Final = b"HTTP/1.1 200 OK\r\n"
ZEROS: Final = bytes(1 << 16)


@contextmanager
def serving(behave: Behave) -> Iterator[int]:
    """A server on loopback that does this with each connection; its port."""
    over = threading.Event()
    accepted: list[socket.socket] = []

    def talk(connection: socket.socket) -> None:
        connection.settimeout(PATIENCE_S)
        with connection, suppress(OSError):
            if connection.recv(1 << 16):
                behave(connection)
                connection.shutdown(socket.SHUT_WR)
                while connection.recv(1 << 16):  # else what was not read turns the end into a reset
                    pass

    def accept() -> None:
        with suppress(OSError):
            while not over.is_set():
                connection, _ = listener.accept()
                accepted.append(connection)
                threading.Thread(target=talk, args=(connection,), daemon=True).start()

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=accept, daemon=True)
        thread.start()
        yield listener.getsockname()[1]
        over.set()
        with suppress(OSError), socket.create_connection(listener.getsockname()):
            pass
        thread.join(PATIENCE_S)
    for connection in accepted:
        with suppress(OSError):  # whoever still talks, or still listens, is to end now
            connection.shutdown(socket.SHUT_RDWR)


def sends(*pieces: bytes) -> Behave:
    return lambda connection: connection.sendall(b"".join(pieces))


def says_nothing(head: bytes = b"") -> Behave:
    """After this, until the other end has gone."""

    def behave(connection: socket.socket) -> None:
        connection.sendall(head)
        while connection.recv(1 << 16):  # the request's body may come after its head
            pass

    return behave


def endless(piece: bytes, head: bytes = b"") -> Behave:
    """Until the other end has had enough."""

    def behave(connection: socket.socket) -> None:
        connection.sendall(head)
        while True:
            connection.sendall(piece)

    return behave


def drips(text: bytes, head: bytes = b"") -> Behave:
    """A byte every 50 ms, for ever."""

    def behave(connection: socket.socket) -> None:
        connection.sendall(head)
        wait = threading.Event()
        while True:
            for byte in text:
                connection.sendall(bytes([byte]))
                wait.wait(0.05)

    return behave


def resets(connection: socket.socket) -> None:
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()


CHUNKED: Final = OK + b"Transfer-Encoding: chunked\r\n"
EVENTS: Final = b"Content-Type: text/event-stream\r\n\r\n"

#: What none of them may take for an answer.
BEHAVIOURS: Final[dict[str, Behave]] = {
    "says nothing": says_nothing(),
    "closes at once": sends(),
    "resets": resets,
    "drips a status line": drips(b"H"),
    "drips a header": drips(b"a", OK + b"X-A: "),
    "drips a body": drips(b" ", OK + b"Content-Length: 1000000\r\n\r\n"),
    "drips chunks": drips(b"1\r\n \r\n", CHUNKED + b"\r\n"),
    "drips continues": drips(b"HTTP/1.1 100 Continue\r\n\r\n"),
    "continues without end": endless(b"HTTP/1.1 100 Continue\r\n\r\n" * 1000),
    "a header line without end": endless(ZEROS, OK + b"X-A: "),
    "headers without end": endless(b"X-A: b\r\n" * 1000, OK),
    "a status line without end": endless(b"A" * 60000),
    "a body without end": endless(ZEROS, OK + b"\r\n"),
    "a body of a petabyte": endless(ZEROS, OK + b"Content-Length: 1125899906842624\r\n\r\n"),
    "chunks without end": endless(b"ffff\r\n" + bytes(0xFFFF) + b"\r\n", CHUNKED + b"\r\n"),
    "chunks of one byte": endless(b"1\r\n \r\n" * 2000, CHUNKED + b"\r\n"),
    "a chunk size without end": endless(b"f" * 60000, CHUNKED + b"\r\n"),
    "chunks that are none": sends(CHUNKED + b"\r\nxyzzy\r\n" + ZEROS),
    "a chunk of a negative size": sends(CHUNKED + b"\r\n-5\r\nhello\r\n0\r\n\r\n"),
    "less than it said": sends(OK + b"Content-Length: 500\r\n\r\n{"),
    "a length that is none": sends(OK + b"Content-Length: many\r\n\r\n{"),
    "a negative length": sends(OK + b"Content-Length: -1\r\n\r\n{"),
    "a length beyond everything": sends(OK + b"Content-Length: " + b"9" * 5000 + b"\r\n\r\n{"),
    "NUL bytes": sends(b"\0" * 5000),
    "something else": sends(b"SSH-2.0-OpenSSH_9.6\r\n"),
    "a bomb": sends(OK + b"Content-Encoding: gzip\r\n\r\n" + gzip.compress(bytes(64 << 20))),
    "brackets without end": sends(OK + b"\r\n" + b"[" * 100_000),
    "bytes that are no text": sends(OK + b"\r\n" + b'{"content": "\xff\xfe"}'),
    "escape sequences": sends(b"HTTP/1.1 500 \x1b[2J\r\nContent-Type: text/plain\r\n\r\n\x1b]0;x\x07no\r\n"),
    "redirects without end": sends(b"HTTP/1.1 302 Found\r\nLocation: /again\r\nContent-Length: 0\r\n\r\n"),
    "to a file": sends(b"HTTP/1.1 302 Found\r\nLocation: file:///etc/passwd\r\nContent-Length: 0\r\n\r\n"),
    "to ftp": sends(b"HTTP/1.1 301 Moved\r\nLocation: ftp://127.0.0.1/x\r\nContent-Length: 0\r\n\r\n"),
    "to nowhere": sends(b"HTTP/1.1 307 Moved\r\nLocation: http://[::1\r\nContent-Length: 0\r\n\r\n"),
    "to a control character": sends(b"HTTP/1.1 307 Moved\r\nLocation: http://a\x1b[2Jb/\r\nContent-Length: 0\r\n\r\n"),
}


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "DEADLINE", 0.5)
    monkeypatch.setattr(remote, "_GRACE", 0.3)
    monkeypatch.setattr(remote, "_TIMEOUTS", (0.5, 0.5))
    for name in ("_HEALTH_TIMEOUT_S", "_TOKEN_TIMEOUT_S"):
        monkeypatch.setattr(client_module, name, 0.5)
    monkeypatch.setattr(measure, "_ANSWER_S", 0.5)
    for module in (client_module, http_module):
        monkeypatch.setattr(module, "MAX_LINE", 1 << 18)


@pytest.fixture
def _frugal() -> Iterator[None]:
    """Fails a test that held more than it may."""
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < MOST_MEMORY
    finally:
        tracemalloc.stop()


def command(port: int) -> Command:
    base = f"http://127.0.0.1:{port}"
    return Command(argv=("x",), env={}, scrub=(), files={}, ready_url=f"{base}/health", endpoint=f"{base}/v1")


def said(call: Callable[[], object], kind: type[MgpuError]) -> MgpuError:
    with pytest.raises(kind) as caught:
        call()
    check_said(caught.value)
    return caught.value


@pytest.mark.usefixtures("_frugal")
@pytest.mark.parametrize("name", BEHAVIOURS)
class TestHostile:
    def test_a_model_behind_a_url(self, name: str) -> None:
        with serving(BEHAVIOURS[name]) as port:
            said(lambda: read_model(f"http://127.0.0.1:{port}/m.gguf"), BadModelError)

    def test_a_runtime_that_is_asked_for_a_token(self, name: str) -> None:
        with serving(BEHAVIOURS[name]) as port:
            said(
                lambda: Client(command(port), None).generate_one(timeout_s=0.5) or pytest.fail("a token"),
                RuntimeFailedError,
            )

    def test_a_runtime_that_is_measured(self, name: str) -> None:
        load = measure.Load(n_prompt=8, n_gen=4, repetitions=1, n_vocab=32)
        with serving(BEHAVIOURS[name]) as port:
            said(lambda: list(measure._Timer(command(port)).timings([load])), RuntimeFailedError)

    def test_a_service(self, name: str) -> None:
        """It answers, with something; or it is said why it does not."""
        with serving(BEHAVIOURS[name]) as port, closing(Caller()) as caller:
            answer = caller.ask(Call(method="GET", url=f"http://127.0.0.1:{port}/api/version", timeout_s=0.5))
            if answer.status == 0:
                check_line(str(answer.body))


@pytest.mark.usefixtures("_frugal")
@pytest.mark.parametrize("name", [name for name in BEHAVIOURS if "drips" not in name])
def test_a_runtime_that_is_asked_whether_it_is_up(name: str) -> None:
    with serving(BEHAVIOURS[name]) as port:
        assert Client(command(port), None).is_up() in {True, False}


@pytest.mark.parametrize(
    "name", [name for name in BEHAVIOURS if name.startswith(("drips a s", "drips a h", "drips con"))]
)
def test_a_health_that_drips_is_no_health(name: str) -> None:
    with serving(BEHAVIOURS[name]) as port:
        assert not Client(command(port), None).is_up()


LINES: Final[dict[str, Behave]] = {
    "a line without end": endless(b"x" * 60000, OK + EVENTS + b"data: "),
    "a line in tiny chunks": endless(b"3\r\nxyz\r\n" * 9000, CHUNKED + EVENTS + b"6\r\ndata: \r\n"),
    "an event of brackets": sends(OK + EVENTS + b"data: " + b"[" * 100_000 + b"\n\n"),
    "an event that is no text": sends(OK + EVENTS + b"data: \xff\xfe\n\n"),
    "half an event": sends(OK + b"Content-Length: 500\r\n" + EVENTS + b'data: {"content": "a"}\n'),
    "an error with escapes": sends(OK + EVENTS + b'error: {"message": "a\\u001b[2J\\nb"}\n\n'),
    "says nothing more": says_nothing(OK + EVENTS),
}


@pytest.mark.usefixtures("_frugal")
@pytest.mark.parametrize("name", LINES)
class TestStreams:
    def test_of_a_runtime(self, name: str) -> None:
        with serving(LINES[name]) as port:
            error = said(lambda: list(Client(command(port), None).answer("Hello")), RuntimeFailedError)
        assert error.exit_code == 7

    def test_of_a_service(self, name: str) -> None:
        with serving(LINES[name]) as port, closing(Caller()) as caller:
            call = Call(method="POST", url=f"http://127.0.0.1:{port}/x", stream=True, timeout_s=0.5)
            answers = [caller.ask(call)]
            while not answers[-1].end and len(answers) < 10:
                answers.append(caller.more())
        assert answers[-1].end
        if answers[-1].status == 0:
            check_line(str(answers[-1].body))


def test_a_stream_of_nothing_can_be_left() -> None:
    """Comments without end are no error: somebody thinks. But Ctrl-C ends it."""
    with serving(endless(b": still here\n\n", OK + EVENTS)) as port:
        client = Client(command(port), None)
        threading.Timer(0.3, client.abort).start()
        with suppress(RuntimeFailedError):  # as the abort finds it
            assert list(client.answer("Hello")) == []
        assert client.aborted.is_set()


def test_a_stream_may_take_longer_than_its_head(monkeypatch: pytest.MonkeyPatch) -> None:
    """A long answer is no slow one: what must not be slow is each piece of it."""

    def behave(connection: socket.socket) -> None:
        connection.sendall(OK + EVENTS)
        for _ in range(8):
            threading.Event().wait(0.1)
            connection.sendall(b'data: {"content": "a"}\n\n')

    monkeypatch.setattr(client_module, "_TOKEN_TIMEOUT_S", 0.5)
    with serving(behave) as port:
        assert "".join(piece.text for piece in Client(command(port), None).answer("Hello")) == "a" * 8


class TestElsewhere:
    """Who answers for a service may not send us to anybody else, nor at all to a file."""

    def test_a_service_is_where_it_is_said_to_be(self) -> None:
        asked: list[bytes] = []

        def other(connection: socket.socket) -> None:
            asked.append(b"")
            connection.sendall(OK + b"Content-Length: 2\r\n\r\n{}")

        with serving(other) as there:
            to = f"HTTP/1.1 302 Found\r\nLocation: http://127.0.0.1:{there}/\r\nContent-Length: 0\r\n\r\n".encode()
            with serving(sends(to)) as port:
                service = Service(variable="X_URL", url=f"http://127.0.0.1:{port}", probe=("/api/version",))
                assert find_service(service, {}) is None
                assert not Client(command(port), None).is_up()
        assert not asked

    def test_a_model_may_be_behind_a_redirect(self) -> None:
        """As on huggingface.co: to http(s), a few times."""
        content = small_llama()
        whole = OK + f"Content-Length: {len(content)}\r\n\r\n".encode() + content
        with serving(sends(whole)) as there:
            to = f"HTTP/1.1 302 Found\r\nLocation: http://127.0.0.1:{there}/x\r\nContent-Length: 0\r\n\r\n".encode()
            with serving(sends(to)) as port:
                assert read_model(f"http://127.0.0.1:{port}/m.gguf").architecture == "llama"

    @pytest.mark.parametrize("scheme", ["file", "ftp", "gopher", "data", "FILE", "javascript"])
    def test_nothing_but_http(self, scheme: str) -> None:
        location = f"HTTP/1.1 302 Found\r\nLocation: {scheme}:///etc/passwd\r\nContent-Length: 0\r\n\r\n".encode()
        with serving(sends(location)) as port:
            error = said(lambda: read_model(f"http://127.0.0.1:{port}/m.gguf"), BadModelError)
        assert "root:" not in error.message
        said(lambda: read_model(f"{scheme}:///etc/passwd"), BadModelError)

    def test_tls_where_there_is_none(self) -> None:
        with serving(sends(OK + b"\r\n")) as port:
            error = said(lambda: read_model(f"https://127.0.0.1:{port}/m.gguf"), BadModelError)
            with closing(Caller()) as caller:
                answer = caller.ask(Call(method="GET", url=f"https://127.0.0.1:{port}/", timeout_s=0.5))
        assert "TLS" in error.message
        assert answer.status == 0
        check_line(str(answer.body))
