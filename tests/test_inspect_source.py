"""What MODEL may be: paths, directories, shards, URLs, and every mistake with its one-line answer."""

from __future__ import annotations

import os
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from gguf_writer import Raw, Typed, llama_metadata, llama_tensors, small_llama, write_gguf, write_shards
from mgpu.errors import BadModelError
from mgpu.inspect import remote
from mgpu.inspect.source import read_model


def refused(argument: str | Path) -> BadModelError:
    """The error for `argument`, which is one printable line and a hint of one line."""
    with pytest.raises(BadModelError) as caught:
        read_model(str(argument))
    error = caught.value
    assert error.message.isprintable()
    assert error.hint.isprintable()
    return error


@pytest.fixture
def model_path(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.gguf"
    path.write_bytes(small_llama())
    return path


def test_a_path(model_path: Path) -> None:
    model = read_model(str(model_path))
    assert model.path == str(model_path)
    assert [(file.path, file.n_bytes) for file in model.files] == [(str(model_path), model_path.stat().st_size)]


def test_a_relative_path_becomes_absolute(model_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(model_path.parent)
    assert read_model("tiny.gguf").path == str(model_path)


@pytest.mark.parametrize(
    "name", ["with space.gguf", "new\nline.gguf", "-m.gguf", "\udcff\udcfe.gguf", "no-suffix", "%s{0}.gguf", "ü.GGUF"]
)
def test_odd_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    (tmp_path / name).write_bytes(small_llama())
    monkeypatch.chdir(tmp_path)
    assert read_model(name).path == str(tmp_path / name)


def test_errors_about_odd_names_are_one_line(tmp_path: Path) -> None:
    path = tmp_path / "new\nline\udcff.gguf"
    path.write_bytes(b"GGUF")
    assert r"new\nline\udcff.gguf" in refused(path).message


def test_links_are_followed_and_kept(model_path: Path) -> None:
    link = model_path.with_name("blob")
    link.symlink_to(model_path)
    assert read_model(str(link)).path == str(link)


def test_dot_dot_after_a_link_is_the_system_s(tmp_path: Path) -> None:
    inner = tmp_path / "far" / "inner"
    inner.mkdir(parents=True)
    (tmp_path / "far" / "m.gguf").write_bytes(small_llama())
    (tmp_path / "link").symlink_to(inner)
    assert read_model(f"{tmp_path}/link/../m.gguf").architecture == "llama"


def test_broken_link_says_where_to(tmp_path: Path) -> None:
    (tmp_path / "m.gguf").symlink_to("/nowhere/blob")
    assert "is a link to /nowhere/blob, which does not exist" in refused(tmp_path / "m.gguf").message


def test_link_to_itself(tmp_path: Path) -> None:
    (tmp_path / "m.gguf").symlink_to("m.gguf")
    assert "cannot be read" in refused(tmp_path / "m.gguf").message


def test_empty_file(tmp_path: Path) -> None:
    (tmp_path / "m.gguf").touch()
    assert "is empty (0 bytes)" in refused(tmp_path / "m.gguf").message


def test_fifo_is_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "m.gguf")
    assert "is not a regular file" in refused(tmp_path / "m.gguf").message


def test_device_is_refused() -> None:
    assert "/dev/zero is not a regular file" in refused("/dev/zero").message


def test_socket_is_refused(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "m.gguf"))
        assert "is not a regular file" in refused(tmp_path / "m.gguf").message


@pytest.fixture
def nobody() -> Iterator[None]:
    """Be no one in particular: root may read everything."""
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)
    yield
    os.seteuid(user)


@pytest.mark.usefixtures("nobody")
def test_unreadable_file() -> None:
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "m.gguf"
        path.touch(0)
        assert refused(path).message == f"{path} cannot be read: Permission denied"


@pytest.mark.usefixtures("nobody")
def test_unreadable_directory() -> None:
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "locked"
        path.mkdir(0)
        assert refused(path).message == f"{path} cannot be read: Permission denied"
        assert "Permission denied" in refused(path / "m.gguf").message


@pytest.mark.parametrize("argument", ["", "a\0b"])
def test_not_a_path(argument: str) -> None:
    assert "not a path" in refused(argument).message


def test_name_too_long() -> None:
    assert "cannot be read: File name too long" in refused("x" * 5000).message


def test_close_names_are_suggested(model_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (model_path.parent / "notes.txt").touch()
    monkeypatch.chdir(model_path.parent)
    error = refused("tniy.gguf")
    assert (error.message, error.hint) == ("no such file: tniy.gguf", "did you mean tiny.gguf?")


@pytest.mark.parametrize(
    ("argument", "hint"),
    [
        ("llama3.3:70b", "OLLAMA_MODELS"),
        ("hf.co/bartowski/Q-GGUF:Q4_K_M", "Ollama's store"),
        ("llama3", "give the path of a .gguf file"),
        ("Qwen/Qwen3-8B-GGUF", "https://huggingface.co/Qwen/Qwen3-8B-GGUF/resolve/main/FILE.gguf"),
        ("huggingface.co/a/b/resolve/main/c.gguf", "https://huggingface.co/a/b/resolve/main/c.gguf"),
        ("~/m.gguf", "did not expand the ~"),
        ("/no/such/place/m.gguf", "there is no directory /no/such/place"),
        ("what is\nthis", "give the path of a .gguf file, or its http(s) URL"),
    ],
)
def test_missing_file_says_what_may_be_meant(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, argument: str, hint: str
) -> None:
    monkeypatch.chdir(tmp_path)
    error = refused(argument)
    assert error.message.startswith("no such file: ")
    assert hint in error.hint


def test_a_file_as_a_directory(model_path: Path) -> None:
    assert "no such file" in refused(model_path / "x.gguf").message


@pytest.mark.parametrize("url", ["s3://bucket/m.gguf", "file:///m.gguf", "ollama://llama3"])
def test_other_schemes(url: str) -> None:
    assert "is not supported" in refused(url).message


def test_directory_with_one_model(model_path: Path) -> None:
    (model_path.parent / "mmproj-F16.gguf").touch()
    (model_path.parent / "README.md").touch()
    (model_path.parent / "sub.gguf").mkdir()
    assert read_model(str(model_path.parent)).path == str(model_path)


def test_directory_with_one_set(tmp_path: Path) -> None:
    first, *_ = write_shards(tmp_path)
    assert read_model(str(tmp_path)).path == str(first)


def test_directory_with_several_models(model_path: Path) -> None:
    model_path.with_name("other.gguf").touch()
    write_shards(model_path.parent, stem="big")
    assert refused(model_path.parent).message.endswith("holds 3 models: big-00001-of-00003.gguf, other.gguf, tiny.gguf")


@pytest.mark.parametrize(
    ("files", "what"),
    [
        ((), "it holds nothing"),
        (("Q4/m.gguf", "Q8/m.gguf"), "it holds directories with some: Q4, Q8"),
        (
            tuple(f"{n}.txt" for n in range(10)),
            "it holds 0.txt, 1.txt, 2.txt, 3.txt, 4.txt, 5.txt, 6.txt, 7.txt and 2 more",
        ),
    ],
)
def test_directory_without_a_gguf(tmp_path: Path, files: tuple[str, ...], what: str) -> None:
    for name in files:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    message = refused(tmp_path).message
    assert "has no .gguf and no *.safetensors file" in message
    assert message.endswith(what)


@pytest.mark.parametrize("named", [0, 1, 2])
def test_any_shard_finds_the_others(tmp_path: Path, named: int) -> None:
    paths = write_shards(tmp_path)
    model = read_model(str(paths[named]))
    assert model.path == str(paths[0])
    assert [file.path for file in model.files] == [str(path) for path in paths]
    assert {tensor.name for tensor in model.tensors} == {spec.name for spec in llama_tensors(4)}
    assert model.weights_bytes == sum(spec.n_bytes for spec in llama_tensors(4))


def test_missing_shards_are_all_named(tmp_path: Path) -> None:
    paths = write_shards(tmp_path, n_shards=4)
    paths[0].unlink()
    paths[2].unlink()
    for argument in (paths[1], tmp_path):
        message = refused(argument).message
        assert "2 of 4 shards are missing" in message
        assert message.endswith("tiny-00001-of-00004.gguf, tiny-00003-of-00004.gguf")


def test_many_missing_shards_stay_one_line(tmp_path: Path) -> None:
    path = tmp_path / "m-00001-of-65535.gguf"
    path.write_bytes(write_gguf(llama_metadata() | {"split.count": Typed(2, 65535)}, llama_tensors()))
    error = refused(path)
    assert "65534 of 65535 shards are missing" in error.message
    assert error.message.endswith("and 65526 more")
    assert len(error.message) < 1000


def test_renamed_shard(tmp_path: Path) -> None:
    renamed = write_shards(tmp_path)[0].rename(tmp_path / "model.gguf")
    error = refused(renamed)
    assert "is one of 3 shards (split.count), but its name does not say which" in error.message
    assert "NAME-00001-of-00003.gguf" in error.hint


def test_shards_in_the_wrong_places(tmp_path: Path) -> None:
    paths = write_shards(tmp_path)
    spare = tmp_path / "spare"
    paths[1].rename(spare)
    paths[2].rename(paths[1])
    spare.rename(paths[2])
    assert "split.no and split.count are 2 and 3, they must be 1 and 3" in refused(paths[0]).message


def test_shard_of_another_set(tmp_path: Path) -> None:
    paths = write_shards(tmp_path)
    other = tmp_path / "other"
    other.mkdir()
    write_shards(other, n_shards=2)[1].rename(paths[1])
    assert "split.no and split.count are 1 and 2, they must be 1 and 3" in refused(paths[0]).message


def test_tensor_in_two_shards(tmp_path: Path) -> None:
    paths = write_shards(tmp_path)
    split = {"split.no": Typed(2, 1), "split.count": Typed(2, 3)}
    paths[1].write_bytes(write_gguf(split, llama_tensors(4)[:1]))
    assert "the tensor token_embd.weight is also in" in refused(paths[0]).message


def test_tensor_missing_from_a_shard(tmp_path: Path) -> None:
    paths = write_shards(tmp_path)
    split = {"split.no": Typed(2, 1), "split.count": Typed(2, 3)}
    paths[1].write_bytes(write_gguf(split))
    message = refused(paths[0]).message
    assert "the shards hold 26 tensors, split.tensors.count is 39" in message


def test_shard_cut_short_is_named(tmp_path: Path) -> None:
    paths = write_shards(tmp_path)
    os.truncate(paths[2], paths[2].stat().st_size - 64)
    message = refused(paths[0]).message
    assert message.startswith(str(paths[2]))
    assert "64 of" in message


def test_shard_that_is_a_fifo(tmp_path: Path) -> None:
    paths = write_shards(tmp_path)
    paths[1].unlink()
    os.mkfifo(paths[1])
    assert "is not a regular file" in refused(paths[0]).message


@pytest.mark.parametrize("count", [Typed(8, "3"), Typed(5, -1), Typed(4, 70000), Typed(6, 2.0)])
def test_split_count_must_be_a_number(tmp_path: Path, count: Typed) -> None:
    path = tmp_path / "m-00001-of-00003.gguf"
    path.write_bytes(write_gguf(llama_metadata() | {"split.count": count}, llama_tensors()))
    assert "split.count is" in refused(path).message


def test_a_name_like_a_shard_s_alone_means_nothing(tmp_path: Path) -> None:
    path = tmp_path / "m-00001-of-00003.gguf"
    path.write_bytes(small_llama())
    assert read_model(str(path)).path == str(path)


# URLs. Every test talks to a real server of its own on 127.0.0.1.

Answer = Callable[["Handler"], object]


class Server(ThreadingHTTPServer):
    """Answers by path; a path without an answer is 404."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.answers: dict[str, Answer] = {}
        self.asked: list[tuple[str, str | None]] = []

    @property
    def root(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def serve(self, path: str, answer: Answer) -> str:
        self.answers[path] = answer
        return self.root + path

    def handle_error(self, request: object, client_address: object) -> None:
        """Say nothing: clients that hang up are the point of some tests."""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Server

    def do_GET(self) -> None:
        self.server.asked.append((self.path, self.headers["Range"]))
        answer = self.server.answers.get(self.path.partition("?")[0])
        if answer is None:
            self.answer(404, b"Entry not found")
        else:
            answer(self)

    def answer(self, status: int, body: bytes, **headers: str) -> None:
        self.send_response(status)
        for name, value in ({"Content_Length": str(len(body))} | headers).items():
            if value:
                self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - http.server's name
        """Say nothing."""


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def ranged(content: bytes) -> Answer:
    """A server that knows ranges."""

    def answer(handler: Handler) -> None:
        first, _, last = (handler.headers["Range"] or "bytes=0-").removeprefix("bytes=").partition("-")
        part = content[int(first) : int(last) + 1]
        place = f"bytes {first}-{int(first) + len(part) - 1}/{len(content)}"
        handler.answer(206, part, Content_Range=place)

    return answer


def whole(content: bytes, **headers: str) -> Answer:
    """A server that ignores ranges."""
    return lambda handler: handler.answer(200, content, **headers)


def moved(target: str) -> Answer:
    return lambda handler: handler.answer(302, b"", Location=target)


@pytest.fixture(scope="module")
def large() -> bytes:
    """A model with a header of 3 MiB and 4 MiB of data."""
    words = {"tokenizer.ggml.tokens": [f"{n:04x}" * 6 for n in range(100_000)]}
    tensors = [*llama_tensors(), llama_tensors()[0]._replace(name="rope_freqs.weight", shape=(1 << 20,), type="F32")]
    return write_gguf(llama_metadata() | words, tensors)


def test_url_of_a_server_with_ranges(server: Server, large: bytes) -> None:
    url = server.serve("/m.gguf", ranged(large))
    model = read_model(url)
    assert (model.path, model.file_bytes, model.hyper.n_vocab) == (url, len(large), 100_000)
    assert [span for _, span in server.asked] == ["bytes=0-1048575", "bytes=1048576-2097151", "bytes=2097152-4194303"]


def test_url_of_a_server_without_ranges(server: Server, large: bytes) -> None:
    sent: list[int] = []

    def answer(handler: Handler) -> None:
        handler.send_response(200)
        handler.send_header("Content-Length", str(len(large)))
        handler.end_headers()
        for at in range(0, len(large), 1 << 16):
            handler.wfile.write(large[at : at + (1 << 16)])
            sent.append(at)

    model = read_model(server.serve("/m.gguf", answer))
    assert (model.file_bytes, model.hyper.n_vocab) == (len(large), 100_000)
    assert len(server.asked) == 1


def test_small_file_by_url(server: Server) -> None:
    content = small_llama()
    model = read_model(server.serve("/m.gguf", ranged(content)) + "?download=true&token=SECRET")
    assert model.file_bytes == len(content)
    assert model.path == f"{server.root}/m.gguf"


def test_shards_by_url(server: Server, tmp_path: Path) -> None:
    for path in write_shards(tmp_path):
        server.serve(f"/{path.name}", ranged(path.read_bytes()))
    model = read_model(f"{server.root}/tiny-00002-of-00003.gguf?download=true")
    assert model.path == f"{server.root}/tiny-00001-of-00003.gguf"
    assert len(model.files) == 3
    assert all(path.endswith("?download=true") for path, _ in server.asked)


def test_missing_shard_by_url(server: Server, tmp_path: Path) -> None:
    for path in write_shards(tmp_path)[:2]:
        server.serve(f"/{path.name}", ranged(path.read_bytes()))
    assert (
        "tiny-00003-of-00003.gguf: the server answers 404" in refused(f"{server.root}/tiny-00001-of-00003.gguf").message
    )


def test_redirects_are_followed(server: Server) -> None:
    server.serve("/real", ranged(small_llama()))
    url = server.serve("/m.gguf", moved("/real"))
    assert read_model(url).path == url


@pytest.mark.parametrize("target", ["file:///etc/passwd", "ftp://127.0.0.1/m.gguf", "gopher://x"])
def test_redirect_to_another_scheme(server: Server, target: str) -> None:
    assert "redirects to something that is not http" in refused(server.serve("/m.gguf", moved(target))).message


def test_redirects_without_end(server: Server) -> None:
    assert "more than 5 redirects" in refused(server.serve("/m.gguf", moved("/m.gguf"))).message
    assert len(server.asked) == 6


@pytest.mark.parametrize(
    ("status", "hint"),
    [
        (401, "token"),
        (403, "gated"),
        (404, "/resolve/main/"),
        (410, "check the address"),
        (429, "wait"),
        (503, "later"),
    ],
)
def test_refusals(server: Server, status: int, hint: str) -> None:
    error = refused(server.serve("/m.gguf", lambda handler: handler.answer(status, b"no")) + "?token=SECRET")
    assert f"the server answers {status}" in error.message
    assert hint in error.hint
    assert "SECRET" not in error.message + error.hint


def test_password_is_not_shown(server: Server) -> None:
    url = server.serve("/m.gguf", whole(b"GGUF")).replace("http://", "http://user:SECRET@")
    assert "SECRET" not in refused(url).message


def test_empty_file_by_url(server: Server) -> None:
    assert "is empty" in refused(server.serve("/a.gguf", lambda handler: handler.answer(416, b""))).message
    assert "is empty" in refused(server.serve("/b.gguf", whole(b""))).message


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (b"<html>" + b" " * 5000, "an HTML or XML page"),
        (b"\x1f\x8b" * 100, "a gzip archive"),
        (b"hi", "it starts with"),
    ],
)
def test_other_content(server: Server, content: bytes, what: str) -> None:
    assert what in refused(server.serve("/m.gguf", whole(content))).message
    assert what in refused(server.serve("/r.gguf", ranged(content))).message


def test_file_shorter_than_its_tensors_by_url(server: Server) -> None:
    content = small_llama()[:-64]
    assert "64 of" in refused(server.serve("/m.gguf", ranged(content))).message


@pytest.mark.parametrize(
    ("content", "message"), [(small_llama(), "does not say how large the file is"), (b"<html>", "an HTML or XML page")]
)
def test_server_without_a_length(server: Server, content: bytes, message: str) -> None:
    url = server.serve("/m.gguf", lambda handler: handler.answer(200, content, Content_Length="", Connection="close"))
    assert message in refused(url).message


@pytest.mark.parametrize("place", ["", "bytes 0-99/*", "bytes 7-99/100", "bytes 0-99/" + "9" * 5000, "octets"])
def test_range_without_a_length(server: Server, place: str) -> None:
    url = server.serve("/m.gguf", lambda handler: handler.answer(206, small_llama(), Content_Range=place))
    assert "does not say how large the file is" in refused(url).message


def test_file_that_changes_between_requests(server: Server, large: bytes) -> None:
    def answer(handler: Handler) -> None:
        ranged(large if handler.headers["Range"].startswith("bytes=0-") else large + b"more")(handler)

    assert "changed from" in refused(server.serve("/m.gguf", answer)).message


def test_connection_that_ends_early(server: Server, large: bytes) -> None:
    def answer(handler: Handler) -> None:
        handler.answer(200, large[:5000], Content_Length=str(len(large)), Connection="close")
        handler.close_connection = True

    assert "the connection broke" in refused(server.serve("/m.gguf", answer)).message


def test_connection_that_ends_at_once(server: Server) -> None:
    url = server.serve("/m.gguf", lambda handler: handler.answer(206, b"", Content_Range="bytes 0-9/10"))
    assert "the connection ended after 0 of 10 bytes" in refused(url).message


def test_server_that_sends_less_than_asked_for(server: Server, large: bytes) -> None:
    def answer(handler: Handler) -> None:
        first = int(handler.headers["Range"].removeprefix("bytes=").partition("-")[0])
        part = large[first : first + 600_000]
        handler.answer(206, part, Content_Range=f"bytes {first}-{first + len(part) - 1}/{len(large)}")

    assert read_model(server.serve("/m.gguf", answer)).hyper.n_vocab == 100_000


def test_header_that_lies_about_its_length_is_bounded(server: Server) -> None:
    """A string said to be 200 GiB long, in a file said to be larger: refused without reading on."""
    lie = write_gguf({"a": Raw(8, (200 << 30).to_bytes(8, "little"))})

    def answer(handler: Handler) -> None:
        handler.answer(206, lie.ljust(1 << 20, b"\0"), Content_Range=f"bytes 0-1048575/{1 << 40}")

    assert "the header is longer than 256 MiB" in refused(server.serve("/m.gguf", answer)).message
    assert len(server.asked) == 1


def test_drip_is_bounded(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "DEADLINE", 0.5)

    def answer(handler: Handler) -> None:
        handler.send_response(200)
        handler.send_header("Content-Length", str(1 << 40))
        handler.end_headers()
        for _ in range(100):
            handler.wfile.write(b"GGUF")
            time.sleep(0.05)

    start = time.monotonic()
    assert "too slow" in refused(server.serve("/m.gguf", answer)).message
    assert time.monotonic() - start < 3


def test_silence_is_bounded(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "_TIMEOUTS", (0.3, 0.3))
    release = threading.Event()
    url = server.serve("/m.gguf", lambda _: release.wait(10))
    assert "no answer within" in refused(url).message
    release.set()


def test_endless_body_is_read_only_as_far_as_needed(server: Server) -> None:
    content = small_llama()
    sent = 0

    def answer(handler: Handler) -> None:
        nonlocal sent
        handler.send_response(200)
        handler.send_header("Content-Length", str(1 << 50))
        handler.end_headers()
        handler.wfile.write(content)
        while sent < 1 << 28:
            handler.wfile.write(bytes(1 << 16))
            sent += 1 << 16

    assert read_model(server.serve("/m.gguf", answer)).file_bytes == 1 << 50
    assert sent < 1 << 26


def test_nobody_listens() -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        assert "the connection was refused" in refused(f"http://127.0.0.1:{closed.getsockname()[1]}/m.gguf").message


def test_no_such_host() -> None:
    assert "the server cannot be reached" in refused("http://no-such-host.invalid/m.gguf").message


def test_tls_to_a_plain_server(server: Server) -> None:
    assert "no TLS connection" in refused(server.root.replace("http", "https") + "/m.gguf").message


@pytest.mark.parametrize(
    "url", ["http://", "http://[::1", "https:///m.gguf", "http://\udcff/m.gguf", "http://a b/m.gguf"]
)
def test_not_a_url(url: str) -> None:
    assert "this is not a URL" in refused(url).message


def test_page_about_the_file() -> None:
    error = refused("https://huggingface.co/a/b/blob/main/m.gguf")
    assert "is the page about the file" in error.message
    assert "https://huggingface.co/a/b/resolve/main/m.gguf" in error.hint
