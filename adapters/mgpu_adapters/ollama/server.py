"""An Ollama server: its version's era, the settings it was started with, and the cards as it groups them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Final, Literal
from urllib.parse import urlsplit

from msgspec import Struct

from mgpu.adapter import Installed
from mgpu.errors import UsageError
from mgpu.rig import Gpu
from mgpu.units import GIB

Era = Literal["<=0.11.4", "0.11.5-0.29", ">=0.30"]

#: Default context by the total memory of all cards, from 0.15.5 on (`server/routes.go` Serve).
CONTEXT_TIERS: Final = ((47 * GIB, 262144), (23 * GIB, 32768), (0, 4096))

_VERSION: Final = re.compile(r"v?([0-9]{1,9})\.([0-9]{1,9})\.([0-9]{1,9})(?:[-+][\w.+-]{0,60})?", re.ASCII)
_LIBRARIES: Final = {"nvidia": "CUDA", "amd": "ROCm", "apple": "Metal"}


#: The newest version that is known (2026-08); builds from source that tell none are taken for it.
NEWEST: Final = "0.33.0"

_LOOPBACK: Final = frozenset({"localhost", "127.0.0.1", "::1"})


class Found(Installed, frozen=True, kw_only=True):
    """An Ollama that runs (`url`), could be started (`executable`), or both: `version` is the running one's then."""

    @classmethod
    def of(cls, installed: Installed) -> Found:
        """As `installed` says it, whoever made that."""
        return cls(
            runtime=installed.runtime,
            executable=installed.executable,
            origin=installed.origin,
            version=installed.version,
            flags=installed.flags,
            url=installed.url,
        )

    @property
    def startable(self) -> bool:
        return self.executable != self.url


class Options(Struct, frozen=True, kw_only=True):
    """What the server's environment and the model's parameters say beside the context."""

    num_gpu: int = -1  # layers on cards; -1: automatic
    main_gpu: int | None = None
    num_batch: int = 512
    sched_spread: bool = False  # OLLAMA_SCHED_SPREAD
    gpu_overhead: int = 0  # OLLAMA_GPU_OVERHEAD, bytes
    kv_type: str = "f16"  # OLLAMA_KV_CACHE_TYPE, where flash attention is on; 0.30 does not look at it


def parse_version(text: str) -> tuple[int, int, int]:
    """`"0.30.6"`, `"v0.24.0"`, `"0.33.0-rc2"`. Raises `UsageError`."""
    match = _VERSION.fullmatch(text.strip())
    if match is None:
        raise UsageError(f"not a version of Ollama: {text!r}", hint="write it as GET /api/version does: 0.30.6")
    return int(match[1]), int(match[2]), int(match[3])


def is_local(url: str) -> bool:
    """Whether it is on this machine."""
    return urlsplit(url).hostname in _LOOPBACK


def era_of(version: str) -> Era:
    number = parse_version(version)
    if number >= (0, 30, 0):
        return ">=0.30"
    return "0.11.5-0.29" if number >= (0, 11, 5) else "<=0.11.4"


def default_ctx(version: str, gpus: Sequence[Gpu], gpu_overhead: int = 0) -> int:
    """Tokens of context where neither request, model nor environment gives a number. The trained context caps it."""
    number = parse_version(version)
    if number < (0, 15, 5):
        return 4096 if number >= (0, 6, 7) else 2048
    total = sum(gpu.total_bytes - gpu_overhead for gpu in gpus)
    return next((ctx for least, ctx in CONTEXT_TIERS if total >= least), CONTEXT_TIERS[-1][1])


def library(gpu: Gpu) -> str:
    """The backend that Ollama would use it by: by vendor, as its builds for Linux and macOS have it."""
    return _LIBRARIES.get(gpu.vendor, "Vulkan")


def by_library(gpus: Sequence[Gpu]) -> list[list[Gpu]]:
    groups: dict[str, list[Gpu]] = {}
    for gpu in gpus:
        groups.setdefault(library(gpu), []).append(gpu)
    return list(groups.values())
