"""How the weights of a Hugging Face model are quantised: the label people use, the parameters behind packed tensors.

Sources: vLLM 0.32.0 `model_executor/layers/quantization/`, `transformers_utils/model_arch_config_convertor.py`;
ExLlamaV2 0.3.2 `exllamav2/linear.py`, `conversion/compile.py`; ExLlamaV3 1.4.1 `exllamav3/conversion/`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Final

from msgspec import Struct

from mgpu.inspect.hf_config import Config, described, read_object
from mgpu.inspect.safetensors import DTYPE_BITS, TensorInfo
from mgpu.model import Format

_KEY: Final = "quantization_config"
#: Other files that hold what belongs under `quantization_config` -> the method, where the file does not name it.
_OWN_FILES: Final = (
    ("hf_quant_config.json", "modelopt"),
    ("quantize_config.json", "gptq"),
    ("quant_config.json", "awq"),
)

#: Data types of unquantised weights, as people call them.
_PLAIN: Final = {"F16": "FP16", "F32": "FP32", "F64": "FP64", "F8_E4M3": "FP8", "F8_E5M2": "FP8", "F4": "FP4"}
#: The method's own name -> how it is written.
_WRITTEN: Final = {
    "awq": "AWQ", "gptq": "GPTQ", "auto-round": "AutoRound", "bitsandbytes": "bitsandbytes", "mlx": "MLX", "hqq": "HQQ",
    "fp8": "FP8", "fbgemm_fp8": "FP8", "mxfp4": "MXFP4", "gpt_oss_mxfp4": "MXFP4", "aqlm": "AQLM", "quark": "Quark",
    "torchao": "torchao", "eetq": "EETQ", "exl2": "EXL2", "exl3": "EXL3",
}  # fmt: skip
_SAME: Final = {
    "awq_marlin": "awq", "auto_awq": "awq", "gptq_marlin": "gptq", "auto_gptq": "gptq", "gptq_v2": "gptq",
    "intel/auto-round": "auto-round", "inc": "auto-round", "compressed_tensors": "compressed-tensors",
    "modelopt_fp4": "modelopt", "modelopt_mixed": "modelopt", "modelopt_mxfp8": "modelopt",
}  # fmt: skip

#: Last components of names of what quantisation adds: scales, zero points, permutations. Not parameters.
_ADDED: Final = frozenset({
    "qzeros", "scales", "g_idx", "q_scale", "q_scale_max", "q_groups", "q_group_map", "q_perm", "q_invperm", "suh",
    "svh", "su", "sv", "mcg", "mul1", "absmax", "nested_absmax", "quant_map", "nested_quant_map", "SCB",
    "weight_format", "weight_shape", "weight_g_idx", "weight_zero_point", "bitsandbytes__nf4", "bitsandbytes__fp4",
    "biases",
})  # fmt: skip
_ADDED_ENDINGS: Final = ("_scale", "_scales", "_scale_inv", "_scale_2", "_amax")
#: Integer types that hold several weights each, where the method has fewer bits.
_CONTAINERS: Final = frozenset({"U8", "I32", "U32"})


class Quantization(Struct, frozen=True, kw_only=True):
    """`method` is "" for plain weights; `bits` of one weight, where the method has one number for all."""

    method: str
    label: str
    bits: int | None
    format: Format


def with_own_file(config: Config, directory: Path, names: Iterable[str]) -> Config:
    """`config`, with its quantisation from a file of its own if it has none (AutoGPTQ, AutoAWQ, ModelOpt did that)."""
    if config.get(_KEY) is None and isinstance(config.get("compression_config"), Mapping):
        config.values[_KEY] = config.get("compression_config")
    if config.get(_KEY) is None and config.get("quantization.bits") is not None:
        config.values[_KEY] = {"quant_method": "mlx"} | config.get("quantization")
    for name, method in _OWN_FILES:
        if config.get(_KEY) is None and name in names:
            config.values[_KEY] = {"quant_method": method} | read_object(directory / name)
    if config.get(_KEY) is not None and not isinstance(config.get(_KEY), Mapping):
        raise config.bad(f"{_KEY} is {described(config.get(_KEY))}, it must be an object")
    return config


def stated_method(config: Config) -> str:
    """`quant_method`, one name for what is the same; "" without one."""
    method = config.text(f"{_KEY}.quant_method").lower()
    if not method and config.text(f"{_KEY}.producer.name") == "modelopt":
        method = "modelopt"
    if not method and config.get("quantization.bits") is not None:
        method = "mlx"  # it writes the same object under both names
    return _SAME.get(method, method)


def read_quantization(config: Config, tensors: Iterable[TensorInfo]) -> Quantization:
    """From `quantization_config` and, as ExLlama's loaders do, from what the tensors are. Raises `BadModelError`."""
    tensors = tuple(tensors)
    method = stated_method(config)
    endings = {tensor.name.rpartition(".")[2] for tensor in tensors}
    found: Format = "exl3" if "trellis" in endings else "exl2" if "q_weight" in endings else "safetensors"
    if found == "safetensors" and method in {"exl2", "exl3"}:
        raise config.bad(
            f"quant_method is {method}, but the weights have none of its tensors",
            f"config.json or the weights are of another version: download the {method.upper()} model again, as a whole",
        )
    if found != "safetensors":
        stated = config.number(f"{_KEY}.bits", low=0.1, high=32) if method == found else None
        bits = measured_bits(tensors) if stated is None else stated
        return Quantization(method=found, label=f"{found.upper()}-{_decimal(bits)}bpw", bits=None, format=found)
    if not method and "qweight" in endings:
        raise config.bad(
            f"the weights are packed (.qweight), but there is no {_KEY} that says how",
            "download config.json again, and quantize_config.json or quant_config.json if there is one",
        )
    bits_each = _bits(config, method)
    return Quantization(method=method, label=_label(config, method, tensors), bits=bits_each, format="safetensors")


def count_parameters(tensors: Iterable[TensorInfo], quantization: Quantization) -> int:
    """The weights the model computes with, not the elements that hold them.

    EXL2: rows (the length of `q_invperm`) times columns. EXL3: tiles of 16 x 16. Other packed tensors: elements times
    the bits of an element over the bits of a weight. What quantisation adds (scales and so on) does not count.
    """
    tensors = tuple(tensors)
    if not quantization.method:
        return sum(math.prod(tensor.shape) for tensor in tensors)
    rows = {t.name.rpartition(".")[0]: t.shape[0] for t in tensors if _last(t) in {"q_invperm", "q_perm"} and t.shape}
    return sum(_parameters(tensor, quantization.bits, rows) for tensor in tensors)


def measured_bits(tensors: Iterable[TensorInfo]) -> float:
    """Bits per weight of the EXL tensors of the blocks: all they store, over the weights (the head has its own)."""
    blocks = [tensor for tensor in tensors if "lm_head" not in tensor.name]
    rows = {t.name.rpartition(".")[0]: t.shape[0] for t in blocks if _last(t) in {"q_invperm", "q_perm"} and t.shape}
    packed = [tensor for tensor in blocks if _last(tensor) in {"q_weight", "trellis"}]
    modules = {tensor.name.rpartition(".")[0] for tensor in packed}
    stored = sum(tensor.n_bytes for tensor in blocks if tensor.name.rpartition(".")[0] in modules)
    weights = sum(_parameters(tensor, None, rows) for tensor in packed)
    return 8 * stored / weights if weights else 0.0


def _last(tensor: TensorInfo) -> str:
    return tensor.name.rpartition(".")[2]


def _parameters(tensor: TensorInfo, bits: int | None, rows: Mapping[str, int]) -> int:
    """Of one tensor of a quantised model. `rows`: EXL2 modules -> input features."""
    module, _, last = tensor.name.rpartition(".")
    if last in _ADDED or last.endswith(_ADDED_ENDINGS):
        return 0
    n_elements = math.prod(tensor.shape)
    if last == "trellis" and len(tensor.shape) == 3:
        return 256 * tensor.shape[0] * tensor.shape[1]
    if last == "q_weight" and len(tensor.shape) == 2:
        return rows.get(module, 0) * tensor.shape[1]
    width = DTYPE_BITS[tensor.type]
    if bits is not None and tensor.type in _CONTAINERS and width > bits:
        return n_elements * width // bits
    return n_elements


def _bits(config: Config, method: str) -> int | None:
    """Bits of one packed weight."""
    if method == "bitsandbytes":
        return 4 if True in (config.get(f"{_KEY}.load_in_4bit"), config.get(f"{_KEY}._load_in_4bit")) else 8
    if method in {"mxfp4", "gpt_oss_mxfp4"}:
        return 4
    if method == "modelopt":
        return 4 if "4" in _modelopt_algorithm(config) else 8
    if method == "compressed-tensors":
        return _group_bits(config, "weights")
    key, value = config.find((f"{_KEY}.bits", f"{_KEY}.w_bit"))
    if method in {"awq", "gptq", "auto-round", "mlx"}:
        return config.integer(key, low=1, high=32)
    return value if method and _is_small(value) else None


def _label(config: Config, method: str, tensors: tuple[TensorInfo, ...]) -> str:
    special: dict[str, Callable[[Config], str]] = {
        "compressed-tensors": _compressed_label,
        "modelopt": _modelopt_algorithm,
    }
    if not method:
        return _dominant(tensors)
    if method in special:
        return special[method](config)
    name = _WRITTEN.get(method, "".join(letter for letter in method[:32] if letter.isprintable()))
    bits = _bits(config, method)
    if bits is None or name in {"FP8", "MXFP4"}:
        return name
    group = config.get(f"{_KEY}.group_size") if method in {"gptq", "auto-round"} else None
    return f"{name}-{bits}bit" + (f"-g{group}" if _is_small(group) else "")


def _is_small(value: Any) -> bool:
    """A positive number of bits, or of weights in a group; -1 is no group."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value <= 1 << 16


def _dominant(tensors: tuple[TensorInfo, ...]) -> str:
    """The data type of the most bytes."""
    sums: dict[str, int] = {}
    for tensor in tensors:
        sums[tensor.type] = sums.get(tensor.type, 0) + tensor.n_bytes
    name = max(sums, key=lambda each: sums[each])
    return _PLAIN.get(name, name)


def _modelopt_algorithm(config: Config) -> str:
    """`quant_algo` of NVIDIA ModelOpt: "NVFP4", "FP8"."""
    algorithm = config.text(f"{_KEY}.quant_algo", f"{_KEY}.quantization.quant_algo").upper()
    return "".join(letter for letter in algorithm[:32] if letter.isprintable()) or "ModelOpt"


def _groups(config: Config) -> tuple[Mapping[str, Any], ...]:
    groups = config.get(f"{_KEY}.config_groups")
    if not isinstance(groups, Mapping):
        return ()
    return tuple(group for group in groups.values() if isinstance(group, Mapping))


def _group_bits(config: Config, part: str) -> int | None:
    """`num_bits` of the first group that has some: of its weights, or of its input activations."""
    for group in _groups(config):
        values = group.get(part)
        if isinstance(values, Mapping) and values.get("num_bits") is not None:
            return config.checked(f"num_bits of {_KEY}.config_groups", values["num_bits"], 1, 32)
    return None


def _compressed_label(config: Config) -> str:
    """`"compressed-tensors W4A16"`: bits of weights and activations; floating point by its usual name."""
    weights, activations = _group_bits(config, "weights"), _group_bits(config, "input_activations")
    if weights is None:
        return "compressed-tensors"
    first = next(group["weights"] for group in _groups(config) if isinstance(group.get("weights"), Mapping))
    if first.get("type") == "float":
        name = {8: "FP8", 4: "MXFP4" if first.get("group_size") == 32 else "NVFP4"}.get(weights, f"FP{weights}")
        return f"compressed-tensors {name}" + ("" if activations else "A16")
    return f"compressed-tensors W{weights}A{activations or 16}"


def _decimal(bits: float) -> str:
    """`4.25` as `"4.25"`, `4` as `"4.0"`."""
    text = f"{bits:.2f}"
    return text.removesuffix("0")
