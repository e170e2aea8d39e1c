"""What a model is to be called on an Ollama server, and be given there."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Final

from msgspec import Struct

from mgpu.model import Model
from mgpu_adapters.ollama.parameters import Parameter

_FOREIGN: Final = re.compile(r"[^a-z0-9._-]+")
_STEM: Final = 60  # parts of a name have 80 characters at most (types/model/name.go)


class Wish(Struct, frozen=True, kw_only=True):
    """A model made ready: from `alias`, which the server has, or from files that are imported first.

    `card_bytes`: of weights, cache and buffers on cards, as planned. `unheld`: what it cannot be held to.
    """

    name: str
    stem: str
    alias: str | None
    paths: tuple[str, ...]
    file_bytes: int
    parameters: Mapping[str, Parameter]
    ctx: int
    card_bytes: int
    on_cards: bool  # all of it
    copies: int  # of the files that an import leaves in the store at first
    removes: bool = False
    unheld: tuple[str, ...] = ()

    def import_name(self, digest: str) -> str:
        """What the files alone are called there: kept for the next time."""
        return f"{self.stem}:import-{digest[:12]}"


def stem_of(model: Model) -> str:
    """`"mgpu-llama3.3-70b"`, in letters that every version takes."""
    plain = model.alias or model.path.rpartition("/")[2].removesuffix(".gguf")
    slug = _FOREIGN.sub("-", plain.lower().replace(":latest", "").replace(":", "-")).strip("-._")
    return f"mgpu-{slug or 'model'}"[:_STEM].rstrip("-._")


def name_of(model: Model, parameters: Mapping[str, Parameter]) -> str:
    """`"mgpu-llama3.3-70b:1f2e3d4c"`: another plan has another name, the same plan the same."""
    from hashlib import sha256  # for this runtime alone

    source = model.alias or "\n".join(file.path for file in model.files)
    text = f"{source}\n{sorted(parameters.items())}"
    return f"{stem_of(model)}:{sha256(text.encode('utf-8', 'surrogateescape')).hexdigest()[:8]}"
