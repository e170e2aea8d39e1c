"""Starting and stopping real processes: nothing of them is left, however they behave."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from mgpu.adapter import Command
from mgpu.errors import InterruptedLaunchError, RuntimeFailedError, RuntimeMissingError
from mgpu.launch.process import Child, describe_exit, environment
from mgpu.launch.signals import StopSignals

DEAF = (
    "import signal, sys, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('up', flush=True); time.sleep(99)"
)


def wait_for(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline, f"waited in vain: {what}"
        time.sleep(0.01)


def start(log: Path, code: str, *argv: str) -> Child:
    return Child.start((sys.executable, "-c", code, *argv), os.environ, log)


def started(log: Path, code: str, *argv: str) -> Child:
    """A child that has printed "up"."""
    child = start(log, code, *argv)
    wait_for(lambda: b"up" in log.read_bytes(), "the child's first line")
    return child


def marked(marker: str) -> list[psutil.Process]:
    return [p for p in psutil.process_iter(["cmdline"]) if marker in (p.info["cmdline"] or ())]


def test_both_outputs_are_appended_to_the_log(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text("before\n")
    child = start(log, "import sys; print(sys.stdin.read(), 'out', flush=True); print('err', file=sys.stderr)")
    wait_for(lambda: child.poll() is not None, "its end")
    assert log.read_text() == "before\n out\nerr\n"
    assert child.log_start == len("before\n")
    assert child.poll() == child.stop() == 0


def test_it_has_a_session_of_its_own(tmp_path: Path) -> None:
    child = start(tmp_path / "log", "import time; time.sleep(99)")
    assert os.getsid(child.pid) == child.pid != os.getsid(0)
    assert child.stop() == -signal.SIGTERM


def test_a_child_may_end_cleanly(tmp_path: Path) -> None:
    code = (
        "import signal, sys, time; signal.signal(15, lambda *_: sys.exit(0)); print('up', flush=True); time.sleep(99)"
    )
    child = started(tmp_path / "log", code)
    assert child.stop() == 0
    assert child.stop() == 0


def test_one_that_is_deaf_to_sigterm_is_killed_after_the_grace(tmp_path: Path) -> None:
    child = started(tmp_path / "log", DEAF)
    begin = time.monotonic()
    assert child.stop(grace_s=0.3) == -signal.SIGKILL
    assert 0.3 <= time.monotonic() - begin < 5


def test_a_hurry_ends_the_grace(tmp_path: Path) -> None:
    child = started(tmp_path / "log", DEAF)
    hurried = threading.Event()
    threading.Timer(0.1, hurried.set).start()
    begin = time.monotonic()
    assert child.stop(grace_s=60, hurried=hurried.is_set) == -signal.SIGKILL
    assert time.monotonic() - begin < 10


def test_a_stopped_process_is_ended_too(tmp_path: Path) -> None:
    child = start(tmp_path / "log", "import time; time.sleep(99)")
    os.kill(child.pid, signal.SIGSTOP)
    wait_for(lambda: psutil.Process(child.pid).status() == psutil.STATUS_STOPPED, "the stop")
    assert child.stop(grace_s=0.1) == -signal.SIGKILL


@pytest.mark.parametrize("dies_first", [False, True])
def test_grandchildren_go_too(tmp_path: Path, dies_first: bool) -> None:
    marker = f"marker-{os.getpid()}-{tmp_path.name}"
    code = (
        "import subprocess, sys, time\n"
        "for session in (False, True)[: int(sys.argv[2])]:\n"
        "    argv = [sys.executable, '-c', sys.argv[3], sys.argv[1]]\n"
        "    subprocess.Popen(argv, start_new_session=session, stdout=subprocess.PIPE).stdout.readline()\n"
        "print('up', flush=True)\n"
        "time.sleep(0 if sys.argv[4] else 99)\n"
    )
    # A grandchild in a session of its own is found through its parent, hence only while that lives.
    n, dies = ("1", "dies") if dies_first else ("2", "")
    child = started(tmp_path / "log", code, marker, n, DEAF, dies)
    if dies_first:
        wait_for(lambda: child.poll() is not None, "the parent's end")
    assert len(marked(marker)) >= int(n)
    child.stop()
    wait_for(lambda: not marked(marker), "the grandchildren's end")


@pytest.mark.skipif(sys.platform != "linux", reason="PR_SET_PDEATHSIG is Linux's")
def test_a_killed_launcher_leaves_no_orphan(tmp_path: Path) -> None:
    marker = f"marker-{os.getpid()}-{tmp_path.name}"
    code = (
        "import os, sys, time; from pathlib import Path; from mgpu.launch.process import Child\n"
        "Child.start((sys.executable, '-c', 'import time; time.sleep(99)', sys.argv[1]), {}, Path(sys.argv[2]))\n"
        "print('up', flush=True); time.sleep(99)\n"
    )
    launcher = Path(__file__).parent.parent / "launcher"
    env = os.environ | {"PYTHONPATH": str(launcher)}
    argv = (sys.executable, "-c", code, marker, str(tmp_path / "inner"))
    outer = Child.start(argv, env, tmp_path / "log")
    wait_for(lambda: b"up" in (tmp_path / "log").read_bytes(), "the inner process")
    wait_for(lambda: len(marked(marker)) == 2, "both processes")
    os.kill(outer.pid, signal.SIGKILL)
    wait_for(lambda: not marked(marker), "the orphan's end")
    outer.stop()


def test_what_cannot_be_started(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("not a program")
    (tmp_path / "text").chmod(0o755)
    for name, reason in (("absent", "No such file"), ("text", "Exec format error"), ("", "Permission denied")):
        with pytest.raises(RuntimeMissingError, match=reason) as missing:
            Child.start((str(tmp_path / name),), {}, tmp_path / "log")
        assert name in missing.value.message
    with pytest.raises(RuntimeFailedError, match="too long"):
        Child.start((sys.executable, "x" * (1 << 22)), {}, tmp_path / "log")
    with pytest.raises(RuntimeFailedError, match="cannot write the log"):
        Child.start((sys.executable, "-c", ""), {}, tmp_path / "absent" / "log")


@pytest.mark.parametrize(
    ("code", "words"),
    [
        (0, "exited with status 0"),
        (127, "exited with status 127"),
        (-9, "was killed by SIGKILL (out of memory?)"),
        (-6, "was killed by SIGABRT (it aborted itself)"),
        (-15, "was killed by SIGTERM"),
        (-99, "was killed by signal 99"),
    ],
)
def test_exits_in_words(code: int, words: str) -> None:
    assert describe_exit(code) == words


def test_the_environment_is_scrubbed_before_it_is_extended() -> None:
    command = Command(
        argv=("server",),
        env={"LLAMA_ARG_X": "mine", "NEW": "1"},
        scrub=("LLAMA_ARG_", "GGML_"),
        files={},
        ready_url="",
        endpoint="",
    )
    environ = {"LLAMA_ARG_X": "theirs", "LLAMA_ARG_Y": "theirs", "GGML_Z": "", "PATH": "/bin"}
    assert environment(command, environ) == {"LLAMA_ARG_X": "mine", "NEW": "1", "PATH": "/bin"}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_signals_are_counted_not_raised(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with StopSignals() as stop:
        assert not stop.requested
        stop.check()
        os.kill(os.getpid(), number)
        os.kill(os.getpid(), number)  # at the same moment: a wrapper passing it on
        stop.wait(20)
        assert stop.requested
        assert not stop.hurried
        with pytest.raises(InterruptedLaunchError):
            stop.check()
        time.sleep(0.15)
        os.kill(os.getpid(), number)
        wait_for(lambda: stop.hurried, "the second request")
    assert signal.getsignal(number) is before


def test_nohup_is_respected() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopSignals() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            os.kill(os.getpid(), signal.SIGTERM)
            with pytest.raises(InterruptedLaunchError, match="SIGTERM"):
                stop.check()
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_waiting_ends_with_the_child_and_with_a_wake(tmp_path: Path) -> None:
    begin = time.monotonic()
    with StopSignals() as stop:
        child = start(tmp_path / "log", "")
        while child.poll() is None:
            stop.wait(20)
        threading.Timer(0.05, stop.wake).start()
        stop.wait(20)
        stop.wait(0.01)
    stop.wake()  # nobody waits any more
    child.stop()
    assert time.monotonic() - begin < 10
