"""One model asked of an Exo cluster: how it is to be placed there, and what is said of it beforehand."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Final

from mgpu.adapter import Command, Endpoint, Installed, Job
from mgpu.cluster import Node, Outlook, Remote, without_effect
from mgpu.errors import UsageError
from mgpu.model import Model
from mgpu.plan import Layout
from mgpu.request import DEFAULT_CTX, Request, SplitChoice
from mgpu.rig import Rig
from mgpu.service import Attachment
from mgpu_adapters.exo.attachment import ExoAttachment
from mgpu_adapters.exo.names import model_id
from mgpu_adapters.exo.placing import Wish
from mgpu_adapters.exo.state import Card
from mgpu_adapters.keyless import check_unexposed

_HEEDED: Final = frozenset({"split"})
_OPEN: Final = "Exo's API has no password and listens on every interface: whoever reaches it can use it (exo#1833)"


class Cluster(Installed, frozen=True, kw_only=True):
    """A cluster that answers: `executable` is its address, its nodes are `devices`. `cards`: its models, by id."""

    cards: Mapping[str, Card] = {}


class ExoJob(Remote, frozen=True, kw_only=True):
    """Implements `mgpu.adapter.Job`."""

    url: str
    wish: Wish

    def command(self, layout: Layout, rig: Rig, endpoint: Endpoint) -> Command:
        """What places it by hand: the request that leaves the choice of nodes to Exo."""
        del layout, rig, endpoint
        wish = self.wish
        body = {
            "model_id": wish.model_id,
            "sharding": wish.sharding or "Pipeline",
            "instance_meta": "MlxRing",
            "min_nodes": wish.min_nodes,
        }
        head = ("curl", "-fsS", "-X", "POST", "-H", "Content-Type: application/json")
        return Command(
            argv=(*head, "-d", json.dumps(body), f"{self.url}/place_instance"),
            env={},
            scrub=(),
            files={},
            ready_url=f"{self.url}/state",
            endpoint=f"{self.url}/v1",
        )

    def attachment(self, layout: Layout, rig: Rig) -> Attachment | None:
        del layout, rig
        return ExoAttachment(self.url, self.wish)


def prepare(model: Model, request: Request, installed: Installed) -> Job:
    """The job.

    Raises `BadModelError` for what is no model of Exo's, `UsageError` for arguments after `--`, `RefusedError` for a
    host that needs a key.
    """
    check_unexposed(request, "Exo")
    if request.runtime_args:
        raise UsageError(
            f"{request.runtime_args[0]} cannot be given to Exo, which is running already",
            hint="leave out what comes after --",
        )
    cards = installed.cards if isinstance(installed, Cluster) else {}
    url = installed.executable.rstrip("/")
    wanted = model_id(model, cards)
    card = cards.get(wanted, Card(id=wanted))
    trained = card.context_length or model.hyper.n_ctx_train or DEFAULT_CTX
    nodes = None if installed.devices is None else tuple(
        Node(name=one.device, total_bytes=one.total_bytes, free_bytes=one.free_bytes) for one in installed.devices
    )  # fmt: skip
    outlook = Outlook(
        service=f"the Exo cluster at {url}",
        nodes=nodes,
        needed_bytes=card.storage_bytes or model.weights_bytes or None,
    )
    return ExoJob(
        runtime="exo",
        model=model,
        outlook=outlook,
        ctx=trained,
        ctx_train=trained,
        users=request.users,
        kv_type=request.kv_type,
        warnings=tuple(_warnings(request)),
        url=url,
        wish=_wish(wanted, request.split),
    )


def _wish(wanted: str, split: SplitChoice) -> Wish:
    if split == "none":
        return Wish(model_id=wanted, max_nodes=1)
    if split in {"pipeline", "tensor"}:
        return Wish(model_id=wanted, sharding=split.capitalize(), min_nodes=2)
    return Wish(model_id=wanted)


def _warnings(request: Request) -> Iterator[str]:
    ignored = tuple(without_effect(request, _HEEDED))
    if ignored:
        yield f"Exo places and serves by itself: {', '.join(ignored)} without effect"
    yield _OPEN
