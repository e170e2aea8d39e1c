"""A model that is elsewhere: a name, and nothing that could be read of it here."""

from __future__ import annotations

from typing import Final

from mgpu.errors import BadModelError
from mgpu.inspect.foreign import shown
from mgpu.model import Format, Hyperparameters, Model

_NOTHING: Final = Hyperparameters(
    n_layer=0, n_ctx_train=0, n_embd=0, n_vocab=0, n_ff=(), n_head=(), n_head_kv=(), head_dim_k=0, head_dim_v=0
)
_LONGEST: Final = 256


def named_model(name: str, model_format: Format) -> Model:
    """The model that a service calls `name`: no files, no tensors. Raises `BadModelError` for what is no name."""
    if not name.strip() or not name.isprintable() or len(name) > _LONGEST:
        raise BadModelError(f"not the name of a model: {shown(name)!r}", hint="give the name the service has for it")
    return Model(
        path=name,
        files=(),
        format=model_format,
        architecture="",
        name=name,
        quantization="",
        parameters=0,
        hyper=_NOTHING,
        tensors=(),
        metadata={},
    )
