"""FAKE services as processes of their own: started with a port of their choice, stopped at the end of a test."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_PATIENCE_S = 20.0


@contextmanager
def started(script: str, folder: Path, *arguments: str) -> Iterator[str]:
    """`http://127.0.0.1:PORT` of tests/SCRIPT, which writes its port to `--port-file`."""
    port_file = folder / f"{script}.port"
    port_file.unlink(missing_ok=True)
    path = Path(__file__).parent / script
    process = subprocess.Popen([sys.executable, str(path), "--port-file", str(port_file), *arguments])
    try:
        wait_for(port_file.exists, f"{script} to listen")
        yield f"http://127.0.0.1:{port_file.read_text()}"
    finally:
        process.kill()
        process.wait()


def wait_for(happened: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + _PATIENCE_S
    while not happened():
        assert time.monotonic() < deadline, f"waited in vain for {what}"
        time.sleep(0.02)


def recorded(path: Path) -> list[dict[str, Any]]:
    """What a fake has noted of its requests."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


class Running:
    """`mgpu` under way in a process of its own; what it says on stderr comes as it is said."""

    def __init__(self, *arguments: str, env: dict[str, str]) -> None:
        self._said: list[str] = []
        self.process = subprocess.Popen(
            [sys.executable, "-m", "mgpu", *arguments],
            env={**os.environ, **env},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    @property
    def stderr(self) -> str:
        return "".join(self._said)

    def wait_until(self, words: str) -> None:
        """Until it has said `words`."""
        wait_for(lambda: words in self.stderr or self.process.poll() is not None, words)
        assert words in self.stderr, self.stderr

    def interrupt(self) -> int:
        """Ctrl-C; the exit code."""
        self.process.send_signal(signal.SIGINT)
        return self.wait()

    def wait(self) -> int:
        """The exit code."""
        code = self.process.wait(_PATIENCE_S)
        self._reader.join(_PATIENCE_S)
        return code

    def _read(self) -> None:
        assert self.process.stderr is not None
        with self.process.stderr as stream:
            self._said.extend(iter(stream.readline, ""))
