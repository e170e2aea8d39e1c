"""Writes GGUF files for tests: whole small models, and headers as wrong as a test wants them."""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from mgpu.inspect.gguf import TYPES

LETTERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "B", 10: "Q", 11: "q", 12: "d"}
TYPE_IDS = {name: type_id for type_id, (name, _, _) in TYPES.items()}

Plain = int | float | bool | str


class Typed(NamedTuple):
    """A value with the GGUF value type it is to be written as; a sequence becomes an array of that type."""

    kind: int
    value: Plain | bytes | Sequence[Plain]


class Raw(NamedTuple):
    """A value type and the bytes after it, as they are."""

    kind: int
    data: bytes


class TensorSpec(NamedTuple):
    """A tensor to write. `offset` is the right one unless given."""

    name: str | bytes
    shape: tuple[int, ...]
    type: str | int = "F32"
    offset: int | None = None

    @property
    def n_bytes(self) -> int:
        if isinstance(self.type, int):
            return 0
        _, block, block_bytes = TYPES[TYPE_IDS[self.type]]
        return math.prod(self.shape) // block * block_bytes


Value = Plain | Typed | Raw | Sequence[Plain]
Metadata = Mapping[str, Value] | Sequence[tuple[str | bytes, Value]]


def string(text: str | bytes) -> bytes:
    raw = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", len(raw)) + raw


def pad(size: int, alignment: int = 32) -> int:
    return -(-size // alignment) * alignment


def write_gguf(
    metadata: Metadata, tensors: Sequence[TensorSpec] = (), *, alignment: int = 32, version: int = 3, data: bool = True
) -> bytes:
    """A GGUF file, with tensor data of zeros, or (`data=False`) only up to where the data starts."""
    items = list(metadata.items()) if isinstance(metadata, Mapping) else list(metadata)
    parts = [b"GGUF", struct.pack("<Iqq", version, len(tensors), len(items))]
    parts += [string(key) + _value(value) for key, value in items]
    offset = 0
    for tensor in tensors:
        parts.append(_tensor(tensor, offset))
        offset = pad(offset + tensor.n_bytes, alignment)
    header = b"".join(parts)
    return header.ljust(pad(len(header), alignment) + (offset if data else 0), b"\0")


def write_sparse(path: Path, header: bytes, n_bytes: int) -> Path:
    """A file of `n_bytes` that starts with `header` and takes no more room on the disk than that."""
    with path.open("wb") as file:
        file.write(header)
        file.truncate(n_bytes)
    return path


def _value(value: Value) -> bytes:
    if isinstance(value, Raw):
        return struct.pack("<i", value.kind) + value.data
    if not isinstance(value, Typed):
        value = Typed(_kind(value), value)
    kind, inner = value
    if isinstance(inner, Sequence) and not isinstance(inner, str | bytes):
        return struct.pack("<iiQ", 9, kind, len(inner)) + b"".join(_scalar(kind, each) for each in inner)
    return struct.pack("<i", kind) + _scalar(kind, inner)


def _scalar(kind: int, value: Plain | bytes) -> bytes:
    if isinstance(value, str | bytes):
        return string(value)
    return struct.pack("<" + LETTERS[kind], value)


def _kind(value: Plain | Sequence[Plain]) -> int:
    """The value type llama.cpp expects for such a value: u32, i32, f32, bool, string."""
    if isinstance(value, bool):
        return 7
    if isinstance(value, int):
        return 5 if value < 0 else 4 if value < 1 << 32 else 10
    if isinstance(value, float):
        return 6
    if isinstance(value, str):
        return 8
    return _kind(value[0]) if value else 4


def _tensor(tensor: TensorSpec, offset: int) -> bytes:
    type_id = tensor.type if isinstance(tensor.type, int) else TYPE_IDS[tensor.type]
    dims = b"".join(struct.pack("<q" if dim < 0 else "<Q", dim) for dim in tensor.shape)
    place = offset if tensor.offset is None else tensor.offset
    return string(tensor.name) + struct.pack("<I", len(tensor.shape)) + dims + struct.pack("<iQ", type_id, place)


def llama_metadata(n_layer: int = 2, n_embd: int = 64, **changes: Value) -> dict[str, Value]:
    """The keys of a small llama. `changes` are `llama.` keys, with `__` for a dot: `attention__head_count=0`."""
    metadata: dict[str, Value] = {
        "general.architecture": "llama",
        "general.name": "Tiny Llama",
        "general.file_type": 1,
        "llama.context_length": 4096,
        "llama.embedding_length": n_embd,
        "llama.block_count": n_layer,
        "llama.feed_forward_length": 4 * n_embd,
        "llama.attention.head_count": 4,
        "llama.attention.head_count_kv": 2,
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
        "llama.rope.dimension_count": n_embd // 4,
        "llama.vocab_size": 128,
        "tokenizer.ggml.model": "no_vocab",
    }
    return metadata | {f"llama.{key.replace('__', '.')}": value for key, value in changes.items()}


def llama_tensors(n_layer: int = 2, n_embd: int = 64, type_name: str = "F16") -> list[TensorSpec]:
    """The tensors of that small llama, all of them, so that llama.cpp loads it too."""
    n_kv, n_ff = n_embd // 2, 4 * n_embd
    tensors = [TensorSpec("token_embd.weight", (n_embd, 128), type_name)]
    for il in range(n_layer):
        tensors += [
            TensorSpec(f"blk.{il}.attn_norm.weight", (n_embd,)),
            TensorSpec(f"blk.{il}.attn_q.weight", (n_embd, n_embd), type_name),
            TensorSpec(f"blk.{il}.attn_k.weight", (n_embd, n_kv), type_name),
            TensorSpec(f"blk.{il}.attn_v.weight", (n_embd, n_kv), type_name),
            TensorSpec(f"blk.{il}.attn_output.weight", (n_embd, n_embd), type_name),
            TensorSpec(f"blk.{il}.ffn_norm.weight", (n_embd,)),
            TensorSpec(f"blk.{il}.ffn_gate.weight", (n_embd, n_ff), type_name),
            TensorSpec(f"blk.{il}.ffn_up.weight", (n_embd, n_ff), type_name),
            TensorSpec(f"blk.{il}.ffn_down.weight", (n_ff, n_embd), type_name),
        ]
    return [
        *tensors,
        TensorSpec("output_norm.weight", (n_embd,)),
        TensorSpec("output.weight", (n_embd, 128), type_name),
    ]


def small_llama(n_layer: int = 2, **changes: Value) -> bytes:
    """A whole small model."""
    return write_gguf(llama_metadata(n_layer, 64, **changes), llama_tensors(n_layer))


def write_shards(directory: Path, n_shards: int = 3, stem: str = "tiny", n_layer: int = 4) -> list[Path]:
    """A small llama in shards, as llama-gguf-split writes them."""
    tensors = llama_tensors(n_layer)
    step = -(-len(tensors) // n_shards)
    paths = []
    for no in range(n_shards):
        split: dict[str, Value] = {
            "split.no": Typed(2, no),
            "split.count": Typed(2, n_shards),
            "split.tensors.count": Typed(5, len(tensors)),
        }
        metadata = llama_metadata(n_layer) | split if no == 0 else split
        path = directory / f"{stem}-{no + 1:05d}-of-{n_shards:05d}.gguf"
        path.write_bytes(write_gguf(metadata, tensors[no * step : (no + 1) * step]))
        paths.append(path)
    return paths
