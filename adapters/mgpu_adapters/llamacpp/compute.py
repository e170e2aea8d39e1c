"""llama.cpp's compute buffers: what its graph takes on each device and on the host, beside weights and cache.

The graph is simulated, but not whole: blocks alike take the same memory, so a few of each kind, in their order, reach
the same peak as all of them. What was simulated once is remembered, so that a search may ask thousands of times.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from typing import Final

from mgpu.plan import Shape
from mgpu.rig import Gpu
from mgpu_adapters.llamacpp.backends import Driver, driver_of
from mgpu_adapters.llamacpp.blocks import Anatomy, Seats, Sent
from mgpu_adapters.llamacpp.cache import n_cells
from mgpu_adapters.llamacpp.estimate import estimated
from mgpu_adapters.llamacpp.remembered import Remembered, Sizes
from mgpu_adapters.llamacpp.scheduler import OFFLOAD_MIN_BATCH, Backend, can_attend, reserve
from mgpu_adapters.llamacpp.settings import Settings
from mgpu_adapters.llamacpp.weights import HOST_ALIGNMENT, HOST_RULES, Weights
from mgpu_adapters.llamacpp.whole import model_graph

#: Batches in flight when several devices work in a pipeline (GGML_SCHED_MAX_COPIES, a build option).
N_COPIES: Final = 4

#: Blocks alike that are simulated at either end of a device's share: memory settles into its pattern within two.
_ENDS: Final = 2

#: Added, in per cent, for architectures whose graph is only assumed to be like a Llama's.
_UNSUPPORTED_MARGIN: Final = 25


#: Of each block: its number among shapes, and among shapes and sizes of what a device is sent.
Kinds = tuple[tuple[int, int], ...]


class Compute:
    """Scratch memory of one model with one set of settings."""

    def __init__(self, anatomy: Anatomy, weights: Weights, settings: Settings, remembered: Remembered) -> None:
        self.anatomy = anatomy
        self.weights = weights
        self.settings = settings
        self._remembered = remembered
        # What the context changes beside the length of the full cache: then nothing follows from other contexts.
        windows = {block for block in anatomy.caches if block.window}
        self._turns = (settings.u, *sorted({n_cells(block, settings) for block in windows}))
        self._stateful = any(anatomy.recurs)  # then a block's work is not done before the next has begun
        # Recurrent blocks among others, in no regular order (Nemotron-H): no few of them stand for all.
        self._irregular = self._stateful and not all(anatomy.recurs) and not anatomy.periodic
        # Of such models, the output's first steps may join the last block's device.
        self._picks_late = bool(anatomy.traits.late_rows)
        self._answers: dict[tuple[int, ...], int] = {}
        self._kinds: dict[tuple[int, int, bool], Kinds] = {}
        self._leaders: dict[tuple[int, int], tuple[int, ...]] = {}

    def device(self, span: range, shape: Shape, gpu: Gpu) -> int:
        """Bytes on `gpu` when it holds the units of `span`."""
        driver = driver_of(gpu)
        asked = (span.start, span.stop, shape.n_devices, shape.host_layers, shape.host_experts, id(driver))
        size = self._answers.get(asked)
        if size is None:
            size = self._answers[asked] = self._device(span, shape, driver)
        return size

    def _device(self, span: range, shape: Shape, driver: Driver) -> int:
        trunk, on_host = self.anatomy.n_trunk, min(shape.host_layers, self.anatomy.n_trunk)
        start, stop = min(span.start, trunk), min(span.stop, trunk)
        kinds = self._kinds_of(shape, driver)
        blocks = [*self._some(0, on_host, kinds)]
        ends = []
        if start > on_host:  # the device before: its last blocks
            blocks += sorted(self._to_mixer(range(start - 1, on_host - 1, -1)))
            ends.append(start)
        mine = len(ends)
        blocks += self._some(start, stop, kinds, every=self._adds_up(driver, first=start == on_host))
        ends.append(stop)
        if span.stop < self.weights.n_units:  # the device after: its first blocks, the output
            blocks += self._to_mixer(range(stop, trunk)) if self._stateful or self._picks_late else []
            ends.append(trunk)
        sizes = self._reserve(tuple(dict.fromkeys(blocks)), tuple(ends), shape, driver, kinds)
        return self._safe(sizes[mine])

    def _adds_up(self, driver: Driver, *, first: bool) -> bool:
        """Whether each block alike takes more: it is sent something of its own from another device, for as long as
        the device works. Layer inputs and shared caches (Gemma 3n), or attention that the device has no kernel for."""
        anatomy = self.anatomy
        if anatomy.shared_caches and not first:
            return True
        dims = (anatomy.hyper.head_dim_k, anatomy.hyper.head_dim_v)
        return self.settings.flash_attn and driver.cuda and not can_attend(*dims)

    def _to_mixer(self, blocks: range) -> list[int]:
        """Of a neighbour's blocks, the nearest, up to one that mixes tokens: only there is the graph put in order."""
        near: list[int] = []
        for il in blocks:
            near.append(il)
            cache = self.anatomy.caches[il]
            if cache.k or cache.state_r or cache.state_s:
                break
        return near

    def host(self, shape: Shape, gpus: tuple[Gpu, ...]) -> int:
        """Bytes on the host beside those devices."""
        trunk = self.anatomy.n_trunk
        on_host = min(shape.host_layers, trunk) if gpus else trunk
        driver = driver_of(gpus[0]) if gpus else None
        kinds = self._kinds_of(shape, driver)
        every = driver is not None and self._adds_up(driver, first=True)
        blocks = [*self._some(0, on_host, kinds), *self._some(on_host, trunk, kinds, every=every)]
        if not gpus:
            return self._safe(self._reserve(tuple(blocks), (), shape, None, kinds)[-1])
        middle = trunk if len(gpus) == 1 else (on_host + trunk + 1) // 2
        ends = (middle,) if len(gpus) == 1 else (middle, trunk)
        return self._safe(self._reserve(tuple(blocks), ends, shape, driver, kinds)[-1])

    def _safe(self, size: int) -> int:
        return size if self.anatomy.traits.supported else size + size * _UNSUPPORTED_MARGIN // 100

    def pipelined(self, shape: Shape) -> bool:
        """Whether llama.cpp keeps several batches in flight, and a copy of every input for each of them.

        Source: llama.cpp b11434, src/llama-context.cpp: several devices, every layer and the cache on them, and no
        tensor overridden.
        """
        settings = self.settings
        moved = shape.host_layers or shape.host_experts or settings.n_cpu_moe or settings.override_tensor
        by_layer = settings.split_mode in (None, "layer")
        return shape.n_devices > 1 and shape.mode == "pipeline" and by_layer and settings.kv_offload and not moved

    def _reserve(
        self, blocks: tuple[int, ...], ends: tuple[int, ...], shape: Shape, driver: Driver | None, kinds: Kinds
    ) -> Sizes:
        """Bytes on each backend for a graph through `blocks`, devices ending at `ends`; remembered by what matters."""
        settings = self.settings
        on_host = min(shape.host_layers, self.anatomy.n_trunk) if driver is not None else self.anatomy.n_trunk
        whole_host = driver is None or shape.host_layers >= self.weights.n_units
        copies = N_COPIES if self.pipelined(shape) else 1
        rules = HOST_RULES if driver is None else driver.rules
        cuda, offloads = (False, False) if driver is None else (driver.cuda, driver.offloads)
        layout = tuple(
            (kinds[il][1], -1 if il < on_host else bisect_left(ends, il + 1), il if self._by_number(il) else 0)
            for il in blocks
        )
        question = (layout, len(ends), copies, rules, cuda, offloads, whole_host, self._turns)

        def simulate() -> Sizes:
            seats = Seats(
                blocks=blocks,
                n_host=on_host,
                ends=ends,
                output=len(ends) if whole_host else len(ends) - 1,
                host_experts=max(shape.host_experts, settings.n_cpu_moe) if ends else 0,
                kept=self.weights.kept(rules, settings.override_tensor) if ends else frozenset(),
                pinned=on_host == 0 or settings.u < OFFLOAD_MIN_BATCH,
            )
            backends = [Backend(rules.alignment, cuda=cuda, offloads=offloads) for _ in ends] + [
                Backend(HOST_ALIGNMENT)
            ]
            return tuple(self._sizes(seats, backends, copies))

        return self._remembered.sizes(question, settings.n_ctx_seq, simulate)

    def _sizes(self, seats: Seats, backends: list[Backend], copies: int) -> list[int]:
        if not self.anatomy.drawable:
            return estimated(self.anatomy, self.settings, seats.cpu, copies, on_host=seats.n_host > 0)
        return reserve(model_graph(self.anatomy, self.settings, seats), backends, copies)

    def _by_number(self, il: int) -> bool:
        """Whether a block's number itself matters: it reads another block's cache, which may be elsewhere."""
        cache = self.anatomy.caches[il]
        return not cache.k and not cache.state_r and not cache.state_s and bool(self.anatomy.shared_caches)

    def _kinds_of(self, shape: Shape, driver: Driver | None) -> Kinds:
        """A number for each block; blocks with the same number are alike.

        Blocks on the host whose work a device takes over are told apart by the sizes of the weights it is sent.
        """
        settings = self.settings
        host_layers, host_experts = shape.host_layers, max(shape.host_experts, settings.n_cpu_moe)
        offloads = driver is not None and driver.offloads
        limited = driver is not None and driver.rules.max_tensor_bytes is not None
        if offloads and (settings.override_tensor or limited):
            host_layers = self.anatomy.n_trunk
        kinds = self._kinds.get((host_layers, host_experts, offloads))
        if kinds is None:
            kind = self.anatomy.kind
            sent = [
                _sent(il, host_layers, host_experts) if offloads else "nothing" for il in range(self.anatomy.n_trunk)
            ]
            kinds = tuple(
                (2 * kind(il, sent="nothing") + (il < host_experts), 2 * kind(il, sent=what) + (il < host_experts))
                for il, what in enumerate(sent)
            )
            self._kinds[host_layers, host_experts, offloads] = kinds
        return kinds

    def _some(self, start: int, stop: int, kinds: Kinds, *, every: bool = False) -> tuple[int, ...]:
        """Of the blocks from `start` to `stop`, the first two of each kind among such neighbours, and the last."""
        if every or self._irregular or stop - start <= 2 * _ENDS:
            return tuple(range(start, stop))
        tail = _ENDS if self._stateful else int(stop == len(kinds))
        leaders = self._leaders_from(start, kinds)
        return (*leaders[: bisect_left(leaders, stop - tail)], *range(stop - tail, stop))

    def _leaders_from(self, start: int, kinds: Kinds) -> tuple[int, ...]:
        key = (start, id(kinds))
        leaders = self._leaders.get(key)
        if leaders is None:
            seen: Counter[tuple[int, ...]] = Counter()
            around: Counter[tuple[int, ...]] = Counter()
            times = 1 if self.anatomy.periodic else _ENDS
            chosen = []
            for il in range(start, len(kinds)):
                shapes = tuple(shape for shape, _ in kinds[max(il - 1, start) : il + 2])
                pair = tuple(kind for _, kind in kinds[max(il - 1, start) : il + 1])
                seen[pair] += 1
                around[shapes] += 1
                if seen[pair] <= times or around[shapes] <= times:
                    chosen.append(il)
            leaders = self._leaders[key] = tuple(chosen)
        return leaders


def _sent(il: int, host_layers: int, host_experts: int) -> Sent:
    """What of block `il` a device that takes over the host's work is sent."""
    if il < host_layers:
        return "all"
    return "experts" if il < host_experts else "nothing"
