"""How fast prompts are read, and the wait for the first token."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from mgpu.adapter import Work
from mgpu.decide.speed.decode import ASSUMED_RAM_BANDWIDTH, RAM_SHARE
from mgpu.decide.speed.links import all_reduce
from mgpu.decide.speed.pace import Pace, pace_of
from mgpu.plan import Layout
from mgpu.rig import Gpu, Rig

#: The prompt that a wait is told for: half of the context, and at most so many tokens.
LONGEST_PROMPT: Final = 2048

#: llama-server hands a prompt on in micro-batches of 512, of batches of 2048 (b11434): so many are under way at once,
#: each on another device.
_UNDER_WAY: Final = 4
_MICRO_BATCH: Final = 512

#: Operations a second of a CPU core on quantised weights: 7B Q4_0 on an i9-13900K reads 55 tok/s (llama.cpp #34).
CORE_FLOPS: Final = 80e9
ASSUMED_CORES: Final = 8


def prompt_tokens(work: Work) -> int:
    """Half of the context in a prompt, within reason."""
    return max(min(work.ctx // 2, LONGEST_PROMPT), 1)


def prompt_seconds(work: Work, layout: Layout, gpus: Sequence[Gpu], rig: Rig, n: int) -> float | None:
    """Seconds to read a prompt of `n` tokens. None where a card's speed is unknown."""
    paces = [pace_of(gpu, work.runtime, older=False) for gpu in gpus]
    each = [_span(work, pace, span, n) for pace, span in zip(paces, layout.spans(), strict=True) if pace is not None]
    if len(each) < len(paces):
        return None
    host = _host(work, layout, rig, n)
    mode = layout.shape.mode
    if mode == "replicas":
        return max(each) + host
    if mode == "tensor":
        return max(each) / len(each) + all_reduce(work, gpus, rig, n) + host
    return _overlapped(each, n) + host


def _span(work: Work, pace: Pace, span: range, n: int) -> float:
    """A prompt of `n` tokens through some units: operations, each micro-batch's weights, and attention."""
    i, j = span.start, min(span.stop, work.n_units - 1)  # logits are made for the last token alone
    flops = (work.flops[j] - work.flops[i]) * n
    looks = (work.heads[j] - work.heads[i]) / max(work.depth, 1) * (n / 2) * n  # each token looks back at half of it
    weights = work.weights[j] - work.weights[i] + (work.experts[j] - work.experts[i]) * touched(work, _MICRO_BATCH)
    batches = -(-n // _MICRO_BATCH)
    return flops / pace.flops + 4 * work.head_dim * looks / pace.attention_flops + batches * weights * pace.weight


def touched(work: Work, n_tokens: int) -> float:
    """Experts that some of `n_tokens` go to, for each that one token goes to."""
    hyper = work.model.hyper
    if not hyper.n_expert:
        return 1.0
    share = max(hyper.n_expert_used, 1) / hyper.n_expert
    return (1 - (1 - share) ** n_tokens) / share


def _overlapped(each: Sequence[float], n: int) -> float:
    """Devices work on different micro-batches at the same time."""
    if len(each) < 2:
        return sum(each)
    chunks = min(-(-n // _MICRO_BATCH), _UNDER_WAY)
    return (sum(each) + (chunks - 1) * max(each)) / chunks


def _host(work: Work, layout: Layout, rig: Rig, n: int) -> float:
    """The CPU's layers; with cards beside it, their weights are sent to a card for each batch."""
    shape = layout.shape
    if not shape.n_devices:
        return work.flops[work.n_units - 1] * n / (CORE_FLOPS * (rig.cpu_cores or ASSUMED_CORES))
    whole = shape.host_layers
    routed = max(shape.host_experts, work.host_experts, whole)
    sent = work.weights[whole] + work.experts[min(routed, work.n_units)] * touched(work, _MICRO_BATCH)
    bandwidth = (rig.ram_bandwidth_bytes_per_s or ASSUMED_RAM_BANDWIDTH) * RAM_SHARE
    return sent / min(bandwidth, 20e9) * -(-n // _MICRO_BATCH)
