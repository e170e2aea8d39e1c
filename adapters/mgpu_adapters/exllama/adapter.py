"""ExLlamaV2 and ExLlamaV3 as mgpu sees them: through TabbyAPI, which serves them over HTTP."""

from __future__ import annotations

from msgspec.structs import replace

from mgpu.adapter import Abilities, Adapter, Installed, Job, ListedDevice, LogFact, Probe, Search
from mgpu.errors import RuntimeMissingError
from mgpu.model import Format, Model
from mgpu.request import Request, RuntimeName
from mgpu.rig import Finding, Gpu, Rig
from mgpu_adapters.exllama.cards import check_cards, why_not
from mgpu_adapters.exllama.log import read_line
from mgpu_adapters.exllama.tabby import Clone, assumed_clone, read_clone, search_for


class _ExLlama(Adapter):
    """What both versions have in common. `_version` is 2 or 3."""

    _version: int
    probes: tuple[str, ...] = ()  # its files tell all; starting it would import torch

    def installed(self, probe: Probe) -> Installed:
        """Raises `RuntimeMissingError` for a TabbyAPI of the other branch, too old, or without its packages."""
        return read_clone(probe, self._version)

    def assumed(self) -> Installed:
        return assumed_clone(self._version)

    def why_not_gpu(self, gpu: Gpu) -> str | None:
        return why_not(gpu)

    def bind(self, rig: Rig, listed: tuple[ListedDevice, ...]) -> Rig:
        """Cards without the kernels are disabled, and a finding says so. Raises `RefusedError` where none is left."""
        del listed
        unfit = [gpu for gpu in rig.gpus if why_not(gpu) is not None]
        if not unfit:
            return rig
        if len(unfit) == len(rig.gpus):
            check_cards(unfit, "ExLlama")
        names = ", ".join(f"GPU {gpu.index} ({gpu.name})" for gpu in unfit)
        finding = Finding(
            text=f"ExLlama cannot use {names}", hint="it needs NVIDIA cards of compute capability 8.0 or newer"
        )
        gpus = tuple(replace(gpu, enabled=gpu.enabled and why_not(gpu) is None) for gpu in rig.gpus)
        return replace(rig, gpus=gpus, findings=(*rig.findings, finding))

    def job(self, model: Model, request: Request, installed: Installed) -> Job:
        from mgpu_adapters.exllama.job import prepare

        if not isinstance(installed, Clone):
            raise RuntimeMissingError(
                f"{installed.executable} is no TabbyAPI", hint=f"install it: {self.search.install}"
            )
        return prepare(model, request, installed, self._version)

    def read_log(self, line: str) -> LogFact | None:
        return read_line(line)


class ExLlamaV2(_ExLlama):
    """EXL2, by TabbyAPI's last branch with ExLlamaV2."""

    _version = 2
    name: RuntimeName = "exllamav2"
    formats: frozenset[Format] = frozenset({"exl2"})
    search: Search = search_for(2)
    abilities = Abilities(
        modes=("pipeline", "tensor", "replicas"),
        mixed=("pipeline", "replicas"),
        note="EXL2; archived upstream: EXL3 and exllamav3 are its successors",
    )


class ExLlamaV3(_ExLlama):
    """EXL3, by TabbyAPI's main branch."""

    _version = 3
    name: RuntimeName = "exllamav3"
    formats: frozenset[Format] = frozenset({"exl3"})
    search: Search = search_for(3)
    abilities = Abilities(
        modes=("pipeline", "tensor", "replicas"),
        mixed=("pipeline", "replicas"),
        note="EXL3; NVIDIA from the 30 series on; tensor ranks need matched cards",
    )
