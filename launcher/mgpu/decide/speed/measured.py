"""Figures that were measured on this rig (`mgpu bench`): they replace predictions, or correct them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from mgpu.adapter import Work
from mgpu.plan import Layout
from mgpu.rig import Gpu, Measured, Rig

#: A figure at another depth of context counts as long as the depths differ by no more than this, in tokens.
_NEAR: Final = 512
_NEAR_SHARE: Final = 0.25

#: Two runs of the same differ by about this much.
SCATTER: Final = 0.03
#: Nine of ten predictions that were corrected by a figure of the same cards lie within this.
CORRECTED: Final = 0.08
#: A figure further off than this is of something else: a card that was busy, or throttled.
_CREDIBLE: Final = (0.4, 2.5)


def find_measured(work: Work, layout: Layout, gpus: Sequence[Gpu], rig: Rig) -> Measured | None:
    """The latest figure of this very model, mode, kind of cards and cache type, at a depth near this one.

    One of these very cards comes before one of their like.
    """
    same = [one for one in rig.measured if _is_same_model(one, work) and _is_same_placement(one, layout, gpus, rig)]
    near = [one for one in same if abs(one.depth - work.depth) <= max(_NEAR, _NEAR_SHARE * work.depth)]
    return max(near, key=lambda one: (set(one.gpus) <= set(layout.gpus), one.date), default=None)


def correction(work: Work, layout: Layout, rig: Rig) -> float | None:
    """The median of measured to predicted speed, over what was measured on such cards with this runtime."""
    kinds = _kinds(rig)
    cards = {kinds[index] for index in layout.gpus if index in kinds}
    ratios = [
        one.tok_s / one.predicted
        for one in rig.measured
        if one.predicted and one.runtime == work.runtime and one.gpus and {kinds.get(gpu) for gpu in one.gpus} <= cards
    ]
    credible = [ratio for ratio in ratios if _CREDIBLE[0] <= ratio <= _CREDIBLE[1]]
    return _median(credible) if credible else None


def _median(values: Sequence[float]) -> float:
    ordered, half = sorted(values), len(values) // 2
    return ordered[half] if len(values) % 2 else (ordered[half - 1] + ordered[half]) / 2


def _is_same_model(one: Measured, work: Work) -> bool:
    model = work.model
    return (one.runtime, one.architecture, one.quantization, one.weights_bytes, one.kv_type) == (
        work.runtime, model.architecture, model.quantization, model.weights_bytes, work.kv_type,
    )  # fmt: skip


def _is_same_placement(one: Measured, layout: Layout, gpus: Sequence[Gpu], rig: Rig) -> bool:
    """Cards of the same kinds in the same mode; where they are not alike, with the same layers on each."""
    shape = layout.shape
    mode = "tensor" if shape.mode == "tensor" else "pipeline"
    if one.mode != mode or (one.host_layers, one.host_experts) != (shape.host_layers, shape.host_experts):
        return False
    kinds = _kinds(rig)
    theirs, ours = [kinds.get(index) for index in one.gpus], [_kind(gpu) for gpu in gpus]
    if shape.mode == "replicas":
        return len(theirs) == 1 and theirs[0] in ours
    if len(set(ours)) < 2:
        return theirs == ours
    return theirs == ours and one.counts == layout.counts


def _kinds(rig: Rig) -> dict[int, tuple[object, ...]]:
    return {gpu.index: _kind(gpu) for gpu in rig.gpus}


def _kind(gpu: Gpu) -> tuple[object, ...]:
    """Cards of a kind run alike."""
    return gpu.name, gpu.total_bytes, gpu.bandwidth_bytes_per_s
