"""Gated delta nets: the linear attention of Qwen3-Next and Qwen3.5.

Source: llama.cpp b11434, src/models/qwen3next.cpp, qwen35.cpp, delta-net-base.cpp (fused; every backend that matters
here has GATED_DELTA_NET); ggml/src/ggml.c for its size.
"""

from __future__ import annotations

from msgspec import Struct

from mgpu_adapters.llamacpp.blocks import Build, strided
from mgpu_adapters.llamacpp.graph import Node, like, reshape, tensor, view
from mgpu_adapters.llamacpp.mixers import convolved, joined, last_columns, read_state, write_state


class _Sizes(Struct, frozen=True, kw_only=True):
    dim_k: int
    dim_v: int
    heads_k: int
    heads_v: int
    per_seq: int

    @property
    def ratio(self) -> int:
        return self.heads_v // self.heads_k


def delta_net(b: Build, il: int, x: Node) -> Node:
    keys, n_seqs = b.keys, b.n_seqs
    heads_v = keys.number("ssm.time_step_rank") or 1
    s = _Sizes(
        dim_k=keys.number("ssm.state_size"),
        dim_v=keys.number("ssm.inner_size") // heads_v,
        heads_k=keys.number("ssm.group_count") or 1,
        heads_v=heads_v,
        per_seq=b.n_tokens // n_seqs,
    )
    mixed, z = _inputs(b, il, x, s)
    beta, gate = _rates(b, il, x, s)
    columns = joined(b, il, last_columns(b, il, keys.number("ssm.conv_kernel"), mixed.ne[0]), mixed)
    memory = b.state(il, "s", b.anatomy.caches[il].state_s)
    state = reshape(read_state(b, memory), s.dim_v, s.dim_v, s.heads_v, n_seqs)
    qkv = like("unary", convolved(b, il, columns, s.per_seq, "ssm_conv1d"))
    q, k = (_unit(b, strided(qkv, s.dim_k, s.heads_k, s.per_seq, n_seqs), s) for _ in range(2))
    v = strided(qkv, s.dim_v, s.heads_v, s.per_seq, n_seqs)
    rows = s.per_seq * n_seqs + s.dim_v * n_seqs
    out = tensor("gated_delta_net", (s.dim_v * s.heads_v, rows, 1, 1), q, k, v, gate, beta, state)
    write_state(b, memory, view(out, (s.dim_v, s.dim_v, s.heads_v, n_seqs)))
    y = b.norm(view(out, (s.dim_v, s.heads_v, s.per_seq, n_seqs)), il, "ssm_norm")
    z = reshape(z, s.dim_v, s.heads_v, s.per_seq, n_seqs)
    y = reshape(like("mul", y, like("unary", z)), s.dim_v * s.heads_v, s.per_seq, n_seqs)
    y = b.project(il, "ssm_out", y)
    return reshape(y, y.ne[0], b.n_tokens)


def _inputs(b: Build, il: int, x: Node, s: _Sizes) -> tuple[Node, Node]:
    """Q, K and V in one, and the output gate: two matrices, or (older files) one with all of them by head."""
    n_seqs = b.n_seqs
    if b.has(il, "attn_qkv.weight"):
        mixed = b.project(il, "attn_qkv", x)
        return reshape(mixed, mixed.ne[0], s.per_seq, n_seqs), b.project(il, "attn_gate", x)
    all_ = b.project(il, "ssm_in", x)
    by_head = reshape(all_, all_.ne[0] // s.heads_k, s.heads_k, s.per_seq, n_seqs)
    wide = s.dim_v * s.ratio
    q, k, v, z = (
        tensor("cont", (dim * s.heads_k, s.per_seq, n_seqs, 1), strided(by_head, dim, s.heads_k, s.per_seq, n_seqs))
        for dim in (s.dim_k, s.dim_k, wide, wide)
    )
    both = tensor("concat", (q.ne[0] + k.ne[0], s.per_seq, n_seqs, 1), q, k)
    return tensor("concat", (both.ne[0] + v.ne[0], s.per_seq, n_seqs, 1), both, v), z


def _rates(b: Build, il: int, x: Node, s: _Sizes) -> tuple[Node, Node]:
    """The write strength and the decay of each head."""
    n_seqs = b.n_seqs
    if b.has(il, "ssm_ba.weight"):
        both = b.project(il, "ssm_ba", x)
        by_head = reshape(both, 2 * s.ratio, s.heads_k, s.per_seq, n_seqs)
        part = strided(by_head, s.ratio, s.heads_k, s.per_seq, n_seqs)
        beta = like("unary", tensor("cont", part.ne, part))
        part = strided(by_head, s.ratio, s.heads_k, s.per_seq, n_seqs)
        alpha = tensor("cont", (s.heads_v, s.per_seq, n_seqs, 1), part)
    else:
        beta = like("unary", reshape(b.project(il, "ssm_beta", x), 1, s.heads_v, s.per_seq, n_seqs))
        alpha = reshape(b.project(il, "ssm_alpha", x), s.heads_v, s.per_seq, n_seqs)
    alpha = like("unary", b.scaled(alpha, None, b.weight(il, "ssm_dt.bias")))
    decay = b.scaled(alpha, b.weight(il, "ssm_a"), None)
    return reshape(beta, 1, s.heads_v, s.per_seq, n_seqs), reshape(decay, 1, s.heads_v, s.per_seq, n_seqs)


def _unit(b: Build, x: Node, s: _Sizes) -> Node:
    """Rows of length one; repeated for each value head where llama.cpp does so (Qwen3-Next)."""
    x = like("scale", like("rms_norm", x))
    if s.ratio == 1 or b.anatomy.model.architecture != "qwen3next":
        return x
    tokens = s.per_seq * b.n_seqs
    repeated = tensor("repeat", (s.dim_k, s.ratio, s.heads_k, tokens), reshape(x, s.dim_k, 1, s.heads_k, tokens))
    return reshape(repeated, s.dim_k, s.heads_v, s.per_seq, b.n_seqs)
