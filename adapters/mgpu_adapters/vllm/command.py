"""A plan as one `vllm serve` command line: all explicit, nothing left to defaults that change between versions."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from itertools import accumulate, pairwise
from typing import Final

from msgspec import Struct

from mgpu.adapter import Command, Endpoint, Installed
from mgpu.errors import DoesNotFitError, RuntimeMissingError, UsageError
from mgpu.plan import Layout
from mgpu.rig import Gpu, Rig
from mgpu_adapters.vllm.checks import check_cards, check_pipeline, check_tensor_parallel, needs_half
from mgpu_adapters.vllm.flags import Given
from mgpu_adapters.vllm.memory import SHARES, Footprint
from mgpu_adapters.vllm.partition import layer_partition

#: vLLM's own default since 0.21; more is taken only where the model needs it.
USUAL_SHARE: Final = 9200

#: UUIDs in CUDA_VISIBLE_DEVICES crash older versions, and short ones newer too; the flag came with #21489.
_UUIDS_SINCE: Final = (0, 24)
_KV_BYTES_SINCE: Final = (0, 11)
#: The newest version these modules know.
_NEWEST: Final = (0, 32)
_FULL_UUID: Final = re.compile(r"GPU-[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}")


class Stage(Struct, frozen=True, kw_only=True):
    """One pipeline stage: its card, its layers, and as units these and, on the last, the output. A rank has all."""

    gpu: Gpu
    layers: range
    span: range


class Allotment(Struct, frozen=True, kw_only=True):
    """`--gpu-memory-utilization` in ten-thousandths; the cache's bytes on each card where no one share can do."""

    share: int
    kv_cache_memory_bytes: int | None = None


def build_command(
    need: Footprint, layout: Layout, rig: Rig, endpoint: Endpoint, *, installed: Installed, given: Given
) -> Command:
    """argv, environment and addresses for `layout`, without the flags after `--`.

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
    _check_number(need, 1 if cut else len(stages))
    argv = [installed.executable, "serve", need.model.path]
    for name, value in _options(need, stages, endpoint, version_of(installed), n_ranks=len(stages) if cut else 1):
        if name not in given:
            argv += [f"--{name}", value]
    env = visibility(gpus, rig, version_of(installed))
    if len(stages) > 1 and not cut:
        env["VLLM_PP_LAYER_PARTITION"] = ",".join(str(len(stage.layers)) for stage in stages)
    if endpoint.api_key is not None:
        env["VLLM_API_KEY"] = endpoint.api_key  # in argv every user of the machine could read it
    base = f"http://{_authority(endpoint)}"
    return Command(
        argv=tuple(argv),
        devices=tuple(f"cuda:{place}" for place in range(len(layout.gpus))),
        env=env,
        scrub=("VLLM_PP_LAYER_PARTITION", "VLLM_API_KEY"),
        files={},
        ready_url=f"{base}/health",
        endpoint=f"{base}/v1",
    )


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

    Else a card's number among those of its own vendor: another vendor's do not count.
    """
    vendor = gpus[0].vendor
    ours = [gpu.index for gpu in rig.gpus if gpu.vendor == vendor]
    indices = ",".join(str(ours.index(gpu.index)) for gpu in gpus)
    if vendor == "amd":
        return {"HIP_VISIBLE_DEVICES": indices}
    uuids = [gpu.uuid for gpu in gpus if gpu.uuid is not None and _FULL_UUID.fullmatch(gpu.uuid)]
    named = len(uuids) == len(gpus) and version >= _UUIDS_SINCE
    return {"CUDA_DEVICE_ORDER": "PCI_BUS_ID", "CUDA_VISIBLE_DEVICES": ",".join(uuids) if named else indices}


def version_of(installed: Installed) -> tuple[int, int]:
    """`"0.32.0"` as (0, 32); (0, 0) for what cannot be read. A checkout without tags is taken for the newest."""
    if installed.version.startswith("0.1.dev"):
        return _NEWEST
    match = re.match(r"(\d+)\.(\d+)", installed.version)
    return (int(match[1]), int(match[2])) if match else (0, 0)


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


def _authority(endpoint: Endpoint) -> str:
    """Where a client on this machine reaches the server: a wildcard address is reached by loopback."""
    host = {"0.0.0.0": "127.0.0.1", "::": "::1", "": "127.0.0.1"}.get(endpoint.host, endpoint.host)  # noqa: S104 - compared, not bound
    return f"[{host}]:{endpoint.port}" if ":" in host else f"{host}:{endpoint.port}"
