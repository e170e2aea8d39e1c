"""One safetensors file: what its header says, and every flaw as one line."""

from __future__ import annotations

import json
import os
import random
import tempfile
import time
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mgpu.errors import BadModelError
from mgpu.inspect.safetensors import DTYPE_BITS, MAX_HEADER_BYTES, Header, TensorInfo, parse_header, read_header
from safetensors_writer import Spec, entries, header, with_length, write_file

TENSORS = (
    Spec("model.embed_tokens.weight", "BF16", (8, 4)),
    Spec("model.layers.0.mlp.up_proj.weight", "F8_E4M3", (4, 2)),
    Spec("bits", "F4", (3, 2)),
    Spec("empty", "F32", (0, 7)),
    Spec("scalar", "I64", ()),
)
N_DATA = 64 + 8 + 3 + 0 + 8


def refused(path: Path) -> BadModelError:
    """The error for this file, which is one printable line and a hint of one line."""
    with pytest.raises(BadModelError) as caught:
        read_header(path)
    check(caught.value)
    return caught.value


def check(error: BadModelError) -> None:
    assert (error.message + error.hint).isprintable()
    assert len(error.message) < 1000
    assert error.hint


def refused_raw(raw: bytes, n_data: int = N_DATA) -> str:
    with pytest.raises(BadModelError) as caught:
        parse_header(raw, n_data=n_data, origin="m.safetensors")
    check(caught.value)
    return caught.value.message


def with_entry(changes: dict[str, object]) -> bytes:
    """The sound header with the entry of "scalar" changed; `...` takes a key away."""
    listed: dict[str, dict[str, Any]] = entries(TENSORS)
    changed = listed["scalar"] | changes
    listed["scalar"] = {key: value for key, value in changed.items() if value is not ...}
    return json.dumps(listed).encode()


def test_what_the_header_says(tmp_path: Path) -> None:
    read = read_header(write_file(tmp_path / "m.safetensors", TENSORS))
    assert read.n_bytes == (tmp_path / "m.safetensors").stat().st_size
    assert [(t.name, t.type, t.shape, t.n_bytes) for t in read.tensors] == [
        (spec.name, spec.dtype, spec.shape, spec.n_bytes) for spec in TENSORS
    ]
    assert sum(tensor.n_bytes for tensor in read.tensors) == N_DATA


def test_tensors_come_in_the_order_of_their_data() -> None:
    listed = dict(reversed(entries(TENSORS).items()))
    tensors = parse_header(json.dumps(listed).encode(), n_data=N_DATA, origin="m")
    assert [tensor.offset for tensor in tensors] == sorted(tensor.offset for tensor in tensors)
    assert tensors[0].name == TENSORS[0].name


def test_no_tensors() -> None:
    assert parse_header(b"{}", n_data=0, origin="m") == ()


@pytest.mark.parametrize(
    "raw",
    [
        pytest.param(b'{"__metadata__":null}', id="metadata null"),
        pytest.param(b'  {"__metadata__":{"format":"pt"}}   ', id="spaces around"),
        pytest.param(b'{"a":{"dtype":"I8","shape":[0],"data_offsets":[0,0],"note":[{}]}}', id="a field more"),
        pytest.param(b'{"__metadata__":{"dtype":"x","shape":"y"}}', id="metadata like fields"),
    ],
)
def test_odd_but_sound(raw: bytes) -> None:
    """What the reference reader takes, too."""
    assert sum(tensor.n_bytes for tensor in parse_header(raw, n_data=0, origin="m")) == 0


@pytest.mark.parametrize(
    ("raw", "what"),
    [
        pytest.param(b"", "is not JSON", id="nothing"),
        pytest.param(b"{", "is not JSON", id="cut"),
        pytest.param(b"[]", "is not an object of objects", id="array"),
        pytest.param(b"{}\0", "is not JSON", id="zeros after"),
        pytest.param(b'{"a":NaN}', "is not JSON", id="NaN"),
        pytest.param(b'{"\xff":{}}', "is not JSON", id="not UTF-8"),
        pytest.param(b'{"\\ud800":{}}', "is not JSON", id="lone surrogate"),
        pytest.param(b'{"a":' + b"[" * 100_000, "is not JSON", id="deep arrays"),
        pytest.param(b'{"a":' * 100_000, "is not JSON", id="deep objects"),
        pytest.param(b'{"__metadata__":{"a":1}}', "is not an object of objects", id="metadata number"),
        pytest.param(b'{"__metadata__":{},"__metadata__":{}}', "__metadata__ is listed twice", id="metadata twice"),
        pytest.param(b'{"a":[]}', "the tensor a has a wrong entry: Expected `object`", id="entry array"),
        pytest.param(b'{"a":{"dtype":"F32","x":"\xff"}}', "the tensor a has a wrong entry", id="entry not UTF-8"),
        pytest.param(b'{"a":{"shape":[' + b"1," * 2000 + b"1]}}", "has an entry of", id="entry long"),
    ],
)
def test_bad_json(raw: bytes, what: str) -> None:
    assert what in refused_raw(raw)


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"dtype": ...}, "missing required field `dtype`"),
        ({"dtype": "F33"}, "the tensor scalar has the unknown dtype 'F33'"),
        ({"dtype": 1}, "Expected `str`, got `int`"),
        ({"dtype": "I32"}, "has 8 bytes of data, but I32 [] has 32 bits"),
        ({"shape": ...}, "missing required field `shape`"),
        ({"shape": [2]}, "has 8 bytes of data, but I64 [2] has 128 bits"),
        ({"shape": [-1]}, "Expected `int` >= 0"),
        ({"shape": [1.0]}, "Expected `int`, got `float`"),
        ({"shape": [True]}, "Expected `int`, got `bool`"),
        ({"shape": ["1"]}, "Expected `int`, got `str`"),
        ({"shape": 1}, "Expected `array`, got `int`"),
        ({"shape": [1 << 40, 1 << 40]}, "has impossible dimensions"),
        ({"shape": [10**300]}, "has impossible dimensions"),
        ({"data_offsets": ...}, "missing required field `data_offsets`"),
        ({"data_offsets": [75]}, "Expected `array` of length 2"),
        ({"data_offsets": [75, 83, 90]}, "Expected `array` of length 2"),
        ({"data_offsets": [-8, 0]}, "Expected `int` >= 0"),
        ({"data_offsets": [83, 75]}, "has -8 bytes of data"),
        ({"data_offsets": [76, 84]}, "starts at 76, not at 75: it leaves a gap"),
        ({"data_offsets": [74, 82]}, "starts at 74"),
        ({"data_offsets": [0, 8]}, "it overlaps another"),
        (
            {"data_offsets": [1 << 64, (1 << 64) + 8]},
            "has impossible offsets: 18446744073709551616 to 18446744073709551624",
        ),
    ],
)
def test_bad_entry(changes: dict[str, object], what: str) -> None:
    assert what in refused_raw(with_entry(changes))


def test_half_a_byte_of_data() -> None:
    raw = json.dumps({"a": {"dtype": "F4", "shape": [3], "data_offsets": [0, 1]}}).encode()
    assert "has 1 bytes of data, but F4 [3] has 12 bits" in refused_raw(raw, 1)


def test_tensor_listed_twice() -> None:
    raw = json.dumps(entries(TENSORS))
    again = raw[:-1] + ', "scalar": ' + json.dumps(entries(TENSORS)["scalar"]) + "}"
    assert refused_raw(again.encode()) == "m.safetensors: scalar is listed twice"


def test_field_listed_twice() -> None:
    raw = json.dumps(entries(TENSORS)).replace('"dtype": "F4"', '"dtype": "F4", "dtype": "F4"')
    assert refused_raw(raw.encode()) == "m.safetensors: dtype is listed twice"


def test_too_many_tensors() -> None:
    raw = b"{" + b'"a":{"dtype":"F32","shape":[0],"data_offsets":[0,0]},' * 500_000 + b'"b":1}'
    assert "lists more than 262144 tensors" in refused_raw(raw)


def test_odd_names_stay_in_one_line() -> None:
    raw = json.dumps({"new\nline\u202e" * 200: {"dtype": "?", "shape": [], "data_offsets": [0, 0]}}).encode()
    assert r"new\nline\u202e" in refused_raw(raw)


@pytest.mark.parametrize(
    ("content", "what"),
    [
        pytest.param(b"", "is empty (0 bytes)", id="empty"),
        pytest.param(b"\x01\0\0", "ends after 3 bytes", id="three bytes"),
        pytest.param(with_length(b""), "zeros", id="no header"),
        pytest.param(bytes(4096), "zeros: a download that was never filled in", id="zeros"),
        pytest.param(b"version https://git-lfs.github.com/spec/v1\noid", "a Git LFS pointer", id="LFS pointer"),
        pytest.param(b"<!doctype html><html>", "an HTML or XML page", id="HTML"),
        pytest.param(b"Entry not found, sorry", "the text of a failed download", id="failed download"),
        pytest.param(b"GGUF" + bytes(100), "a GGUF file", id="GGUF"),
        pytest.param(b"PK\x03\x04" + bytes(100), "a zip archive", id="zip"),
        pytest.param(b"\x10\0\0\0\0\0\0\0not json at all.", "no JSON object follows the length, but 'not '", id="text"),
        pytest.param(b"\xff" * 8 + b"{}", "the header claims 18446744073709551615 bytes", id="hostile length"),
        pytest.param(
            (MAX_HEADER_BYTES + 1).to_bytes(8, "little") + b"{}", "more than 100000000", id="length over the bound"
        ),
        pytest.param(
            b"\x40\0\0\0\0\0\0\0{}", "the file ends at byte 10, within its header, which goes on to 72", id="cut header"
        ),
    ],
)
def test_not_a_safetensors_file(tmp_path: Path, content: bytes, what: str) -> None:
    path = tmp_path / "m.safetensors"
    path.write_bytes(content)
    assert what in refused(path).message


def test_cut_download_says_how_much_is_missing(tmp_path: Path) -> None:
    path = write_file(tmp_path / "m.safetensors", TENSORS)
    n_bytes = path.stat().st_size
    os.truncate(path, n_bytes - 50)
    error = refused(path)
    assert error.message == f"{path}: the file is incomplete: 50 of {n_bytes} bytes are missing"
    assert "resume" in error.hint


def test_bytes_after_the_last_tensor(tmp_path: Path) -> None:
    path = write_file(tmp_path / "m.safetensors", TENSORS)
    os.truncate(path, path.stat().st_size + 3)
    assert refused(path).message.endswith("the file has 3 bytes more than its tensors take")


def test_fifo_and_directory_are_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo.safetensors")
    (tmp_path / "link.safetensors").symlink_to("/dev/zero")
    for path in (tmp_path / "fifo.safetensors", tmp_path, tmp_path / "link.safetensors"):
        assert refused(path).message == f"{path} is not a regular file"


def test_broken_link(tmp_path: Path) -> None:
    (tmp_path / "m.safetensors").symlink_to("gone")
    with pytest.raises(BadModelError, match="is a link to gone, which does not exist"):
        read_header(tmp_path / "m.safetensors")


Specs = st.lists(
    st.builds(
        Spec,
        st.text(max_size=12).filter(lambda name: name != "__metadata__"),
        st.sampled_from(sorted(DTYPE_BITS)),
        st.lists(st.integers(0, 5), max_size=4).map(lambda dims: (*dims, 4)),  # whole bytes, whatever the dtype
    ),
    max_size=8,
    unique_by=lambda spec: spec.name,
)


@settings(deadline=None)
@given(Specs, st.randoms(use_true_random=False))
def test_written_is_read(specs: list[Spec], rng: random.Random) -> None:
    listed = list(entries(specs).items())
    rng.shuffle(listed)
    n_data = sum(spec.n_bytes for spec in specs)
    raw = json.dumps(dict(listed), ensure_ascii=rng.random() < 0.5).encode(errors="replace")
    tensors = parse_header(raw, n_data=n_data, origin="m")
    assert {(t.type, t.shape, t.n_bytes, t.offset) for t in tensors} == {
        (
            entry["dtype"],
            tuple(entry["shape"]),
            entry["data_offsets"][1] - entry["data_offsets"][0],
            entry["data_offsets"][0],
        )
        for _, entry in listed
    }


# Broken headers at random: each is read or refused, in bounded time and memory.

PIECES = (
    b'"', b",", b":", b"{", b"}", b"[", b"]", b"0", b"-1", b"1.0", b"null", b"true", b"NaN", b"\\u0061", b"\xff", b"\0",
    b"18446744073709551616", b'"F32"', b'"dtype"', b'"shape"', b'"data_offsets"', b'"__metadata__":{},', b"99999999",
)  # fmt: skip


def mutants(content: bytes, n: int, seed: str) -> Iterator[bytes]:
    rng = random.Random(seed)
    for _ in range(n):
        mutant = bytearray(content)
        for _ in range(rng.choice((1, 1, 2, 3))):
            start, at = rng.randrange(len(mutant)), rng.randrange(len(mutant))
            change = rng.choice(CHANGES)
            change(mutant, start, at, rng)
        yield bytes(mutant)


def _overwrite(content: bytearray, start: int, at: int, rng: random.Random) -> None:
    content[at] = rng.randrange(256)


def _insert(content: bytearray, start: int, at: int, rng: random.Random) -> None:
    content[at : at + rng.randrange(2)] = rng.choice(PIECES)


def _repeat(content: bytearray, start: int, at: int, rng: random.Random) -> None:
    content[at:at] = content[start : start + rng.randrange(1, 90)]


def _drop(content: bytearray, start: int, at: int, rng: random.Random) -> None:
    if len(content) > 100:
        del content[at : at + rng.randrange(1, 30)]


CHANGES: tuple[Callable[[bytearray, int, int, random.Random], None], ...] = (
    _overwrite,
    _insert,
    _insert,
    _repeat,
    _drop,
)


def outcome(path: Path) -> Header | BadModelError:
    try:
        return read_header(path)
    except BadModelError as error:
        check(error)
        return error


def test_mutants(tmp_path: Path) -> None:
    whole = header(TENSORS) + bytes(N_DATA)
    kinds: dict[type, int] = {}
    path = tmp_path / "m.safetensors"
    for mutant in mutants(whole, 6000, "safetensors"):
        path.write_bytes(mutant)
        start = time.monotonic()
        found = outcome(path)
        assert time.monotonic() - start < 2
        kinds[type(found)] = kinds.get(type(found), 0) + 1
        if isinstance(found, Header):
            assert sum(tensor.n_bytes for tensor in found.tensors) < len(mutant)
    assert kinds[BadModelError] > 4000
    assert kinds[Header] > 50


@pytest.mark.parametrize(
    "raw",
    [
        pytest.param(b'{"a":[' + b"1," * (1 << 20) + b"1]}", id="long array"),
        pytest.param(b'{"a":{"dtype":"F32","shape":[' + b"1," * (1 << 20) + b"1]}}", id="long shape"),
        pytest.param(b"{" + b'"a":1,' * (1 << 20) + b'"a":1}', id="many keys"),
    ],
)
def test_long_headers_take_no_more_memory_than_their_length(raw: bytes) -> None:
    tracemalloc.start()
    try:
        refused_raw(raw)
        assert tracemalloc.get_traced_memory()[1] < 2 * len(raw)
    finally:
        tracemalloc.stop()


@settings(max_examples=300, deadline=None)
@given(
    st.dictionaries(
        st.text(max_size=3),
        st.fixed_dictionaries(
            {},
            optional={
                "dtype": st.one_of(st.sampled_from(["F32", "U8", "F4", ""]), st.integers()),
                "shape": st.lists(st.one_of(st.integers(-1, 9), st.floats(), st.none()), max_size=3),
                "data_offsets": st.lists(st.integers(-1, 1 << 65), max_size=3),
            },
        ),
        max_size=3,
    )
)
def test_structure(listed: dict[str, dict[str, object]]) -> None:
    """Whatever stands in the entries, tensors without a gap or a refusal come out."""
    raw = with_length(json.dumps(listed).encode())
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "m.safetensors"
        path.write_bytes(raw)
        found = outcome(path)
    if isinstance(found, Header):
        assert all(tensor.n_bytes == 0 for tensor in found.tensors)


def test_tensor_info_is_what_the_file_says() -> None:
    (tensor,) = parse_header(json.dumps(entries([Spec("a", "C64", (3,))])).encode(), n_data=24, origin="m")
    assert tensor == TensorInfo(name="a", shape=(3,), type="C64", n_bytes=24, offset=0)
