"""What a model file says. Types only: no I/O, and no rule of any runtime."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final, Literal

from msgspec import Struct

Format = Literal["gguf", "safetensors", "exl2", "exl3"]

TensorClass = Literal[
    "token_embedding",  # input rows, looked up, never multiplied: lives on the host in llama.cpp
    "output",           # the head and its norm
    "attention",        # anything of the mixer: q, k, v, o, their norms, and recurrent (ssm, shortconv) weights
    "ffn",              # the dense feed-forward block and its norm
    "expert",           # routed experts: only `expert_used_count` of them work on one token
    "shared_expert",    # experts every token passes through
    "router",           # the gate that picks the experts
    "other",            # rope factors, per-layer scales and the like
]  # fmt: skip

Scalar = int | float | bool | str
MetadataValue = Scalar | tuple[int | float | bool, ...]


class Tensor(Struct, frozen=True, kw_only=True):
    """One tensor as stored. `shape` is in the file's own order (GGUF: fastest dimension first)."""

    name: str
    shape: tuple[int, ...]
    type: str  # the format's own word: "Q4_K", "F16", "BF16"
    n_bytes: int
    layer: int | None  # block number, or None outside of the blocks
    kind: TensorClass


class Hyperparameters(Struct, frozen=True, kw_only=True):
    """The numbers every planner needs. Per-layer ones are tuples of length `n_layer`, also where the file gives one.

    `n_layer` counts every block in the file, multi-token-prediction (`n_layer_nextn`, at the end) included.
    """

    n_layer: int
    n_layer_nextn: int = 0
    n_ctx_train: int
    n_embd: int
    n_vocab: int
    n_ff: tuple[int, ...]
    n_head: tuple[int, ...]
    n_head_kv: tuple[int, ...]  # 0: this layer keeps no attention cache
    head_dim_k: int
    head_dim_v: int
    n_expert: int = 0
    n_expert_used: int = 0
    n_ff_expert: int = 0


class ModelFile(Struct, frozen=True, kw_only=True):
    """One file of the model, in load order. `path` is absolute, or a URL."""

    path: str
    n_bytes: int


class Model(Struct, frozen=True, kw_only=True):
    """A model as read from its header alone.

    `path` is what a runtime is given: the file, the first shard, or the directory.
    `metadata` holds the header's scalars, its short strings and its short numeric arrays; tokenizer arrays are not
    built (their lengths are there, as `"<key>.length"`). `alias`: its name in Ollama's store, where it was found by it.
    `beside`: names of files in its directory that are no part of it, and that a runtime obeys all the same.
    """

    path: str
    files: tuple[ModelFile, ...]
    format: Format
    architecture: str
    name: str
    quantization: str
    parameters: int
    hyper: Hyperparameters
    tensors: tuple[Tensor, ...]
    metadata: Mapping[str, MetadataValue]
    alias: str | None = None
    beside: tuple[str, ...] = ()

    @property
    def weights_bytes(self) -> int:
        """All tensors as stored, without header and padding."""
        return sum(tensor.n_bytes for tensor in self.tensors)

    @property
    def file_bytes(self) -> int:
        return sum(file.n_bytes for file in self.files)

    @property
    def is_moe(self) -> bool:
        return self.hyper.n_expert > 0

    def bytes_by_class(self) -> dict[TensorClass, int]:
        """Stored bytes of each tensor class that occurs, largest first."""
        sums: dict[TensorClass, int] = {}
        for tensor in self.tensors:
            sums[tensor.kind] = sums.get(tensor.kind, 0) + tensor.n_bytes
        return dict(sorted(sums.items(), key=lambda item: -item[1]))


#: Bits a KV-cache element takes on average, by llama.cpp's names (blocks and scales included).
KV_TYPES: Final = ("f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "iq4_nl", "q4_1", "q4_0")
