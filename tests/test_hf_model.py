"""Directories in Hugging Face's format: real models in full length, names, the command line."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from conftest import Mgpu
from mgpu.inspect.hf_names import classify, place
from mgpu.inspect.source import read_model
from mgpu.model import Model, TensorClass
from safetensors_writer import (
    SMALL_PARAMETERS,
    Spec,
    Store,
    awq,
    decoder,
    exl2,
    exl3,
    fp8_blocks,
    gpt_oss,
    gptq,
    plain,
    read_config,
    siglip,
    small_config,
    small_tensors,
    stored,
    write_model,
)

BF16 = plain("BF16")


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """A sound model in three shards."""
    return write_model(tmp_path / "small", small_config(), small_tensors(), n_shards=3)


# Real models, in full length.


#: How the matrices are stored, the type of the rest, the number of files.
STORES: dict[str, tuple[Store, str, int]] = {
    "Llama-3.1-8B": (BF16, "BF16", 4),
    "Llama-3.1-8B-exl2-4.25bpw": (exl2(4.25), "F16", 1),
    "Llama-3.1-8B-exl3-4.0bpw": (exl3(4), "F16", 1),
    "Llama-2-7B-GPTQ": (gptq(), "F16", 1),
    "Qwen2.5-7B-Instruct-AWQ": (awq(), "F16", 2),
    "Qwen3-8B-FP8": (fp8_blocks, "BF16", 2),
    "Qwen3-30B-A3B": (BF16, "BF16", 16),
    "DeepSeek-V2-Lite": (BF16, "BF16", 4),
}


def write_real(directory: Path, name: str) -> Path:
    """The model as published: its tensors, their types and sizes, the number of its files."""
    tensors, n_shards = tensors_of(name, read_config(name))
    return write_model(directory / name, read_config(name), tensors, n_shards=n_shards)


def tensors_of(name: str, config: dict[str, Any]) -> tuple[list[Spec], int]:
    """The tensors, and the number of files they were published in."""
    if name == "gpt-oss-20b":
        return gpt_oss(config), 3
    if name == "gemma-3-27b-it":
        text = config["text_config"] | {"tie_word_embeddings": True}
        tower = siglip(config["vision_config"], text["hidden_size"])
        return tower + stored(decoder(text, "language_model.model"), BF16, "BF16"), 12
    store, dtype, n_shards = STORES[name]
    return stored(decoder(config), store, dtype), n_shards


#: name -> format, label, published number of parameters, stored bytes, KV bytes per token.
REAL = {
    "Llama-3.1-8B": ("safetensors", "BF16", 8_030_261_248, 16_060_522_496, 131_072),
    "Llama-3.1-8B-exl2-4.25bpw": ("exl2", "EXL2-4.25bpw", 8_030_261_248, 5_184_844_992, 131_072),
    "Llama-3.1-8B-exl3-4.0bpw": ("exl3", "EXL3-4.0bpw", 8_030_261_248, 4_940_377_476, 131_072),
    "Llama-2-7B-GPTQ": ("safetensors", "GPTQ-4bit-g128", 6_738_415_616, 3_893_862_400, 524_288),
    "Qwen2.5-7B-Instruct-AWQ": ("safetensors", "AWQ-4bit", 7_615_616_512, 5_570_747_392, 57_344),
    "Qwen3-8B-FP8": ("safetensors", "FP8", 8_190_735_360, 9_436_551_168, 147_456),
    "Qwen3-30B-A3B": ("safetensors", "BF16", 30_532_122_624, 61_064_245_248, 98_304),
    "gemma-3-27b-it": ("safetensors", "BF16", 27_432_406_640, 54_864_813_280, 507_904),
    "gpt-oss-20b": ("safetensors", "MXFP4", 20_914_757_184, 13_761_264_768, 49_152),
    "DeepSeek-V2-Lite": ("safetensors", "BF16", 15_706_484_224, 31_412_968_448, 31_104),
}


@pytest.mark.parametrize("name", REAL)
def test_real_models(tmp_path: Path, mgpu: Mgpu, name: str) -> None:
    path = write_real(tmp_path, name)
    told = json.loads(mgpu("inspect", str(path), "--json").stdout)["model"]
    keys = ("format", "quantization", "parameters", "weights_bytes", "kv_bytes_per_token")
    assert tuple(told[key] for key in keys) == REAL[name]
    model = read_model(str(path))
    assert model.name == name
    assert model.file_bytes > model.weights_bytes
    assert {tensor.layer for tensor in model.tensors if tensor.layer is not None} == set(range(model.hyper.n_layer))
    assert model.architecture == read_config(name)["model_type"]


def test_a_real_mixture(tmp_path: Path) -> None:
    model = read_model(str(write_real(tmp_path, "Qwen3-30B-A3B")))
    hyper, sizes = model.hyper, model.bytes_by_class()
    assert (hyper.n_expert, hyper.n_expert_used, hyper.n_ff_expert, hyper.head_dim_k) == (128, 8, 768, 128)
    assert sizes["expert"] == 2 * 48 * 128 * 3 * 2048 * 768
    assert sizes["router"] == 2 * 48 * 128 * 2048
    assert len(model.files) == 16


def test_a_real_multimodal_model(tmp_path: Path) -> None:
    """The text model's numbers; the tower for pictures is of no block, and of no class that a text planner knows."""
    model = read_model(str(write_real(tmp_path, "gemma-3-27b-it")))
    assert (model.architecture, model.hyper.n_layer, model.hyper.n_embd, model.hyper.n_vocab) == (
        "gemma3", 62, 5376, 262208,
    )  # fmt: skip
    assert model.metadata["sliding_window"] == 1024
    assert model.metadata["vision_config.patch_size"] == 14
    assert model.metadata["architectures"] == "Gemma3ForConditionalGeneration"
    assert not any(key.startswith("text_config") for key in model.metadata)
    towers = [tensor for tensor in model.tensors if tensor.kind == "other"]
    assert {tensor.name.partition(".")[0] for tensor in towers} == {"vision_tower", "multi_modal_projector"}


def test_a_real_latent_attention(tmp_path: Path) -> None:
    model = read_model(str(write_real(tmp_path, "DeepSeek-V2-Lite")))
    assert (model.hyper.head_dim_k, model.hyper.head_dim_v) == (192, 128)
    assert (model.metadata["kv_lora_rank"], model.metadata["qk_rope_head_dim"]) == (512, 64)
    assert model.bytes_by_class()["shared_expert"] == 2 * 26 * 3 * 2048 * 2 * 1408


# What follows from names and types of blocks.


def small_of(directory: Path, changes: Mapping[str, Any], names: Mapping[str, str]) -> Model:
    """The small model with tensors renamed: `names` are parts of names, `""` to leave a tensor out."""
    tensors = small_tensors()
    for old, new in names.items():
        tensors = [spec._replace(name=spec.name.replace(old, new)) for spec in tensors if new or old not in spec.name]
    return read_model(str(write_model(directory / "m", small_config(**changes), tensors)))


@pytest.mark.parametrize(
    ("changes", "names", "n_head_kv"),
    [
        pytest.param({"layer_types": ["linear_attention", "full_attention"]}, {}, (0, 2), id="by type"),
        pytest.param({"layers_block_type": ["mamba", "hybrid"]}, {}, (0, 2), id="by type, mamba"),
        pytest.param({"layer_types": ["sliding_attention", "full_attention"]}, {}, (2, 2), id="sliding"),
        pytest.param({}, {"layers.0.self_attn.k_proj": "layers.0.linear_attn.in_proj"}, (0, 2), id="by name"),
        pytest.param({}, {"layers.1.self_attn.v_proj.weight": "layers.1.self_attn.A_log"}, (2, 0), id="recurrent keys"),
        pytest.param({}, {"layers.1.input_layernorm.weight": "layers.1.mamba.A_log"}, (2, 2), id="both in one block"),
        pytest.param({}, {"k_proj": "unheard_of"}, (2, 2), id="names that tell nothing"),
        pytest.param({"num_kv_shared_layers": 1}, {}, (2, 0), id="a shared cache"),
        pytest.param({"num_key_value_heads": [1, 2]}, {}, (1, 2), id="a list"),
        pytest.param({"num_key_value_heads": None}, {}, (4, 4), id="none stated"),
        pytest.param({"num_key_value_heads": None, "multi_query": True}, {}, (1, 1), id="multi-query"),
        pytest.param(
            {"block_configs": [{"attention": {"n_heads_in_group": 2}}, {"attention": {"no_op": True}}]},
            {"layers.1.self_attn": ""},
            (2, 0),
            id="DeciLM",
        ),
    ],
)
def test_blocks_with_a_cache(
    tmp_path: Path, changes: dict[str, Any], names: dict[str, str], n_head_kv: tuple[int, ...]
) -> None:
    assert small_of(tmp_path, changes, names).hyper.n_head_kv == n_head_kv


def test_blocks_for_several_tokens_at_once(tmp_path: Path) -> None:
    """Multi-token prediction: a block after the last, counted where it is in the files."""
    changes = {"num_hidden_layers": 1, "num_nextn_predict_layers": 1}
    model = small_of(tmp_path, changes, {})
    assert (model.hyper.n_layer, model.hyper.n_layer_nextn) == (2, 1)
    assert model.hyper.n_ff == (256, 256)
    without = small_of(tmp_path / "without", changes, {"layers.1.": ""})
    assert (without.hyper.n_layer, without.hyper.n_layer_nextn) == (1, 0)


@pytest.mark.parametrize(
    "prefix", ["language_model.model.", "model.language_model.", "transformer.", "model.text_model."]
)
def test_where_the_blocks_are(tmp_path: Path, prefix: str) -> None:
    model = small_of(tmp_path, {}, {"model.": prefix})
    assert model.hyper.n_layer == 2
    assert model.bytes_by_class().keys() == {"ffn", "attention", "token_embedding", "output"}


@pytest.mark.parametrize(
    ("name", "layer", "kind"),
    [
        ("model.layers.7.self_attn.q_proj.weight", 7, "attention"),
        ("model.layers.7.self_attn.gate.weight", 7, "attention"),
        ("model.layers.7.linear_attn.in_proj_qkvz.weight", 7, "attention"),
        ("model.layers.7.conv.in_proj.weight", 7, "attention"),
        ("backbone.layers.7.mixer.A_log", 7, "attention"),
        ("backbone.layers.7.mixer.up_proj.weight", 7, "ffn"),
        ("backbone.layers.7.mixer.experts.3.up_proj.weight", 7, "expert"),
        ("model.layers.7.mlp.gate_proj.weight", 7, "ffn"),
        ("model.layers.7.mlp.gate.weight", 7, "router"),
        ("model.layers.7.mlp.gate.e_score_correction_bias", 7, "router"),
        ("model.layers.7.mlp.router.weight", 7, "router"),
        ("model.layers.7.block_sparse_moe.gate.weight", 7, "router"),
        ("model.layers.7.block_sparse_moe.experts.0.w1.weight", 7, "expert"),
        ("model.layers.7.block_sparse_moe.input_linear.weight", 7, "expert"),
        ("model.layers.7.mlp.experts.gate_up_proj_blocks", 7, "expert"),
        ("model.layers.7.mlp.shared_expert.up_proj.weight", 7, "shared_expert"),
        ("model.layers.7.mlp.shared_expert_gate.weight", 7, "shared_expert"),
        ("language_model.model.layers.7.feed_forward.router.weight", 7, "router"),
        ("transformer.h.7.attn.c_proj.weight", 7, "attention"),
        ("transformer.h.7.mlp.c_proj.weight", 7, "ffn"),
        ("transformer.blocks.7.ffn.experts.mlp.w1", 7, "expert"),
        ("gpt_neox.layers.7.attention.query_key_value.weight", 7, "attention"),
        ("layers.7.feed_forward.w1.weight", 7, "ffn"),
        ("model.layers.7.rotary_emb.inv_freq", 7, "other"),
        ("model.embed_tokens.weight", None, "token_embedding"),
        ("transformer.wte.weight", None, "token_embedding"),
        ("lm_head.qweight", None, "output"),
        ("model.norm.weight", None, "output"),
        ("visual.blocks.7.attn.qkv.weight", None, "other"),
        ("vision_tower.vision_model.encoder.layers.7.mlp.fc1.weight", None, "other"),
        ("model.vision_tower.embeddings.weight", None, "other"),
        ("mtp.layers.0.mlp.gate.weight", None, "other"),
        ("audio_tower.layers.0.fc1.weight", None, "other"),
        ("model.layers.x.mlp.weight", None, "other"),
        ("layers.7", None, "other"),
        ("7.layers", None, "other"),
        ("", None, "other"),
        ("...", None, "other"),
        ("model.layers.99999999999999999999.mlp.weight", None, "other"),
        ("model.layers.\u0667.mlp.weight", None, "other"),
    ],
)
def test_names(name: str, layer: int | None, kind: TensorClass) -> None:
    found, rest = place(name)
    assert found == layer
    assert classify(rest, in_block=layer is not None) == kind


# On the command line.


def test_inspect(mgpu: Mgpu, small: Path) -> None:
    told = json.loads(mgpu("inspect", str(small), "--json").stdout)["model"]
    assert (told["format"], told["quantization"], told["parameters"]) == ("safetensors", "BF16", SMALL_PARAMETERS)
    shown = mgpu("inspect", str(small)).stdout
    assert "safetensors, 3 files" in shown
    assert "512 bytes for each token" in shown.replace(",", "")


def test_no_runtime_reads_it(mgpu: Mgpu, small: Path) -> None:
    """llama.cpp does not: one clear error, and the exit code of a missing runtime."""
    done = mgpu("plan", str(small), "--rig", "3090", "--runtime", "llama.cpp")
    assert (done.returncode, done.stdout) == (6, "")
    assert "llama.cpp reads no safetensors" in done.stderr
    assert "Traceback" not in done.stderr


def test_bad_directory(mgpu: Mgpu, small: Path) -> None:
    (small / "config.json").unlink()
    done = mgpu("inspect", str(small))
    assert done.returncode == 4
    assert "has no config.json" in done.stderr
