"""A job for a runtime of which little is known: weights as stored, a plain cache, and room for the rest.

For adapters that other packages bring: derive from `PlainJob`, write `command`, and set what differs. A runtime whose
own rules are known deserves a memory model of its own.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import cached_property
from itertools import accumulate
from typing import Self

from mgpu.adapter import TYPICAL_DEPTH, Command, Endpoint, Installed, Pinned, Work
from mgpu.errors import UsageError
from mgpu.model import Model
from mgpu.plan import DeviceBytes, HostBytes, Layout, Shape
from mgpu.request import DEFAULT_CTX, Request, RuntimeName
from mgpu.rig import Gpu, Rig
from mgpu.service import Attachment
from mgpu.units import MIB

_CACHE_BYTES = 2  # an f16 element


class PlainJob:
    """Implements `mgpu.adapter.Job`, but for `command`. Immutable: `at_ctx` and `at_users` make new ones.

    `compute_bytes` and `overhead_bytes` are what each device takes beside weights and cache.
    """

    ctx_step = 1
    computes_on_cpu = False
    has_experts = False
    tensor_is_experimental = False
    kv_type = "f16"
    pinned = Pinned()
    compute_bytes = 512 * MIB
    overhead_bytes = 512 * MIB

    def __init__(self, model: Model, request: Request, installed: Installed) -> None:
        self.model = model
        self.request = request
        self.installed = installed
        self.ctx = request.ctx if isinstance(request.ctx, int) else min(self.ctx_train, DEFAULT_CTX)
        self.users = request.users
        self.at_kv_type(request.kv_type)

    @property
    def runtime(self) -> RuntimeName:
        return self.installed.runtime

    @property
    def ctx_train(self) -> int:
        return self.model.hyper.n_ctx_train

    @property
    def n_units(self) -> int:
        return self.model.hyper.n_layer + 1

    @property
    def warnings(self) -> tuple[str, ...]:
        return ()

    def why_not_tensor(self, gpus: tuple[Gpu, ...]) -> str | None:
        del gpus
        return f"{self.runtime} has no tensor ranks"

    def counts(self, tensor_split: tuple[float, ...], host_layers: int) -> tuple[int, ...]:
        """Proportions as whole units, by rounding where each share ends."""
        units, whole = self.n_units - host_layers, sum(tensor_split)
        ends = [round(units * end / whole) for end in accumulate(tensor_split)]
        return tuple(end - start for start, end in zip([0, *ends], ends, strict=False))

    def device(self, span: range, shape: Shape, gpu: Gpu) -> DeviceBytes:
        del shape, gpu
        weights, cache = self._stored[span.stop] - self._stored[span.start], self._cache(span)
        return DeviceBytes(weights=weights, kv=cache, compute=self.compute_bytes, overhead=self.overhead_bytes)

    def stored(self, span: range, shape: Shape, gpu: Gpu) -> int:
        bytes_ = self.device(span, shape, gpu)
        return bytes_.weights + bytes_.kv

    def host(self, shape: Shape, gpus: tuple[Gpu, ...]) -> HostBytes:
        del gpus
        span = range(shape.host_layers)
        return HostBytes(weights=self._stored[span.stop], kv=self._cache(span), compute=self.compute_bytes)

    @cached_property
    def work(self) -> Work:
        depth = self.ctx // 2 if self.request.ctx is not None else min(self.ctx // 2, TYPICAL_DEPTH)
        hyper, n = self.model.hyper, self.model.hyper.n_layer
        used = hyper.n_expert_used / hyper.n_expert if hyper.n_expert else 1.0
        experts = [
            used * sum(t.n_bytes for t in self.model.tensors if t.layer == i and t.kind == "expert") for i in range(n)
        ]
        read = [sum(t.n_bytes for t in self.model.tensors if t.layer == i and t.kind != "expert") for i in range(n)]
        per_byte = 2 * self.model.parameters / max(self.model.weights_bytes, 1)
        units = [*read, self._output_bytes]
        routed = [*experts, 0.0]
        return Work(
            runtime=self.runtime,
            model=self.model,
            kv_type=self.kv_type,
            users=self.users,
            ctx=self.ctx,
            depth=depth,
            weights=_summed(units),
            experts=_summed(routed),
            unpack=_summed([0.0] * (n + 1)),
            cache=_summed([*(depth * self._row(layer) for layer in range(n)), 0.0]),
            heads=_summed([*(depth * hyper.n_head[layer] for layer in range(n)), 0.0]),
            layers=_summed([1.0] * n + [0.0]),
            recurrent=_summed([0.0] * (n + 1)),
            routed=_summed([float(each > 0) for each in routed]),
            flops=_summed([per_byte * (a + b) for a, b in zip(units, routed, strict=True)]),
            head_dim=hyper.head_dim_k,
        )

    def at_ctx(self, ctx: int) -> Self:
        return self._with(ctx, self.users)

    def at_users(self, users: int) -> Self:
        return self._with(self.ctx, users)

    def at_kv_type(self, kv_type: str) -> Self:
        if kv_type != self.kv_type:
            raise UsageError(
                f"--kv-type {kv_type}: {self.runtime} keeps its cache as {self.kv_type}", hint="leave it out"
            )
        return self

    def command(self, layout: Layout, rig: Rig, endpoint: Endpoint) -> Command:
        raise NotImplementedError

    def attachment(self, layout: Layout, rig: Rig) -> Attachment | None:
        del layout, rig
        return None

    def _with(self, ctx: int, users: int) -> Self:
        other = copy.copy(self)
        other.ctx, other.users = ctx, users
        other.__dict__.pop("work", None)
        return other

    def _cache(self, span: range) -> int:
        layers = range(span.start, min(span.stop, self.n_units - 1))
        return self.ctx * self.users * sum(self._row(layer) for layer in layers)

    def _row(self, layer: int) -> int:
        """Bytes of one token in one layer's cache."""
        hyper = self.model.hyper
        return hyper.n_head_kv[layer] * (hyper.head_dim_k + hyper.head_dim_v) * _CACHE_BYTES

    @cached_property
    def _output_bytes(self) -> int:
        """What the last unit multiplies: the head, or the embedding where the two are one."""
        sizes = self.model.bytes_by_class()
        head, embedding = sizes.get("output", 0), sizes.get("token_embedding", 0)
        return head if head > embedding // 2 else head + embedding

    @cached_property
    def _stored(self) -> tuple[int, ...]:
        """Weights as prefix sums over the units; what belongs to no block lies with the output."""
        blocks = [0] * (self.n_units - 1)
        for tensor in self.model.tensors:
            if tensor.layer is not None:
                blocks[tensor.layer] += tensor.n_bytes
        return tuple(accumulate([*blocks, self.model.weights_bytes - sum(blocks)], initial=0))


def _summed(units: Sequence[float]) -> tuple[float, ...]:
    """Prefix sums over the units."""
    return tuple(accumulate(units, initial=0.0))
