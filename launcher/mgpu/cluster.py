"""Services that place a model by themselves, on machines of their own choice. Types only: no I/O, no rule."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final, Self

from msgspec import Struct
from msgspec.structs import replace

from mgpu.adapter import Pinned, Work
from mgpu.model import Model
from mgpu.plan import DeviceBytes, HostBytes, Shape
from mgpu.request import Request, RuntimeName
from mgpu.rig import Gpu

#: Options that mean something to cards of this machine alone: the request's field, and what a person writes.
_LOCAL: Final = (
    ("gpus", "--gpus"),
    ("reserve", "--reserve"),
    ("kv_type", "--kv-type"),
    ("offload", "--offload"),
    ("split", "--split"),
    ("ctx", "--ctx"),
    ("users", "--users"),
    ("host", "--host"),
    ("port", "--port"),
    ("api_key", "--api-key"),
)


class Node(Struct, frozen=True, kw_only=True):
    """One machine of a service. Bytes are 0 where it does not tell them."""

    name: str
    total_bytes: int = 0
    free_bytes: int = 0


class Outlook(Struct, frozen=True, kw_only=True):
    """What a service would do with one model, as far as it has said before it is asked to load it.

    `nodes`: those that may get it; None where the service was not asked (a plan for another machine). `unsharded`: why
    one node gets all of it, and the source of that; None where several may share it.
    """

    service: str  # "the Exo cluster at http://127.0.0.1:52415"
    nodes: tuple[Node, ...] | None
    unsharded: tuple[str, str] | None = None
    needed_bytes: int | None = None  # of weights; None: not known

    @property
    def free_bytes(self) -> int:
        """On all nodes together."""
        return sum(node.free_bytes for node in self.nodes or ())

    @property
    def roomiest(self) -> Node | None:
        """The node with the most free memory."""
        return max(self.nodes or (), key=lambda node: node.free_bytes, default=None)


class Remote(Struct, frozen=True, kw_only=True):
    """What the jobs of such services share: of `mgpu.adapter.Job`, all that is about cards of this machine."""

    runtime: RuntimeName
    model: Model
    outlook: Outlook
    ctx: int
    ctx_train: int
    users: int
    warnings: tuple[str, ...] = ()
    kv_type: str = "f16"
    ctx_step: int = 1
    n_units: int = 0
    has_experts: bool = False
    computes_on_cpu: bool = False
    tensor_is_experimental: bool = False
    pinned: Pinned = Pinned()

    def why_not_tensor(self, gpus: tuple[Gpu, ...]) -> str | None:
        del gpus
        return f"{self.runtime} places by itself"

    def counts(self, tensor_split: tuple[float, ...], host_layers: int) -> tuple[int, ...]:
        del tensor_split, host_layers
        return ()

    def device(self, span: range, shape: Shape, gpu: Gpu) -> DeviceBytes:
        del span, shape, gpu
        return DeviceBytes(weights=0, kv=0, compute=0, overhead=0)

    def stored(self, span: range, shape: Shape, gpu: Gpu) -> int:
        del span, shape, gpu
        return 0

    def host(self, shape: Shape, gpus: tuple[Gpu, ...]) -> HostBytes:
        del shape, gpus
        return HostBytes(weights=0, kv=0, compute=0)

    @property
    def work(self) -> Work:
        """Nothing that is known here."""
        nothing = (0.0,)
        return Work(
            runtime=self.runtime, model=self.model, kv_type=self.kv_type, users=self.users, ctx=self.ctx, depth=0,
            weights=nothing, experts=nothing, unpack=nothing, cache=nothing, heads=nothing, layers=nothing,
            recurrent=nothing, routed=nothing, flops=nothing, head_dim=0,
        )  # fmt: skip

    def at_ctx(self, ctx: int) -> Self:
        return replace(self, ctx=ctx)

    def at_users(self, users: int) -> Self:
        return replace(self, users=users)

    def at_kv_type(self, kv_type: str) -> Self:
        return replace(self, kv_type=kv_type)


def without_effect(request: Request, heeded: frozenset[str]) -> Iterator[str]:
    """The options a person gave that such a service does not take, as they are written. `heeded`: fields it does."""
    usual = Request()
    for field, option in _LOCAL:
        if field not in heeded and getattr(request, field) != getattr(usual, field):
            yield option
