"""mycoSwarm as mgpu sees it: one node of the swarm that is asked for all of them, and the jobs it can be given."""

from __future__ import annotations

from typing import Final

from mgpu.adapter import Abilities, Adapter, Installed, Job, ListedDevice, Probe, Search
from mgpu.errors import RuntimeMissingError, one_line
from mgpu.model import Format, Model
from mgpu.request import Request
from mgpu.service import TOKEN, Service
from mgpu_adapters.mycoswarm.job import prepare
from mgpu_adapters.mycoswarm.swarm import Health, Peer, Status, Swarm, decode, nodes_of

_URL: Final = "http://127.0.0.1:7890"
_NAME: Final = 60  # characters of what a node calls itself
_TOKEN_FILE: Final = "~/.config/mycoswarm/swarm-token"  # noqa: S105 - where it is, not what it is
_START: Final = (
    "start it: pip install mycoswarm && mycoswarm daemon, on each machine with Ollama; or set MGPU_MYCOSWARM_URL"
)


class MycoSwarm(Adapter):
    """Implements `mgpu.adapter.Adapter` for a running mycoSwarm daemon."""

    name = "mycoswarm"
    formats: frozenset[Format] = frozenset({"gguf"})
    search = Search(
        variable="MGPU_MYCOSWARM_URL",
        executables=("mycoswarm",),
        package_files=(),
        install="pip install mycoswarm, then `mycoswarm daemon` on each machine with Ollama",
    )
    probes = ()
    service = Service(
        variable="MGPU_MYCOSWARM_URL",
        url=_URL,
        probe=("/health", "/status", "/peers"),
        start=_START,
        token_file=_TOKEN_FILE,
        token_header="X-Swarm-Token",  # noqa: S106 - a header's name
    )
    abilities = Abilities(modes=(), machines=True, note="whole requests to the best machine's Ollama: splits no model")

    def installed(self, probe: Probe) -> Installed:
        url, outputs = probe.executable, probe.outputs
        try:
            health = decode(outputs.get("/health", ""), Health)
        except ValueError as error:
            raise RuntimeMissingError(
                f"what answers at {url} is not mycoSwarm: /health: {error}", hint=_START
            ) from error
        if "/status" not in outputs:
            raise _refused(url, health.hostname, has_token=TOKEN in outputs)
        try:
            status = decode(outputs["/status"], Status)
            peers = decode(outputs.get("/peers", "[]"), tuple[Peer, ...])
        except ValueError as error:
            raise RuntimeMissingError(
                f"the mycoSwarm {health.version} at {url} answers in a way that mgpu does not know: {error}",
                hint="pip install --upgrade mycoswarm",
            ) from error
        nodes = nodes_of(status, peers)
        listed = tuple(
            ListedDevice(
                device=one_line(node.hostname, _NAME),
                description=one_line(node.gpu, _NAME),
                total_bytes=node.total_bytes,
                free_bytes=node.free_bytes,
            )
            for node in nodes
        )
        return Swarm(
            runtime=self.name,
            executable=url,
            origin=probe.origin,
            version=one_line(health.version, _NAME) or "unknown",
            flags=frozenset(),
            devices=listed,
            nodes=nodes,
            token=outputs.get(TOKEN, ""),
        )

    def assumed(self) -> Installed:
        return Swarm(runtime=self.name, executable=_URL, origin="assumed", version="0.6.0", flags=frozenset())

    def job(self, model: Model, request: Request, installed: Installed) -> Job:
        return prepare(model, request, installed)


def _refused(url: str, hostname: str, *, has_token: bool) -> RuntimeMissingError:
    """`/health` answers anybody; the rest wants the swarm's token (`auth.py`)."""
    what = f"does not accept the token in {_TOKEN_FILE}" if has_token else f"wants a token, and {_TOKEN_FILE} has none"
    return RuntimeMissingError(
        f"the mycoSwarm on {hostname} ({url}) {what}",
        hint=f"copy {_TOKEN_FILE} from that machine: all nodes of a swarm share one",
    )
