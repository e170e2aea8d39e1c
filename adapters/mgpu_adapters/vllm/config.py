"""What `config.json` says that vLLM's memory and its refusals depend on, read from a model's metadata."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from mgpu.model import Model

#: RoPE types whose factor `max_position_embeddings` already contains (vLLM 0.32.0 config/model.py,
#: `_get_and_verify_max_len`).
_SCALED_ALREADY: Final = frozenset(
    {"su", "longrope", "llama3", "yarn", "deepseek_yarn", "deepseek_llama_scaling", "default", "mrope", "proportional"}
)

#: Every how many layers one attends to everything, where the file gives a window but no pattern: transformers'
#: defaults by model type.
_PATTERNS: Final = {
    "gemma2": 2,
    "gemma3": 6,
    "gemma3_text": 6,
    "cohere2": 4,
    "gpt_oss": 2,
    "olmo3": 4,
    "exaone4": 4,
}
#: Model types in which every layer has the window.
_ALL_WINDOWED: Final = frozenset({"mistral", "mixtral", "phi3", "starcoder2"})


def number(model: Model, *keys: str) -> int | None:
    """The first of `keys` that is a whole number in the metadata."""
    for key in keys:
        value = model.metadata.get(key)
        if isinstance(value, int) and not isinstance(value, bool):
            return value
    return None


def text(model: Model, *keys: str) -> str:
    """The first of `keys` that is a string; "" if none is."""
    return next((value for key in keys if isinstance(value := model.metadata.get(key), str)), "")


def n_main_layers(model: Model) -> int:
    """`num_hidden_layers`: multi-token-prediction blocks are not loaded unless asked for."""
    return model.hyper.n_layer - model.hyper.n_layer_nextn


def derived_max_len(model: Model) -> int:
    """The longest context vLLM takes without being forced: `max_position_embeddings`, times a linear RoPE factor."""
    length = model.hyper.n_ctx_train
    if model.architecture.startswith("gemma3"):
        return length
    for prefix in ("rope_scaling.", "rope_parameters."):
        kind = text(model, prefix + "rope_type", prefix + "type")
        factor = model.metadata.get(prefix + "factor")
        if kind and kind not in _SCALED_ALREADY and isinstance(factor, int | float):
            return int(length * factor)
    return length


def is_latent(model: Model) -> bool:
    """Multi-head latent attention: one compressed vector per token and layer, the same on every rank."""
    return number(model, "kv_lora_rank") is not None


def windowed_layers(model: Model) -> tuple[int, frozenset[int]]:
    """The sliding window (0: none) and the layers that have it.

    A window of unknown pattern counts as full attention: more memory than vLLM takes, never less.
    """
    window = number(model, "sliding_window") or 0
    layers = range(n_main_layers(model))
    if not window or model.metadata.get("use_sliding_window") is False:
        return 0, frozenset()
    if model.metadata.get("use_sliding_window") is True:  # Qwen2: the first `max_window_layers` attend to everything
        return window, frozenset(layers[number(model, "max_window_layers") or 0 :])
    pattern = number(model, "sliding_window_pattern", "_sliding_window_pattern", "global_attn_every_n_layers")
    pattern = pattern or _PATTERNS.get(model.architecture)
    if pattern:
        return window, frozenset(_but_every(pattern, layers))
    return (window, frozenset(layers)) if model.architecture in _ALL_WINDOWED else (0, frozenset())


def _but_every(pattern: int, layers: Iterable[int]) -> Iterable[int]:
    return (layer for layer in layers if (layer + 1) % pattern)


def recurrent_state_bytes(model: Model, tp: int = 1) -> int:
    """State of one recurrent layer for one sequence on one rank; 0 where the file does not say how large it is.

    vLLM 0.32.0 model_executor/layers/mamba/mamba_utils.py: a gated delta net's (Qwen3-Next, Qwen3.5), or Mamba 2's.
    """
    v_heads = number(model, "linear_num_value_heads")
    if v_heads:
        k_dim, v_dim = number(model, "linear_key_head_dim") or 0, number(model, "linear_value_head_dim") or 0
        conv = 2 * (number(model, "linear_num_key_heads") or 0) * k_dim + v_heads * v_dim
        taps = (number(model, "linear_conv_kernel_dim") or 4) - 1
        return (conv * taps * 2 + v_heads * v_dim * k_dim * _state_element(model)) // tp
    heads = number(model, "mamba_num_heads", "mamba_n_heads")
    if heads:
        head_dim = number(model, "mamba_head_dim", "mamba_d_head") or 0
        state = number(model, "ssm_state_size", "mamba_d_state") or 0
        groups = number(model, "n_groups", "mamba_n_groups") or 1
        taps = (number(model, "conv_kernel", "mamba_d_conv") or 4) - 1
        conv = heads * head_dim + 2 * groups * state
        return (conv * taps * 2 + heads * head_dim * state * _state_element(model)) // tp
    return 0


def _state_element(model: Model) -> int:
    """Bytes; float32 unless the file says otherwise, which is the larger."""
    return 2 if text(model, "mamba_ssm_dtype") in {"bfloat16", "float16"} else 4


def quant_method(model: Model) -> str:
    """`"awq"`, `"fp8"`, …: what `quantization_config` names; "" for plain weights."""
    return text(model, "quantization_config.quant_method").lower()


def layers_without_description(model: Model) -> int:
    """Layers without an attention cache whose state the file does not describe; those that share a cache aside."""
    shared = number(model, "num_kv_shared_layers") or 0
    if recurrent_state_bytes(model) or not any(tensor.name.endswith(("A_log", "dt_bias")) for tensor in model.tensors):
        return 0
    missing = sum(not heads for heads in model.hyper.n_head_kv[: n_main_layers(model)])
    return max(missing - shared, 0)
