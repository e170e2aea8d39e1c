"""The adapters by name. Each is imported only when it is in play, and others' are looked for only when asked for."""

from __future__ import annotations

import importlib
from typing import Any, Final

from msgspec import Struct

from mgpu.adapter import Adapter
from mgpu.errors import RuntimeMissingError, UsageError
from mgpu.model import Format, Model
from mgpu.request import Request, RuntimeName

#: The entry points by which other packages bring adapters: `NAME = "package.module:Class"`.
GROUP: Final = "mgpu.adapters"


class _Place(Struct, frozen=True):
    """Where an adapter is, and what it reads: `formats` again, so that none is imported to find out."""

    module: str
    kind: str
    formats: frozenset[Format]


#: In the order of preference for `--runtime auto`.
_PLACES: Final[dict[RuntimeName, _Place]] = {
    "llama.cpp": _Place("mgpu_adapters.llamacpp.adapter", "LlamaCpp", frozenset({"gguf"})),
    "ollama": _Place("mgpu_adapters.ollama.adapter", "Ollama", frozenset({"gguf"})),
    "vllm": _Place("mgpu_adapters.vllm.adapter", "Vllm", frozenset({"safetensors"})),
    "exllamav3": _Place("mgpu_adapters.exllama.adapter", "ExLlamaV3", frozenset({"exl3"})),
    "exllamav2": _Place("mgpu_adapters.exllama.adapter", "ExLlamaV2", frozenset({"exl2"})),
    "aikit": _Place("mgpu_adapters.aikit.adapter", "AIKit", frozenset({"safetensors"})),
    "exo": _Place("mgpu_adapters.exo.adapter", "Exo", frozenset({"safetensors"})),
    "mycoswarm": _Place("mgpu_adapters.mycoswarm.adapter", "MycoSwarm", frozenset({"gguf"})),
}
ADAPTER_NAMES: Final = tuple(_PLACES)

#: These place by themselves, over other machines: only when asked for.
_ASKED_ONLY: Final = frozenset({"exo", "mycoswarm"})


def names_for(model_format: Format) -> tuple[RuntimeName, ...]:
    """The runtimes that `--runtime auto` may take for a format, the preferred first."""
    return tuple(name for name, place in _PLACES.items() if model_format in place.formats and name not in _ASKED_ONLY)


def named_format(name: RuntimeName) -> Format | None:
    """What the models of a service on other machines are, which go by name; None: it needs the model's files here."""
    return next(iter(_PLACES[name].formats)) if name in _ASKED_ONLY else None


def load_adapter(name: RuntimeName) -> Adapter:
    """The adapter called `name`, ours or a third party's. Raises `RuntimeMissingError` for one there is not."""
    place = _PLACES.get(name)
    if place is None:
        return _load_others(name)
    adapter: Adapter = getattr(importlib.import_module(place.module), place.kind)()
    return adapter


def pick_adapter(request: Request, model: Model) -> Adapter:
    """The adapter asked for, or the preferred one for the model's format."""
    if request.runtime == "auto":
        return load_adapter(names_for(model.format)[0])
    adapter = load_adapter(request.runtime)
    if model.format in adapter.formats:
        return adapter
    hint = f"convert the model, or choose another runtime: {', '.join(names_for(model.format))}"
    if request.runtime == "vllm" and model.format == "gguf":
        hint = "vLLM serves no GGUF of itself since 0.24: leave --runtime out, or give the safetensors directory"
    if request.runtime == "exo":
        hint = "Exo runs MLX models: give the id of one, like mlx-community/Llama-3.2-1B-Instruct-4bit"
    raise RuntimeMissingError(f"{request.runtime} reads no {model.format}: {model.path}", hint=hint)


def other_names() -> tuple[RuntimeName, ...]:
    """The names of third parties' adapters, sorted: those that are installed beside mgpu. Takes some 20 ms."""
    return tuple(sorted(set(_others()) - set(_PLACES)))


def _others() -> dict[str, list[Any]]:
    """Entry points (`importlib.metadata.EntryPoint`) by name: more than one where packages compete for it."""
    from importlib.metadata import entry_points  # slow, and needed for nothing else

    found: dict[str, list[Any]] = {}
    for point in entry_points(group=GROUP):
        found.setdefault(point.name, []).append(point)
    return found


def _load_others(name: RuntimeName) -> Adapter:
    points = _others().get(name, [])
    if not points:
        names = ", ".join((*ADAPTER_NAMES, *other_names()))
        raise RuntimeMissingError(f"there is no adapter for a runtime called {name!r}", hint=f"mgpu drives: {names}")
    if len(points) > 1:
        packages = " and ".join(_package(point) for point in points)
        raise UsageError(f"{packages} both bring an adapter called {name!r}", hint="uninstall one of the two")
    point = points[0]
    try:
        adapter = point.load()()
    except Exception as error:  # whatever somebody else's code raises: the person can only remove or repair it
        reason = f"{type(error).__name__}: {error}"
        raise RuntimeMissingError(
            f"the adapter {name!r} of {_package(point)} cannot be loaded: {reason}", hint=_repair(point)
        ) from error
    return _checked(adapter, name, point)


def _checked(adapter: Any, name: RuntimeName, point: Any) -> Adapter:
    """An adapter that has all an adapter must have, and goes by the name it was asked for."""
    lacking = [member for member in vars(Adapter) if not member.startswith("_") and not hasattr(adapter, member)]
    if lacking:
        raise RuntimeMissingError(
            f"the adapter {name!r} of {_package(point)} has no {', '.join(sorted(lacking))}", hint=_repair(point)
        )
    if adapter.name != name:
        raise RuntimeMissingError(
            f"the adapter {name!r} of {_package(point)} calls itself {adapter.name!r}", hint=_repair(point)
        )
    checked: Adapter = adapter
    return checked


def _package(point: Any) -> str:
    return "an unknown package" if point.dist is None else f"{point.dist.name} {point.dist.version}"


def _repair(point: Any) -> str:
    name = "it" if point.dist is None else point.dist.name
    return f"update {name}, or uninstall it; docs/adapters.md says what an adapter needs"
