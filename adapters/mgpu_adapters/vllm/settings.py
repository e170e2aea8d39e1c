"""What vLLM will use: the request, overruled by the flags after `--`, over defaults that mgpu states itself."""

from __future__ import annotations

from typing import Final

from msgspec import Struct

from mgpu.errors import UsageError
from mgpu.request import DEFAULT_CTX, Request
from mgpu_adapters.vllm.flags import Given

#: Bytes of one cache element by `--kv-cache-dtype` (vLLM 0.32.0 config/cache.py), None: the model's own dtype. The
#: per-token-head, nvfp4 and turboquant types have scales whose layout this version does not plan for.
KV_DTYPES: Final[dict[str, int | None]] = {
    "auto": None,
    "bfloat16": 2,
    "float16": 2,
    "fp8": 1,
    "fp8_e4m3": 1,
    "fp8_e5m2": 1,
}

#: `--kv-type` in mgpu's common words.
_KV_TYPES: Final = {"f16": "auto", "bf16": "bfloat16"}


class Settings(Struct, frozen=True, kw_only=True):
    """By vLLM's own names. None: mgpu decides. `utilization` in ten-thousandths of a card's total memory."""

    max_model_len: int
    max_num_seqs: int = 1
    kv_cache_dtype: str = "auto"
    max_num_batched_tokens: int | None = None
    enforce_eager: bool = False
    pipeline_parallel_size: int | None = None
    tensor_parallel_size: int | None = None
    utilization: int | None = None


def settle(request: Request, given: Given, ctx_train: int) -> Settings:
    """Raises `UsageError` for values that vLLM would not take, or that this version does not plan for."""
    ranks, stages = given.integer("tensor-parallel-size"), given.integer("pipeline-parallel-size")
    if (ranks or 1) > 1 and (stages or 1) > 1:
        raise UsageError(
            f"--tensor-parallel-size {ranks} and --pipeline-parallel-size {stages} together are not planned for",
            hint="leave one of the two out",
        )
    per_user = request.ctx if isinstance(request.ctx, int) else min(ctx_train, DEFAULT_CTX)
    return Settings(
        max_model_len=_max_model_len(given) or per_user,
        max_num_seqs=given.integer("max-num-seqs") or request.users,
        kv_cache_dtype=kv_cache_dtype(given.values.get("kv-cache-dtype") or request.kv_type),
        max_num_batched_tokens=given.integer("max-num-batched-tokens"),
        enforce_eager="enforce-eager" in given,
        pipeline_parallel_size=stages,
        tensor_parallel_size=ranks,
        utilization=given.fraction("gpu-memory-utilization"),
    )


def kv_cache_dtype(kv_type: str) -> str:
    """vLLM's word for a cache type, its own or one of mgpu's. Raises `UsageError` for what vLLM has not."""
    found = _KV_TYPES.get(kv_type, kv_type)
    if found not in KV_DTYPES:
        raise UsageError(
            f"vLLM has no KV-cache type {kv_type!r} that mgpu can plan for",
            hint="leave --kv-type out, or write `-- --kv-cache-dtype fp8` (half the size); it also takes "
            + ", ".join(KV_DTYPES),
        )
    return found


def _max_model_len(given: Given) -> int | None:
    if given.values.get("max-model-len") in {"auto", "-1"}:
        raise UsageError(
            "--max-model-len auto leaves the context to vLLM, and mgpu could not say what fits",
            hint="use mgpu's own --ctx max",
        )
    return given.integer("max-model-len")
