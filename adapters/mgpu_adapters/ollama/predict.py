"""What Ollama's own scheduler will predict for a model, and therefore do. A prediction of it: nothing is measured.

Three eras (sources, all of ollama/ollama):
- up to 0.11.4: `server/sched.go` pickBestFullFitByLibrary, `llm/memory.go` EstimateGPULayers (v0.11.4): an estimate;
  one card if it fits, else all of one library.
- 0.11.5 to 0.29: `llm/server.go` buildLayout, assignLayers, findBestFit, greedyFit (v0.24.0, the last before 0.30):
  layer sizes; the fewest cards, most free first. Ollama's own engine measures them there; here they are estimated.
  (0.11.5 to 0.12 put llama.cpp's models through the older estimate, over the same growing set of cards.)
- from 0.30: `server/sched.go` selectLlamaServerPlacement, `llm/llama_server.go` PredictServerVRAM (fb30760,
  v0.33.0-rc2): file and f16 cache; one card if that is at most 80 % of what it has free, else all cards, and
  llama.cpp's fit decides the rest.

Not known here, and so not counted: projectors (mmproj), adapters, other models that are loaded.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from msgspec import Struct

from mgpu.errors import UsageError
from mgpu.model import Model
from mgpu.rig import Gpu, Rig
from mgpu.units import gib
from mgpu_adapters.ollama.estimate import Estimate
from mgpu_adapters.ollama.server import Era, Options, by_library, default_ctx, era_of, library

#: A card is taken alone if the prediction is at most this part of its free memory (0.30).
SINGLE_PERCENT: Final = 80
#: Forced to one slot (`server/sched.go` load).
ONE_SLOT: Final = frozenset({
    "mllama", "qwen3vl", "qwen3vlmoe", "qwen35", "qwen35moe", "qwen3next", "lfm2", "lfm2moe", "nemotron_h",
    "nemotron_h_moe", "nemotron_h_omni",
})  # fmt: skip


class Prediction(Struct, frozen=True, kw_only=True):
    """What Ollama is predicted to do. `layers` on each of `gpus`, output layer included; empty: llama.cpp decides."""

    version_era: Era
    predicted_bytes: int
    ctx: int  # tokens for each slot
    gpus: tuple[int, ...]  # rig indices; empty: the CPU
    layers: tuple[int, ...] = ()
    reason: str


def predict(
    model: Model, rig: Rig, *, version: str, ctx: int | None = None, parallel: int = 1, options: Options | None = None
) -> Prediction:
    """What this version of Ollama will do with `model` on the cards of `rig`, all of which it sees.

    Raises `UsageError` for a version that is none, and for models Ollama does not predict.
    """
    if model.format != "gguf":
        raise UsageError(f"Ollama's scheduler predicts GGUF only, not {model.format}", hint="use a GGUF of the model")
    if parallel < 1 or (ctx is not None and ctx < 1):
        raise UsageError(f"not a context: {ctx} tokens for {parallel} users", hint="give whole numbers above 0")
    options = options or Options()
    era = era_of(version)
    asked = ctx or default_ctx(version, rig.gpus, options.gpu_overhead)
    if era != "<=0.11.4" and model.hyper.n_ctx_train:  # before, the scheduler reckoned with what was asked for
        asked = min(asked, model.hyper.n_ctx_train)
    slots = 1 if model.architecture in ONE_SLOT else parallel
    if era == ">=0.30":
        return _by_free_memory(model, rig, asked, slots, options)
    return _by_estimate(model, rig, asked, slots, options, era)


def predict_server_vram(model: Model, n_ctx: int) -> int:
    """File size and an f16 cache of `n_ctx` tokens, with the heads of the layer that has fewest. No buffers."""
    head_dim = model.hyper.n_embd // max(*_heads(model), 1)
    n_head_kv = min(_heads(model, "attention.head_count_kv")) or 1
    return model.file_bytes + 2 * model.hyper.n_layer * n_head_kv * head_dim * n_ctx * 2


def _heads(model: Model, key: str = "attention.head_count") -> tuple[int, ...]:
    """As the file says it, where mgpu's own numbers say which layers really keep a cache."""
    stated = model.metadata.get(f"{model.architecture}.{key}")
    if isinstance(stated, tuple):
        return tuple(int(each) for each in stated)
    if isinstance(stated, int):
        return (stated,)
    return model.hyper.n_head_kv if key.endswith("_kv") else model.hyper.n_head


def _by_estimate(model: Model, rig: Rig, ctx: int, slots: int, options: Options, era: Era) -> Prediction:
    old = era == "<=0.11.4"
    if not rig.gpus or options.num_gpu == 0:
        why = "num_gpu is 0: on the CPU" if rig.gpus else "no card: on the CPU"
        return Prediction(version_era=era, predicted_bytes=0, ctx=ctx, gpus=(), reason=why)
    n_ctx = max(ctx * slots, 2048) if old else ctx * slots
    estimate = Estimate(model, n_ctx, slots, options, measures=not old)
    load = estimate.one_or_all(rig.gpus) if old else estimate.fewest(rig.gpus)
    return Prediction(
        version_era=era,
        predicted_bytes=load.n_bytes if load.used else 0,
        ctx=ctx,
        gpus=tuple(gpu for gpu in load.gpus if gpu in load.used),
        layers=tuple(count for count in load.layers if count),
        reason=load.reason,
    )


def _by_free_memory(model: Model, rig: Rig, ctx: int, slots: int, options: Options) -> Prediction:
    predicted = predict_server_vram(model, ctx * slots)
    gpus, reason = _choose(rig, predicted, options)
    return Prediction(version_era=">=0.30", predicted_bytes=predicted, ctx=ctx, gpus=gpus, reason=reason)


def _choose(rig: Rig, predicted: int, options: Options) -> tuple[tuple[int, ...], str]:
    """Rig indices, and why these."""
    gpus = rig.gpus
    if not gpus or options.num_gpu == 0:
        return (), "num_gpu is 0: on the CPU" if gpus else "no card: on the CPU"
    if len(gpus) == 1:
        return (gpus[0].index,), "the only card: llama.cpp's fit decides how many layers go there"
    groups = by_library(gpus)
    if options.main_gpu is not None:
        named = [group[options.main_gpu] for group in groups if 0 <= options.main_gpu < len(group)]
        if named:
            return (min(named, key=lambda gpu: _rank(rig, gpu)).index,), f"main_gpu is {options.main_gpu}: it alone"
    fitting = [gpu for group in groups for gpu in group if predicted <= _available(rig, gpu) * SINGLE_PERCENT // 100]
    if fitting and options.main_gpu is None and not options.sched_spread:
        best = min(fitting, key=lambda gpu: _rank(rig, gpu))
        free = gib(_available(rig, best))
        words = f"{gib(predicted)} predicted is at most {SINGLE_PERCENT} % of the {free} free on GPU {best.index}"
        return (best.index,), f"{words}, which has most free memory of those: it alone"
    group = min(groups, key=lambda group: _group_rank(rig, group))
    return tuple(gpu.index for gpu in group), _why_all(rig, predicted, options, group)


def _why_all(rig: Rig, predicted: int, options: Options, group: Sequence[Gpu]) -> str:
    rest = f"{_count(group)}, layers by llama.cpp's fit"
    if options.main_gpu is not None:
        return f"main_gpu is {options.main_gpu}, which is no card: {rest}"
    if options.sched_spread:
        return f"OLLAMA_SCHED_SPREAD: {rest}"
    most = max(_available(rig, gpu) for gpu in rig.gpus)
    return f"{gib(predicted)} predicted is over {SINGLE_PERCENT} % of the {gib(most)} free on the best card: {rest}"


def _count(group: Sequence[Gpu]) -> str:
    return f"all {len(group)} {library(group[0])} cards" if len(group) > 1 else f"the {library(group[0])} card"


def _available(rig: Rig, gpu: Gpu) -> int:
    """Free memory; of an integrated card no more than the RAM that is free, where that is known."""
    if gpu.unified and rig.ram_free_bytes:
        return min(gpu.free_bytes, rig.ram_free_bytes)
    return gpu.free_bytes


def _rank(rig: Rig, gpu: Gpu) -> tuple[bool, int]:
    """Discrete first, then most free; the first of equals."""
    return gpu.unified, -_available(rig, gpu)


def _group_rank(rig: Rig, group: Sequence[Gpu]) -> tuple[bool, int]:
    shared = sum(gpu.free_bytes for gpu in group if gpu.unified)
    if rig.ram_free_bytes:
        shared = min(shared, rig.ram_free_bytes)
    free = shared + sum(gpu.free_bytes for gpu in group if not gpu.unified)
    return all(gpu.unified for gpu in group), -free
