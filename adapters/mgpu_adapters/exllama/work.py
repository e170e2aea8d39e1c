"""What ExLlama does for one token, unit by unit: bytes read and operations. From the model's headers alone."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import accumulate

from mgpu.adapter import Work
from mgpu.model import Model
from mgpu_adapters.exllama.engines import Engine


def work_of(engine: Engine, depth: int) -> Work:
    """With `depth` tokens of one user in the cache. Operations are counted by bytes, as for all packed formats."""
    model, settings = engine.model, engine.settings
    hyper, n = model.hyper, engine.n_units - 1
    dense, experts = _bytes(model, n)
    read = [a + b for a, b in zip(dense, experts, strict=True)]
    per_byte = 2 * model.parameters / max(model.weights_bytes, 1)
    return Work(
        runtime=engine.runtime,
        model=model,
        kv_type=settings.cache_mode,
        users=settings.users,
        ctx=settings.ctx,
        depth=depth,
        weights=_summed(dense),
        experts=_summed(experts),
        unpack=(0.0,) * (n + 2),
        cache=_summed([*(engine.cache_read(block, depth) for block in range(n)), 0.0]),
        heads=_summed([*(float(heads * depth) for heads in hyper.n_head[:n]), 0.0]),
        layers=_summed([1.0] * n + [0.0]),
        recurrent=_summed([*(float(not kv) for kv in hyper.n_head_kv[:n]), 0.0]),
        routed=_summed([float(each > 0) for each in experts]),
        flops=_summed(each * per_byte for each in read),
        head_dim=hyper.head_dim_k,
    )


def _bytes(model: Model, n: int) -> tuple[list[float], list[float]]:
    """Of each unit: what every token reads, and the routed experts that work on one."""
    dense, experts = [0.0] * (n + 1), [0.0] * (n + 1)
    share = model.hyper.n_expert_used / model.hyper.n_expert if model.is_moe else 0.0
    for tensor in model.tensors:
        if tensor.layer is not None and tensor.layer >= n:
            continue  # for predicting several tokens at once: not loaded
        if tensor.layer is None and tensor.kind != "output":
            continue  # the embedding is looked up, on the host
        unit = n if tensor.layer is None else tensor.layer
        if tensor.kind == "expert":
            experts[unit] += tensor.n_bytes * share
        else:
            dense[unit] += tensor.n_bytes
    if not any(tensor.kind == "output" and len(tensor.shape) > 1 for tensor in model.tensors):
        dense[n] += sum(tensor.n_bytes for tensor in model.tensors if tensor.kind == "token_embedding")
    return dense, experts


def _summed(units: Iterable[float]) -> tuple[float, ...]:
    """Prefix sums over the units."""
    return tuple(accumulate(units, initial=0.0))
