"""A compute graph under construction: weights and where they live, inputs, norms, projections and attention.

Source: llama.cpp b11434, src/llama-graph.cpp (build_norm, build_qkv, build_ffn, build_attn, build_attn_mha).
"""

from __future__ import annotations

import re
from bisect import bisect_right
from typing import Final, Literal

from msgspec import Struct

from mgpu.model import Model, Tensor
from mgpu_adapters.llamacpp.architectures import BlockCache, Keys, block_caches, is_mla, is_periodic, n_trunk, recurrent
from mgpu_adapters.llamacpp.cache import is_quantised, n_cells, row_bytes
from mgpu_adapters.llamacpp.graph import F16, F32, I64, Graph, Node, glu, like, mul_mat, reshape, tensor, view
from mgpu_adapters.llamacpp.settings import Settings
from mgpu_adapters.llamacpp.traits import Traits, traits_of
from mgpu_adapters.llamacpp.weights import EXPERTS, row_padding

#: gemma3n: the first blocks keep only the largest activations (src/models/models.h).
SPARSE_BLOCKS: Final = 10

#: What of a block's weights a device that works for the host is sent.
Sent = Literal["nothing", "experts", "all"]

_BLOCK: Final = re.compile(r"blk\.\d+\.")


class Anatomy:
    """A model's tensors by block and by short name ("attn_q.weight"), and what its architecture adds. Model only."""

    def __init__(self, model: Model) -> None:
        self.model = model
        self.hyper = model.hyper
        self.keys = Keys(model)
        self.traits: Traits = traits_of(model.architecture)
        self.caches: tuple[BlockCache, ...] = block_caches(model)
        self.recurs = recurrent(model)
        self.periodic = is_periodic(model)
        self.n_trunk = n_trunk(model)
        self.is_mla = is_mla(model)
        self.shared_caches = any(
            not (cache.k or recurs) and model.architecture in ("gemma3n", "gemma4")
            for cache, recurs in zip(self.caches, self.recurs, strict=True)
        )
        self._kinds: dict[tuple[int, Sent], int] = {}
        self._numbers: dict[tuple[object, ...], int] = {}
        self.outside: dict[str, Tensor] = {}
        self.blocks: list[dict[str, Tensor]] = [{} for _ in range(model.hyper.n_layer)]
        for item in model.tensors:
            if item.layer is None:
                self.outside[item.name] = item
            elif item.layer < len(self.blocks):
                self.blocks[item.layer][_BLOCK.sub("", item.name, count=1)] = item

    @property
    def drawable(self) -> bool:
        """Whether a graph can be drawn: of an unknown architecture, only if every block attends in the common way."""
        blocks = self.blocks[: self.n_trunk]
        common = all("attn_q.weight" in block or "attn_qkv.weight" in block for block in blocks)
        return self.traits.supported or (common and not self.is_mla and not any(self.recurs))

    def kind(self, il: int, *, sent: Sent) -> int:
        """A number for block `il`: the same for blocks that are alike in the graph, whose rules may go by its number.

        `sent`: weights that a device is sent, and that therefore differ by their size, too.
        """
        kind = self._kinds.get((il, sent))
        if kind is None:
            weights = tuple(
                (
                    name,
                    item.shape,
                    item.n_bytes if sent == "all" or (sent == "experts" and EXPERTS.search(item.name)) else 0,
                )
                for name, item in self.blocks[il].items()
            )
            turns = (il + 1) % self.traits.rope_step == 0 if self.traits.rope_step else None
            sparse = il < SPARSE_BLOCKS if self.model.architecture == "gemma3n" else None
            signature = (weights, self.caches[il], self.recurs[il], turns, sparse, il == self.n_trunk - 1)
            kind = self._kinds[il, sent] = self._numbers.setdefault(signature, len(self._numbers))
        return kind


class Seats(Struct, frozen=True, kw_only=True):
    """Which backend holds what (the CPU is the last one), and which blocks the graph goes through."""

    blocks: tuple[int, ...]
    n_host: int  # the first blocks are on the CPU
    ends: tuple[int, ...]  # of the blocks of each device in turn: the first block that is no longer its own
    output: int
    host_experts: int = 0
    kept: frozenset[str] = frozenset()  # names of tensors that stay on the host all the same
    pinned: bool = True  # norms run where their block is: when every layer is on a device

    @property
    def cpu(self) -> int:
        return len(self.ends)

    def seat(self, il: int) -> int:
        """The backend of block `il`."""
        return self.cpu if il < self.n_host else min(bisect_right(self.ends, il), max(self.cpu - 1, 0))


class CacheInput(Struct, kw_only=True):
    """What attention over one kind of cache (windowed or not) is fed with."""

    cells: int
    k_rows: Node
    v_rows: Node
    mask: Node
    k_rotation: Node | None = None  # quantised caches hold rotated rows
    v_rotation: Node | None = None


class Build:
    """One graph: a batch of `n_tokens` of `n_seqs` sequences, with `n_outputs` of them wanted."""

    def __init__(self, anatomy: Anatomy, settings: Settings, seats: Seats) -> None:
        self.anatomy = anatomy
        self.hyper = anatomy.hyper
        self.traits = anatomy.traits
        self.keys = anatomy.keys
        self.settings = settings
        self.seats = seats
        self.graph = Graph()
        self.n_seqs = settings.n_parallel
        self.n_tokens = -(-settings.u // self.n_seqs) * self.n_seqs
        self.n_outputs = min(settings.u, settings.n_outputs or self.n_seqs)
        self.tokens = self.graph.input(self.n_tokens)
        self.positions = self.graph.input(self.n_tokens * self.traits.n_pos)
        self.wanted = self.graph.input(self.n_outputs)
        self.state_rows = self.graph.input(self.n_seqs)
        self.main_state_rows = view(self.state_rows, (self.n_seqs, 1, 1, 1))
        self.other_state_rows = view(self.state_rows, (self.n_seqs - 1, 1, 1, 1))
        self.attention_scale = self.graph.input(1, 1, self.n_tokens)
        self._weights: dict[tuple[str, int], Node] = {}
        self._caches: dict[tuple[str, int], Node] = {}
        self._inputs: dict[bool, CacheInput] = {}

    def weight(self, il: int, name: str) -> Node | None:
        """A weight of block `il` by its short name, or None when the block has none."""
        item = self.anatomy.blocks[il].get(name)
        if item is None:
            return None
        seats = self.seats
        seat = seats.seat(il)
        if item.name in seats.kept or (il < seats.host_experts and EXPERTS.search(item.name)):
            seat = seats.cpu
        return self._hold(item, seat)

    def has(self, il: int, name: str) -> bool:
        return name in self.anatomy.blocks[il]

    def outside(self, seat: int, *names: str) -> Node | None:
        """The first of these weights outside of the blocks that the file has, as held by `seat`."""
        item = next((self.anatomy.outside[name] for name in names if name in self.anatomy.outside), None)
        if item is None:
            return None
        return self._hold(item, self.seats.cpu if item.name in self.seats.kept else seat)

    def _hold(self, item: Tensor, seat: int) -> Node:
        key = (item.name, seat)
        node = self._weights.get(key)
        if node is None:
            shape = (*item.shape, 1, 1, 1)
            node = Node("none", (shape[0], shape[1], shape[2], shape[3] if len(item.shape) > 3 else 1), item.n_bytes)
            node.settle(seat).is_weight = True
            node.extra = row_padding(item.type, item.shape[0])
            self._weights[key] = node
        return node

    def norm(self, x: Node, il: int, name: str, kind: str = "", *, pinned: bool = True) -> Node:
        """Normalise, scale and shift by what the block has. Only a scaled norm is pinned to the block's backend."""
        weight = self.weight(il, name + ".weight") or self.weight(il, name)
        bias = self.weight(il, name + ".bias")
        x = like(kind or self.traits.norm, x)
        if (weight or bias) and pinned and self.seats.pinned:
            x.backend = self.seats.seat(il)
        return self.scaled(x, weight, bias)

    @staticmethod
    def scaled(x: Node, weight: Node | None, bias: Node | None) -> Node:
        if weight is not None:
            x = like("mul", x, weight)
        return x if bias is None else like("add", x, bias)

    def project(self, il: int, name: str, x: Node) -> Node:
        """Through a weight of the block, with its scale and bias when there are any."""
        weight = self.weight(il, name + ".weight")
        if weight is None:
            return x
        return self.scaled(mul_mat(weight, x), self.weight(il, name + ".scale"), self.weight(il, name + ".bias"))

    def feed_forward(self, il: int, x: Node, suffix: str = "") -> Node:
        """The dense block, or (suffix "_shexp") the experts every token passes."""
        up = self.project(il, f"ffn_up{suffix}", x)
        down = self.weight(il, f"ffn_down{suffix}.weight")
        if self.has(il, f"ffn_gate{suffix}.weight"):
            x = glu(self.project(il, f"ffn_gate{suffix}", x), up)
        elif down is not None and up.ne[0] == 2 * down.ne[0]:
            x = tensor("glu", (down.ne[0], *up.ne[1:]), up)  # gate and up in one matrix
        else:
            x = self.activation(up)
        return self.project(il, f"ffn_down{suffix}", x)

    def activation(self, x: Node) -> Node:
        x = like("unary", x)
        return like("sqr", x) if self.traits.relu_squared else x

    def rope(self, x: Node, il: int) -> Node:
        factors = self.outside(self.seats.seat(il), "rope_freqs.weight", "rope_factors_short.weight")
        return like("rope", x, self.positions, *(() if factors is None else (factors,)))

    def shared_cache(self, il: int) -> int:
        """The block whose cache block `il`, without one, reads: the last of its kind that has one."""
        windowed = self.anatomy.caches[il].window > 0
        caches = self.anatomy.caches
        own = [i for i in range(il) if caches[i].k and (caches[i].window > 0) == windowed]
        return own[-1] if own else il

    def cache_input(self, il: int) -> CacheInput:
        """What attention of this block is fed with; one for the windowed blocks, one for the others."""
        windowed = self.anatomy.caches[il].window > 0
        found = self._inputs.get(windowed)
        if found is None:
            found = self._inputs[windowed] = self._cache_input(windowed=windowed)
        return found

    def _cache_input(self, *, windowed: bool) -> CacheInput:
        settings, graph, caches = self.settings, self.graph, self.anatomy.caches
        block = next((block for block in caches if block.k and (block.window > 0) == windowed), caches[0])
        cells, streams = n_cells(block, settings), settings.n_stream
        v_rows = 1 if settings.flash_attn else max(block.v for block in caches)
        found = CacheInput(
            cells=cells,
            k_rows=graph.input(self.n_tokens, width=I64),
            v_rows=graph.input(self.n_tokens * v_rows, width=I64),
            mask=graph.input(cells, self.n_tokens // streams, 1, streams, width=F16 if settings.flash_attn else F32),
        )
        k, v = self.head_sizes(windowed=windowed)
        if not self.anatomy.is_mla and is_quantised(settings.type_k) and k and k % 64 == 0:
            size = k & -k  # the largest power of two that divides it
            found.k_rotation = graph.input(size, size)
        if not self.anatomy.is_mla and is_quantised(settings.type_v) and v and v % 64 == 0:
            found.v_rotation = graph.input(64, 64)
        return found

    def head_sizes(self, *, windowed: bool) -> tuple[int, int]:
        k, v = self.hyper.head_dim_k, self.hyper.head_dim_v
        if not windowed:
            return k, v
        return self.keys.number("attention.key_length_swa", k), self.keys.number("attention.value_length_swa", v)

    def cache(self, il: int, which: str, width: int) -> Node:
        """Block `il`'s K or V cache: rows of `width` elements."""
        node = self._caches.get((which, il))
        if node is None:
            settings = self.settings
            cells = self.cache_input(il).cells
            type_ = settings.type_k if which == "k" else settings.type_v
            n_bytes = row_bytes(type_, width) * cells * settings.n_stream
            node = Node("none", (width, cells, settings.n_stream, 1), n_bytes)
            node.settle(self.seats.seat(il) if settings.kv_offload else self.seats.cpu)
            self._caches[which, il] = node
        return node

    def state(self, il: int, which: str, size: int) -> Node:
        """Block `il`'s recurrent state: one row of `size` elements a sequence."""
        node = self._caches.get((which, il))
        if node is None:
            node = self._caches[which, il] = tensor("none", (size, self.n_seqs, 1, 1))
            node.settle(self.seats.seat(il) if self.settings.kv_offload else self.seats.cpu)
        return node


def strided(x: Node, ne0: int, ne1: int, ne2: int = 1, ne3: int = 1) -> Node:
    """A view of some columns of each row of `x`: a copy of it spans the rows between, too."""
    node = view(x, (ne0, ne1, ne2, ne3))
    rows = x.ne[1] * x.ne[2] * x.ne[3]
    node.n_bytes = 4 * (x.ne[0] * (rows - 1) + ne0 * ne1 * ne2 * ne3 // rows)
    return node


def rotated(x: Node, rotation: Node) -> Node:
    """Through a Hadamard matrix, in pieces of its size (llama_mul_mat_hadamard)."""
    n = rotation.ne[0]
    total = x.ne[0] * x.ne[1] * x.ne[2] * x.ne[3]
    flat = tensor("cont", (n, total // n, 1, 1), x) if x.op == "view" else reshape(x, n, total // n)
    return reshape(mul_mat(rotation, flat), *x.ne)
