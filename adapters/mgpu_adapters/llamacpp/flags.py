"""llama-server's own flags after `--`: those that change memory or placement are planned with, not only passed on."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Final, get_args

from msgspec import Struct

from mgpu.errors import UsageError
from mgpu.model import KV_TYPES
from mgpu_adapters.llamacpp.settings import SplitMode

#: llama.cpp keeps these numbers in 32 bits, and shares in float32.
_MOST: Final = 2**31 - 1
_LARGEST_SHARE: Final = 1e30

#: Spellings of the flags mgpu passes or plans with (llama.cpp b11434 common/arg.cpp), by the name used here.
SPELLINGS: Final[Mapping[str, tuple[str, ...]]] = {
    "model": ("-m", "--model"),
    "host": ("--host",),
    "port": ("--port",),
    "api-key": ("--api-key",),
    "api-key-file": ("--api-key-file",),
    "device": ("-dev", "--device"),
    "gpu-layers": ("-ngl", "--gpu-layers", "--n-gpu-layers"),
    "split-mode": ("-sm", "--split-mode"),
    "tensor-split": ("-ts", "--tensor-split"),
    "main-gpu": ("-mg", "--main-gpu"),
    "ctx-size": ("-c", "--ctx-size"),
    "parallel": ("-np", "--parallel"),
    "kv-unified": ("-kvu", "--kv-unified"),
    "no-kv-unified": ("-no-kvu", "--no-kv-unified"),
    "batch-size": ("-b", "--batch-size"),
    "ubatch-size": ("-ub", "--ubatch-size"),
    "flash-attn": ("-fa", "--flash-attn"),
    "cache-type-k": ("-ctk", "--cache-type-k"),
    "cache-type-v": ("-ctv", "--cache-type-v"),
    "no-kv-offload": ("-nkvo", "--no-kv-offload"),
    "swa-full": ("--swa-full",),
    "cpu-moe": ("-cmoe", "--cpu-moe"),
    "n-cpu-moe": ("-ncmoe", "--n-cpu-moe"),
    "override-tensor": ("-ot", "--override-tensor"),
    "fit": ("-fit", "--fit"),
    "verbosity": ("-lv", "--verbosity", "--log-verbosity"),
    "metrics": ("--metrics",),
}  # fmt: skip

_SPLIT_MODES: Final[tuple[SplitMode, ...]] = get_args(SplitMode)
_SWITCHES: Final = frozenset({"kv-unified", "no-kv-unified", "no-kv-offload", "swa-full", "cpu-moe", "metrics"})
_OURS: Final = {"model": "MODEL", "host": "--host", "port": "--port", "api-key": "--api-key"}
_NAMES: Final = {spelling: name for name, spellings in SPELLINGS.items() for spelling in spellings}


class Given(Struct, frozen=True, kw_only=True):
    """The known flags found after `--`, the last of each kind; switches have the value ""."""

    values: Mapping[str, str]

    def __contains__(self, name: str) -> bool:
        return name in self.values

    def integer(self, name: str, *, least: int) -> int | None:
        """A flag's number. Raises `UsageError` when it is none, or too small."""
        value = self.values.get(name)
        if value is None:
            return None
        _parsed(name, value, lambda text: least <= _integer(text) <= _MOST, f"a whole number of {least} or more")
        return _integer(value)

    def kv_type(self, name: str, default: str) -> str:
        value = self.values.get(name, default)
        return _parsed(name, value, KV_TYPES.__contains__, "one of " + ", ".join(KV_TYPES))

    def choice(self, name: str, choices: tuple[str, ...]) -> str | None:
        value = self.values.get(name)
        return None if value is None else _parsed(name, value, choices.__contains__, "one of " + ", ".join(choices))

    def split_mode(self) -> SplitMode | None:
        """None where not given."""
        found = self.choice("split-mode", _SPLIT_MODES)
        return next((mode for mode in _SPLIT_MODES if mode == found), None)

    def gpu_layers(self) -> int | None:
        """-1 for "all"; None where not given, or "auto"."""
        value = self.values.get("gpu-layers")
        if value in {None, "auto"}:
            return None
        if value == "all":
            return -1
        return self.integer("gpu-layers", least=-2)

    def tensor_split(self) -> tuple[float, ...] | None:
        """Proportions, split at `,` or `/` as llama.cpp does; at most 15."""
        value = self.values.get("tensor-split")
        if value is None:
            return None
        _parsed("tensor-split", value, _is_split, "up to 15 numbers of 0 or more, like 3,1")
        return tuple(float(part) for part in value.replace("/", ",").split(","))

    def overrides(self) -> tuple[tuple[str, str], ...]:
        """`--override-tensor` as (regex, buffer type) pairs."""
        value = self.values.get("override-tensor")
        if value is None:
            return ()
        _parsed("override-tensor", value, _is_overrides, "PATTERN=BUFFER,… with patterns that are regular expressions")
        pairs = (part.rpartition("=") for part in value.split(","))
        return tuple((pattern, buffer) for pattern, _, buffer in pairs)


def read_flags(arguments: tuple[str, ...]) -> Given:
    """The flags among `arguments` that mgpu knows. Raises `UsageError` for those that mgpu itself must be told."""
    values: dict[str, str] = {}
    rest = iter(arguments)
    for argument in rest:
        name = _NAMES.get(_normal(argument))
        if name is None:
            continue
        if name in _OURS:
            raise UsageError(
                f"{argument} after `--` would bypass mgpu", hint=f"give {_OURS[name]} to mgpu itself, before `--`"
            )
        values[name] = "" if name in _SWITCHES else _value(argument, rest)
    return Given(values=values)


def _value(argument: str, rest: Iterator[str]) -> str:
    value = next(rest, None)
    if value is None:
        raise UsageError(f"{argument} after `--` lacks its value", hint=f"write {argument} VALUE")
    return value


def _normal(argument: str) -> str:
    """llama.cpp folds `_` to `-` in long options."""
    return argument.replace("_", "-") if argument.startswith("--") else argument


def _parsed(name: str, value: str, good: Callable[[str], bool], accepted: str) -> str:
    try:
        fine = good(value)
    except ValueError:
        fine = False
    if not fine:
        raise UsageError(f"{SPELLINGS[name][-1]} {value!r} means nothing to llama.cpp", hint=f"it takes {accepted}")
    return value


def _is_split(text: str) -> bool:
    numbers = [float(part) for part in text.replace("/", ",").split(",")]
    return len(numbers) <= 15 and all(0 <= number <= _LARGEST_SHARE for number in numbers) and any(numbers)


def _is_overrides(text: str) -> bool:
    for part in text.split(","):
        pattern, equals, buffer = part.rpartition("=")
        if not (equals and pattern and buffer):
            return False
        try:
            with warnings.catch_warnings(action="ignore"):  # of "[[": a set in a set, some day
                re.compile(pattern)
        except (re.error, OverflowError, RecursionError):
            return False
    return True


def _integer(text: str) -> int:
    """As C reads it: no underscores, no other digits than ASCII's. Raises `ValueError`."""
    if re.fullmatch(r"[+-]?[0-9]{1,18}", text) is None:
        raise ValueError(text)
    return int(text)
