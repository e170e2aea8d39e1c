"""How weights are quantised: the label, and the parameters behind packed tensors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mgpu.inspect.source import read_model
from safetensors_writer import (
    SMALL_PARAMETERS,
    Store,
    awq,
    bitsandbytes_4bit,
    exl2,
    exl3,
    fp8_blocks,
    gptq,
    mlx_4bit,
    nvfp4,
    packed_ct,
    plain,
    small_config,
    small_tensors,
    write_model,
)

GROUPS = {
    "w4a16": {"weights": {"num_bits": 4, "type": "int", "group_size": 128}, "input_activations": None},
    "w8a8": {"weights": {"num_bits": 8, "type": "int"}, "input_activations": {"num_bits": 8, "type": "int"}},
    "fp8": {"weights": {"num_bits": 8, "type": "float"}, "input_activations": {"num_bits": 8, "type": "float"}},
    "nvfp4": {"weights": {"num_bits": 4, "type": "float", "group_size": 16}, "input_activations": {"num_bits": 4}},
    "mxfp4": {"weights": {"num_bits": 4, "type": "float", "group_size": 32}, "input_activations": None},
}


def compressed(group: str) -> dict[str, Any]:
    return {"quant_method": "compressed-tensors", "config_groups": {"group_0": GROUPS[group]}}


@pytest.mark.parametrize(
    ("store", "quantization", "label"),
    [
        (plain("F16"), None, "FP16"),
        (plain("F32"), None, "FP32"),
        (plain("F8_E4M3"), None, "FP8"),
        (plain("F16"), {}, "FP16"),
        (awq(group=64), {"quant_method": "awq", "w_bit": 4, "q_group_size": 64}, "AWQ-4bit"),
        (gptq(8), {"quant_method": "gptq", "bits": 8, "group_size": 128}, "GPTQ-8bit-g128"),
        (gptq(4), {"quant_method": "GPTQ", "bits": 4, "group_size": -1}, "GPTQ-4bit"),
        (gptq(4), {"quant_method": "intel/auto-round", "bits": 4, "group_size": 128}, "AutoRound-4bit-g128"),
        (packed_ct, compressed("w4a16"), "compressed-tensors W4A16"),
        (packed_ct, {**compressed("w4a16"), "quant_method": "compressed_tensors"}, "compressed-tensors W4A16"),
        (plain("I8"), compressed("w8a8"), "compressed-tensors W8A8"),
        (plain("F8_E4M3"), compressed("fp8"), "compressed-tensors FP8"),
        (nvfp4, compressed("nvfp4"), "compressed-tensors NVFP4"),
        (nvfp4, compressed("mxfp4"), "compressed-tensors MXFP4A16"),
        (plain("I8"), {"quant_method": "compressed-tensors"}, "compressed-tensors"),
        (bitsandbytes_4bit, {"quant_method": "bitsandbytes", "load_in_4bit": True}, "bitsandbytes-4bit"),
        (plain("I8"), {"quant_method": "bitsandbytes", "load_in_8bit": True}, "bitsandbytes-8bit"),
        (nvfp4, {"quant_method": "modelopt", "quant_algo": "NVFP4"}, "NVFP4"),
        (plain("F8_E4M3"), {"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "FP8"}}, "FP8"),
        (fp8_blocks, {"quant_method": "fbgemm_fp8"}, "FP8"),
        (plain("F16"), {"quant_method": "hqq", "nbits": 4}, "HQQ"),
        (plain("F16"), {"quant_method": "new\nthing", "bits": 3}, "newthing-3bit"),
        (plain("F16"), {"quant_method": "new", "bits": True}, "new"),
        (mlx_4bit, {"quant_method": "mlx", "bits": 4, "group_size": 64}, "MLX-4bit"),
    ],
)
def test_labels_and_parameters(tmp_path: Path, store: Store, quantization: dict[str, Any] | None, label: str) -> None:
    """Whatever holds the weights, and whatever lies beside them, the model has the same number of parameters."""
    config = small_config(quantization_config=quantization)
    model = read_model(str(write_model(tmp_path / "m", config, small_tensors(store))))
    assert (model.quantization, model.format) == (label, "safetensors")
    assert model.parameters == SMALL_PARAMETERS


@pytest.mark.parametrize(
    ("name", "content", "store", "label"),
    [
        ("quantize_config.json", {"bits": 4, "group_size": 128}, gptq(), "GPTQ-4bit-g128"),
        ("quant_config.json", {"w_bit": 4, "q_group_size": 128, "version": "GEMM"}, awq(), "AWQ-4bit"),
        ("hf_quant_config.json", {"quantization": {"quant_algo": "NVFP4"}}, nvfp4, "NVFP4"),
    ],
)
def test_quantisation_in_a_file_of_its_own(
    tmp_path: Path, name: str, content: dict[str, Any], store: Store, label: str
) -> None:
    path = write_model(tmp_path / "m", small_config(), small_tensors(store))
    (path / name).write_text(json.dumps(content))
    model = read_model(str(path))
    assert (model.quantization, model.parameters) == (label, SMALL_PARAMETERS)


@pytest.mark.parametrize("key", ["compression_config", "quantization"])
def test_quantisation_under_another_key(tmp_path: Path, key: str) -> None:
    value = {"compression_config": compressed("w4a16"), "quantization": {"bits": 4, "group_size": 64}}[key]
    store = {"compression_config": packed_ct, "quantization": mlx_4bit}[key]
    model = read_model(str(write_model(tmp_path / "m", small_config(**{key: value}), small_tensors(store))))
    assert model.parameters == SMALL_PARAMETERS


@pytest.mark.parametrize(("store", "label"), [(exl2(4.0), "EXL2"), (exl3(4), "EXL3")])
def test_exllama_models_that_do_not_say_so(tmp_path: Path, store: Store, label: str) -> None:
    """The label is then measured: what the blocks store, scales and all, over their weights."""
    path = write_model(tmp_path / "m", small_config(), small_tensors(store), stem="output")
    model = read_model(str(path))
    assert model.format == label.lower()
    stated, _, bits = model.quantization.removesuffix("bpw").partition("-")
    assert stated == label
    assert 4.0 < float(bits) < 4.6
    assert model.parameters == SMALL_PARAMETERS
