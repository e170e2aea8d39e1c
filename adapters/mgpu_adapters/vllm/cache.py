"""vLLM's KV cache: blocks of a common pool, shared by groups of layers.

Source: vLLM 0.32.0 v1/core/kv_cache_utils.py (`_get_kv_cache_groups_uniform_page_size`,
`_max_memory_usage_bytes_from_groups`, `get_kv_cache_configs`) and v1/kv_cache_interface.py. Every layer of a group has
its page in every block, and all groups draw blocks from one pool: a request takes the sum of the groups' blocks.
"""

from __future__ import annotations

from collections import Counter
from itertools import accumulate
from typing import Final, Literal

from msgspec import Struct

from mgpu.model import Model
from mgpu_adapters.vllm.config import is_latent, n_main_layers, number, recurrent_state_bytes, windowed_layers

#: Tokens in a block (vLLM 0.32.0 config/cache.py); hybrid models' longer blocks are multiples of it.
BLOCK_SIZE: Final = 16
#: On the CPU (vLLM 0.32.0 platforms/cpu.py).
CPU_BLOCK_SIZE: Final = 128
#: FlashMLA's kernels want this (vLLM 0.32.0 v1/attention/backends/mla/flashmla.py); other MLA backends take 16.
_LATENT_BLOCK_SIZE: Final = 64
#: States a recurrent layer keeps for one request with prefix caching, the default ("align" mode).
_STATES_PER_REQUEST: Final = 2
#: One block of the pool is never used (`BlockPool.null_block`).
_NULL_BLOCKS: Final = 1

LayerKind = Literal["full", "window", "recurrent", "none"]


class CacheGroup(Struct, frozen=True, kw_only=True):
    """Layers that share block tables. `counts[i]`: how many of its layers are among the first `i`."""

    kind: LayerKind
    counts: tuple[int, ...]


class CachePlan(Struct, frozen=True, kw_only=True):
    """How one model's cache is laid out on one rank. `page_bytes`: one block of one layer."""

    groups: tuple[CacheGroup, ...]
    block_size: int
    page_bytes: int
    window: int

    def block_bytes(self, layers: range) -> int:
        """Bytes one block takes on a stage with these layers: its widest group's pages."""
        widest = max((group.counts[layers.stop] - group.counts[layers.start] for group in self.groups), default=0)
        return widest * self.page_bytes

    def blocks_per_request(self, n_tokens: int, in_flight: int) -> int:
        """Blocks that one request of `n_tokens` may take; `in_flight`: tokens scheduled and not yet settled."""
        return sum(self._blocks(group.kind, n_tokens, in_flight) for group in self.groups)

    def bytes_for(self, layers: range, n_requests: int, n_tokens: int, in_flight: int) -> int:
        """Bytes a stage's cache must have for `n_requests` at the same time, each of `n_tokens`."""
        blocks = n_requests * self.blocks_per_request(n_tokens, in_flight) + _NULL_BLOCKS
        return blocks * self.block_bytes(layers)

    def requests_in(self, n_bytes: int, layers: range, n_tokens: int, in_flight: int) -> int:
        """How many requests of `n_tokens` a stage's cache of `n_bytes` holds."""
        blocks = n_bytes // max(self.block_bytes(layers), 1) - _NULL_BLOCKS
        return max(blocks, 0) // max(self.blocks_per_request(n_tokens, in_flight), 1)

    def _blocks(self, kind: LayerKind, n_tokens: int, in_flight: int) -> int:
        if kind == "recurrent":
            return _STATES_PER_REQUEST
        if kind == "window":  # it may start within a block: one more
            return -(-min(self.window - 1 + in_flight, n_tokens) // self.block_size) + 1
        return -(-n_tokens // self.block_size)


def plan_cache(model: Model, element_bytes: int, tp: int = 1, *, least_block: int = BLOCK_SIZE) -> CachePlan:
    """The layout of the cache on one rank. `element_bytes`: of one cached number; `least_block`: tokens in a block."""
    token = token_bytes(model, element_bytes, tp)
    state = recurrent_state_bytes(model, tp)
    kinds = layer_kinds(model, has_state=state > 0)
    block_size = max(_LATENT_BLOCK_SIZE if is_latent(model) else BLOCK_SIZE, least_block)
    if "recurrent" in kinds and token:
        # a block must be as long as makes an attention page no smaller than the state of a recurrent layer
        block_size = max(-(-state // (token * BLOCK_SIZE)) * BLOCK_SIZE, block_size)
    page = block_size * token if token else state
    return CachePlan(groups=_groups(kinds), block_size=block_size, page_bytes=page, window=windowed_layers(model)[0])


def token_bytes(model: Model, element_bytes: int, tp: int = 1) -> int:
    """Bytes of one token in one attention layer on one rank: heads are cut, one at least; a latent is held whole."""
    if is_latent(model):
        return ((number(model, "kv_lora_rank") or 0) + (number(model, "qk_rope_head_dim") or 0)) * element_bytes
    heads = max(model.hyper.n_head_kv, default=0)
    if not heads:
        return 0
    return max(heads // tp, 1) * (model.hyper.head_dim_k + model.hyper.head_dim_v) * element_bytes


def layer_kinds(model: Model, *, has_state: bool) -> tuple[LayerKind, ...]:
    """What each layer keeps. Layers without a cache are recurrent where the file describes a state."""
    windowed = windowed_layers(model)[1]

    def kind(layer: int) -> LayerKind:
        if not model.hyper.n_head_kv[layer]:
            return "recurrent" if has_state else "none"
        return "window" if layer in windowed else "full"

    return tuple(kind(layer) for layer in range(n_main_layers(model)))


def _groups(kinds: tuple[LayerKind, ...]) -> tuple[CacheGroup, ...]:
    """Equal groups, as many of each kind as it takes: vLLM's rule, with its rounding."""
    numbers = Counter(kind for kind in kinds if kind != "none")
    if not numbers:
        return ()
    size = min(numbers.values())
    if max(numbers.values()) < size * 1.5:
        size = max(numbers.values())
    groups: list[CacheGroup] = []
    for kind, n_layers in numbers.items():
        members = [layer for layer, each in enumerate(kinds) if each == kind]
        n_groups = -(-n_layers // size)
        groups += [_group(kind, members[first::n_groups], len(kinds)) for first in range(n_groups)]
    return tuple(groups)


def _group(kind: LayerKind, members: list[int], n_layers: int) -> CacheGroup:
    inside = frozenset(members)
    counts = accumulate((layer in inside for layer in range(n_layers)), initial=0)
    return CacheGroup(kind=kind, counts=tuple(int(count) for count in counts))
