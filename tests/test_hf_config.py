"""`config.json`: odd but sound, and every flaw as one line."""

from __future__ import annotations

import json
import random
import time
from pathlib import Path
from typing import Any

import pytest

from mgpu.errors import BadModelError
from mgpu.inspect.hf_config import MAX_CONFIG_BYTES
from mgpu.inspect.source import read_model
from mgpu.model import Model
from safetensors_writer import (
    Spec,
    Store,
    check_lines,
    exl2,
    gptq,
    plain,
    refusal,
    small_config,
    small_tensors,
    write_file,
    write_model,
)

BF16 = plain("BF16")


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """A sound model in three shards."""
    return write_model(tmp_path / "small", small_config(), small_tensors(), n_shards=3)


def test_odd_but_sound_config(tmp_path: Path) -> None:
    """`Infinity` (Mamba 2 models have it), numbers like 8.0, a key twice with the same value, a null for a default."""
    text = json.dumps(small_config(num_key_value_heads=2.0, head_dim=7))
    text = text.replace('"head_dim": 7', '"head_dim": null, "time_step_limit": [0.0, Infinity], "vocab_size": 512')
    path = write_model(tmp_path / "m", {}, small_tensors())
    (path / "config.json").write_text(text)
    model = read_model(str(path))
    assert (model.hyper.n_head_kv, model.hyper.head_dim_k) == ((2, 2), 32)


@pytest.mark.parametrize(
    ("text", "what"),
    [
        pytest.param(b"{", "is not JSON as it should be: Expecting property name", id="cut"),
        pytest.param(b"<html>", "is not JSON as it should be", id="HTML"),
        pytest.param(b"[1]", "is not a JSON object, but a list of 1", id="list"),
        pytest.param(b'"a"', 'is not a JSON object, but "a"', id="string"),
        pytest.param(b'{"a": "\xff"}', "is not UTF-8", id="not UTF-8"),
        pytest.param(b'{"a":' * 100_000, "is nested too deeply", id="deep objects"),
        pytest.param(b'{"a":' + b"[" * 100_000, "is nested too deeply", id="deep lists"),
        pytest.param(b'{"vocab_size": 1, "vocab_size": 2}', "the key 'vocab_size' occurs twice", id="twice"),
        pytest.param(b'{"a": ' + b"9" * 5000 + b"}", "is not JSON as it should be", id="endless number"),
        pytest.param(b'{"a": [' + b"0," * (1 << 21) + b"0]}", "has more than 1048576 values", id="many values"),
        pytest.param(b" " * (MAX_CONFIG_BYTES + 1), "is longer than", id="long"),
    ],
)
def test_bad_config_file(small: Path, text: bytes, what: str) -> None:
    (small / "config.json").write_bytes(text)
    error = refusal(small)
    assert error.message.startswith(str(small / "config.json"))
    assert what in error.message


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"num_hidden_layers": None}, "there is no num_hidden_layers"),
        ({"num_hidden_layers": "2"}, 'num_hidden_layers is "2", it must be a whole number'),
        ({"num_hidden_layers": True}, "num_hidden_layers is true, it must be a whole number"),
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0, it must be 1 to 1024"),
        ({"num_hidden_layers": -2}, "num_hidden_layers is -2"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000, it must be 1 to 1024"),
        ({"num_hidden_layers": 1}, "the weights go on after block 0 (num_hidden_layers)"),
        ({"num_hidden_layers": 3}, "the weights end with block 1, num_hidden_layers is 3"),
        ({"hidden_size": float("inf")}, "hidden_size is Infinity, it must be a whole number"),
        ({"hidden_size": float("nan")}, "hidden_size is NaN, it must be a whole number"),
        ({"hidden_size": 10**400}, "hidden_size is 1000"),
        ({"hidden_size": [1] * 2}, "hidden_size is a list of 2, it must be a whole number"),
        ({"num_attention_heads": 1.5}, "num_attention_heads is 1.5"),
        ({"num_attention_heads": None}, "there is no num_attention_heads"),
        ({"num_attention_heads": [4, 4, 4]}, "num_attention_heads has 3 values for 2 layers"),
        ({"num_key_value_heads": [4, "4"]}, 'num_key_value_heads is "4"'),
        ({"max_position_embeddings": 0}, "max_position_embeddings is 0"),
        ({"vocab_size": {"a": 1}}, "vocab_size is an object"),
        ({"num_experts": 8}, "num_experts_per_tok is missing, but there are 8 experts"),
        ({"num_experts": 8, "num_experts_per_tok": 9}, "num_experts_per_tok is 9, but there are 8 experts"),
        ({"num_local_experts": 10**6}, "num_local_experts is 1000000, it must be 0 to 4096"),
        ({"kv_lora_rank": "x"}, 'kv_lora_rank is "x"'),
        ({"model_type": None, "architectures": None}, "model_type is '', not the name of an architecture"),
        ({"model_type": "../x"}, "model_type is '../x'"),
        ({"model_type": "x" * 100}, "not the name of an architecture"),
        ({"text_config": {"hidden_size": "x"}}, 'hidden_size is "x"'),
        ({"quantization_config": 4}, "quantization_config is 4, it must be an object"),
        ({"quantization_config": {"quant_method": "gptq"}}, "there is no quantization_config.bits"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 0}}, "quantization_config.bits is 0"),
        ({"quantization_config": {"quant_method": "awq", "bits": "4"}}, 'quantization_config.bits is "4"'),
        ({"quantization_config": {"quant_method": "exl2"}}, "quant_method is exl2, but the weights have none"),
        ({"quantization_config": {"quant_method": "exl3"}}, "quant_method is exl3, but the weights have none"),
    ],
)
def test_bad_config(tmp_path: Path, changes: dict[str, Any], what: str) -> None:
    path = write_model(tmp_path / "m", small_config(**changes), small_tensors())
    error = refusal(path)
    assert error.message.startswith(str(path / "config.json"))
    assert what in error.message


@pytest.mark.parametrize("bits", ["4", True, 0, 99, float("nan")])
def test_bad_bits_of_exl2(tmp_path: Path, bits: object) -> None:
    config = small_config(quantization_config={"quant_method": "exl2", "bits": bits})
    assert "quantization_config.bits is" in refusal(write_model(tmp_path / "m", config, small_tensors(exl2(4)))).message


def test_packed_weights_without_a_word_about_them(tmp_path: Path) -> None:
    error = refusal(write_model(tmp_path / "m", small_config(), small_tensors(gptq())))
    assert "the weights are packed (.qweight), but there is no quantization_config" in error.message


def test_not_a_language_model(tmp_path: Path) -> None:
    path = write_model(tmp_path / "m", small_config(), [Spec("time_embed.0.weight", "F16", (4, 4))])
    assert "no tensor is one of a language model's blocks ('time_embed.0.weight')" in refusal(path).message
    write_file(path / "model.safetensors", [])
    assert "('none at all')" in refusal(path).message


# Configurations at random.

VALUES: tuple[Any, ...] = (None, True, 0, -1, 1, 3, 2.0, 1.5, 10**9, 10**30, float("nan"), float("inf"), "", "x",
                            "mamba", [], [2, 2], [1, "a"], [[[]]], {}, {"bits": 4}, {"a": {"b": {}}},
                            ["linear_attention", "full_attention"])  # fmt: skip
KEYS = (
    *small_config(), "head_dim", "num_experts", "num_experts_per_tok", "n_routed_experts", "moe_intermediate_size",
    "kv_lora_rank", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim", "num_nextn_predict_layers", "layer_types",
    "layers_block_type", "num_kv_shared_layers", "block_configs", "multi_query", "text_config", "quantization",
    "quantization_config", "compression_config", "attn_config", "ffn_config", "thinker_config", "id2label",
)  # fmt: skip
QUANTIZATION_KEYS = (
    "quant_method",
    "bits",
    "w_bit",
    "group_size",
    "config_groups",
    "quant_algo",
    "producer",
    "quantization",
)


def random_config(rng: random.Random) -> dict[str, Any]:
    config = small_config()
    for _ in range(rng.choice((1, 1, 2, 4))):
        config[rng.choice(KEYS)] = rng.choice(VALUES)
    if rng.random() < 0.3:
        config["text_config"] = {rng.choice(KEYS): rng.choice(VALUES) for _ in range(2)}
    if rng.random() < 0.5:
        methods = ("gptq", "awq", "exl2", "compressed-tensors", "modelopt", "mlx", "bitsandbytes", "fp8", "?")
        quantization = {rng.choice(QUANTIZATION_KEYS): rng.choice(VALUES) for _ in range(3)}
        config["quantization_config"] = {"quant_method": rng.choice(methods)} | quantization
    return config


@pytest.mark.parametrize("store", [BF16, gptq(), exl2(4.0)], ids=["BF16", "GPTQ", "EXL2"])
def test_random_configurations(tmp_path: Path, store: Store) -> None:
    rng = random.Random("configurations")
    path = write_model(tmp_path / "m", {}, small_tensors(store))
    kinds: dict[type, int] = {}
    for _ in range(700):
        (path / "config.json").write_text(json.dumps(random_config(rng)))
        start = time.monotonic()
        try:
            found: Model | BadModelError = read_model(str(path))
        except BadModelError as error:
            found = error
            check_lines(error)
        assert time.monotonic() - start < 2
        kinds[type(found)] = kinds.get(type(found), 0) + 1
    assert kinds[BadModelError] > 200
    assert kinds[Model] > 50
