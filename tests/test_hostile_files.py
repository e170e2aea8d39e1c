"""MODEL is anything but a model: devices, pipes, sockets, links in circles, files that shrink, names of any bytes."""

from __future__ import annotations

import json
import os
import resource
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Final

import pytest

from fuzz.target import check_said
from gguf_writer import llama_metadata, llama_tensors, small_llama, write_gguf, write_shards
from mgpu.errors import BadModelError
from mgpu.inspect import source
from mgpu.inspect.gguf import parse_header
from mgpu.inspect.source import read_model
from safetensors_writer import small_config, small_tensors, write_model

ROOT: Final = Path(__file__).parents[1]
PATHS: Final = os.pathsep.join(str(ROOT / name) for name in ("launcher", "adapters", "profiles"))


def refusal(argument: str | Path) -> BadModelError:
    with pytest.raises(BadModelError) as caught:
        read_model(str(argument))
    check_said(caught.value)
    assert caught.value.hint
    return caught.value


def _fifo(path: Path) -> None:
    os.mkfifo(path)


def _socket(path: Path) -> None:
    short = Path(tempfile.mkdtemp(prefix="mgpu-")) / "s"  # a socket's own path must not be long
    with socket.socket(socket.AF_UNIX) as one:
        one.bind(str(short))
    short.rename(path)
    short.parent.rmdir()


def _circle(path: Path) -> None:
    path.symlink_to(path.name)


def _to(target: str) -> Callable[[Path], None]:
    return lambda path: path.symlink_to(target)


#: What lies there in the place of a file.
THINGS: Final[dict[str, Callable[[Path], None]]] = {
    "a FIFO": _fifo,
    "a socket": _socket,
    "a link to itself": _circle,
    "a link to nothing": _to("nothing"),
    "a link to a device of zeros": _to("/dev/zero"),
    "a link to a terminal": _to("/dev/tty"),
    "a directory": Path.mkdir,
    "nothing in it": Path.touch,
}


@pytest.fixture(autouse=True)
def _bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OLLAMA_MODELS", str(tmp_path / "no store"))


@pytest.mark.parametrize("name", THINGS)
class TestThings:
    def test_for_a_model(self, name: str, tmp_path: Path) -> None:
        THINGS[name](tmp_path / "m.gguf")
        refusal(tmp_path / "m.gguf")

    def test_in_a_directory(self, name: str, tmp_path: Path) -> None:
        THINGS[name](tmp_path / "m.gguf")
        refusal(tmp_path)

    @pytest.mark.parametrize("file", ["config.json", "model.safetensors", "model.safetensors.index.json"])
    def test_for_a_file_of_a_model(self, name: str, file: str, tmp_path: Path) -> None:
        model = write_model(tmp_path / "m", small_config(), small_tensors())
        (model / file).unlink(missing_ok=True)
        THINGS[name](model / file)
        refusal(model)

    def test_for_a_shard(self, name: str, tmp_path: Path) -> None:
        shards = write_shards(tmp_path)
        shards[1].unlink()
        THINGS[name](shards[1])
        refusal(shards[0])

    def test_for_an_ollama_manifest(self, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        manifests = tmp_path / "store/manifests/registry.ollama.ai/library/m"
        manifests.mkdir(parents=True)
        THINGS[name](manifests / "latest")
        monkeypatch.setenv("OLLAMA_MODELS", str(tmp_path / "store"))
        refusal("m")

    def test_for_an_ollama_blob(self, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        manifests = tmp_path / "store/manifests/registry.ollama.ai/library/m"
        manifests.mkdir(parents=True)
        digest = "0" * 64
        layer = {"mediaType": "application/vnd.ollama.image.model", "digest": f"sha256:{digest}"}
        (manifests / "latest").write_text(json.dumps({"layers": [layer]}))
        (tmp_path / "store/blobs").mkdir()
        THINGS[name](tmp_path / f"store/blobs/sha256-{digest}")
        monkeypatch.setenv("OLLAMA_MODELS", str(tmp_path / "store"))
        refusal("m")


@pytest.mark.parametrize(
    "device", ["/dev/zero", "/dev/null", "/dev/stdin", "/dev/random", "/proc/self/mem", "/proc/kmsg"]
)
def test_devices(device: str) -> None:
    refusal(device)


def test_names_of_a_process_and_its_memory_are_no_models() -> None:
    refusal("/proc/self/exe")
    refusal("/proc/self/fd/0")
    refusal("/proc")


class TestShrinking:
    """A file that is cut off while it is read: a download that starts anew. Of a mapped file, that is a SIGBUS."""

    def test_a_gguf(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        tokens = {"tokenizer.ggml.tokens": [f"word{n}" for n in range(60_000)]}  # the header goes on for a megabyte
        path = tmp_path / "m.gguf"
        path.write_bytes(write_gguf(llama_metadata() | tokens, llama_tensors()))
        whole = parse_header

        def cut_then_parse(*args: object, **kwargs: object) -> object:
            os.truncate(path, 300_000)
            return whole(*args, **kwargs)  # type: ignore[arg-type] # as they came

        assert read_model(str(path)).hyper.n_vocab == 60_000
        monkeypatch.setattr(source, "parse_header", cut_then_parse)
        error = refusal(path)
        assert "became shorter" in error.message

    def test_to_nothing(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        path = tmp_path / "m.gguf"
        path.write_bytes(small_llama())
        whole = source._read_header

        def cut_then_read(*args: object) -> object:
            os.truncate(path, 0)
            return whole(*args)  # type: ignore[arg-type] # as they came

        monkeypatch.setattr(source, "_read_header", cut_then_read)
        refusal(path)

    def test_while_it_is_read_again_and_again(self, tmp_path: Path) -> None:
        """By another process, as it comes: never a signal, never anything but a model or a line."""
        tokens = {"tokenizer.ggml.tokens": [f"word{n}" for n in range(60_000)]}
        content = write_gguf(llama_metadata() | tokens, llama_tensors())
        path = tmp_path / "m.gguf"
        path.write_bytes(content)
        script = (
            "import os, sys\nwhole = os.path.getsize(sys.argv[1])\n"
            "while True:\n    os.truncate(sys.argv[1], 70000)\n    os.truncate(sys.argv[1], whole)\n"
        )
        with subprocess.Popen([sys.executable, "-c", script, str(path)]) as cutter:
            try:
                for _ in range(60):
                    try:
                        read_model(str(path))
                    except BadModelError as error:
                        check_said(error)
            finally:
                cutter.kill()


def mgpu(*arguments: bytes | str) -> subprocess.CompletedProcess[bytes]:
    """The command line, in 2 GiB of address space and 20 s of processor time."""

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_AS, (2 << 30, 2 << 30))
        resource.setrlimit(resource.RLIMIT_CPU, (20, 20))

    return subprocess.run(
        [sys.executable, "-m", "mgpu", *arguments],
        env={**os.environ, "PYTHONPATH": PATHS},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        timeout=100,
        preexec_fn=limit,
        check=False,
    )


NAMES: Final[dict[str, bytes]] = {
    "a newline": b"a\nb.gguf",
    "quotes": b"a'b\"c`d`$(e).gguf",
    "a dash": b"-m.gguf",
    "two dashes": b"--model.gguf",
    "no text": b"a\xff\xfeb.gguf",
    "an escape sequence": b"\x1b[2J.gguf",
    "spaces": b"  a  b .gguf ",
    "a reading direction": "a\u202efugg.gguf".encode(),
    "a glob": b"[a-z]*?.gguf",
    "a percent": b"%s%n%2e.gguf",
}


@pytest.mark.parametrize("name", NAMES)
def test_names(name: str, tmp_path: Path) -> None:
    """A model is found by whatever name it has, planned for, and its name printed as something that can be printed."""
    path = os.path.join(os.fsencode(tmp_path), NAMES[name])  # noqa: PTH118 - bytes
    with open(path, "wb") as file:  # noqa: PTH123 - bytes
        file.write(small_llama())
    for command in ((b"inspect", path), (b"run", b"--dry-run", b"--rig", b"2x3090", path)):
        done = mgpu(*command)
        assert done.returncode == 0, done.stderr
        assert b"Traceback" not in done.stderr
        assert b"\x1b" not in done.stderr + (done.stdout if command[0] == b"inspect" else b"")  # a command is a command


@pytest.mark.parametrize("name", NAMES)
def test_names_of_nothing(name: str, tmp_path: Path) -> None:
    done = mgpu(b"plan", b"--rig", b"2x3090", os.path.join(os.fsencode(tmp_path), NAMES[name]))  # noqa: PTH118 - bytes
    assert done.returncode == 4, done.stderr
    assert done.stdout == b""
    assert b"\x1b" not in done.stderr
    assert len(done.stderr.splitlines()) == 2, done.stderr


def test_a_device_by_the_command_line() -> None:
    done = mgpu("inspect", "/dev/zero")
    assert done.returncode == 4
    assert len(done.stderr.splitlines()) == 2


def test_a_directory_of_the_service_s_user(tmp_path: Path) -> None:
    """Ollama's own store, parts of which only its own user may read: as if there were none."""
    if os.geteuid() != 0:
        pytest.skip("only root can be somebody else")
    model = tmp_path / "manifests/registry.ollama.ai/library/m"
    model.mkdir(parents=True)
    (model / "latest").write_text("{}")
    (tmp_path / "manifests/registry.ollama.ai").chmod(0o700)
    script = (
        "import os\nos.chdir('/')\nimport mgpu.inspect.ollama_store as store\nfrom pathlib import Path\n"
        f"os.setuid(65534)\nassert store.find_stored('m', [Path({str(tmp_path)!r})]) is None\n"
    )
    for directory in (tmp_path, *tmp_path.parents):
        if (
            directory.stat().st_mode & 0o005 != 0o005
            and directory.stat().st_uid == 0
            and directory.parts[1:2] == ("tmp",)
        ):
            directory.chmod(0o755)
    done = subprocess.run(
        [sys.executable, "-c", script], env={**os.environ, "PYTHONPATH": PATHS}, capture_output=True, check=False
    )
    assert done.returncode == 0, done.stderr
