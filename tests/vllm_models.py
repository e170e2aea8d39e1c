"""For tests of the vLLM adapter: models of real dimensions, made by hand, and jobs for them."""

from __future__ import annotations

from typing import Any

from mgpu.model import Hyperparameters, Model, Tensor, TensorClass
from mgpu.request import Request
from mgpu_adapters.vllm.adapter import Vllm
from mgpu_adapters.vllm.job import VllmJob

_PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
_NORMS = ("input_layernorm", "post_attention_layernorm")


def tensor(name: str, shape: tuple[int, ...], kind: TensorClass, layer: int | None = None, bits: int = 16) -> Tensor:
    size = 1
    for side in shape:
        size *= side
    return Tensor(name=name, shape=shape, type="BF16", n_bytes=size * bits // 8, layer=layer, kind=kind)


def dense(
    *,
    layers: int = 32,
    n_embd: int = 4096,
    n_ff: int = 14336,
    heads: int = 32,
    kv_heads: int | tuple[int, ...] = 8,
    head_dim: int = 128,
    n_vocab: int = 128256,
    context: int = 131072,
    tied: bool = False,
    architecture: str = "llama",
    metadata: dict[str, Any] | None = None,
) -> Model:
    """A Llama-like model in BF16; without arguments, Llama 3.1 8B."""
    per_layer = kv_heads if isinstance(kv_heads, tuple) else (kv_heads,) * layers
    tensors = [tensor("model.embed_tokens.weight", (n_vocab, n_embd), "token_embedding")]
    for layer, kv in enumerate(per_layer):
        block = f"model.layers.{layer}."
        rows = {"q_proj": heads, "k_proj": kv, "v_proj": kv}
        for name, n in rows.items():
            tensors.append(tensor(f"{block}self_attn.{name}.weight", (n * head_dim, n_embd), "attention", layer))
        tensors.append(tensor(f"{block}self_attn.o_proj.weight", (n_embd, heads * head_dim), "attention", layer))
        tensors += [tensor(f"{block}mlp.{name}.weight", (n_ff, n_embd), "ffn", layer) for name in _PROJECTIONS]
        tensors += [tensor(f"{block}{name}.weight", (n_embd,), "attention", layer) for name in _NORMS]
    tensors.append(tensor("model.norm.weight", (n_embd,), "output"))
    if not tied:
        tensors.append(tensor("lm_head.weight", (n_vocab, n_embd), "output"))
    return Model(
        path="/models/m",
        files=(),
        format="safetensors",
        architecture=architecture,
        name="m",
        quantization="BF16",
        parameters=sum(each.n_bytes for each in tensors) // 2,
        hyper=Hyperparameters(
            n_layer=layers,
            n_ctx_train=context,
            n_embd=n_embd,
            n_vocab=n_vocab,
            n_ff=(n_ff,) * layers,
            n_head=(heads,) * layers,
            n_head_kv=per_layer,
            head_dim_k=head_dim,
            head_dim_v=head_dim,
        ),
        tensors=tuple(tensors),
        metadata={"torch_dtype": "bfloat16", "architectures": "LlamaForCausalLM"} | (metadata or {}),
    )


def job_of(model: Model, *arguments: str, **asked: Any) -> VllmJob:
    """`model` asked of the newest vLLM known; `arguments` come after `--`."""
    adapter = Vllm()
    job = adapter.job(model, Request(runtime_args=arguments, **asked), adapter.assumed())
    assert isinstance(job, VllmJob)
    return job
