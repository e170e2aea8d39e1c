"""Logs: lines as they come whatever the runtime writes, the last ones, and where they lie."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mgpu.launch.logs import KEPT_LOGS, LogTail, last_lines, new_log


@given(pieces=st.lists(st.binary(max_size=60) | st.sampled_from([b"\n", b"a\nb", b"\xc3", b"\xbc"]), max_size=12))
def test_lines_do_not_depend_on_how_they_were_written(pieces: list[bytes]) -> None:
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory, "log")
        path.touch()
        tail = LogTail(path)
        lines: list[str] = []
        with path.open("ab", buffering=0) as file:
            for piece in pieces:
                file.write(piece)
                lines += tail.read()
        lines += tail.read_rest()
        tail.close()
        whole = LogTail(path)
        assert lines == whole.read_rest()
        whole.close()


def test_an_unfinished_line_is_held_back_until_the_end(tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_bytes(b"one\ntwo")
    tail = LogTail(path)
    assert tail.read() == ["one"]
    with path.open("ab") as file:
        file.write(b" halves\nthree")
    assert tail.read() == ["two halves"]
    assert tail.read() == []
    assert tail.read_rest() == ["three"]
    tail.close()


def test_a_line_without_end_is_cut(tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_bytes(b"x" * 3_000_000 + b"\nnext\n")
    tail = LogTail(path)
    lines = [line for _ in range(4) for line in tail.read()]
    tail.close()
    assert [len(line) for line in lines] == [4096, 4]


def test_of_a_huge_rest_only_the_end_is_read(tmp_path: Path) -> None:
    path = tmp_path / "log"
    with path.open("wb") as file:
        file.truncate(1 << 33)  # sparse: 8 GiB
        file.seek(0, os.SEEK_END)
        file.write(b"\nthe cause\n")
    tail = LogTail(path)
    assert tail.read_rest()[-1] == "the cause"
    tail.close()


def test_a_truncated_log_is_read_from_its_new_beginning(tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_bytes(b"a long first line\n")
    tail = LogTail(path)
    tail.read()
    path.write_bytes(b"new\n")
    assert tail.read() == ["new"]
    tail.close()


def test_colours_and_controls_are_left_out(tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_bytes(b"\x1b[1;31mred\x1b[0m \x07bell\r\n\xff\n")
    assert last_lines(path, 5) == ("red bell", "\ufffd")


def test_last_lines_say_something(tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_bytes(
        b"old\nCUDA error: out of memory\n\n[New LWP 4242]\n"
        b"[Thread debugging using libthread_db enabled]\n#0  0x00007f in wait4 ()\n#1  main ()\n"
        b"0x00007f5c2c4ea1a2 in waitpid ()\n\n"
    )
    assert last_lines(path, 1) == ("CUDA error: out of memory",)
    assert last_lines(path, 5) == ("old", "CUDA error: out of memory")
    assert last_lines(path, 5, start=4) == ("CUDA error: out of memory",)


def test_last_lines_of_a_long_log_are_whole(tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_text("".join(f"line {i:06}\n" for i in range(20_000)))
    lines = last_lines(path, 10_000)
    assert lines[-1] == "line 019999"
    assert set(map(len, lines)) == {11}
    assert last_lines(tmp_path / "absent", 3) == ()


def test_new_logs_lie_together_and_old_ones_go(tmp_path: Path) -> None:
    logs = tmp_path / "logs"
    logs.mkdir()
    for age in range(KEPT_LOGS + 5):
        path = logs / f"{age}.log"
        path.touch()
        os.utime(path, (1e9 - age, 1e9 - age))
    (logs / "notes.txt").touch()
    place = new_log("Qwen/Qwen3 8B:Q4", state_dir=tmp_path)
    assert place.note == ""
    assert place.path.parent == logs
    assert place.path.name.startswith("Qwen-Qwen3-8B-Q4-")
    assert place.path.stat().st_mode & 0o777 == 0o600
    kept = {path.name for path in logs.glob("*.log")}
    assert kept == {place.path.name} | {f"{age}.log" for age in range(KEPT_LOGS - 1)}
    assert (logs / "notes.txt").exists()


@pytest.mark.parametrize("name", ["../../etc/passwd", "", "...", "\n\x00", "x" * 500])
def test_a_log_stays_in_its_directory(tmp_path: Path, name: str) -> None:
    assert new_log(name, state_dir=tmp_path).path.resolve().parent == tmp_path / "logs"


def test_without_a_state_directory_there_is_a_temporary_one_and_a_word(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.touch()
    place = new_log("model", state_dir=blocked)
    assert str(place.path) in place.note
    assert place.path.parent.is_dir()
    place.path.parent.rmdir()
