"""A line stays one line, whatever is quoted in it."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mgpu.errors import BadModelError, MgpuError, OutOfMemoryError, RuntimeFailedError, one_line

ANY_TEXT = st.text(st.characters(codec=None, exclude_categories=()), max_size=2000)


@given(ANY_TEXT, st.integers(20, 500))
def test_a_line_is_printable_and_short(text: str, most: int) -> None:
    line = one_line(text, most)
    assert line.isprintable()
    assert len(line) <= most
    line.encode()


@given(st.text(st.characters(exclude_categories=("C", "Z")), max_size=480))
def test_what_can_be_printed_stays_as_it_is(text: str) -> None:
    assert one_line(text, 480) == text


def test_of_a_long_one_both_ends_stay() -> None:
    line = one_line("begin" + "x" * 5000 + "end", 300)
    assert line.startswith("beginx")
    assert line.endswith("xend")
    assert "…" in line
    assert len(line) <= 300


@pytest.mark.parametrize("kind", [MgpuError, BadModelError, RuntimeFailedError, OutOfMemoryError])
def test_every_error(kind: type[MgpuError]) -> None:
    error = kind("a\nb\x1b[2J\udcff\u202e", hint="c\r\n" * 1000)
    assert error.message == str(error) == r"a\nb\x1b[2J\udcff\u202e"
    assert error.hint.isprintable()
    assert len(error.hint) < 1000
