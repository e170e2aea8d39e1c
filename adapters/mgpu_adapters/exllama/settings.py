"""What ExLlama is asked for through TabbyAPI: the request, overruled by what stands after `--`."""

from __future__ import annotations

import re
from typing import Final

from msgspec import Struct

from mgpu.errors import UsageError
from mgpu.request import DEFAULT_CTX, Request
from mgpu_adapters.exllama.flags import Given
from mgpu_adapters.exllama.memory import V2Cache, V2Settings, V3Settings, pages

#: TabbyAPI's default, in both branches.
_CHUNK: Final = 2048
_LEAST_CHUNK: Final = 256

#: `--kv-type` in mgpu's words and TabbyAPI's. V2 knows FP8 too, but TabbyAPI has no word for it.
_V2_CACHES: Final[dict[str, V2Cache]] = {
    "f16": "FP16", "fp16": "FP16", "q8_0": "Q8", "q8": "Q8", "q6": "Q6", "q4_0": "Q4", "q4": "Q4",
}  # fmt: skip
#: Bits of K and of V (TabbyAPI `backends/exllamav3/model.py` create_cache).
_V3_CACHES: Final = {
    "f16": "FP16", "fp16": "FP16", "q8_0": "8,8", "q8": "8,8", "q6": "6,6", "q5_0": "5,5", "q4_0": "4,4", "q4": "4,4",
}  # fmt: skip
_BITS: Final = re.compile(r"([2-8]) ?, ?([2-8])")


class Settings(Struct, frozen=True, kw_only=True):
    """By TabbyAPI's names, but for `ctx` (max_seq_len) and `users` (max_batch_size). `cache_size`: None is one context
    for each user. `tensor_parallel`: None is mgpu's to decide."""

    ctx: int
    users: int = 1
    cache_mode: str = "FP16"
    chunk_size: int = _CHUNK
    cache_size: int | None = None
    tensor_parallel: bool | None = None

    @property
    def cache_tokens(self) -> int:
        """The whole cache; TabbyAPI wants whole pages."""
        return pages(self.cache_size or self.ctx * self.users)

    def for_v2(self) -> V2Settings:
        chunk = pages(sorted((_LEAST_CHUNK, self.chunk_size, self.ctx))[1])
        cache = _V2_CACHES[self.cache_mode.lower()]
        return V2Settings(max_seq_len=self.ctx, cache_tokens=self.cache_tokens, cache=cache, chunk=chunk)

    def for_v3(self) -> V3Settings:
        bits = _BITS.fullmatch(self.cache_mode)
        k_bits, v_bits = (int(bits[1]), int(bits[2])) if bits else (16, 16)
        chunk = pages(max(_LEAST_CHUNK, self.chunk_size))
        return V3Settings(cache_tokens=self.cache_tokens, k_bits=k_bits, v_bits=v_bits, chunk=chunk, slots=self.users)


def settle(request: Request, given: Given, ctx_train: int, *, version: int) -> Settings:
    """Raises `UsageError` for values TabbyAPI would not take, or would take for something else."""
    ctx = given.number("max-seq-len") or (request.ctx if isinstance(request.ctx, int) else min(ctx_train, DEFAULT_CTX))
    cache_size = given.number("cache-size")
    if cache_size is not None and cache_size < ctx:
        raise UsageError(
            f"--cache-size {cache_size} is less than one context of {ctx}: TabbyAPI would cut the context to it",
            hint=f"use --ctx {cache_size}, or a larger --cache-size",
        )
    return Settings(
        ctx=ctx,
        users=given.number("max-batch-size") or request.users,
        cache_mode=cache_mode(given.word("cache-mode") or request.kv_type, version=version),
        chunk_size=given.number("chunk-size") or _CHUNK,
        cache_size=cache_size,
        tensor_parallel=given.truth("tensor-parallel"),
    )


def cache_mode(kv_type: str, *, version: int) -> str:
    """TabbyAPI's word for a cache type, mgpu's or its own. Raises `UsageError` with the list for what ExLlama lacks."""
    word = kv_type.strip().lower()
    bits = _BITS.fullmatch(word)
    if version == 3 and bits:
        return f"{bits[1]},{bits[2]}"
    known: dict[str, V2Cache] | dict[str, str] = _V3_CACHES if version == 3 else _V2_CACHES
    if word in known:
        return known[word]
    words = "f16, q8_0, q5_0, q4_0, or bits of K and V: `-- --cache-mode 8,4` (2 to 8)"
    if version == 2:
        words = "f16, q8_0, q4_0, or `-- --cache-mode Q6`"
    raise UsageError(f"ExLlamaV{version} has no KV-cache type {kv_type!r}", hint=f"it has {words}")
