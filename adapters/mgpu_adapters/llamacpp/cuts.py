"""Where llama.cpp's tensor mode (`-sm tensor`) cuts each weight and each cache of a model.

Source: llama.cpp b11434, src/llama-model.cpp (llama_meta_device_get_split_state). Checked with `tensor`, which counts
the bytes, against real loads.
"""

from __future__ import annotations

from math import lcm
from typing import Final

from msgspec import Struct

from mgpu_adapters.llamacpp.blocks import Anatomy
from mgpu_adapters.llamacpp.weights import BLOCKS

#: Cut by what they make (dimension 1 of a weight, 0 of its bias), and by what they read (dimension 0).
_MAKES: Final = frozenset({
    "attn_q", "attn_k", "attn_v", "attn_qkv", "ffn_up", "ffn_up_exps", "ffn_gate", "ffn_gate_exps",
})  # fmt: skip
_MAKES_UNBIASED: Final = frozenset({
    "attn_gate", "ffn_gate_up", "ffn_gate_up_exps", "ssm_alpha", "ssm_beta", "ssm_ba", "ssm_conv1d",
})  # fmt: skip
_READS: Final = frozenset({"attn_output", "ssm_out", "ffn_down", "ffn_down_exps"})
_BY_HEAD: Final = frozenset({"attn_sinks.weight", "ssm_dt.bias", "ssm_a"})
_HEAD_NORMS: Final = frozenset({"attn_q_norm.weight", "attn_k_norm.weight"})

#: Cuts are at multiples of this where blocks of the weight allow: kernels are fast so.
_FAST: Final = 128

#: Their attention has a gate beside each query, and their recurrent blocks keys and values in one matrix.
_GATED: Final = frozenset({"qwen3next", "qwen35", "qwen35moe", "clef", "qwen4exp"})
#: Of those, the one whose values follow the keys they belong to.
_IN_ORDER: Final = "qwen3next"
#: Their short convolutions run whole on every card.
WHOLE_STATE: Final = frozenset({"lfm2", "lfm2moe"})


class Part(Struct, frozen=True, kw_only=True):
    """A run of `extent` elements, `repeats` times over, each cut at multiples of `step`."""

    extent: int
    step: int
    repeats: int = 1


class Cut(Struct, frozen=True, kw_only=True):
    """How a tensor is cut: along which dimension, and into which parts each of its own."""

    axis: int
    parts: tuple[Part, ...]


class Heads(Struct, frozen=True, kw_only=True):
    """Where attention of one block may be cut, in elements: of what each tensor has for one such step."""

    q: int
    gated: int  # of queries with a gate beside each
    k: int
    v: int
    output: int
    heads: int


def cut_of(anatomy: Anatomy, il: int, name: str, n: int) -> Cut | None:
    """How the weight `name` ("attn_q.weight") of block `il` is cut for `n` ranks; None: it is whole on every rank."""
    shape = anatomy.blocks[il][name].shape
    stem, _, kind = name.partition(".")
    by_head_norm = name in _HEAD_NORMS and len(shape) > 1 and shape[1] > 1
    if by_head_norm or (stem in _MAKES | _MAKES_UNBIASED and kind == "weight"):
        axis = 1
    elif name in _BY_HEAD or (stem in _READS and kind == "weight") or (stem in _MAKES and kind == "bias"):
        axis = 0
    else:
        return None
    parts = _recurrent_parts if anatomy.recurs[il] else _parts
    return Cut(axis=axis, parts=parts(anatomy, il, stem, shape[axis], n))


def heads_of(anatomy: Anatomy, il: int, n: int) -> Heads:
    """The steps at which attention of block `il` is cut: whole KV heads with their queries, whole blocks of weights."""
    hyper = anatomy.hyper
    group = max(hyper.n_head[il] // max(hyper.n_head_kv[il], 1), 1)
    dim_k, dim_v = head_sizes(anatomy, il)
    step = _block_size(anatomy, il, "attn_output", "ssm_out")
    while step < _FAST and step * n < group * dim_k:
        step *= 2
    q = lcm(group * dim_k, step)
    heads, k = q // dim_k, q // group
    gated = lcm(2 * group * dim_k, step)
    return Heads(q=q, gated=gated, k=k, v=k // dim_k * dim_v, output=heads * dim_v, heads=heads)


def head_sizes(anatomy: Anatomy, il: int) -> tuple[int, int]:
    """Head dimensions of K and V in block `il`."""
    k, v, keys = anatomy.hyper.head_dim_k, anatomy.hyper.head_dim_v, anatomy.keys
    if not anatomy.caches[il].window:
        return k, v
    return keys.number("attention.key_length_swa", k), keys.number("attention.value_length_swa", v)


def _parts(anatomy: Anatomy, il: int, stem: str, extent: int, n: int) -> tuple[Part, ...]:
    """Of an attention block's tensor."""
    if stem.startswith("ffn_"):
        return _feed_parts(anatomy, il, stem, extent)
    heads = heads_of(anatomy, il, n)
    q = heads.q if anatomy.model.architecture not in _GATED else heads.gated
    if stem == "attn_qkv":
        return _fused_parts(anatomy, il, heads, q)
    by_head = extent == anatomy.hyper.n_head[il]
    steps = {
        "attn_q": q,
        "attn_k": heads.k,
        "attn_v": heads.v,
        "attn_output": heads.output,
        "attn_gate": heads.heads if by_head else heads.q,
        "attn_sinks": heads.heads,
    }
    return (Part(extent=extent, step=steps.get(stem, 1)),)


def _fused_parts(anatomy: Anatomy, il: int, heads: Heads, q: int) -> tuple[Part, ...]:
    """Q, K and V in one matrix: each is cut for itself."""
    hyper = anatomy.hyper
    dim_k, dim_v = head_sizes(anatomy, il)
    doubled = 2 if anatomy.model.architecture in _GATED else 1
    queries = Part(extent=hyper.n_head[il] * dim_k * doubled, step=q)
    keys = hyper.n_head_kv[il] * dim_k
    values = hyper.n_head_kv[il] * dim_v
    if keys == values:
        return queries, Part(extent=keys, step=heads.k, repeats=2)
    return queries, Part(extent=keys, step=heads.k), Part(extent=values, step=heads.v)


def _feed_parts(anatomy: Anatomy, il: int, stem: str, extent: int) -> tuple[Part, ...]:
    step = lcm(_block_size(anatomy, il, "ffn_down", "ffn_down_exps"), _FAST)
    fused = stem.startswith("ffn_gate_up") or (stem.startswith("ffn_up") and extent == 2 * anatomy.hyper.n_ff[il])
    return (Part(extent=extent // 2, step=step, repeats=2) if fused else Part(extent=extent, step=step),)


class _Delta(Struct, frozen=True, kw_only=True):
    """Sizes of a gated delta net: elements of keys and of values, of one head, and the step of its cuts."""

    keys: int
    ratio: int  # value heads for one key head
    dim: int
    step: int


def _delta(anatomy: Anatomy, il: int) -> _Delta:
    keys = anatomy.keys
    dim, n_heads = keys.number("ssm.state_size"), keys.number("ssm.group_count")
    step = lcm(lcm(_block_size(anatomy, il, "ssm_out"), _FAST), max(dim, 1))
    ratio = max(keys.number("ssm.time_step_rank") // max(n_heads, 1), 1)
    return _Delta(keys=dim * n_heads, ratio=ratio, dim=max(dim, 1), step=step)


def _recurrent_parts(anatomy: Anatomy, il: int, stem: str, extent: int, n: int) -> tuple[Part, ...]:
    """Of a recurrent block's tensor."""
    del n
    if stem.startswith("ffn_"):
        return _feed_parts(anatomy, il, stem, extent)
    net = _delta(anatomy, il)
    by_head = net.step // net.dim
    if stem in ("attn_qkv", "ssm_conv1d"):
        return _mixed_parts(anatomy, net, 1)
    if stem == "ssm_ba":
        return (Part(extent=extent, step=2 * by_head),)
    in_order = anatomy.model.architecture == _IN_ORDER
    step = net.step if stem in ("attn_gate", "ssm_out") else by_head
    repeats = 1 if in_order else net.ratio
    return (Part(extent=extent // repeats, step=step, repeats=repeats),)


def _mixed_parts(anatomy: Anatomy, net: _Delta, each: int) -> tuple[Part, ...]:
    """Queries, keys and values behind each other, `each` numbers for one of them."""
    keys, step = net.keys * each, net.step * each
    if anatomy.model.architecture == _IN_ORDER:
        return Part(extent=keys, step=step, repeats=2), Part(extent=keys * net.ratio, step=step)
    return (Part(extent=keys, step=step, repeats=2 + net.ratio),)


def state_cuts(anatomy: Anatomy, il: int) -> tuple[Cut, Cut]:
    """How a recurrent block's convolution state and its own are cut."""
    net, block = _delta(anatomy, il), anatomy.caches[il]
    taps = max(anatomy.keys.number("ssm.conv_kernel") - 1, 1)
    repeats = 1 if anatomy.model.architecture == _IN_ORDER else net.ratio
    state = Part(extent=block.state_s // repeats, step=net.step * net.dim, repeats=repeats)
    return Cut(axis=0, parts=_mixed_parts(anatomy, net, taps)), Cut(axis=0, parts=(state,))


def _block_size(anatomy: Anatomy, il: int, *stems: str) -> int:
    """Elements in a block of the first of these weights that the block has: what reads decides for what makes."""
    block = anatomy.blocks[il]
    tensor = next((block[f"{stem}.weight"] for stem in stems if f"{stem}.weight" in block), None)
    return 1 if tensor is None else BLOCKS.get(tensor.type.upper(), (1, 0))[0]


def whole(extent: int, step: int, axis: int = 0) -> Cut:
    return Cut(axis=axis, parts=(Part(extent=extent, step=step),))
