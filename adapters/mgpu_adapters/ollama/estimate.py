"""How Ollama before 0.30 estimated a model, and where it put the layers. Sources: `mgpu_adapters.ollama.predict`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from msgspec import Struct
from msgspec.structs import replace

from mgpu.model import Model
from mgpu.rig import Gpu
from mgpu.units import MIB, gib
from mgpu_adapters.ollama.server import Options, by_library, library

#: Set aside on every card before 0.30 (`ml/device.go` MinimumMemory).
MINIMUM_MEMORY: Final = 457 * MIB
MINIMUM_MEMORY_METAL: Final = 512 * MIB

#: Run by Ollama's own engine in 0.24 (`fs/ggml/ggml.go` OllamaEngineRequired), which keeps no layer as a buffer.
_OWN_ENGINE: Final = frozenset({
    "mllama", "qwen3vl", "qwen3vlmoe", "qwen35", "qwen35moe", "qwen3next", "lfm2", "lfm2moe", "nemotron_h",
    "nemotron_h_moe", "nemotron_h_omni",
    "bert", "deepseek2", "deepseekocr", "gemma3", "gemma3n", "gemma4", "gptoss", "gpt-oss", "laguna", "llama4",
    "mistral3", "nomic-bert", "olmo3", "qwen25vl", "qwen3", "qwen3moe", "glm4moelite", "glmocr",
})  # fmt: skip


class Load(Struct, frozen=True, kw_only=True):
    """Layers on each card that was considered, the bytes that are reckoned for them, and why so."""

    gpus: tuple[int, ...]
    layers: tuple[int, ...]
    n_bytes: int
    reason: str = ""

    @property
    def n_layers(self) -> int:
        return sum(self.layers)

    @property
    def used(self) -> frozenset[int]:
        return frozenset(gpu for gpu, count in zip(self.gpus, self.layers, strict=True) if count)


class Estimate:
    """A model's layers and graph as Ollama estimated them, and the two ways it placed them.

    `n_ctx` is for all `slots` together. `measures`: from 0.11.5 on, models of Ollama's own engine were measured, and no
    layer was kept as a buffer for them.
    """

    def __init__(self, model: Model, n_ctx: int, slots: int, options: Options, *, measures: bool) -> None:
        self.options = options
        self.n_layer = model.hyper.n_layer
        sizes = [0] * self.n_layer
        for tensor in model.tensors:
            if tensor.layer is not None and tensor.layer < self.n_layer:
                sizes[tensor.layer] += tensor.n_bytes
        batch = min(n_ctx, options.num_batch)
        cache = _cache(model, n_ctx, batch, slots, options.kv_type)
        self.blocks = [size + kv for size, kv in zip(sizes, cache, strict=True)]
        self.output = _output_bytes(model)
        self.partial, self.full = _graph(model, n_ctx, batch, sum(cache))
        self.buffer = 0 if measures and model.architecture in _OWN_ENGINE else self.blocks[0]

    def one_or_all(self, gpus: Sequence[Gpu]) -> Load:
        """Up to 0.11.4: the first card that holds everything, most free first; else all cards of a library."""
        groups = [sorted(group, key=lambda gpu: -gpu.free_bytes) for group in by_library(gpus)]
        for group in groups:
            for gpu in () if self.options.sched_spread else group:
                load = self._round_robin([gpu])
                if self._is_full(load):
                    return replace(load, reason=f"{gib(load.n_bytes)} estimated fit GPU {gpu.index}: it alone")
            load = self._round_robin(group)
            if self._is_full(load):
                cards = f"all {len(group)} {library(group[0])} cards that have room"
                return replace(load, reason=f"{gib(load.n_bytes)} estimated fit no card alone: {cards}")
        best = max((self._round_robin(group) for group in groups), key=lambda load: load.n_bytes)
        return replace(best, reason=self._partly(best))

    def _partly(self, load: Load) -> str:
        if not load.n_layers:
            return "no card has room for one layer: on the CPU"
        return f"{load.n_layers} of {self.n_layer + 1} layers on cards: the rest on the CPU"

    def _is_full(self, load: Load) -> bool:
        wanted = self.options.num_gpu if self.options.num_gpu >= 0 else self.n_layer + 1
        return 0 < load.n_layers >= wanted

    def _round_robin(self, cards: Sequence[Gpu]) -> Load:
        """`EstimateGPULayers`: from the last block down, each to the next card that has room."""
        partial, full = self.partial, self.full
        if library(cards[0]) == "Metal":
            partial = full
        elif len(cards) > 1:
            full = partial
        graph, wanted = max(partial, full), self.options.num_gpu
        rooms = [card.free_bytes - self.options.gpu_overhead - graph for card in cards]
        used = [_minimum(card) + self.buffer for card in cards]
        left = [index for index, room in enumerate(rooms) if room >= used[index] + self.buffer]
        used = [each if index in left else 0 for index, each in enumerate(used)]
        counts = [0] * len(cards)
        for block in reversed(range(self.n_layer)):
            while left and not 0 <= wanted <= sum(counts):
                index = left[block % len(left)]
                if rooms[index] > used[index] + self.blocks[block]:
                    used[index] += self.blocks[block]
                    counts[index] += 1
                    break
                left.remove(index)
        if not 0 <= wanted <= sum(counts):
            candidates = (left[sum(counts) % n] for n in range(len(left), 0, -1))
            index = next((each for each in candidates if rooms[each] > used[each] + self.output), -1)
            if index >= 0:
                used[index] += self.output
                counts[index] += 1
        graph = full if sum(counts) > self.n_layer else partial
        n_bytes = sum(used) + graph * sum(count > 0 for count in counts)
        return Load(gpus=tuple(card.index for card in cards), layers=tuple(counts), n_bytes=n_bytes)

    def fewest(self, gpus: Sequence[Gpu]) -> Load:
        """0.11.5 to 0.29: cards are added, most free first, until all layers fit; then they are filled evenly."""
        used: frozenset[int] = frozenset()
        while True:
            loads = [self._layout(group, used) for group in by_library(gpus)]
            load = max(loads, key=lambda load: load.n_layers)
            if load.used <= used:
                break
            used |= load.used
        if load.n_layers > self.n_layer and self.options.sched_spread:
            return replace(load, reason=f"OLLAMA_SCHED_SPREAD: {gib(load.n_bytes)} estimated over all cards")
        if load.n_layers > self.n_layer:
            few = "the fewest cards that hold it, most free first"
            return replace(load, reason=f"{gib(load.n_bytes)} estimated: {few}")
        return replace(load, reason=self._partly(load))

    def _layout(self, cards: Sequence[Gpu], used: frozenset[int]) -> Load:
        """`assignLayers` for the cards of one library, of which `used` hold a graph already."""
        graph = max(self.partial, self.full)
        equal = self.options.num_gpu >= 0 or self.options.sched_spread
        ranked = sorted(cards, key=lambda gpu: (gpu.unified, -gpu.free_bytes))
        kept = [_minimum(card) + self.options.gpu_overhead + graph * (card.index in used) for card in ranked]
        rooms = [max(card.free_bytes - self.buffer - each, 0) for card, each in zip(ranked, kept, strict=True)]
        n_discrete = len(ranked) if equal else sum(not card.unified for card in ranked)
        first = max((index for index, card in enumerate(ranked) if card.index in used), default=0)
        first = len(ranked) - 1 if self.options.sched_spread else first
        everything = [*self.blocks, self.output]
        counts: list[int] = []
        layers = everything
        for layers in (everything, everything[:-1]):  # if not all of them: rather without the output layer
            counts = self._pack(layers, rooms, n_discrete, first)
            if sum(counts) == len(everything):
                break
        n_bytes = sum(layers[len(layers) - sum(counts) :]) + graph * sum(count > 0 for count in counts)
        return Load(gpus=tuple(card.index for card in ranked[: len(counts)]), layers=tuple(counts), n_bytes=n_bytes)

    def _pack(self, layers: Sequence[int], rooms: Sequence[int], n_discrete: int, first: int) -> list[int]:
        """As few cards as do, `first` and those before it at least; with all of them, what was asked for is forced."""
        wanted = min(len(layers), self.options.num_gpu)
        counts: list[int] = []
        for last in range(first, len(rooms)):
            forced = last == len(rooms) - 1 and wanted >= 0
            counts = _fit(layers, rooms[: last + 1], n_discrete, wanted, 1000.0 if forced else 1.0)
            if sum(counts) in {len(layers), wanted}:
                break
        return counts


def _minimum(gpu: Gpu) -> int:
    return MINIMUM_MEMORY_METAL if library(gpu) == "Metal" else MINIMUM_MEMORY


def _fit(layers: Sequence[int], rooms: Sequence[int], n_discrete: int, wanted: int, most: float) -> list[int]:
    """`findBestFit`: the most layers there is room for, with the smallest part of each room (which balances them)."""
    counts: list[int] = []
    for group in (rooms[:n_discrete], rooms[n_discrete:]):
        if not group:
            continue
        best = _greedy(layers, group, most, wanted)
        low, high = 0.0, most
        while high - low > 1e-6:
            middle = (low + high) / 2
            tried = _greedy(layers, group, middle, wanted)
            if sum(tried) == sum(best):
                best, high = tried, middle
            else:
                low = middle
        layers = layers[: len(layers) - sum(best)]
        wanted -= sum(best)
        counts += best
    return counts


def _greedy(layers: Sequence[int], rooms: Sequence[int], part: float, wanted: int) -> list[int]:
    """`greedyFit`: from the last layer and the last card down."""
    counts = [0] * len(rooms)
    card = len(rooms) - 1
    room = int(rooms[card] * part)
    for n_placed, size in enumerate(reversed(layers)):
        if 0 <= wanted <= n_placed:
            break
        while size > room:
            card -= 1
            if card < 0:
                return counts
            room = int(rooms[card] * part)
        counts[card] += 1
        room -= size
    return counts


def _output_bytes(model: Model) -> int:
    """Norm and head; the embedding where it is the head too."""
    sizes: dict[str, int] = {}
    for tensor in model.tensors:
        group = tensor.name.partition(".")[0]
        sizes[group] = sizes.get(group, 0) + tensor.n_bytes
    return sizes.get("output_norm", 0) + sizes.get("output", sizes.get("token_embd", 0))


def _cache(model: Model, n_ctx: int, batch: int, slots: int, kv_type: str) -> list[int]:
    """Bytes of cache of each layer (`GraphSize`). Recurrent states, small, are left out."""
    hyper, architecture = model.hyper, model.architecture
    element = {"q8_0": 1.0, "q4_0": 0.5}.get(kv_type, 2.0)  # scales are not reckoned
    window = model.metadata.get("gemma3.attention.sliding_window", 0)
    cache: list[int] = []
    for layer, heads in enumerate(hyper.n_head_kv):
        tokens = n_ctx
        if architecture == "gemma3" and isinstance(window, int) and window and (layer + 1) % 6:
            tokens = slots * window + batch
        elif architecture in {"gptoss", "gpt-oss"} and layer % 2 == 0:
            tokens = slots * 4096 + batch
        cache.append(int(tokens * (hyper.head_dim_k + hyper.head_dim_v) * heads * element))
    return cache


def _graph(model: Model, n_ctx: int, batch: int, cache: int) -> tuple[int, int]:
    """Bytes of the graph with some, and with all layers on cards (`GraphSize`): by architecture, or from the cache."""
    hyper = model.hyper
    row = 4 * batch
    heads, heads_kv, width = max(hyper.n_head), max(hyper.n_head_kv), hyper.n_embd
    scores = n_ctx * (1 + heads)
    logits = row * (width + hyper.n_vocab)
    head = width * hyper.n_vocab * 105 // 128
    k = hyper.head_dim_k
    if model.architecture in {"llama", "llama4"}:
        head_dim = width // max(min(hyper.n_head), 1)
        attention = row * (1 + width + max(n_ctx, width)) + width * width * 9 // 16
        attention += 4 * n_ctx * (batch * heads + head_dim * heads_kv)
        return row * width + max(attention, logits + head), max(row * (1 + 4 * width + scores), logits)
    if model.architecture in {"gemma", "gemma2", "gemma3", "gemma3n"}:
        attention = row * (1 + 2 * width + 2 * k * heads + scores) + 32 * k * n_ctx + width * k * heads * 9 // 16
        times = 4 if model.architecture == "gemma3n" else 1
        full = max(logits, row * (2 + scores + 2 * width + 2 * k * heads))
        return times * max(logits + head, attention), times * full
    if model.architecture == "qwen2":
        attention = 4 * (batch * (1 + 2 * width + scores) + width * (1 + n_ctx))
        return max(logits + head, attention), max(logits, row * (1 + 2 * width + scores))
    estimate = heads // max(min(hyper.n_head_kv), 1) * cache // 6
    return estimate, estimate
