"""What a person sees while a model loads."""

from __future__ import annotations

import contextlib
import fcntl
import io
import os
import pty
import struct
import termios

from mgpu.launch.progress import LoadingLine, describe, say
from mgpu.launch.ready import Loading
from mgpu.units import GIB


def loading(seconds: float, stage: str = "loading the weights", gib: float = 3.1) -> Loading:
    return Loading(stage=stage, seconds=seconds, rss_bytes=int(gib * GIB))


def test_a_line_in_words() -> None:
    assert describe(loading(12.34), int(4.6 * GIB)) == "  12.3 s  ~3.1 of 4.6 GiB  loading the weights"
    assert describe(loading(12.34, gib=9), int(4.6 * GIB)) == "  12.3 s  ~4.6 of 4.6 GiB  loading the weights"
    assert describe(loading(1, gib=0), 0) == "   1.0 s  loading the weights"
    assert describe(loading(1), 0) == "   1.0 s  ~3.1 GiB  loading the weights"


def test_a_file_gets_one_line_for_each_stage() -> None:
    stream = io.StringIO()
    line = LoadingLine(stream, expected_bytes=GIB)
    for seconds, stage in ((0.1, "starting"), (0.5, "starting"), (1, "starting"), (2, "warming up"), (3, "warming up")):
        line(loading(seconds, stage))
    line.close()
    assert stream.getvalue() == "   0.5 s  starting\n   2.0 s  warming up\n"


def test_a_terminal_gets_one_line_that_is_gone_afterwards() -> None:
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 40, 0, 0))
    with os.fdopen(theirs, "w") as stream:
        line = LoadingLine(stream, expected_bytes=8 * GIB)
        for seconds in (0.1, 0.5, 1.5):
            line(loading(seconds, "a stage whose name does not fit on the line"))
        line(loading(2.5, "short"))
        line.close()
        line.close()
    drawn = b""
    with contextlib.suppress(OSError):  # EIO is how a terminal without writers ends
        while piece := os.read(ours, 4096):
            drawn += piece
    os.close(ours)
    check_screen(drawn.decode())


def check_screen(drawn: str) -> None:
    assert "\n" not in drawn
    assert "\x1b" not in drawn
    assert "~3.1 of 8.0 GiB" in drawn
    screen = [" "] * 80
    column = 0
    for character in drawn:
        column = 0 if character == "\r" else column + 1
        if character != "\r":
            assert column < 40
            screen[column - 1] = character
    assert "".join(screen).strip() == ""


def test_nobody_there_is_no_error() -> None:
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "w", buffering=1) as stream:
        say(stream, "gone")
        LoadingLine(stream, expected_bytes=0)(loading(5))
        os.dup2(os.open(os.devnull, os.O_WRONLY), write)
    say(stream, "closed")
    LoadingLine(stream, expected_bytes=0)(loading(5))
