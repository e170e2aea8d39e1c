"""Layers to pipeline stages: vLLM's own even split, proportional ones, and `VLLM_PP_LAYER_PARTITION`."""

from __future__ import annotations

from collections.abc import Sequence


def even_partition(n_layers: int, n_stages: int) -> tuple[int, ...]:
    """vLLM's own split: the remainder goes to the stages before the last, from behind.

    vLLM 0.32.0 distributed/utils.py `get_pp_indices`.
    """
    layers = [n_layers // n_stages] * n_stages
    for back in range(2, n_layers % n_stages + 2):
        layers[-back] += 1
    return tuple(layers)


def proportional(shares: Sequence[float], n_layers: int) -> tuple[int, ...]:
    """Whole layers in proportion to `shares`, one at least where a share is not 0; equal shares as vLLM does it."""
    active = [place for place, share in enumerate(shares) if share > 0] or list(range(len(shares)))
    weights = [shares[place] or 1.0 for place in active]
    counts = [0] * len(shares)
    if len(set(weights)) == 1 or len(active) >= n_layers:
        for place, layers in zip(active, even_partition(n_layers, len(active)), strict=True):
            counts[place] = layers
        return tuple(counts)
    total, spare = sum(weights), n_layers - len(active)
    exact = [spare * weight / total for weight in weights]
    for place, wanted in zip(active, exact, strict=True):
        counts[place] = 1 + int(wanted)
    left = n_layers - sum(counts)
    by_rest = sorted(range(len(active)), key=lambda i: (int(exact[i]) - exact[i], i))
    for i in by_rest[:left]:
        counts[active[i]] += 1
    return tuple(counts)


def to_units(layers: Sequence[int]) -> tuple[int, ...]:
    """Layers of each stage as units: the output layer is one unit more on the last stage that has any."""
    units = list(layers)
    units[max(place for place, count in enumerate(layers) if count)] += 1
    return tuple(units)


def layer_partition(units: Sequence[int]) -> tuple[int, ...]:
    """`VLLM_PP_LAYER_PARTITION` for units on each stage: vLLM counts layers only, and puts the output with the last.

    A stage that is left without a layer takes one of the stage before it: vLLM has none without.
    """
    layers = [*units[:-1], units[-1] - 1]
    for place in range(len(layers) - 1, 0, -1):
        if not layers[place]:
            layers[place - 1], layers[place] = layers[place - 1] - 1, 1
    return tuple(layers)
