"""Attention over the KV cache, as llama.cpp's graph has it.

Source: llama.cpp b11434, src/llama-graph.cpp (build_qkv, build_attn, build_attn_mha), src/llama-kv-cache.cpp (cpy_k,
cpy_v, get_k, get_v), ggml/src/ggml-cuda/fattn.cu (ggml_cuda_flash_attn_ext_get_alloc_size), src/models/deepseek2.cpp.
"""

from __future__ import annotations

from mgpu_adapters.llamacpp.blocks import Build, rotated, strided
from mgpu_adapters.llamacpp.graph import F16, F32, Ne, Node, like, mul_mat, permute, reshape, set_rows, tensor, view

Projections = tuple[Node, Node, Node]


def attention_block(b: Build, il: int, x: Node) -> Node:
    """Attention of a block of the common kind, its output projection included."""
    q, k, v, gate = project(b, il, x)
    q, k = place(b, il, q, k)
    if gate is None:
        return attend(b, il, q, k, v)
    x = attend(b, il, q, k, v, output="")
    flat = tensor("cont", (gate.ne[0] * gate.ne[1], gate.ne[2], 1, 1), gate)
    return b.project(il, "attn_output", like("mul", x, like("unary", flat)))


def project(b: Build, il: int, x: Node) -> tuple[Node, Node, Node, Node | None]:
    """Q, K and V by head, and (Qwen3-Next) the gate that comes with Q."""
    n_head, n_head_kv, tokens = b.hyper.n_head[il], b.hyper.n_head_kv[il], b.n_tokens
    dim_k, dim_v = b.head_sizes(windowed=b.anatomy.caches[il].window > 0)
    fused = b.weight(il, "attn_qkv.weight")
    if fused is not None:
        qkv = b.project(il, "attn_qkv", x)
        shapes = ((dim_k, n_head), (dim_k, n_head_kv), (dim_v, n_head_kv))
        q, k, v = (strided(qkv, dim, heads, tokens) for dim, heads in shapes)
        return q, k, v, None
    q, k = b.project(il, "attn_q", x), b.project(il, "attn_k", x)
    v = b.project(il, "attn_v", x) if b.has(il, "attn_v.weight") else k
    gate = None
    if q.ne[0] == 2 * dim_k * n_head:
        both = reshape(q, 2 * dim_k, n_head, tokens)
        q, gate = strided(both, dim_k, n_head, tokens), strided(both, dim_k, n_head, tokens)
    if _norms_whole_rows(b, il, dim_k):
        q, k = b.norm(q, il, "attn_q_norm"), b.norm(k, il, "attn_k_norm")
    q = q if gate is not None else reshape(q, dim_k, n_head, tokens)
    return q, reshape(k, dim_k, n_head_kv, tokens), reshape(v, dim_v, n_head_kv, tokens), gate


def _norms_whole_rows(b: Build, il: int, dim: int) -> bool:
    norm = b.anatomy.blocks[il].get("attn_q_norm.weight")
    return norm is not None and len(norm.shape) == 1 and norm.shape[0] != dim


def place(b: Build, il: int, q: Node, k: Node) -> tuple[Node, Node]:
    """Norms by head and rotary positions, in the architecture's order."""
    traits = b.traits
    dim = q.ne[0]
    by_head = b.has(il, "attn_q_norm.weight") and not _norms_whole_rows(b, il, dim)
    if by_head and not traits.norm_after_rope:
        q, k = b.norm(q, il, "attn_q_norm"), b.norm(k, il, "attn_k_norm")
    turns = has_rope(b, il)
    if turns:
        q, k = b.rope(q, il), b.rope(k, il)
    if by_head and traits.norm_after_rope:
        q, k = b.norm(q, il, "attn_q_norm"), b.norm(k, il, "attn_k_norm")
    if b.anatomy.model.architecture == "llama4":
        q, k = _llama4(b, q, k, turns=turns)
    return (like("scale", q) if traits.scaled_query else q), k


def has_rope(b: Build, il: int) -> bool:
    traits = b.traits
    if b.keys.get("rope.scaling.finetuned") is False and b.anatomy.model.architecture.startswith("granite"):
        return False  # Granite's switch for rotary positions
    if traits.rope == "windowed":
        windows = b.anatomy.caches
        return windows[il].window > 0 or not any(block.window for block in windows)
    return traits.rope == "all" and (not traits.rope_step or (il + 1) % traits.rope_step != 0)


def _llama4(b: Build, q: Node, k: Node, *, turns: bool) -> tuple[Node, Node]:
    """Scout norms what it rotates (Maverick does not), and both scale by position what they do not rotate."""
    if not turns:
        return like("mul", q, b.attention_scale), k
    if b.hyper.n_expert >= 128:
        return q, k
    return like("rms_norm", q), like("rms_norm", k)


def attend(b: Build, il: int, q: Node, k: Node | None, v: Node | None, output: str = "attn_output") -> Node:
    """Store K and V (unless the block reads another's cache), attend, and project by the weight named `output`."""
    feed = b.cache_input(il)
    if feed.k_rotation is not None:
        q = rotated(q, feed.k_rotation)
        k = None if k is None else rotated(k, feed.k_rotation)
    if feed.v_rotation is not None and v is not None:
        v = rotated(v, feed.v_rotation)
    b.graph.expand(q)
    for node in (v, k):
        if node is not None:
            b.graph.expand(node)
    owner = il if k is not None else b.shared_cache(il)
    n_head_kv = b.hyper.n_head_kv[owner]
    dims = b.head_sizes(windowed=b.anatomy.caches[il].window > 0)
    k_cache, v_cache = (b.cache(owner, which, dim * n_head_kv) for which, dim in zip("kv", dims, strict=True))
    if k is not None and v is not None:
        _store(b, il, (k, v), (k_cache, v_cache))
    keys = _by_head(b, il, k_cache, dims[0])
    values = _by_head(b, il, v_cache, dims[1])
    x = _mix(b, il, q, keys, values)
    if feed.v_rotation is not None:
        x = rotated(x, feed.v_rotation)
    return b.project(il, output, x) if output else x


def _store(b: Build, il: int, rows: tuple[Node, Node], caches: tuple[Node, Node]) -> None:
    feed, tokens = b.cache_input(il), b.n_tokens
    k, v = rows
    b.graph.expand(set_rows(_merged(caches[0]), _flat(k, tokens), feed.k_rows))
    if b.settings.flash_attn:
        b.graph.expand(set_rows(_merged(caches[1]), _flat(v, tokens), feed.v_rows))
        return
    width = v.ne[0] * v.ne[1]
    flat = tensor("cont", (width, tokens, 1, 1), v) if v.op == "view" else reshape(v, width, tokens)
    widest = max(block.v for block in b.anatomy.caches)
    if width < widest:
        flat = tensor("pad", (widest, tokens, 1, 1), flat)
    cache = caches[1]
    cells = cache.ne[0] * cache.ne[1] * cache.ne[2]
    b.graph.expand(set_rows(reshape(cache, 1, cells), reshape(flat, 1, flat.ne[0] * tokens), feed.v_rows))


def _flat(x: Node, tokens: int) -> Node:
    rows = view(x, (x.ne[0] * x.ne[1], tokens, 1, 1))
    rows.n_bytes = x.n_bytes
    return rows


def _merged(cache: Node) -> Node:
    """All streams as one run of rows."""
    return cache if cache.ne[2] == 1 else reshape(cache, cache.ne[0], cache.ne[1] * cache.ne[2])


def _by_head(b: Build, il: int, cache: Node, dim: int) -> Node:
    ne: Ne = (dim, cache.ne[0] // dim, b.cache_input(il).cells, b.settings.n_stream)
    heads = view(cache, ne)
    heads.n_bytes = cache.n_bytes
    return permute(heads)


def _mix(b: Build, il: int, q: Node, keys: Node, values: Node, decompress: Node | None = None) -> Node:
    """softmax(QK)V, fused or not; `decompress`: what turns latent values into heads (MLA)."""
    settings = b.settings
    streams, n_head, tokens = settings.n_stream, q.ne[1], b.n_tokens
    q = permute(view(q, (q.ne[0], n_head, tokens // streams, streams)))
    sinks = b.weight(il, "attn_sinks.weight")
    sources = (b.cache_input(il).mask, *(() if sinks is None else (sinks,)))
    if settings.flash_attn:
        x = tensor("flash_attn", (values.ne[0], n_head, tokens // streams, streams), q, keys, values, *sources)
        x.extra = _as_f16(settings.type_k, keys) + (0 if decompress else _as_f16(settings.type_v, values))
        if decompress is not None:
            x = permute(mul_mat(decompress, permute(x)))
            x = tensor("cont", x.ne, x)
        x = reshape(x, x.ne[0] * x.ne[1], x.ne[2] * x.ne[3])
        return b.graph.expand(x)
    scores = tensor("mul_mat", (keys.ne[1], tokens // streams, n_head, streams), keys, q)
    if b.traits.softcap:
        scores = like("scale", like("unary", like("scale", scores)))
    scores = like("soft_max", scores, *sources)
    width = values.ne[0]
    if decompress is not None:  # values are a view of the keys, and must be turned
        turned = (values.ne[1], width, values.ne[2], values.ne[3])
        values = tensor("cont", turned, values, width=F32 if settings.type_k == "f32" else F16)
    x = tensor("mul_mat", (width, tokens // streams, n_head, streams), values, scores)
    if decompress is not None:
        x = mul_mat(decompress, x)
    x = tensor("cont", (x.ne[0] * n_head, tokens, 1, 1), permute(x))
    if not settings.kv_offload:
        x.backend = b.seats.cpu
    return b.graph.expand(x)


def _as_f16(type_: str, cache: Node) -> int:
    """CUDA turns a quantised cache of one layer into f16 behind the result."""
    return 0 if type_ == "f16" else 2 * cache.ne[0] * cache.ne[1] * cache.ne[2] * cache.ne[3]


def latent_attention(b: Build, il: int, x: Node) -> Node:
    """DeepSeek's multi-head latent attention, with the absorbed K projection: one compressed row a token."""
    n_head, tokens, keys = b.hyper.n_head[il], b.n_tokens, b.keys
    n_rot, rank = keys.number("rope.dimension_count"), keys.number("attention.kv_lora_rank")
    dim_k = keys.number("attention.key_length_mla")
    if b.has(il, "attn_q.weight"):
        q = b.project(il, "attn_q", x)
    else:
        q = b.project(il, "attn_q_b", b.norm(b.project(il, "attn_q_a", x), il, "attn_q_a_norm"))
    q = reshape(q, dim_k, n_head, tokens)
    q_pe = strided(q, n_rot, n_head, tokens)
    compressed = b.project(il, "attn_kv_a_mqa", x)
    k_pe = b.rope(strided(compressed, n_rot, 1, tokens), il)
    latent = b.norm(strided(compressed, rank, tokens), il, "attn_kv_a_norm")
    q_pe = b.rope(q_pe, il)
    q_nope = permute(strided(q, dim_k - n_rot, n_head, tokens))
    up = b.weight(il, "attn_k_b.weight")
    absorbed = q_nope if up is None else permute(mul_mat(up, q_nope))
    q = tensor("concat", (rank + n_rot, n_head, tokens, 1), absorbed, q_pe)
    latent = reshape(latent, rank, 1, tokens)
    k = tensor("concat", (rank + n_rot, 1, tokens, 1), latent, k_pe)
    if keys.get("attention.temperature_scale"):
        q = like("mul", q, b.attention_scale)
    for node in (q, latent, k):
        b.graph.expand(node)
    feed, cache = b.cache_input(il), b.cache(il, "k", rank + n_rot)
    b.graph.expand(set_rows(_merged(cache), _flat(k, tokens), feed.k_rows))
    heads = view(cache, (rank + n_rot, 1, feed.cells, b.settings.n_stream))
    heads.n_bytes = cache.n_bytes
    values = view(heads, (rank, 1, feed.cells, b.settings.n_stream))
    values.n_bytes = cache.n_bytes
    x = _mix(b, il, q, permute(heads), permute(values), b.weight(il, "attn_v_b.weight"))
    return b.project(il, "attn_output", x)
