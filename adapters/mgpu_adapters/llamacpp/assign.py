"""Which layer goes to which device, exactly as llama.cpp decides it.

llama.cpp b11434 src/llama-model.cpp, `load_tensors`: all arithmetic is in float32; proportions are applied to the
*count* of offloaded layers, the output layer being one more; and a layer goes to the first device whose cumulative
share is greater than the layer's own position (`std::upper_bound`).
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from itertools import pairwise

_F32 = struct.Struct("<f")


def assign(tensor_split: Sequence[float], n_units: int, host_layers: int = 0) -> tuple[int, ...]:
    """Units on each device for `--tensor-split`; `n_units` blocks and output, the first `host_layers` on the host.

    All-zero proportions stand for equal ones here: llama.cpp would take free memory, which nobody has planned with.
    """
    shares = _cumulative(tensor_split if any(tensor_split) else [1.0] * len(tensor_split))
    active = n_units - host_layers
    counts = [0] * len(shares)
    device = 0
    for position in range(active):
        share = f32(position / active)
        while device < len(shares) - 1 and not shares[device] > share:
            device += 1
        counts[device] += 1
    return tuple(counts)


def _cumulative(tensor_split: Sequence[float]) -> list[float]:
    sums = [0.0]
    for weight in tensor_split:
        sums.append(f32(sums[-1] + f32(weight)))
    return [f32(after / sums[-1]) for _, after in pairwise(sums)]


def f32(value: float) -> float:
    """Rounded to the nearest float32, as storing it in a C `float` does."""
    rounded: float = _F32.unpack(_F32.pack(value))[0]
    return rounded
