"""vLLM's own flags after `--`: those that change memory or placement are planned with, not only passed on."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Final

from msgspec import Struct

from mgpu.errors import UsageError
from mgpu.units import GB, GIB, KIB, MIB

#: Spellings of the flags mgpu passes or plans with (vLLM 0.32.0 engine/arg_utils.py), by the name used here.
SPELLINGS: Final[Mapping[str, tuple[str, ...]]] = {
    "model": ("--model",),
    "host": ("--host",),
    "port": ("--port",),
    "api-key": ("--api-key",),
    "tensor-parallel-size": ("-tp", "--tensor-parallel-size"),
    "pipeline-parallel-size": ("-pp", "--pipeline-parallel-size"),
    "data-parallel-size": ("-dp", "--data-parallel-size"),
    "max-model-len": ("--max-model-len",),
    "gpu-memory-utilization": ("--gpu-memory-utilization", "--device-memory-utilization"),
    "kv-cache-memory-bytes": ("--kv-cache-memory-bytes",),
    "kv-cache-dtype": ("--kv-cache-dtype",),
    "max-num-seqs": ("--max-num-seqs",),
    "max-num-batched-tokens": ("--max-num-batched-tokens",),
    "dtype": ("--dtype",),
    "device-ids": ("--device-ids",),
    "cpu-offload-gb": ("--cpu-offload-gb",),
    "quantization": ("-q", "--quantization"),
    "block-size": ("--block-size",),
    "speculative-config": ("-sc", "--speculative-config"),
    "config": ("--config",),
    "fingerprint-mode": ("--fingerprint-mode",),
    "fingerprint-value": ("--fingerprint-value",),
    "enforce-eager": ("--enforce-eager",),
    "no-enforce-eager": ("--no-enforce-eager",),
}

_SWITCHES: Final = frozenset({"enforce-eager", "no-enforce-eager"})
_OURS: Final = {"model": "MODEL", "host": "--host", "port": "--port", "api-key": "--api-key"}
_NAMES: Final = {spelling: name for name, spellings in SPELLINGS.items() for spelling in spellings}
#: What stands for a flag that is mgpu's own to give, shortened as argparse takes it.
_OWN_PREFIXES: Final = {
    f"--{name[:length]}": name for name in ("host", "port", "api-key") for length in range(1, len(name))
}
_LEAST_OWN: Final = len("--ho")  # shorter ones are other flags' beginnings, too: argparse refuses them
_LEAST_PREFIX: Final = len("--max-m")  # shorter beginnings of a flag are no abbreviation anyone means

#: `1k` is 1000 and `1K` is 1024 (vLLM 0.32.0 utils/argparse_utils.py).
_NUMBER: Final = re.compile(r"([0-9]{1,18}(?:\.[0-9]{1,18})?)([kKmMgG]?)")
_FACTORS: Final = {"": 1, "k": 10**3, "K": KIB, "m": 10**6, "M": MIB, "g": GB, "G": GIB}


class Given(Struct, frozen=True, kw_only=True):
    """The known flags found after `--`, the last of each kind; switches have the value ""."""

    values: Mapping[str, str]

    def __contains__(self, name: str) -> bool:
        return name in self.values

    def integer(self, name: str) -> int | None:
        """A flag's number, `32k` and `32K` too, 1 or more. Raises `UsageError` when it is none."""
        text = self.values.get(name)
        if text is None:
            return None
        match = _NUMBER.fullmatch(text)
        number = int(float(match[1]) * _FACTORS[match[2]]) if match else 0
        if number < 1:
            raise UsageError(
                f"{_written(name)} {text!r} means nothing to vLLM here", hint="it takes a number of 1 or more, like 32k"
            )
        return number

    def fraction(self, name: str) -> int | None:
        """A share of a card's memory, in ten-thousandths, rounded down. Raises `UsageError` outside of (0, 1]."""
        text = self.values.get(name)
        if text is None:
            return None
        share = float(text) if re.fullmatch(r"[0-9]{0,18}\.?[0-9]{1,18}|[0-9]{1,18}\.", text) else 0.0
        if not 0 < share <= 1:
            raise UsageError(
                f"{_written(name)} {text!r} means nothing to vLLM", hint="it takes a share of the memory, like 0.92"
            )
        return int(share * 10_000 + 1e-9)


def read_flags(arguments: tuple[str, ...]) -> Given:
    """The flags among `arguments` that mgpu knows. Raises `UsageError` for those that mgpu itself must be told."""
    values: dict[str, str] = {}
    rest = iter(arguments)
    for argument in rest:
        flag, joined, value = argument.partition("=")
        name = _name(flag)
        if name is None:
            continue
        if name in _OURS:
            raise UsageError(
                f"{flag} after `--` would bypass mgpu", hint=f"give {_OURS[name]} to mgpu itself, before `--`"
            )
        if name in _SWITCHES:
            value = ""
        elif not joined:
            following = next(rest, None)
            if following is None:
                raise UsageError(f"{flag} after `--` lacks its value", hint=f"write {flag} VALUE")
            value = following
        values[name] = value
    return Given(values=values)


def _name(flag: str) -> str | None:
    """vLLM folds `_` to `-`, and its argparse takes any unambiguous beginning of a long flag."""
    if not flag.startswith("--"):
        return _NAMES.get(flag)
    flag = flag.replace("_", "-")
    if flag in _NAMES:
        return _NAMES[flag]
    if len(flag) >= _LEAST_OWN and flag in _OWN_PREFIXES:
        return _OWN_PREFIXES[flag]
    if len(flag) < _LEAST_PREFIX:
        return None
    meant = {name for spelling, name in _NAMES.items() if spelling.startswith(flag)}
    return meant.pop() if len(meant) == 1 else None


def _written(name: str) -> str:
    return f"--{name}"
