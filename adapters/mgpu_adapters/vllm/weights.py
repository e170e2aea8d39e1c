"""Weights as vLLM holds them: on each pipeline stage, and on each rank of a tensor-parallel group.

Prefix sums over units (blocks, and the output layer as the last), so that any stage is two look-ups.
"""

from __future__ import annotations

from itertools import accumulate, pairwise
from typing import Final

from mgpu.model import Model, Tensor
from mgpu_adapters.vllm.config import derived_max_len, n_main_layers, number, quant_method

#: Rows of embedding and head are padded to a multiple of this (vLLM 0.32.0 layers/vocab_parallel_embedding.py).
VOCAB_PADDING: Final = 64

#: Sides of MXFP4 experts are padded for the kernels: the feed-forward side to 128, the model's to 256 at most
#: (vLLM 0.32.0 layers/fused_moe/oracle/mxfp4.py).
_MXFP4_PADDING: Final = (128, 256)

#: Linear layers held whole on every rank: the low-rank halves of latent attention, and every gate to experts.
_WHOLE: Final = ("q_a_proj", "kv_a_proj", "fused_qkv_a_proj", "indexer")
_KEYS_VALUES: Final = ("k_proj.", "v_proj.")
_HEADS: Final = ("lm_head.", "embed_out.", "output_layer.")


class Weights:
    """A model's weights on one rank of `tp`. `tower` (images, sound) and `rotary` are on every stage."""

    def __init__(self, model: Model, tp: int = 1) -> None:
        n_layers = n_main_layers(model)
        blocks = [0] * n_layers
        experts = [0] * n_layers
        self.embedding = self.norm = 0
        self.tower = 0
        head = 0
        for tensor in model.tensors:
            n_bytes = rank_bytes(tensor, model, tp)
            if tensor.layer is not None:
                if tensor.layer < n_layers:  # later ones are for multi-token prediction
                    blocks[tensor.layer] += n_bytes
                    experts[tensor.layer] += n_bytes if tensor.kind == "expert" else 0
            elif tensor.kind == "token_embedding":
                self.embedding += n_bytes
            elif tensor.kind == "output" and any(name in tensor.name for name in _HEADS):
                head += n_bytes
            elif tensor.kind == "output":
                self.norm += n_bytes
            else:
                self.tower += n_bytes
        self.rotary = rotary_bytes(model)
        self.tied = head == 0
        self.head = self.embedding if self.tied else head
        self.n_layers = n_layers
        self._blocks = tuple(accumulate(blocks, initial=0))
        self._experts = tuple(accumulate(experts, initial=0))
        self._share = model.hyper.n_expert_used / model.hyper.n_expert if model.is_moe else 1.0

    def stage(self, span: range) -> int:
        """Bytes of a stage that holds these units: embedding on the first, norm and head on the last.

        A tied embedding is shared where one stage is both, and held twice otherwise (vLLM 0.32.0 models/llama.py).
        """
        last = min(span.stop, self.n_layers)
        total = self._blocks[last] - self._blocks[min(span.start, last)] + self.tower + self.rotary
        first = span.start == 0
        if first:
            total += self.embedding
        if span.stop > self.n_layers:
            total += self.norm + (0 if self.tied and first else self.head)
        return total

    @property
    def read_by_layer(self) -> tuple[list[float], list[float]]:
        """Bytes read for one token in each layer: all but routed experts, and the routed experts in use."""
        blocks = [float(after - before) for before, after in pairwise(self._blocks)]
        experts = [float(after - before) for before, after in pairwise(self._experts)]
        dense = [whole - routed for whole, routed in zip(blocks, experts, strict=True)]
        return dense, [each * self._share for each in experts]


def rotary_bytes(model: Model) -> int:
    """The table of sines and cosines, made once for all layers in 16 bits (vLLM 0.32.0 layers/rotary_embedding/).

    With it, Llama 3.1 8B is 14.9889 GiB, as vLLM prints.
    """
    width = number(model, "qk_rope_head_dim") or model.hyper.head_dim_k
    share = model.metadata.get("partial_rotary_factor", 1.0)
    return int(derived_max_len(model) * width * (share if isinstance(share, float | int) else 1.0)) * 2


def rank_bytes(tensor: Tensor, model: Model, tp: int = 1) -> int:
    """Bytes of one tensor on one rank, in the type vLLM loads it as. Norms and biases are held whole."""
    n_bytes = tensor.n_bytes
    if tensor.type == "F32" and len(tensor.shape) > 1:
        n_bytes //= 2  # `--dtype auto` makes 16 bits of a float32 model (vLLM 0.32.0 config/model.py)
    if tensor.layer is None:
        return _vocabulary_bytes(tensor, n_bytes, tp)
    if tensor.kind == "expert" and quant_method(model) in {"mxfp4", "gpt_oss_mxfp4"}:
        n_bytes = _padded_mxfp4(n_bytes, model)
    return n_bytes if tp == 1 else -(-n_bytes // shards(tensor, model, tp))


def shards(tensor: Tensor, model: Model, tp: int) -> int:
    """How many ranks share a block's tensor: none for norms and gates, at most one for each head of the cache."""
    if len(tensor.shape) < 2 or tensor.kind == "router" or any(name in tensor.name for name in _WHOLE):
        return 1
    if tensor.kind == "attention" and tensor.layer is not None and any(name in tensor.name for name in _KEYS_VALUES):
        return max(min(tp, model.hyper.n_head_kv[tensor.layer]), 1)
    return tp


def padded_vocabulary(rows: int) -> int:
    return -(-rows // VOCAB_PADDING) * VOCAB_PADDING


def _vocabulary_bytes(tensor: Tensor, n_bytes: int, tp: int) -> int:
    """Embedding and head are cut by rows; towers and what else is outside of the blocks is held whole."""
    is_head = tensor.kind == "output" and any(name in tensor.name for name in _HEADS)
    if len(tensor.shape) < 2 or not (is_head or tensor.kind == "token_embedding"):
        return n_bytes
    row = n_bytes // max(tensor.shape[0], 1)
    return -(-row * padded_vocabulary(tensor.shape[0]) // tp)


def _padded_mxfp4(n_bytes: int, model: Model) -> int:
    for side, step in zip((model.hyper.n_ff_expert, model.hyper.n_embd), _MXFP4_PADDING, strict=True):
        if side:
            n_bytes = -(-n_bytes * (-(-side // step) * step) // side)
    return n_bytes
