"""Stopped before anything runs, and launched where nobody listens: closed pipes, full ones, names that are taken."""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Final

import pytest

from launching import House, wait_for

_ARGV: Final = (sys.executable, "-m", "mgpu", "run")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT], ids=["SIGTERM", "SIGHUP", "Ctrl-C"])
def test_stopped_while_deciding_is_130_and_leaves_nothing(house: House, tmp_path: Path, number: signal.Signals) -> None:
    """A runtime that takes its time to list its devices: that is where most of the deciding goes."""
    asked = tmp_path / "asked"
    slow = tmp_path / "slow-llama-server"
    slow.write_text(f"#!/bin/sh\ntouch '{asked}'\nexec sleep 600\n")
    slow.chmod(0o755)
    started = house.run("--llama-server", str(slow))
    wait_for(asked.exists, lambda: started.said)
    assert started.end(number) == 130, started.said
    assert "Traceback" not in started.said
    house.assert_clean()


def test_a_reader_that_has_gone_does_not_end_a_launch(house: House) -> None:
    """`mgpu run … --detach 2>&1 | head -1`: what was asked for is a launch, not its words."""
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        (*_ARGV, house.model, "--detach"),
        env={**house.env, **house.tuned()},
        stdout=writer,
        stderr=writer,
        timeout=60,
        check=False,
    )
    os.close(writer)
    assert done.returncode == 0
    assert house.launch()["state"] == "ready"
    assert house.call("stop", "--all").returncode == 0
    house.assert_clean()


def test_a_full_disk_for_its_words_does_not_end_a_launch(house: House) -> None:
    with Path("/dev/full").open("wb") as full:
        done = subprocess.run(
            (*_ARGV, house.model, "--detach"),
            env={**house.env, **house.tuned()},
            stdout=full,
            stderr=full,
            timeout=60,
            check=False,
        )
    assert done.returncode == 0
    assert house.call("stop", "--all").returncode == 0
    house.assert_clean()


def test_a_reader_that_does_not_read_does_not_keep_it_from_stopping(house: House) -> None:
    """`| less`, or a terminal after Ctrl-S: a write would wait as long as the reader likes."""
    reader, writer = os.pipe()
    process = subprocess.Popen((*_ARGV, house.model), env={**house.env, **house.tuned()}, stdout=writer, stderr=writer)
    try:
        wait_for(lambda: house.launches() and house.launch()["state"] == "ready", "never ready")
        fcntl.fcntl(writer, fcntl.F_SETFL, fcntl.fcntl(writer, fcntl.F_GETFL) | os.O_NONBLOCK)
        with suppress(BlockingIOError):
            while True:
                os.write(writer, b"x" * 512)
        # O_NONBLOCK is the pipe's, not ours alone: mgpu must not profit from it.
        fcntl.fcntl(writer, fcntl.F_SETFL, fcntl.fcntl(writer, fcntl.F_GETFL) & ~os.O_NONBLOCK)
        begin = time.monotonic()
        process.send_signal(signal.SIGTERM)
        wait_for(lambda: not house.runtimes(), "the runtime still runs")
        assert process.wait(timeout=20) == 130
        assert time.monotonic() - begin < 20
    finally:
        process.kill()
        process.wait()
        os.close(reader)
        os.close(writer)
    house.assert_clean()


def test_a_name_that_is_taken_is_refused_when_it_was_asked_for(house: House) -> None:
    assert house.detach("--name", "chat").returncode == 0
    again = house.call("run", house.model, "--detach", "--name", "chat")
    assert again.returncode == 2
    assert "mgpu: there is a launch called chat" in again.stderr
    assert [launch["name"] for launch in house.launches()] == ["chat"]
    assert house.call("stop", "chat").returncode == 0
    house.assert_clean()


def test_a_launch_whose_state_was_removed_is_seen_again_and_stopped(house: House) -> None:
    """The lock alone, as cleaners of old files do; `ps` must not take it for dead, and `stop` must find it."""
    assert house.detach("--name", "chat").returncode == 0
    runtimes = house.runtimes()
    for lock in house.state.glob("launches/*.lock"):
        lock.unlink()
    assert house.launch()["alive"]
    assert house.runtimes() == runtimes
    assert house.call("stop", "chat").returncode == 0
    house.assert_clean()
