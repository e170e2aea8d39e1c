"""`config.json` and its like: bounded reading, and values by key with complaints that name key, value and file.

As Python's own JSON, not RFC 8259: transformers writes `Infinity` there (`time_step_limit` of Mamba 2 models).
"""

from __future__ import annotations

import json
import math
import stat
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from mgpu.errors import BadModelError
from mgpu.inspect.foreign import shown
from mgpu.inspect.safetensors import unreadable
from mgpu.model import MetadataValue
from mgpu.units import MIB

#: Longer files are refused. Real ones have 1 to 600 KB, and some MB where every expert's quantisation is listed.
MAX_CONFIG_BYTES: Final = 16 * MIB
_MAX_VALUES: Final = 1 << 20  # in one file: what bounds the memory it takes
_MAX_NUMBER: Final = (1 << 31) - 1
_MAX_KEYS: Final = 4096  # of the metadata
_MAX_DEPTH: Final = 8  # of objects in the metadata
_MAX_STRING: Final = 1024
_MAX_ARRAY: Final = 1024
_HINT: Final = "download config.json again, from the same place as the weights"

#: Where models of text and more keep what describes the text model.
_TEXT_CONFIGS: Final = ("text_config", "llm_config", "language_config")
#: The names of a classifier's classes, without end.
_LABELS: Final = frozenset({"id2label", "label2id"})
#: These describe the whole model, also where the text model has its own.
_WHOLE: Final = frozenset({"architectures", "model_type"})


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a small file. Raises `BadModelError`."""
    raw = read_bounded(path, MAX_CONFIG_BYTES)
    if raw.count(b",") > _MAX_VALUES:
        raise BadModelError(f"{shown(str(path))} has more than {_MAX_VALUES} values", hint=_again(path))
    return _parse_object(raw, path)


def read_bounded(path: Path, limit: int) -> bytes:
    """A regular file of at most `limit` bytes, and not empty."""
    origin = shown(str(path))
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # opening a FIFO would wait for a writer
            raise BadModelError(f"{origin} is not a regular file", hint=_again(path))
        with path.open("rb") as file:
            raw = file.read(limit + 1)
    except OSError as error:
        raise unreadable(path, error) from error
    if not raw:
        raise BadModelError(f"{origin} is empty (0 bytes)", hint=_again(path))
    if len(raw) > limit:
        raise BadModelError(f"{origin} is longer than {limit} bytes, too long for what it should be", hint=_again(path))
    return raw


def _parse_object(raw: bytes, path: Path) -> dict[str, Any]:
    origin = shown(str(path))
    try:
        value = json.loads(raw.decode(), object_pairs_hook=_unique)
    except UnicodeDecodeError as error:
        raise BadModelError(f"{origin} is not UTF-8: byte {error.start} is wrong", hint=_again(path)) from None
    except RecursionError:
        raise BadModelError(f"{origin} is nested too deeply", hint=_again(path)) from None
    except ValueError as error:  # JSONDecodeError, numbers of thousands of digits, and ours
        raise BadModelError(f"{origin} is not JSON as it should be: {shown(str(error))}", hint=_again(path)) from None
    if not isinstance(value, dict):
        raise BadModelError(f"{origin} is not a JSON object, but {described(value)}", hint=_again(path))
    return value


def _again(path: Path) -> str:
    return f"download {shown(path.name)} again, from the same place as the weights"


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A repeated key is only refused where readers could differ about its value."""
    values: dict[str, Any] = {}
    for key, value in pairs:
        if key in values and values[key] != value:
            raise ValueError(f"the key {key!r} occurs twice, with different values")
        values[key] = value
    return values


class Config:
    """The values of `config.json`: those of the text model on top of those of the whole."""

    def __init__(self, values: Mapping[str, Any], origin: str) -> None:
        self.values: dict[str, Any] = dict(values)
        self.origin = shown(origin)
        for text in _text_configs(values):
            stated = {key: value for key, value in text.items() if value is not None}
            self.values |= {key: value for key, value in stated.items() if key not in _WHOLE or key not in values}

    def bad(self, what: str, hint: str = _HINT) -> BadModelError:
        return BadModelError(f"{self.origin}: {what}", hint=hint)

    def get(self, key: str) -> Any:
        """The value; in objects by dotted key. None where it, or an object on the way, is absent or null."""
        value: Any = self.values
        for part in key.split("."):
            if not isinstance(value, Mapping):
                return None
            value = value.get(part)
        return value

    def find(self, keys: Sequence[str]) -> tuple[str, Any]:
        """The first of `keys` that has a value, and the value; `(keys[0], None)` if none has."""
        for key in keys:
            value = self.get(key)
            if value is not None:
                return key, value
        return keys[0], None

    def integer(self, *keys: str, default: int | None = None, low: int = 0, high: int = _MAX_NUMBER) -> int:
        """The first of `keys` that is there; `default` if none is, and it is not required (None)."""
        key, value = self.find(keys)
        if value is not None:
            return self.checked(key, value, low, high)
        if default is None:
            raise self.bad(f"there is no {keys[0]}")
        return default

    def most(self, *keys: str, high: int = _MAX_NUMBER) -> int:
        """As `integer`, or the largest of a list; 0 if there is none."""
        key, value = self.find(keys)
        values = value if isinstance(value, list) else [] if value is None else [value]
        return max((self.checked(key, each, 0, high) for each in values), default=0)

    def per_layer(self, n_layer: int, *keys: str, default: int, high: int = _MAX_NUMBER) -> tuple[int, ...]:
        """One number for every block, or a list with one for each."""
        key, value = self.find(keys)
        if value is None:
            return (default,) * n_layer
        if not isinstance(value, list):
            return (self.checked(key, value, 0, high),) * n_layer
        if len(value) != n_layer:
            raise self.bad(f"{key} has {len(value)} values for {n_layer} layers")
        return tuple(0 if each is None else self.checked(key, each, 0, high) for each in value)

    def number(self, *keys: str, low: float, high: float) -> float | None:
        """The first of `keys` that is there, as a finite number within bounds."""
        key, value = self.find(keys)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self.bad(f"{key} is {described(value)}, it must be a number")
        if not low <= value <= high:
            raise self.bad(f"{key} is {described(value)}, it must be {low:g} to {high:g}")
        return value

    def text(self, *keys: str) -> str:
        """The first of `keys` that is a string; "" if none is. A list of strings counts as its first."""
        for key in keys:
            value = self.get(key)
            if isinstance(value, list) and value:
                value = value[0]
            if isinstance(value, str):
                return value
        return ""

    def checked(self, key: str, value: Any, low: int, high: int) -> int:
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if isinstance(value, bool) or not isinstance(value, int):
            raise self.bad(f"{key} is {described(value)}, it must be a whole number")
        if not low <= value <= high:
            raise self.bad(f"{key} is {described(value)}, it must be {low} to {high}")
        return value

    def metadata(self) -> dict[str, MetadataValue]:
        """Scalars, and short arrays of numbers, by dotted key. The text model's have no prefix of their own."""
        flat: dict[str, MetadataValue] = {}
        for key, value in _scalars("", self.values, _MAX_DEPTH):
            if len(flat) >= _MAX_KEYS:
                break
            flat[key] = value
        architecture = self.text("architectures")
        return flat | ({"architectures": architecture[:_MAX_STRING]} if architecture else {})


def described(value: Any) -> str:
    """A value as the file has it, in one short line; of lists and objects, only that they are."""
    if isinstance(value, list):
        return f"a list of {len(value)}"
    return "an object" if isinstance(value, dict) else shown(json.dumps(value))


def _text_configs(values: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """The objects that describe the text model: one, usually."""
    thinker = values.get("thinker_config")
    homes = [values] + ([thinker] if isinstance(thinker, Mapping) else [])
    for home in homes:
        for key in _TEXT_CONFIGS:
            if isinstance(text := home.get(key), Mapping):
                yield text


def _scalars(prefix: str, values: Mapping[str, Any], depth: int) -> Iterator[tuple[str, MetadataValue]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            on_top = not prefix and key in _TEXT_CONFIGS  # its values are there without the prefix
            if depth and not on_top and key not in _LABELS:
                yield from _scalars(f"{prefix}{key}.", value, depth - 1)
        elif (kept := _kept(value)) is not None:
            yield prefix + key, kept


def _kept(value: Any) -> MetadataValue | None:
    """The value, if metadata keeps it."""
    if isinstance(value, str):
        return value if len(value) <= _MAX_STRING else None
    if isinstance(value, list):
        short = 0 < len(value) <= _MAX_ARRAY
        return tuple(value) if short and all(_is_number(each) for each in value) else None
    return value if _is_number(value) else None


def _is_number(value: Any) -> bool:
    if isinstance(value, float):
        return math.isfinite(value)
    return isinstance(value, int) and -(1 << 63) <= value < 1 << 64
