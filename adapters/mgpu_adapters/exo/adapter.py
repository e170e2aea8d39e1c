"""Exo as mgpu sees it: a cluster that is asked for its nodes and models, and the jobs it can be given."""

from __future__ import annotations

from typing import Final

from msgspec import ValidationError

from mgpu.adapter import Abilities, Adapter, Installed, Job, ListedDevice, Probe, Search
from mgpu.errors import RuntimeMissingError, one_line
from mgpu.model import Format, Model
from mgpu.request import Request
from mgpu.service import Service
from mgpu_adapters.exo.job import Cluster, prepare
from mgpu_adapters.exo.state import NAME, Cards, NodeIdentity, NodeMemory, State, decode

_URL: Final = "http://127.0.0.1:52415"
_START: Final = (
    "start it on each machine (macOS: the EXO app, or `uv run exo` in a checkout of github.com/exo-explore/exo), "
    "or set MGPU_EXO_URL"
)


class Exo(Adapter):
    """Implements `mgpu.adapter.Adapter` for a running Exo cluster."""

    name = "exo"
    formats: frozenset[Format] = frozenset({"safetensors"})
    search = Search(
        variable="MGPU_EXO_URL",
        executables=("exo",),
        package_files=(),
        install="brew install --cask exo (macOS 26.2; PyPI's `exo` is something else), then start it on each machine",
    )
    probes = ()
    service = Service(variable="MGPU_EXO_URL", url=_URL, probe=("/node_id", "/state", "/models"), start=_START)
    abilities = Abilities(
        modes=("pipeline", "tensor"),
        mixed=("pipeline",),
        machines=True,
        note="MLX models on a cluster of Macs; attached to, it places by itself",
    )

    def installed(self, probe: Probe) -> Installed:
        try:
            state = decode(probe.outputs.get("/state", ""), State)
            cards = decode(probe.outputs.get("/models", "{}"), Cards)
        except ValueError as error:
            what = "something else than JSON" if not isinstance(error, ValidationError) else str(error)
            raise RuntimeMissingError(
                f"what answers at {probe.executable} is not Exo as mgpu knows it: /state: {what}",
                hint=f"update Exo to 1.0.71 or newer; {_START}",
            ) from error
        if "/node_id" not in probe.outputs:
            raise RuntimeMissingError(f"what answers at {probe.executable} is not Exo: it has no /node_id", hint=_START)
        if not state.topology.nodes:
            raise RuntimeMissingError(
                f"the Exo at {probe.executable} has no node yet", hint="wait until its dashboard shows one, then again"
            )
        nodes = tuple(_device(state, node_id) for node_id in state.topology.nodes)
        return Cluster(
            runtime=self.name,
            executable=probe.executable,
            origin=probe.origin,
            version="of unknown version",  # its API does not tell
            flags=frozenset(),
            devices=nodes,
            cards={card.id: card for card in cards.data},
        )

    def assumed(self) -> Installed:
        return Cluster(runtime=self.name, executable=_URL, origin="assumed", version="1.0.71", flags=frozenset())

    def job(self, model: Model, request: Request, installed: Installed) -> Job:
        return prepare(model, request, installed)


def _device(state: State, node_id: str) -> ListedDevice:
    identity = state.node_identities.get(node_id, NodeIdentity())
    memory = state.node_memory.get(node_id, NodeMemory())
    return ListedDevice(
        device=state.name_of(node_id),
        description="" if identity.chip_id == "Unknown" else one_line(identity.chip_id, NAME),
        total_bytes=memory.ram_total.in_bytes,
        free_bytes=memory.ram_available.in_bytes,
    )
