"""A server of our own for one plan, as a command; and what a person would type to use one that runs.

The child of a server from 0.30 on is llama-server, which reads LLAMA_ARG_* where Ollama passes no flag of its own
(ollama fb30760, llm/llama_server.go; llama.cpp tools/server/README.md).
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator

from mgpu.adapter import Command, Endpoint
from mgpu.plan import Layout
from mgpu.rig import Rig
from mgpu.service import Attachment
from mgpu_adapters.llamacpp.cards import visibility
from mgpu_adapters.ollama.hold import Asked, layers_on_cards
from mgpu_adapters.ollama.names import Wish

#: Of the caller's variables, those that would change the plan. OLLAMA_MODELS and the like stay.
SCRUB = (
    "LLAMA_ARG_",
    "OLLAMA_SCHED_SPREAD",
    "OLLAMA_GPU_OVERHEAD",
    "OLLAMA_NUM_PARALLEL",
    "OLLAMA_MAX_LOADED_MODELS",
    "OLLAMA_CONTEXT_LENGTH",
    "OLLAMA_FLASH_ATTENTION",
    "OLLAMA_KV_CACHE_TYPE",
    "OLLAMA_KEEP_ALIVE",
)


def own_server(  # noqa: PLR0913 - one call, by keyword
    executable: str, asked: Asked, layout: Layout, rig: Rig, endpoint: Endpoint, *, attachment: Attachment, wish: Wish
) -> Command:
    """`ollama serve` that sees the plan's cards alone, and loads every model as planned for this one."""
    base = f"http://{authority(endpoint)}"
    return Command(
        argv=(executable, "serve"),
        env=dict(_environment(asked, layout, rig, endpoint)),
        scrub=SCRUB,
        files={},
        ready_url=f"{base}/api/version",
        endpoint=f"{base}/v1",
        attachment=attachment,
        then=tuple(_calls(base, wish)),
    )


def authority(endpoint: Endpoint) -> str:
    """Where a client on this machine reaches it."""
    host = {"0.0.0.0": "127.0.0.1", "::": "::1", "": "127.0.0.1"}.get(endpoint.host, endpoint.host)  # noqa: S104 - compared, not bound
    return f"[{host}]:{endpoint.port}" if ":" in host else f"{host}:{endpoint.port}"


def _environment(asked: Asked, layout: Layout, rig: Rig, endpoint: Endpoint) -> Iterator[tuple[str, str]]:
    by_index = {gpu.index: gpu for gpu in rig.gpus}
    host = f"[{endpoint.host}]" if ":" in endpoint.host else endpoint.host
    yield "OLLAMA_HOST", f"{host}:{endpoint.port}"
    if asked.model.alias is not None:  # the store it was found in, whoever's that is
        yield "OLLAMA_MODELS", asked.model.path.rpartition("/blobs/")[0]
    yield from visibility(tuple(by_index[index] for index in layout.gpus), rig).items()
    yield "OLLAMA_CONTEXT_LENGTH", str(asked.ctx)
    yield "OLLAMA_NUM_PARALLEL", str(asked.users)
    yield "OLLAMA_MAX_LOADED_MODELS", "1"
    yield "OLLAMA_KEEP_ALIVE", "-1"
    yield "OLLAMA_NOPRUNE", "1"  # another server's unfinished downloads may lie in the same store
    if asked.kv_type != "f16":
        yield "OLLAMA_KV_CACHE_TYPE", asked.kv_type
        yield "OLLAMA_FLASH_ATTENTION", "1"
    if len(layout.gpus) > 1:
        yield "OLLAMA_SCHED_SPREAD", "1"
    if asked.era == ">=0.30":
        yield from _for_llama_server(layout)


def _for_llama_server(layout: Layout) -> Iterator[tuple[str, str]]:
    yield "LLAMA_ARG_FIT", "off"  # with what is set here it would only give up, and in tensor mode refuse
    yield "LLAMA_ARG_N_GPU_LAYERS", str(layers_on_cards(layout))
    if layout.shape.mode == "tensor":
        yield "LLAMA_ARG_SPLIT_MODE", "tensor"
    elif len(layout.gpus) > 1:
        yield "LLAMA_ARG_SPLIT_MODE", "layer"
        yield "LLAMA_ARG_TENSOR_SPLIT", ",".join(map(str, layout.counts))
    if layout.shape.host_experts:
        yield "LLAMA_ARG_N_CPU_MOE", str(layout.shape.host_experts)


def by_hand(url: str, wish: Wish) -> Command:
    """The calls that make the model ready on the server at `url`, as one line of shell."""
    return Command(
        argv=("sh", "-c", " && ".join(_calls(url, wish))),
        env={},
        scrub=(),
        files={},
        ready_url=f"{url}/api/version",
        endpoint=f"{url}/v1",
    )


def _calls(url: str, wish: Wish) -> Iterator[str]:
    source: dict[str, object] = {}
    digests: list[str] = []
    if wish.alias is not None:
        source = {"from": wish.alias}
    else:
        for number, path in enumerate(wish.paths):
            yield f"d{number}=sha256:$(sha256sum {shlex.quote(path)} | cut -c1-64)"
            yield f"curl -fsS -X POST -T {shlex.quote(path)} {shlex.quote(f'{url}/api/blobs/')}$d{number}"
            name = shlex.quote(json.dumps(path.rpartition("/")[2]))[1:-1]  # JSON's quotes make it quoted: within others
            digests.append(f"{name}:\"'$d{number}'\"")
    body = json.dumps({"model": wish.name, **source, "parameters": wish.parameters, "stream": False})
    if digests:
        quoted = shlex.quote(body[:-1])[:-1]
        yield f'curl -fsS {shlex.quote(f"{url}/api/create")} -d {quoted}, "files": {{{", ".join(digests)}}}}}\''
    else:
        yield f"curl -fsS {shlex.quote(f'{url}/api/create')} -d {shlex.quote(body)}"
    preload = json.dumps({"model": wish.name, "keep_alive": -1, "stream": False})
    yield f"curl -fsS {shlex.quote(f'{url}/api/generate')} -d {shlex.quote(preload)}"
