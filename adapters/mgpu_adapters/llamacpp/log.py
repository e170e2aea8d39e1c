"""What llama-server's log lines say: stages of loading, buffers, requests served, and the causes of failures we know.

Formats: llama.cpp b11434 (`-lv 4`; prefix "0.00.501.757 I "), and older builds without the prefix.
"""

from __future__ import annotations

import re
from typing import Final

from mgpu.adapter import Buffer, Cause, LogFact, Served, Stage
from mgpu.units import MIB
from mgpu_adapters.llamacpp.shortage import RANKS, read_shortage
from mgpu_adapters.words import clip

_KINDS: Final = {"model": "weights", "KV": "kv", "RS": "kv", "compute": "compute", "output": "output"}
_BUFFER: Final = r"(?<!\S)(\S{1,100}) {1,40}(model|KV|RS|compute|output) buffer size = {1,40}(\d{1,12}\.\d{1,6}) MiB"

#: One request's, since 2024-02. The sum at exit counts "runs", and older builds put "generation" before it.
_SERVED: Final = r"(?<!\w )\beval time = {1,20}(\d{1,12}\.\d{1,6}) ms / {1,20}(\d{1,9}) tokens\b"

_STAGES: Final = (
    ("loaded meta data with", "reading the header"),
    ("loading model tensors", "loading weights"),
    ("constructing llama_context", "allocating the context"),
    ("retrying without pipeline parallelism", "allocating the context again"),  # what failed before was not fatal
    ("warming up the model", "warming up"),
    ("listening on", "starting to serve"),
)

_PORT_TAKEN: Final = r"couldn't bind HTTP server socket.*port: (\d+)"

#: What llama.cpp says when it fails (a regex), what it means, and what to do.
_CAUSES: Final = (
    (
        r"unknown model architecture: '([^']*)'",
        "this llama-server does not know the architecture {0!r}",
        "update llama.cpp",
    ),
    (
        r"SPLIT_MODE_TENSOR not implemented for architecture '([^']*)'",
        "this llama-server has no tensor mode for {0}",
        "use --split pipeline, or update llama.cpp",
    ),
    (
        r"simultaneous use of SPLIT_MODE_TENSOR and KV cache quantization",
        "this llama-server has no quantised cache in tensor mode",
        "use --kv-type f16 or --split pipeline, or update llama.cpp",
    ),
    (
        r"ggml-backend-meta\.cpp:\d+: GGML_ASSERT",
        "llama.cpp's tensor mode, which is experimental, cannot run this model here",
        "use --split pipeline",
    ),
    (
        r"error: invalid argument: (\S+)",
        "this llama-server does not know {0}",
        "leave it out, or update llama.cpp",
    ),
    (
        _PORT_TAKEN,
        "port {0} is in use by another program",
        "leave --port out to get a free one",
    ),
    (
        r"data is not within the file bounds",
        "the model file is cut short",
        "download it again",
    ),
    (
        r"invalid device: (\S+)",
        "this llama-server has no device {0}",
        "its build may lack your GPU's backend: `mgpu runtimes` shows the devices it has",
    ),
    (
        r"error while loading shared libraries: ([^:\s]+)",
        "the library {0} is missing",
        "install it, or llama.cpp again",
    ),
    (
        r"ErrorDeviceLost|vk::DeviceLostError|GPU is lost",
        "the driver lost the device",
        "`mgpu rig show` says which are left; `dmesg` has the driver's words",
    ),
    (
        r"ggml_cuda_init: failed",
        "the CUDA driver could not be used",
        "check the driver with nvidia-smi",
    ),
)


def read_line(line: str) -> LogFact | None:
    """The fact in one line of the log, or None."""
    line = clip(line)
    if "buffer size" in line:
        found = re.search(_BUFFER, line)
        if found is not None:
            device = RANKS if found[1].startswith(RANKS[:-1]) else found[1]
            return Buffer(device=device, kind=_KINDS[found[2]], n_bytes=round(float(found[3]) * MIB))
    if "eval time" in line:
        return _served(line)
    for words, stage in _STAGES:
        if words in line:
            return Stage(text=stage)
    return read_shortage(line) or _cause(line)


def _served(line: str) -> Served | None:
    found = re.search(_SERVED, line)
    return None if found is None else Served(n_tokens=int(found[2]), seconds=float(found[1]) / 1000)


def _cause(line: str) -> Cause | None:
    for pattern, text, hint in _CAUSES:
        match = re.search(pattern, line)
        if match is not None:
            return Cause(text=text.format(*match.groups()), hint=hint, port_taken=pattern == _PORT_TAKEN)
    return None
