"""One model asked of a swarm: which nodes have it, and what is said of it beforehand."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator
from typing import Final

from mgpu.adapter import Command, Endpoint, Installed, Job
from mgpu.cluster import Node, Outlook, Remote, without_effect
from mgpu.errors import BadModelError, RuntimeMissingError, UsageError
from mgpu.model import Model
from mgpu.plan import Layout
from mgpu.request import DEFAULT_CTX, Request
from mgpu.rig import Rig
from mgpu.service import Attachment
from mgpu_adapters.keyless import check_unexposed
from mgpu_adapters.mycoswarm.attachment import SwarmAttachment, task
from mgpu_adapters.mycoswarm.swarm import Swarm, SwarmNode, close_names, tagged

_HEEDED: Final = frozenset({"ctx"})
_MOST_CTX: Final = 32768  # what its worker asks of Ollama at most (worker.py, _CTX_MAX)
_ROUTES: Final = (
    "one node gets the whole model: mycoSwarm routes requests to the best node's Ollama and splits no model, "
    "though the guide counts it among those that do"
)
_SOURCE: Final = "mycoswarm 0.6.0 router.py, api.py"
_CODE: Final = "mycoSwarm is unencrypted, and its token lets whoever has it run code on every node (task type code_run)"


class SwarmJob(Remote, frozen=True, kw_only=True):
    """Implements `mgpu.adapter.Job`. `name`: the model as Ollama lists it."""

    url: str
    token: str
    name: str

    def command(self, layout: Layout, rig: Rig, endpoint: Endpoint) -> Command:
        """What asks one question by hand. The token is read where it lies: it is nothing to print."""
        del layout, rig, endpoint
        body = json.dumps(task("by-hand", self.name, "Hello", ctx=self.ctx, max_tokens=256))
        header = '"X-Swarm-Token: $(cat ~/.config/mycoswarm/swarm-token)"'
        asked = f"-d {shlex.quote(body)} {shlex.quote(f'{self.url}/task')}"
        script = f"curl -fsS -H {header} -H 'Content-Type: application/json' {asked}"
        return Command(
            argv=("sh", "-c", script),
            env={},
            scrub=(),
            files={},
            ready_url=f"{self.url}/health",
            endpoint=f"{self.url}/task",
        )

    def attachment(self, layout: Layout, rig: Rig) -> Attachment | None:
        del layout, rig
        return SwarmAttachment(self.url, self.token, self.name, self.ctx)


def prepare(model: Model, request: Request, installed: Installed) -> Job:
    """The job. Raises `BadModelError` for a model that no node has, `UsageError` for arguments after `--`."""
    check_unexposed(request, "mycoSwarm")
    if request.runtime_args:
        raise UsageError(
            f"{request.runtime_args[0]} cannot be given to mycoSwarm, which is running already",
            hint="leave out what comes after --",
        )
    if model.files:
        raise BadModelError(
            f"{model.path} is a file here, and mycoSwarm's nodes know models by Ollama's names",
            hint="give the name, like gemma3:1b; on a node, `ollama create NAME -f Modelfile` makes one of a file",
        )
    swarm = installed if isinstance(installed, Swarm) else None
    asked = swarm is not None and swarm.devices is not None
    name, url = tagged(model.path), installed.executable.rstrip("/")
    having = _having(name, swarm) if swarm is not None and asked else ()
    trained = _MOST_CTX if request.ctx == "max" else request.ctx or DEFAULT_CTX
    return SwarmJob(
        runtime="mycoswarm",
        model=model,
        outlook=Outlook(
            service=f"the swarm behind {url}",
            nodes=tuple(_node(node) for node in having) if asked else None,
            unsharded=(_ROUTES, _SOURCE),
        ),
        ctx=trained,
        ctx_train=_MOST_CTX,
        users=request.users,
        kv_type=request.kv_type,
        warnings=tuple(_warnings(request)),
        url=url,
        token=swarm.token if swarm is not None else "",
        name=name,
    )


def _having(name: str, swarm: Swarm) -> tuple[SwarmNode, ...]:
    """The nodes with the model. Left to itself, mycoSwarm would answer with another one (api.py, _route_to_peer)."""
    having = tuple(node for node in swarm.nodes if name in node.models)
    if having:
        return having
    hosts = ", ".join(node.hostname for node in swarm.nodes)
    if not any(node.models for node in swarm.nodes):
        raise RuntimeMissingError(
            f"no node of the swarm can answer: none of {hosts} has an Ollama with a model",
            hint=f"on one of them, start Ollama and `ollama pull {name}`, then restart its daemon",
        )
    close = close_names(name, swarm.nodes)
    meant = f"did you mean {' or '.join(close)}? else " if close else ""
    raise BadModelError(
        f"no node of the swarm ({hosts}) has the model {name}", hint=f"{meant}`ollama pull {name}` on one of them"
    )


def _node(node: SwarmNode) -> Node:
    return Node(name=node.hostname, total_bytes=node.total_bytes, free_bytes=node.free_bytes)


def _warnings(request: Request) -> Iterator[str]:
    ignored = tuple(without_effect(request, _HEEDED))
    if ignored:
        yield f"mycoSwarm places and serves by itself: {', '.join(ignored)} without effect"
    yield _CODE
