"""The blocks of Gemma 3n and Gemma 4: inputs for each layer, shared caches, and (3n) several residual streams.

Source: llama.cpp b11434, src/models/gemma3n.cpp, src/models/gemma4.cpp.
"""

from __future__ import annotations

from mgpu_adapters.llamacpp.attention import attend, has_rope
from mgpu_adapters.llamacpp.blocks import SPARSE_BLOCKS, Build
from mgpu_adapters.llamacpp.experts import routed_experts
from mgpu_adapters.llamacpp.graph import Node, get_rows, like, mul_mat, permute, reshape, tensor, view


def layer_inputs(b: Build, x: Node) -> Node | None:
    """What each layer adds of its own for each token: (width, n_tokens, n_layer)."""
    table = b.outside(b.seats.cpu, "per_layer_token_embd.weight")
    if table is None:
        return None
    first = b.seats.seat(0)
    n_layer, tokens = b.hyper.n_layer, b.n_tokens
    width = table.ne[0] // n_layer
    own = like("scale", reshape(get_rows(table, b.graph.input(tokens)), width, n_layer, tokens))
    b.graph.expand(own)
    weight = b.outside(first, "per_layer_model_proj.weight")
    norm = b.outside(first, "per_layer_proj_norm.weight")
    shared = x if weight is None else like("scale", mul_mat(weight, x))
    shared = b.scaled(like("rms_norm", reshape(shared, width, n_layer, tokens)), norm, None)
    both = like("scale", like("add", shared, own))
    return tensor("cont", (width, tokens, n_layer, 1), permute(both))


def attention(b: Build, il: int, x: Node) -> Node:
    """Q and K by head with norms, V normed too; blocks without a cache read an earlier one's."""
    n_head, n_head_kv, tokens = b.hyper.n_head[il], b.hyper.n_head_kv[il], b.n_tokens
    dim_k, dim_v = b.head_sizes(windowed=b.anatomy.caches[il].window > 0)
    q = b.norm(reshape(b.project(il, "attn_q", x), dim_k, n_head, tokens), il, "attn_q_norm")
    q = b.rope(q, il) if has_rope(b, il) else q
    if not b.anatomy.caches[il].k:
        return attend(b, il, q, None, None)
    k = b.project(il, "attn_k", x)
    v = b.project(il, "attn_v", x) if b.has(il, "attn_v.weight") else k
    k = b.rope(b.norm(reshape(k, dim_k, n_head_kv, tokens), il, "attn_k_norm"), il)
    return attend(b, il, q, k, like("rms_norm", reshape(v, dim_v, n_head_kv, tokens)))


def gemma4_block(b: Build, il: int, x: Node, inputs: Node | None) -> Node:
    out = attention(b, il, b.norm(x, il, "attn_norm"))
    out = like("add", b.norm(out, il, "post_attention_norm"), x)
    y = b.feed_forward(il, b.norm(out, il, "ffn_norm"))
    if b.has(il, "ffn_gate_inp.weight"):
        y = like("add", b.norm(y, il, "post_ffw_norm_1"), _gemma4_experts(b, il, out))
    y = like("add", b.norm(y, il, "post_ffw_norm", pinned=False), out)
    if inputs is not None:
        own = like("mul", like("unary", b.project(il, "inp_gate", y)), view(inputs, (*inputs.ne[:2], 1, 1)))
        y = like("add", y, b.norm(b.project(il, "proj", own), il, "post_norm"))
    return b.scaled(y, b.weight(il, "layer_output_scale.weight"), None)


def _gemma4_experts(b: Build, il: int, x: Node) -> Node:
    inner = b.norm(x, il, "pre_ffw_norm_2")
    rows = b.scaled(like("scale", like("rms_norm", x)), b.weight(il, "ffn_gate_inp.scale"), None)
    gate = b.weight(il, "ffn_gate_inp.weight")
    logits = None if gate is None else mul_mat(gate, rows)
    return b.norm(routed_experts(b, il, x, inner, logits), il, "post_ffw_norm_2")


def spread_streams(b: Build, x: Node) -> Node:
    """gemma3n: the embedding as several residual streams, (n_embd, n_tokens, n_altup)."""
    weight = b.outside(b.seats.output, "altup_proj.weight")
    if weight is None:
        return x
    n_altup = weight.ne[2] + 1
    size = _magnitude(x)
    others = mul_mat(weight, tensor("repeat", (*x.ne[:2], n_altup - 1, 1), x))
    others = like("div", like("mul", others, size), _magnitude(others))
    return tensor("concat", (*x.ne[:2], n_altup, 1), x, others)


def join_streams(b: Build, x: Node) -> Node:
    """gemma3n: the mean of the streams, each brought back."""
    weight = b.outside(b.seats.output, "altup_unembd_proj.weight")
    if weight is None:
        return x
    size = _magnitude(_stream(x))
    others = mul_mat(weight, view(x, (*x.ne[:2], x.ne[2] - 1, 1)))
    others = like("div", like("mul", others, size), _magnitude(others))
    total = _stream(x)
    for _ in range(x.ne[2] - 1):
        total = like("add", total, _stream(others))
    return like("scale", total)


def _magnitude(x: Node) -> Node:
    return like("sqrt", tensor("sum_rows", (1, *x.ne[1:]), like("sqr", x)))


def _stream(x: Node) -> Node:
    return view(x, (*x.ne[:2], 1, 1))


def gemma3n_block(b: Build, il: int, x: Node, inputs: Node | None) -> Node:
    guesses = _predict(b, il, x)
    active = _stream(guesses)
    normed = b.norm(active, il, "attn_norm")
    laurel = b.project(il, "laurel_r", b.project(il, "laurel_l", normed))
    laurel = like("add", b.norm(laurel, il, "laurel_post_norm"), normed)
    out = like("add", b.norm(attention(b, il, normed), il, "post_attention_norm"), active)
    out = like("scale", like("add", out, laurel))
    y = _sparse_feed_forward(b, il, b.norm(out, il, "ffn_norm"))
    y = like("add", b.norm(y, il, "post_ffw_norm", pinned=False), out)
    corrected = _correct(b, il, guesses, y)
    first = b.scaled(_stream(corrected), b.weight(il, "altup_correct_scale.weight"), None)
    first = like("unary", b.project(il, "inp_gate", first))
    if inputs is not None:
        first = like("mul", first, _stream(inputs))
    first = b.norm(b.project(il, "proj", first), il, "post_norm")
    rest = like("add", view(corrected, (*corrected.ne[:2], corrected.ne[2] - 1, 1)), first)
    return tensor("concat", corrected.ne, _stream(corrected), rest)


def _sparse_feed_forward(b: Build, il: int, x: Node) -> Node:
    up, gate = b.project(il, "ffn_up", x), b.project(il, "ffn_gate", x)
    if il < SPARSE_BLOCKS:
        mean = tensor("mean", (1, *gate.ne[1:]), gate)
        spread = tensor("sum_rows", (1, *gate.ne[1:]), like("sqr", like("sub", gate, mean)))
        cut = like("add", mean, like("scale", like("sqrt", like("scale", spread))))
        gate = like("unary", like("sub", gate, cut))
    return b.project(il, "ffn_down", like("mul", up, like("unary", gate)))


def _modalities(b: Build, il: int, x: Node) -> Node:
    return like("unary", b.project(il, "altup_router", like("scale", b.norm(x, il, "altup_router_norm"))))


def _predict(b: Build, il: int, x: Node) -> Node:
    n_embd, tokens, n_altup, _ = x.ne
    mixing = reshape(b.project(il, "altup_predict_coef", _modalities(b, il, _stream(x))), n_altup, n_altup, tokens)
    turned = tensor("cont", (n_altup, n_embd, tokens, 1), permute(x))
    guesses = tensor("mul_mat", (n_embd, n_altup, tokens, 1), turned, mixing)
    guesses = tensor("cont", x.ne, permute(guesses))
    return like("add", guesses, x)


def _correct(b: Build, il: int, guesses: Node, activated: Node) -> Node:
    n_embd, tokens, n_altup, _ = guesses.ne
    modalities = _modalities(b, il, activated)
    news = like("sub", activated, _stream(guesses))
    mixing = like("scale", b.project(il, "altup_correct_coef", modalities))
    mixing = tensor("cont", (1, tokens, n_altup, 1), Node("transpose", mixing.ne, mixing.n_bytes, (mixing,), mixing))
    spread = tensor("repeat", (n_embd, tokens, n_altup, 1), news)
    return like("add", like("mul", spread, mixing), guesses)
