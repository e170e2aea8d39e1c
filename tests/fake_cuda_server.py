"""A FAKE llama-server on FAKE cards: it takes memory as the real one would, and what is not there ends it.

    python fake_cuda_server.py FOLDER ARGUMENTS-OF-LLAMA-SERVER…

FOLDER/held/UUID.PID   bytes that a process holds; the FAKE NVML subtracts them while it lives ($FAKE_NVML_HELD)
FOLDER/hidden/UUID     bytes that are not there, though the driver says they were
FOLDER/extra/UUID      bytes that it wants beside weights and cache: more than anybody could have known
FOLDER/gates/weights   while it exists, nothing is taken yet; `cache`: the weights alone; `serve`: it is not ready
FOLDER/ram             bytes of RAM that it takes first
FOLDER/starts          a line of JSON for each start: pid, argv, uuids
FOLDER/server          more arguments for the FAKE llama-server
"""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import re
import shlex
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import fake_llama_server
from fake_llama_server import log

_PLAIN_LOAD = fake_llama_server._load

MIB = 1 << 20
KV_PER_TOKEN = 128 << 10  # Llama 3.1 8B, f16
LAYERS = 33  # with the output layer
COMPUTE = 260 * MIB
CONTEXT = 300 * MIB  # of the driver


class Cards:
    """The cards of one start, in the order of CUDA_VISIBLE_DEVICES."""

    def __init__(self, folder: Path, words: list[str]) -> None:
        self.folder = folder
        self.words = words
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
        self.uuids = [uuid for uuid in visible.split(",") if uuid] if self.option("--device") != "none" else []
        with (folder / "starts").open("a", encoding="utf-8") as out:
            out.write(f"{json.dumps({'pid': os.getpid(), 'argv': words, 'uuids': self.uuids})}\n")

    def option(self, flag: str, default: str = "") -> str:
        """The last value, as llama-server takes it."""
        found = [self.words[at + 1] for at, word in enumerate(self.words[:-1]) if word == flag]
        return found[-1] if found else default

    def load(self, options: argparse.Namespace) -> None:
        weights = Path(self.option("--model")).stat().st_size
        ctx = int(self.option("-c") or self.option("--ctx-size", "4096"))
        on_cards = min(int(self.option("-ngl") or self.option("--n-gpu-layers", "0")), LAYERS) / LAYERS
        log("load_model: loading model")
        self.wait("weights")
        ram = self.folder / "ram"
        eaten = b"x" * int(ram.read_text()) if ram.exists() else b""
        log(f"load_model: {len(eaten)} bytes of RAM")
        for number, share in enumerate(self.shares()):
            size = int(weights * on_cards * share)
            self.take(number, "model", size, beside=CONTEXT)
        self.wait("cache")
        for number, share in enumerate(self.shares()):
            self.take(number, "KV", int(ctx * KV_PER_TOKEN * on_cards * share))
        for number, _ in enumerate(self.shares()):
            self.take(number, "compute", COMPUTE + self.number("extra", number))
        self.wait("serve")
        _PLAIN_LOAD(options)

    def shares(self) -> list[float]:
        if not self.uuids:
            return []
        counts = [float(word) for word in self.option("--tensor-split", "1").split(",")]
        return [count / sum(counts) for count in counts]

    def take(self, number: int, kind: str, size: int, beside: int = 0) -> None:
        uuid = self.uuids[number]
        with self.lock():
            if size + beside > self.free(number):
                asked = f"allocating {size / MIB:.2f} MiB on device {number}"
                log(f"alloc_buffer: {asked}: cudaMalloc failed: out of memory")
                log(f"alloc_tensor_range: failed to allocate CUDA{number} buffer of size {size}")
                log("llama_model_load: error loading model: unable to allocate CUDA buffer")
                log("exiting due to model loading error")
                os._exit(1)
            mine = self.folder / "held" / f"{uuid}.{os.getpid()}"
            before = int(mine.read_text()) if mine.exists() else 0
            draft = self.folder / f"draft-{os.getpid()}"
            draft.write_text(str(before + size + beside))
            draft.replace(mine)
        log(f"load: CUDA{number} {kind} buffer size = {size / MIB:.2f} MiB")

    def free(self, number: int) -> int:
        """Of the card's memory, as `fakenvml.c` counts it, less what is hidden."""
        uuid = self.uuids[number]
        config = Path(os.environ["FAKE_NVML_CONFIG"]).read_text(encoding="utf-8")
        (card,) = [text for text in config.split("[[gpu]]") if f'"{uuid}"' in text]
        figures = {key: int(value) for key, value in re.findall(r"^(mem_\w+) = (\d+)$", card, re.MULTILINE)}
        free = figures["mem_total"] - figures["mem_reserved"] - figures["mem_used"] - self.number("hidden", number)
        return free - sum(int(path.read_text()) for path in self.living(uuid))

    def living(self, uuid: str) -> Iterator[Path]:
        for path in (self.folder / "held").glob(f"{uuid}.*"):
            if Path(f"/proc/{path.suffix[1:]}").exists():
                yield path

    def number(self, kind: str, number: int) -> int:
        path = self.folder / kind / self.uuids[number]
        return int(path.read_text()) if path.exists() else 0

    def wait(self, gate: str) -> None:
        while (self.folder / "gates" / gate).exists():
            time.sleep(0.01)

    @contextmanager
    def lock(self) -> Iterator[None]:
        with (self.folder / "lock").open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield


def main() -> None:
    folder, words = Path(sys.argv[1]), sys.argv[2:]
    cards = Cards(folder, words)
    more = folder / "server"
    sys.argv = [sys.argv[0], "--port", cards.option("--port"), *shlex.split(more.read_text() if more.exists() else "")]
    fake_llama_server._load = cards.load  # the other half of the same fake
    fake_llama_server.main()


if __name__ == "__main__":
    main()
