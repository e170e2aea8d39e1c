"""What ExLlamaV2 and ExLlamaV3 load as a whole, and in which order. Sources: `mgpu_adapters.exllama.memory`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal

from msgspec import Struct

from mgpu.errors import BadModelError, UsageError
from mgpu.model import Format, Model, Tensor
from mgpu.plan import HostBytes
from mgpu.units import MIB

ModuleKind = Literal["attention", "ffn", "block", "norm", "head"]


class Module(Struct, frozen=True, kw_only=True):
    """What a loader places as a whole. `stored` is as in the files, `made` what the loader adds to it."""

    unit: int  # block, or the number of blocks for norm and head
    kind: ModuleKind
    stored: int
    made: int
    slack: int  # torch's rounding

    @property
    def held(self) -> int:
        return self.stored + self.made + self.slack


def torch_slack(n_bytes: int) -> int:
    """What torch's allocator adds: segments of 2 MiB from 10 MiB up, 512 B below (PyTorch CUDACachingAllocator.cpp)."""
    step = 2 * MIB if n_bytes >= 10 * MIB else 512
    return -n_bytes % step


class Widths(Struct, frozen=True, kw_only=True):
    """A layer's dimensions, as the loaders' configuration has them: one for all layers."""

    hidden: int
    q: int
    kv: int
    ffn: int  # of one expert, where there are experts
    n_head: int
    n_head_kv: int
    head_dim: int
    vocab: int
    n_expert: int
    n_used: int


def widths(model: Model) -> Widths:
    hyper = model.hyper
    n_head, n_head_kv = max(hyper.n_head), max(hyper.n_head_kv)
    return Widths(
        hidden=hyper.n_embd,
        q=n_head * hyper.head_dim_k,
        kv=n_head_kv * hyper.head_dim_k,
        ffn=hyper.n_ff_expert if model.is_moe else max(hyper.n_ff),
        n_head=n_head,
        n_head_kv=n_head_kv,
        head_dim=hyper.head_dim_k,
        vocab=-(-hyper.n_vocab // 32) * 32,
        n_expert=hyper.n_expert,
        n_used=hyper.n_expert_used,
    )


def n_blocks(model: Model) -> int:
    """The blocks that are loaded: multi-token-prediction ones are not."""
    return model.hyper.n_layer - model.hyper.n_layer_nextn


def _module(unit: int, kind: ModuleKind, tensors: Iterable[Tensor]) -> Module:
    tensors = tuple(tensors)
    return Module(
        unit=unit,
        kind=kind,
        stored=sum(tensor.n_bytes for tensor in tensors),
        # V2 keeps q_perm, q_invperm (2 B an input row) and q_group_map (4 B) in place of the file's q_invperm (4 B).
        made=sum(tensor.n_bytes for tensor in tensors if tensor.name.endswith(".q_invperm")),
        slack=sum(torch_slack(tensor.n_bytes) for tensor in tensors),
    )


def _is_norm(tensors: Sequence[Tensor]) -> bool:
    return all(len(tensor.shape) == 1 for tensor in tensors)


def _output(model: Model) -> tuple[Module, Module]:
    """The final norm and the head. A model that ties its head to the embedding loads it a second time, on the card."""
    groups: dict[str, list[Tensor]] = {}
    for tensor in model.tensors:
        if tensor.kind == "output":
            groups.setdefault(tensor.name.rpartition(".")[0], []).append(tensor)
    norm = [tensor for group in groups.values() if _is_norm(group) for tensor in group]
    head = [tensor for group in groups.values() if not _is_norm(group) for tensor in group]
    head = head or [tensor for tensor in model.tensors if tensor.kind == "token_embedding" and len(tensor.shape) > 1]
    last = n_blocks(model)
    return _module(last, "norm", norm), _module(last, "head", head)


def modules(model: Model, format_: Format, *, halves: bool) -> tuple[Module, ...]:
    """In load order. `halves`: attention and feed-forward apart, as V2 places them; else whole blocks, as V3."""
    if model.format != format_:
        raise UsageError(f"{model.path} is {model.format}, not {format_}", hint="use --runtime auto")
    blocks: list[tuple[list[Tensor], list[Tensor]]] = [([], []) for _ in range(n_blocks(model))]
    for tensor in model.tensors:
        if tensor.layer is not None and tensor.layer < len(blocks):
            blocks[tensor.layer][tensor.kind != "attention"].append(tensor)
    if not blocks or not all(attention or rest for attention, rest in blocks):
        raise BadModelError(
            f"{model.path}: a block without tensors", hint="files are missing: download the model again"
        )
    found: list[Module] = []
    for unit, (attention, rest) in enumerate(blocks):
        if halves:
            found += (_module(unit, "attention", attention), _module(unit, "ffn", rest))
        else:
            found.append(_module(unit, "block", attention + rest))
    return (*found, *_output(model))


def host_bytes(model: Model) -> HostBytes:
    """The embedding: V2 loads it to index -1 (the CPU), V3's has the capability prefer_cpu."""
    embedding = sum(tensor.n_bytes for tensor in model.tensors if tensor.kind == "token_embedding")
    return HostBytes(weights=embedding, kv=0, compute=0)
