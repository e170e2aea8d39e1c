"""Razer AIKit as mgpu sees it: Docker, its image, and vLLM inside."""

from __future__ import annotations

from typing import Final

from mgpu.adapter import Abilities, Adapter, Installed, Job, LogFact, Probe, Search, Stats
from mgpu.errors import RuntimeMissingError
from mgpu.model import Format, Model
from mgpu.request import Request, RuntimeName
from mgpu.rig import Gpu, Rig
from mgpu_adapters.aikit.docker import (
    IMAGE,
    IMAGE_INSPECT,
    INFO,
    VERSION,
    check_image,
    check_toolkit,
    docker_version,
)
from mgpu_adapters.aikit.job import AIKitJob
from mgpu_adapters.aikit.log import read_line
from mgpu_adapters.vllm.adapter import without
from mgpu_adapters.vllm.checks import capability_of
from mgpu_adapters.vllm.job import prepare_as
from mgpu_adapters.vllm.metrics import read_metrics

#: vLLM in the newest image (Dockerfile: FROM vllm/vllm-openai:v0.20.0-cu130).
_VLLM: Final = "0.20.0"
_LEAST_CAPABILITY: Final = 70
_NEEDS: Final = "it needs NVIDIA cards of compute capability 7.0 or more"


class AIKit(Adapter):
    """Implements `mgpu.adapter.Adapter` for Razer AIKit, Docker's image around vLLM."""

    name: RuntimeName = "aikit"
    formats: frozenset[Format] = frozenset({"safetensors"})
    search = Search(
        variable="MGPU_DOCKER",
        executables=("docker",),
        package_files=(),
        install=f"Docker Engine and the NVIDIA Container Toolkit, then: docker pull {IMAGE}",
        live=True,
    )
    probes = (VERSION, INFO, IMAGE_INSPECT)
    abilities = Abilities(
        modes=("pipeline", "tensor", "replicas"),
        mixed=("pipeline", "replicas"),
        note="vLLM in a container: nothing to install but Docker",
    )

    def why_not_gpu(self, gpu: Gpu) -> str | None:
        if gpu.vendor != "nvidia":
            return "it needs NVIDIA cards"
        return None if _is_usable(gpu) else f"it needs compute capability 7.0, and this is {gpu.compute_capability}"

    def installed(self, probe: Probe) -> Installed:
        """Raises `RuntimeMissingError` for the first thing that lacks: daemon, permission, toolkit, image."""
        if not any(probe.outputs.values()):
            raise RuntimeMissingError(f"{probe.executable} says nothing", hint="try it by hand: docker info")
        docker = docker_version(probe.outputs)
        check_toolkit(probe.outputs)
        check_image(probe.outputs)
        return Installed(
            runtime=self.name,
            executable=probe.executable,
            origin=probe.origin,
            version=f"{_VLLM} (vLLM) in Docker {docker}",
            flags=frozenset(),
        )

    def assumed(self) -> Installed:
        return Installed(
            runtime=self.name, executable="docker", origin="assumed", version=f"{_VLLM} (vLLM)", flags=frozenset()
        )

    def bind(self, rig: Rig, listed: object) -> Rig:
        """Cards that the image's vLLM has no kernels for are disabled, and a finding says so."""
        del listed
        return without(rig, [gpu for gpu in rig.gpus if not _is_usable(gpu)], "Razer AIKit", _NEEDS)

    def job(self, model: Model, request: Request, installed: Installed) -> Job:
        return prepare_as(AIKitJob, model, request, installed)

    def read_log(self, line: str) -> LogFact | None:
        return read_line(line)

    def read_metrics(self, text: str) -> Stats | None:
        return read_metrics(text)


def _is_usable(gpu: Gpu) -> bool:
    capability = capability_of(gpu)
    return gpu.vendor == "nvidia" and (capability is None or capability >= _LEAST_CAPABILITY)
