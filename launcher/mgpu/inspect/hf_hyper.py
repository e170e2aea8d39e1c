"""`config.json` and tensor names to `Hyperparameters`.

Keys as vLLM 0.32.0 reads them (`transformers_utils/model_arch_config_convertor.py`) and ExLlamaV2 0.3.2
(`exllamav2/config.py`).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Final

from mgpu.inspect.hf_config import Config
from mgpu.inspect.hf_names import key_module, place, recurrent_module
from mgpu.model import Hyperparameters, Tensor

_MAX_LAYERS: Final = 1024
_MAX_EXPERTS: Final = 4096
_MAX_HEADS: Final = 1 << 16
_LAYERS: Final = ("num_hidden_layers", "n_layers", "n_layer", "num_layers")
_NEXTN: Final = ("num_nextn_predict_layers", "mtp_num_hidden_layers", "num_mtp_layers")
_HEADS: Final = ("num_attention_heads", "n_heads", "n_head", "num_heads", "num_query_heads")
_KV_HEADS: Final = (
    "num_key_value_heads", "n_head_kv", "num_kv_heads", "multi_query_group_num", "num_attention_groups",
    "attn_config.kv_n_heads", "num_key_value_heads_per_layer",
)  # fmt: skip
_FF: Final = ("intermediate_size_mlp", "intermediate_size", "ffn_config.ffn_hidden_size", "ffn_hidden_size", "n_inner",
              "ffn_dim")  # fmt: skip
_EXPERTS: Final = ("num_experts", "moe_num_experts", "n_routed_experts", "num_local_experts",
                   "ffn_config.moe_num_experts")  # fmt: skip
_EXPERTS_USED: Final = ("num_experts_per_tok", "num_experts_per_token", "top_k_experts", "moe_topk", "moe_top_k",
                        "moe_k", "ffn_config.moe_top_k")  # fmt: skip
_EXPERT_FF: Final = ("moe_intermediate_size", "expert_ffn_hidden_size", "moe_ffn_hidden_size")
_CONTEXT: Final = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length", "model_max_length",
                   "max_sequence_length", "max_seq_length", "seq_len", "n_ctx")  # fmt: skip
#: Parts of the names of block types that keep no cache: "linear_attention", "mamba", "conv", "mlp".
_WITHOUT_CACHE: Final = ("linear", "mamba", "conv", "recurrent", "mlp", "moe")
#: vLLM's assumption where none of the keys is there (`config/model.py`).
_ASSUMED_CONTEXT: Final = 2048


def read_hyper(config: Config, tensors: Sequence[Tensor]) -> Hyperparameters:
    """The numbers, per-layer ones for every block that is in the files. Raises `BadModelError`."""
    n_main = config.integer(*_LAYERS, low=1, high=_MAX_LAYERS)
    n_layer = _check_blocks(config, tensors, n_main)
    n_embd = config.integer("hidden_size", "d_model", "n_embd", "model_dim", low=1)
    n_head = _lengthened(config.per_layer(n_main, *_HEADS, default=0, high=_MAX_HEADS), n_layer)
    if not any(n_head) and _cached_by_name(tensors):
        raise config.bad(f"there is no {_HEADS[0]}")
    n_expert = config.most(*_EXPERTS, high=_MAX_EXPERTS)
    n_expert = n_expert if n_expert > 1 else 0  # Hunyuan's dense models say 1
    head_dim_k, head_dim_v = _head_dims(config, n_embd, max(n_head))
    n_ff = _lengthened(_n_ff(config, n_main), n_layer)
    return Hyperparameters(
        n_layer=n_layer,
        n_layer_nextn=n_layer - n_main,
        n_ctx_train=config.integer(*_CONTEXT, default=_ASSUMED_CONTEXT, low=1),
        n_embd=n_embd,
        n_vocab=config.integer("vocab_size", "padded_vocab_size", default=0),
        n_ff=n_ff,
        n_head=n_head,
        n_head_kv=_kv_heads(config, tensors, _lengthened(_stated_kv_heads(config, n_head[:n_main]), n_layer)),
        head_dim_k=head_dim_k,
        head_dim_v=head_dim_v,
        n_expert=n_expert,
        n_expert_used=_n_expert_used(config, n_expert) if n_expert else 0,
        n_ff_expert=(config.most(*_EXPERT_FF) or config.most("intermediate_size")) if n_expert else 0,
    )


def _lengthened(values: tuple[int, ...], n_layer: int) -> tuple[int, ...]:
    """With the last block's number for the multi-token-prediction blocks after it."""
    return values + values[-1:] * (n_layer - len(values))


def _check_blocks(config: Config, tensors: Sequence[Tensor], n_main: int) -> int:
    """The number of blocks in the files: as the configuration says, and its multi-token-prediction blocks if there."""
    key, _ = config.find(_LAYERS)
    last = max((tensor for tensor in tensors if tensor.layer is not None), key=_layer, default=None)
    if last is None:
        example = tensors[0].name if tensors else "none at all"
        raise config.bad(
            f"no tensor is one of a language model's blocks ({example[:80]!r})",
            "give the directory of a language model in Hugging Face's format",
        )
    n_found = _layer(last) + 1
    if n_found > n_main + config.most(*_NEXTN, high=_MAX_LAYERS):
        raise config.bad(f"the weights go on after block {n_main - 1} ({key}), to {last.name[:120]!r}")
    if n_found < n_main:
        raise config.bad(
            f"the weights end with block {n_found - 1}, {key} is {n_main}",
            "files are missing, or are of another model: download the model again",
        )
    return n_found


def _layer(tensor: Tensor) -> int:
    return -1 if tensor.layer is None else tensor.layer


def _head_dims(config: Config, n_embd: int, n_head: int) -> tuple[int, int]:
    """Of keys and of values. With multi-head latent attention, as the heads compute, not as the cache keeps."""
    usual = n_embd // n_head if n_head else 0
    usual = config.integer("head_dim", "attention_head_dim", "hidden_size_per_head", default=usual) or usual
    if config.get("kv_lora_rank") is None:
        return usual, usual
    nope, rope = config.integer("qk_nope_head_dim", default=0), config.integer("qk_rope_head_dim", default=0)
    config.integer("kv_lora_rank")  # whoever plans the cache will read it
    return nope + rope or usual, config.integer("v_head_dim", default=usual)


def _n_ff(config: Config, n_layer: int) -> tuple[int, ...]:
    return config.per_layer(n_layer, *_FF, default=0)


def _n_expert_used(config: Config, n_expert: int) -> int:
    n_used = config.most(*_EXPERTS_USED)
    if not 0 < n_used <= n_expert:
        key, _ = config.find(_EXPERTS_USED)
        raise config.bad(f"{key} is {n_used or 'missing'}, but there are {n_expert} experts")
    return n_used


def _stated_kv_heads(config: Config, n_head: tuple[int, ...]) -> tuple[int, ...]:
    """By key; as many as heads where no key says otherwise."""
    n_layer = len(n_head)
    blocks = config.get("block_configs")
    if isinstance(blocks, list) and len(blocks) == n_layer:  # DeciLM (Nemotron): each block its own
        return tuple(_block_kv_heads(config, block, heads) for block, heads in zip(blocks, n_head, strict=True))
    if config.get("multi_query") is True and config.get("new_decoder_architecture") is not True:  # Falcon, StarCoder
        return (1,) * n_layer
    if config.find(_KV_HEADS)[1] is None:
        return n_head
    return config.per_layer(n_layer, *_KV_HEADS, default=0, high=_MAX_HEADS)


def _block_kv_heads(config: Config, block: Any, n_head: int) -> int:
    attention = block.get("attention") if isinstance(block, dict) else None
    if not isinstance(attention, dict):
        return 0
    stated, shared = attention.get("num_key_value_heads"), attention.get("n_heads_in_group")
    if stated is not None:
        return config.checked("num_key_value_heads of block_configs", stated, 0, _MAX_HEADS)
    if shared is not None:
        return n_head // config.checked("n_heads_in_group of block_configs", shared, 1, _MAX_HEADS)
    return 0


def _kv_heads(config: Config, tensors: Iterable[Tensor], stated: tuple[int, ...]) -> tuple[int, ...]:
    """`stated`, but 0 for blocks that keep no cache of their own: recurrent, without attention, or sharing one."""
    cached = _cached_by_type(config, len(stated))
    found = _cached_by_name(tensors)
    if found:
        cached = [each and layer in found for layer, each in enumerate(cached)]
    n_shared = config.integer("num_kv_shared_layers", default=0, high=len(stated))  # Gemma 3n and 4
    n_own = len(stated) - n_shared
    return tuple(
        heads if each and layer < n_own else 0 for layer, (heads, each) in enumerate(zip(stated, cached, strict=True))
    )


def _cached_by_type(config: Config, n_layer: int) -> list[bool]:
    """By the list of the blocks' types, if there is one; multi-token-prediction blocks are not in it."""
    _, types = config.find(("layer_types", "layers_block_type"))
    if not isinstance(types, list) or len(types) > n_layer:
        return [True] * n_layer
    return [_has_cache(each) for each in types] + [True] * (n_layer - len(types))


def _has_cache(layer_type: Any) -> bool:
    return not (isinstance(layer_type, str) and any(word in layer_type for word in _WITHOUT_CACHE))


def _cached_by_name(tensors: Iterable[Tensor]) -> set[int]:
    """The blocks in which some module makes keys and is not recurrent. Empty if the names tell nothing."""
    makers: set[tuple[int, str]] = set()
    recurrent: set[tuple[int, str]] = set()
    for tensor in tensors:
        if tensor.layer is None or tensor.kind != "attention":
            continue
        within = place(tensor.name)[1]
        if (module := key_module(within)) is not None:
            makers.add((tensor.layer, module))
        if (module := recurrent_module(within)) is not None:
            recurrent.add((tensor.layer, module))
    return {layer for layer, _ in makers - recurrent}
