"""Tensor parallelism of ExLlamaV2 and V3: what one rank holds, and which models and cards it does not take.

V2 0.3.2 `tensor_p.py`, `architecture.py`: by heads of K and V, 128 columns of the feed-forward, 32 of the vocabulary.
V3 1.4.1 and 1.6.5 `model_tp.py`, `model_tp_alloc.py`: by groups of heads of K and V that are whole 128 columns wide,
128 columns, whole experts. What is left over when that does not come out even, one rank has more than the others.
"""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Final

from msgspec import Struct
from msgspec.structs import replace

from mgpu.errors import MgpuError
from mgpu.model import Model, Tensor
from mgpu.units import MIB
from mgpu_adapters.exllama.memory import FootprintV2
from mgpu_adapters.exllama.modules import widths
from mgpu_adapters.exllama.split import v2_tensor_shares

#: On each rank beside the rest: what is exchanged, and what the loader overshoots by. No figure in the sources.
TENSOR_EXTRA: Final = 256 * MIB

_COLUMNS: Final = 128
_VOCABULARY: Final = 32

#: V3: no tensor parallelism (`caps` supports_tp False). In both releases; in 1.4 only; in 1.6 only.
_V3_NONE: Final = frozenset({"afmoe", "lfm2", "lfm2_moe", "mistral4", "olmo3", "olmo_hybrid", "qwen3_next"})
_V3_NONE_OLDER: Final = frozenset({"deepseek_v3", "nanochat", "gemma4", "gemma4_text"})
_V3_NONE_NEWER: Final = frozenset({"glm4_moe_lite", "muse_glimmer"})


class Shares(Struct, frozen=True, kw_only=True):
    """Of each dimension, what the rank that has most of it holds."""

    heads: Fraction
    ffn: Fraction
    experts: Fraction
    vocab: Fraction


def rank_model(model: Model, shares: Shares) -> Model:
    """The model as its largest rank sees it: fewer heads, columns, experts and words, of the same layers."""
    hyper = model.hyper
    hyper = replace(
        hyper,
        n_head=tuple(math.ceil(each * shares.heads) for each in hyper.n_head),
        n_head_kv=tuple(math.ceil(each * shares.heads) for each in hyper.n_head_kv),
        n_ff=tuple(math.ceil(each * shares.ffn) for each in hyper.n_ff),
        n_ff_expert=math.ceil(hyper.n_ff_expert * (shares.ffn if shares.experts == 1 else 1)),
        n_vocab=math.ceil(hyper.n_vocab * shares.vocab),
    )
    tied = not any(tensor.kind == "output" and len(tensor.shape) > 1 for tensor in model.tensors)
    tensors = tuple(_cut(tensor, shares, tied=tied) for tensor in model.tensors)
    return replace(model, hyper=hyper, tensors=tensors)


def _cut(tensor: Tensor, shares: Shares, *, tied: bool) -> Tensor:
    if len(tensor.shape) == 1 and tensor.name.endswith("norm.weight"):
        return tensor
    share = {
        "attention": shares.heads,
        "ffn": shares.ffn,
        "shared_expert": shares.ffn,
        "expert": shares.experts if shares.experts != 1 else shares.ffn,
        "output": shares.vocab,
        "token_embedding": shares.vocab if tied else Fraction(1),
    }.get(tensor.kind, Fraction(1))
    return replace(tensor, n_bytes=math.ceil(tensor.n_bytes * share))


def shares_v2(footprint: FootprintV2, n_ranks: int) -> Shares:
    """V2's own sharing out among cards with equal lists. Raises `UsageError` where it has none."""
    shared = v2_tensor_shares(footprint, (float(1 << 10),) * n_ranks)  # so much that nothing is short
    w = footprint.widths
    return Shares(
        heads=Fraction(max(shared.kv_heads), w.n_head_kv),
        ffn=Fraction(max(shared.ffn), w.ffn),
        experts=Fraction(1),
        vocab=Fraction(max(shared.vocab), w.vocab),
    )


def shares_v3(model: Model, n_ranks: int) -> Shares:
    """Whole units to each rank, and one more to some."""
    w = widths(model)
    return Shares(
        heads=_largest(_head_groups(model), n_ranks),
        ffn=_largest(-(-w.ffn // _COLUMNS), n_ranks),
        experts=_largest(w.n_expert, n_ranks) if w.n_expert else Fraction(1),
        vocab=_largest(-(-w.vocab // _VOCABULARY), n_ranks),
    )


def _largest(n_units: int, n_ranks: int) -> Fraction:
    return Fraction(-(-n_units // n_ranks), n_units)


def _head_groups(model: Model) -> int:
    """Heads of K and V, taken together until they are whole 128 columns."""
    w = widths(model)
    each = math.lcm(w.head_dim, _COLUMNS) // w.head_dim
    return max(w.n_head_kv // each, 1)


def flaw_v2(footprint: FootprintV2, n_ranks: int) -> str | None:
    """What keeps V2 from running this model so; None: nothing."""
    if footprint.widths.n_head_kv < n_ranks:
        return f"{footprint.widths.n_head_kv} key-value heads are fewer than {n_ranks} cards"
    try:
        v2_tensor_shares(footprint, (float(1 << 10),) * n_ranks)
    except MgpuError as error:
        return error.message
    return None


def flaw_v3(model: Model, n_ranks: int, library: tuple[int, ...]) -> str | None:
    """As `flaw_v2`, for the release of exllamav3 that is there; () is the one TabbyAPI pins, 1.4."""
    none = _V3_NONE | (_V3_NONE_NEWER if library >= (1, 6) else _V3_NONE_OLDER)
    if model.architecture in none:
        return f"ExLlamaV3 has no tensor parallelism for {model.architecture}"
    groups = _head_groups(model)
    if groups < n_ranks:
        return f"{groups} groups of key-value heads are fewer than {n_ranks} cards"
    return None
