"""What a program prints is read to its end, or to the end of patience."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import pytest

from mgpu.launch.collect import EndlessError, Printed, collect


def ask(script: str, *, timeout_s: float = 30.0) -> Printed:
    return collect((sys.executable, "-c", script), os.environ, timeout_s=timeout_s)


def test_both_outputs_and_how_it_ended() -> None:
    done = ask("import sys; print('out'); print('err', file=sys.stderr); sys.exit(3)")
    assert done == Printed(returncode=3, out="out\n", err="err\n")


def test_more_than_a_pipe_holds_on_both() -> None:
    done = ask("import sys\nfor _ in range(2000):\n    print('o' * 500)\n    print('e' * 500, file=sys.stderr)")
    assert len(done.out) == len(done.err) == 2000 * 501


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_without_end(stream: str) -> None:
    with pytest.raises(EndlessError):
        ask(f"import sys\nwhile True: sys.{stream}.write('x' * 65536)")


def test_hanging() -> None:
    with pytest.raises(EndlessError):
        ask("import time; time.sleep(600)", timeout_s=0.3)


def test_closed_outputs_and_hanging() -> None:
    with pytest.raises(EndlessError):
        ask("import os, time; os.close(1); os.close(2); time.sleep(600)", timeout_s=0.3)


def test_nothing_of_it_stays(tmp_path: Path) -> None:
    """What it started holds its outputs open, and ends with the question."""
    script = (
        "import subprocess, sys\n"
        f"child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        f"open({str(tmp_path / 'pid')!r}, 'w').write(str(child.pid))\n"
    )
    with pytest.raises(EndlessError):
        ask(script, timeout_s=2.0)
    pid = int((tmp_path / "pid").read_text())
    for _ in range(500):  # it is killed; when it has died is the kernel's matter
        if not _lives(pid):
            return
        time.sleep(0.02)
    pytest.fail(f"{pid} lives")


def _lives(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"
    except OSError:
        return False


def test_no_such_program() -> None:
    with pytest.raises(FileNotFoundError):
        collect(("/no/such/program",), {}, timeout_s=1.0)


def test_bytes_that_are_no_text() -> None:
    assert ask("import os; os.write(1, b'a\\xff')").out == "a\ufffd"
