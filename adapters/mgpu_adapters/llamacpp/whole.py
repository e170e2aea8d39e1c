"""The whole compute graph of a model: embedding, blocks, output. Source: llama.cpp b11434, src/models/*.cpp."""

from __future__ import annotations

from typing import Final

from mgpu_adapters.llamacpp import gemma
from mgpu_adapters.llamacpp.attention import attention_block, latent_attention
from mgpu_adapters.llamacpp.blocks import Anatomy, Build, Seats
from mgpu_adapters.llamacpp.delta import delta_net
from mgpu_adapters.llamacpp.experts import experts_block, latent_experts
from mgpu_adapters.llamacpp.graph import I64, Graph, Node, get_rows, like, mul_mat, set_rows
from mgpu_adapters.llamacpp.mixers import mamba, mamba2, short_convolution
from mgpu_adapters.llamacpp.settings import Settings

#: Architectures whose batches cannot mix tokens and embeddings (llm_arch_supports_mixed_batch).
_UNMIXED: Final = frozenset({"cogvlm", "deepseek4", "granite-switch"})

#: Architectures with logits squeezed by tanh whether or not the file says so.
_SQUEEZED: Final = frozenset({"gemma2", "gemma3n"})


def model_graph(anatomy: Anatomy, settings: Settings, seats: Seats) -> Graph:
    """The graph llama.cpp reserves memory for: one full batch, through the blocks of `seats`, in order."""
    b = Build(anatomy, settings, seats)
    x = _embedding(b)
    inputs = gemma.layer_inputs(b, x)
    if anatomy.model.architecture == "gemma3n":
        x = gemma.spread_streams(b, x)
    for il in seats.blocks:
        x = _block(b, il, x, inputs)
    if anatomy.model.architecture == "gemma3n":
        x = get_rows(gemma.join_streams(b, x), b.wanted)
    _output(b, x)
    return b.graph


def _embedding(b: Build) -> Node:
    """Three ways in (tokens, vectors, both): all are in the graph, one is used (build_inp_embd)."""
    graph, n_embd, tokens = b.graph, b.hyper.n_embd, b.n_tokens
    table = b.outside(b.seats.cpu, "token_embd.weight")
    vectors = graph.input(n_embd, tokens)
    x = vectors if table is None else get_rows(table, b.tokens)
    graph.expand(x)
    graph.expand(vectors)
    if table is not None and b.anatomy.model.architecture not in _UNMIXED:
        rows = get_rows(table, graph.input(tokens))
        slots = graph.input(tokens, width=I64)
        graph.expand(set_rows(like("dup", graph.input(n_embd, tokens)), rows, slots))
    if b.keys.get("embedding_scale"):
        x = like("scale", x)
    if b.traits.scaled_embedding == "rows":
        x = like("mul", x, graph.input(1, tokens))
    graph.expand(x)
    return like("scale", x) if b.traits.scaled_embedding == "op" else x


def _block(b: Build, il: int, x: Node, inputs: Node | None) -> Node:
    architecture = b.anatomy.model.architecture
    if architecture == "gemma3n":
        return gemma.gemma3n_block(b, il, x, inputs)
    if architecture == "gemma4":
        return gemma.gemma4_block(b, il, x, inputs)
    if architecture in ("nemotron_h", "nemotron_h_moe"):
        return like("add", _nemotron_mixer(b, il, b.norm(x, il, "attn_norm")), x)
    if architecture == "mamba2" or (b.anatomy.recurs[il] and not b.has(il, "ffn_norm.weight") and _bare(b, il)):
        return _bare_block(b, il, x)
    return _common_block(b, il, x)


def _bare(b: Build, il: int) -> bool:
    return not any(name.startswith(("ffn_", "post_attention_norm")) for name in b.anatomy.blocks[il])


def _bare_block(b: Build, il: int, x: Node) -> Node:
    """A mixer and its residual, nothing more (Mamba)."""
    y = _mixer(b, il, b.norm(x, il, "attn_norm", "rms_norm"))
    if il == b.anatomy.n_trunk - 1:
        y, x = get_rows(y, b.wanted), get_rows(x, b.wanted)
    return like("add", y, x)


def _nemotron_mixer(b: Build, il: int, x: Node) -> Node:
    if b.anatomy.recurs[il]:
        return mamba2(b, il, x)
    if b.anatomy.caches[il].k:
        return attention_block(b, il, x)
    if b.has(il, "ffn_gate_inp.weight"):
        return latent_experts(b, il, x)
    return b.feed_forward(il, x)


def _mixer(b: Build, il: int, x: Node) -> Node:
    """What mixes tokens: attention of its kind, or what keeps a state."""
    if not b.anatomy.recurs[il]:
        return latent_attention(b, il, x) if b.anatomy.is_mla else attention_block(b, il, x)
    if b.has(il, "shortconv.conv.weight"):
        return short_convolution(b, il, x)
    if b.has(il, "ssm_ba.weight") or b.has(il, "ssm_beta.weight"):
        return delta_net(b, il, x)
    return mamba(b, il, x) if b.has(il, "ssm_x.weight") else mamba2(b, il, x)


def _common_block(b: Build, il: int, x: Node) -> Node:
    traits, before = b.traits, x
    normed = b.norm(x, il, "attn_norm") if b.has(il, "attn_norm.weight") or b.traits.norm == "norm" else x
    if b.anatomy.is_mla or b.anatomy.model.architecture in ("qwen3next", "qwen35", "qwen35moe"):
        b.graph.expand(normed)
    if b.anatomy.model.architecture == "falcon-h1":
        y = attention_block(b, il, normed)
        y = like("add", y, mamba2(b, il, b.norm(x, il, "attn_norm")))
        before = like("add", y, before)
    else:
        y = _mixer(b, il, normed)
    if il == b.anatomy.n_trunk - 1 and not traits.late_rows:
        y, before = get_rows(y, b.wanted), get_rows(before, b.wanted)
        if traits.parallel or not _feed_norm(b, il):
            normed = get_rows(normed, b.wanted)
    if traits.parallel:
        feed = _feed(b, il, normed)
        if traits.parallel == "feed+residual":
            return like("add", like("add", feed, before), y)
        return like("add", like("add", *((feed, y) if traits.parallel == "feed+attention" else (y, feed))), before)
    if b.anatomy.model.architecture == "falcon-h1":
        return like("add", _feed(b, il, b.norm(before, il, "ffn_norm")), before)
    return _serial(b, il, y, before, normed)


def _serial(b: Build, il: int, y: Node, before: Node, normed: Node) -> Node:
    """Residual after the mixer, then after the feed-forward block."""
    scaled = bool(b.keys.get("residual_scale"))
    feed_norm = _feed_norm(b, il)
    if feed_norm != "post_attention_norm" and b.has(il, "post_attention_norm.weight"):
        y = b.norm(y, il, "post_attention_norm")
    middle = _sum(b, like("scale", y) if scaled else y, before)
    inner = middle if b.has(il, "post_ffw_norm.weight") else normed
    if feed_norm:
        inner = b.norm(middle, il, feed_norm)
    y = _feed(b, il, inner)
    if b.has(il, "post_ffw_norm.weight"):
        y = b.norm(y, il, "post_ffw_norm", pinned=b.anatomy.model.architecture == "glm4")
    return _sum(b, like("scale", y) if scaled else y, middle)


def _sum(b: Build, y: Node, residual: Node) -> Node:
    """Which comes first decides whose memory the sum takes over."""
    return like("add", residual, y) if b.traits.residual_first else like("add", y, residual)


def _feed_norm(b: Build, il: int) -> str:
    """The norm before the feed-forward block: llama.cpp's name for it differs; OLMo 2 and a StableLM have none."""
    if b.has(il, "ffn_norm.weight") or b.has(il, "ffn_norm"):
        return "ffn_norm"
    if b.has(il, "post_attention_norm.weight") and not b.has(il, "post_ffw_norm.weight"):
        return "post_attention_norm"
    return ""


def _feed(b: Build, il: int, x: Node) -> Node:
    return experts_block(b, il, x) if b.has(il, "ffn_gate_inp.weight") else b.feed_forward(il, x)


def _output(b: Build, x: Node) -> None:
    seat, traits = b.seats.output, b.traits
    if b.anatomy.n_trunk - 1 not in b.seats.blocks and not traits.late_rows:
        x = get_rows(x, b.wanted)  # in the place of the last block, which the graph leaves out
        x.backend = seat
    if traits.late_rows == "before_norm":
        x = get_rows(x, b.wanted)
    weight = b.outside(seat, "output_norm.weight", "token_embd_norm.weight")
    x = b.scaled(like(traits.norm, x), weight, b.outside(seat, "output_norm.bias"))
    if traits.late_rows == "after_norm":
        x.is_output = traits.keeps_hidden
        x = get_rows(x, b.wanted)
    x.is_output = True
    head = b.outside(seat, "output.weight", "token_embd.weight")
    if head is not None:
        x = b.scaled(mul_mat(head, x), None, b.outside(seat, "output.bias"))
    if b.keys.get("logit_scale"):
        x = like("scale", x)
    if b.keys.get("final_logit_softcapping") or b.anatomy.model.architecture in _SQUEEZED:
        x = like("scale", like("unary", like("scale", x)))
    x.is_output = True
    b.graph.expand(x)
