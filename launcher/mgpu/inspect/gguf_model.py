"""GGUF headers to `Model`: hyperparameters by architecture key, tensor classes by name.

Any architecture will do: what the generic keys say is what holds. No regular expressions: compiling them takes longer
than all that is done here. Sources: llama.cpp b11434 `src/llama-model.cpp` load_hparams, `src/llama-arch.cpp` (keys,
tensor names), `include/llama.h` (file types).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import PurePath
from typing import Final

from mgpu.errors import BadModelError
from mgpu.inspect.foreign import shown
from mgpu.inspect.gguf import Header
from mgpu.model import Hyperparameters, MetadataValue, Model, ModelFile, Tensor, TensorClass

_MAX_LAYERS: Final = 512  # LLAMA_MAX_LAYERS
_MAX_EXPERTS: Final = 1024  # LLAMA_MAX_EXPERTS
_MAX_NUMBER: Final = (1 << 31) - 1

#: general.file_type -> label (`enum llama_ftype`).
FILE_TYPES: Final = {
    0: "F32", 1: "F16", 2: "Q4_0", 3: "Q4_1", 7: "Q8_0", 8: "Q5_0", 9: "Q5_1", 10: "Q2_K", 11: "Q3_K_S", 12: "Q3_K_M",
    13: "Q3_K_L", 14: "Q4_K_S", 15: "Q4_K_M", 16: "Q5_K_S", 17: "Q5_K_M", 18: "Q6_K", 19: "IQ2_XXS", 20: "IQ2_XS",
    21: "Q2_K_S", 22: "IQ3_XS", 23: "IQ3_XXS", 24: "IQ1_S", 25: "IQ4_NL", 26: "IQ3_S", 27: "IQ3_M", 28: "IQ2_S",
    29: "IQ2_M", 30: "IQ4_XS", 31: "IQ1_M", 32: "BF16", 36: "TQ1_0", 37: "TQ2_0", 38: "MXFP4_MOE", 39: "NVFP4",
    40: "Q1_0", 41: "Q2_0",
}  # fmt: skip

#: Start of a tensor's name, the block's prefix taken off -> its class, after routers and experts are sorted out.
_CLASSES: Final[tuple[tuple[tuple[str, ...], TensorClass], ...]] = (
    (("token_embd", "per_layer_token_embd", "position_embd", "token_types"), "token_embedding"),
    (("output", "cls", "dense_2", "dense_3"), "output"),
    (("attn", "cross_attn", "post_attention", "ssm_", "shortconv", "time_mix", "indexer"), "attention"),
    (("ffn", "post_ffw", "pre_ffw", "channel_mix"), "ffn"),
)
_ROUTERS: Final = ("ffn_gate_inp", "ffn_gate_tid2eid", "exp_probs_b")
_EXPERTS: Final = ("ffn_up", "ffn_down", "ffn_gate")
_ATTENTION: Final = (".attn_q.", ".attn_k.", ".attn_v.", ".attn_qkv.")

#: general.type, or general.architecture, of files that are no model of their own.
_NOT_A_MODEL: Final = {
    "adapter": ("a LoRA adapter", "pass the model it was made for; after --, give llama-server: --lora FILE"),
    "clip": ("a vision projector (mmproj)", "pass the main model; after --, give llama-server: --mmproj FILE"),
    "mmproj": ("a vision projector (mmproj)", "pass the main model; after --, give llama-server: --mmproj FILE"),
    "imatrix": ("an importance matrix for quantisation", "pass the model itself"),
    "vocab": ("only a vocabulary", "pass the model itself"),
}


def build_model(headers: Sequence[Header], files: tuple[ModelFile, ...]) -> Model:
    """The model in these headers, one per file, in load order. Raises `BadModelError`."""
    keys = _Keys(headers[0].metadata, files[0].path)
    _check_is_model(keys, headers)
    keys.architecture = _architecture(keys)
    hyper = _hyperparameters(keys, headers)
    tensors = _tensors(keys, headers, hyper.n_layer)
    if 0 in hyper.n_head:
        _check_heads(keys, tensors, hyper.n_head)
    return Model(
        path=files[0].path,
        files=files,
        format="gguf",
        architecture=keys.architecture,
        name=_printable(headers[0].metadata.get("general.name")) or _printable(PurePath(files[0].path).stem),
        quantization=_quantization(headers[0].metadata, tensors),
        parameters=sum(math.prod(tensor.shape) for tensor in tensors),
        hyper=hyper,
        tensors=tensors,
        metadata=headers[0].metadata,
    )


class _Keys:
    """Metadata with the architecture's prefix, and complaints that name the key, the value and the file."""

    def __init__(self, metadata: Mapping[str, MetadataValue], origin: str) -> None:
        self.metadata = metadata
        self.origin = shown(origin)
        self.architecture = ""

    def bad(
        self, what: str, hint: str = "the file is damaged or badly converted: get another GGUF of it"
    ) -> BadModelError:
        return BadModelError(f"{self.origin}: {what}", hint=hint)

    def integer(self, key: str, default: int | None = None, *, low: int = 0, high: int = _MAX_NUMBER) -> int:
        """`<architecture>.<key>`, within bounds; `default`, if it is absent, and not required (None)."""
        name = f"{self.architecture}.{key}"
        value = self.metadata.get(name, default)
        if value is None:
            raise self.bad(f"the header has no {name}")
        return self._checked(name, value, low, high)

    def per_layer(self, key: str, default: Sequence[int], *, high: int = _MAX_NUMBER) -> tuple[int, ...]:
        """`<architecture>.<key>`, one number or one for each layer, as a tuple of `len(default)`."""
        name = f"{self.architecture}.{key}"
        value = self.metadata.get(name)
        n_given = len(value) if isinstance(value, tuple) else self.metadata.get(f"{name}.length")
        if value is None and n_given is None:
            return tuple(default)
        if n_given is not None and n_given != len(default):
            raise self.bad(f"{name} has {shown(str(n_given))} values for {len(default)} layers")
        if isinstance(value, tuple):
            return tuple(self._checked(name, number, 0, high) for number in value)
        return (self._checked(name, value, 0, high),) * len(default)

    def _checked(self, name: str, value: MetadataValue | None, low: int, high: int) -> int:
        if isinstance(value, bool) or not isinstance(value, int):
            raise self.bad(f"{name} is {shown(repr(value))}, it must be a whole number")
        if not low <= value <= high:
            raise self.bad(f"{name} is {value}, it must be {low} to {high}")
        return value


def _check_is_model(keys: _Keys, headers: Sequence[Header]) -> None:
    for key in ("general.type", "general.architecture"):
        found = _NOT_A_MODEL.get(str(keys.metadata.get(key)))
        if found is not None:
            what, hint = found
            raise keys.bad(f"this is {what}, not a model ({key} = {keys.metadata[key]})", hint)
    if not any(header.tensors for header in headers):
        raise keys.bad("this file holds no tensors, only a vocabulary or metadata", "pass the model itself")


def _architecture(keys: _Keys) -> str:
    architecture = keys.metadata.get("general.architecture")
    if architecture is None:
        raise keys.bad("the header has no general.architecture")
    if not isinstance(architecture, str) or not _is_name(architecture):
        raise keys.bad(f"general.architecture is {shown(repr(architecture))}, not the name of an architecture")
    return architecture


def _is_name(text: str) -> bool:
    return 0 < len(text) <= 64 and text.isascii() and all(letter.isalnum() or letter in "._+-" for letter in text)


def _hyperparameters(keys: _Keys, headers: Sequence[Header]) -> Hyperparameters:
    n_layer = keys.integer("block_count", low=1, high=_MAX_LAYERS)
    n_embd = keys.integer("embedding_length", low=1)
    n_head = keys.per_layer("attention.head_count", (0,) * n_layer)
    n_expert, n_expert_used = _experts(keys, n_layer)
    head_dim = n_embd // n_head[0] if n_head[0] else 0
    return Hyperparameters(
        n_layer=n_layer,
        n_layer_nextn=keys.integer("nextn_predict_layers", 0, high=n_layer),
        n_ctx_train=keys.integer("context_length", low=1),
        n_embd=n_embd,
        n_vocab=_n_vocab(keys, headers),
        n_ff=keys.per_layer("feed_forward_length", (0,) * n_layer),
        n_head=n_head,
        n_head_kv=keys.per_layer("attention.head_count_kv", n_head),
        head_dim_k=keys.integer("attention.key_length", head_dim),
        head_dim_v=keys.integer("attention.value_length", head_dim),
        n_expert=n_expert,
        n_expert_used=n_expert_used,
        n_ff_expert=_n_ff_expert(keys, headers, n_layer) if n_expert else 0,
    )


def _experts(keys: _Keys, n_layer: int) -> tuple[int, int]:
    """How many routed experts there are, and how many of them one token uses, at most."""
    n_expert = keys.integer("expert_count", 0, high=_MAX_EXPERTS)
    n_used = max(keys.per_layer("expert_used_count", (0,) * n_layer))
    if keys.architecture in {"hunyuan-dense", "hunyuan_vl"} and n_expert <= 1:  # as load_hparams does
        return 0, 0
    if n_used > n_expert:
        raise keys.bad(f"expert_used_count is {n_used}, more than expert_count, {n_expert}")
    if n_expert and not n_used:
        raise keys.bad(f"expert_count is {n_expert}, but expert_used_count is 0 or missing")
    return n_expert, n_used


def _n_ff_expert(keys: _Keys, headers: Sequence[Header], n_layer: int) -> int:
    """By key; else, as for Mixtral, from the experts' own shape: [n_embd, n_ff_expert, n_expert]."""
    by_key = max(keys.per_layer("expert_feed_forward_length", (0,) * n_layer))
    if by_key:
        return by_key
    shapes = (tensor.shape for header in headers for tensor in header.tensors if ".ffn_up_exps." in tensor.name)
    return next((shape[1] for shape in shapes if len(shape) == 3), 0)


def _n_vocab(keys: _Keys, headers: Sequence[Header]) -> int:
    """The length of the token list, as in `src/llama-vocab.cpp`; without one, by key; else the embedding's rows."""
    n_tokens = keys.metadata.get("tokenizer.ggml.tokens.length")
    if isinstance(n_tokens, int) and n_tokens > 0:
        return n_tokens
    embeddings = (t.shape for header in headers for t in header.tensors if t.name == "token_embd.weight")
    return keys.integer("vocab_size", next((shape[1] for shape in embeddings if len(shape) == 2), 0))


def _tensors(keys: _Keys, headers: Sequence[Header], n_layer: int) -> tuple[Tensor, ...]:
    """All tensors, with their block and class. Raises for a block the model does not have."""
    kinds: dict[str, TensorClass] = {}
    tensors: list[Tensor] = []
    for header in headers:
        for info in header.tensors:
            stack, layer, rest = _in_block(info.name)
            if layer is not None and layer >= n_layer:
                if not stack:
                    raise keys.bad(
                        f"the tensor {shown(info.name)} is beyond the last block, {n_layer - 1} (block_count)"
                    )
                layer = None  # a decoder may have more blocks than block_count, the encoder's
            kind = kinds.get(rest)
            if kind is None:
                kind = kinds[rest] = _classify(rest)
            tensors.append(
                Tensor(name=info.name, shape=info.shape, type=info.type, n_bytes=info.n_bytes, layer=layer, kind=kind)
            )
    return tuple(tensors)


def _in_block(name: str) -> tuple[str, int | None, str]:
    """`"blk.7.attn_q.weight"` as `("", 7, "attn_q.weight")`; `"enc."` or `"dec."` first for encoder-decoder models."""
    stack, block, tail = name.partition("blk.")
    number, dot, rest = tail.partition(".")
    if block and dot and number.isdecimal() and number.isascii() and stack in {"", "enc.", "dec."}:
        return stack, int(number), rest
    return "", None, name.removeprefix("enc.").removeprefix("dec.")


def _classify(name: str) -> TensorClass:
    """`name` without the block's prefix."""
    if name.startswith(_ROUTERS):
        return "router"
    if "_shexp" in name or (name.startswith("ffn") and "shared" in name):
        return "shared_expert"
    if name.startswith(_EXPERTS) and ("exps." in name or name.partition(".")[2][:1].isdecimal()):  # "ffn_up.3.weight"
        return "expert"
    return next((kind for starts, kind in _CLASSES if name.startswith(starts)), "other")


def _check_heads(keys: _Keys, tensors: Iterable[Tensor], n_head: tuple[int, ...]) -> None:
    for tensor in tensors:
        if tensor.layer is not None and not n_head[tensor.layer] and _computes_attention(tensor.name):
            raise keys.bad(f"head_count is 0 or missing for block {tensor.layer}, which has {shown(tensor.name)}")


def _computes_attention(name: str) -> bool:
    return any(part in name for part in _ATTENTION)


def _quantization(metadata: Mapping[str, MetadataValue], tensors: Iterable[Tensor]) -> str:
    """The label of general.file_type; else the type of the most bytes."""
    file_type = metadata.get("general.file_type")
    if isinstance(file_type, int) and (label := FILE_TYPES.get(file_type & ~1024)):  # 1024: LLAMA_FTYPE_GUESSED
        return label
    sums: dict[str, int] = {}
    for tensor in tensors:
        sums[tensor.type] = sums.get(tensor.type, 0) + tensor.n_bytes
    return max(sums, key=lambda name: sums[name])


def _printable(text: MetadataValue | None) -> str:
    """Text from the file that will be printed: no control characters, and not without end."""
    if not isinstance(text, str):
        return ""
    return "".join(letter if letter.isprintable() else " " for letter in text[:200]).strip()
