"""Ollama as mgpu sees it: a server that runs already, or one to start; and the jobs it can be given."""

from __future__ import annotations

import re
from typing import Final

import msgspec

from mgpu.adapter import Abilities, Adapter, Installed, Job, LogFact, Probe, Search
from mgpu.errors import RuntimeMissingError, UsageError
from mgpu.model import Format, Model
from mgpu.request import Request
from mgpu.rig import Rig
from mgpu.service import Service
from mgpu_adapters.ollama.log import read_line
from mgpu_adapters.ollama.server import NEWEST, Found, parse_version

_INSTALL: Final = "curl -fsSL https://ollama.com/install.sh | sh (macOS: brew install ollama)"
_VERSION_PATH: Final = "/api/version"

#: "Warning: client version is 0.9.0" where no server answers it (cmd/cmd.go versionHandler).
_VERSION: Final = re.compile(r"client version is v?([\w.+-]{1,60})|version is v?([\w.+-]{1,60})", re.ASCII)

#: /api/create takes `from`, `files` and `parameters` since 0.5.5; 0.6 is the oldest that is planned for.
_OLDEST: Final = (0, 6, 0)
#: Of a build from source that was given no version.
_UNVERSIONED: Final = (0, 0, 0)


class Ollama(Adapter):
    """Implements `mgpu.adapter.Adapter` for Ollama's server."""

    name = "ollama"
    formats: frozenset[Format] = frozenset({"gguf"})
    search = Search(variable="MGPU_OLLAMA", executables=("ollama",), package_files=(), install=_INSTALL)
    probes = ("--version",)
    service = Service(
        variable="OLLAMA_HOST", url="http://127.0.0.1:11434", probe=(_VERSION_PATH,), start="start it: ollama serve"
    )
    abilities = Abilities(
        modes=("pipeline", "tensor"),
        mixed=("pipeline",),
        cpu=True,
        note="no configuration; left alone, 0.30 and later split what takes 80 % of a card over all cards",
    )

    def installed(self, probe: Probe) -> Installed:
        """Raises `RuntimeMissingError` for what is older than 0.6, or no Ollama."""
        startable = probe.executable != probe.url
        own = _version_in(probe.outputs.get("--version", "")) if startable else None
        running = _running_version(probe) if probe.url else None
        version = _checked(running or own or "", probe)
        return Found(
            runtime=self.name,
            executable=probe.executable,
            origin=probe.origin,
            version=version,
            flags=frozenset(),
            url=probe.url,
        )

    def assumed(self) -> Installed:
        return Found(runtime=self.name, executable="ollama", origin="assumed", version=NEWEST, flags=frozenset())

    def bind(self, rig: Rig, listed: object) -> Rig:
        """Its builds bring CUDA, ROCm, Vulkan or Metal: as llama.cpp's for each vendor."""
        del listed
        return rig

    def job(self, model: Model, request: Request, installed: Installed) -> Job:
        from mgpu_adapters.ollama.job import prepare  # with llama.cpp's tables: not for `mgpu runtimes`

        return prepare(model, request, installed)

    def read_log(self, line: str) -> LogFact | None:
        return read_line(line)


def _version_in(text: str) -> str:
    found = _VERSION.search(text)
    return next((group for group in found.groups() if group), "") if found else ""


def _running_version(probe: Probe) -> str:
    try:
        told = msgspec.json.decode(probe.outputs.get(_VERSION_PATH, ""), type=dict[str, object])
    except msgspec.DecodeError:
        told = {}
    version = told.get("version")
    if not isinstance(version, str):
        raise RuntimeMissingError(
            f"what answers at {probe.url} is not Ollama: {_VERSION_PATH} tells no version",
            hint="set OLLAMA_HOST to where Ollama is, or unset it",
        )
    return version


def _checked(version: str, probe: Probe) -> str:
    try:
        number = parse_version(version)
    except UsageError as error:
        raise RuntimeMissingError(
            f"{probe.executable} does not say which version of Ollama it is: {version[:40]!r}",
            hint=f"install it: {_INSTALL}",
        ) from error
    if number == _UNVERSIONED:
        return NEWEST
    if number < _OLDEST:
        raise RuntimeMissingError(
            f"Ollama {version} is too old for mgpu, which needs 0.6", hint=f"update it: {_INSTALL}"
        )
    return version
