"""A plan as one `vllm serve` command line: all explicit, nothing left to defaults that change between versions."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate, pairwise
from typing import Final

from msgspec import Struct

from mgpu.adapter import Command, Endpoint, Installed
from mgpu.errors import DoesNotFitError, RuntimeMissingError, UsageError
from mgpu.plan import Layout
from mgpu.rig import Gpu, Rig
from mgpu.units import GB
from mgpu_adapters.vllm.checks import check_cards, check_pipeline, check_tensor_parallel, needs_half
from mgpu_adapters.vllm.flags import Given
from mgpu_adapters.vllm.memory import SHARES, Footprint
from mgpu_adapters.vllm.partition import layer_partition
from mgpu_adapters.vllm.serving import LEAVES, SCRUB, addresses, fingerprint_of, metrics_of, secret, version_of

#: vLLM's own default since 0.21; more is taken only where the model needs it.
USUAL_SHARE: Final = 9200

#: UUIDs in CUDA_VISIBLE_DEVICES crash older versions, and short ones newer too; the flag came with #21489.
_UUIDS_SINCE: Final = (0, 24)
_KV_BYTES_SINCE: Final = (0, 11)
#: vLLM gives up after 600 s of loading, however much there is to read: 40 GB come at 70 MB/s in that time.
_LARGE: Final = 40 * GB
_PATIENCE_S: Final = "7200"
FULL_UUID: Final = re.compile(r"GPU-[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}")


class Stage(Struct, frozen=True, kw_only=True):
    """One pipeline stage: its card, its layers, and as units these and, on the last, the output. A rank has all."""

    gpu: Gpu
    layers: range
    span: range


class Allotment(Struct, frozen=True, kw_only=True):
    """`--gpu-memory-utilization` in ten-thousandths; the cache's bytes on each card where no one share can do."""

    share: int
    kv_cache_memory_bytes: int | None = None


class Serving(Struct, frozen=True, kw_only=True):
    """`vllm serve` for one layout: what follows the program's name, and the variables that go with it."""

    arguments: tuple[str, ...]
    env: Mapping[str, str]
    gpus: tuple[Gpu, ...]
    n_ranks: int
    n_stages: int


def build_command(
    need: Footprint, layout: Layout, rig: Rig, endpoint: Endpoint, *, installed: Installed, given: Given
) -> Command:
    """argv, environment and addresses for `layout`, without the flags after `--`. Raises as `serving` does."""
    version = version_of(installed)
    served = serving(need, layout, rig, endpoint, version=version, given=given)
    ready_url, base = addresses(endpoint)
    return Command(
        argv=(installed.executable, *served.arguments),
        devices=tuple(f"cuda:{place}" for place in range(len(layout.gpus))),
        env=visibility(served.gpus, rig, version) | dict(served.env) | secret(endpoint),
        scrub=SCRUB,
        files={},
        ready_url=ready_url,
        endpoint=base,
        fingerprint=fingerprint_of(served.n_ranks, served.n_stages, given),
        leaves=LEAVES,
        metrics_url=metrics_of(base),
    )


def serving(
    need: Footprint, layout: Layout, rig: Rig, endpoint: Endpoint, *, version: tuple[int, int], given: Given
) -> Serving:
    """`serve` and its flags.

    Raises `RefusedError` for cards or splits that vLLM refuses, `DoesNotFitError` where no share of memory would do.
    """
    stages, cut = stages_of(layout, rig), layout.shape.mode == "tensor"
    gpus = tuple(stage.gpu for stage in stages)
    check_cards(need.model, gpus)
    if cut:
        check_tensor_parallel(need.model, len(stages))
        need = need.ranked(len(stages))
    else:
        check_pipeline(need.model, len(stages))
    n_ranks = len(stages) if cut else 1
    n_stages = len(stages) // n_ranks
    _check_number(need, n_stages)
    arguments = ["serve", need.model.path]
    for name, value in _options(need, stages, endpoint, version, n_ranks=n_ranks):
        if name not in given:
            arguments += [f"--{name}", value]
    env = {} if need.model.weights_bytes < _LARGE else {"VLLM_ENGINE_READY_TIMEOUT_S": _PATIENCE_S}
    if n_stages > 1:
        env["VLLM_PP_LAYER_PARTITION"] = ",".join(str(len(stage.layers)) for stage in stages)
    return Serving(arguments=tuple(arguments), env=env, gpus=gpus, n_ranks=n_ranks, n_stages=n_stages)


def stages_of(layout: Layout, rig: Rig) -> tuple[Stage, ...]:
    """The stages of a layout, or its ranks; cards without units are none."""
    by_index = {gpu.index: gpu for gpu in rig.gpus}
    if layout.shape.mode == "tensor":
        whole = zip(layout.gpus, layout.spans(), strict=True)
        return tuple(Stage(gpu=by_index[index], layers=span[:-1], span=span) for index, span in whole)
    used = [(by_index[index], count) for index, count in zip(layout.gpus, layout.counts, strict=True) if count]
    ends = list(accumulate(layer_partition([count for _, count in used]), initial=0))
    layers = [range(start, end) for start, end in pairwise(ends)]
    spans = [*layers[:-1], range(layers[-1].start, layers[-1].stop + 1)]
    return tuple(
        Stage(gpu=gpu, layers=held, span=span) for (gpu, _), held, span in zip(used, layers, spans, strict=True)
    )


def allot(need: Footprint, stages: Sequence[Stage]) -> Allotment:
    """The one share that suits every card: the usual one, more where a stage needs it, never more than is free.

    A share is of *total* memory, the same for all cards. Where a crowded card allows less than another needs, vLLM is
    given the cache's bytes instead, and then holds to the share at its start only.
    """
    shares = [need.share(stage.span, len(stages), stage.gpu) for stage in stages]
    most, least = min(share.most for share in shares), max(share.least for share in shares)
    if most < 1:
        raise DoesNotFitError(
            "a GPU of the plan has no free memory for vLLM", hint="free some, or leave it out: --gpus"
        )
    if least <= most or any(share.least > share.most for share in shares):
        return Allotment(share=min(most, max(least, USUAL_SHARE)))
    batch = batch_tokens(need, stages)
    cache = max(need.kv_bytes(stage.span, len(stages), batch) for stage in stages)
    return Allotment(share=most, kv_cache_memory_bytes=cache)


def batch_tokens(need: Footprint, stages: Sequence[Stage]) -> int:
    """`--max-num-batched-tokens`: what the smallest of the cards is planned with."""
    return min(need.batch_tokens(stage.gpu) for stage in stages)


def visibility(gpus: Sequence[Gpu], rig: Rig, version: tuple[int, int]) -> dict[str, str]:
    """Variables that show vLLM only `gpus`; its rank k uses the k-th. UUIDs where this version takes them.

    Else the driver's number; of AMD cards, the number among them.
    """
    if gpus[0].vendor == "amd":
        ours = [gpu.index for gpu in rig.gpus if gpu.vendor == "amd"]
        return {"HIP_VISIBLE_DEVICES": ",".join(str(ours.index(gpu.index)) for gpu in gpus)}
    indices = ",".join(str(gpu.index) for gpu in gpus)  # the driver's own: NVIDIA's come first in a rig
    uuids = [gpu.uuid for gpu in gpus if gpu.uuid is not None and FULL_UUID.fullmatch(gpu.uuid)]
    named = len(uuids) == len(gpus) and version >= _UUIDS_SINCE
    return {"CUDA_DEVICE_ORDER": "PCI_BUS_ID", "CUDA_VISIBLE_DEVICES": ",".join(uuids) if named else indices}


def _options(
    need: Footprint, stages: Sequence[Stage], endpoint: Endpoint, version: tuple[int, int], *, n_ranks: int
) -> Iterator[tuple[str, str]]:
    """Our flags, in the order people read them: where, what, how much."""
    settings = need.settings
    yield "host", endpoint.host
    yield "port", str(endpoint.port)
    yield "tensor-parallel-size", str(n_ranks)
    yield "pipeline-parallel-size", str(len(stages) // n_ranks)
    yield "max-model-len", str(settings.max_model_len)
    yield "max-num-seqs", str(settings.max_num_seqs)
    yield "max-num-batched-tokens", str(batch_tokens(need, stages))
    yield "kv-cache-dtype", settings.kv_cache_dtype
    allotment = allot(need, stages)
    yield "gpu-memory-utilization", f"{allotment.share / SHARES:.4f}"
    if allotment.kv_cache_memory_bytes is not None and settings.utilization is None:
        if version < _KV_BYTES_SINCE:
            raise RuntimeMissingError(
                "this vLLM is too old for cards of which different shares are free (no --kv-cache-memory-bytes)",
                hint="update it: uv tool install vllm; or free memory on the fuller card",
            )
        yield "kv-cache-memory-bytes", str(allotment.kv_cache_memory_bytes)
    if needs_half(need.model, [stage.gpu for stage in stages]):
        yield "dtype", "half"


def _check_number(need: Footprint, n_stages: int) -> None:
    asked = need.settings.pipeline_parallel_size
    if asked is not None and asked != n_stages:
        raise UsageError(
            f"--pipeline-parallel-size {asked} after `--` needs {asked} GPUs, and the plan has {n_stages}",
            hint="leave it out: mgpu takes as many as the model needs; --gpus says which to consider",
        )
