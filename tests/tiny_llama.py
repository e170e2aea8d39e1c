"""A Llama so small that real vLLM runs it on two cores: random weights, made the same each time, and a byte tokenizer.

Heads of 32, as vLLM's attention on the CPU has no kernel for smaller ones. The output layer is worth 1.3 of the four
layers, so that two stages that take equally long are of 3 and 1.
"""

from __future__ import annotations

import json
import random
import struct
from pathlib import Path

LAYERS = 4
_EMBD, _FF, _HEADS, _KV_HEADS, _HEAD_DIM, _VOCAB = 64, 128, 4, 2, 32, 1024
_SPECIAL = ("<s>", "</s>", "<pad>")

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "torch_dtype": "bfloat16",
    "vocab_size": _VOCAB,
    "hidden_size": _EMBD,
    "intermediate_size": _FF,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": _HEADS,
    "num_key_value_heads": _KV_HEADS,
    "head_dim": _HEAD_DIM,
    "hidden_act": "silu",
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}

_TEMPLATE = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}assistant:"


def write_tiny(directory: Path) -> Path:
    """The model's directory, `directory` itself: config, tokenizer, 660 kB of weights."""
    directory.mkdir(parents=True, exist_ok=True)
    _write_json(directory / "config.json", CONFIG)
    _write_json(directory / "tokenizer.json", _tokenizer())
    _write_json(
        directory / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": _SPECIAL[0],
            "eos_token": _SPECIAL[1],
            "pad_token": _SPECIAL[2],
            "chat_template": _TEMPLATE,
        },
    )
    _write_safetensors(directory / "model.safetensors")
    return directory


def _write_json(path: Path, content: object) -> None:
    path.write_text(json.dumps(content, indent=1), encoding="utf-8")


def _shapes() -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (_VOCAB, _EMBD)}
    for layer in range(LAYERS):
        block = f"model.layers.{layer}."
        rows = {"q_proj": _HEADS, "k_proj": _KV_HEADS, "v_proj": _KV_HEADS}
        shapes |= {f"{block}self_attn.{name}.weight": (n * _HEAD_DIM, _EMBD) for name, n in rows.items()}
        shapes[f"{block}self_attn.o_proj.weight"] = (_EMBD, _HEADS * _HEAD_DIM)
        shapes |= {f"{block}mlp.{name}.weight": (_FF, _EMBD) for name in ("gate_proj", "up_proj")}
        shapes[f"{block}mlp.down_proj.weight"] = (_EMBD, _FF)
        shapes |= {f"{block}{name}.weight": (_EMBD,) for name in ("input_layernorm", "post_attention_layernorm")}
    return shapes | {"model.norm.weight": (_EMBD,), "lm_head.weight": (_VOCAB, _EMBD)}


def _write_safetensors(path: Path) -> None:
    """https://huggingface.co/docs/safetensors: the header's length, the header, the tensors."""
    randomness = random.Random(0)
    header: dict[str, object] = {}
    data = bytearray()
    for name, shape in _shapes().items():
        start = len(data)
        data += _tensor(name, shape, randomness)
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [start, len(data)]}
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def _tensor(name: str, shape: tuple[int, ...], randomness: random.Random) -> bytes:
    """Norms are ones; the head is large, so that the likeliest token is so by far, and knows only real tokens."""
    if len(shape) == 1:
        return _bf16(1.0) * shape[0]
    rows, columns = shape
    scale = 1.0 if name.startswith(("lm_head", "model.embed")) else 0.1
    known = 256 + len(_SPECIAL) if name.startswith("lm_head") else rows
    numbers = [_bf16(randomness.gauss(0, scale)) for _ in range(min(rows, known) * columns)]
    return b"".join(numbers) + _bf16(0.0) * ((rows - min(rows, known)) * columns)


def _bf16(number: float) -> bytes:
    return struct.pack("<f", number)[2:]


def _tokenizer() -> dict[str, object]:
    """A token for each byte, in GPT-2's alphabet, and no merges."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    alphabet = [chr(byte) for byte in printable] + [chr(256 + place) for place in range(len(others))]
    vocabulary = {token: number for number, token in enumerate((*_SPECIAL, *alphabet))}
    added = [
        {
            "id": number,
            "content": token,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": True,
        }
        for number, token in enumerate(_SPECIAL)
    ]
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    model: dict[str, object] = {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": False,
        "byte_fallback": False,
        "vocab": vocabulary,
        "merges": [],
    }
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": level,
        "post_processor": None,
        "decoder": level,
        "model": model,
    }
