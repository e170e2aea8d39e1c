"""Is the placement what was planned? The buffers the runtime reports, against the plan, device by device."""

from __future__ import annotations

from collections.abc import Sequence

from mgpu.adapter import Buffer
from mgpu.plan import Plan
from mgpu.units import gib

#: A difference over this share of a device's plan is said.
TOLERANCE = 0.02


def measured_bytes(buffers: Sequence[Buffer], device: str) -> int:
    """Weights, KV and compute of one device as the runtime reported them; 0 when it said nothing of it."""
    return sum(buffer.n_bytes for buffer in buffers if buffer.device == device and buffer.kind != "output")


def compare(plan: Plan, devices: Sequence[str], buffers: Sequence[Buffer]) -> tuple[str, ...]:
    """One sentence for each device whose buffers differ from the plan by more than `TOLERANCE`.

    `devices`: the runtime's names of the plan's devices, in order. Overhead is the driver's: no log tells it.
    """
    told: list[str] = []
    for device, name in zip(plan.devices, devices, strict=True):
        memory = device.memory
        planned = memory.weights + memory.kv + memory.compute
        real = measured_bytes(buffers, name)
        if buffers and not real:
            told.append(f"GPU {device.gpu} holds nothing, {gib(planned)} was planned")
        elif abs(real - planned) > TOLERANCE * planned and buffers:
            told.append(f"GPU {device.gpu} holds {gib(real)}, {gib(planned)} was planned ({real / planned - 1:+.0%})")
    return tuple(told)
