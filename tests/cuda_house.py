"""A house whose FAKE cards are taken and given back: what a FAKE llama-server allocates, the FAKE driver tells."""

from __future__ import annotations

import json
import os
import signal
import zlib
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

from fake_build import CUDA, build_program
from fakenvml.machine import Machine, rtx_3090
from launching import FAST, TUNED, House, wait_for

GIB: Final = 1 << 30

_SERVER: Final = str(Path(__file__).parent / "fake_cuda_server.py")

_STARTED: Final = "os.execv(sys.executable, [sys.executable, {server!r}, {folder!r}, *words])\n"


def card(number: int, gib: float = 24.0) -> dict[str, int | str]:
    """A card with `gib` of memory, as if it were an RTX 3090."""
    return rtx_3090(number, mem_total=int(gib * GIB))


def uuid_of(number: int) -> str:
    return str(rtx_3090(number)["uuid"])


class CudaHouse(House):
    """`start`, `call`, … as in any house; models of 4.6 GiB take about 6 GiB of a card."""

    def __init__(self, folder: Path, python_path: str, nvml: Path, header: Callable[[str], Path]) -> None:
        super().__init__(folder, python_path, nvml, header("Llama-3.1-8B-Instruct-Q4_K_M"))
        self.python_path = python_path
        self.cards = folder / "cards"
        for name in ("held", "hidden", "extra", "gates"):
            (self.cards / name).mkdir(parents=True)
        self.lists(CUDA)
        self.env["FAKE_NVML_HELD"] = str(self.cards / "held")
        self.first_port = 20_000 + zlib.crc32(str(folder).encode()) % 30_000
        self.env |= self.tuned({})

    def tuned(self, settings: Mapping[str, Any] = FAST, **env: str) -> dict[str, str]:
        """As in any house, with ports that no other house takes meanwhile."""
        first = {f"mgpu.launch.{module}.FIRST_PORT": self.first_port for module in ("serve", "fleet", "keeper")}
        path = f"{TUNED}{os.pathsep}{self.python_path}"
        return {"PYTHONPATH": path, "MGPU_TUNED": json.dumps({**first, **settings}), **env}

    def has(self, *gib: float) -> None:
        """From now on the machine has cards of these sizes."""
        self.machine(Machine(*(card(number, size) for number, size in enumerate(gib))))

    def lists(self, devices: str) -> None:
        """From now on llama-server lists these devices."""
        self.server(build_program(_STARTED.format(server=_SERVER, folder=str(self.cards)), devices=devices))

    def behaves(self, arguments: str) -> None:
        """More arguments for servers started from now on, as tests/fake_llama_server.py knows them."""
        (self.cards / "server").write_text(arguments)

    def hold(self, number: int, gib: float) -> None:
        """Another program holds this much of a card; the driver says so."""
        (self.cards / "held" / f"{uuid_of(number)}.{os.getpid()}").write_text(str(int(gib * GIB)))

    def hide(self, number: int, gib: float) -> None:
        """This much of a card cannot be had; the driver says nothing."""
        (self.cards / "hidden" / uuid_of(number)).write_text(str(int(gib * GIB)))

    def wants(self, number: int, gib: float) -> None:
        """The runtime takes this much more on a card than anybody could know."""
        (self.cards / "extra" / uuid_of(number)).write_text(str(int(gib * GIB)))

    def eats(self, gib: float) -> None:
        """The runtime takes this much RAM before anything else."""
        (self.cards / "ram").write_text(str(int(gib * GIB)))

    def close_gate(self, name: str) -> None:
        """Runtimes stop there: before their `weights`, before their `cache`, before they `serve`."""
        (self.cards / "gates" / name).touch()

    def open_gate(self, name: str) -> None:
        (self.cards / "gates" / name).unlink()

    def starts(self) -> list[dict[str, Any]]:
        """Of runtimes: pid, argv, uuids of the cards they were shown."""
        path = self.cards / "starts"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def started(self, n: int) -> dict[str, Any]:
        """The n-th start, once there is one."""
        wait_for(lambda: len(self.starts()) >= n, lambda: f"only {len(self.starts())} of {n} starts")
        return self.starts()[n - 1]

    def kill_runtime(self, number: signal.Signals = signal.SIGKILL) -> None:
        """The last one that was started dies."""
        os.kill(self.starts()[-1]["pid"], number)

    def runtimes(self) -> list[int]:
        return [pid for pid, line in self.processes().items() if _SERVER in line]

    def taken(self, number: int) -> int:
        """Bytes of a card that runtimes hold."""
        total = 0
        for path in (self.cards / "held").glob(f"{uuid_of(number)}.*"):
            pid = int(path.suffix[1:])
            if pid != os.getpid() and Path(f"/proc/{pid}").exists():
                with suppress(OSError):
                    total += int(path.read_text())
        return total


def after(argv: list[str], flag: str) -> str:
    """The value of a flag, the last one where it is given twice."""
    return [argv[at + 1] for at, word in enumerate(argv[:-1]) if word == flag][-1]
