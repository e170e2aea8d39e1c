"""What Exo's API says of a cluster: nodes, models, placements, instances and how far they are.

Source: exo 0.3.70 (b5375f8, 2026-06-22) `src/exo/api/types/api.py`, `shared/types/state.py`, `shared/types/worker/*`.
Its own types go out in camel case, and a member of a union as an object with one key, its class's name.
"""

from __future__ import annotations

from typing import Annotated, Any, Final, TypeVar

import msgspec
from msgspec import Meta, Struct

from mgpu.errors import one_line
from mgpu.units import MIB

T = TypeVar("T")

NAME: Final = 60  # characters of what a node calls itself

#: Bytes, layers, tokens: what is more than this of anything is an error of the other side.
_Count = Annotated[int, Meta(ge=-(1 << 60), le=1 << 60)]

#: Runner states, on the way up: what a person is told of each.
_STAGES: Final = {
    "RunnerIdle": "waiting",
    "RunnerConnecting": "connecting",
    "RunnerConnected": "connected",
    "RunnerLoading": "loading",
    "RunnerLoaded": "loaded",
    "RunnerWarmingUp": "warming up",
}
_UP: Final = frozenset({"RunnerReady", "RunnerRunning"})
_DOWN: Final = frozenset({"RunnerFailed", "RunnerShuttingDown", "RunnerShutdown"})


class Memory(Struct, frozen=True, rename="camel"):
    in_bytes: _Count = 0


class NodeMemory(Struct, frozen=True, rename="camel"):
    ram_total: Memory = Memory()
    ram_available: Memory = Memory()


class NodeIdentity(Struct, frozen=True, rename="camel"):
    chip_id: str = "Unknown"
    friendly_name: str = "Unknown"


class Topology(Struct, frozen=True):
    nodes: tuple[str, ...] = ()


class Shard(Struct, frozen=True, rename="camel"):
    """Layers `start_layer` … `end_layer` - 1."""

    start_layer: _Count = 0
    end_layer: _Count = 0


class ShardAssignments(Struct, frozen=True, rename="camel"):
    model_id: str
    node_to_runner: dict[str, str] = {}
    runner_to_shard: dict[str, dict[str, Shard]] = {}


class Instance(Struct, frozen=True, rename="camel"):
    instance_id: str
    shard_assignments: ShardAssignments


class Runner(Struct, frozen=True, rename="camel"):
    """A runner's state; `kind` is what Exo calls it."""

    kind: str = ""
    layers_loaded: _Count = 0
    total_layers: _Count = 0
    error_message: str | None = None

    @property
    def is_up(self) -> bool:
        return self.kind in _UP

    @property
    def is_down(self) -> bool:
        return self.kind in _DOWN

    @property
    def words(self) -> str:
        """How far it is: `"loading layer 12 of 32"`."""
        if self.kind == "RunnerLoading" and self.total_layers:
            return f"loading layer {self.layers_loaded} of {self.total_layers}"
        return _STAGES.get(self.kind, self.kind.removeprefix("Runner").lower() or "waiting")


class Progress(Struct, frozen=True, rename="camel"):
    total: Memory = Memory()
    downloaded: Memory = Memory()


class State(Struct, frozen=True, rename="camel"):
    """`GET /state`, in part."""

    topology: Topology = Topology()
    node_identities: dict[str, NodeIdentity] = {}
    node_memory: dict[str, NodeMemory] = {}
    instances: dict[str, dict[str, Instance]] = {}
    runners: dict[str, dict[str, Any]] = {}
    downloads: dict[str, list[dict[str, dict[str, Any]]]] = {}

    def name_of(self, node_id: str) -> str:
        """What its owner calls the node, or the start of its id."""
        identity = self.node_identities.get(node_id, NodeIdentity())
        return one_line(node_id[:8] if identity.friendly_name == "Unknown" else identity.friendly_name, NAME)

    def instance(self, instance_id: str) -> Instance | None:
        return next(iter(self.instances.get(instance_id, {}).values()), None)

    def of_model(self, model_id: str) -> tuple[Instance, ...]:
        """The instances of a model, whoever made them."""
        every = (instance for tagged in self.instances.values() for instance in tagged.values())
        return tuple(one for one in every if one.shard_assignments.model_id == model_id)

    def runners_of(self, instance: Instance) -> dict[str, Runner]:
        """Node ids to the runner there."""
        return {node: self._runner(runner) for node, runner in instance.shard_assignments.node_to_runner.items()}

    def failure(self, instance: Instance) -> str:
        """Which runner of the instance has failed or ended, and why; empty: none."""
        for node, runner in self.runners_of(instance).items():
            if runner.is_down:
                return f"{self.name_of(node)}: {runner.error_message or f'its runner is {runner.words}'}"
        return ""

    def download(self, instance: Instance) -> Progress | None:
        """How far the instance's nodes are with fetching the model; None when none of them is fetching."""
        model_id = instance.shard_assignments.model_id
        under_way = [
            _decoded(body.get("downloadProgress", {}), Progress) or Progress()
            for node in instance.shard_assignments.node_to_runner
            for tagged in self.downloads.get(node, [])
            for kind, body in tagged.items()
            if kind == "DownloadOngoing" and _model_of(body) == model_id
        ]
        if not under_way:
            return None
        return Progress(
            total=Memory(sum(one.total.in_bytes for one in under_way)),
            downloaded=Memory(sum(one.downloaded.in_bytes for one in under_way)),
        )

    def download_error(self, instance: Instance) -> str | None:
        """Why a node of the instance could not fetch the model."""
        model_id = instance.shard_assignments.model_id
        for node in instance.shard_assignments.node_to_runner:
            for tagged in self.downloads.get(node, []):
                body = tagged.get("DownloadFailed")
                if body is not None and _model_of(body) == model_id:
                    return f"{self.name_of(node)}: {body.get('errorMessage') or 'no reason given'}"
        return None

    def _runner(self, runner_id: str) -> Runner:
        kind, body = next(iter(self.runners.get(runner_id, {}).items()), ("", {}))
        told = _decoded({**body, "kind": kind}, Runner) if isinstance(body, dict) else None
        return told or Runner(kind=kind)


class Card(Struct, frozen=True):
    """One model the cluster knows (`GET /models`); sizes in MiB, rounded."""

    id: str
    storage_size_megabytes: _Count = 0
    context_length: _Count = 0
    supports_tensor: bool = False
    quantization: str = ""

    @property
    def storage_bytes(self) -> int | None:
        return self.storage_size_megabytes * MIB or None


class Cards(Struct, frozen=True):
    data: tuple[Card, ...] = ()


class Preview(Struct, frozen=True):
    """A way to place a model, or why there is none. `instance` is sent back as it came to create it."""

    sharding: str
    instance_meta: str
    instance: dict[str, Any] | None = None
    error: str | None = None

    @property
    def placed(self) -> Instance | None:
        body = next(iter((self.instance or {}).values()), None)
        return None if body is None else _decoded(body, Instance)

    @property
    def n_nodes(self) -> int:
        return len(self.placed.shard_assignments.node_to_runner) if self.placed is not None else 0


class Previews(Struct, frozen=True):
    previews: tuple[Preview, ...] = ()


def decode(body: Any, kind: type[T]) -> T:
    """`body`, as JSON text or as decoded already. Raises `ValueError` (msgspec's) for what it cannot be."""
    try:
        return msgspec.json.decode(body, type=kind) if isinstance(body, str) else msgspec.convert(body, kind)
    except RecursionError as error:
        raise ValueError("nested without end") from error


def _decoded(body: Any, kind: type[T]) -> T | None:
    """None for a part of the state that is not as we know it: what else it says still holds."""
    try:
        return decode(body, kind)
    except ValueError:
        return None


def _model_of(download: dict[str, Any]) -> str:
    """The model of a download: in its shard's metadata, one key deep in the shard's kind."""
    shards = download.get("shardMetadata")
    every = shards.values() if isinstance(shards, dict) else ()
    card = next((shard.get("modelCard") for shard in every if isinstance(shard, dict)), None)
    model_id = card.get("modelId") if isinstance(card, dict) else None
    return model_id if isinstance(model_id, str) else ""
