"""The adapters by name. Each is imported only when it is in play."""

from __future__ import annotations

from typing import Final

from mgpu.adapter import Adapter
from mgpu.errors import RuntimeMissingError
from mgpu.model import Model
from mgpu.request import Request, RuntimeName

#: In the order of preference for `--runtime auto`.
ADAPTER_NAMES: Final[tuple[RuntimeName, ...]] = ("llama.cpp", "vllm")


def load_adapter(name: RuntimeName) -> Adapter:
    """The adapter called `name`. Raises `RuntimeMissingError` for one this version does not have."""
    if name == "llama.cpp":
        from mgpu_adapters.llamacpp.adapter import LlamaCpp

        return LlamaCpp()
    if name == "vllm":
        from mgpu_adapters.vllm.adapter import Vllm

        return Vllm()
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
    hint = "convert the model, or choose another runtime"
    if request.runtime == "vllm" and model.format == "gguf":
        hint = "vLLM serves no GGUF of itself since 0.24: leave --runtime out, or give the safetensors directory"
    raise RuntimeMissingError(f"no adapter among {', '.join(names)} reads {model.format}", hint=hint)
