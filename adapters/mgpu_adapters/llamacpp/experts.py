"""The mixture-of-experts block of llama.cpp's graph. Source: llama.cpp b11434, src/llama-graph.cpp (build_moe_ffn)."""

from __future__ import annotations

from mgpu_adapters.llamacpp.blocks import Build, strided
from mgpu_adapters.llamacpp.graph import Node, get_rows, glu, like, mul_mat, mul_mat_id, reshape, tensor, view
from mgpu_adapters.llamacpp.traits import Gating

_GATING_BY_KEY: tuple[Gating, ...] = ("softmax", "softmax", "sigmoid", "softmax_weight")


def experts_block(b: Build, il: int, x: Node, *, routed_input: Node | None = None) -> Node:
    """Routed experts, and the shared ones when the block has them. Expanded as llama.cpp expands it."""
    routed = routed_experts(b, il, x, routed_input or x)
    if not b.has(il, "ffn_up_shexp.weight"):
        return routed
    shared = b.feed_forward(il, x, "_shexp")
    if b.has(il, "ffn_gate_inp_shexp.weight"):
        shared = like("mul", shared, like("unary", b.project(il, "ffn_gate_inp_shexp", x)))
    return like("add", routed, shared)


def routed_experts(b: Build, il: int, x: Node, inner: Node, logits: Node | None = None) -> Node:
    """`x` decides, `inner` is what the experts work on (the same, but for latent experts)."""
    n_used, tokens = b.hyper.n_expert_used, x.ne[1]
    weight_first = b.anatomy.model.architecture == "llama4"
    ids, weights = _route(b, il, x, logits)
    b.graph.expand(weights)
    rows = reshape(inner, inner.ne[0], 1, tokens)
    if weight_first:
        rows = like("mul", tensor("repeat", (inner.ne[0], n_used, tokens, 1), rows), weights)
    out = _through(b, il, "ffn_down_exps", _activated(b, il, rows, ids), ids)
    if not weight_first:
        out = like("mul", out, weights)
    b.graph.expand(out)
    if n_used == 1:
        return like("cont", _one_expert(out, tokens))
    # Each further sum overwrites the one before: two experts take the memory of all.
    parts = [b.graph.expand(_one_expert(out, tokens)) for _ in range(2)]
    return b.graph.expand(like("add", *parts))


def _one_expert(out: Node, tokens: int) -> Node:
    return view(out, (out.ne[0], tokens, 1, 1))


def _route(b: Build, il: int, x: Node, logits: Node | None) -> tuple[Node, Node]:
    """Which experts each token goes to, (n_expert_used, n_tokens), and their weights, (1, n_expert_used, n_tokens)."""
    n_expert, n_used, tokens = b.hyper.n_expert, b.hyper.n_expert_used, x.ne[1]
    gating = _gating(b)
    if logits is None:
        logits = b.project(il, "ffn_gate_inp", x)
    probs = logits
    if gating != "softmax_weight":
        probs = like("soft_max" if gating == "softmax" else "unary", logits)
    bias = b.weight(il, "exp_probs_b.bias")
    chosen = probs if bias is None else like("add", probs, bias)
    if b.anatomy.model.architecture == "llama4":
        chosen = logits
    if b.keys.number("expert_group_count") > 1:
        chosen = _within_groups(b, chosen)
    ids = strided(like("argsort", chosen), n_used, tokens)
    weights = tensor("get_rows", (1, n_used, tokens, 1), reshape(probs, 1, n_expert, tokens), ids)
    if gating == "softmax_weight":
        weights = reshape(like("soft_max", reshape(weights, n_used, tokens)), 1, n_used, tokens)
    if _norms_weights(b):
        flat = reshape(weights, n_used, tokens)
        total = like("clamp", tensor("sum_rows", (1, tokens, 1, 1), flat))
        weights = reshape(like("div", flat, total), 1, n_used, tokens)
    scale = b.keys.get("expert_weights_scale")
    return ids, like("scale", weights) if scale and scale != 1.0 else weights


def _gating(b: Build) -> Gating:
    if b.traits.gating != "by_key":
        return b.traits.gating
    code = b.keys.number("expert_gating_func")
    return _GATING_BY_KEY[code] if code < len(_GATING_BY_KEY) else "sigmoid"


def _norms_weights(b: Build) -> bool:
    stored = b.keys.get("expert_weights_norm")
    return b.traits.norm_weights if stored is None else bool(stored)


def _within_groups(b: Build, scores: Node) -> Node:
    """Scores of the experts outside of the best groups masked out (DeepSeek-V3)."""
    n_groups, n_used = b.keys.number("expert_group_count"), b.keys.number("expert_group_used_count")
    n_expert, tokens = scores.ne[0], scores.ne[1]
    each = n_expert // n_groups
    groups = reshape(scores, each, n_groups, tokens)
    best = strided(like("argsort", groups), 2, n_groups, tokens)
    sums = tensor("get_rows", (1, 2, n_groups, tokens), reshape(groups, 1, each, n_groups, tokens), best)
    sums = tensor("sum_rows", (1, n_groups, tokens, 1), reshape(sums, 2, n_groups, tokens))
    kept = strided(like("argsort", reshape(sums, n_groups, tokens)), n_used, tokens)
    inside = tensor("get_rows", (each, n_used, tokens, 1), groups, kept)
    filled = like("fill", groups)
    masked = Node("set_rows", groups.ne, groups.n_bytes, (inside, kept, filled), filled)
    return reshape(masked, n_expert, tokens)


def _activated(b: Build, il: int, rows: Node, ids: Node) -> Node:
    if b.has(il, "ffn_gate_up_exps.weight"):
        both = _through(b, il, "ffn_gate_up_exps", rows, ids)
        half = (both.ne[0] // 2, *both.ne[1:])
        return glu(strided(both, *half), strided(both, *half))
    up = _through(b, il, "ffn_up_exps", rows, ids)
    if b.has(il, "ffn_gate_exps.weight"):
        return glu(_through(b, il, "ffn_gate_exps", rows, ids), up)
    return b.activation(up)


def _through(b: Build, il: int, name: str, rows: Node, ids: Node) -> Node:
    weight = b.weight(il, name + ".weight")
    if weight is None:
        return rows
    out = mul_mat_id(weight, rows, ids)
    scale = b.weight(il, name + ".scale")
    if scale is not None:
        repeated = tensor("repeat", (1, scale.ne[0], rows.ne[2], 1), reshape(scale, 1, scale.ne[0]))
        out = like("mul", out, get_rows(repeated, ids))
    bias = b.weight(il, name + ".bias")
    return out if bias is None else like("add_id", out, bias, ids)


def latent_experts(b: Build, il: int, x: Node) -> Node:
    """Nemotron's: the router's logits come first, and the experts may work on a narrower row."""
    down = b.weight(il, "ffn_latent_down.weight")
    inner = x if down is None else mul_mat(down, x)
    logits = b.project(il, "ffn_gate_inp", x)
    routed = routed_experts(b, il, x, inner, logits)
    up = b.weight(il, "ffn_latent_up.weight")
    if up is not None:
        routed = mul_mat(up, routed)
    return like("add", routed, b.feed_forward(il, x, "_shexp"))
