"""Finding a runtime and asking it what it can: with real executables, good and broken ones."""

from __future__ import annotations

import os
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from mgpu.adapter import Search
from mgpu.errors import RuntimeMissingError
from mgpu.launch.find import Found, find_runtime
from mgpu.launch.probe import list_devices, probe_runtime

SEARCH = Search(
    variable="MGPU_TEST_SERVER",
    executables=("test-server", "server-of-old"),
    package_files=("test_server_package/bin/test-server",),
    install="pip install test-server",
)

Make = Callable[..., Path]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    def make_executable(path: str, body: str = "echo hello", *, mode: int = 0o755) -> Path:
        file = tmp_path / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"#!/bin/sh\n{body}\n")
        file.chmod(mode)
        return file

    return make_executable


def found(executable: Path) -> Found:
    return Found(executable=str(executable), origin="PATH", install=SEARCH.install)


def environ(**variables: str) -> dict[str, str]:
    return {"PATH": os.defpath} | variables


def test_the_order_of_search(make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    explicit, named = make("explicit/any-name"), make("named/any-name")
    on_path, old = make("path/test-server"), make("path/server-of-old")
    packaged = make("site/test_server_package/bin/test-server")
    monkeypatch.setattr(sys, "path", [str(tmp_path / "nowhere"), str(tmp_path / "site")])
    env = environ(PATH=f"{tmp_path}/nowhere::{tmp_path}/path", MGPU_TEST_SERVER=str(named))

    def look(given: str | None, env: dict[str, str]) -> tuple[str, str] | None:
        result = find_runtime(SEARCH, explicit=given, environ=env)
        return None if result is None else (result.executable, result.origin)

    assert look(str(explicit), env) == (str(explicit), "--llama-server")
    assert look("test-server", env) == (str(on_path), "--llama-server")
    assert look(None, env) == (str(named), "$MGPU_TEST_SERVER")
    env["MGPU_TEST_SERVER"] = ""
    assert look(None, env) == (str(on_path), "PATH")
    on_path.unlink()
    assert look(None, env) == (str(old), "PATH")
    old.chmod(0o644)
    assert look(None, env) == (str(packaged), "the Python package test_server_package")
    packaged.unlink()
    assert look(None, env) is None


@pytest.mark.parametrize(
    ("path", "flaw"), [("absent", "no such file"), ("plain", "not executable"), (".", "directory")]
)
@pytest.mark.parametrize("by_variable", [False, True])
def test_one_named_by_hand_is_not_replaced(make: Make, tmp_path: Path, path: str, flaw: str, by_variable: bool) -> None:
    make("test-server")
    make("plain", mode=0o644)
    given = str(tmp_path / path)
    env = environ(PATH=str(tmp_path)) | ({"MGPU_TEST_SERVER": given} if by_variable else {})
    with pytest.raises(RuntimeMissingError, match=flaw) as error:
        find_runtime(SEARCH, explicit=None if by_variable else given, environ=env)
    assert given in error.value.message
    assert ("$MGPU_TEST_SERVER" if by_variable else "--llama-server") in error.value.message
    assert SEARCH.install in error.value.hint


def test_probes_are_asked_once_per_state_of_the_file(make: Make, tmp_path: Path) -> None:
    server = make("bin/server", 'echo "$1 out"; echo err >&2; echo run >>"$COUNT"')
    runs, cache = tmp_path / "runs", tmp_path / "cache" / "probes.json"
    env = environ(COUNT=str(runs))

    def probe() -> dict[str, str]:
        return dict(probe_runtime(found(server), ("--version", "--help"), environ=env, cache=cache).outputs)

    answers = {"--version": "--version out\nerr\n", "--help": "--help out\nerr\n"}
    assert probe() == probe() == answers
    assert runs.read_text() == "run\n" * 2
    os.utime(server, (1, 1))
    assert probe() == answers
    assert runs.read_text() == "run\n" * 4
    (server.parent / "libserver.so").touch()  # an upgrade may change the library alone
    assert probe() == answers
    assert runs.read_text() == "run\n" * 6
    cache.write_bytes(b'{"half": ')
    assert probe() == answers
    cache.unlink()
    cache.mkdir()  # cannot be written
    assert probe() == answers
    assert runs.read_text() == "run\n" * 10


def test_devices_are_listed_anew_in_the_given_environment(make: Make) -> None:
    server = make("server", 'echo "$1 $CUDA_VISIBLE_DEVICES"')
    assert list_devices(found(server), "--list-devices", {"CUDA_VISIBLE_DEVICES": "1"}) == "--list-devices 1\n"
    assert list_devices(found(server), "--list-devices", {"CUDA_VISIBLE_DEVICES": "0"}) == "--list-devices 0\n"


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("echo working; echo the reason >&2; echo; exit 3", "exited with status 3 at `--help`: the reason"),
        ("kill -SEGV $$", "was killed by SIGSEGV"),
        ("exit 1", "no output"),
        ("sleep 60", "no end"),
        ("sleep 60 & echo done", "no end"),
        ("yes", "no end"),
        ("exec >&- 2>&-; sleep 60", "no end"),
    ],
    ids=["fails", "crashes", "silent", "hangs", "leaves-a-child", "endless", "closes-its-output"],
)
def test_one_that_cannot_answer(make: Make, tmp_path: Path, body: str, reason: str) -> None:
    server = make("server", body)
    started = time.monotonic()
    with pytest.raises(RuntimeMissingError, match=reason) as error:
        probe_runtime(found(server), ("--help",), environ=environ(), cache=tmp_path / "c", timeout_s=0.5)
    assert time.monotonic() - started < 10
    assert str(server) in error.value.message
    assert SEARCH.install in error.value.hint
    assert not (tmp_path / "c").exists()
    assert not [p for p in psutil.process_iter(["cmdline"]) if str(server) in (p.info["cmdline"] or ())]


def test_another_architecture(tmp_path: Path) -> None:
    server = tmp_path / "server"
    elf = bytearray(Path(sys.executable).resolve().read_bytes()[:4096])
    elf[18:20] = b"\xf7\xf0"  # e_machine
    server.write_bytes(elf)
    server.chmod(0o755)
    with pytest.raises(RuntimeMissingError, match="cannot be run: Exec format error"):
        probe_runtime(found(server), ("--help",), environ=environ(), cache=tmp_path / "c")


@pytest.mark.skipif(sys.platform != "linux", reason="edits an ELF file")
def test_a_missing_shared_library(tmp_path: Path) -> None:
    true = Path(shutil.which("true") or "/bin/true").read_bytes()
    server = tmp_path / "server"
    server.write_bytes(true.replace(b"libc.so.6\0", b"libX.so.6\0"))
    server.chmod(0o755)
    if server.read_bytes() == true:
        pytest.skip("`true` is linked statically here")
    with pytest.raises(RuntimeMissingError, match=r"status 127 .*libX\.so\.6"):
        probe_runtime(found(server), ("--help",), environ=environ(), cache=tmp_path / "c")


def test_one_that_is_gone(tmp_path: Path) -> None:
    with pytest.raises(RuntimeMissingError, match="No such file"):
        probe_runtime(found(tmp_path / "gone"), ("--help",), environ=environ(), cache=tmp_path / "c")
