"""The HTTP side of talks, against a server that does what servers should not."""

from __future__ import annotations

import hashlib
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mgpu.errors import UsageError
from mgpu.launch import http
from mgpu.launch.http import Caller
from mgpu.launch.services import find_service, service_url
from mgpu.service import Call, Service
from ollama_server import serving

Speak = Callable[[socket.socket, bytes], None]

SERVICE = Service(variable="SOME_HOST", url="http://127.0.0.1:11434", probe=("/api/version",))


@contextmanager
def speaking(speak: Speak) -> Iterator[str]:
    """A server that reads each request's head and leaves the rest to `speak`."""
    listener = socket.create_server(("127.0.0.1", 0))

    def accept() -> None:
        while True:
            try:
                peer, _ = listener.accept()
            except OSError:
                return
            with peer:
                head = b""
                while b"\r\n\r\n" not in head and (piece := peer.recv(65536)):
                    head += piece
                with suppress(OSError):
                    speak(peer, head)

    thread = threading.Thread(target=accept, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        thread.join(2)


def saying(text: bytes) -> Speak:
    return lambda peer, _: peer.sendall(text)


def get(url: str, *, stream: bool = False, timeout_s: float = 5.0) -> Call:
    return Call(method="GET", url=url, stream=stream, timeout_s=timeout_s)


def plain(body: bytes, kind: str = "application/json", status: str = "200 OK") -> bytes:
    return f"HTTP/1.1 {status}\r\nContent-Type: {kind}\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body


@pytest.mark.parametrize(
    ("text", "status", "body"),
    [
        (plain(b'{"a": [1, 2]}'), 200, {"a": [1, 2]}),
        (plain(b""), 200, None),
        (plain(b"Ollama is running", "text/plain"), 200, "Ollama is running"),
        (plain(b'{"error": "x"}', status="404 Not Found"), 404, {"error": "x"}),
        (plain(b"[" * 100_000), 200, "[" * 100_000),
        (
            b"HTTP/1.1 302 Found\r\nLocation: file:///etc/passwd\r\n\r\n",
            0,
            "redirects to file:///etc/passwd, which is not",
        ),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nhalf", 0, "connection lost"),
        (b"", 0, "remote end closed"),
        (b"SSH-2.0-OpenSSH_9.6\r\n", 0, "SSH-2.0"),
    ],
)
def test_answers(text: bytes, status: int, body: object) -> None:
    with speaking(saying(text)) as url, closing(Caller()) as caller:
        answer = caller.ask(get(url))
    assert answer.status == status
    assert answer.end
    if status:
        assert answer.body == body
    else:
        assert str(body).lower() in answer.body.lower()


@pytest.mark.parametrize("url", ["ftp://127.0.0.1/", "file:///etc/passwd", "127.0.0.1:80", "http://", "http://a:b/"])
def test_what_is_no_address(url: str) -> None:
    with closing(Caller()) as caller:
        assert caller.ask(get(url)).status == 0


def test_nobody_there() -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with closing(Caller()) as caller:
        assert caller.ask(get(f"http://127.0.0.1:{port}")).body == "connection refused"


def chunked(*parts: bytes, kind: str = "application/x-ndjson", whole: bool = True) -> bytes:
    head = f"HTTP/1.1 200 OK\r\nContent-Type: {kind}\r\nTransfer-Encoding: chunked\r\n\r\n".encode()
    body = b"".join(f"{len(part):x}\r\n".encode() + part + b"\r\n" for part in parts)
    return head + body + (b"0\r\n\r\n" if whole else b"")


def objects(url: str) -> tuple[list[object], int, object]:
    """All objects of a stream, and the status and body that end it."""
    found: list[object] = []
    with closing(Caller()) as caller:
        answer = caller.ask(get(url, stream=True))
        while not answer.end:
            found.append(answer.body)
            answer = caller.more()
        assert caller.more().end
    return found, answer.status, answer.body


@given(
    st.lists(st.dictionaries(st.text(max_size=4), st.integers(0, 9) | st.text(max_size=9), max_size=3), max_size=5),
    st.data(),
)
@settings(max_examples=25, deadline=None)
def test_a_stream_is_the_same_however_it_is_cut(told: list[dict[str, int | str]], data: st.DataObject) -> None:
    import json

    text = "".join(json.dumps(one) + "\n" for one in told).encode()
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=6)))
    edges = [0, *cuts, len(text)]
    parts = [text[a:b] for a, b in pairwise(edges) if b > a]
    with speaking(saying(chunked(*parts))) as url:
        assert objects(url) == (told, 200, None)


def test_events() -> None:
    text = (
        b': hi\n\nevent: x\ndata: {"a": 1}\n\ndata:{"a": 2}\r\n\r\nid: 3\nretry: 9\ndata: [DONE]\n\ndata: {"a": 3}\n\n'
    )
    with speaking(saying(chunked(text, kind="text/event-stream; charset=utf-8"))) as url:
        assert objects(url) == ([{"a": 1}, {"a": 2}], 200, None)


def test_a_stream_that_breaks_off() -> None:
    with speaking(saying(chunked(b'{"a": 1}\n{"a"', whole=False))) as url:
        found, status, why = objects(url)
    assert found == [{"a": 1}]
    assert status == 0
    assert "broke off" in str(why)


def test_a_stream_that_is_refused_is_a_whole_answer() -> None:
    with speaking(saying(plain(b'{"error": "no"}', status="500 Oh"))) as url, closing(Caller()) as caller:
        answer = caller.ask(get(url, stream=True))
    assert (answer.status, answer.body, answer.end) == (500, {"error": "no"}, True)


def test_sizes_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http, "MAX_BODY", 1000)
    monkeypatch.setattr(http, "MAX_LINE", 1000)
    with speaking(saying(plain(b"x" * 100_000))) as url, closing(Caller()) as caller:
        assert "sent more than" in caller.ask(get(url)).body
    with speaking(saying(chunked(b"x" * 100_000))) as url, closing(Caller()) as caller:
        assert "sent a line of more than" in caller.ask(get(url, stream=True)).body


def test_time_is_bounded_however_slowly_it_drips() -> None:
    def drip(peer: socket.socket, _head: bytes) -> None:
        peer.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n")
        for _ in range(100):
            peer.sendall(b"x")
            time.sleep(0.05)

    started = time.monotonic()
    with speaking(drip) as url, closing(Caller()) as caller:
        assert caller.ask(get(url, timeout_s=0.3)).body == "no answer within 0 s"
        assert time.monotonic() - started < 2


def test_a_stop_breaks_off_what_is_waited_for() -> None:
    with speaking(lambda peer, _: time.sleep(5)) as url, closing(Caller()) as caller:
        threading.Timer(0.2, caller.abort).start()
        started = time.monotonic()
        assert caller.ask(get(url, timeout_s=60)).status == 0
        assert time.monotonic() - started < 2
        assert caller.ask(get(url)).body == "given up"


def test_a_file_arrives_as_it_is(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(bytes(range(256)) * 20_000)
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    with serving(tmp_path) as server, closing(Caller()) as caller:
        url = f"{server.url}/api/blobs/sha256:{digest}"
        assert caller.ask(Call(method="HEAD", url=url)).status == 404
        assert caller.ask(Call(method="POST", url=url, upload=str(file))).status == 201
        assert caller.ask(Call(method="HEAD", url=url)).status == 200
        wrong = url[:-1] + ("0" if url[-1] != "0" else "1")
        answer = caller.ask(Call(method="POST", url=wrong, upload=str(file)))
    assert (answer.status, answer.body) == (400, {"error": "digest mismatch"})


def test_a_server_that_answers_before_the_file_has_arrived(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"x" * (20 << 20))
    with speaking(saying(plain(b'{"error": "too large"}', status="413 No"))) as url, closing(Caller()) as caller:
        answer = caller.ask(Call(method="POST", url=url, upload=str(file)))
    assert answer.status in {0, 413}  # the kernel may drop the answer with the connection
    assert answer.end


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with speaking(saying(plain(b""))) as url, closing(Caller()) as caller:
        answer = caller.ask(Call(method="POST", url=url, upload=str(tmp_path / "none")))
    assert (answer.status, answer.body) == (0, "no such file or directory")


@pytest.mark.parametrize(
    ("text", "url"),
    [
        ("", "http://127.0.0.1:11434"),
        ("example.org", "http://example.org:11434"),
        ("example.org:99", "http://example.org:99"),
        (":99", "http://127.0.0.1:99"),
        ("0.0.0.0", "http://127.0.0.1:11434"),
        ("0.0.0.0:99", "http://127.0.0.1:99"),
        ("[::]:99", "http://[::1]:99"),
        ("::1", "http://[::1]:11434"),
        ("[::1]", "http://[::1]:11434"),
        ("http://example.org", "http://example.org:80"),
        ("https://example.org/sub/", "https://example.org:443/sub"),
        ("  '1.2.3.4:5'  ", "http://1.2.3.4:5"),
    ],
)
def test_where_a_service_is(text: str, url: str) -> None:
    assert service_url(SERVICE, {"SOME_HOST": text})[0] == url


@pytest.mark.parametrize("text", ["a b", "host:port", "ftp://x", "http://x:99999", "x:1:2:y", "http://é"])
def test_where_no_service_can_be(text: str) -> None:
    with pytest.raises(UsageError, match="which is no address"):
        service_url(SERVICE, {"SOME_HOST": text})


@given(st.text(max_size=40))
def test_any_address_is_one_or_refused(text: str) -> None:
    try:
        url, _ = service_url(SERVICE, {"SOME_HOST": text})
    except UsageError:
        return
    assert url.startswith(("http://", "https://"))


def test_a_service_is_found_and_asked(tmp_path: Path) -> None:
    with serving(tmp_path, version="0.31.2") as server:
        running = find_service(SERVICE, {"SOME_HOST": server.url})
    assert running is not None
    assert (running.url, running.origin) == (server.url, "$SOME_HOST")
    assert running.outputs["/api/version"] == '{"version":"0.31.2"}'
    assert find_service(SERVICE, {"SOME_HOST": server.url}) is None


def test_a_token_goes_along(tmp_path: Path) -> None:
    heads: list[bytes] = []

    def speak(peer: socket.socket, head: bytes) -> None:
        heads.append(head)
        peer.sendall(plain(b"{}"))

    (tmp_path / "token").write_text("secret\n", encoding="utf-8")
    service = Service(
        variable="X", url="http://x", probe=("/p",), token_file=str(tmp_path / "token"), token_header="X-Token"
    )
    with speaking(speak) as url:
        running = find_service(service, {"X": url})
    assert running is not None
    assert running.outputs["token"] == "secret"
    assert b"X-Token: secret\r\n" in heads[0]
