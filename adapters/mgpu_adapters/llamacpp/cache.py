"""llama.cpp's KV cache and recurrent state, to the byte.

Source: llama.cpp b11434, src/llama-kv-cache.cpp, src/llama-kv-cache-iswa.cpp, src/llama-memory-recurrent.cpp.
"""

from __future__ import annotations

from itertools import accumulate

from mgpu_adapters.llamacpp.architectures import BlockCache
from mgpu_adapters.llamacpp.settings import Settings
from mgpu_adapters.llamacpp.weights import BLOCKS, Rules, pad

_PLAIN = {"F32": 4, "F16": 2, "BF16": 2}


def is_quantised(type_: str) -> bool:
    """Whether a cache type has blocks: its rows are then stored rotated (src/llama-kv-cache.cpp, attn_rot)."""
    return type_.upper() not in _PLAIN


def row_bytes(type_: str, n: int) -> int:
    """Bytes of `n` elements in a cache type, by llama.cpp's name ("q8_0")."""
    plain = _PLAIN.get(type_.upper())
    if plain is not None:
        return n * plain
    block, size = BLOCKS[type_.upper()]
    return n // block * size


def n_cells(block: BlockCache, settings: Settings) -> int:
    """Tokens one sequence's cache of this block holds."""
    if not block.window or settings.swa_full:
        return settings.n_ctx_seq
    looks_back = block.window * (settings.n_parallel if settings.kv_unified else 1)
    return pad(min(settings.n_ctx_seq, looks_back + settings.u), 256)


def unit_bytes(blocks: tuple[BlockCache, ...], settings: Settings, rules: Rules) -> tuple[int, ...]:
    """Prefix sums over the units (the output layer caches nothing) of cache and state bytes."""
    v_max = max((block.v for block in blocks), default=0)  # without flash attention V is padded to the widest block
    sizes = (_block_bytes(block, settings, rules, v_max) for block in blocks)
    return (*accumulate(sizes, initial=0), sum(_block_bytes(block, settings, rules, v_max) for block in blocks))


def _block_bytes(block: BlockCache, settings: Settings, rules: Rules, v_max: int) -> int:
    total = 0
    if block.k:
        cells = n_cells(block, settings) * settings.n_stream
        v = v_max if block.v and not settings.flash_attn else block.v
        for type_, n in ((settings.type_k, block.k), (settings.type_v, v)):
            if n:
                total += rules.size(row_bytes(type_, n) * cells, n, type_)
    for n in (block.state_r, block.state_s):
        total += pad(4 * n * max(settings.n_parallel, 1), rules.alignment)
    return total


def unit_reads(blocks: tuple[BlockCache, ...], settings: Settings, depth: int) -> tuple[tuple[float, ...], list[int]]:
    """Prefix sums over the units of cache bytes touched for one token, and the tokens each block looks back at.

    `depth`: tokens in the cache. A recurrent state is read and written.
    """
    known: dict[BlockCache, tuple[float, int]] = {}  # most blocks are alike
    reads: list[tuple[float, int]] = []
    for block in blocks:
        if block not in known:
            cells = min(n_cells(block, settings), depth, block.window or depth) if block.k else 0
            row = row_bytes(settings.type_k, block.k) + row_bytes(settings.type_v, block.v)
            known[block] = float(row * cells + 8 * (block.state_r + block.state_s)), cells
        reads.append(known[block])
    sizes, seen = [size for size, _ in reads], [cells for _, cells in reads]
    return (*accumulate(sizes, initial=0.0), sum(sizes)), seen
