"""llama.cpp's memory on each device, from the model's header alone.

`Footprint` answers the search: cheap to ask (prefix sums), cheap to re-make for another context. Golden figures:
tests/data/oracle; table of errors: benchmarks/memory_accuracy.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from msgspec.structs import replace

from mgpu.adapter import Work
from mgpu.model import Model
from mgpu.plan import DeviceBytes, HostBytes, Shape
from mgpu.rig import Gpu
from mgpu_adapters.llamacpp import cache
from mgpu_adapters.llamacpp.architectures import NO_FLASH_ATTENTION
from mgpu_adapters.llamacpp.backends import driver_of
from mgpu_adapters.llamacpp.blocks import Anatomy
from mgpu_adapters.llamacpp.compute import Compute
from mgpu_adapters.llamacpp.overhead import exchange, kernel_scratch, overhead
from mgpu_adapters.llamacpp.remembered import Remembered
from mgpu_adapters.llamacpp.settings import Settings
from mgpu_adapters.llamacpp.tensor import Cuts, Ranks
from mgpu_adapters.llamacpp.weights import HOST_RULES, Rules, Weights
from mgpu_adapters.llamacpp.work import effort_of, work_of

#: What the compute buffers of tensor ranks are those of: llama.cpp makes each as large as if nothing were cut.
_ALONE: Final = Shape(n_devices=1)


class Footprint:
    """What a model takes, with these settings, wherever its units go. Immutable, memory of past answers aside."""

    def __init__(
        self,
        weights: Weights,
        anatomy: Anatomy,
        settings: Settings,
        remembered: Remembered,
        cuts: Cuts | None = None,
    ) -> None:
        self.model = weights.model
        if self.model.architecture in NO_FLASH_ATTENTION:
            settings = replace(settings, flash_attn=False)
        self.settings = settings
        self.n_units = weights.n_units
        self.anatomy = anatomy
        self._weights = weights
        self._remembered = remembered
        self._compute = Compute(anatomy, weights, settings, remembered)
        self._scratch = kernel_scratch(anatomy, settings)
        self._caches: dict[Rules, tuple[int, ...]] = {}
        split = (settings.tensor_split if settings.split_mode == "tensor" else None) or ()
        self._cuts = cuts or Cuts(anatomy, weights, split)
        self._flaws: dict[int, str | None] = {}
        self._stored: dict[tuple[int, Rules], tuple[int, int]] = {}

    def with_settings(self, settings: Settings) -> Footprint:
        """The same model with other settings; what depends on the model alone is shared, and what contexts tell."""
        alike = replace(settings, n_ctx=self.settings.n_ctx) == self.settings
        remembered = self._remembered if alike else Remembered()
        return Footprint(self._weights, self.anatomy, settings, remembered, self._cuts)

    def device(self, span: range, shape: Shape, gpu: Gpu) -> DeviceBytes:
        """Bytes on `gpu` when it holds the units of `span` (non-empty, contiguous).

        As a tensor rank, which takes part in all units: the bytes of the largest rank.
        """
        if shape.mode == "tensor":
            return self._rank(shape, gpu)
        return DeviceBytes(
            weights=self.device_weights(span, shape, gpu),
            kv=self.device_kv(span, gpu),
            compute=self._compute.device(span, shape, gpu),
            overhead=overhead(gpu, self._scratch),
        )

    def stored(self, span: range, shape: Shape, gpu: Gpu) -> int:
        """Of those, weights and cache: the larger part, and cheap to ask."""
        if shape.mode == "tensor":
            return sum(self._rank_stored(shape.n_devices, driver_of(gpu).rules))
        return self.device_weights(span, shape, gpu) + self.device_kv(span, gpu)

    def ranks(self, n: int) -> Ranks:
        """The model cut for `n` tensor ranks."""
        return self._cuts.ranks(n)

    def tensor_flaw(self, n: int, flaw_of: Callable[[Anatomy, Ranks], str | None]) -> str | None:
        """What `flaw_of` says of the model cut for `n` ranks; asked once."""
        if n not in self._flaws:
            self._flaws[n] = flaw_of(self.anatomy, self.ranks(n))
        return self._flaws[n]

    def _rank(self, shape: Shape, gpu: Gpu) -> DeviceBytes:
        weights, kv = self._rank_stored(shape.n_devices, driver_of(gpu).rules)
        return DeviceBytes(
            weights=weights,
            kv=kv,
            compute=self._compute.device(range(self.n_units), _ALONE, gpu),
            overhead=overhead(gpu, self._scratch) + exchange(self.anatomy, self.settings, shape.n_devices, gpu),
        )

    def _rank_stored(self, n: int, rules: Rules) -> tuple[int, int]:
        """Weights and cache of the largest rank."""
        sizes = self._stored.get((n, rules))
        if sizes is None:
            ranks = self.ranks(n)
            sizes = max(ranks.weights(rules)), max(ranks.cache(self.settings, rules))
            self._stored[n, rules] = sizes
        return sizes

    def device_weights(self, span: range, shape: Shape, gpu: Gpu) -> int:
        """Of those, the weights: to the byte."""
        table = self._weights.table(driver_of(gpu).rules, self.settings.override_tensor)
        has_block = span.start < self.n_units - 1
        return table.span(span, self._host_experts(shape)) + (table.every if has_block else 0)

    def device_kv(self, span: range, gpu: Gpu) -> int:
        """Of those, the KV cache and recurrent state: to the byte."""
        if not self.settings.kv_offload:
            return 0
        sums = self._cache(driver_of(gpu).rules)
        return sums[span.stop] - sums[span.start]

    def host(self, shape: Shape, gpus: tuple[Gpu, ...]) -> HostBytes:
        """Bytes on the host beside those devices. Without devices, everything is there."""
        if shape.mode == "tensor":
            shape, gpus = _ALONE, gpus[:1]
        return HostBytes(
            weights=self.host_weights(shape, gpus),
            kv=self.host_kv(shape, gpus),
            compute=self._compute.host(shape, gpus),
        )

    def host_weights(self, shape: Shape, gpus: tuple[Gpu, ...]) -> int:
        """Of those, the weights, repacked ones included."""
        on_host = shape.host_layers if gpus else self.n_units
        table = self._weights.table(HOST_RULES)
        weights = table.host + table.fixed[on_host] + table.experts[max(on_host, self._host_experts(shape))]
        if on_host:
            weights += table.every
        if on_host == self.n_units:
            return weights - self._weights.copied_bytes  # the embedding once, for both its uses
        return weights + max((self._kept_back(on_host, gpu) for gpu in gpus), default=0)

    def host_kv(self, shape: Shape, gpus: tuple[Gpu, ...]) -> int:
        """Of those, the KV cache and recurrent state."""
        on_host = shape.host_layers if gpus and self.settings.kv_offload else self.n_units
        return self._cache(HOST_RULES)[on_host]

    def _kept_back(self, on_host: int, gpu: Gpu) -> int:
        """Host bytes of tensors that overrides, or this device's limit, keep from it."""
        kept = self._weights.table(driver_of(gpu).rules, self.settings.override_tensor).kept
        return kept[-1] - kept[on_host]

    def work(self, depth: int, build: int | None) -> Work:
        """What a token takes with `depth` tokens in the cache, under llama.cpp of that build (None: unknown)."""
        return work_of(effort_of(self._weights, self.anatomy), self.anatomy, self.settings, depth, build)

    def _host_experts(self, shape: Shape) -> int:
        return min(max(shape.host_experts, self.settings.n_cpu_moe), self.n_units)

    def _cache(self, rules: Rules) -> tuple[int, ...]:
        sums = self._caches.get(rules)
        if sums is None:
            sums = self._caches[rules] = cache.unit_bytes(self.anatomy.caches, self.settings, rules)
        return sums


def footprint(model: Model, settings: Settings) -> Footprint:
    """What `model` takes with `settings`. Use `with_settings` for the same model with another context."""
    return Footprint(Weights(model), Anatomy(model), settings, Remembered())
