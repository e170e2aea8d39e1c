"""The two versions of ExLlama behind one face: memory of a span or a rank, and the `gpu_split` that holds to a plan."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from msgspec.structs import replace

from mgpu.model import Model
from mgpu.plan import DeviceBytes
from mgpu.request import RuntimeName
from mgpu.units import GIB, MIB
from mgpu_adapters.exllama.memory import CUDA_CONTEXT, V3_MARGIN, FootprintV2, FootprintV3
from mgpu_adapters.exllama.settings import Settings, cache_mode
from mgpu_adapters.exllama.split import V3Release, gpu_split, v2_manual, v3_layers, v3_tensor_targets
from mgpu_adapters.exllama.tensor import TENSOR_EXTRA, flaw_v2, flaw_v3, rank_model, shares_v2, shares_v3


class Engine(Protocol):
    """One model with its settings in one version of ExLlama. Immutable."""

    runtime: RuntimeName
    title: str
    model: Model
    settings: Settings
    n_units: int

    def with_settings(self, settings: Settings) -> Engine: ...
    def cache_mode(self, kv_type: str) -> str:
        """TabbyAPI's word for a cache type. Raises `UsageError`."""
        ...

    def span(self, span: range) -> DeviceBytes:
        """Bytes on a device with these units."""
        ...

    def rank(self, n_ranks: int) -> DeviceBytes:
        """Bytes on the fullest of so many tensor ranks."""
        ...

    def flaw(self, n_ranks: int) -> str | None:
        """What keeps it from running as tensor ranks."""
        ...

    def cache_read(self, block: int, depth: int) -> float:
        """Bytes of cache or state that a token reads in a block when `depth` tokens are there."""
        ...

    def gpu_split(self, counts: Sequence[int], usable: Sequence[int]) -> tuple[float, ...]:
        """The list (GiB) that makes the loader place `counts` units. Raises `DoesNotFitError`."""
        ...

    def rank_split(self, usable: Sequence[int]) -> tuple[float, ...]:
        """The list (GiB) for tensor ranks: equal parts, as they are planned."""
        ...


class V2:
    """ExLlamaV2. Its list counts weights and its own reckoning of scratch, no cache."""

    runtime: RuntimeName = "exllamav2"
    title = "ExLlamaV2"

    def __init__(self, model: Model, settings: Settings) -> None:
        self.model = model
        self.settings = settings
        self.footprint = FootprintV2(model, settings.for_v2())
        self.n_units = self.footprint.n_units

    def with_settings(self, settings: Settings) -> V2:
        return V2(self.model, settings)

    def cache_mode(self, kv_type: str) -> str:
        return cache_mode(kv_type, version=2)

    def span(self, span: range) -> DeviceBytes:
        return self.footprint.device(span)

    def rank(self, n_ranks: int) -> DeviceBytes:
        ranked = FootprintV2(rank_model(self.model, shares_v2(self.footprint, n_ranks)), self.settings.for_v2())
        return _with_extra(ranked.device(range(self.n_units)))

    def flaw(self, n_ranks: int) -> str | None:
        return flaw_v2(self.footprint, n_ranks)

    def cache_read(self, block: int, depth: int) -> float:
        del block
        return self.footprint.kv_layer * min(depth / self.footprint.settings.tokens, 1.0)

    def gpu_split(self, counts: Sequence[int], usable: Sequence[int]) -> tuple[float, ...]:
        del usable  # the list is a reckoning of its own
        return gpu_split(v2_manual(self.footprint), counts)

    def rank_split(self, usable: Sequence[int]) -> tuple[float, ...]:
        each = max(min(usable) - CUDA_CONTEXT, 0) // MIB * MIB / GIB
        return (each,) * len(usable)


class V3:
    """ExLlamaV3. Its list caps all that a device holds."""

    runtime: RuntimeName = "exllamav3"
    title = "ExLlamaV3"

    def __init__(self, model: Model, settings: Settings, library: tuple[int, ...]) -> None:
        self.model = model
        self.settings = settings
        self.library = library
        self.footprint = FootprintV3(model, settings.for_v3())
        self.n_units = self.footprint.n_units

    @property
    def release(self) -> V3Release:
        """Whose loader it is: the one whose list is blind to other processes, or the later one."""
        return "1.6.5" if self.library >= (1, 6) else "1.4.1"

    def with_settings(self, settings: Settings) -> V3:
        return V3(self.model, settings, self.library)

    def cache_mode(self, kv_type: str) -> str:
        return cache_mode(kv_type, version=3)

    def span(self, span: range) -> DeviceBytes:
        return self.footprint.device(span)

    def rank(self, n_ranks: int) -> DeviceBytes:
        ranked = FootprintV3(rank_model(self.model, shares_v3(self.model, n_ranks)), self.settings.for_v3())
        return _with_extra(ranked.device(range(self.n_units)))

    def flaw(self, n_ranks: int) -> str | None:
        return flaw_v3(self.model, n_ranks, self.library)

    def cache_read(self, block: int, depth: int) -> float:
        return self.footprint.kv_read(block, depth)

    def gpu_split(self, counts: Sequence[int], usable: Sequence[int]) -> tuple[float, ...]:
        limits = [max(each - CUDA_CONTEXT - V3_MARGIN, 0) for each in usable]
        return gpu_split(v3_layers(self.footprint, self.release), counts, limits)

    def rank_split(self, usable: Sequence[int]) -> tuple[float, ...]:
        return v3_tensor_targets([min(usable)] * len(usable))


def _with_extra(held: DeviceBytes) -> DeviceBytes:
    return replace(held, overhead=held.overhead + TENSOR_EXTRA)
