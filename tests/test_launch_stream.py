"""Streamed answers, in both shapes, whole and broken."""

from __future__ import annotations

import contextlib
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mgpu.errors import RuntimeFailedError
from mgpu.launch.stream import Piece, error_message, read_pieces


def event(body: object) -> bytes:
    return b"data: " + json.dumps(body).encode()


def delta(**fields: str | None) -> bytes:
    return event({"choices": [{"index": 0, "finish_reason": None, "delta": fields}], "model": "m"})


def test_chat() -> None:
    lines = [
        delta(role="assistant", content=None),
        b"",
        delta(reasoning_content="hm"),
        delta(content="Hi"),
        b": a comment",
        delta(),
        event({"choices": [], "usage": {"total_tokens": 3}}),
        b"data: [DONE]",
    ]
    assert list(read_pieces(lines)) == [Piece(text="hm", reasoning=True), Piece(text="Hi")]


def test_completion() -> None:
    lines = [event({"content": " a", "stop": False}), event({"content": "", "stop": True, "model": "m"})]
    assert list(read_pieces(lines)) == [Piece(text=" a")]


@given(st.lists(st.text(min_size=1)))
def test_no_text_is_lost(texts: list[str]) -> None:
    assert [piece.text for piece in read_pieces([delta(content=text) for text in texts])] == texts


@given(st.lists(st.binary()))
def test_anything_else_is_refused_or_ignored(lines: list[bytes]) -> None:
    with contextlib.suppress(RuntimeFailedError):
        assert all(piece.text for piece in read_pieces([b"data: " + line for line in lines]))


@pytest.mark.parametrize(
    "line",
    [
        event({"error": {"code": 500, "message": "context is full"}}),
        event({"error": "context is full"}),
        b'error: {"code": 500, "message": "context is full"}',
    ],
    ids=["object", "text", "field"],
)
def test_an_error_event_ends_it(line: bytes) -> None:
    pieces = read_pieces([delta(content="so far"), line])
    assert next(pieces).text == "so far"
    with pytest.raises(RuntimeFailedError, match="context is full"):
        next(pieces)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b'{"error": {"code": 401, "message": "Invalid API Key"}}', "Invalid API Key"),
        (b'{"message": "bare"}', "bare"),
        (b"<html>Bad gateway</html>", "<html>Bad gateway</html>"),
        (b"\xff\xfe", "\ufffd\ufffd"),
        (b"", "no message"),
        (b"{}", "{}"),
        (b"x" * 1000, "x" * 300),
    ],
)
def test_error_messages(body: bytes, message: str) -> None:
    assert error_message(body) == message
