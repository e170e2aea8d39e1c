"""Writes safetensors files and model directories for tests: of real models in full length, sparse, and broken ones."""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from mgpu.errors import BadModelError
from mgpu.inspect.safetensors import DTYPE_BITS
from mgpu.inspect.source import read_model

CONFIGS = Path(__file__).parent / "data" / "hf"


class Spec(NamedTuple):
    """A tensor to write, slowest dimension first."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def n_bytes(self) -> int:
        return math.prod(self.shape) * DTYPE_BITS[self.dtype] // 8


class Linear(NamedTuple):
    """A matrix that may be quantised."""

    name: str
    n_in: int
    n_out: int


Module = Linear | Spec
Store = Callable[[Linear], list[Spec]]


def entries(tensors: Sequence[Spec]) -> dict[str, dict[str, Any]]:
    """The header's object: name -> dtype, shape, data_offsets."""
    found: dict[str, dict[str, Any]] = {}
    at = 0
    for tensor in tensors:
        end = at + tensor.n_bytes
        found[tensor.name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": [at, end]}
        at = end
    return found


def with_length(raw: bytes) -> bytes:
    return struct.pack("<Q", len(raw)) + raw


def header(tensors: Sequence[Spec]) -> bytes:
    """Length and JSON, padded with spaces to a multiple of 8."""
    raw = json.dumps({"__metadata__": {"format": "pt"}} | entries(tensors), separators=(",", ":")).encode()
    return with_length(raw + b" " * (-len(raw) % 8))


def write_file(path: Path, tensors: Sequence[Spec]) -> Path:
    """A whole file; its data is a hole."""
    content = header(tensors)
    path.write_bytes(content)
    os.truncate(path, len(content) + sum(tensor.n_bytes for tensor in tensors))
    return path


def write_model(
    directory: Path, config: Mapping[str, Any], tensors: Sequence[Spec], *, n_shards: int = 1, stem: str = "model"
) -> Path:
    """A model directory as transformers writes it: one file, or shards of near the same size and their index."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config))
    if n_shards == 1:
        write_file(directory / f"{stem}.safetensors", tensors)
        return directory
    step = -(-len(tensors) // n_shards)
    weight_map: dict[str, str] = {}
    for number in range(n_shards):
        name = f"{stem}-{number + 1:05d}-of-{n_shards:05d}.safetensors"
        part = tensors[number * step : (number + 1) * step]
        write_file(directory / name, part)
        weight_map |= {tensor.name: name for tensor in part}
    write_index(directory, weight_map, sum(tensor.n_bytes for tensor in tensors))
    return directory


def write_index(directory: Path, weight_map: Mapping[str, str], total_size: int = 0) -> Path:
    path = directory / "model.safetensors.index.json"
    path.write_text(json.dumps({"metadata": {"total_size": total_size}, "weight_map": dict(weight_map)}))
    return path


def read_config(name: str) -> dict[str, Any]:
    """The configuration of a real model."""
    config: dict[str, Any] = json.loads((CONFIGS / f"{name}.json").read_text())
    return config


# What the modules of a model are.


def decoder(config: Mapping[str, Any], prefix: str = "model", head: str = "lm_head") -> list[Module]:
    """All modules of a Llama-like model: Llama, Qwen 2 and 3 (mixtures too), Gemma 3, DeepSeek V2."""
    n_embd, n_vocab = config["hidden_size"], config["vocab_size"]
    modules: list[Module] = [Spec(f"{prefix}.embed_tokens.weight", "F16", (n_vocab, n_embd))]
    for layer in range(config["num_hidden_layers"]):
        block = f"{prefix}.layers.{layer}."
        modules += [Spec(block + f"{name}.weight", "F16", (n_embd,)) for name in _norms(config)]
        modules += _latent_attention(block, config) if "kv_lora_rank" in config else _attention(block, config)
        modules += _feed_forward(block + "mlp.", config, layer)
    modules.append(Spec(f"{prefix}.norm.weight", "F16", (n_embd,)))
    if not config.get("tie_word_embeddings"):
        modules.append(Linear(head, n_embd, n_vocab))
    return modules


def _norms(config: Mapping[str, Any]) -> tuple[str, ...]:
    usual = ("input_layernorm", "post_attention_layernorm")
    gemma = config["model_type"].startswith("gemma3")
    return (*usual, "pre_feedforward_layernorm", "post_feedforward_layernorm") if gemma else usual


def _attention(block: str, config: Mapping[str, Any]) -> Iterator[Module]:
    n_embd, n_head = config["hidden_size"], config["num_attention_heads"]
    dim = config.get("head_dim", n_embd // n_head)
    n_kv = config["num_key_value_heads"] * dim
    for name, n_out in (("q", n_head * dim), ("k", n_kv), ("v", n_kv)):
        yield Linear(f"{block}self_attn.{name}_proj", n_embd, n_out)
        if config["model_type"] == "qwen2":
            yield Spec(f"{block}self_attn.{name}_proj.bias", "F16", (n_out,))
    yield Linear(f"{block}self_attn.o_proj", n_head * dim, n_embd)
    if config["model_type"].startswith(("qwen3", "gemma3")):
        yield from (Spec(f"{block}self_attn.{name}_norm.weight", "F16", (dim,)) for name in "qk")


def _latent_attention(block: str, config: Mapping[str, Any]) -> Iterator[Module]:
    n_embd, n_head, rank = config["hidden_size"], config["num_attention_heads"], config["kv_lora_rank"]
    nope, rope, dim_v = config["qk_nope_head_dim"], config["qk_rope_head_dim"], config["v_head_dim"]
    yield Linear(f"{block}self_attn.q_proj", n_embd, n_head * (nope + rope))
    yield Linear(f"{block}self_attn.kv_a_proj_with_mqa", n_embd, rank + rope)
    yield Spec(f"{block}self_attn.kv_a_layernorm.weight", "F16", (rank,))
    yield Linear(f"{block}self_attn.kv_b_proj", rank, n_head * (nope + dim_v))
    yield Linear(f"{block}self_attn.o_proj", n_head * dim_v, n_embd)


def _feed_forward(prefix: str, config: Mapping[str, Any], layer: int) -> Iterator[Module]:
    n_embd = config["hidden_size"]
    n_expert = config.get("num_experts") or config.get("n_routed_experts") or 0
    if not n_expert or layer < config.get("first_k_dense_replace", 0):
        yield from _swiglu(prefix, n_embd, config["intermediate_size"])
        return
    n_ff = config["moe_intermediate_size"]
    yield Spec(prefix + "gate.weight", "F16", (n_expert, n_embd))
    for expert in range(n_expert):
        yield from _swiglu(f"{prefix}experts.{expert}.", n_embd, n_ff)
    if n_shared := config.get("n_shared_experts"):
        yield from _swiglu(f"{prefix}shared_experts.", n_embd, n_shared * n_ff)


def _swiglu(prefix: str, n_embd: int, n_ff: int) -> Iterator[Module]:
    yield Linear(prefix + "gate_proj", n_embd, n_ff)
    yield Linear(prefix + "up_proj", n_embd, n_ff)
    yield Linear(prefix + "down_proj", n_ff, n_embd)


def siglip(config: Mapping[str, Any], n_text: int) -> list[Spec]:
    """Gemma 3's vision tower and its projector."""
    n_embd, n_ff = config["hidden_size"], config["intermediate_size"]
    patch, n_patches = config["patch_size"], (config["image_size"] // config["patch_size"]) ** 2
    top = "vision_tower.vision_model."
    shapes: dict[str, tuple[int, ...]] = {
        "multi_modal_projector.mm_input_projection_weight": (n_embd, n_text),
        "multi_modal_projector.mm_soft_emb_norm.weight": (n_embd,),
        top + "embeddings.patch_embedding.weight": (n_embd, 3, patch, patch),
        top + "embeddings.patch_embedding.bias": (n_embd,),
        top + "embeddings.position_embedding.weight": (n_patches, n_embd),
    }
    for layer in range(config["num_hidden_layers"]):
        block = f"{top}encoder.layers.{layer}."
        for name in ("k_proj", "v_proj", "q_proj", "out_proj"):
            shapes[f"{block}self_attn.{name}.weight"] = (n_embd, n_embd)
        shapes |= {f"{block}mlp.fc1.weight": (n_ff, n_embd), f"{block}mlp.fc2.weight": (n_embd, n_ff)}
        shapes |= {f"{block}layer_norm{number}.weight": (n_embd,) for number in (1, 2)}
        shapes |= {name[:-6] + "bias": shape[:1] for name, shape in shapes.items() if name.startswith(block)}
    shapes |= {top + "post_layernorm.weight": (n_embd,), top + "post_layernorm.bias": (n_embd,)}
    return [Spec(name, "BF16", shape) for name, shape in shapes.items()]


def gpt_oss(config: Mapping[str, Any]) -> list[Spec]:
    """gpt-oss with its experts in MXFP4: blocks of 16 bytes for 32 weights, and a byte of scale for each."""
    n_embd, n_ff, n_expert = config["hidden_size"], config["intermediate_size"], config["num_local_experts"]
    dim, n_head, n_kv = config["head_dim"], config["num_attention_heads"], config["num_key_value_heads"]
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config["vocab_size"], n_embd)}
    packed: dict[str, tuple[int, ...]] = {}
    for layer in range(config["num_hidden_layers"]):
        block = f"model.layers.{layer}."
        shapes |= {f"{block}{name}_layernorm.weight": (n_embd,) for name in ("input", "post_attention")}
        for name, n_out in (("q", n_head * dim), ("k", n_kv * dim), ("v", n_kv * dim)):
            shapes |= {f"{block}self_attn.{name}_proj.weight": (n_out, n_embd)}
            shapes |= {f"{block}self_attn.{name}_proj.bias": (n_out,)}
        shapes |= {f"{block}self_attn.o_proj.weight": (n_embd, n_head * dim)}
        shapes |= {f"{block}self_attn.o_proj.bias": (n_embd,), f"{block}self_attn.sinks": (n_head,)}
        shapes |= {f"{block}mlp.router.weight": (n_expert, n_embd), f"{block}mlp.router.bias": (n_expert,)}
        for name, n_in, n_out in (("gate_up_proj", n_embd, 2 * n_ff), ("down_proj", n_ff, n_embd)):
            shapes |= {f"{block}mlp.experts.{name}_bias": (n_expert, n_out)}
            packed |= {f"{block}mlp.experts.{name}_blocks": (n_expert, n_out, n_in // 32, 16)}
            packed |= {f"{block}mlp.experts.{name}_scales": (n_expert, n_out, n_in // 32)}
    shapes |= {"model.norm.weight": (n_embd,), "lm_head.weight": (config["vocab_size"], n_embd)}
    return [Spec(n, "BF16", s) for n, s in shapes.items()] + [Spec(n, "U8", s) for n, s in packed.items()]


# How matrices are stored.


def plain(dtype: str) -> Store:
    return lambda linear: [Spec(f"{linear.name}.weight", dtype, (linear.n_out, linear.n_in))]


def awq(bits: int = 4, group: int = 128) -> Store:
    """As AutoAWQ (gemm): packed along the outputs. The head stays as it is."""

    def store(linear: Linear) -> list[Spec]:
        if linear.name.endswith("lm_head"):
            return plain("F16")(linear)
        columns, groups = linear.n_out * bits // 32, linear.n_in // group
        return [
            Spec(f"{linear.name}.qweight", "I32", (linear.n_in, columns)),
            Spec(f"{linear.name}.qzeros", "I32", (groups, columns)),
            Spec(f"{linear.name}.scales", "F16", (groups, linear.n_out)),
        ]

    return store


def gptq(bits: int = 4, group: int = 128) -> Store:
    """As AutoGPTQ: packed along the inputs. The head stays as it is."""

    def store(linear: Linear) -> list[Spec]:
        if linear.name.endswith("lm_head"):
            return plain("F16")(linear)
        groups = linear.n_in // group
        return [
            Spec(f"{linear.name}.g_idx", "I32", (linear.n_in,)),
            Spec(f"{linear.name}.qweight", "I32", (linear.n_in * bits // 32, linear.n_out)),
            Spec(f"{linear.name}.qzeros", "I32", (groups, linear.n_out * bits // 32)),
            Spec(f"{linear.name}.scales", "F16", (groups, linear.n_out)),
        ]

    return store


def exl2(bits: float, head_bits: int = 6) -> Store:
    """As ExLlamaV2's converter, all groups of 128 rows having `bits` on average."""

    def store(linear: Linear) -> list[Spec]:
        each = head_bits if linear.name.endswith("lm_head") else bits
        groups = linear.n_in // 128
        return [
            Spec(f"{linear.name}.q_invperm", "I16", (linear.n_in,)),
            Spec(f"{linear.name}.q_groups", "I16", (2 * groups,)),
            Spec(f"{linear.name}.q_scale", "I32", (groups, linear.n_out // 8)),
            Spec(f"{linear.name}.q_scale_max", "F16", (groups,)),
            Spec(f"{linear.name}.q_weight", "I32", (int(linear.n_in * each / 32), linear.n_out)),
        ]

    return store


def exl3(bits: int, head_bits: int = 6) -> Store:
    """As ExLlamaV3's converter: tiles of 16 x 16 weights."""

    def store(linear: Linear) -> list[Spec]:
        each = head_bits if linear.name.endswith("lm_head") else bits
        return [
            Spec(f"{linear.name}.suh", "F16", (linear.n_in,)),
            Spec(f"{linear.name}.svh", "F16", (linear.n_out,)),
            Spec(f"{linear.name}.trellis", "I16", (linear.n_in // 16, linear.n_out // 16, 16 * each)),
            Spec(f"{linear.name}.mcg", "I32", ()),
        ]

    return store


def fp8_blocks(linear: Linear) -> list[Spec]:
    """FP8 with a scale for each block of 128 x 128. The head stays as it is."""
    if linear.name.endswith("lm_head"):
        return plain("BF16")(linear)
    blocks = (-(-linear.n_out // 128), -(-linear.n_in // 128))
    return [
        Spec(f"{linear.name}.weight", "F8_E4M3", (linear.n_out, linear.n_in)),
        Spec(f"{linear.name}.weight_scale_inv", "BF16", blocks),
    ]


def packed_ct(linear: Linear) -> list[Spec]:
    """compressed-tensors, pack-quantized with 4 bits in groups of 128."""
    return [
        Spec(f"{linear.name}.weight_packed", "I32", (linear.n_out, linear.n_in // 8)),
        Spec(f"{linear.name}.weight_scale", "BF16", (linear.n_out, max(linear.n_in // 128, 1))),
        Spec(f"{linear.name}.weight_shape", "I64", (2,)),
    ]


def bitsandbytes_4bit(linear: Linear) -> list[Spec]:
    n = linear.n_in * linear.n_out
    return [
        Spec(f"{linear.name}.weight", "U8", (n // 2, 1)),
        Spec(f"{linear.name}.weight.absmax", "U8", (n // 64,)),
        Spec(f"{linear.name}.weight.nested_absmax", "F32", (max(n // 16384, 1),)),
        Spec(f"{linear.name}.weight.nested_quant_map", "F32", (256,)),
        Spec(f"{linear.name}.weight.quant_map", "F32", (16,)),
        Spec(f"{linear.name}.weight.quant_state.bitsandbytes__nf4", "U8", (88,)),
    ]


def nvfp4(linear: Linear) -> list[Spec]:
    """ModelOpt's NVFP4: two weights a byte."""
    return [
        Spec(f"{linear.name}.input_scale", "F32", ()),
        Spec(f"{linear.name}.weight", "U8", (linear.n_out, linear.n_in // 2)),
        Spec(f"{linear.name}.weight_scale", "F8_E4M3", (linear.n_out, linear.n_in // 16)),
        Spec(f"{linear.name}.weight_scale_2", "F32", ()),
    ]


def mlx_4bit(linear: Linear) -> list[Spec]:
    return [
        Spec(f"{linear.name}.weight", "U32", (linear.n_out, linear.n_in // 8)),
        Spec(f"{linear.name}.scales", "BF16", (linear.n_out, linear.n_in // 64)),
        Spec(f"{linear.name}.biases", "BF16", (linear.n_out, linear.n_in // 64)),
    ]


def stored(modules: Sequence[Module], store: Store, dtype: str = "F16") -> list[Spec]:
    """The tensors of these modules; what is no matrix has `dtype`."""
    tensors: list[Spec] = []
    for module in modules:
        tensors += store(module) if isinstance(module, Linear) else [module._replace(dtype=dtype)]
    return tensors


def small_config(**changes: Any) -> dict[str, Any]:
    """A Llama of two blocks; None takes a key away."""
    config: dict[str, Any] = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 128,
        "intermediate_size": 256,
        "max_position_embeddings": 4096,
        "num_attention_heads": 4,
        "num_hidden_layers": 2,
        "num_key_value_heads": 2,
        "vocab_size": 512,
    }
    return {key: value for key, value in (config | changes).items() if value is not None}


def small_tensors(store: Store = plain("BF16"), dtype: str = "BF16") -> list[Spec]:  # noqa: B008 - immutable
    return stored(decoder(small_config()), store, dtype)


#: Of `small_tensors`, however they are stored.
SMALL_PARAMETERS = 2 * (2 * 128 * 128 + 2 * 128 * 64 + 3 * 128 * 256 + 2 * 128) + 2 * 512 * 128 + 128


def refusal(argument: Path) -> BadModelError:
    """The error for a model that is none: one printable line, and a hint of one line."""
    with pytest.raises(BadModelError) as caught:
        read_model(str(argument))
    error = caught.value
    check_lines(error)
    return error


def check_lines(error: BadModelError) -> None:
    assert (error.message + error.hint).isprintable()
    assert 0 < len(error.message) < 1000
    assert error.hint
