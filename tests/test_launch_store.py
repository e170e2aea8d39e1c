"""Launches as other processes see them: locks that end with their holder, records that are whole or nothing."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mgpu.decide.claims import HOST, Claim, card_key, with_claims
from mgpu.errors import UsageError
from mgpu.launch.heal import heal
from mgpu.launch.identity import Identity, Machine, identify, is_running, send
from mgpu.launch.locks import Lock, held, is_held
from mgpu.launch.places import spare_state_dir, state_dir, state_dirs, usual_state_dir
from mgpu.launch.records import Card, End, Record, from_text, to_text
from mgpu.launch.store import Entry, claims, enter, launches, name_for, planning, taken_ports
from mgpu.rig import Gpu, Rig
from mgpu.units import GIB

#: Enters a launch as another mgpu would, says its name, and lives until it is ended.
_OTHER = """
import sys, time
import msgspec
from mgpu.launch.records import Record
from mgpu.launch.store import enter, planning
with planning():
    entry = enter(msgspec.json.decode(sys.argv[1].encode(), type=Record))
print(entry.record.name, flush=True)
time.sleep(600)
"""

Other = Callable[[Record], "subprocess.Popen[str]"]


@pytest.fixture
def other() -> Iterator[Other]:
    started: list[subprocess.Popen[str]] = []

    def start(record: Record) -> subprocess.Popen[str]:
        text = msgspec.json.encode(record).decode()
        env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
        process = subprocess.Popen([sys.executable, "-c", _OTHER, text], stdout=subprocess.PIPE, text=True, env=env)
        started.append(process)
        assert process.stdout is not None
        assert process.stdout.readline()
        return process

    yield start
    for process in started:
        process.kill()
        process.wait()
        if process.stdout is not None:
            process.stdout.close()


def _folder() -> Path:
    return state_dir() / "launches"


def test_a_launch_is_alive_as_long_as_its_process(other: Other) -> None:
    process = other(Record(name="llama", ports=(8080,)))
    (seen,) = launches()
    assert (seen.name, seen.alive, taken_ports()) == ("llama", True, {8080: "llama"})
    assert seen.holder == identify(process.pid)

    process.kill()
    process.wait()
    (seen,) = launches()
    assert not seen.alive
    assert not taken_ports()


def test_an_ended_launch_leaves_nothing() -> None:
    with enter(Record(name="llama")):
        assert [seen.name for seen in launches()] == ["llama"]
    assert launches() == ()
    assert list(_folder().iterdir()) == []


def test_names_in_use_get_a_number(other: Other) -> None:
    other(Record(name="llama"))
    with planning(), enter(Record(name="llama")) as second, enter(Record(name="llama")) as third:
        assert (second.record.name, third.record.name) == ("llama-2", "llama-3")


def test_a_name_is_free_again_when_its_launch_has_failed() -> None:
    first = enter(Record(name="llama", detached=True))
    first.change(state="failed", end=End(exit_code=7, message="it died", at=time.time()))
    first.close(keep=True)
    assert [seen.record.end.message for seen in launches() if seen.record and seen.record.end] == ["it died"]
    with enter(Record(name="llama")) as again:
        assert again.record.name == "llama"


def test_files_are_for_this_user_alone() -> None:
    before = os.umask(0)
    try:
        with enter(Record(name="llama")):
            modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in (_folder(), *_folder().iterdir())}
    finally:
        os.umask(before)
    assert modes == {"launches": 0o700, "llama.json": 0o600, "llama.lock": 0o600}


def test_a_killed_launch_is_put_right(other: Other) -> None:
    """Its runtime, which the kernel was not told to end, is ended; its private directory goes."""
    runtime = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
    try:
        private = state_dir() / "run-abc"
        private.mkdir(mode=0o700, parents=True)
        foreign = state_dir().parent / "run-abc"
        foreign.mkdir()
        identity = identify(runtime.pid)
        assert identity is not None
        directories = (str(private), str(foreign), str(state_dir()))
        process = other(Record(name="llama", detached=True, runtimes=(identity,), directories=directories))
        process.kill()
        process.wait()

        (seen,) = heal()
        assert runtime.wait(timeout=20) == -signal.SIGTERM
        assert (private.exists(), foreign.exists(), state_dir().exists()) == (False, True, True)
        assert seen.record is not None
        assert seen.record.end is not None
        assert "killed" in seen.record.end.message
        assert [one.record for one in heal()] == [seen.record]
    finally:
        runtime.kill()
        runtime.wait()


def test_a_killed_launch_of_a_terminal_leaves_no_word(other: Other) -> None:
    process = other(Record(name="llama"))
    process.kill()
    process.wait()
    assert heal() == ()
    assert list(_folder().iterdir()) == [_folder() / "planning"]


def test_a_recycled_pid_is_not_ours() -> None:
    """The number of a dead runtime is somebody else's now: that one is left alone."""
    bystander = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
    try:
        identity = identify(bystander.pid)
        assert identity is not None
        former = Identity(pid=bystander.pid, start=identity.start + "1")
        assert not is_running(former)
        assert not send(former, signal.SIGKILL)
        _kill(enter(Record(name="llama", runtimes=(former,))))
        heal()
        assert bystander.poll() is None
    finally:
        bystander.kill()
        bystander.wait()


def test_a_corpse_is_no_process() -> None:
    process = subprocess.Popen([sys.executable, "-c", ""])
    identity = None
    while process.returncode is None and identify(process.pid) is not None:
        identity = identify(process.pid) or identity
    assert identify(process.pid) is None
    process.wait()


def test_a_damaged_record_of_a_living_launch_is_written_again() -> None:
    with enter(Record(name="llama", model="Llama")) as entry:
        path = _folder() / "llama.json"
        path.write_bytes(path.read_bytes()[:40])
        (seen,) = heal()
        assert (seen.alive, seen.record) == (True, None)
        entry.change(state="ready")
        (seen,) = heal()
        assert seen.record is not None
        assert (seen.record.model, seen.record.state) == ("Llama", "ready")


def test_a_damaged_record_of_a_dead_launch_goes() -> None:
    _folder().mkdir(parents=True)
    (_folder() / "llama.json").write_text("{")
    (_folder() / "llama.lock").write_text("")
    (_folder() / ".llama.4194300").write_text("half")
    assert heal() == ()
    assert list(_folder().iterdir()) == []


def test_whatever_else_lies_there_is_not_waited_for() -> None:
    _folder().mkdir(parents=True)
    os.mkfifo(_folder() / "pipe.json")
    (_folder() / "link.json").symlink_to("/etc/passwd")
    (_folder() / "huge.json").write_bytes(b" " * (2 << 20))
    assert all(seen.record is None for seen in launches())
    heal()


def test_a_launch_whose_lock_was_removed_lives_all_the_same(other: Other) -> None:
    """A cleaner of old files, or a person: its runtime is not ended for it, and its name not given away."""
    runtime = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
    try:
        identity = identify(runtime.pid)
        assert identity is not None
        process = other(Record(name="llama", detached=True, runtimes=(identity,)))
        (_folder() / "llama.lock").unlink()
        (seen,) = heal()
        assert (seen.alive, seen.holder) == (True, identify(process.pid))
        assert runtime.poll() is None
        with enter(Record(name="llama")) as second:
            assert second.record.name == "llama-2"
    finally:
        runtime.kill()
        runtime.wait()


@pytest.mark.parametrize("everything", [False, True])
def test_a_removed_lock_is_taken_again(*, everything: bool) -> None:
    with enter(Record(name="llama")) as entry:
        for path in _folder().iterdir() if everything else [_folder() / "llama.lock"]:
            path.unlink()
        entry.change()  # as at each look
        assert is_held(_folder() / "llama.lock")
        (seen,) = launches()
        assert seen.record == entry.record
    assert launches() == ()


def test_a_name_that_was_taken_meanwhile_is_not_taken_back(other: Other) -> None:
    with enter(Record(name="llama")) as entry:
        for path in _folder().iterdir():
            path.unlink()
        other(Record(name="llama"))
        entry.change(state="ready")
        assert entry.record.name == "llama-2"
        assert {seen.name for seen in launches() if seen.alive} == {"llama", "llama-2"}


def test_a_name_that_was_asked_for_is_that_or_none(other: Other) -> None:
    other(Record(name="llama"))
    with pytest.raises(UsageError, match="there is a launch called llama"):
        enter(Record(name="llama"), exact=True)
    assert {path.name for path in _folder().iterdir()} == {"llama.json", "llama.lock", "planning"}


def test_only_one_clears_away_at_a_time(tmp_path: Path, other: Other) -> None:
    """What a launch has started elsewhere is ended once: the next one may have the same name by then."""
    count = tmp_path / "count"
    after = (sys.executable, "-c", f"import time; open({str(count)!r}, 'a').write('x'); time.sleep(0.5)")
    process = other(Record(name="llama", detached=True, after=(after,)))
    process.kill()
    process.wait()
    healers = [multiprocessing.get_context("fork").Process(target=heal) for _ in range(4)]
    for healer in healers:
        healer.start()
    for healer in healers:
        healer.join()
    assert count.read_text() == "x"
    (seen,) = heal()
    assert seen.record is not None
    assert seen.record.end is not None


def test_a_name_that_is_entered_anew_is_not_cleared_away(monkeypatch: pytest.MonkeyPatch, other: Other) -> None:
    """Between the look that found it dead and the clearing away, another launch may have taken the name."""
    process = other(Record(name="llama", detached=True))
    process.kill()
    process.wait()
    stale = launches()
    with heal_left_alone(), enter(Record(name="llama", model="new")) as entry:
        monkeypatch.setattr("mgpu.launch.heal.launches", lambda: stale)
        heal()
        (seen,) = launches()
        assert seen.record == entry.record


@contextmanager
def heal_left_alone() -> Iterator[None]:
    """The dead launch has gone by the time the name is wanted again."""
    for path in _folder().glob("llama.*"):
        path.unlink()
    yield


def test_a_launch_on_another_machine_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """A shared home: its lock is held where we cannot see it."""
    bystander = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
    try:
        identity = identify(bystander.pid)
        assert identity is not None
        elsewhere = Machine(name="elsewhere", boot="11111111-2222-3333-4444-555555555555")
        record = Record(name="llama", machine=elsewhere, runtimes=(identity,), ports=(8080,), promised_host=GIB)
        _folder().mkdir(parents=True)
        (_folder() / "llama.json").write_bytes(to_text(record))
        (seen,) = heal()
        assert bystander.poll() is None
        assert seen.record == record
        assert (claims(), taken_ports()) == ((), {})
        assert heal(now=time.time() + 8 * 86400) == ()
        assert bystander.poll() is None
    finally:
        bystander.kill()
        bystander.wait()


def test_private_directories_among_temporary_files_are_removed_too(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    names = ("mgpu-run-abc", "run-abc", "mgpu-proxy-x", "else")
    for name in names:
        (tmp_path / name).mkdir(mode=0o700)
    (tmp_path / "mgpu-run-open").mkdir(mode=0o755)
    entry = enter(Record(name="llama", directories=tuple(str(tmp_path / name) for name in (*names, "mgpu-run-open"))))
    _kill(entry)
    heal()
    assert {path.name for path in tmp_path.iterdir()} == {"run-abc", "else", "mgpu-run-open"}


def test_directories_that_no_record_names_go_after_a_while() -> None:
    state_dir().mkdir(parents=True, exist_ok=True)
    stray, ours = state_dir() / "run-stray", state_dir() / "run-ours"
    for path in (stray, ours):
        path.mkdir(mode=0o700)
    with enter(Record(name="llama", directories=(str(ours),))):
        heal()
        assert stray.exists()
        heal(now=time.time() + 7200)
        assert (stray.exists(), ours.exists()) == (False, True)


def _kill(entry: Entry) -> None:
    """As if the mgpu that has it had been killed with SIGKILL."""
    entry.change(launcher=None)
    assert entry._lock is not None
    entry._lock.release()


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes everywhere")
def test_a_read_only_home_has_its_launches_elsewhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    usual_state_dir().mkdir(parents=True)
    usual_state_dir().chmod(0o500)
    assert state_dir() == spare_state_dir()


def test_nowhere_to_write_is_no_reason_not_to_launch(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    monkeypatch.setenv("XDG_STATE_HOME", str(blocked))
    monkeypatch.setattr("tempfile.tempdir", str(blocked))
    with planning() as alone, enter(Record(name="llama")) as entry:
        assert not alone
        assert entry.flaw.startswith("cannot keep the launch in ")
        entry.change(state="ready")
        assert entry.record.state == "ready"
    assert launches() == ()


def test_a_directory_others_may_write_to_is_not_used(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    spare_state_dir().mkdir(mode=0o777)
    spare_state_dir().chmod(0o777)
    assert spare_state_dir() not in state_dirs()
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    spare_state_dir().rmdir()
    spare_state_dir().symlink_to(elsewhere)
    assert spare_state_dir() not in state_dirs()


def test_only_one_decides_at_a_time(other: Other) -> None:
    del other
    with planning() as first:
        assert first
        with held(_folder() / "planning", wait_s=0.1) as second:
            assert not second
    with planning() as again:
        assert again


def test_a_lock_whose_file_was_removed_meanwhile_is_taken_anew(tmp_path: Path) -> None:
    path = tmp_path / "x.lock"
    first = Lock.try_take(path)
    assert first is not None
    assert Lock.try_take(path) is None
    path.unlink()
    second = Lock.try_take(path)
    assert second is not None
    assert is_held(path)
    second.release()
    first.release()
    assert not is_held(path)


def test_promises_count_until_they_are_taken(other: Other) -> None:
    cards = (Card(key="GPU-a", planned=10 * GIB, taken=4 * GIB), Card(key="GPU-b", planned=GIB, taken=GIB))
    other(Record(name="llama", cards=cards, promised_host=3 * GIB))
    found = {claim.key: claim.n_bytes for claim in claims()}
    assert found == {"GPU-a": 6 * GIB, HOST: 3 * GIB}


def test_a_launch_that_is_up_promises_nothing_more(other: Other) -> None:
    other(Record(name="llama", state="ready", cards=(Card(key="GPU-a", planned=GIB),)))
    assert claims() == ()


def test_claims_leave_less_of_a_card_and_say_so() -> None:
    gpus = tuple(
        Gpu(index=i, name="RTX 3090", vendor="nvidia", total_bytes=24 * GIB, free_bytes=23 * GIB, uuid=f"GPU-{i}")
        for i in range(2)
    )
    rig = Rig(name="r", source="detected", gpus=gpus, ram_bytes=64 * GIB, ram_free_bytes=60 * GIB)
    why = "promised to llama, which is loading"
    taken = (Claim(key=card_key(gpus[1]), n_bytes=20 * GIB, why=why), Claim(key=HOST, n_bytes=90 * GIB, why=why))
    left = with_claims(rig, taken)
    assert [gpu.free_bytes for gpu in left.gpus] == [23 * GIB, 3 * GIB]
    assert left.ram_free_bytes == 0
    assert [finding.text for finding in left.findings] == [
        f"GPU 1: 20.0 GiB of it are {why}",
        f"RAM: 90.0 GiB of it are {why}",
    ]


@pytest.mark.parametrize(
    ("model", "name"),
    [("Llama 3.1 8B Instruct", "llama-3.1-8b-instruct"), ("../..", "model"), ("名前", "model"), ("a" * 90, "a" * 48)],
)
def test_names_are_made_of_models(model: str, name: str) -> None:
    assert name_for(model) == name


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=300))
def test_no_text_is_too_odd_for_a_record(text: bytes) -> None:
    record = from_text(text)
    assert record is None or from_text(to_text(record)) == record


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_a_record_cut_or_changed_is_damaged_or_whole(data: st.DataObject) -> None:
    record = Record(name="llama", path="a\udcff b", cards=(Card(key="GPU-a", planned=5),), said="x\n\"'")
    text = bytearray(to_text(record))
    assert from_text(bytes(text)) == record
    for _ in range(data.draw(st.integers(1, 4))):
        text[data.draw(st.integers(0, len(text) - 1))] = data.draw(st.integers(0, 255))
    changed = from_text(bytes(text[: data.draw(st.integers(0, len(text)))]))
    assert changed is None or isinstance(changed, Record)


def test_records_of_a_newer_mgpu_are_read_as_far_as_they_are_known() -> None:
    told = json.loads(to_text(Record(name="llama", model="Llama")))
    told |= {"schema": 9, "sparkles": [1, 2], "cards": [{"key": "GPU-a", "planned": 3, "colour": "red"}]}
    record = from_text(json.dumps(told).encode())
    assert record is not None
    assert (record.model, record.cards) == ("Llama", (Card(key="GPU-a", planned=3),))
