"""Which model of the cluster is meant: an id on Hugging Face, its last part, or a directory of that name."""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Iterator
from typing import Final

from mgpu.errors import BadModelError, RuntimeMissingError
from mgpu.model import Model

_ID: Final = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+", re.ASCII)
_HINT: Final = "give the id of an MLX model on Hugging Face: mlx-community/Llama-3.2-1B-Instruct-4bit"

#: Weights that MLX computes with: its own quantisation, MXFP4 (gpt-oss), and plain ones.
_MLX: Final = ("MLX", "MXFP4", "FP16", "BF16", "FP32")


def model_id(model: Model, known: Collection[str]) -> str:
    """The id under which Exo runs `model`. `known`: the ids its cluster has, empty when it was not asked.

    Raises `BadModelError` for what is no id, `RuntimeMissingError` for weights that MLX cannot load.
    """
    if model.files:
        return _of_directory(model, known)
    if model.path in known or _ID.fullmatch(model.path):
        return model.path
    same = [one for one in known if one.rpartition("/")[2].lower() == model.path.lower()]
    if len(same) == 1:
        return same[0]
    if same:
        raise BadModelError(f"{model.path!r} is the name of {len(same)} models", hint=f"give one: {', '.join(same)}")
    close = difflib.get_close_matches(model.path, known, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(close)}?" if close else _HINT
    raise BadModelError(f"{model.path!r} is no model id of Exo, and no directory here", hint=hint)


def _of_directory(model: Model, known: Collection[str]) -> str:
    if model.format != "safetensors" or not model.quantization.startswith(_MLX):
        what = "GGUF" if model.format == "gguf" else model.quantization
        raise RuntimeMissingError(f"Exo runs MLX models alone, and {model.path} is {what}", hint=_HINT)
    candidates = list(dict.fromkeys(_candidates(model.path)))
    found = [one for one in candidates if one in known]
    if not found and not known:
        found = candidates
    if len(found) == 1:
        return found[0]
    raise BadModelError(
        f"the name of {model.path} does not say which model of the cluster it is",
        hint=f"give its id; {_HINT.removeprefix('give ')}",
    )


def _candidates(path: str) -> Iterator[str]:
    """Ids it may hold: `ORG--NAME` (Exo's directories), `models--ORG--NAME/snapshots/…` (the hub's), `ORG/NAME`."""
    parts = path.rstrip("/").split("/")
    if len(parts) > 2 and parts[-2] == "snapshots" and parts[-3].startswith("models--"):
        yield parts[-3].removeprefix("models--").replace("--", "/", 1)
    elif "--" in parts[-1]:
        yield parts[-1].replace("--", "/", 1)
    elif len(parts) > 1 and _ID.fullmatch("/".join(parts[-2:])):
        yield "/".join(parts[-2:])
