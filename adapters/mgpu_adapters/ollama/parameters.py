"""What comes after `--` for Ollama: parameters of the model, as a Modelfile has them, `KEY=VALUE`; and `--rm`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Final

from msgspec import Struct

from mgpu.errors import UsageError

#: What mgpu decides itself, and how it is told.
_OURS: Final = {
    "num_ctx": "--ctx",
    "num_gpu": "--offload",
    "main_gpu": "--gpus",
    "num_batch": "nothing: it is 512, and planned with",
}
_REMOVE: Final = "--rm"
_PARAMETER: Final = re.compile(r"([a-z][a-z0-9_]*)=(.+)", re.DOTALL)

Parameter = int | float | bool | str


class Given(Struct, frozen=True, kw_only=True):
    """`parameters` by name; `removes`: an imported file is removed again at the end."""

    parameters: Mapping[str, Parameter] = {}
    removes: bool = False


def read_arguments(arguments: tuple[str, ...]) -> Given:
    """Raises `UsageError` for anything else, and for what mgpu itself must be told."""
    parameters: dict[str, Parameter] = {}
    for argument in arguments:
        if argument == _REMOVE:
            continue
        match = _PARAMETER.fullmatch(argument)
        if match is None:
            raise UsageError(
                f"{argument!r} after `--` means nothing to Ollama",
                hint="it takes parameters of a Modelfile, like temperature=0.7; and --rm, to remove an import again",
            )
        if match[1] in _OURS:
            raise UsageError(f"{match[1]} after `--` would bypass mgpu", hint=f"give mgpu itself {_OURS[match[1]]}")
        parameters[match[1]] = _value(match[2])
    return Given(parameters=parameters, removes=_REMOVE in arguments)


def _value(text: str) -> Parameter:
    if text in {"true", "false"}:
        return text == "true"
    if re.fullmatch(r"-?[0-9]{1,18}", text):
        return int(text)
    if re.fullmatch(r"-?[0-9]{1,18}\.[0-9]{1,18}", text):
        return float(text)
    return text
