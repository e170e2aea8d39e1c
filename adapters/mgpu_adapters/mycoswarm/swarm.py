"""What mycoSwarm's API says of a swarm: its nodes, their models, and what becomes of a task.

Source: mycoswarm 0.6.0 (PyPI) `api.py`, `router.py`, `worker.py`.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Annotated, Any, TypeVar

import msgspec
from msgspec import Meta, Struct

from mgpu.adapter import Installed
from mgpu.units import MIB

T = TypeVar("T")


_Mib = Annotated[int, Meta(ge=0, le=1 << 40)]


class Health(Struct, frozen=True):
    """`GET /health`, the only one that asks for no token."""

    node_id: str
    hostname: str
    peer_count: int
    version: str = ""


class Peer(Struct, frozen=True):
    """One of `GET /peers`. Of several cards, the best alone is told, and not how much of it is free."""

    node_id: str
    hostname: str
    ip: str = ""
    port: int = 0
    capabilities: tuple[str, ...] = ()
    gpu_name: str | None = None
    vram_total_mb: _Mib = 0
    available_models: tuple[str, ...] = ()


class Status(Struct, frozen=True):
    """`GET /status`: the node that was asked."""

    node_id: str
    hostname: str
    capabilities: tuple[str, ...] = ()
    gpu: str | None = None
    vram_total_mb: _Mib = 0
    vram_free_mb: _Mib = 0
    ollama_models: tuple[str, ...] = ()


class SwarmNode(Struct, frozen=True, kw_only=True):
    """A machine of the swarm, and the models its Ollama has."""

    hostname: str
    gpu: str
    total_bytes: int
    free_bytes: int
    models: tuple[str, ...]


class Swarm(Installed, frozen=True, kw_only=True):
    """A swarm that answers: `executable` is the address of the node that was asked."""

    nodes: tuple[SwarmNode, ...] = ()
    token: str = ""


class Submitted(Struct, frozen=True):
    """The answer to `POST /task`. `target_ip` is None where the node that was asked does it itself."""

    task_id: str
    message: str = ""
    target_ip: Annotated[str, Meta(pattern=r"^[0-9A-Za-z_.-]{1,253}\Z")] | None = None
    target_port: int | None = None


class Outcome(Struct, frozen=True):
    """`GET /task/{id}`: pending, running, completed or failed."""

    status: str
    result: dict[str, Any] | None = None
    error: str | None = None

    @property
    def over(self) -> bool:
        return self.status in {"completed", "failed"}

    @property
    def has_token(self) -> bool:
        """Whether something was generated, if only a thought."""
        result = self.result or {}
        return bool(result.get("response") or result.get("eval_count"))

    @property
    def model(self) -> str:
        return str((self.result or {}).get("model", ""))


def nodes_of(status: Status, peers: Iterable[Peer]) -> tuple[SwarmNode, ...]:
    """The node that was asked, and the others it knows."""
    own = SwarmNode(
        hostname=status.hostname,
        gpu=status.gpu or "",
        total_bytes=status.vram_total_mb * MIB,
        free_bytes=status.vram_free_mb * MIB,
        models=status.ollama_models,
    )
    others = (
        SwarmNode(
            hostname=peer.hostname,
            gpu=peer.gpu_name or "",
            total_bytes=peer.vram_total_mb * MIB,
            free_bytes=0,
            models=peer.available_models,
        )
        for peer in peers
    )
    return (own, *others)


def tagged(name: str) -> str:
    """A model as Ollama lists it, which is how nodes are compared: `"gemma3"` is `"gemma3:latest"`."""
    return name if ":" in name.rpartition("/")[2] else f"{name}:latest"


def close_names(name: str, nodes: Iterable[SwarmNode]) -> list[str]:
    """Models of the swarm that may have been meant."""
    return difflib.get_close_matches(name, sorted({model for node in nodes for model in node.models}), n=3, cutoff=0.5)


def decode(body: Any, kind: type[T]) -> T:
    """`body`, as JSON text or as decoded already. Raises `ValueError` (msgspec's) for what it cannot be."""
    try:
        return msgspec.json.decode(body, type=kind) if isinstance(body, str) else msgspec.convert(body, kind)
    except RecursionError as error:
        raise ValueError("nested without end") from error
