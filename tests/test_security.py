"""Who may talk to what mgpu starts, where the key is and where it is not, and what is written where."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import socket
import stat
import subprocess
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import psutil
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from conftest import Mgpu, write_program
from fake_build import SERVER, build_program
from fake_started import Running
from fakenvml.machine import Machine, rtx_3090
from mgpu.adapter import Command
from mgpu.errors import RefusedError, UsageError
from mgpu.launch.keys import check_key, guard, is_exposed, kept_key, with_key
from mgpu.launch.places import spare_state_dir, state_dir, usual_state_dir
from mgpu.launch.private import make_directory, new_file, read_own, write_whole
from mgpu.launch.process import environment
from mgpu.launch.redact import MASK, redact, redact_words, secrets_of
from mgpu.report.lines import shell_line, to_scrub
from mgpu.request import KEY_PLACEHOLDER, KEY_VARIABLE, Request
from mgpu_adapters.vllm.flags import read_flags

Header = Callable[[str], Path]
Env = dict[str, str]

ROOT: Final = Path(__file__).parents[1]
SMALL: Final = "Llama-3.1-8B-Instruct-Q4_K_M"
NGINX: Final = shutil.which(
    "nginx", path=f"{os.environ.get('PATH', '')}{os.pathsep}/usr/sbin{os.pathsep}/usr/local/sbin"
)
needs_nginx = pytest.mark.skipif(NGINX is None, reason="no nginx: apt-get install nginx-light")
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to make files of another user")
NOBODY: Final = 65534

#: Started with a model, it writes down how, and becomes the fake server with the key it was told.
_STARTED: Final = """\
port = words[words.index("--port") + 1]
kept = {{name: value for name, value in os.environ.items() if name.startswith(("CUDA", "LLAMA", "MGPU"))}}
with open(os.path.join({record!r}, port + ".json"), "w") as out:
    json.dump({{"argv": words, "env": kept}}, out)
key = os.environ.get("LLAMA_API_KEY") or ""
if "--api-key-file" in words:
    key = open(words[words.index("--api-key-file") + 1]).read().strip()
host = words[words.index("--host") + 1]
code = "import sys; sys.path.insert(0, {folder!r}); sys.argv += ['--api-key', sys.stdin.readline().strip()]"
read, write = os.pipe()
os.write(write, key.encode() + b"\\n")
os.close(write)
os.dup2(read, 0)
code += "; import fake_llama_server; fake_llama_server.main()"
os.execv(sys.executable, [sys.executable, "-c", code, "--host", host, "--port", port])
"""


#: Prints what it was given: by two variables, as arguments, and in files.
_SERVE: Final = """\
import json, os, sys
files = [open(name).read() for name in sorted(os.listdir(".")) if name.endswith(".yml")]
print(json.dumps([os.environ.get("API_KEY"), os.environ.get("MGPU_API_KEY"), sys.argv[1:], files]))
"""


@pytest.fixture
def machine(fake_nvml: Path, tmp_path: Path) -> Callable[..., Env]:
    """`machine(knows_file=…)`: the environment of a machine with two 3090 and a llama-server."""

    def make(*, knows_file: bool = True) -> Env:
        config = tmp_path / "machine.toml"
        config.write_text(Machine(rtx_3090(0), rtx_3090(1)).toml(), encoding="utf-8")
        (tmp_path / "started").mkdir(exist_ok=True)
        started = _STARTED.format(record=str(tmp_path / "started"), folder=str(Path(SERVER).parent))
        program = build_program(started)
        if knows_file:
            program = program.replace("-c,    --ctx-size N", "--api-key-file FNAME\\n-c,    --ctx-size N")
        server = write_program(tmp_path / "llama-server", program)
        return {
            "LD_LIBRARY_PATH": str(fake_nvml),
            "FAKE_NVML_CONFIG": str(config),
            "MGPU_LLAMA_SERVER": str(server),
            "MGPU_PROXY": "none",
        }

    return make


def started(tmp_path: Path) -> list[dict[str, Any]]:
    return [json.loads(file.read_text()) for file in sorted((tmp_path / "started").glob("*.json"))]


def key_file() -> Path:
    return usual_state_dir() / "api-key"


def status_of(url: str, key: str | None = None) -> int:
    """HTTP status of a question, with the key or without."""
    headers = {"Content-Type": "application/json"} | ({} if key is None else {"Authorization": f"Bearer {key}"})
    body = json.dumps({"prompt": "Hello", "n_predict": 1}).encode()
    try:
        with urllib.request.urlopen(urllib.request.Request(url, body, headers), timeout=20) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        with error:
            return error.code


@contextmanager
def serving(*arguments: str, env: Env, python_path: str) -> Iterator[tuple[Running, str]]:
    """`mgpu run …` under way, and the base URL it has said."""
    running = Running(*arguments, env={**env, "PYTHONPATH": python_path})
    try:
        running.wait_until("ready after")
        found = re.search(r"ready after [0-9.]+ s: (http://\S+)/v1", running.stderr)
        assert found is not None, running.stderr
        yield running, found[1]
    finally:
        running.process.send_signal(signal.SIGTERM)
        running.wait()


def below(process: psutil.Process) -> list[psutil.Process]:
    return [process, *process.children(recursive=True)]


class TestWhoCanReachIt:
    @pytest.mark.parametrize(
        "host", ["127.0.0.1", "127.8.9.1", "::1", "localhost", "::ffff:127.0.0.1", "127.1", "0x7f000001"]
    )
    def test_this_machine_alone(self, host: str) -> None:
        assert not is_exposed(host, here=True)

    @pytest.mark.parametrize(
        "host",
        ["0.0.0.0", "::", "0", "192.168.1.7", "fe80::1%lo", "10.0.0.1", "::ffff:10.0.0.1", "no.such.name.invalid"],
    )
    def test_others_too(self, host: str) -> None:
        assert is_exposed(host, here=True)

    @pytest.mark.parametrize(
        ("host", "exposed"), [("localhost", False), ("127.0.0.1", False), ("box", True), ("0.0.0.0", True)]
    )
    def test_for_another_machine_names_are_not_looked_up(
        self, monkeypatch: pytest.MonkeyPatch, host: str, *, exposed: bool
    ) -> None:
        monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: pytest.fail("asked"))
        assert is_exposed(host, here=False) is exposed

    def test_a_name_with_one_address_outside(self, monkeypatch: pytest.MonkeyPatch) -> None:
        found = [(socket.AF_INET, 1, 6, "", (address, 0)) for address in ("127.0.0.1", "10.1.1.1")]
        monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: found)
        assert is_exposed("both", here=True)
        monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: found[:1])
        assert not is_exposed("both", here=True)


class TestGuard:
    def test_loopback_needs_none(self) -> None:
        guarded = guard(Request(), {}, here=True)
        assert guarded.request.api_key is None
        assert guarded.notes == ()

    def test_any_other_host_gets_one_that_is_not_made_yet(self) -> None:
        guarded = guard(Request(host="0.0.0.0"), {}, here=True)
        assert guarded.request.api_key == KEY_PLACEHOLDER
        assert guarded.request.key_file == str(key_file())
        assert str(key_file()) in guarded.notes[0]
        assert not key_file().exists()
        assert not usual_state_dir().exists()

    def test_made_once_and_kept(self) -> None:
        request = guard(Request(host="::"), {}, here=True).request
        first, second = with_key(request, {}), with_key(request, {})
        assert first.api_key == second.api_key == key_file().read_text().strip()
        assert first.api_key is not None
        assert len(first.api_key) >= 43
        assert check_key(first.api_key, "the file") == first.api_key
        assert guard(Request(host="::"), {}, here=True).notes == (f"key: in {key_file()}",)

    def test_a_key_by_variable_is_nothing_to_print_either(self) -> None:
        environ = {KEY_VARIABLE: "from-env"}
        guarded = guard(Request(api_key="from-env"), environ, here=True)
        assert guarded.request.api_key == KEY_PLACEHOLDER
        assert with_key(guarded.request, environ).api_key == "from-env"
        assert "from-env" not in repr(guarded)

    def test_a_given_one_stays(self) -> None:
        assert guard(Request(host="0.0.0.0", api_key="k"), {}, here=True).request.api_key == "k"

    def test_open_on_purpose(self) -> None:
        guarded = guard(Request(host="0.0.0.0", no_auth=True), {}, here=True)
        assert guarded.request.api_key is None
        assert "--no-auth" in guarded.notes[0]

    @pytest.mark.parametrize(
        "key",
        ["", " hunter2", "hunter2 ", "hunter\n2", "hunter\r2", "h\0", "h€", "\udc80h", KEY_PLACEHOLDER, "x" * 5000],
    )
    def test_what_no_header_can_carry(self, key: str) -> None:
        with pytest.raises(UsageError) as caught:
            check_key(key, "--api-key")
        assert not key or key not in caught.value.message + caught.value.hint


class TestTheFile:
    @pytest.mark.parametrize("umask", [0, 0o022, 0o077, 0o777])
    def test_is_ours_alone_whatever_the_umask(self, tmp_path: Path, umask: int) -> None:
        path = tmp_path / "state" / "mgpu" / "api-key"
        make_directory(path.parent)  # a umask of 0777 takes the rights of directories away, and that is its purpose
        before = os.umask(umask)
        try:
            key = kept_key(path)
        finally:
            os.umask(before)
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert [child.name for child in path.parent.iterdir()] == ["api-key"]
        assert path.read_text() == f"{key}\n"

    def test_directories_above_are_too(self, tmp_path: Path) -> None:
        before = os.umask(0)
        try:
            kept_key(tmp_path / "a" / "b" / "api-key")
        finally:
            os.umask(before)
        assert [stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "a", tmp_path / "a" / "b")] == [0o700] * 2

    def test_launches_at_once_have_the_same(self, tmp_path: Path) -> None:
        path, keys = tmp_path / "api-key", set[str]()
        threads = [threading.Thread(target=lambda: keys.add(kept_key(path))) for _ in range(16)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(keys) == 1

    def test_without_hard_links(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def no_links(*_: object, **__: object) -> None:
            raise PermissionError

        monkeypatch.setattr(os, "link", no_links)
        path = tmp_path / "api-key"
        assert kept_key(path) == kept_key(path)
        assert [child.name for child in tmp_path.iterdir()] == ["api-key"]

    @pytest.mark.parametrize("mode", [0o640, 0o604, 0o660, 0o644])
    def test_that_others_can_read_is_refused(self, tmp_path: Path, mode: int) -> None:
        path = tmp_path / "api-key"
        path.write_text("secret-secret\n")
        path.chmod(mode)
        with pytest.raises(RefusedError, match="others can read") as caught:
            kept_key(path)
        assert "secret-secret" not in caught.value.message + caught.value.hint
        assert f"rm {path}" in caught.value.hint

    def test_that_is_a_link_is_refused(self, tmp_path: Path) -> None:
        elsewhere = tmp_path / "elsewhere"
        elsewhere.write_text("secret-secret\n")
        elsewhere.chmod(0o600)
        for target in (elsewhere, tmp_path / "nowhere"):
            path = tmp_path / "api-key"
            path.unlink(missing_ok=True)
            path.symlink_to(target)
            with pytest.raises(RefusedError, match="a link"):
                kept_key(path)
        assert not (tmp_path / "nowhere").exists()

    @as_root
    def test_of_another_user_is_refused(self, tmp_path: Path) -> None:
        path = tmp_path / "api-key"
        path.write_text("secret-secret\n")
        path.chmod(0o600)
        os.chown(path, NOBODY, NOBODY)
        with pytest.raises(RefusedError, match="another user"):
            kept_key(path)

    @pytest.mark.parametrize("content", [b"", b"\n", b"a\nb\n", b"k" * 5000, b"\x00"])
    def test_without_a_key_in_it_is_refused(self, tmp_path: Path, content: bytes) -> None:
        path = tmp_path / "api-key"
        new_file(path, content)
        with pytest.raises(RefusedError, match="what is in it"):
            kept_key(path)

    @pytest.mark.parametrize("make", [lambda path: path.mkdir(), lambda path: os.mkfifo(path, 0o600)])
    def test_that_is_none_is_refused(self, tmp_path: Path, make: Callable[[Path], None]) -> None:
        make(tmp_path / "api-key")
        with pytest.raises(RefusedError):
            kept_key(tmp_path / "api-key")

    def test_where_nothing_can_be_written(self, tmp_path: Path) -> None:
        (tmp_path / "file").touch()
        with pytest.raises(RefusedError, match="cannot keep a key") as caught:
            kept_key(tmp_path / "file" / "api-key")
        assert KEY_VARIABLE in caught.value.hint


class TestPrivateFiles:
    def test_are_whole_and_ours_alone(self, tmp_path: Path) -> None:
        path = tmp_path / "a" / "b.json"
        before = os.umask(0)
        try:
            write_whole(path, b"1")
            write_whole(path, b"2")
        finally:
            os.umask(before)
        assert read_own(path, at_most=10) == b"2"
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
        assert list(path.parent.iterdir()) == [path]

    def test_take_the_place_of_a_link(self, tmp_path: Path) -> None:
        (tmp_path / "target").write_text("kept")
        (tmp_path / "link").symlink_to(tmp_path / "target")
        write_whole(tmp_path / "link", b"new")
        assert (tmp_path / "target").read_text() == "kept"
        with pytest.raises(FileExistsError):
            new_file(tmp_path / "target", b"")

    def test_that_others_could_have_written_count_for_nothing(self, tmp_path: Path) -> None:
        path = tmp_path / "probes.json"
        write_whole(path, b"{}")
        assert read_own(path, at_most=10) == b"{}"
        assert read_own(path, at_most=1) is None
        path.chmod(0o622)
        assert read_own(path, at_most=10) is None

    @as_root
    def test_nor_those_of_others(self, tmp_path: Path) -> None:
        path = tmp_path / "probes.json"
        write_whole(path, b"{}")
        os.chown(path, NOBODY, NOBODY)
        assert read_own(path, at_most=10) is None


class TestPlaces:
    @as_root
    def test_a_spare_directory_made_by_another_user_is_not_used(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
        (tmp_path / "file").touch()
        monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "file"))
        assert state_dir() == spare_state_dir()
        os.chown(spare_state_dir(), NOBODY, NOBODY)
        assert state_dir() == usual_state_dir()  # which says that it cannot be written

    def test_nor_a_link_nor_one_that_others_write_to(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
        (tmp_path / "file").touch()
        monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "file"))
        (tmp_path / "mine").mkdir(mode=0o700)
        spare_state_dir().symlink_to(tmp_path / "mine")
        assert state_dir() == usual_state_dir()
        spare_state_dir().unlink()
        spare_state_dir().mkdir(mode=0o700)
        assert state_dir() == spare_state_dir()
        spare_state_dir().chmod(0o777)
        assert state_dir() == usual_state_dir()

    def test_whatever_the_umask(self) -> None:
        before = os.umask(0)
        try:
            made = state_dir()
        finally:
            os.umask(before)
        assert [stat.S_IMODE(path.stat().st_mode) for path in (made, made.parent)] == [0o700, 0o700]


class TestTheLine:
    COMMAND: Final = Command(
        argv=("serve", "--x"), env={"A": "1", "API_KEY": KEY_PLACEHOLDER}, scrub=(), files={}, ready_url="", endpoint=""
    )

    def run(self, line: str, folder: Path, **variables: str) -> subprocess.CompletedProcess[str]:
        """In a shell that has a program `serve`."""
        write_program(folder / "serve", _SERVE)
        env = {"PATH": f"{folder}{os.pathsep}{os.environ['PATH']}", "LINE": line, **variables}
        return subprocess.run(["sh", "-c", 'eval "$LINE"'], env=env, capture_output=True, text=True, check=False)

    def test_reads_the_file(self, tmp_path: Path) -> None:
        path = tmp_path / "it's a key"
        line = shell_line(self.COMMAND, key_file=str(path))
        assert self.run(line, tmp_path).returncode != 0  # no key, no server
        key = kept_key(path)
        assert key not in line
        assert json.loads(self.run(line, tmp_path).stdout)[0] == key

    def test_puts_it_into_files(self, tmp_path: Path) -> None:
        path = tmp_path / "key"
        key = kept_key(path)
        command = replace(self.COMMAND, env={}, files={"keys.yml": f"api_key: \"{KEY_PLACEHOLDER}\"\nadmin: 'no'\n"})
        done = self.run(shell_line(command, ("OTHER",), key_file=str(path)), tmp_path)
        assert json.loads(done.stdout)[3] == [f"api_key: \"{key}\"\nadmin: 'no'\n"]

    def test_reads_the_variable_and_takes_it_away(self, tmp_path: Path) -> None:
        line = shell_line(self.COMMAND, to_scrub(self.COMMAND, {KEY_VARIABLE: "x"}))
        done = self.run(line, tmp_path, MGPU_API_KEY="it's $(one)")
        assert json.loads(done.stdout)[:2] == ["it's $(one)", None]
        assert self.run(line, tmp_path).stdout == ""  # no key, no server


class TestTheCommand:
    def test_a_generated_key_is_neither_printed_nor_made(
        self, mgpu: Mgpu, header: Header, machine: Callable[..., Env]
    ) -> None:
        for arguments in (("run", "--dry-run"), ("run", "--json"), ("plan",), ("plan", "--json")):
            done = mgpu(arguments[0], str(header(SMALL)), *arguments[1:], "--host", "0.0.0.0", env=machine())
            assert done.returncode == 0, done.stderr
            assert str(key_file()) in (done.stdout + done.stderr).replace("\n", "")
            assert not key_file().exists()

    @pytest.mark.parametrize("knows_file", [True, False])
    def test_nor_once_there_is_one(
        self, mgpu: Mgpu, header: Header, machine: Callable[..., Env], *, knows_file: bool
    ) -> None:
        key = kept_key(key_file())
        env = machine(knows_file=knows_file)
        for arguments in (("run", "--dry-run"), ("run", "--json"), ("plan",), ("plan", "--json")):
            done = mgpu(arguments[0], str(header(SMALL)), *arguments[1:], "--host", "0.0.0.0", env=env)
            assert done.returncode == 0, done.stderr
            assert key not in done.stdout + done.stderr

    def test_nor_one_by_variable(self, mgpu: Mgpu, header: Header, machine: Callable[..., Env]) -> None:
        for arguments in (("run", "--dry-run"), ("run", "--json"), ("plan",)):
            env = machine() | {KEY_VARIABLE: "by-variable"}
            done = mgpu(arguments[0], str(header(SMALL)), *arguments[1:], env=env)
            assert "by-variable" not in done.stdout + done.stderr
            assert KEY_VARIABLE in done.stdout + done.stderr

    def test_a_key_and_none(self, mgpu: Mgpu, header: Header) -> None:
        arguments = ("plan", str(header(SMALL)), "--rig", "3090", "--no-auth")
        both = mgpu(*arguments, "--api-key", "k")
        assert both.returncode == 2
        assert "--no-auth" in both.stderr
        assert mgpu(*arguments, env={KEY_VARIABLE: "k"}).returncode == 0

    @pytest.mark.parametrize("runtime", ["ollama"])
    def test_a_runtime_that_asks_nobody_is_refused(self, mgpu: Mgpu, header: Header, runtime: str) -> None:
        arguments = ("run", str(header(SMALL)), "--rig", "3090", "--dry-run", "--runtime", runtime, "--host", "0.0.0.0")
        done = mgpu(*arguments)
        assert done.returncode == 3
        assert "needs a key" in done.stderr
        assert "--no-auth" in done.stderr
        opened = mgpu(*arguments, "--no-auth")
        assert opened.returncode == 0, opened.stderr
        assert "OLLAMA_HOST=0.0.0.0" in opened.stdout
        assert "whoever reaches 0.0.0.0" in opened.stderr

    @pytest.mark.parametrize("words", [("--host", "0.0.0.0"), ("--port", "1"), ("--api-key", "k")])
    def test_what_stands_after_dashes_opens_nothing(self, mgpu: Mgpu, header: Header, words: tuple[str, ...]) -> None:
        done = mgpu("run", str(header(SMALL)), "--rig", "3090", "--dry-run", "--", *words)
        assert done.returncode == 2
        assert "would bypass mgpu" in done.stderr

    @pytest.mark.parametrize("word", ["--host=0.0.0.0", "--hos=0.0.0.0", "--ho", "--api-k=x", "--api_key=x", "--por=1"])
    def test_nor_shortened_for_vllm(self, word: str) -> None:
        with pytest.raises(UsageError, match="would bypass"):
            read_flags((word, "x"))

    @pytest.mark.parametrize("key", [",", 'a"b', "a,b"])
    def test_llama_cpp_would_take_it_for_several(self, mgpu: Mgpu, header: Header, key: str) -> None:
        done = mgpu("run", str(header(SMALL)), "--rig", "3090", "--dry-run", "--api-key", key)
        assert done.returncode == 2
        assert "another key" in done.stderr


class TestALaunch:
    @pytest.mark.parametrize("knows_file", [True, False])
    def test_elsewhere_is_guarded_and_the_key_nowhere_to_be_seen(
        self, header: Header, machine: Callable[..., Env], tmp_path: Path, python_path: str, *, knows_file: bool
    ) -> None:
        env = machine(knows_file=knows_file) | {KEY_VARIABLE: ""}
        with serving("run", str(header(SMALL)), "--host", "0.0.0.0", env=env, python_path=python_path) as (
            running,
            url,
        ):
            key = key_file().read_text().strip()
            assert stat.S_IMODE(key_file().stat().st_mode) == 0o600
            assert status_of(f"{url}/completion") == 401
            assert status_of(f"{url}/completion", "wrong") == 401
            assert status_of(f"{url}/completion", key) == 200
            (record,) = started(tmp_path)
            assert key not in "".join(record["argv"])
            assert ("--api-key-file" in record["argv"]) == knows_file
            assert "MGPU_API_KEY" not in record["env"]
            assert f"key: in {key_file()}" in running.stderr
        assert key not in running.stderr
        assert holding(key) == [key_file()]

    def test_a_given_key_reaches_the_runtime_by_its_environment(
        self, header: Header, machine: Callable[..., Env], tmp_path: Path, python_path: str
    ) -> None:
        env = machine() | {KEY_VARIABLE: "sk-by-variable"}
        with serving("run", str(header(SMALL)), env=env, python_path=python_path) as (running, url):
            assert status_of(f"{url}/completion") == 401
            assert status_of(f"{url}/completion", "sk-by-variable") == 200
            (record,) = started(tmp_path)
            assert record["env"]["LLAMA_API_KEY"] == "sk-by-variable"
            assert "MGPU_API_KEY" not in record["env"]
            for process in below(psutil.Process(running.process.pid)):
                assert "sk-by-variable" not in " ".join(process.cmdline()).replace("--api-key sk-by-variable", "")
        assert "sk-by-variable" not in running.stderr
        assert holding("sk-by-variable") == []

    @needs_nginx
    def test_through_a_proxy(
        self, header: Header, machine: Callable[..., Env], python_path: str, tmp_path: Path
    ) -> None:
        env = machine() | {"MGPU_PROXY": "nginx"}
        arguments = ("run", str(header(SMALL)), "--users", "2", "--host", "0.0.0.0")
        with serving(*arguments, env=env, python_path=python_path) as (running, url):
            key = key_file().read_text().strip()
            assert "nginx before 2 replicas" in running.stderr
            assert status_of(f"{url}/completion") == 401
            assert status_of(f"{url}/v1/chat/completions") == 401
            assert status_of(f"{url}/completion", key) == 200
            replicas = started(tmp_path)
            assert [words[words.index("--host") + 1] for words in (one["argv"] for one in replicas)] == [
                "127.0.0.1"
            ] * 2
            for process in below(psutil.Process(running.process.pid)):
                if "fake_llama_server" not in " ".join(process.cmdline()):
                    assert key not in " ".join(process.cmdline())
        assert holding(key) == [key_file()]

    def test_files_are_ours_alone_with_umask_0(
        self, header: Header, machine: Callable[..., Env], mgpu: Mgpu, tmp_path: Path
    ) -> None:
        before = os.umask(0)
        try:
            done = mgpu("run", str(header(SMALL)), "--host", "0.0.0.0", "--prompt", "Hi", env=machine())
        finally:
            os.umask(before)
        assert done.returncode == 0, done.stderr
        del tmp_path
        loose = [path for path in everything() if path.lstat().st_mode & 0o077 and not path.is_symlink()]
        assert loose == []


@pytest.mark.runtime
def test_a_real_server_elsewhere(real_gguf: Path, llama_server: str, python_path: str) -> None:
    """With the real llama-server: ready, guarded, and the key in nobody's arguments."""
    env = {"MGPU_LLAMA_SERVER": llama_server}
    arguments = ("run", str(real_gguf), "--host", "0.0.0.0", "--ctx", "512", "--offload", "allow")
    with serving(*arguments, env=env, python_path=python_path) as (running, url):
        key = key_file().read_text().strip()
        assert status_of(f"{url}/completion") == 401
        assert status_of(f"{url}/completion", key) == 200
        processes = below(psutil.Process(running.process.pid))
        assert any("llama-server" in process.name() for process in processes)
        for process in processes:
            assert key not in " ".join(process.cmdline())
    assert holding(key) == [key_file()]


def everything() -> list[Path]:
    """All that mgpu has written below this test's home."""
    homes = (Path(os.environ[name]) for name in ("XDG_STATE_HOME", "XDG_CACHE_HOME", "XDG_CONFIG_HOME"))
    return [path for home in homes if home.exists() for path in (home, *home.rglob("*"))]


def holding(key: str) -> list[Path]:
    return [path for path in everything() if path.is_file() and key.encode() in path.read_bytes()]


class TestRedact:
    @pytest.mark.parametrize(
        ("text", "secret"),
        [
            ("Authorization: Bearer abc.def", "abc.def"),
            ('"authorization": "Basic dXNlcjpwYXNz"', "dXNlcjpwYXNz"),
            ("X-Swarm-Token: 0123abcd", "0123abcd"),
            ("HF_TOKEN=hunter2 vllm serve", "hunter2"),
            ("export MY_SECRET='two words'", "two words"),
            ('api_key: "s3cret"', "s3cret"),
            ('{"api_key": "s\\"3"}', 's\\"3'),
            ("llama-server --hf-token hunter2 -m x", "hunter2"),
            ("llama-server -hft hunter2 -m x", "hunter2"),
            ("--api-key 'a b'", "a b"),
            ("password=hunter2", "hunter2"),
            ("INFO: Your API key is: 0123abc", "0123abc"),
            ("INFO: Your admin key is: 0123abc", "0123abc"),
            ("http://me:pw@host/x", "me:pw"),
            ("https://host/x?token=abc&y=1", "abc"),
            ("https://host/x?y=1&X-Amz-Signature=abcd", "abcd"),
            ("found hf_abcdefghijkl in it", "hf_abcdefghijkl"),
            ("ghp_0123456789abcdef0123", "ghp_0123456789abcdef0123"),
            ("sk-0123456789abc", "sk-0123456789abc"),
            ("-----BEGIN PRIVATE KEY-----\nabc\n-----END PRIVATE KEY-----", "abc"),
        ],
    )
    def test_what_looks_like_a_secret(self, text: str, secret: str) -> None:
        redacted = redact(text, home="")
        assert secret not in redacted
        assert MASK in redacted

    @pytest.mark.parametrize(
        "text",
        [
            "print_info: BOS token        = 1 '<s>'",
            "print_info: EOG token        = 2 '</s>'",
            "max_tokens=512, n_tokens = 7",
            "--api-key-file /x/api-key",
            "load_tensors: CUDA0 model buffer size = 4403.49 MiB",
            "http://127.0.0.1:8080/v1",
            "tokenizer.ggml.bos_token_id u32",
            "the key in PATH",
        ],
    )
    def test_what_does_not(self, text: str) -> None:
        assert redact(text, home="") == text

    def test_the_home(self) -> None:
        home = "/home/jane"
        assert redact("in /home/jane/x and /home/jane, not /home/janet", home=home) == "in ~/x and ~, not /home/janet"
        assert redact("/x", home="/") == "/x"

    def test_overlapping_ones(self) -> None:
        assert redact("xabcdy", ("abc", "bcd"), home="") == f"x{MASK}y"

    def test_words(self) -> None:
        words = ("-m", "x", "--hf-token", "hunter2", "--api-key=k3y", "--ctx", "5")
        assert redact_words(words) == ("-m", "x", "--hf-token", MASK, f"--api-key={MASK}", "--ctx", "5")

    def test_secret_variables(self) -> None:
        environ = {"HF_TOKEN": "hunter2", "PATH": "/usr/bin", "X_PASSWORD": "pass-word", "SOME_KEY": "1"}
        assert set(secrets_of(environ, "k", None)) == {"hunter2", "pass-word", "k"}

    @settings(max_examples=500, deadline=None)
    @given(data=st.data(), secrets=st.lists(st.text(min_size=1, max_size=12), min_size=1, max_size=4))
    def test_no_secret_survives(self, data: st.DataObject, secrets: list[str]) -> None:
        forms = [*secrets, *map(json.dumps, secrets), *map(shlex.quote, secrets)]
        pieces = data.draw(st.lists(st.one_of(st.text(max_size=8), st.sampled_from(forms)), max_size=8))
        redacted = redact("".join(pieces), secrets, home="/home/jane")
        for secret in secrets:
            assert not secret.strip("*") or secret not in redacted or secret in MASK

    @settings(max_examples=300, deadline=None)
    @given(st.text(max_size=200))
    def test_twice_is_as_once(self, text: str) -> None:
        once = redact(text, home="")
        assert len(redact(once, home="")) <= len(once) + len(MASK) * text.count("=")

    def test_takes_a_long_log_in_time(self) -> None:
        started_at = time.process_time()
        for piece in ("a_", "x://", "sk-", "eyJ-", "--a-", "?a=", "-----BEGIN ", "authorization", "key: ", '"\\'):
            redact(piece * 20_000, ("nothing",), home="/home/jane")
        assert time.process_time() - started_at < 10


def test_what_is_ours_is_not_the_runtimes() -> None:
    command = Command(argv=("x",), env={}, scrub=(), files={}, ready_url="", endpoint="")
    assert environment(command, {KEY_VARIABLE: "k", "HOME": "/h"}) == {"HOME": "/h"}


def test_no_shell() -> None:
    """Programs are started by their words. What is printed for people to paste is never run by us."""
    shells = re.compile(
        r"shell\s*=\s*True|os\.system|os\.popen|getoutput|getstatusoutput|spawnl|create_subprocess_shell"
    )
    for root in ("launcher", "adapters", "profiles"):
        for path in (ROOT / root).rglob("*.py"):
            assert shells.search(path.read_text(encoding="utf-8")) is None, path
    for path in (ROOT / "launcher").rglob("*.py"):
        assert '"sh"' not in path.read_text(encoding="utf-8"), path
