"""Logs: lines as they come whatever the runtime writes, the last ones, and where they lie."""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from launching import descriptors
from mgpu.errors import RuntimeFailedError
from mgpu.launch.follow import Following
from mgpu.launch.logs import KEPT_LOGS, LONGEST, LogTail, last_lines, new_log
from mgpu.launch.process import Child
from mgpu.launch.records import Record
from mgpu.launch.store import enter
from mgpu.launch.watch import Watch
from mgpu_adapters.llamacpp.adapter import LlamaCpp


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
    assert (lines[0], lines[-1]) == ("line 010000", "line 019999")
    assert set(map(len, lines)) == {11}
    assert len(last_lines(path, 50_000)) == 20_000
    assert last_lines(path, 50_000, start=12 * 19_000)[0] == "line 019000"
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


def test_lines_are_not_looked_for_for_ever(tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_text("\n" * (9 << 20) + "last\n")
    with path.open("r+") as file:
        file.write("first\n")
    assert last_lines(path, 2) == ("last",)


def test_the_logs_of_all_that_lives_stay(tmp_path: Path) -> None:
    """Of replicas and the proxy before them, too; an older mgpu knows of the first alone."""
    kept = [new_log(f"m-{own}", state_dir=tmp_path).path for own in ("GPU 0", "GPU 1", "nginx")]
    (old,) = [new_log("old", state_dir=tmp_path).path]
    mine = new_log("m-mgpu", state_dir=tmp_path).path
    record = Record(name="m", log=str(kept[0]), logs=tuple(map(str, kept)), own_log=str(mine))
    with enter(record), enter(Record(name="old", log=str(old))):
        for path in (*kept, old, mine):
            os.utime(path, (1, 1))
        for number in range(KEPT_LOGS + 5):
            new_log(f"newer-{number}", state_dir=tmp_path)
        assert all(path.exists() for path in (*kept, old, mine))
    new_log("one more", state_dir=tmp_path)
    assert not any(path.exists() for path in (*kept, old, mine))


@pytest.fixture
def child(tmp_path: Path) -> Iterator[Child]:
    child = Child.start(("sleep", "600"), os.environ, tmp_path / "log")
    yield child
    child.stop(grace_s=0.1)


def test_a_log_that_was_unlinked_is_read_and_shortened(child: Child) -> None:
    """It grows all the same, where nobody sees it."""
    with Watch(child, LlamaCpp()) as watch, child.log_path.open("ab", buffering=0) as log:
        child.log_path.unlink()
        os.truncate(log.fileno(), LONGEST)
        log.write(b"\nthe last words\n")
        for _ in range(6):
            watch.update()
        assert watch.log_size < 9 << 20
        log.write(b"and some more\n")
        error = watch.failure("ended")
    assert isinstance(error, RuntimeFailedError)
    assert error.log_tail[-2:] == ("the last words", "and some more")


def test_a_runtime_goes_on_behind_what_is_kept(child: Child) -> None:
    with Watch(child, LlamaCpp()) as watch, child.log_path.open("ab", buffering=0) as log:
        os.truncate(log.fileno(), LONGEST)
        log.write(b"\nbefore\n")
        watch.update()
        log.write(b"after\n")
    text = child.log_path.read_bytes()
    assert text.startswith(b"(what was here before has been removed")
    assert text.endswith(b"\nbefore\nafter\n")


def test_a_log_that_cannot_be_written_any_more_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "log"
    path.write_bytes(b"one\n")
    real = os.open

    def read_only(path: str, flags: int, *more: int) -> int:
        if flags & os.O_RDWR:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))
        return real(path, flags, *more)

    monkeypatch.setattr(os, "open", read_only)
    tail = LogTail(path, writable=True)
    assert tail.read() == ["one"]
    tail.close()


def test_a_look_catches_up_with_a_talkative_runtime(child: Child) -> None:
    """As far as 16 MiB go: the rest is for the next look."""
    line = b"llama_model_load: %-80d\n"
    with Watch(child, LlamaCpp()) as watch:
        with child.log_path.open("ab") as log:
            for number in range(5 << 20 >> 6):
                log.write(line % number)
        watch.update()
        assert watch._tail.behind == 0
        os.truncate(child.log_path, watch.log_size + (40 << 20))
        behind = watch._tail.behind
        watch.update()
        assert 16 << 20 <= behind - watch._tail.behind <= 17 << 20


class _Text:
    """A launch's logs, and what is said of them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.said: list[str] = []

    def record(self, *names: str) -> Record:
        logs = tuple(str(self.folder / name) for name in names)
        return Record(name="m", log=logs[0], logs=logs)

    def write(self, name: str, text: str) -> None:
        with (self.folder / name).open("a") as file:
            file.write(text)

    def take(self) -> list[str]:
        said = list(self.said)
        self.said.clear()
        return said


@pytest.fixture
def text(tmp_path: Path) -> _Text:
    return _Text(tmp_path)


def test_a_new_log_is_followed_from_its_beginning(text: _Text) -> None:
    text.write("first", "1\n2\n")
    with Following(text.said.append) as following:
        assert following.show_end(text.record("first"), 1) == ()
        text.write("first", "3\nits last word")
        text.write("second", "a\n")
        following.keep_to(text.record("second"))
        following.read()
        assert text.take() == ["2", "3", "its last word", "a"]
        text.write("first", "nobody's\n")
        text.write("second", "b\n")
        following.keep_to(text.record("second"))
        following.read()
        assert text.take() == ["b"]


def test_logs_of_several_are_told_apart(text: _Text) -> None:
    for name in ("one", "two"):
        text.write(name, f"{name} 1\n")
    with Following(text.said.append) as following:
        following.show_end(text.record("one", "two"), 5)
        assert text.take() == ["==> one <==", "one 1", "==> two <==", "two 1"]
        text.write("two", "two 2\n")
        following.read()
        assert text.take() == ["two 2"]
        text.write("two", "two 3\n")
        text.write("one", "one 2\n")
        following.read()
        assert text.take() == ["==> one <==", "one 2", "==> two <==", "two 3"]


def test_a_log_that_is_not_there_is_said(text: _Text) -> None:
    text.write("one", "1\n")
    with Following(text.said.append) as following:
        assert following.show_end(text.record("one", "two"), 5) == (f"its log is gone: {text.folder / 'two'}",)
        text.write("two", "2\n")
        following.keep_to(text.record("one", "two"))
        following.read()
        assert text.take() == ["==> one <==", "1", "==> two <==", "2"]
    with Following(text.said.append) as following:
        (flaw,) = following.show_end(text.record(os.devnull), 5)
    assert "it has no log" in flaw


def test_following_leaves_nothing_open(text: _Text) -> None:
    text.write("one", "")
    before = descriptors(os.getpid())
    with ExitStack() as stack:
        following = stack.enter_context(Following(text.said.append))
        following.show_end(text.record("one"), 5)
        for number in range(5):
            text.write(f"log {number}", "x\n")
            following.keep_to(text.record(f"log {number}"))
        assert descriptors(os.getpid()) == before + 1
    assert descriptors(os.getpid()) == before
