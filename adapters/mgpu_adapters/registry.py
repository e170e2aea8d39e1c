"""The adapters by name. Each is imported only when it is in play."""

from __future__ import annotations

from typing import Final

from mgpu.adapter import Adapter
from mgpu.errors import RuntimeMissingError
from mgpu.model import Model
from mgpu.request import Request, RuntimeName

#: In the order of preference for `--runtime auto`.
ADAPTER_NAMES: Final[tuple[RuntimeName, ...]] = ("llama.cpp",)


def load_adapter(name: RuntimeName) -> Adapter:
    """The adapter called `name`. Raises `RuntimeMissingError` for one this version does not have."""
    if name == "llama.cpp":
        from mgpu_adapters.llamacpp.adapter import LlamaCpp  # noqa: PLC0415 - start-up: only what is in play

        return LlamaCpp()
    raise RuntimeMissingError(
        f"this version of mgpu has no adapter for {name}", hint=f"it drives: {', '.join(ADAPTER_NAMES)}"
    )


def pick_adapter(request: Request, model: Model) -> Adapter:
    """The adapter asked for, or the first that reads the model's format."""
    names = ADAPTER_NAMES if request.runtime == "auto" else (request.runtime,)
    for name in names:
        adapter = load_adapter(name)
        if model.format in adapter.formats:
            return adapter
    raise RuntimeMissingError(
        f"no adapter among {', '.join(names)} reads {model.format}", hint="convert the model, or choose another runtime"
    )
