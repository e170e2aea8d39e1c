"""What vLLM does for one token, layer by layer: bytes read and operations. From the model's headers alone."""

from __future__ import annotations

from itertools import accumulate

from mgpu.adapter import Work
from mgpu.model import Model
from mgpu_adapters.vllm.cache import layer_kinds, token_bytes
from mgpu_adapters.vllm.config import recurrent_state_bytes, windowed_layers
from mgpu_adapters.vllm.settings import KV_DTYPES, Settings
from mgpu_adapters.vllm.weights import Weights


def work_of(model: Model, settings: Settings, depth: int) -> Work:
    """On one card, with `depth` tokens of one user in the cache.

    Operations are counted by bytes: matrices are all of about the same type, and packed ones do not say their sides.
    """
    weights, hyper = Weights(model), model.hyper
    n = weights.n_layers
    state = recurrent_state_bytes(model)
    kinds = layer_kinds(model, has_state=state > 0)
    row, window = token_bytes(model, KV_DTYPES[settings.kv_cache_dtype] or 2), windowed_layers(model)[0]
    seen = [{"full": depth, "window": min(depth, window)}.get(kind, 0) for kind in kinds]
    dense, experts = weights.read_by_layer
    output = float(weights.norm + weights.head)
    per_byte = 2 * model.parameters / max(model.weights_bytes, 1)
    routed = [float(each > 0) for each in experts]
    read = [a + b for a, b in zip(dense, experts, strict=True)]
    recurrent = [float(kind == "recurrent") for kind in kinds]
    cache = [back * row + 2.0 * state * recurs for back, recurs in zip(seen, recurrent, strict=True)]
    return Work(
        runtime="vllm",
        model=model,
        kv_type=settings.kv_cache_dtype,
        users=settings.max_num_seqs,
        ctx=settings.max_model_len,
        depth=depth,
        weights=_summed([*dense, output]),
        experts=_summed([*experts, 0.0]),
        unpack=(0.0,) * (n + 2),
        cache=_summed([*cache, 0.0]),
        heads=_summed([*(float(a * b) for a, b in zip(hyper.n_head[:n], seen, strict=True)), 0.0]),
        layers=_summed([1.0] * n + [0.0]),
        recurrent=_summed([*recurrent, 0.0]),
        routed=_summed([*routed, 0.0]),
        flops=_summed([*(each * per_byte for each in read), output * per_byte]),
        head_dim=hyper.head_dim_k,
    )


def _summed(units: list[float]) -> tuple[float, ...]:
    """Prefix sums over the units."""
    return tuple(accumulate(units, initial=0.0))
