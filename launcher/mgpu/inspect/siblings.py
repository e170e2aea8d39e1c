"""The same model in other quantisations, lying beside the file: what a smaller or larger one would change."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Final

from mgpu.errors import BadModelError
from mgpu.inspect.source import read_model
from mgpu.model import Model

_GGUF: Final = ".gguf"
_LATER_SHARD: Final = re.compile(r"-0*(?!1-)\d+-of-\d+\.gguf$")

#: Files whose headers are read, at most, those of the most similar names first; and names looked at, at most.
_MOST_READ: Final = 12
_MOST_LISTED: Final = 2000

#: Quantisations of one model have as many parameters, or nearly (an output matrix of their own, other padding).
_SAME_PARAMETERS: Final = 0.03

#: And differ in size; a copy does not.
_OTHER_SIZE: Final = 0.02


def read_siblings(model: Model) -> tuple[Model, ...]:
    """Other quantisations of `model` in its file's directory, smallest first; none for URLs and directories.

    What cannot be read is no sibling: nobody asked for it.
    """
    if model.format != "gguf" or "://" in model.path:
        return ()
    found: dict[str, Model] = {}
    for path in _candidates(Path(model.path)):
        try:
            other = read_model(str(path))
        except BadModelError:
            continue
        if _is_sibling(model, other):
            found.setdefault(other.quantization, other)
    return tuple(sorted(found.values(), key=lambda other: other.weights_bytes))


def _candidates(path: Path) -> list[Path]:
    try:
        with os.scandir(path.parent) as entries:
            names = [entry.name for entry, _ in zip(entries, range(_MOST_LISTED), strict=False)]
    except OSError:
        return []
    others = [name for name in names if name.endswith(_GGUF) and name != path.name and not _LATER_SHARD.search(name)]
    others.sort(key=lambda name: (-_alike(name, path.name), name))
    return [path.with_name(name) for name in others[:_MOST_READ]]


def _alike(a: str, b: str) -> int:
    """How many characters two names begin with in common."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _is_sibling(model: Model, other: Model) -> bool:
    a, b = model.hyper, other.hyper
    theirs = (other.architecture, b.n_layer, b.n_embd, b.n_expert)
    same = theirs == (model.architecture, a.n_layer, a.n_embd, a.n_expert)
    alike = abs(model.parameters - other.parameters) <= _SAME_PARAMETERS * model.parameters
    differs = abs(model.weights_bytes - other.weights_bytes) > _OTHER_SIZE * model.weights_bytes
    return same and alike and differs
