"""vLLM built for the CPU: one worker, or tensor ranks or pipeline stages that share the machine (flags after `--`).

Sources: vLLM 0.32.0 platforms/cpu.py, v1/worker/cpu_worker.py, utils/ompmultiprocessing.py, and runs of its CPU build.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cache
from itertools import accumulate, pairwise
from typing import Final

from msgspec import Struct

from mgpu.adapter import Command, Endpoint, Installed
from mgpu.errors import UsageError
from mgpu.plan import HostBytes
from mgpu.rig import Rig
from mgpu.units import GIB
from mgpu_adapters.vllm.checks import check_pipeline, check_tensor_parallel
from mgpu_adapters.vllm.flags import Given
from mgpu_adapters.vllm.memory import BATCH, SERVER_RSS, WORKER_RSS, Footprint
from mgpu_adapters.vllm.serving import LEAVES, SCRUB, addresses, fingerprint_of, secret, version_of

#: What its kernels have (v1/attention/backends/cpu_attn.py `get_supported_head_sizes`).
_HEAD_SIZES: Final = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)

#: The worker heeds `--kv-cache-memory-bytes`; before, whole GiB in a variable that is still read, and wins.
_KV_BYTES_SINCE: Final = (0, 30)
_KV_GIB: Final = "VLLM_CPU_KVCACHE_SPACE"


class Worker(Struct, frozen=True, kw_only=True):
    """One process's part: its layers, and as units these and, on the last stage, the output. A rank has all."""

    layers: range
    span: range


def is_cpu_build(installed: Installed) -> bool:
    return "+cpu" in installed.version


def workers_of(need: Footprint) -> tuple[Worker, ...]:
    """The workers that `-tp` or `-pp` ask for; one without.

    Raises `UsageError` and `RefusedError` for what the model or the CPU's kernels do not allow.
    """
    settings, n_layers = need.settings, need.n_units - 1
    n_ranks, n_stages = settings.tensor_parallel_size or 1, settings.pipeline_parallel_size or 1
    if n_ranks > 1:
        check_tensor_parallel(need.model, n_ranks)
        return (Worker(layers=range(n_layers), span=range(n_layers + 1)),) * n_ranks
    check_pipeline(need.model, n_stages)
    if n_stages > 1 and settings.enforce_eager:
        raise UsageError(
            "--enforce-eager after `--`: on the CPU, vLLM's pipeline stages fail at the first request with it",
            hint="leave --enforce-eager out",
        )
    ends = list(accumulate(balanced(need.read_by_layer, n_stages), initial=0))
    layers = [range(start, end) for start, end in pairwise(ends)]
    return tuple(Worker(layers=held, span=range(held.start, held.stop + (held.stop == n_layers))) for held in layers)


def check_heads(need: Footprint) -> None:
    """Raises `UsageError` where the CPU's attention has no kernel: vLLM would start, and fail at the first request."""
    size = need.model.hyper.head_dim_k
    if size not in _HEAD_SIZES and "kv_lora_rank" not in need.model.metadata:
        raise UsageError(
            f"vLLM's attention on the CPU has no heads of {size}",
            hint="use llama.cpp with a GGUF of the model, or vLLM on a GPU",
        )


def host_bytes(need: Footprint) -> HostBytes:
    """What all workers take together, with the server and the engine."""
    workers = workers_of(need)
    n_ranks = need.settings.tensor_parallel_size or 1
    own = need.ranked(n_ranks) if n_ranks > 1 else need
    return HostBytes(
        weights=sum(own.weights_bytes(worker.span) for worker in workers),
        kv=_cache_bytes(own, workers) * len(workers),
        compute=SERVER_RSS + len(workers) * WORKER_RSS,
    )


def build_cpu_command(need: Footprint, rig: Rig, endpoint: Endpoint, *, installed: Installed, given: Given) -> Command:
    """argv, environment and addresses, without the flags after `--`."""
    check_heads(need)
    workers = workers_of(need)
    n_ranks = need.settings.tensor_parallel_size or 1
    own = need.ranked(n_ranks) if n_ranks > 1 else need
    n_stages = len(workers) // n_ranks
    env = {"VLLM_TARGET_DEVICE": "cpu"} | secret(endpoint)
    if len(workers) > 1:
        env |= _threads(rig, len(workers))
    if n_stages > 1:
        env["VLLM_PP_LAYER_PARTITION"] = ",".join(str(len(worker.layers)) for worker in workers)
    cache_bytes = _cache_bytes(own, workers)
    flagged = version_of(installed) >= _KV_BYTES_SINCE
    if not flagged:
        env[_KV_GIB] = str(max(-(-cache_bytes // GIB), 1))
    argv = [installed.executable, "serve", need.model.path]
    for name, value in _options(need, endpoint, n_ranks, n_stages):
        argv += [] if name in given else [f"--{name}", value]
    if flagged and not {"kv-cache-memory-bytes", "gpu-memory-utilization"} & set(given.values):
        argv += ["--kv-cache-memory-bytes", str(cache_bytes)]
    ready_url, base = addresses(endpoint)
    return Command(
        argv=tuple(argv),
        env=env,
        scrub=(*SCRUB, _KV_GIB),
        files={},
        ready_url=ready_url,
        endpoint=base,
        fingerprint=fingerprint_of(n_ranks, n_stages, given),
        leaves=LEAVES,
    )


def balanced(costs: Sequence[float], n_stages: int) -> tuple[int, ...]:
    """Layers of each stage such that all take about equally long; the last of `costs` is the output's, on the last.

    The sum of squares is least. One layer or more for each stage.
    """
    n_layers = len(costs) - 1
    ends = list(accumulate(costs, initial=0.0))

    @cache
    def best(start: int, stages: int) -> tuple[float, tuple[int, ...]]:
        if stages == 1:
            return (ends[-1] - ends[start]) ** 2, (n_layers - start,)
        found: list[tuple[float, tuple[int, ...]]] = []
        for stop in range(start + 1, n_layers - stages + 2):
            rest, counts = best(stop, stages - 1)
            found.append(((ends[stop] - ends[start]) ** 2 + rest, (stop - start, *counts)))
        return min(found)

    return best(0, n_stages)[1]


def _options(need: Footprint, endpoint: Endpoint, n_ranks: int, n_stages: int) -> Iterator[tuple[str, str]]:
    settings = need.settings
    yield "host", endpoint.host
    yield "port", str(endpoint.port)
    yield "tensor-parallel-size", str(n_ranks)
    yield "pipeline-parallel-size", str(n_stages)
    yield "max-model-len", str(settings.max_model_len)
    yield "max-num-seqs", str(settings.max_num_seqs)
    yield "max-num-batched-tokens", str(settings.max_num_batched_tokens or max(BATCH, settings.max_num_seqs))
    yield "kv-cache-dtype", settings.kv_cache_dtype


def _cache_bytes(own: Footprint, workers: Sequence[Worker]) -> int:
    """Each worker is told the same number: the largest part's."""
    batch = own.settings.max_num_batched_tokens or max(BATCH, own.settings.max_num_seqs)
    n_stages = 1 if own.settings.tensor_parallel_size else len(workers)
    return max(own.kv_bytes(worker.span, n_stages, batch) for worker in workers)


def _threads(rig: Rig, n_workers: int) -> dict[str, str]:
    """Unasked, vLLM binds each worker to a NUMA node of its own, and fails where there are fewer."""
    bind = {"VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    return bind | ({"OMP_NUM_THREADS": str(max(rig.cpu_cores // n_workers, 1))} if rig.cpu_cores else {})
