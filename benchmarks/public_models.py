"""The models of the public rows, from real headers where the repository has them, else from published shapes.

`model_named("Llama-3-8B", "F16")`: only shapes, types and sizes count; no weight is read or written.
"""

from __future__ import annotations

import functools
import math
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from msgspec import Struct
from msgspec.structs import replace

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from gguf_writer import TensorSpec, Value, write_gguf
from headers import content
from mgpu.inspect.gguf import TYPES, parse_header
from mgpu.inspect.gguf_model import build_model
from mgpu.model import Model, ModelFile, Tensor

#: Models whose header is in tests/data, by the name the rows use. The same layers and widths; Llama 3.1 and 3.3 differ
#: from Llama 3 in their training alone, and so do the fine-tuned ones.
HEADERS = {
    "Llama-3-8B": "Llama-3.1-8B-Instruct-Q4_K_M",
    "Llama-3-70B": "Llama-3.3-70B-Instruct-Q4_K_M",
    "Llama-3.2-3B": "Llama-3.2-3B-Instruct-F16",
    "Phi-3.5-mini": "Phi-3.5-mini-instruct-Q4_K_M",
    "Qwen2.5-7B": "Qwen2.5-7B-Instruct-Q4_K_M",
    "Qwen2.5-32B": "Qwen2.5-32B-Instruct-Q4_K_M",
    "Qwen3-8B": "Qwen3-8B-Q4_K_M",
    "Qwen3-32B": "Qwen3-32B-Q6_K",
    "Qwen3-30B-A3B": "Qwen3-30B-A3B-Q4_K_M",
    "Mistral-7B": "Mistral-7B-Instruct-v0.3-Q5_K_M",
    "Mistral-Small-24B": "Mistral-Small-24B-Instruct-2501-IQ4_XS",
    "DeepSeek-V2-Lite": "DeepSeek-V2-Lite-Chat-Q4_K_M",
    "OLMo-2-13B": "OLMo-2-1124-13B-Instruct-Q5_K_M",
    "gemma-2-9b": "gemma-2-9b-it-Q6_K",
    "gemma-2-27b": "gemma-2-27b-it-Q4_K_M",
    "gemma-3-4b": "gemma-3-4b-it-Q4_K_M",
    "gemma-3-27b": "gemma-3-27b-it-Q4_K_M",
    "gemma-3n-E4B": "gemma-3n-E4B-it-Q8_0",
    "gpt-oss-20b": "gpt-oss-20b-MXFP4",
    "granite-3-8b": "granite-3.3-8b-instruct-Q4_K_M",
    "Qwen3-Next-80B-A3B": "Qwen3-Next-80B-A3B-Instruct-Q4_K_M",
    "Mixtral-8x7B": "Mixtral-8x7B-Instruct-v0.1-Q4_K_M",
}


class Dense(Struct, frozen=True, kw_only=True):
    """The shape of a llama-like model, by the names of its config.json."""

    arch: str = "llama"
    layers: int
    width: int
    ff: int
    heads: int
    kv_heads: int
    vocab: int
    head_dim: int = 128
    tied: bool = False
    gated: bool = True
    ctx: int = 131072


#: Published shapes (each model's config.json) of models without a header here.
SHAPES = {
    "LLaMA-1-7B": Dense(layers=32, width=4096, ff=11008, heads=32, kv_heads=32, vocab=32000),
    "LLaMA-1-13B": Dense(layers=40, width=5120, ff=13824, heads=40, kv_heads=40, vocab=32000),
    "LLaMA-1-30B": Dense(layers=60, width=6656, ff=17920, heads=52, kv_heads=52, vocab=32000),
    "LLaMA-1-65B": Dense(layers=80, width=8192, ff=22016, heads=64, kv_heads=64, vocab=32000),
    "Llama-2-7B": Dense(layers=32, width=4096, ff=11008, heads=32, kv_heads=32, vocab=32000),
    "Llama-2-13B": Dense(layers=40, width=5120, ff=13824, heads=40, kv_heads=40, vocab=32000),
    "Llama-2-70B": Dense(layers=80, width=8192, ff=28672, heads=64, kv_heads=8, vocab=32000),
    "Llama-3.2-1B": Dense(layers=16, width=2048, ff=8192, heads=32, kv_heads=8, vocab=128256, head_dim=64, tied=True),
    "Qwen2.5-3B": Dense(arch="qwen2", layers=36, width=2048, ff=11008, heads=16, kv_heads=2, vocab=151936, tied=True),
    "Qwen2.5-14B": Dense(arch="qwen2", layers=48, width=5120, ff=13824, heads=40, kv_heads=8, vocab=152064),
    "Qwen3-1.7B": Dense(arch="qwen3", layers=28, width=2048, ff=6144, heads=16, kv_heads=8, vocab=151936, tied=True),
    "Qwen3-4B": Dense(arch="qwen3", layers=36, width=2560, ff=9728, heads=32, kv_heads=8, vocab=151936, tied=True),
    "Qwen3-14B": Dense(arch="qwen3", layers=40, width=5120, ff=17408, heads=40, kv_heads=8, vocab=151936),
    "phi-4": Dense(arch="phi3", layers=40, width=5120, ff=17920, heads=40, kv_heads=10, vocab=100352),
    "Yi-1.5-9B": Dense(layers=48, width=4096, ff=11008, heads=32, kv_heads=4, vocab=64000),
    "Mistral-Nemo-12B": Dense(layers=40, width=5120, ff=14336, heads=32, kv_heads=8, vocab=131072),
    "Codestral-22B": Dense(layers=56, width=6144, ff=16384, heads=48, kv_heads=8, vocab=32768),
    "SmolLM2-1.7B": Dense(layers=24, width=2048, ff=8192, heads=32, kv_heads=32, vocab=49152, head_dim=64, tied=True),
    "Yi-1.5-34B": Dense(layers=60, width=7168, ff=20480, heads=56, kv_heads=8, vocab=64000),
    "gemma-3-12b": Dense(
        arch="gemma3", layers=48, width=3840, ff=15360, heads=16, kv_heads=8, vocab=262208, head_dim=256, tied=True
    ),
}


class DeltaNet(Struct, frozen=True, kw_only=True):
    """The shape of a Qwen3.5 model: three of four layers are gated delta nets."""

    layers: int
    width: int
    ff: int
    heads: int
    kv_heads: int
    value_heads: int
    key_heads: int = 16
    vocab: int = 248320
    tied: bool = False
    experts: int = 0
    used: int = 0
    ff_expert: int = 0


DELTA_NETS = {
    "Qwen3.5-4B": DeltaNet(layers=32, width=2560, ff=9216, heads=16, kv_heads=4, value_heads=32, tied=True),
    "Qwen3.5-9B": DeltaNet(layers=32, width=4096, ff=12288, heads=16, kv_heads=4, value_heads=32),
    "Qwen3.5-27B": DeltaNet(layers=64, width=5120, ff=17408, heads=24, kv_heads=4, value_heads=48),
    "Qwen3.5-35B-A3B": DeltaNet(
        layers=40, width=2048, ff=512, heads=16, kv_heads=2, value_heads=32, experts=256, used=8, ff_expert=512
    ),
}

#: Releases of one shape.
SAME = {
    "Qwen3.6-27B": "Qwen3.5-27B",
    "Qwen3.8-27B": "Qwen3.5-27B",
    "Qwen3.6-35B-A3B": "Qwen3.5-35B-A3B",
    "DeepSeek-R1-Distill-Qwen-14B": "Qwen2.5-14B",
    "Llama-3.1-70B": "Llama-3-70B",
}


@functools.cache
def model_named(name: str, quant: str) -> Model:
    """The model of a row, every matrix in the types that llama-quantize would choose for `quant`."""
    name = SAME.get(name, name)
    if name in HEADERS:
        model = _parse(content(HEADERS[name]))
    elif name in SHAPES:
        model = _parse(write_gguf(*_dense(SHAPES[name]), data=False))
    elif name in DELTA_NETS:
        model = _parse(write_gguf(*_delta_net(DELTA_NETS[name]), data=False))
    elif name == "gpt-oss-120b":
        model = _more_experts(_parse(content(HEADERS["gpt-oss-20b"])), layers=36, experts=128)
    else:
        raise SystemExit(f"no shape of {name!r}")
    if model.architecture == "gpt-oss" or HEADERS.get(name, "").endswith(quant):
        return model
    return retyped(model, quant)


#: Elements in a block of a type, and its bytes.
BLOCKS = {name: (block, size) for name, block, size in TYPES.values()}

#: What a quantisation is mostly made of, where its name says so in another way.
MOSTLY = {"UD-Q4_K_XL": "Q4_K_M", "UD-Q5_K_XL": "Q5_K_M", "UD-Q6_K_XL": "Q6_K", "Q4_K_S": "Q4_K", "Q5_K_S": "Q5_K"}


def retyped(model: Model, quant: str) -> Model:
    """`model` with its matrices in other types (llama.cpp src/llama-quant.cpp: `Q4_K_M`, and types used throughout)."""
    choose = _mixture(model, quant)
    tensors = tuple(_retype(tensor, choose(tensor)) for tensor in model.tensors)
    return replace(model, tensors=tensors, quantization=quant)


def _mixture(model: Model, quant: str) -> Callable[[Tensor], str]:
    quant = MOSTLY.get(quant, quant)
    if quant.removesuffix("_M") not in BLOCKS:
        raise SystemExit(f"no quantisation {quant!r}")
    if not quant.endswith("_M"):
        return lambda tensor: "Q6_K" if tensor.kind == "output" and quant in {"Q4_0", "Q4_1"} else quant
    low, high = quant.removesuffix("_M"), "Q6_K"
    n = model.hyper.n_layer
    tied = not any(tensor.name == "output.weight" for tensor in model.tensors)

    def better(tensor: Tensor) -> bool:
        il = tensor.layer or 0
        return il < n // 8 or il >= 7 * n // 8 or (il - n // 8) % 3 == 2

    def choose(tensor: Tensor) -> str:
        if tensor.kind == "output" or (tied and tensor.kind == "token_embedding"):
            return high
        wide = any(part in tensor.name for part in ("attn_v.", "ffn_down", "attn_qkv."))
        return high if wide and better(tensor) else low

    return choose


def _retype(tensor: Tensor, name: str) -> Tensor:
    if len(tensor.shape) < 2 or tensor.type == "F32" or "conv1d" in tensor.name:
        return tensor
    block, size = BLOCKS[name]
    if tensor.shape[0] % block:
        name, block, size = "Q5_0", 32, 22
    return replace(tensor, type=name, n_bytes=math.prod(tensor.shape) // block * size)


def _parse(header: bytes) -> Model:
    parsed = parse_header(header, n_bytes_total=1 << 50, origin="benchmark")
    return build_model([parsed], (ModelFile(path="/public.gguf", n_bytes=1 << 50),))


def _more_experts(model: Model, *, layers: int, experts: int) -> Model:
    """gpt-oss-120b is gpt-oss-20b with more layers, and more experts in each."""
    scale = experts // model.hyper.n_expert
    tensors: list[Tensor] = [tensor for tensor in model.tensors if tensor.layer is None]
    first = [tensor for tensor in model.tensors if tensor.layer in (0, 1)]
    for il in range(0, layers, 2):
        tensors += [_renumbered(tensor, il, scale) for tensor in first]
    hyper = replace(
        model.hyper, n_layer=layers, n_expert=experts,
        n_ff=model.hyper.n_ff[:1] * layers, n_head=model.hyper.n_head[:1] * layers,
        n_head_kv=model.hyper.n_head_kv[:1] * layers,
    )  # fmt: skip
    return replace(model, hyper=hyper, tensors=tuple(tensors), parameters=116_830_000_000)


def _renumbered(tensor: Tensor, first: int, scale: int) -> Tensor:
    il = first + (tensor.layer or 0)
    name = tensor.name.replace(f"blk.{tensor.layer}.", f"blk.{il}.")
    many = scale if tensor.kind in ("expert", "router") else 1
    shape = (*tensor.shape[:-1], tensor.shape[-1] * many) if tensor.shape else tensor.shape
    return replace(tensor, name=name, layer=il, n_bytes=tensor.n_bytes * many, shape=shape)


def _dense(shape: Dense) -> tuple[dict[str, Value], list[TensorSpec]]:
    arch = shape.arch
    metadata: dict[str, Value] = {
        "general.architecture": arch, "general.name": "public", "general.file_type": 1,
        f"{arch}.context_length": shape.ctx, f"{arch}.embedding_length": shape.width,
        f"{arch}.block_count": shape.layers, f"{arch}.feed_forward_length": shape.ff,
        f"{arch}.attention.head_count": shape.heads, f"{arch}.attention.head_count_kv": shape.kv_heads,
        f"{arch}.attention.key_length": shape.head_dim, f"{arch}.attention.value_length": shape.head_dim,
        f"{arch}.attention.layer_norm_rms_epsilon": 1e-5, f"{arch}.vocab_size": shape.vocab,
        f"{arch}.rope.dimension_count": shape.head_dim,
        "tokenizer.ggml.model": "no_vocab",
    }  # fmt: skip
    if arch == "gemma3":
        metadata[f"{arch}.attention.sliding_window"] = 1024
    return metadata, list(_dense_tensors(shape))


def _dense_tensors(shape: Dense) -> Iterator[TensorSpec]:
    width, q, kv = shape.width, shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    yield TensorSpec("token_embd.weight", (width, shape.vocab), "F16")
    blocks = {
        "attn_norm": (width,), "attn_q": (width, q), "attn_k": (width, kv), "attn_v": (width, kv),
        "attn_output": (q, width), "ffn_norm": (width,), "ffn_gate": (width, shape.ff), "ffn_up": (width, shape.ff),
        "ffn_down": (shape.ff, width),
    }  # fmt: skip
    for il in range(shape.layers):
        yield from _block(il, blocks)
    yield TensorSpec("output_norm.weight", (width,), "F32")
    if not shape.tied:
        yield TensorSpec("output.weight", (width, shape.vocab), "F16")


def _block(il: int, shapes: dict[str, tuple[int, ...]]) -> Iterator[TensorSpec]:
    for name, dims in shapes.items():
        full = f"blk.{il}.{name}" if "." in name or name == "ssm_a" else f"blk.{il}.{name}.weight"
        yield TensorSpec(full, dims, "F16" if len(dims) > 1 and "conv1d" not in name else "F32")


def _delta_net(shape: DeltaNet) -> tuple[dict[str, Value], list[TensorSpec]]:
    arch = "qwen35moe" if shape.experts else "qwen35"
    inner = shape.value_heads * 128
    metadata: dict[str, Value] = {
        "general.architecture": arch, "general.name": "public", "general.file_type": 1,
        f"{arch}.context_length": 262144, f"{arch}.embedding_length": shape.width,
        f"{arch}.block_count": shape.layers, f"{arch}.feed_forward_length": shape.ff,
        f"{arch}.attention.head_count": shape.heads, f"{arch}.attention.head_count_kv": shape.kv_heads,
        f"{arch}.attention.key_length": 256, f"{arch}.attention.value_length": 256,
        f"{arch}.attention.layer_norm_rms_epsilon": 1e-6, f"{arch}.vocab_size": shape.vocab,
        f"{arch}.rope.dimension_count": 64, f"{arch}.rope.dimension_sections": [11, 11, 10, 0],
        f"{arch}.ssm.conv_kernel": 4, f"{arch}.ssm.inner_size": inner, f"{arch}.ssm.state_size": 128,
        f"{arch}.ssm.time_step_rank": shape.value_heads, f"{arch}.ssm.group_count": shape.key_heads,
        f"{arch}.full_attention_interval": 4, "tokenizer.ggml.model": "no_vocab",
    }  # fmt: skip
    if shape.experts:
        metadata |= {
            f"{arch}.expert_count": shape.experts, f"{arch}.expert_used_count": shape.used,
            f"{arch}.expert_feed_forward_length": shape.ff_expert,
            f"{arch}.expert_shared_feed_forward_length": shape.ff_expert,
        }  # fmt: skip
    return metadata, list(_delta_net_tensors(shape))


def _delta_net_tensors(shape: DeltaNet) -> Iterator[TensorSpec]:
    width, inner = shape.width, shape.value_heads * 128
    conv = inner + 2 * 128 * shape.key_heads
    recurrent: dict[str, tuple[int, ...]] = {
        "attn_norm": (width,), "attn_qkv": (width, conv), "attn_gate": (width, inner), "ssm_conv1d": (4, conv),
        "ssm_dt.bias": (shape.value_heads,), "ssm_a": (shape.value_heads,), "ssm_beta": (width, shape.value_heads),
        "ssm_alpha": (width, shape.value_heads), "ssm_norm": (128,), "ssm_out": (inner, width),
        "post_attention_norm": (width,),
    }  # fmt: skip
    q, kv = shape.heads * 256, shape.kv_heads * 256
    attention: dict[str, tuple[int, ...]] = {
        "attn_norm": (width,), "attn_q": (width, 2 * q), "attn_k": (width, kv), "attn_v": (width, kv),
        "attn_output": (q, width), "attn_q_norm": (256,), "attn_k_norm": (256,), "post_attention_norm": (width,),
    }  # fmt: skip
    yield TensorSpec("token_embd.weight", (width, shape.vocab), "F16")
    for il in range(shape.layers):
        yield from _block(il, (attention if il % 4 == 3 else recurrent) | _feed_forward(shape))
    yield TensorSpec("output_norm.weight", (width,), "F32")
    if not shape.tied:
        yield TensorSpec("output.weight", (width, shape.vocab), "F16")


def _feed_forward(shape: DeltaNet) -> dict[str, tuple[int, ...]]:
    width, ff, many = shape.width, shape.ff_expert, shape.experts
    if not many:
        return {"ffn_gate": (width, shape.ff), "ffn_up": (width, shape.ff), "ffn_down": (shape.ff, width)}
    return {
        "ffn_gate_inp": (width, many), "ffn_gate_exps": (width, ff, many), "ffn_up_exps": (width, ff, many),
        "ffn_down_exps": (ff, width, many), "ffn_gate_inp_shexp": (width,), "ffn_gate_shexp": (width, ff),
        "ffn_up_shexp": (width, ff), "ffn_down_shexp": (ff, width),
    }  # fmt: skip
