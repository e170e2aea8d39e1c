"""llama.cpp's memory on each device, from the model's header alone.

`Footprint` answers the search: cheap to ask (prefix sums), cheap to re-make for another context. Golden figures:
tests/data/oracle; table of errors: benchmarks/memory_accuracy.py.
"""

from __future__ import annotations

from msgspec.structs import replace

from mgpu.model import Model
from mgpu.plan import DeviceBytes, HostBytes, Shape
from mgpu.rig import Gpu
from mgpu_adapters.llamacpp import cache
from mgpu_adapters.llamacpp.architectures import NO_FLASH_ATTENTION
from mgpu_adapters.llamacpp.backends import driver_of
from mgpu_adapters.llamacpp.blocks import Anatomy
from mgpu_adapters.llamacpp.compute import Compute
from mgpu_adapters.llamacpp.overhead import kernel_scratch, overhead
from mgpu_adapters.llamacpp.remembered import Remembered
from mgpu_adapters.llamacpp.settings import Settings
from mgpu_adapters.llamacpp.weights import HOST_RULES, Rules, Weights


class Footprint:
    """What a model takes, with these settings, wherever its units go. Immutable, memory of past answers aside."""

    def __init__(self, weights: Weights, anatomy: Anatomy, settings: Settings, remembered: Remembered) -> None:
        self.model = weights.model
        if self.model.architecture in NO_FLASH_ATTENTION:
            settings = replace(settings, flash_attn=False)
        self.settings = settings
        self.n_units = weights.n_units
        self._weights = weights
        self._anatomy = anatomy
        self._remembered = remembered
        self._compute = Compute(anatomy, weights, settings, remembered)
        self._scratch = kernel_scratch(anatomy, settings)
        self._caches: dict[Rules, tuple[int, ...]] = {}
        self._reads: tuple[int, ...] | None = None

    def with_settings(self, settings: Settings) -> Footprint:
        """The same model with other settings; what depends on the model alone is shared, and what contexts tell."""
        alike = replace(settings, n_ctx=self.settings.n_ctx) == self.settings
        return Footprint(self._weights, self._anatomy, settings, self._remembered if alike else Remembered())

    def device(self, span: range, shape: Shape, gpu: Gpu) -> DeviceBytes:
        """Bytes on `gpu` when it holds the units of `span` (non-empty, contiguous)."""
        return DeviceBytes(
            weights=self.device_weights(span, shape, gpu),
            kv=self.device_kv(span, gpu),
            compute=self._compute.device(span, shape, gpu),
            overhead=overhead(gpu, self._scratch),
        )

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

    def traffic(self, span: range, shape: Shape) -> int:
        """Bytes read from the device's memory to generate one token with half of the context in use."""
        fixed, experts = self._weights.traffic
        first = min(max(span.start, self._host_experts(shape)), span.stop)
        total = fixed[span.stop] - fixed[span.start] + experts[span.stop] - experts[first]
        sums = self._cache_reads()
        return int(total) + (sums[span.stop] - sums[span.start] if self.settings.kv_offload else 0)

    def host_traffic(self, shape: Shape) -> int:
        """Bytes the CPU reads from RAM to generate one token."""
        fixed, experts = self._weights.traffic
        on_host = shape.host_layers if shape.n_devices else self.n_units
        sums = self._cache_reads()
        read = fixed[on_host] + experts[max(on_host, self._host_experts(shape))]
        return int(read) + (sums[on_host] if self.settings.kv_offload else sums[-1])

    def _host_experts(self, shape: Shape) -> int:
        return min(max(shape.host_experts, self.settings.n_cpu_moe), self.n_units)

    def _cache(self, rules: Rules) -> tuple[int, ...]:
        sums = self._caches.get(rules)
        if sums is None:
            sums = self._caches[rules] = cache.unit_bytes(self._anatomy.caches, self.settings, rules)
        return sums

    def _cache_reads(self) -> tuple[int, ...]:
        if self._reads is None:
            self._reads = cache.unit_traffic(self._anatomy.caches, self.settings)
        return self._reads


def footprint(model: Model, settings: Settings) -> Footprint:
    """What `model` takes with `settings`. Use `with_settings` for the same model with another context."""
    return Footprint(Weights(model), Anatomy(model), settings, Remembered())
