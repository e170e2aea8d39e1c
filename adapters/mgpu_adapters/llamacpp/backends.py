"""What the ggml backend behind a card does with memory: alignment, padding, limits, offered work."""

from __future__ import annotations

from functools import cache
from typing import Final

from msgspec import Struct

from mgpu.rig import Gpu
from mgpu_adapters.llamacpp.weights import CUDA_ALIGNMENT, Rules

#: Backends that are ggml-cuda under another name, by the start of their devices' names.
_CUDA: Final = ("CUDA", "ROCm", "MUSA")
_CUDA_VENDORS: Final = frozenset({"nvidia", "amd"})


class Driver(Struct, frozen=True, kw_only=True):
    """How llama.cpp drives a card, as far as memory goes."""

    rules: Rules
    cuda: bool
    offloads: bool  # takes over big batches of work on weights in host memory (offload_op)


def driver_of(gpu: Gpu) -> Driver:
    """By the device's name, or else by the vendor's usual build."""
    return _driver(gpu.device, gpu.vendor, gpu.max_tensor_bytes)


@cache
def _driver(device: str | None, vendor: str, max_tensor_bytes: int | None) -> Driver:
    cuda = vendor in _CUDA_VENDORS if device is None else device.startswith(_CUDA)
    rules = Rules(max_tensor_bytes=max_tensor_bytes)
    if cuda:
        rules = Rules(alignment=CUDA_ALIGNMENT, pad_rows=True, max_tensor_bytes=max_tensor_bytes)
    return Driver(rules=rules, cuda=cuda, offloads=device is None or not device.startswith("RPC"))
