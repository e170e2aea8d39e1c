"""An HTTP answer as it comes, within bounds of size and of time, whoever is at the other end.

http.client alone waits for ever: its timeout is for one `recv`, and a server may send a byte now and then. It also goes
on reading as long as somebody says `100 Continue`.
"""

from __future__ import annotations

import io
import socket
import time
from collections.abc import Iterator
from http.client import HTTPConnection, HTTPException, HTTPResponse
from typing import Any, Final

#: Bytes of an answer's head, with all that may come before it.
MAX_HEAD: Final = 1 << 20

_PIECE: Final = 1 << 16


class TooMuchError(HTTPException):
    """The answer is longer than any that is meant."""


class Answering(HTTPResponse):
    """An answer that must be there `within_s` seconds from now, from its first byte to its last.

    `unhurry` lifts that for a stream, whose pieces then must not be more than `within_s` apart.
    """

    def __init__(self, sock: socket.socket, *args: Any, within_s: float, **kwargs: Any) -> None:
        super().__init__(sock, *args, **kwargs)
        self._timed = _Timed(self.fp.detach(), sock, within_s)
        self.fp = io.BufferedReader(self._timed, _PIECE)

    def begin(self) -> None:
        super().begin()
        self._timed.left = None  # what follows is the body's, which has bounds of its own

    def unhurry(self) -> None:
        self._timed.deadline = None


class _Timed(io.RawIOBase):
    """Reads of a socket: `left` bytes at most, before a `deadline`."""

    def __init__(self, raw: io.RawIOBase, sock: socket.socket, within_s: float) -> None:
        super().__init__()
        self._raw = raw
        self._socket = sock
        self._within_s = within_s
        self.deadline: float | None = time.monotonic() + within_s
        self.left: int | None = MAX_HEAD

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int | None:
        if self.left is not None and self.left <= 0:
            raise TooMuchError(f"a head of more than {MAX_HEAD >> 20} MiB")
        seconds = self._within_s if self.deadline is None else self.deadline - time.monotonic()
        if seconds <= 0:
            raise TimeoutError("timed out")
        self._socket.settimeout(seconds)
        n_read = self._raw.readinto(buffer)
        if self.left is not None:
            self.left -= n_read or 0
        return n_read

    def close(self) -> None:
        self._raw.close()
        super().close()


def receive(connection: HTTPConnection, within_s: float) -> Answering:
    """The head of the answer to the request that was sent. Raises OSError or HTTPException."""

    def answering(*args: Any, **kwargs: Any) -> Answering:
        return Answering(*args, within_s=within_s, **kwargs)

    connection.response_class = answering  # type: ignore[assignment] # whatever makes one will do
    response = connection.getresponse()
    assert isinstance(response, Answering)  # noqa: S101 - it was made three lines above
    return response


def read_whole(response: HTTPResponse, most: int) -> bytes:
    """The body, of at most `most` bytes. Raises OSError or HTTPException."""
    body = bytearray()
    for piece in read_pieces(response):
        body += piece
        if len(body) > most:
            raise TooMuchError(f"sent more than {most >> 20} MiB")
    return bytes(body)


def read_pieces(response: HTTPResponse) -> Iterator[bytes]:
    """What comes, as it comes. Raises for a body that ends too soon (`read1` itself says nothing, CPython 3.11)."""
    try:
        while piece := response.read1(_PIECE):
            yield piece
    except (OverflowError, ValueError) as error:  # a chunk of a length below nothing, or beyond everything
        raise HTTPException("sent chunks of impossible lengths") from error
    if response.length:
        raise ConnectionResetError


def read_lines(response: HTTPResponse, most: int) -> Iterator[bytes]:
    """Lines as they come, of at most `most` bytes each; the last may have no end. Raises OSError or HTTPException.

    `readline` takes a broken connection for a regular end (CPython 3.11: http.client, peek).
    """
    partial = bytearray()
    for piece in read_pieces(response):
        *whole, rest = piece.split(b"\n")
        if whole:
            yield bytes(partial) + whole[0]
            yield from whole[1:]
            partial.clear()
        partial += rest
        if len(partial) > most:
            raise TooMuchError(f"sent a line of more than {most >> 20} MiB")
    yield bytes(partial)
