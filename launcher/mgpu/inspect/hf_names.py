"""What a tensor of a Hugging Face model is, by its name: the block it belongs to and its class.

The names are those of transformers' modelling code, and of Meta's and Mistral's own files (`layers.0.attention.wq`).
"""

from __future__ import annotations

from typing import Final

from mgpu.model import TensorClass

#: The component before a block's number: `model.layers.7.`, `transformer.h.7.`, `transformer.blocks.7.`
_STACKS: Final = frozenset({"layers", "h", "blocks", "block", "layer"})
#: A component that says: not of the text model.
_OTHER_TOWERS: Final = frozenset({
    "visual", "vision_tower", "vision_model", "vision_encoder", "vision_embedder", "vision_adapter", "vision_backbone",
    "vision_projection", "vision_language_adapter", "vision_resampler", "embed_vision", "vit", "patch_merger",
    "multi_modal_projector", "mm_projector", "mlp1", "merger", "aligner", "connector", "image_newline",
    "image_projection", "vpm", "resampler", "apm", "audio_tower", "audio_encoder", "audio_projection_layer",
    "embed_audio", "audio_projector", "talker", "token2wav", "code2wav", "mtp", "mtp_layers", "pre_mm_projector_norm",
    "patch_conv", "ln_pre", "img_processor", "vision_embed_tokens", "speech_encoder", "speech_projector",
})  # fmt: skip
_EMBEDDINGS: Final = frozenset({
    "embed_tokens", "wte", "wpe", "tok_embeddings", "word_embeddings", "embed_in", "embeddings", "embedding",
    "embed_tokens_per_layer", "embed_positions", "position_embeddings", "token_type_embeddings", "tok_embedding",
})  # fmt: skip
_HEADS: Final = frozenset({
    "lm_head", "embed_out", "output", "output_layer", "score", "norm", "ln_f", "final_layernorm", "norm_f",
    "embedding_norm", "final_norm", "norm_head", "final_layer_norm",
})  # fmt: skip
_SHARED_EXPERTS: Final = frozenset({"shared_expert", "shared_experts", "shared_expert_gate", "shared_mlp"})
#: Modules whose every part is the mixer's, a part called "gate" too.
_ATTENTION: Final = frozenset({"self_attn", "attn", "attention", "self_attention", "linear_attn", "mamba"})
_EXPERTS: Final = frozenset({"experts", "input_linear", "output_linear"})
_ROUTERS: Final = frozenset({"gate", "router", "moe_statics", "e_score_correction_bias", "expert_bias", "router_bias"})
_MIXERS: Final = frozenset({
    "mixer", "conv", "short_conv", "ssm", "temporal_block", "cross_attn",
    "encoder_attn", "attn_norm", "attention_norm", "input_layernorm", "ln_1",
    "ln_attn", "norm", "norm1", "norm_1", "operator_norm", "norm_attn_norm", "pre_attention_layernorm",
    "att_proj", "attn_out", "post_self_attn_layernorm", "temporal_pre_norm",
})  # fmt: skip
_PROJECTIONS: Final = frozenset({"gate_proj", "up_proj", "down_proj", "gate_up_proj"})
#: In most models, post_attention_layernorm is the norm before the feed-forward block.
_FFNS: Final = frozenset({
    "mlp", "ffn", "feed_forward", "ffn_norm", "ln_2", "ln_mlp", "norm2", "norm_2", "block_sparse_moe", "moe",
    "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm", "pre_mlp_layernorm",
    "post_mlp_layernorm", "fc1", "fc2", "ff_proj", "ff_out", "ff_norm", "pre_ff_layernorm", "post_moe_norm",
    "pre_moe_norm", "pre_feedforward_layernorm_2", "post_feedforward_layernorm_1", "post_feedforward_layernorm_2",
})  # fmt: skip
#: Components of names within a block -> the class. The first match counts.
_IN_BLOCK: Final[tuple[tuple[frozenset[str], TensorClass], ...]] = (
    (_SHARED_EXPERTS, "shared_expert"),
    (_ATTENTION, "attention"),
    (_EXPERTS, "expert"),
    (_ROUTERS, "router"),
    (_PROJECTIONS, "ffn"),
    (_MIXERS, "attention"),
    (_FFNS, "ffn"),
)
_OUTSIDE: Final[tuple[tuple[frozenset[str], TensorClass], ...]] = (
    (_OTHER_TOWERS, "other"),
    (_EMBEDDINGS, "token_embedding"),
    (_HEADS, "output"),
)
#: Projections that make keys: a layer with one keeps a cache, unless the same module is recurrent.
_KEYS: Final = frozenset({
    "k_proj", "qkv_proj", "query_key_value", "qkv", "Wqkv", "wk", "wqkv", "c_attn", "W_pack", "kv_a_proj_with_mqa",
    "kv_a_proj", "kv_proj", "k_b_proj", "key", "qkv_fused", "fused_qkv_a_proj_with_mqa", "attn_qkv", "att_proj",
})  # fmt: skip


def place(name: str) -> tuple[int | None, str]:
    """The number of the text model's block, and the name within it; `(None, name)` for all else."""
    parts = name.split(".")
    if not _OTHER_TOWERS.isdisjoint(parts):
        return None, name
    for index, part in enumerate(parts[1:-1], start=1):
        if part.isdecimal() and part.isascii() and parts[index - 1] in _STACKS and len(part) <= 9:
            return int(part), ".".join(parts[index + 1 :])
    return None, name


def classify(name: str, *, in_block: bool) -> TensorClass:
    """The class of a tensor; `name` is as `place` gives it."""
    parts = name.split(".")
    table = _IN_BLOCK if in_block else _OUTSIDE
    return next((kind for words, kind in table if not words.isdisjoint(parts)), "other")


def key_module(name: str) -> str | None:
    """The attention module whose keys this tensor makes: `"self_attn"` of `"self_attn.k_proj.weight"`."""
    parts = name.split(".")
    for index, part in enumerate(parts):
        if part in _KEYS:
            return ".".join(parts[:index])
    return None


def recurrent_module(name: str) -> str | None:
    """The recurrent module this tensor belongs to, if it says so: `"self_attn"` of `"self_attn.A_log"`."""
    module, _, last = name.rpartition(".")
    return module if last in {"A_log", "dt_bias"} else None
