"""What a killed runtime leaves behind is removed; what others have is not."""

from __future__ import annotations

import mmap
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from mgpu.adapter import Command
from mgpu.launch.leftovers import Leftovers
from mgpu.launch.process import Child

SHARED = Path("/dev/shm")

#: Makes and maps files of shared memory, as vLLM's workers do, then waits.
_HOLDER = """
import mmap, sys, time
held = []
for name in sys.argv[1:]:
    with open(f"/dev/shm/{name}", "w+b") as file:
        file.truncate(4096)
        held.append(mmap.mmap(file.fileno(), 4096))
print("mapped", flush=True)
time.sleep(100)
"""


@pytest.fixture
def names() -> Iterator[tuple[str, str]]:
    """A name a runtime is known to use, and one it is not."""
    if not SHARED.is_dir():
        pytest.skip("no /dev/shm here")
    mark = f"{os.getpid()}_{time.monotonic_ns()}"
    names = (f"psm_test_{mark}", f"model_test_{mark}")
    yield names
    for name in names:
        (SHARED / name).unlink(missing_ok=True)


def hold(*names: str) -> subprocess.Popen[str]:
    process = subprocess.Popen([sys.executable, "-c", _HOLDER, *names], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "mapped\n"
    return process


def end(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.communicate()


def test_shared_memory_of_its_own_is_removed_and_files_it_only_reads_are_not(names: tuple[str, str]) -> None:
    process = hold(*names)
    leftovers = Leftovers(("psm_*",))
    leftovers.look([process.pid])
    end(process)
    leftovers.clear(by_itself=False)
    assert [(SHARED / name).exists() for name in names] == [False, True]  # a model on a RAM disk is no leftover


def test_what_another_process_still_has_stays(names: tuple[str, str]) -> None:
    process = hold(names[0])
    leftovers = Leftovers(("psm_*",))
    leftovers.look([process.pid])
    with (SHARED / names[0]).open("r+b") as file, mmap.mmap(file.fileno(), 4096):
        end(process)
        leftovers.clear(by_itself=False)
    assert (SHARED / names[0]).exists()


def test_what_it_was_not_seen_to_have_stays(names: tuple[str, str]) -> None:
    (SHARED / names[0]).write_bytes(b"0" * 4096)
    leftovers = Leftovers(("psm_*",))
    leftovers.look([os.getpid(), 2**22 + 1])
    leftovers.clear(by_itself=False)
    assert (SHARED / names[0]).exists()


def test_files_that_it_said_it_made_are_removed(tmp_path: Path) -> None:
    for name in ("meeting", "meeting-tp:0-[0-1]", "meetings", "other"):
        (tmp_path / name).write_text("")
    (tmp_path / "meeting.d").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "other")
    leftovers = Leftovers()
    leftovers.expect((f"{tmp_path}/meeting", f"{tmp_path}/meeting-*", f"{tmp_path}/gone", f"{tmp_path}/link"))
    leftovers.expect((f"{tmp_path}/meeting.d", f"{tmp_path}/nowhere/*"))
    leftovers.clear(by_itself=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "meeting.d", "meetings", "other"]


def command(*words: str, after: tuple[str, ...] = ()) -> Command:
    return Command(argv=words, env={}, scrub=(), files={}, ready_url="", endpoint="", after=after)


@pytest.mark.parametrize(("seconds", "runs"), [(100, True), (0, False)])
def test_what_comes_after_is_run_once_unless_it_ended_by_itself(tmp_path: Path, seconds: int, runs: bool) -> None:
    ran = tmp_path / "ran"
    words = (sys.executable, "-c", f"import time; time.sleep({seconds})")
    child = Child.of(command(*words, after=("sh", "-c", f"echo x >> {ran}")), os.environ, tmp_path / "log")
    if not seconds:
        while child.poll() is None:
            time.sleep(0.01)
    child.stop()
    child.stop()
    assert ran.exists() == runs
    if runs:
        assert ran.read_text() == "x\n"
