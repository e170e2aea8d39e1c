"""How Ollama is held to a plan: by the server that runs, or by one of our own; and what neither can be held to.

A running server takes num_ctx, num_gpu and main_gpu from the model. Which cards it sees, how it shares them, its cache
type and its number of slots it has from its environment, which nobody else can change (ollama fb30760,
envconfig/config.go, server/sched.go, api/types.go Runner).
"""

from __future__ import annotations

from collections.abc import Iterator

from msgspec import Struct

from mgpu.model import Model
from mgpu.plan import Layout
from mgpu.rig import Gpu, Rig
from mgpu_adapters.ollama.predict import predict
from mgpu_adapters.ollama.server import Era, library


class Asked(Struct, frozen=True, kw_only=True):
    """What a server is to do with one model. `version`: the server's; `apart`: it must have an address of its own."""

    model: Model
    version: str
    era: Era
    ctx: int  # for each user
    users: int
    kv_type: str
    apart: bool = False


class Held(Struct, frozen=True, kw_only=True):
    """The parameters that a running server is given, and what of the plan they leave to chance, a few words each."""

    num_gpu: int | None = None
    main_gpu: int | None = None
    unheld: tuple[str, ...] = ()


def hold(asked: Asked, layout: Layout, rig: Rig) -> Held:
    """What a running server, which sees all cards of `rig`, is given for `layout`."""
    unheld = list(_fixed(asked, layout))
    if not layout.gpus:
        return Held(num_gpu=0 if rig.gpus else None, unheld=tuple(unheld))
    if asked.era != ">=0.30":
        return _held_before(asked, layout, rig, unheld)
    num_gpu = layers_on_cards(layout)
    if len(layout.gpus) > 1:
        unheld.append("it shares layers over all cards by their free memory")
        return Held(num_gpu=num_gpu, unheld=tuple(unheld))
    main_gpu, doubt = _main_gpu(asked, layout.gpus[0], rig)
    return Held(num_gpu=num_gpu, main_gpu=main_gpu, unheld=(*unheld, *doubt))


def layers_on_cards(layout: Layout) -> int:
    """As llama.cpp's --n-gpu-layers counts them: the output is one."""
    return max(layout.counts) if layout.shape.mode == "tensor" else sum(layout.counts)


def _fixed(asked: Asked, layout: Layout) -> Iterator[str]:
    if asked.apart:
        yield "it listens where it does: --host and --port have no effect on it"
    if asked.users > 1:
        yield f"it may not have {asked.users} slots (OLLAMA_NUM_PARALLEL)"
    if asked.kv_type != "f16":
        yield f"its cache may not be {asked.kv_type} (OLLAMA_KV_CACHE_TYPE)"
    if layout.shape.mode == "tensor":
        yield "it splits by layers, not into tensor ranks"
    if layout.shape.host_experts:
        yield "it keeps no experts on the CPU apart from their layers"


def _held_before(asked: Asked, layout: Layout, rig: Rig, unheld: list[str]) -> Held:
    """Before 0.30: main_gpu is a hint, and num_gpu spreads over all cards; what it would do unasked must do."""
    would = predict(asked.model, rig, version=asked.version, ctx=asked.ctx, parallel=asked.users)
    if set(would.gpus) != set(layout.gpus):
        unheld.append(f"it would use {_cards(would.gpus)}, not {_cards(layout.gpus)}")
    partly = layout.shape.host_layers > 0
    if partly and len(rig.gpus) > 1:
        unheld.append("told a number of layers, it spreads them over all cards")
    return Held(num_gpu=sum(layout.counts) if partly else None, unheld=tuple(unheld))


def _main_gpu(asked: Asked, index: int, rig: Rig) -> tuple[int | None, tuple[str, ...]]:
    """The number of a card among those of its library, as the server counts them: sure only where all are alike.

    CUDA's own order is fastest first, and only CUDA_DEVICE_ORDER in the server's environment changes that.
    """
    card = next(gpu for gpu in rig.gpus if gpu.index == index)
    peers = [gpu for gpu in rig.gpus if library(gpu) == library(card)]
    if len(rig.gpus) == 1:
        return None, ()
    if len(peers) == len(rig.gpus) and len({_kind(gpu) for gpu in peers}) == 1:
        return peers.index(card), ()
    would = predict(asked.model, rig, version=asked.version, ctx=asked.ctx, parallel=asked.users)
    if would.gpus == (index,):
        return None, ()
    return None, (
        f"it would use {_cards(would.gpus)}, not {_cards((index,))}; how it numbers unlike cards is its secret",
    )


def _kind(gpu: Gpu) -> tuple[str, int]:
    return gpu.name, gpu.total_bytes


def _cards(gpus: tuple[int, ...]) -> str:
    return f"GPU {'+'.join(map(str, gpus))}" if gpus else "the CPU"
