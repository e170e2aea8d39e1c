"""TabbyAPI's configuration file for a plan, and the file of its keys. Written by hand: they are two levels deep."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Final

from mgpu.adapter import Endpoint
from mgpu.errors import BadModelError
from mgpu_adapters.exllama.flags import Given
from mgpu_adapters.exllama.settings import Settings

Value = str | int | float | bool | Sequence[float] | Sequence[str]

#: TabbyAPI must have a key for its administration (load, unload, download). Nobody can send this one: HTTP headers are
#: read as Latin-1, in which there is no such dash.
NO_ADMIN: Final = "no administration \u2014 mgpu serves one model"

_PLAIN: Final = re.compile(r"true|false|-?\d+(\.\d+)?")
#: What a line of YAML cannot hold as it is (YAML 1.2, 5.1), and backslash and quote.
_ESCAPED: Final = {"\\": "\\\\", '"': '\\"'}


def model_section(
    path: str, settings: Settings, split: Sequence[float], *, tensor: bool, backend: str
) -> dict[str, Value]:
    """What is loaded, and how it is placed. `split`: GiB for each card; empty for one card."""
    parent, _, name = path.rpartition("/")
    section: dict[str, Value] = {
        "model_dir": parent or "/",
        "model_name": name,
        "max_seq_len": settings.ctx,
        "cache_size": settings.cache_tokens,
        "cache_mode": settings.cache_mode,
        "chunk_size": settings.chunk_size,
        "max_batch_size": settings.users,
    }
    if tensor:
        section |= {"tensor_parallel": True}
    if tensor and backend:
        section |= {"tensor_parallel_backend": backend}
    if split:
        section |= {"gpu_split_auto": False, "gpu_split": tuple(round(each, 6) for each in split)}
    return section


def config_text(model: Mapping[str, Value], endpoint: Endpoint, given: Given) -> str:
    """The whole file. What stands after `--` is in it, and has been planned with."""
    network: dict[str, Value] = {
        "host": endpoint.host,
        "port": endpoint.port,
        "disable_auth": endpoint.api_key is None,
    }
    sections: dict[str, dict[str, Value]] = {"network": network, "model": dict(model)}
    for name in ("network", "logging", "model", "draft_model", "memory", "developer"):
        for key, words in given.in_section(name).items():
            sections.setdefault(name, {}).setdefault(key, words)
    lines: list[str] = []
    for name, values in sections.items():
        lines += [f"{name}:", *(f"  {key}: {_yaml(value)}" for key, value in values.items())]
    return "\n".join(lines) + "\n"


def tokens_text(api_key: str) -> str:
    """`api_tokens.yml`: who may ask, and nobody to administer."""
    return f"api_key: {quoted(api_key)}\nadmin_key: {quoted(NO_ADMIN)}\n"


def _yaml(value: Value) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return str(value)
    if isinstance(value, str):
        return value.lower() if _PLAIN.fullmatch(value.lower()) else quoted(value)
    return f"[{', '.join(_yaml(each) for each in value)}]"


def quoted(text: str) -> str:
    """A YAML string in double quotes, on one line. Raises `BadModelError` for bytes that are no text."""
    return '"' + "".join(map(_escaped, text)) + '"'


def _escaped(letter: str) -> str:
    code = ord(letter)
    if 0xD800 <= code <= 0xDFFF:
        raise BadModelError(
            "the model's path has bytes that are no text, and TabbyAPI's configuration is text",
            hint="rename the file or its directory",
        )
    if letter.isprintable():
        return _ESCAPED.get(letter, letter)
    return f"\\U{code:08x}"
