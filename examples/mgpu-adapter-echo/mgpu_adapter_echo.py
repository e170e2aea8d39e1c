"""An adapter for `echo-server`, a runtime that repeats what it is told. Pure: no file, no process, no import of it."""

from __future__ import annotations

import re

from mgpu.adapter import Abilities, Adapter, Cause, Command, Endpoint, Installed, LogFact, Probe, Search, Stage
from mgpu.errors import RuntimeMissingError
from mgpu.model import Format, Model
from mgpu.plain import PlainJob
from mgpu.plan import Layout
from mgpu.request import Request
from mgpu.rig import Gpu, Rig

INSTALL = "pip install mgpu-adapter-echo"


class Echo(Adapter):
    name = "echo"
    formats: frozenset[Format] = frozenset({"gguf"})
    search = Search(variable="ECHO_SERVER", executables=("echo-server",), package_files=(), install=INSTALL)
    probes = ("--version",)  # what it prints comes back in `Probe.outputs`
    abilities = Abilities(
        modes=("pipeline", "replicas"), mixed=("pipeline", "replicas"), note="repeats what it is told"
    )

    def why_not_gpu(self, gpu: Gpu) -> str | None:
        return None if gpu.vendor == "nvidia" else "it needs an NVIDIA card"

    def installed(self, probe: Probe) -> Installed:
        found = re.search(r"echo-server (\d+\.\d+)", probe.outputs.get("--version", ""))
        if found is None:
            raise RuntimeMissingError(f"{probe.executable} is no echo-server", hint=f"install it: {INSTALL}")
        return self._of(probe.executable, probe.origin, found[1])

    def assumed(self) -> Installed:
        return self._of("echo-server", "assumed", "1.0")  # for plans that need no runtime on this machine

    def _of(self, executable: str, origin: str, version: str) -> Installed:
        return Installed(runtime=self.name, executable=executable, origin=origin, version=version, flags=frozenset())

    def job(self, model: Model, request: Request, installed: Installed) -> EchoJob:
        return EchoJob(model, request, installed)

    def read_log(self, line: str) -> LogFact | None:
        if line.startswith("echo: no voice"):
            return Cause(text="it has lost its voice", hint="start it without --hoarse")
        return Stage(text=line) if line.startswith("echo: ") else None


class EchoJob(PlainJob):
    def command(self, layout: Layout, rig: Rig, endpoint: Endpoint) -> Command:
        cards = {gpu.index: gpu for gpu in rig.gpus}
        shown = ",".join(cards[index].uuid or str(index) for index in layout.gpus)
        base = f"http://{endpoint.host}:{endpoint.port}"
        split = ("--layers", ",".join(map(str, layout.counts))) if len(layout.counts) > 1 else ()
        return Command(
            argv=(
                *(self.installed.executable, "--model", self.model.path, "--ctx", str(self.ctx)),
                *("--host", endpoint.host, "--port", str(endpoint.port), *split, *self.request.runtime_args),
            ),
            env={"CUDA_DEVICE_ORDER": "PCI_BUS_ID", "CUDA_VISIBLE_DEVICES": shown},
            scrub=("ECHO_",),  # what the caller's environment must not decide behind the plan's back
            files={},
            ready_url=f"{base}/health",
            endpoint=f"{base}/v1",
        )
