"""What vLLM would refuse, some of it after minutes of loading, said before. Pure.

Sources: vLLM 0.32.0 config/model.py, config/vllm.py, platforms/cuda.py, model_executor/layers/linear.py,
model_executor/layers/quantization/ and model_executor/models/registry.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from mgpu.errors import BadModelError, RefusedError, UsageError
from mgpu.model import Model
from mgpu.rig import Gpu, short_name
from mgpu_adapters.vllm.config import derived_max_len, is_latent, number, quant_method, text
from mgpu_adapters.vllm.settings import Settings
from mgpu_adapters.vllm.weights import padded_vocabulary

#: Least compute capability x 10 of each method (`get_min_capability`). Methods not listed are not vLLM's.
_CAPABILITIES: Final = {
    "": 70, "auto_gptq": 60, "gptq": 60, "gptq_marlin": 60, "inc": 60, "auto-round": 60, "compressed-tensors": 70,
    "moe_wna16": 70, "quark": 70, "awq": 75, "auto_awq": 75, "awq_marlin": 75, "fp8": 75, "humming": 75,
    "modelopt_fp4": 75, "online": 75, "torchao": 75, "deepseek_v4_fp8": 75, "experts_int8": 80, "fbgemm_fp8": 80,
    "gpt_oss_mxfp4": 80, "modelopt": 80, "modelopt_mixed": 80, "modelopt_mxfp8": 80, "mxfp4": 80, "mxfp8": 80,
    "fp_quant": 100,
}  # fmt: skip
#: PyTorch's CUDA builds have kernels from here on.
_LEAST_CAPABILITY: Final = 70
_BF16_CAPABILITY: Final = 80

#: Architectures without `SupportsPP`, read from the class hierarchy of 0.32.0.
_NO_PIPELINE: Final = frozenset({
    "AriaForConditionalGeneration", "DeepseekV32ForCausalLM", "DeepseekV41ForCausalLM", "DeepseekV4ForCausalLM",
    "DeepseekV4ForConditionalGeneration", "Dots3NoteForCausalLM", "Gemma3nForCausalLM",
    "Gemma3nForConditionalGeneration", "Glm5NextForCausalLM", "Glm5NextForConditionalGeneration",
    "HYV4ForCausalLM", "HrmTextForCausalLM", "IQuestLoopCoderForCausalLM", "Idefics3ForConditionalGeneration",
    "InklingForCausalLM", "InklingForConditionalGeneration", "KimiK3ForConditionalGeneration",
    "KimiLinearForCausalLM", "Mamba2ForCausalLM", "MiniMaxM3SparseForCausalLM",
    "MiniMaxM3SparseForConditionalGeneration", "PaddleOCRVLForConditionalGeneration", "Phi4MMForCausalLM",
    "Qwen4ExpForCausalLM", "Qwen4ExpForConditionalGeneration", "SmolVLMForConditionalGeneration",
    "WhisperForConditionalGeneration", "Zamba2ForCausalLM",
})  # fmt: skip


def check_model(model: Model) -> None:
    """Raises `BadModelError` for a format or a quantisation that vLLM does not load."""
    if model.format == "gguf":
        raise BadModelError(
            f"{model.path}: vLLM serves no GGUF of itself since 0.24",
            hint="leave --runtime out (llama.cpp serves it), or give the safetensors directory of the model",
        )
    if model.format != "safetensors":
        raise BadModelError(
            f"{model.path}: vLLM has no {model.format.upper()}",
            hint="use ExLlama, or an AWQ, GPTQ or FP8 version of it",
        )
    method = quant_method(model)
    if method in {"bitsandbytes", "gguf"}:
        raise BadModelError(
            f"{model.path}: vLLM left {method} to a plugin in 0.24", hint="use an AWQ, GPTQ or FP8 version of the model"
        )
    if method not in _CAPABILITIES:
        raise BadModelError(
            f"{model.path}: vLLM 0.32 has no quantisation {method!r}",
            hint="use a BF16, FP8, AWQ, GPTQ or compressed-tensors version of the model",
        )


def check_context(model: Model, settings: Settings) -> None:
    """Raises `UsageError` for more context than `config.json` allows."""
    most = derived_max_len(model)
    if settings.max_model_len > most:
        raise UsageError(
            f"vLLM refuses a context of {settings.max_model_len}: the model's own limit is {most}",
            hint=f"use --ctx {most} or less, or --ctx max",
        )


def check_batch(settings: Settings) -> None:
    """Raises `UsageError` where one step could not hold a token for every user (config/scheduler.py)."""
    batch = settings.max_num_batched_tokens
    if batch is not None and batch < settings.max_num_seqs:
        raise UsageError(
            f"--max-num-batched-tokens {batch} is less than the {settings.max_num_seqs} users at the same time",
            hint=f"make it {settings.max_num_seqs} or more, or leave it out",
        )


def has_pipeline(model: Model) -> bool:
    """Whether vLLM can split this architecture by layers."""
    return text(model, "architectures") not in _NO_PIPELINE


def check_pipeline(model: Model, n_stages: int) -> None:
    """Raises `RefusedError` for a split that the architecture has not, or of more stages than layers."""
    if n_stages > 1 and not has_pipeline(model):
        raise RefusedError(
            f"vLLM has no pipeline parallelism for {text(model, 'architectures')}",
            hint="leave --split out, or use a card that holds it whole",
        )
    if n_stages > model.hyper.n_layer:
        raise RefusedError(
            f"{n_stages} stages are more than the model's {model.hyper.n_layer} layers", hint="use fewer GPUs: --gpus"
        )


def check_cards(model: Model, gpus: Sequence[Gpu]) -> None:
    """Raises `RefusedError` for cards without the kernels. vLLM itself looks at the first one only."""
    method = quant_method(model)
    least = max(_CAPABILITIES.get(method, 0), _LEAST_CAPABILITY)
    for gpu in gpus:
        where = f"GPU {gpu.index} ({short_name(gpu.name)})"
        if gpu.vendor not in {"nvidia", "amd"}:
            raise RefusedError(
                f"vLLM drives NVIDIA and AMD cards, and {where} is neither",
                hint="leave --runtime out, or it out of --gpus",
            )
        capability = capability_of(gpu)
        if capability is not None and capability < least:
            what = f"{method} weights" if method and least > _LEAST_CAPABILITY else "vLLM"
            raise RefusedError(
                f"{what} need compute capability {least / 10}, {where} has {capability / 10}",
                hint=f"leave GPU {gpu.index} out with --gpus, or use llama.cpp with a GGUF of the model",
            )
    if len({gpu.vendor for gpu in gpus}) > 1:
        raise RefusedError("vLLM cannot split over cards of different vendors", hint="name those of one with --gpus")


def needs_half(model: Model, gpus: Sequence[Gpu]) -> bool:
    """Whether the model's bfloat16 must be float16 on one of these cards."""
    is_bf16 = text(model, "torch_dtype", "dtype") in {"bfloat16", ""}
    return is_bf16 and any((capability_of(gpu) or _BF16_CAPABILITY) < _BF16_CAPABILITY for gpu in gpus)


def capability_of(gpu: Gpu) -> int | None:
    """`"8.6"` as 86; None where unknown, and for cards that are not NVIDIA's."""
    major, dot, minor = (gpu.compute_capability or "").partition(".")
    known = dot and gpu.vendor == "nvidia" and major.isdecimal() and minor.isdecimal()
    return int(major) * 10 + int(minor) if known else None


def why_not_tensor(model: Model, settings: Settings, gpus: Sequence[Gpu]) -> str | None:
    """The first thing that keeps vLLM from cutting `model` into a rank for each of `gpus`; None: nothing.

    Different memory is none: each card is planned with its own, and rule `mixed-is-pipeline` has its say.
    """
    n, asked = len(gpus), settings.tensor_parallel_size
    if n < 2:
        return f"tensor ranks need two cards, not {n}"
    if asked not in {None, n}:
        return f"--tensor-parallel-size {asked} after `--`, and {n} cards"
    if (settings.pipeline_parallel_size or 1) > 1:
        return f"--pipeline-parallel-size {settings.pipeline_parallel_size} after `--`"
    try:
        check_cards(model, gpus)
    except RefusedError as error:
        return error.message
    kinds = sorted({gpu.compute_capability for gpu in gpus if gpu.compute_capability})
    if len(kinds) > 1:
        return f"vLLM picks one set of kernels for all ranks, and compute capabilities differ ({', '.join(kinds)})"
    return _tensor_flaw(model, n) or None


def check_tensor_parallel(model: Model, tp: int) -> None:
    """Raises `UsageError`, with the numbers that would do, where the model cannot be cut into `tp` ranks."""
    flaw = _tensor_flaw(model, tp)
    if flaw:
        fine = [str(n) for n in range(2, 17) if not _tensor_flaw(model, n)]
        hint = f"this model takes {', '.join(fine)} tensor ranks" if fine else "split by layers: --split pipeline"
        raise UsageError(f"vLLM cannot cut this model into {tp} tensor ranks: {flaw}", hint=hint)


def _tensor_flaw(model: Model, tp: int) -> str:
    """What does not divide, or ""."""
    hyper = model.hyper
    n_head = max(hyper.n_head, default=0)
    if n_head % tp:
        return f"{n_head} attention heads are no multiple of {tp}"
    for kv in sorted({heads for heads in hyper.n_head_kv if heads}):
        if not is_latent(model) and max(kv, tp) % min(kv, tp):
            return f"{kv} key-value heads do not divide among {tp}"
    for width in sorted({*hyper.n_ff, hyper.n_ff_expert} - {0}):
        if width % tp:
            return f"a feed-forward width of {width} is no multiple of {tp}"
    if padded_vocabulary(hyper.n_vocab) % tp:
        return f"a vocabulary of {hyper.n_vocab} (padded: {padded_vocabulary(hyper.n_vocab)}) is no multiple of {tp}"
    return _state_flaw(model, tp) or _group_flaw(model, tp)


def _state_flaw(model: Model, tp: int) -> str:
    """Recurrent layers are cut by heads (layers/mamba/mamba_utils.py, mamba_mixer2.py)."""
    for key in ("linear_num_key_heads", "linear_num_value_heads", "mamba_num_heads", "mamba_n_heads"):
        heads = number(model, key) or 0
        if heads % tp:
            return f"{heads} heads of its recurrent layers are no multiple of {tp}"
    groups = number(model, "n_groups", "mamba_n_groups") or 1
    if number(model, "mamba_num_heads", "mamba_n_heads") and groups > 1 and groups % tp:
        return f"{groups} groups of its recurrent layers are no multiple of {tp}"
    return ""


def _group_flaw(model: Model, tp: int) -> str:
    """Quantisation groups may not be cut (distributed/utils.py), nor FP8 blocks (quantization/utils/fp8_utils.py)."""
    hyper = model.hyper
    blocks = model.metadata.get("quantization_config.weight_block_size")
    group = number(
        model, "quantization_config.group_size", "quantization_config.config_groups.group_0.weights.group_size"
    )
    size = int(max(blocks)) if isinstance(blocks, tuple) and blocks else group or 0
    if size <= 0:
        return ""
    widths = {*hyper.n_ff, hyper.n_ff_expert, max(hyper.n_head, default=0) * hyper.head_dim_v}
    for width in sorted(widths - {0}):
        if width % size == 0 and width // tp % size:
            return f"a width of {width} would be cut into {width // tp}, no whole number of groups of {size}"
    return ""
