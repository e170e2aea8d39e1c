"""What holds of every Ollama: a FAKE one of each era, and a real one where $OLLAMA_HOST answers.

With a real one: `OLLAMA_HOST=127.0.0.1:11434 MGPU_TEST_GGUF=/path/to/small.gguf pytest tests/test_ollama_shared.py`.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import pytest
from msgspec import Struct

from conftest import Mgpu
from gguf_writer import small_llama
from mgpu.launch.services import find_service
from mgpu.request import RUNTIME_NAMES
from mgpu_adapters.ollama.adapter import Ollama
from ollama_server import VERSIONS, serving

Run = Callable[..., "subprocess.CompletedProcess[str]"]


class Subject(Struct, frozen=True, kw_only=True):
    """A server, and a file that it can load."""

    url: str
    gguf: Path

    def ask(self, path: str) -> Any:
        with urlopen(self.url + path, timeout=10) as answer:
            return json.loads(answer.read())

    def names(self, path: str) -> set[str]:
        """Ours alone: a real server has others."""
        return {row["name"] for row in self.ask(path)["models"] or () if row["name"].startswith("mgpu-shared")}


@pytest.fixture(params=[*VERSIONS, "real"])
def subject(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Subject]:
    if request.param != "real":
        path = tmp_path / "shared.gguf"
        path.write_bytes(small_llama())
        with serving(tmp_path, version=request.param) as server:
            yield Subject(url=server.url, gguf=path)
        return
    running = find_service(Ollama.service, os.environ) if "OLLAMA_HOST" in os.environ else None
    if running is None:
        pytest.skip("no real Ollama: none answers at $OLLAMA_HOST")
    path = tmp_path / "shared.gguf"
    path.symlink_to(request.getfixturevalue("real_gguf"))
    yield Subject(url=running.url, gguf=path)


@pytest.fixture
def run(mgpu: Mgpu, subject: Subject) -> Run:
    def call(*arguments: str) -> subprocess.CompletedProcess[str]:
        env = {"PATH": "/usr/bin:/bin", "OLLAMA_HOST": subject.url}
        return mgpu("run", "--runtime", "ollama", *arguments, env=env, timeout=600)

    return call


def test_asked_once_and_nothing_is_left(run: Run, subject: Subject) -> None:
    done = run(str(subject.gguf), "--ctx", "1024", "--prompt", "Say hello.", "--", "--rm", "seed=1")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
    assert "ready after" in done.stderr
    assert subject.names("/api/ps") == set()
    assert subject.names("/api/tags") == set()


def test_an_import_is_used_again(run: Run, subject: Subject) -> None:
    first = run(str(subject.gguf), "--ctx", "1024", "--prompt", "Hi")
    assert first.returncode == 0, first.stderr
    (kept,) = subject.names("/api/tags")
    assert kept in first.stderr
    second = run(str(subject.gguf), "--ctx", "1024", "--prompt", "Hi", "--", "--rm")
    assert second.returncode == 0, second.stderr
    assert "imported" not in second.stderr
    assert subject.names("/api/tags") == set()


def test_a_parameter_that_there_is_not(run: Run, subject: Subject) -> None:
    done = run(str(subject.gguf), "--ctx", "1024", "--prompt", "Hi", "--", "--rm", "no_such_thing=1")
    assert done.returncode == 7
    assert "no_such_thing" in done.stderr
    assert "Traceback" not in done.stderr
    assert subject.names("/api/tags") == set()


def test_its_name_is_one_that_is_known() -> None:
    assert Ollama.name in RUNTIME_NAMES
