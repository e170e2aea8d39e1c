"""Inputs from other inputs: flipped, cut, spliced, with lies where numbers stand. The same for the same seed."""

from __future__ import annotations

import random
import re
import struct
from collections.abc import Callable, Sequence
from typing import Final

#: Numbers that somebody may believe.
NUMBERS: Final = (
    0, 1, 2, 7, 31, 32, 0x7F, 0x80, 0xFF, 0x7FFF, 0xFFFF, 1 << 16, 1 << 20, 1 << 28, (1 << 31) - 1, 1 << 31,
    (1 << 32) - 1, 1 << 40, (1 << 53) + 1, 1 << 60, (1 << 63) - 1, 1 << 63, (1 << 64) - 33, (1 << 64) - 1,
)  # fmt: skip
#: Words that parsers of texts stumble over.
WORDS: Final = (
    b"", b"\0", b"\n", b"\r\n", b"\x1b[2J", b"\x7f", b"\xff\xfe", b"\xed\xa0\x80", b"\xe2\x80\xae", b"\xc2\x85",
    "²".encode(), "٣".encode(), b"\xef\xbb\xbf", b"../../../etc/passwd", b"-", b"--", b"%s%n", b"${HOME}", b"NaN",
    b"-Infinity", b"1e999", b"-1", b"1e308", b"true", b"null", b"[]", b"{}", b'""', b'"\\ud800"', b'"\\u0000"',
    b"9" * 400, b"9" * 5000, b"0x" + b"f" * 5000, b"a." * 3000, b"[" * 3000, b'{"a":' * 3000, b" " * 3000, b"A" * 70000,
    b"18446744073709551616", b"9223372036854775808", b"-9223372036854775809", b"4294967296", b"2147483648", b"0.1",
    b"http://", b"file:///etc/passwd", b"\\", b'"', b"'", b"#", b"=", b",", b":", b";",
)  # fmt: skip

Mutation = Callable[[bytearray, random.Random, Sequence[bytes], Sequence[bytes]], bytearray]
_NUMBER: Final = re.compile(rb"-?\d+(?:\.\d+)?")


def mutate(rng: random.Random, pool: Sequence[bytes], tokens: Sequence[bytes], most: int) -> bytes:
    """One input of at most `most` bytes."""
    data = bytearray(rng.choice(pool))
    for _ in range(rng.choice((1, 1, 1, 2, 3, 5, 8))):
        data = rng.choice(MUTATIONS)(data, rng, pool, tokens)
        del data[most:]
    return bytes(data)


def _at(data: bytearray, rng: random.Random) -> int:
    return rng.randrange(len(data) + 1)


def _flip(data: bytearray, rng: random.Random, pool: Sequence[bytes], tokens: Sequence[bytes]) -> bytearray:
    for _ in range(rng.choice((1, 1, 2, 4, 16))):
        if data:
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    return data


def _scribble(data: bytearray, rng: random.Random, pool: Sequence[bytes], tokens: Sequence[bytes]) -> bytearray:
    at = _at(data, rng)
    data[at : at + rng.randrange(1, 16)] = rng.randbytes(rng.randrange(1, 16))
    return data


def _lie(data: bytearray, rng: random.Random, pool: Sequence[bytes], tokens: Sequence[bytes]) -> bytearray:
    """A binary number over what stands there; now and then near a word, where lengths stand."""
    width = rng.choice((1, 2, 4, 8))
    number = rng.choice(NUMBERS) & ((1 << 8 * width) - 1)
    at = _at(data, rng)
    data[at : at + width] = struct.pack("<Q", number)[:width]
    return data


def _say(data: bytearray, rng: random.Random, pool: Sequence[bytes], tokens: Sequence[bytes]) -> bytearray:
    """Another number in place of one that is written out."""
    found = list(_NUMBER.finditer(data))
    if found:
        number = rng.choice(found)
        said = rng.choice(
            (str(rng.choice(NUMBERS)), str(-rng.choice(NUMBERS)), "1e400", "0.5", "9" * 30, "null", '"x"')
        )
        data[number.start() : number.end()] = said.encode()
    return data


def _word(data: bytearray, rng: random.Random, pool: Sequence[bytes], tokens: Sequence[bytes]) -> bytearray:
    at = _at(data, rng)
    data[at : at + rng.choice((0, 0, 1, 4))] = rng.choice(tokens or WORDS) if rng.random() < 0.6 else rng.choice(WORDS)
    return data


def _truncate(data: bytearray, rng: random.Random, pool: Sequence[bytes], tokens: Sequence[bytes]) -> bytearray:
    return data[: _at(data, rng)]


def _drop(data: bytearray, rng: random.Random, pool: Sequence[bytes], tokens: Sequence[bytes]) -> bytearray:
    at = _at(data, rng)
    del data[at : at + rng.randrange(1, 40)]
    return data


def _repeat(data: bytearray, rng: random.Random, pool: Sequence[bytes], tokens: Sequence[bytes]) -> bytearray:
    start, at = _at(data, rng), _at(data, rng)
    piece = data[start : start + rng.randrange(1, 200)]
    data[at:at] = piece * rng.choice((1, 1, 1, 2, 50))
    return data


def _splice(data: bytearray, rng: random.Random, pool: Sequence[bytes], tokens: Sequence[bytes]) -> bytearray:
    other = rng.choice(pool)
    start = rng.randrange(len(other) + 1)
    return data[: _at(data, rng)] + other[start : start + rng.randrange(1, 4000)]


def _line(data: bytearray, rng: random.Random, pool: Sequence[bytes], tokens: Sequence[bytes]) -> bytearray:
    """Lines in another order, twice, or not at all."""
    lines = bytes(data).split(b"\n")
    at, to = rng.randrange(len(lines)), rng.randrange(len(lines))
    what = rng.randrange(3)
    if what == 0:
        lines.insert(to, lines[at])
    elif what == 1:
        del lines[at]
    else:
        lines[at], lines[to] = lines[to], lines[at]
    return bytearray(b"\n".join(lines))


MUTATIONS: Final[tuple[Mutation, ...]] = (
    _flip, _flip, _scribble, _lie, _lie, _say, _say, _say, _word, _word, _word, _truncate, _drop, _repeat, _splice,
    _line,
)  # fmt: skip
