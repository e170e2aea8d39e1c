"""A FAKE Ollama in a process of its own, and what it has seen; a store with a model in it."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from msgspec import Struct

FAKE: Final = Path(__file__).with_name("fake_ollama.py")

#: One of each era of its scheduler.
VERSIONS: Final = ("0.33.0", "0.24.0", "0.9.0")


class Server(Struct, frozen=True, kw_only=True):
    """Where it listens, and the file in which it writes what happens."""

    url: str
    journal: Path
    pid: int

    def seen(self, event: str) -> list[dict[str, Any]]:
        return seen(self.journal, event)

    def requests(self) -> list[str]:
        """`"POST /api/create"`, in order."""
        return [f"{entry['method']} {entry['path']}" for entry in self.seen("request")]

    def ask(self, path: str) -> Any:
        from urllib.request import urlopen

        with urlopen(self.url + path, timeout=5) as answer:
            return json.loads(answer.read())


def seen(journal: Path, event: str) -> list[dict[str, Any]]:
    lines = journal.read_text(encoding="utf-8").splitlines() if journal.exists() else []
    return [entry for entry in map(json.loads, lines) if entry["event"] == event]


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        port: int = server.getsockname()[1]
        return port


@contextmanager
def serving(directory: Path, *, version: str = "0.33.0", fault: str = "", **more: str) -> Iterator[Server]:
    """A fake server until the end. `more`: its environment, as FAKE_OLLAMA_VRAM."""
    port, journal = free_port(), directory / "journal.jsonl"
    process = subprocess.Popen(
        [sys.executable, FAKE, "serve"],
        env={
            **os.environ,
            "OLLAMA_HOST": f"127.0.0.1:{port}",
            "FAKE_OLLAMA_VERSION": version,
            "FAKE_OLLAMA_FAULT": fault,
            "FAKE_OLLAMA_JOURNAL": str(journal),
            **more,
        },
    )
    try:
        deadline = time.monotonic() + 10
        while not seen(journal, "start"):
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.02)
        time.sleep(0.05)  # from its first line to its first answer
        yield Server(url=f"http://127.0.0.1:{port}", journal=journal, pid=process.pid)
    finally:
        process.kill()
        process.wait()


def put_in_store(store: Path, name: str, gguf: Path) -> Path:
    """`gguf` in `store` as `host/namespace/model/tag` (all parts given); its blob."""
    digest = hashlib.sha256(name.encode()).hexdigest()  # of its name: files here are gigabytes of holes
    blob = store / "blobs" / f"sha256-{digest}"
    blob.parent.mkdir(parents=True, exist_ok=True)
    if gguf.stat().st_size < 1 << 20:
        shutil.copyfile(gguf, blob)
    else:
        blob.symlink_to(gguf)
    manifest = store / "manifests" / name
    manifest.parent.mkdir(parents=True, exist_ok=True)
    layers = [
        {"mediaType": "application/vnd.ollama.image.template", "digest": f"sha256:{'0' * 64}", "size": 3},
        {"mediaType": "application/vnd.ollama.image.model", "digest": f"sha256:{digest}", "size": 9},
    ]
    manifest.write_text(json.dumps({"schemaVersion": 2, "layers": layers}), encoding="utf-8")
    return blob
