"""Lines that real llama-servers printed, and what they say."""

from __future__ import annotations

import pytest

from mgpu.adapter import Buffer, Cause, Stage
from mgpu.units import MIB
from mgpu_adapters.llamacpp.log import read_line


@pytest.mark.parametrize(
    ("line", "buffer"),
    [
        pytest.param(
            "0.00.501.757 I load_tensors:      Vulkan0 model buffer size =    35.82 MiB",
            ("Vulkan0", "weights", 35.82),
            id="weights",
        ),
        pytest.param(
            "0.00.545.936 I llama_kv_cache:    Vulkan0 KV buffer size =     4.00 MiB", ("Vulkan0", "kv", 4.0), id="kv"
        ),
        pytest.param(
            "llm_load_tensors:      CUDA0 model buffer size =  4403.49 MiB", ("CUDA0", "weights", 4403.49), id="2024"
        ),
        pytest.param(
            "0.1 I llama_memory_recurrent:      CUDA0 RS buffer size =    49.25 MiB", ("CUDA0", "kv", 49.25), id="state"
        ),
        pytest.param(
            "0.00.568.560 I sched_reserve: Vulkan_Host compute buffer size =    32.62 MiB",
            ("Vulkan_Host", "compute", 32.62),
            id="compute",
        ),
    ],
)
def test_buffers(line: str, buffer: tuple[str, str, float]) -> None:
    device, kind, mib = buffer
    assert read_line(line) == Buffer(device=device, kind=kind, n_bytes=round(mib * MIB))


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("allocating 8000.00 MiB on device 0: cudaMalloc failed: out of memory", "memory"),
        ("0.03 E llama_model_load: error loading model: unknown model architecture: 'foo2'", "'foo2'"),
        ("error: invalid argument: --no-mmap", "--no-mmap"),
        ("0.0 E srv start: couldn't bind HTTP server socket, hostname: 127.0.0.1, port: 9997", "9997"),
        ("tensor 'x' data is not within the file bounds, model is corrupted or incomplete", "cut short"),
        ("llama-server: error while loading shared libraries: libcudart.so.12: cannot open", "libcudart.so.12"),
    ],
)  # fmt: skip
def test_causes(line: str, words: str) -> None:
    fact = read_line(line)
    assert isinstance(fact, Cause)
    assert words in fact.text
    assert fact.hint


def test_stages_and_the_rest() -> None:
    assert read_line("0.00.481.797 I load_tensors: loading model tensors, this can take a while...") == Stage(
        text="loading weights"
    )
    assert read_line("0.00.480.480 I print_info: n_layer               = 18") is None
    assert read_line("") is None
