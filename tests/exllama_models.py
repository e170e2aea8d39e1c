"""For tests of the ExLlama adapters: quantised Llamas in full length on disk, their weights a hole."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final, Literal

from safetensors_writer import decoder, exl2, exl3, read_config, stored, write_model

ExFormat = Literal["exl2", "exl3"]

_8B: Final = read_config("Llama-3.1-8B")
#: Dimensions of Llama 3.1 models (their config.json).
SIZES: Final[dict[str, dict[str, Any]]] = {
    "8B": {},
    "70B": {"hidden_size": 8192, "intermediate_size": 28672, "num_attention_heads": 64, "num_hidden_layers": 80},
}


def exl_model(directory: Path, format_: ExFormat, size: str = "8B", bits: float = 4, **changes: Any) -> Path:
    """A model directory of `size` with `bits` a weight."""
    config = _8B | SIZES[size] | {"quantization_config": {"quant_method": format_, "bits": bits, "head_bits": 6}}
    config |= changes
    store = exl2(bits) if format_ == "exl2" else exl3(int(bits))
    return write_model(directory / f"Llama-{size}-{format_}-{bits:g}bpw", config, stored(decoder(config), store))
