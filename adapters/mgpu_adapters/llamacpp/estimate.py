"""Compute buffers by closed formulae, for architectures whose graph this package does not draw.

Fitted over measured dense and mixture-of-experts models of other architectures: never under by more than a few per
cent, over by up to half on inner devices of a split. The caller adds its margin.
"""

from __future__ import annotations

from mgpu_adapters.llamacpp.blocks import Anatomy
from mgpu_adapters.llamacpp.cache import n_cells
from mgpu_adapters.llamacpp.settings import Settings


def estimated(anatomy: Anatomy, settings: Settings, n_devices: int, n_copies: int, *, on_host: bool) -> list[int]:
    """Bytes on each device, all alike, and last on the host, which computes some layers itself when `on_host`."""
    hyper, u = anatomy.hyper, settings.u
    row = 4 * u * hyper.n_embd
    cells = {n_cells(block, settings) for block in anatomy.caches if block.k}
    mask = (2 if settings.flash_attn else 4) * u * sum(cells)
    logits = 4 * hyper.n_vocab * (settings.n_outputs or settings.n_parallel)
    work = max(_feed_forward(anatomy, u), _attention(anatomy, settings, row), logits)
    base = work + 6 * row + _recurrent(anatomy, u)
    copies = n_copies * mask + (12 * row if n_copies > 1 else 0)
    host = n_copies * mask + (10 if n_copies > 1 else 4) * row + (base if on_host else 0)
    return [copies + base] * n_devices + [host]


def _feed_forward(anatomy: Anatomy, u: int) -> int:
    hyper = anatomy.hyper
    dense = 3 * max(hyper.n_ff, default=0)
    widest = hyper.n_ff_expert or max(hyper.n_ff, default=0)
    routed = hyper.n_expert_used * (hyper.n_embd + max(hyper.n_embd, 2 * widest)) if hyper.n_expert else 0
    return 4 * u * max(dense, routed)


def _attention(anatomy: Anatomy, settings: Settings, row: int) -> int:
    hyper, u = anatomy.hyper, settings.u
    n_head, n_head_kv = max(hyper.n_head, default=0), max(hyper.n_head_kv, default=0)
    projections = 4 * u * hyper.head_dim_k * (2 * n_head + 2 * n_head_kv)
    scores = 0 if settings.flash_attn else 4 * u * settings.n_ctx_seq * n_head
    return 3 * row + projections + scores


def _recurrent(anatomy: Anatomy, u: int) -> int:
    """States and their inputs: about three rows as wide as the projection into the block."""
    inputs = (block.get("ssm_in.weight") for block in anatomy.blocks)
    return 12 * u * max((tensor.shape[-1] for tensor in inputs if tensor is not None), default=0)
