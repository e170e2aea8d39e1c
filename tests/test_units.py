"""Sizes as people type them, and as they read them."""

from __future__ import annotations

import pytest

from mgpu.errors import UsageError
from mgpu.units import GIB, MIB, gib, gib_of, parse_size


@pytest.mark.parametrize(
    ("text", "size"),
    [("512", 512 * MIB), ("2G", 2 * GIB), ("1.5GiB", 3 * GIB // 2), ("800 MB", 800_000_000), ("1k", 1024), ("7B", 7)],
)
def test_parse_size(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "G", "-1G", "1,5G", "2 GiBs", "nan", "1e9", "5iB", "9" * 400, "²"])
def test_not_a_size(text: str) -> None:
    with pytest.raises(UsageError, match="not a size"):
        parse_size(text)


def test_as_read() -> None:
    assert gib(3 * GIB // 2) == "1.5 GiB"
    assert gib(300 * MIB) == "300 MiB"
    assert gib_of(300 * MIB, 24 * GIB) == "0.3 of 24.0 GiB"
    assert gib_of(10 * MIB, 300 * MIB) == "10 of 300 MiB"
