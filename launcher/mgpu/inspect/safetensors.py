"""The header of a safetensors file, from bytes to `Header`: what the reference reader takes, and why not otherwise.

A file is a length (u64, little-endian), that many bytes of JSON, and the tensors' data without a gap. Only length and
JSON are read. Rules and dtypes: safetensors 0.8.0 (`safetensors/src/tensor.rs`), which vLLM reads files with.
"""

from __future__ import annotations

import math
import stat
import struct
from operator import attrgetter
from pathlib import Path
from typing import Annotated, Final

import msgspec

from mgpu.errors import UNREADABLE, BadModelError
from mgpu.inspect.foreign import shown
from mgpu.inspect.gguf import DAMAGED

#: Longer headers are refused, as the reference reader does.
MAX_HEADER_BYTES: Final = 100_000_000
#: More tensors in one file are refused. The fullest real files (experts one by one, quantised) have near 100,000.
MAX_TENSORS: Final = 1 << 18
_MAX_ENTRY: Final = 2048  # bytes of one tensor's JSON; real ones have near 80
_MAX_U64: Final = (1 << 64) - 1

#: dtype -> bits of one element.
DTYPE_BITS: Final = {
    "BOOL": 8, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8, "I16": 16, "U16": 16, "F16": 16, "BF16": 16, "I32": 32, "U32": 32, "F32": 32,
    "C64": 64, "F64": 64, "I64": 64, "U64": 64,
}  # fmt: skip

#: First bytes of what is named .safetensors by mistake -> what it is, what to do.
_FOREIGN: Final = (
    (b"version https://git-lfs", "a Git LFS pointer, not the file itself", "fetch the file: git lfs pull"),
    (b"<", "an HTML or XML page", "download the file itself; on huggingface.co, use the /resolve/ address, not /blob/"),
    (b"GGUF", "a GGUF file", "give it its name back (NAME.gguf) and give mgpu that path"),
    (b"PK\x03\x04", "a zip archive (PyTorch weights?)", "download the model's *.safetensors files"),
    (b"Entry not found", "the text of a failed download", "check the address and download it again"),
    (b"Repository not found", "the text of a failed download", "check the address and download it again"),
    (b"Invalid username or password", "the text of a failed download", "log in and download it again"),
    (b"\0\0\0\0\0\0\0\0", "zeros: a download that was never filled in", "download the file again"),
)
_RESUME: Final = "the download was cut off: resume it (run `hf download` again, curl -C - …, or wget -c …)"


class TensorInfo(msgspec.Struct, frozen=True, kw_only=True):
    """One tensor of the header. `shape` has the slowest dimension first."""

    name: str
    shape: tuple[int, ...]
    type: str
    n_bytes: int
    offset: int


class Header(msgspec.Struct, frozen=True, kw_only=True):
    """One file's header: its tensors in the order of their data, and the file's whole length."""

    tensors: tuple[TensorInfo, ...]
    n_bytes: int


class _Entry(msgspec.Struct):
    dtype: str
    shape: tuple[Annotated[int, msgspec.Meta(ge=0)], ...]
    data_offsets: tuple[Annotated[int, msgspec.Meta(ge=0)], Annotated[int, msgspec.Meta(ge=0)]]


_FIELDS: Final = tuple(f'"{name}"'.encode() for name in _Entry.__struct_fields__)
_ENTRIES: Final = msgspec.json.Decoder(dict[str, msgspec.Raw])
_ENTRY: Final = msgspec.json.Decoder(_Entry)
_TEXTS: Final = msgspec.json.Decoder(dict[str, str] | None)


def read_header(path: Path) -> Header:
    """The header of a regular file. Raises `BadModelError`."""
    origin = shown(str(path))
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # opening a FIFO would wait for a writer
            raise BadModelError(f"{origin} is not a regular file", hint="download the model's files again")
        with path.open("rb") as file:
            n_bytes = file.seek(0, 2)
            file.seek(0)
            length = _header_length(file.read(64), n_bytes, origin)
            file.seek(8)
            raw = file.read(length)
    except OSError as error:
        raise unreadable(path, error) from error
    tensors = parse_header(raw, n_data=n_bytes - 8 - length, origin=str(path))
    return Header(tensors=tensors, n_bytes=n_bytes)


def parse_header(raw: bytes, *, n_data: int, origin: str) -> tuple[TensorInfo, ...]:
    """The tensors that the JSON `raw` lists, before `n_data` bytes of data. `origin` names the file in messages."""
    origin = shown(origin)
    tensors = [_tensor(name, entry, origin) for name, entry in _entries(raw, origin)]
    tensors.sort(key=attrgetter("offset", "n_bytes"))
    expected = 0
    for tensor in tensors:
        if tensor.offset != expected:
            gap = "leaves a gap" if tensor.offset > expected else "overlaps another"
            raise _bad(
                origin, f"the tensor {shown(tensor.name)} starts at {tensor.offset}, not at {expected}: it {gap}"
            )
        expected += tensor.n_bytes
    if n_data < expected:
        missing, whole = expected - n_data, 8 + len(raw) + expected
        raise _bad(origin, f"the file is incomplete: {missing} of {whole} bytes are missing", _RESUME)
    if n_data > expected:
        raise _bad(origin, f"the file has {n_data - expected} bytes more than its tensors take")
    return tuple(tensors)


def unreadable(path: Path, error: OSError) -> BadModelError:
    """The system refuses to read `path`."""
    if isinstance(error, FileNotFoundError) and path.is_symlink():  # the hub's cache: a link to a blob
        return BadModelError(
            f"{shown(str(path))} is a link to {shown(str(path.readlink()))}, which does not exist",
            hint="the download was cut off, or the file was deleted: run `hf download` again",
        )
    hint = "check who may read it: ls -l" if isinstance(error, PermissionError) else "check the file and its disk"
    return BadModelError(f"{shown(str(path))} cannot be read: {error.strerror or error}", hint=hint)


def _bad(origin: str, what: str, hint: str = DAMAGED) -> BadModelError:
    return BadModelError(f"{origin}: {what}", hint=hint)


def _header_length(head: bytes, n_bytes: int, origin: str) -> int:
    """The bytes of JSON that follow the first eight. Raises for what is no safetensors file at all."""
    if not n_bytes:
        raise BadModelError(f"{origin} is empty (0 bytes)", hint="download the file again")
    for magic, what, hint in _FOREIGN:
        if head.startswith(magic):
            raise BadModelError(f"{origin} is not a safetensors file: {what}", hint=hint)
    if n_bytes <= 8:
        raise _bad(origin, f"the file ends after {n_bytes} bytes, before its header", _RESUME)
    (length,) = struct.unpack_from("<Q", head)
    if not head[8:].lstrip(b" \t\r\n").startswith(b"{"):
        raise BadModelError(
            f"{origin} is not a safetensors file: no JSON object follows the length, but {ascii(head[8:12])[1:]}",
            hint=DAMAGED,
        )
    if length > MAX_HEADER_BYTES:
        raise _bad(origin, f"the header claims {length} bytes, more than {MAX_HEADER_BYTES}")
    if length > n_bytes - 8:
        raise _bad(
            origin, f"the file ends at byte {n_bytes}, within its header, which goes on to {length + 8}", _RESUME
        )
    return int(length)


def _entries(raw: bytes, origin: str) -> list[tuple[str, msgspec.Raw]]:
    """Names and entries as the header has them; `__metadata__` is checked and left out."""
    if raw.count(b":") > 6 * MAX_TENSORS:  # four for each tensor; known before anything is built
        raise _bad(origin, f"the header lists more than {MAX_TENSORS} tensors")
    try:
        entries = _ENTRIES.decode(raw)
        _TEXTS.decode(entries.pop("__metadata__", b"null"))
    except msgspec.ValidationError as error:
        raise _bad(origin, f"the header is not an object of objects: {error}") from None
    except UNREADABLE as error:
        raise _bad(origin, f"the header is not JSON: {shown(str(error))}") from None
    if len(entries) > MAX_TENSORS:
        raise _bad(origin, f"the header lists {len(entries)} tensors, more than {MAX_TENSORS}")
    if max(map(raw.count, _FIELDS)) > len(entries) or raw.count(b'"__metadata__"') > 1:
        _check_unique(raw, origin)
    return list(entries.items())


def _check_unique(raw: bytes, origin: str) -> None:
    """Raise for a key that an object has twice. Slow: only asked where the count of the fields gives reason to."""
    from json import loads

    def look(pairs: list[tuple[str, object]]) -> None:
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise _bad(origin, f"{shown(key)} is listed twice")
            seen.add(key)

    try:
        loads(raw, object_pairs_hook=look)
    except (ValueError, RecursionError) as error:  # within an entry: those have not been looked at yet
        raise _bad(origin, f"the header is not JSON: {shown(str(error))}") from None


def _tensor(name: str, raw: msgspec.Raw, origin: str) -> TensorInfo:
    what = f"the tensor {shown(name)}"
    if len(memoryview(raw)) > _MAX_ENTRY:
        raise _bad(origin, f"{what} has an entry of {len(memoryview(raw))} bytes")
    try:
        entry = _ENTRY.decode(raw)
    except UNREADABLE as error:
        raise _bad(origin, f"{what} has a wrong entry: {shown(str(error))}") from None
    bits = DTYPE_BITS.get(entry.dtype)
    if bits is None:
        hint = "the file is damaged, or made for a newer safetensors than this mgpu knows (0.8.0)"
        raise _bad(origin, f"{what} has the unknown dtype {shown(repr(entry.dtype))}", hint)
    start, end = entry.data_offsets
    n_bits = math.prod(entry.shape) * bits
    if n_bits > _MAX_U64:
        raise _bad(origin, f"{what} has impossible dimensions: {shown(str(list(entry.shape)))}")
    if max(start, end) > _MAX_U64:
        raise _bad(origin, f"{what} has impossible offsets: {shown(f'{start} to {end}')}")
    if 8 * (end - start) != n_bits:
        shape = shown(str(list(entry.shape)))
        raise _bad(origin, f"{what} has {end - start} bytes of data, but {entry.dtype} {shape} has {n_bits} bits")
    return TensorInfo(name=name, shape=entry.shape, type=entry.dtype, n_bytes=end - start, offset=start)
