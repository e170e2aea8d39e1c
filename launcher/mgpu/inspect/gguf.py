"""The header of a GGUF file, from bytes to `Header`, for llama.cpp's rules of what a good header is.

Nothing is allocated or looped over on the word of the file alone: counts and lengths are first compared with the bytes
that are there. Sources: llama.cpp b11434 `ggml/src/gguf.cpp` (checks), `ggml/include/ggml.h` and
`gguf-py/gguf/constants.py` (types), and the specification, https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable
from typing import Final

import msgspec

from mgpu.errors import BadModelError
from mgpu.inspect.foreign import check_magic, shown
from mgpu.model import MetadataValue
from mgpu.units import MIB

#: Longer headers are refused. The longest real ones (780k tokens and merges) are near 20 MiB.
MAX_HEADER_BYTES: Final = 256 * MIB
#: More keys, or more tensors in one file, are refused. Real files have under 100 and under 3000.
MAX_COUNT: Final = 1 << 16
#: Longer keys are refused (the specification's limit); longer strings are not kept.
MAX_STRING_BYTES: Final = 1 << 16
#: Longer numeric arrays are not kept; nor is any, once this many times eight elements are.
MAX_ARRAY: Final = 8192
_MAX_NAME: Final = 64  # GGML_MAX_NAME
_MAX_DIMS: Final = 4  # GGML_MAX_DIMS
_MAX_I64: Final = (1 << 63) - 1

DAMAGED: Final = "the file is damaged: download it again, or compare its checksum with the publisher's"

#: ggml type id -> name, elements per block, bytes per block.
TYPES: Final = {
    0: ("F32", 1, 4), 1: ("F16", 1, 2), 2: ("Q4_0", 32, 18), 3: ("Q4_1", 32, 20), 6: ("Q5_0", 32, 22),
    7: ("Q5_1", 32, 24), 8: ("Q8_0", 32, 34), 9: ("Q8_1", 32, 36), 10: ("Q2_K", 256, 84), 11: ("Q3_K", 256, 110),
    12: ("Q4_K", 256, 144), 13: ("Q5_K", 256, 176), 14: ("Q6_K", 256, 210), 15: ("Q8_K", 256, 292),
    16: ("IQ2_XXS", 256, 66), 17: ("IQ2_XS", 256, 74), 18: ("IQ3_XXS", 256, 98), 19: ("IQ1_S", 256, 50),
    20: ("IQ4_NL", 32, 18), 21: ("IQ3_S", 256, 110), 22: ("IQ2_S", 256, 82), 23: ("IQ4_XS", 256, 136),
    24: ("I8", 1, 1), 25: ("I16", 1, 2), 26: ("I32", 1, 4), 27: ("I64", 1, 8), 28: ("F64", 1, 8),
    29: ("IQ1_M", 256, 56), 30: ("BF16", 1, 2), 34: ("TQ1_0", 256, 54), 35: ("TQ2_0", 256, 66),
    39: ("MXFP4", 32, 17), 40: ("NVFP4", 64, 36), 41: ("Q1_0", 128, 18), 42: ("Q2_0", 64, 18),
}  # fmt: skip
_REMOVED_TYPES: Final = {
    4: "Q4_2", 5: "Q4_3", 31: "Q4_0_4_4", 32: "Q4_0_4_8", 33: "Q4_0_8_8",
    36: "IQ4_NL_4_4", 37: "IQ4_NL_4_8", 38: "IQ4_NL_8_8",
}  # fmt: skip

_BOOL, _STRING, _ARRAY = 7, 8, 9
_UINT32: Final = 4
#: GGUF value type -> its `struct` letter. Bools are read as bytes, to see those that are neither 0 nor 1.
_LETTERS: Final = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", _BOOL: "B", 10: "Q", 11: "q", 12: "d"}
_SCALARS: Final = {kind: struct.Struct("<" + letter) for kind, letter in _LETTERS.items()}
_U32: Final = struct.Struct("<I")
_I32: Final = struct.Struct("<i")
_U64: Final = struct.Struct("<Q")

#: Bytes of token strings that are stepped over at a time.
_WINDOW: Final = 1 << 18
_COUNTS: Final = struct.Struct("<qq")
_ARRAY_HEAD: Final = struct.Struct("<iQ")
#: By number of dimensions: the dimensions, the type, the offset.
_TENSOR_TAILS: Final = tuple(struct.Struct(f"<{n}QiQ") for n in range(_MAX_DIMS + 1))
_LEAST_KEY: Final = 8 + 1 + 4 + 1  # length, one letter, type, one byte
_LEAST_TENSOR: Final = 8 + 4 + 4 + 8  # length, number of dimensions, type, offset

Buffer = bytes | bytearray
#: The file's bytes from here to there, or more of them.
Read = Callable[[int, int], bytes]


class NeedMore(Exception):  # noqa: N818 - not an error: the caller fetches more of the file and asks again
    """The buffer ends before the header does, and the file goes on. `at_least` is the bytes needed from its start."""

    def __init__(self, at_least: int) -> None:
        super().__init__(at_least)
        self.at_least = at_least


class TensorInfo(msgspec.Struct, frozen=True, kw_only=True):
    """One tensor of the header. `shape` has the fastest dimension first; `offset` counts from the data's start."""

    name: str
    shape: tuple[int, ...]
    type: str
    n_bytes: int
    offset: int


class Header(msgspec.Struct, frozen=True, kw_only=True):
    """One file's header. Long strings and arrays, and arrays of strings, are in `metadata` as `"<key>.length"` only.

    `header_bytes` ends after the last tensor info; the data starts at `data_offset`, the next multiple of `alignment`.
    """

    version: int
    metadata: dict[str, MetadataValue]
    tensors: tuple[TensorInfo, ...]
    alignment: int
    header_bytes: int
    data_offset: int


def parse_header(buffer: Buffer, *, n_bytes_total: int, origin: str, read: Read | None = None) -> Header:
    """The header at the start of `buffer`, which holds the first bytes of a file of `n_bytes_total`.

    `origin` names the file in messages. `read` lengthens `buffer` (a bytearray) where it is too short a part of the
    file. Raises `BadModelError`, and `NeedMore` in the absence of `read`.
    """
    cursor = _Cursor(buffer, n_bytes_total, shown(origin), read)
    version, n_tensors, n_keys = _read_preamble(cursor)
    metadata = _read_metadata(cursor, n_keys)
    alignment = _alignment(cursor, metadata)
    tensors = tuple(_read_tensors(cursor, n_tensors, alignment))
    # llama.cpp does not pad a header without tensors
    data_offset = _padded(cursor.at, alignment) if tensors else cursor.at
    _check_whole(cursor, data_offset, tensors, alignment)
    return Header(
        version=version,
        metadata=metadata,
        tensors=tensors,
        alignment=alignment,
        header_bytes=cursor.at,
        data_offset=data_offset,
    )


class _Cursor:
    """A position in the header. What is read is first compared with what is there."""

    __slots__ = ("at", "buffer", "end", "kept", "origin", "read", "size")

    def __init__(self, buffer: Buffer, size: int, origin: str, read: Read | None) -> None:
        self.buffer = buffer
        self.end = len(buffer)
        self.size = size
        self.origin = origin
        self.read = read
        self.at = 0
        self.kept = 0  # elements of numeric arrays

    def bad(self, what: str, hint: str = DAMAGED) -> BadModelError:
        return BadModelError(f"{self.origin}: {what}", hint=hint)

    def reach(self, end: int, what: str) -> None:
        """Raise unless the buffer goes on to `end`, or can be made to."""
        if end <= self.end:
            return
        what = shown(what)
        if end > self.size:
            raise self.bad(f"the header is cut short: {what} would end at byte {end}, the file ends at {self.size}")
        if end > MAX_HEADER_BYTES:
            raise self.bad(f"the header is longer than {MAX_HEADER_BYTES // MIB} MiB ({what} ends at byte {end})")
        if self.read is None:
            raise NeedMore(end)
        self.buffer += self.read(self.end, end)
        self.end = len(self.buffer)

    def take(self, layout: struct.Struct, what: str) -> tuple[int, ...]:
        start, end = self.at, self.at + layout.size
        if end > self.end:
            self.reach(end, what)
        self.at = end
        return layout.unpack_from(self.buffer, start)

    def take_string(self, what: str, limit: int) -> bytes | bytearray | None:
        """A length and that many bytes; None, skipped over, if there are more than `limit`."""
        (length,) = self.take(_U64, what)
        start, end = self.at, self.at + length
        if end > self.end:
            self.reach(end, what)
        self.at = end
        return None if length > limit else self.buffer[start:end]

    def take_name(self, what: str, limit: int) -> str:
        """As `take_string`, but it must be UTF-8 and within the limit."""
        raw = self.take_string(what, limit)
        if raw is None:
            raise self.bad(f"{what} is longer than {limit} bytes")
        try:
            return raw.decode()
        except UnicodeDecodeError:
            raise self.bad(f"{what} is not UTF-8: {ascii(bytes(raw[:64]))[1:]}") from None


def _read_preamble(cursor: _Cursor) -> tuple[int, int, int]:
    """Version, number of tensors, number of keys."""
    check_magic(bytes(cursor.buffer[: min(64, cursor.end)]), cursor.origin)
    cursor.at = 4
    (version,) = cursor.take(_U32, "the version")
    if version & 0xFFFF == 0 and version != 0:
        raise cursor.bad(
            f"the file is big-endian (version reads {version:#x})", "download the little-endian GGUF of the model"
        )
    if version not in {2, 3}:
        raise cursor.bad(
            f"GGUF version {version} is not supported; versions 2 and 3 are",
            "download a newer GGUF of the model" if version < 2 else "a newer mgpu may read it",
        )
    n_tensors, n_keys = cursor.take(_COUNTS, "the counts")
    for n, least, what in ((n_keys, _LEAST_KEY, "keys"), (n_tensors, _LEAST_TENSOR, "tensors")):
        most = min(MAX_COUNT, (cursor.size - cursor.at) // least)
        if not 0 <= n <= most:
            raise cursor.bad(f"the header claims {n} {what}; a file of {cursor.size} bytes has at most {most}")
    return version, n_tensors, n_keys


def _read_metadata(cursor: _Cursor, n_keys: int) -> dict[str, MetadataValue]:
    metadata: dict[str, MetadataValue] = {}
    seen: set[str] = set()
    for index in range(n_keys):
        key = cursor.take_name(f"key {index}", MAX_STRING_BYTES)
        if not key:
            raise cursor.bad(f"key {index} is empty")
        if key in seen:
            raise cursor.bad(f"the key {shown(key)} occurs twice")
        seen.add(key)
        (kind,) = cursor.take(_I32, key)
        if key == "general.alignment" and kind != _UINT32:
            raise cursor.bad(f"general.alignment has value type {kind}, it must be {_UINT32} (u32)")
        if kind == _ARRAY:
            name, value = _read_array(cursor, key)
        elif kind == _STRING:
            name, value = _read_string(cursor, key)
        else:
            name, value = key, _read_scalar(cursor, key, kind)
        metadata[name] = value
    return metadata


def _read_string(cursor: _Cursor, key: str) -> tuple[str, MetadataValue]:
    """The string, or its length in bytes as `"<key>.length"`."""
    start = cursor.at
    raw = cursor.take_string(key, MAX_STRING_BYTES)
    if raw is None:
        return f"{key}.length", cursor.at - start - _U64.size
    return key, raw.decode(errors="replace")


def _read_scalar(cursor: _Cursor, key: str, kind: int) -> MetadataValue:
    layout = _SCALARS.get(kind)
    if layout is None:
        raise cursor.bad(f"the key {shown(key)} has the unknown value type {kind}")
    (value,) = cursor.take(layout, key)
    return _as_bool(cursor, key, value) if kind == _BOOL else value


def _as_bool(cursor: _Cursor, key: str, value: int) -> bool:
    if value > 1:
        raise cursor.bad(f"the key {shown(key)} is a bool of value {value}; it must be 0 or 1")
    return value == 1


def _read_array(cursor: _Cursor, key: str) -> tuple[str, MetadataValue]:
    """The array, or its length as `"<key>.length"`."""
    kind, n = cursor.take(_ARRAY_HEAD, key)
    if kind == _STRING:
        _skip_strings(cursor, n, key)
        return f"{key}.length", n
    if kind == _ARRAY:
        raise cursor.bad(f"the key {shown(key)} is an array of arrays, which GGUF readers do not accept")
    layout = _SCALARS.get(kind)
    if layout is None:
        raise cursor.bad(f"the key {shown(key)} is an array of the unknown value type {kind}")
    start, end = cursor.at, cursor.at + n * layout.size
    cursor.reach(end, key)
    cursor.at = end
    if n > MAX_ARRAY or cursor.kept + n > 8 * MAX_ARRAY:
        return f"{key}.length", n
    cursor.kept += n
    values = struct.unpack_from(f"<{n}{_LETTERS[kind]}", cursor.buffer, start)
    return key, tuple(_as_bool(cursor, key, value) for value in values) if kind == _BOOL else values


def _skip_strings(cursor: _Cursor, n: int, key: str) -> None:
    """Step over `n` strings. A tight loop: a quarter of a million tokens are most of the time a header takes.

    Over copies of a window's size: a length is read from bytes in 20 % less time than from a map.
    """
    cursor.reach(cursor.at + 8 * n, key)
    unpack_from = _U64.unpack_from
    while n:
        window = bytes(cursor.buffer[cursor.at : cursor.at + _WINDOW])
        at = done = 0
        try:
            for done in range(n):  # noqa: B007 - how far it came is read when a length is not within the window
                at += unpack_from(window, at)[0] + 8
            n = 0
        except (struct.error, OverflowError):
            n -= done
        cursor.reach(cursor.at + at + (8 if n else 0), key)
        cursor.at += at


def _alignment(cursor: _Cursor, metadata: dict[str, MetadataValue]) -> int:
    alignment = metadata.get("general.alignment", 32)
    if not isinstance(alignment, int) or alignment.bit_count() != 1:
        raise cursor.bad(f"general.alignment is {alignment}, not a power of two")
    return alignment


def _read_tensors(cursor: _Cursor, n_tensors: int, alignment: int) -> list[TensorInfo]:
    tensors: list[TensorInfo] = []
    seen: set[str] = set()
    expected = 0  # offset
    for index in range(n_tensors):
        name = cursor.take_name(f"the name of tensor {index}", _MAX_NAME - 1)
        if name in seen:
            raise cursor.bad(f"the tensor {shown(name)} occurs twice")
        seen.add(name)
        tensor = _read_tensor(cursor, name)
        if tensor.offset != expected:
            raise cursor.bad(f"the tensor {shown(name)} has offset {tensor.offset}, it must be {expected}")
        expected = _padded(expected + tensor.n_bytes, alignment)
        tensors.append(tensor)
    return tensors


def _read_tensor(cursor: _Cursor, name: str) -> TensorInfo:
    (n_dims,) = cursor.take(_U32, name)
    if n_dims > _MAX_DIMS:
        raise cursor.bad(f"the tensor {shown(name)} has {n_dims} dimensions, more than {_MAX_DIMS}")
    *dims, kind, offset = cursor.take(_TENSOR_TAILS[n_dims], name)
    n_elements = math.prod(dims)
    if not 0 < n_elements <= _MAX_I64:
        _check_dims(cursor, name, dims)
    known = TYPES.get(kind)
    if known is None:
        raise _unknown_type(cursor, name, kind)
    type_name, block, block_bytes = known
    row = dims[0] if dims else 1
    if row % block:
        raise cursor.bad(f"the tensor {shown(name)} ({type_name}) has rows of {row}, not a multiple of {block}")
    return TensorInfo(
        name=name, shape=tuple(dims), type=type_name, n_bytes=n_elements // block * block_bytes, offset=offset
    )


def _check_dims(cursor: _Cursor, name: str, dims: list[int]) -> None:
    """Raise for negative (read as unsigned) and overflowing dimensions. Zeros make an empty tensor, which is fine."""
    n_elements = 1
    for dim in dims:
        n_elements *= dim
        if dim > _MAX_I64 or n_elements > _MAX_I64:
            raise cursor.bad(f"the tensor {shown(name)} has impossible dimensions: {[*map(_signed, dims)]}")


def _signed(value: int) -> int:
    return value if value <= _MAX_I64 else value - (1 << 64)


def _unknown_type(cursor: _Cursor, name: str, kind: int) -> BadModelError:
    if kind in _REMOVED_TYPES:
        return cursor.bad(
            f"the tensor {shown(name)} has type {_REMOVED_TYPES[kind]}, which llama.cpp no longer reads",
            "download a newer GGUF of the model, such as a Q4_0 or Q4_K_M",
        )
    return cursor.bad(
        f"the tensor {shown(name)} has the unknown type {kind}",
        "the file is damaged, or made for a newer llama.cpp than this mgpu knows (b11434)",
    )


def _padded(size: int, alignment: int) -> int:
    return -(-size // alignment) * alignment


def _check_whole(cursor: _Cursor, data_offset: int, tensors: tuple[TensorInfo, ...], alignment: int) -> None:
    """Raise if the file ends before its last tensor does. More bytes are fine; so is the last padding's absence."""
    if not tensors:
        return
    end = data_offset + tensors[-1].offset + tensors[-1].n_bytes
    if cursor.size < end:
        whole = _padded(end - data_offset, alignment) + data_offset
        raise cursor.bad(
            f"the file is incomplete: {whole - cursor.size} of {whole} bytes are missing",
            "the download was cut off: resume it (curl -C - …, wget -c …, or run `hf download` again)",
        )
