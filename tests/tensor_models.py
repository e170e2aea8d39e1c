"""Small models of made-up sizes for tensor mode: heads that divide and heads that do not, experts, windows, biases."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Final, NamedTuple

from gguf_writer import TensorSpec, Typed, Value, pad, write_gguf
from mgpu.inspect.gguf import parse_header
from mgpu.inspect.gguf_model import build_model
from mgpu.model import Model, ModelFile

N_VOCAB: Final = 1000


class Sizes(NamedTuple):
    """What a small model is made of. Without `n_expert` its feed-forward blocks are dense, `n_ff` wide."""

    architecture: str
    n_layer: int
    n_embd: int
    n_ff: int
    n_head: int
    n_head_kv: int
    head_dim: int
    type: str = "Q8_0"
    n_expert: int = 0
    n_ff_shared: int = 0
    window: int = 0
    tied: bool = False
    bias: bool = False
    norm: bool = False
    fused: bool = False


MODELS: Final[Mapping[str, Sizes]] = {
    "llama": Sizes("llama", 5, 512, 1408, 8, 4, 64),
    "llama_f16": Sizes("llama", 4, 512, 1400, 8, 4, 64, "F16"),
    "llama_q4k": Sizes("llama", 7, 2048, 5632, 16, 4, 128, "Q4_K"),
    "llama_kv3": Sizes("llama", 6, 768, 2048, 12, 3, 64),
    "llama_tied": Sizes("llama", 3, 512, 1408, 8, 2, 64, tied=True),
    "llama_d80": Sizes("llama", 4, 640, 1728, 8, 8, 80, "Q4_0"),
    "llama_mqa": Sizes("llama", 5, 512, 1408, 8, 1, 64),
    "qwen2_bias": Sizes("qwen2", 6, 896, 4864, 14, 2, 64, bias=True),
    "qwen3": Sizes("qwen3", 5, 512, 1536, 8, 4, 128, norm=True),
    "qwen3_mqa": Sizes("qwen3", 3, 512, 1536, 8, 1, 128, norm=True),
    "phi3_fused": Sizes("phi3", 4, 768, 2048, 12, 12, 64, "Q4_0", fused=True),
    "qwen3moe": Sizes("qwen3moe", 4, 512, 384, 8, 4, 128, n_expert=8, norm=True),
    "qwen2moe_shared": Sizes("qwen2moe", 4, 512, 352, 8, 8, 64, n_expert=8, n_ff_shared=1408, bias=True),
    "mixtral": Sizes("llama", 4, 512, 1792, 8, 4, 64, n_expert=8),
    "gemma3": Sizes("gemma3", 8, 640, 2048, 4, 2, 256, window=512, tied=True, norm=True),
}  # fmt: skip


def tensors(sizes: Sizes) -> list[TensorSpec]:
    """All of a model's tensors, in llama.cpp's usual order."""
    ends = [TensorSpec("output_norm.weight", (sizes.n_embd,))]
    if not sizes.tied:
        ends.append(TensorSpec("output.weight", (sizes.n_embd, N_VOCAB), sizes.type))
    blocks = [TensorSpec(f"blk.{il}.{each.name!s}", *each[1:]) for il in range(sizes.n_layer) for each in _block(sizes)]
    return [TensorSpec("token_embd.weight", (sizes.n_embd, N_VOCAB), sizes.type), *blocks, *ends]


def _block(sizes: Sizes) -> Iterator[TensorSpec]:
    n_embd, type_ = sizes.n_embd, sizes.type
    q, kv = sizes.n_head * sizes.head_dim, sizes.n_head_kv * sizes.head_dim
    rows = {"attn_qkv": q + 2 * kv} if sizes.fused else {"attn_q": q, "attn_k": kv, "attn_v": kv}
    yield TensorSpec("attn_norm.weight", (n_embd,))
    for name, n in rows.items():
        yield TensorSpec(f"{name}.weight", (n_embd, n), type_)
        if sizes.bias:
            yield TensorSpec(f"{name}.bias", (n,))
    yield TensorSpec("attn_output.weight", (q, n_embd), type_)
    norms = ["attn_q_norm", "attn_k_norm"] if sizes.norm else []
    for name in norms:
        yield TensorSpec(f"{name}.weight", (sizes.head_dim,))
    if sizes.window:
        yield TensorSpec("post_attention_norm.weight", (n_embd,))
        yield TensorSpec("post_ffw_norm.weight", (n_embd,))
    yield TensorSpec("ffn_norm.weight", (n_embd,))
    yield from _experts(sizes) if sizes.n_expert else _dense(sizes)


def _dense(sizes: Sizes) -> Iterator[TensorSpec]:
    if not sizes.fused:
        yield TensorSpec("ffn_gate.weight", (sizes.n_embd, sizes.n_ff), sizes.type)
    yield TensorSpec("ffn_up.weight", (sizes.n_embd, sizes.n_ff * (2 if sizes.fused else 1)), sizes.type)
    yield TensorSpec("ffn_down.weight", (sizes.n_ff, sizes.n_embd), sizes.type)


def _experts(sizes: Sizes) -> Iterator[TensorSpec]:
    n_embd, n_ff, n, type_ = sizes.n_embd, sizes.n_ff, sizes.n_expert, sizes.type
    yield TensorSpec("ffn_gate_inp.weight", (n_embd, n))
    yield TensorSpec("ffn_gate_exps.weight", (n_embd, n_ff, n), type_)
    yield TensorSpec("ffn_up_exps.weight", (n_embd, n_ff, n), type_)
    yield TensorSpec("ffn_down_exps.weight", (n_ff, n_embd, n), type_)
    if sizes.n_ff_shared:
        yield TensorSpec("ffn_gate_inp_shexp.weight", (n_embd,))
        yield TensorSpec("ffn_gate_shexp.weight", (n_embd, sizes.n_ff_shared), type_)
        yield TensorSpec("ffn_up_shexp.weight", (n_embd, sizes.n_ff_shared), type_)
        yield TensorSpec("ffn_down_shexp.weight", (sizes.n_ff_shared, n_embd), type_)


def metadata(sizes: Sizes, *, words: bool = False) -> dict[str, Value]:
    """The keys llama.cpp asks for; with `words`, a vocabulary, so that the model can be asked something."""
    keys: dict[str, Value] = {
        "context_length": 32768,
        "embedding_length": sizes.n_embd,
        "block_count": sizes.n_layer,
        "feed_forward_length": sizes.n_ff,
        "attention.head_count": sizes.n_head,
        "attention.head_count_kv": sizes.n_head_kv,
        "attention.layer_norm_rms_epsilon": 1e-5,
        "attention.key_length": sizes.head_dim,
        "attention.value_length": sizes.head_dim,
        "rope.dimension_count": sizes.head_dim,
    }
    if sizes.n_expert:
        keys |= {"expert_count": sizes.n_expert, "expert_used_count": 2, "expert_feed_forward_length": sizes.n_ff}
    if sizes.n_ff_shared:
        keys["expert_shared_feed_forward_length"] = sizes.n_ff_shared
    if sizes.window:
        keys["attention.sliding_window"] = sizes.window
    if not words:
        keys["vocab_size"] = N_VOCAB
    named: dict[str, Value] = {"general.architecture": sizes.architecture, "general.name": sizes.architecture}
    return named | {f"{sizes.architecture}.{key}": value for key, value in keys.items()} | _tokenizer(words=words)


def _tokenizer(*, words: bool) -> dict[str, Value]:
    if not words:
        return {"tokenizer.ggml.model": "no_vocab"}
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]  # GPT-2 writes other bytes as later letters
    letters = [chr(byte) for byte in plain] + [chr(0x100 + i) for i in range(256 - len(plain))]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": [*letters, *(f"t{i}" for i in range(N_VOCAB - 256))],
        "tokenizer.ggml.token_type": Typed(5, [1] * N_VOCAB),
        "tokenizer.ggml.merges": ["t 0"],
        "tokenizer.ggml.eos_token_id": N_VOCAB - 1,
    }


@functools.cache
def model_named(name: str) -> Model:
    """One of `MODELS`, as mgpu reads its header."""
    return model_of(MODELS[name])


def model_of(
    sizes: Sizes, change: Callable[[TensorSpec], TensorSpec | None] = lambda each: each, **keys: Value
) -> Model:
    """A model of these sizes; `change` may replace or drop a tensor, `keys` set the architecture's keys."""
    specs = [kept for each in tensors(sizes) if (kept := change(each)) is not None]
    named = metadata(sizes) | {f"{sizes.architecture}.{key.replace('__', '.')}": value for key, value in keys.items()}
    header = write_gguf(named, specs, data=False)
    n_bytes = len(header) + sum(pad(each.n_bytes) for each in specs)
    parsed = parse_header(header, n_bytes_total=n_bytes, origin=sizes.architecture)
    return build_model([parsed], (ModelFile(path="/models/m.gguf", n_bytes=n_bytes),))


def write_model(name: str, path: Path) -> Path:
    """One of `MODELS` with a vocabulary, as a file with weights of zeros."""
    sizes = MODELS[name]
    path.write_bytes(write_gguf(metadata(sizes, words=True), tensors(sizes)))
    return path
