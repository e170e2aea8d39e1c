"""vLLM's memory on each card, from the model's headers alone. Every figure here is a prediction.

vLLM takes a *budget*, `ceil(total x --gpu-memory-utilization)`, of every card, once its context and NCCL are there, and
gives to the cache what weights, a trial run and CUDA graphs leave of it (vLLM 0.32.0 v1/worker/gpu_worker.py,
v1/worker/utils.py `request_memory`). So a card holds a stage if some share of it, in ten-thousandths, covers the
stage's need and leaves free what others hold: `Footprint.device` says how much the smallest such share takes.
"""

from __future__ import annotations

from typing import Final

from msgspec import Struct
from msgspec.structs import replace

from mgpu.model import Model
from mgpu.plan import DeviceBytes, HostBytes, Shape
from mgpu.rig import Gpu
from mgpu.units import GIB, MIB
from mgpu_adapters.vllm.cache import BLOCK_SIZE, CachePlan, plan_cache
from mgpu_adapters.vllm.config import n_main_layers
from mgpu_adapters.vllm.settings import KV_DTYPES, Settings
from mgpu_adapters.vllm.weights import Weights

#: Shares of a card are passed with four decimals: 2.4 MiB of a 24 GiB card.
SHARES: Final = 10_000

#: A CUDA context, by what a card of at most so much memory has in multiprocessors at worst: 2.9 MiB each and 8 MiB,
#: from 107 MiB with 34 and 555 MiB with 188 of them (llama.cpp PR #23604). Free of total before the budget is taken,
#: as vLLM printed it: 78.84 of 79.25 GiB on an A100, 78.66 of 79.19 GiB on an H100.
_CONTEXTS: Final = ((9 * GIB, 142 * MIB), (13 * GIB, 240 * MIB), (17 * GIB, 252 * MIB), (25 * GIB, 380 * MIB))
_LARGEST_CONTEXT: Final = 555 * MIB
#: NCCL's communicator and channels between cards: assumed, as public logs count them with the context.
_NCCL: Final = 256 * MIB
#: What the allocator and the driver take later, outside of the budget.
_GROWTH: Final = 64 * MIB

#: CUDA's own total is less than the driver's: 24240 of 24576 MiB (RTX 3090), 22559 of 23034 MiB (L4, the worst seen).
_CUDA_TOTAL_PERMILLE: Final = 979

#: Kernels, cuBLAS and attention workspaces, within the budget. vLLM printed 0.07 (H100), 0.16 (H100), 0.26 (A100) and
#: 0.33 GiB (RTX 5090, two cards; vLLM #14452).
_WORKSPACES: Final = 352 * MIB
#: Bytes of one logit at the sampler's peak: float32 copy, sorted values, int64 indices, sums, probabilities. 256
#: requests of a 128256-word vocabulary peak at 1.21 GiB (vLLM 0.32 on an A100, Llama 3.1 8B).
_LOGIT_BYTES: Final = 40
#: A first CUDA graph of a kind, and each further one. vLLM printed 0.23 GiB (51 + 35 graphs, A100), 0.36 GiB (16),
#: 0.67 GiB (67), 0.73 GiB (51 + 35).
_FIRST_GRAPH: Final = 256 * MIB
_NEXT_GRAPH: Final = 8 * MIB
_GRAPH_SIZES: Final[tuple[int, ...]] = (1, 2, 4, *range(8, 256, 8), *range(256, 513, 16))
#: An image tower's trial run; models differ widely, this is an allowance.
_TOWER_RUN: Final = 1024 * MIB

#: Host memory, measured with the CPU build of 0.32.0: the API server and the engine, and each worker.
SERVER_RSS: Final = 1150 * MIB
WORKER_RSS: Final = 700 * MIB

#: `--max-num-batched-tokens` as vLLM would choose it (0.32.0 engine/arg_utils.py `get_batch_defaults`).
_LARGE_CARD: Final = 70 * GIB
BATCH: Final = 2048
_LARGE_BATCH: Final = 8192


class Share(Struct, frozen=True, kw_only=True):
    """What `--gpu-memory-utilization` may be on one card, in ten-thousandths. It cannot be used if least > most."""

    least: int
    most: int


class Footprint:
    """What a model takes with these settings, wherever its layers go. Immutable.

    With `tp` ranks in place of stages, every card is asked for all units, and all give the same answer: vLLM cuts
    evenly or not at all.
    """

    def __init__(
        self,
        model: Model,
        settings: Settings,
        *,
        tp: int = 1,
        weights: Weights | None = None,
        by_ranks: dict[int, Weights] | None = None,
        block: int = BLOCK_SIZE,
    ) -> None:
        self.model = model
        self.settings = settings
        self.n_units = n_main_layers(model) + 1
        self._tp = tp
        self._weights = weights or Weights(model, tp)
        self._by_ranks: dict[int, Weights] = {} if by_ranks is None else by_ranks  # shared by all settings
        self._block = block
        self._cache: CachePlan = plan_cache(model, KV_DTYPES[settings.kv_cache_dtype] or 2, tp, least_block=block)

    def with_settings(self, settings: Settings) -> Footprint:
        return Footprint(
            self.model, settings, tp=self._tp, weights=self._weights, by_ranks=self._by_ranks, block=self._block
        )

    def ranked(self, tp: int) -> Footprint:
        """The same model and settings on one of `tp` tensor ranks."""
        if tp not in self._by_ranks:
            self._by_ranks[tp] = Weights(self.model, tp)
        return Footprint(self.model, self.settings, tp=tp, weights=self._by_ranks[tp], block=self._block)

    def at(self, path: str) -> Footprint:
        """The same model where another machine, or a container, has it."""
        return Footprint(
            replace(self.model, path=path),
            self.settings,
            tp=self._tp,
            weights=self._weights,
            by_ranks=self._by_ranks,
            block=self._block,
        )

    def device(self, span: range, shape: Shape, gpu: Gpu) -> DeviceBytes:
        """Bytes on `gpu` as the stage with the units of `span`: with the context, and the smallest share that holds it.

        vLLM has no stage without layers: where the output alone is left for one, it gets the last layer with it.
        """
        if span.start == self.n_units - 1:
            span = range(max(span.start - 1, 0), span.stop)
        weights, kv = self._weights.stage(span), self.kv_bytes(span, shape.n_devices, self.batch_tokens(gpu))
        compute = self.working_bytes(span, gpu)
        need = weights + kv + compute
        outside = outside_bytes(gpu, shape.n_devices)
        total = outside + budget(gpu, self.settings.utilization or _least_share(need, gpu))
        if self.settings.utilization is not None:  # what the person's own share does not hold is short
            short = need - smallest_total(gpu) * self.settings.utilization // SHARES
            total = max(total, gpu.usable_bytes + short) if short > 0 else total
        return DeviceBytes(weights=weights, kv=kv, compute=compute, overhead=total - need)

    def stored(self, span: range, shape: Shape, gpu: Gpu) -> int:
        """Of those, weights and cache alone."""
        return self._weights.stage(span) + self.kv_bytes(span, shape.n_devices, self.batch_tokens(gpu))

    def share(self, span: range, n_devices: int, gpu: Gpu) -> Share:
        """The shares of `gpu` that start: enough for the stage, and free of what others hold and is reserved."""
        room = gpu.usable_bytes - outside_bytes(gpu, n_devices)
        kv = self.kv_bytes(span, n_devices, self.batch_tokens(gpu))
        need = self._weights.stage(span) + kv + self.working_bytes(span, gpu)
        return Share(least=_least_share(need, gpu), most=max(room, 0) * SHARES // gpu.total_bytes)

    def weights_bytes(self, span: range) -> int:
        """The weights of a stage, or of one rank."""
        return self._weights.stage(span)

    @property
    def read_by_layer(self) -> tuple[float, ...]:
        """Bytes read for one token in each layer, and as the last in the output."""
        dense, experts = self._weights.read_by_layer
        return (*(a + b for a, b in zip(dense, experts, strict=True)), float(self._weights.norm + self._weights.head))

    def kv_bytes(self, span: range, n_devices: int, batch: int) -> int:
        """The stage's cache, for all users at their full context. `batch`: `--max-num-batched-tokens`."""
        settings = self.settings
        return self._cache.bytes_for(
            self._layers(span),
            settings.max_num_seqs,
            settings.max_model_len,
            _in_flight(self._stages(n_devices), batch),
        )

    def users_in(self, kv_bytes: int, span: range, n_devices: int, batch: int) -> int:
        """How many full contexts `kv_bytes` of cache on that stage hold."""
        in_flight = _in_flight(self._stages(n_devices), batch)
        return self._cache.requests_in(kv_bytes, self._layers(span), self.settings.max_model_len, in_flight)

    def working_bytes(self, span: range, gpu: Gpu) -> int:
        """Peak of the trial run, CUDA graphs and workspaces on that stage."""
        tokens = self.batch_tokens(gpu)
        peak = 2 * tokens * _widest_activation(self.model, self._tp)
        if span.stop == self.n_units:
            peak = max(peak, self.settings.max_num_seqs * self.model.hyper.n_vocab * _LOGIT_BYTES)
        if self._weights.tower:
            peak += _TOWER_RUN
        return peak + self._graphs() + _WORKSPACES

    def batch_tokens(self, gpu: Gpu) -> int:
        """`--max-num-batched-tokens` on this card; less than the users' number is refused by vLLM."""
        if self.settings.max_num_batched_tokens is not None:
            return self.settings.max_num_batched_tokens
        large = gpu.total_bytes >= _LARGE_CARD and "A100" not in gpu.name
        return max(_LARGE_BATCH if large else BATCH, self.settings.max_num_seqs)

    def host(self, gpus: tuple[Gpu, ...]) -> HostBytes:
        """vLLM's own processes. Without cards: what all of it would take, for comparison, as it has nowhere to run."""
        if gpus:
            return HostBytes(weights=0, kv=0, compute=SERVER_RSS + len(gpus) * WORKER_RSS)
        everything = range(self.n_units)
        return HostBytes(weights=self._weights.stage(everything), kv=self.kv_bytes(everything, 1, BATCH), compute=0)

    def _layers(self, span: range) -> range:
        last = self.n_units - 1
        return range(min(span.start, last), min(span.stop, last))

    def _stages(self, n_devices: int) -> int:
        return n_devices if self._tp == 1 else 1

    def _graphs(self) -> int:
        if self.settings.enforce_eager:
            return 0
        return _FIRST_GRAPH + n_graphs(self.settings.max_num_seqs) * _NEXT_GRAPH


def outside_bytes(gpu: Gpu, n_devices: int) -> int:
    """What vLLM takes of a card before its budget is measured, and beside it."""
    context = next((size for most, size in _CONTEXTS if gpu.total_bytes <= most), _LARGEST_CONTEXT)
    return context + (_NCCL if n_devices > 1 else 0) + _GROWTH


def budget(gpu: Gpu, share: int) -> int:
    """`ceil(total x share)`: what vLLM will ask to be free."""
    return -(-gpu.total_bytes * share // SHARES)


def smallest_total(gpu: Gpu) -> int:
    """What CUDA may call the card's total, at the least: free memory is a part of it."""
    return max(min(gpu.free_bytes, gpu.total_bytes), gpu.total_bytes * _CUDA_TOTAL_PERMILLE // 1000)


def n_graphs(max_num_seqs: int) -> int:
    """CUDA graphs, piecewise and whole: sizes 1, 2, 4, then in steps of 8, from 256 in steps of 16, up to 512 or twice
    the users (vLLM 0.32.0 config/vllm.py `_set_cudagraph_sizes`).
    """
    largest = min(2 * max_num_seqs, 512)
    sizes = [size for size in _GRAPH_SIZES if size <= largest]
    return len(sizes) + len([size for size in sizes if size <= max_num_seqs])


def _in_flight(n_stages: int, batch: int) -> int:
    """Tokens scheduled and not yet settled: a batch for each stage, and one more (`max_concurrent_batches`)."""
    return (max(n_stages, 1) + 1) * batch


def _least_share(need: int, gpu: Gpu) -> int:
    return -(-need * SHARES // smallest_total(gpu))


def _widest_activation(model: Model, tp: int) -> int:
    """Numbers that one token has alive at once: the residual stream, and the widest of attention and feed-forward."""
    hyper = model.hyper
    attention = max(hyper.n_head, default=0) * hyper.head_dim_k * 2
    attention += max(hyper.n_head_kv, default=0) * (hyper.head_dim_k + hyper.head_dim_v)
    dense = 3 * max(hyper.n_ff, default=0)
    routed = hyper.n_expert_used * (3 * hyper.n_ff_expert + hyper.n_embd)
    return 3 * hyper.n_embd + -(-max(attention, dense, routed) // tp)
