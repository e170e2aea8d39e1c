"""A plan as one llama-server command line: everything explicit, nothing left to defaults that change between builds."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from mgpu.adapter import Command, Endpoint, Installed
from mgpu.errors import UsageError
from mgpu.model import Model
from mgpu.plan import Layout
from mgpu.rig import Gpu, Rig
from mgpu_adapters.llamacpp.cards import device_names, visibility
from mgpu_adapters.llamacpp.flags import SPELLINGS, Given
from mgpu_adapters.llamacpp.settings import Settings
from mgpu_adapters.llamacpp.shortage import RANKS

#: Flags that not every build in use knows; passed only where `--help` lists them.
_OPTIONAL: Final = frozenset({"fit", "n-cpu-moe", "verbosity"})

#: One key a line (llama.cpp b11434 common/arg.cpp); a file that is not there ends llama-server, rather than opens it.
_KEY_FILE: Final = "--api-key-file"

#: Where a GGUF keeps its chat template; long ones are known by their length alone.
_TEMPLATES: Final = frozenset({"tokenizer.chat_template", "tokenizer.chat_template.length"})

#: The library's INFO lines (buffers, stages) come at this verbosity (llama.cpp b11434 common/log.cpp).
_VERBOSITY: Final = "4"

_METRICS: Final = SPELLINGS["metrics"][-1]


def build_command(  # noqa: PLR0913 - one call, by keyword, from the job that holds them all
    model: Model,
    settings: Settings,
    layout: Layout,
    rig: Rig,
    endpoint: Endpoint,
    *,
    installed: Installed,
    arguments: tuple[str, ...],
    given: Given,
    key_file: str = "",
) -> Command:
    """argv, environment and addresses for `layout`. Flags in `arguments` take the place of ours.

    `key_file`: where the endpoint's key is kept, if it is. Raises `UsageError` for a key that llama.cpp would take for
    several.
    """
    argv = [installed.executable]
    for name, value in _options(model, settings, layout, rig, endpoint):
        spelling = SPELLINGS[name][-1]
        if _overruled(name, given) or (name in _OPTIONAL and spelling not in installed.flags):
            continue
        argv.append(spelling)
        if value:
            argv.append(value)
    in_file = bool(key_file) and _KEY_FILE in installed.flags
    if in_file and "api-key-file" not in given:
        argv += [_KEY_FILE, key_file]
    env = visibility(_gpus(layout, rig), rig) | ({} if in_file else _secret(endpoint))
    base = f"http://{_authority(endpoint)}"
    watched = tuple(_watched(installed, given))
    return Command(
        argv=(*argv, *arguments),
        devices=_named_in_log(layout, device_names(_gpus(layout, rig))),
        env=env,
        scrub=("LLAMA_ARG_",),
        watch_argv=watched,
        files={},
        chat=bool(_TEMPLATES & model.metadata.keys()),
        ready_url=f"{base}/health",
        endpoint=f"{base}/v1",
        metrics_url=f"{base}/metrics" if "metrics" in given or _METRICS in watched else "",
    )


def _watched(installed: Installed, given: Given) -> Iterator[str]:
    """What it is to tell whoever started it: its buffers and stages, and how much it serves."""
    verbosity = SPELLINGS["verbosity"][-1]
    if verbosity in installed.flags and "verbosity" not in given:
        yield from (verbosity, _VERBOSITY)
    if _METRICS in installed.flags and "metrics" not in given:
        yield _METRICS


def _secret(endpoint: Endpoint) -> dict[str, str]:
    """The key as a variable: in argv every user of the machine could read it."""
    key = endpoint.api_key
    if key is None:
        return {}
    if "," in key or '"' in key:  # a list, as CSV (llama.cpp b11434 common/arg.cpp); "," alone would be no key at all
        raise UsageError(
            "the key has a comma or a double quote, and llama.cpp would take it for several", hint="use another key"
        )
    return {"LLAMA_API_KEY": key}


def _options(
    model: Model, settings: Settings, layout: Layout, rig: Rig, endpoint: Endpoint
) -> Iterator[tuple[str, str]]:
    """Our flags, in the order people read them: what, where, how much, then the server."""
    names = device_names(_gpus(layout, rig))
    yield "model", model.path
    yield "device", ",".join(names) or "none"
    if layout.shape.mode == "tensor":  # without --tensor-split every rank gets the same, as planned
        yield "gpu-layers", str(max(layout.counts))
        yield "split-mode", "tensor"
    else:
        yield "gpu-layers", str(sum(layout.counts))
        yield "split-mode", "layer" if len(names) > 1 else "none"
        if len(names) > 1:
            yield "tensor-split", ",".join(str(count) for count in layout.counts)
    if layout.shape.host_experts:
        yield "n-cpu-moe", str(layout.shape.host_experts)
    yield "fit", "off"
    yield "ctx-size", str(settings.n_ctx)
    yield "parallel", str(settings.n_parallel)
    if settings.kv_unified:
        yield "kv-unified", ""
    yield "cache-type-k", settings.type_k
    yield "cache-type-v", settings.type_v
    yield "flash-attn", "on" if settings.flash_attn else "off"
    yield "batch-size", str(settings.n_batch)
    yield "ubatch-size", str(settings.n_ubatch)
    yield "host", endpoint.host
    yield "port", str(endpoint.port)


#: Flags of ours that give way to other flags after `--` than their own.
_RELATED: Final = {"kv-unified": ("kv-unified", "no-kv-unified"), "n-cpu-moe": ("n-cpu-moe", "cpu-moe")}


def _overruled(name: str, given: Given) -> bool:
    return any(flag in given for flag in _RELATED.get(name, (name,)))


def _named_in_log(layout: Layout, names: tuple[str, ...]) -> tuple[str, ...]:
    """Tensor ranks are one device to the log, which tells the bytes of the largest."""
    return (RANKS,) * len(names) if layout.shape.mode == "tensor" else names


def _gpus(layout: Layout, rig: Rig) -> tuple[Gpu, ...]:
    by_index = {gpu.index: gpu for gpu in rig.gpus}
    return tuple(by_index[index] for index in layout.gpus)


def _authority(endpoint: Endpoint) -> str:
    """Where a client on this machine reaches the server: a wildcard address is reached by loopback."""
    host = {"0.0.0.0": "127.0.0.1", "::": "::1", "": "127.0.0.1"}.get(endpoint.host, endpoint.host)  # noqa: S104 - compared, not bound
    return f"[{host}]:{endpoint.port}" if ":" in host else f"{host}:{endpoint.port}"
