"""`--restart on-failure`: what has died comes back, where clients look for it, and not for ever."""

from __future__ import annotations

import os
import re
import signal
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cuda_house import CudaHouse, after, card, uuid_of
from fake_build import CUDA
from fakenvml.machine import Machine
from launching import FAST, Started, ask, wait_for
from mgpu.decide.restarts import LONG_S, MOST, PAUSES_S, Restarts

AGAIN: Final = ("--restart", "on-failure")
PAUSES: Final = "mgpu.decide.restarts.PAUSES_S"
DIED: Final = r"^\d{4}-\d\d-\d\d \d\d:\d\d:\d\d mgpu: llama-server was killed by SIGKILL .*while it was serving$"


@pytest.fixture
def house(tmp_path: Path, python_path: str, fake_nvml: Path, header: Callable[[str], Path]) -> Iterator[CudaHouse]:
    """Two cards of 24 GiB, and short pauses."""
    house = CudaHouse(tmp_path, python_path, fake_nvml, header)
    house.has(24, 24)
    house.env |= house.tuned({PAUSES: [0.2]})
    yield house
    house.close()


def _ready(one: Started, n: int) -> None:
    """Until it has been ready `n` times."""
    wait_for(lambda: one.said.count("  ready after ") >= n or one.process.poll() is not None, lambda: one.said)
    assert one.said.count("  ready after ") == n, one.said


def _in_a_row(one: Started) -> list[int]:
    return [int(number) for number in re.findall(r"started again in \d+ s \((\d+) of 7 in a row\)", one.said)]


def test_it_comes_back_at_the_same_address(house: CudaHouse) -> None:
    with socket.create_server(("127.0.0.1", house.first_port)):
        running = house.run(*AGAIN)
        _ready(running, 1)
    endpoint = house.launch()["endpoint"]
    assert endpoint == f"http://127.0.0.1:{house.first_port + 1}/v1"
    house.kill_runtime()  # the first port is free by now, and nobody would look there
    _ready(running, 2)
    assert (house.launch()["endpoint"], house.launch()["restarts"]) == (endpoint, 1)
    assert ask(endpoint) == 200
    assert re.search(DIED, running.said, re.MULTILINE), running.said
    (report,) = re.findall(r"^  started again in 0 s \(1 of 7 in a row\)   report: (.*)$", running.said, re.MULTILINE)
    assert "never ready" not in Path(report).read_text()
    assert "planned anew" not in running.said  # it is the same plan
    assert running.end(signal.SIGTERM) == 130
    house.assert_clean()


def test_without_being_asked_to_it_stays_dead(house: CudaHouse) -> None:
    running = house.run()
    _ready(running, 1)
    house.kill_runtime()
    assert running.end() == 7
    assert len(house.starts()) == 1
    assert "started again" not in running.said
    house.assert_clean()


def test_what_never_was_ready_is_not_started_again(house: CudaHouse) -> None:
    house.behaves("--fault exit-while-loading")
    done = house.call("run", house.model, *AGAIN)
    assert done.returncode == 7
    assert len(house.starts()) == 1
    assert "started again" not in done.stderr
    house.assert_clean()


def test_seven_failures_in_a_row_are_enough(house: CudaHouse) -> None:
    running = house.run(*AGAIN)
    _ready(running, 1)
    house.behaves("--fault exit-while-loading")
    house.kill_runtime()
    assert running.end() == 7
    assert len(house.starts()) == 1 + MOST
    assert _in_a_row(running) == [1, 2, 3, 4, 5, 6, 7]
    assert "  it has failed 8 times in a row: not started again\n" in running.said
    assert "mgpu: llama-server exited with status 1 before it was ready\n" in running.said
    assert running.said.count("report, ready to paste into an issue: ") == 1
    house.assert_clean()


def test_one_that_has_lived_long_starts_counting_anew(house: CudaHouse) -> None:
    long = {"mgpu.decide.restarts.LONG_S": 0.2, "mgpu.running.LONG_S": 0.2}
    running = house.run(*AGAIN, env=house.tuned({PAUSES: [0.05], **long}))
    for n in range(1, MOST + 3):
        _ready(running, n)
        time.sleep(0.25)
        house.kill_runtime()
    _ready(running, MOST + 3)
    assert set(_in_a_row(running)) == {1}
    assert house.launch()["restarts"] == MOST + 2
    assert running.end(signal.SIGTERM) == 130
    house.assert_clean()


def test_the_record_does_not_grow_with_each_start(house: CudaHouse) -> None:
    running = house.run(*AGAIN, "--name", "chat", env=house.tuned({PAUSES: [0.05]}))
    sizes: list[int] = []
    for n in range(1, 5):
        _ready(running, n)
        wait_for(lambda: house.launch()["state"] == "ready", "not ready")
        sizes.append((house.state / "launches" / "chat.json").stat().st_size)
        house.kill_runtime()
    _ready(running, 5)
    assert max(sizes[1:]) - min(sizes[1:]) < 32
    assert running.end(signal.SIGTERM) == 130


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_pause_ends_at_once_when_asked_to(house: CudaHouse, number: signal.Signals) -> None:
    running = house.run(*AGAIN, env=house.tuned({PAUSES: [600.0]}))
    _ready(running, 1)
    house.kill_runtime()
    running.until("started again in 600 s")
    asked = time.monotonic()
    assert running.end(number) == 130
    assert time.monotonic() - asked < 3
    house.assert_clean()


def test_mgpu_stop_ends_a_pause(house: CudaHouse) -> None:
    house.env |= house.tuned({PAUSES: [600.0]})
    house.detach(*AGAIN, "--name", "chat")
    house.kill_runtime()
    wait_for(lambda: house.launch()["state"] == "waiting", house.launch)
    assert "chat: waits to be started again; last: llama-server was killed by SIGKILL" in " ".join(
        house.call("ps").stdout.split()
    )
    asked = time.monotonic()
    assert house.call("stop", "chat").stderr == "stopped chat\n"
    assert time.monotonic() - asked < 5
    house.assert_clean()


def test_while_it_waits_for_somebody_who_decides_it_can_be_stopped(house: CudaHouse) -> None:
    running = house.run(*AGAIN)
    _ready(running, 1)
    other = house.run("--gpus", "1")
    lock = house.state / "launches" / "planning"
    wait_for(lambda: lock.read_text() == f"{other.pid}\n", "it never decided")
    os.kill(other.pid, signal.SIGSTOP)
    house.kill_runtime()
    running.until("another mgpu is just deciding: waiting for it")
    asked = time.monotonic()
    assert running.end(signal.SIGTERM) == 130
    assert time.monotonic() - asked < 3
    os.kill(other.pid, signal.SIGCONT)
    _ready(other, 1)
    other.end(signal.SIGTERM)
    house.assert_clean()


def test_on_what_is_left_when_a_card_has_gone(house: CudaHouse) -> None:
    running = house.run(*AGAIN)
    _ready(running, 1)
    house.machine(Machine(card(1)))  # it is GPU 0 now
    house.kill_runtime()
    _ready(running, 2)
    assert [start["uuids"] for start in house.starts()] == [[uuid_of(0)], [uuid_of(1)]]
    assert "  planned anew: on another card, which is GPU 0 now\n" in running.said
    assert running.end(signal.SIGTERM) == 130
    house.assert_clean()


def test_what_ran_on_cards_is_not_quietly_started_on_the_cpu(house: CudaHouse) -> None:
    """A driver that is upgraded comes back; a launch that went to the CPU meanwhile would stay there."""
    running = house.run(*AGAIN)
    _ready(running, 1)
    house.machine(Machine())
    house.lists("")
    house.kill_runtime()
    running.until("the CPU alone would be many times slower")
    house.has(24, 24)
    house.lists(CUDA)
    _ready(running, 2)
    assert [start["uuids"] for start in house.starts()] == [[uuid_of(0)], [uuid_of(0)]]
    assert running.end(signal.SIGTERM) == 130
    house.assert_clean()


def test_when_nothing_fits_any_more_it_goes_on_trying(house: CudaHouse) -> None:
    """What took the card may give it back."""
    house.has(8)
    running = house.run(*AGAIN, "--offload", "never")
    _ready(running, 1)
    house.hold(0, 6)
    house.kill_runtime()
    running.until("mgpu: does not fit: needs 5.")
    (house.cards / "held" / f"{uuid_of(0)}.{os.getpid()}").unlink()
    _ready(running, 2)
    assert running.end(signal.SIGTERM) == 130
    house.assert_clean()


def test_a_port_that_was_given_is_waited_for(house: CudaHouse) -> None:
    port = house.first_port + 9
    running = house.run(*AGAIN, "--port", str(port))
    _ready(running, 1)
    with _thief(house, port):
        running.until(f"mgpu: port {port} on 127.0.0.1 is in use by ")
    _ready(running, 2)
    assert house.launch()["ports"] == [port]
    assert running.end(signal.SIGTERM) == 130
    house.assert_clean()


def test_a_port_that_was_chosen_is_kept_if_nobody_has_taken_it(house: CudaHouse) -> None:
    running = house.run(*AGAIN)
    _ready(running, 1)
    (port,) = house.launch()["ports"]
    with _thief(house, port):
        _ready(running, 2)
    assert re.search(
        rf"^  \S+ \S+ port {port} has been taken by another program: it is at {port + 1} from now on$",
        running.said,
        re.MULTILINE,
    )
    assert house.launch()["endpoint"] == f"http://127.0.0.1:{port + 1}/v1"
    assert running.end(signal.SIGTERM) == 130
    house.assert_clean()


def _thief(house: CudaHouse, port: int) -> socket.socket:
    """The runtime dies, and another program has its port."""
    house.kill_runtime()
    while True:
        try:
            return socket.create_server(("127.0.0.1", port))
        except OSError:
            time.sleep(0.005)


def test_replicas_come_back_all_together(house: CudaHouse) -> None:
    running = house.run(*AGAIN, "--users", "8", env={"MGPU_PROXY": "none"})
    _ready(running, 1)
    assert len(house.starts()) == 2
    ports = {after(start["argv"], "--port") for start in house.starts()}
    house.kill_runtime()
    _ready(running, 2)
    assert {after(start["argv"], "--port") for start in house.starts()[2:]} == ports
    assert running.end(signal.SIGTERM) == 130
    house.assert_clean()


class TestUnwell:
    """It lives and does not answer."""

    @pytest.fixture
    def sick(self, house: CudaHouse) -> Callable[[], None]:
        house.behaves(f"--mood {house.mood}")
        settings = {**FAST, "mgpu.launch.keeper._STUCK_S": 1.0, PAUSES: [0.2]}
        house.env |= house.tuned(settings)

        def fall_ill() -> None:
            house.mood.write_text("sick")

        return fall_ill

    def test_it_is_started_again_if_that_was_asked_for(self, house: CudaHouse, sick: Callable[[], None]) -> None:
        running = house.run(*AGAIN)
        _ready(running, 1)
        sick()
        running.until("not well: ")
        running.until("started again in 0 s (1 of 7 in a row)")
        house.mood.unlink()
        _ready(running, 2)
        assert re.search(r"mgpu: not well for [12] s: ", running.said)
        assert running.end(signal.SIGTERM) == 130
        house.assert_clean()

    def test_it_is_left_alone_if_not(self, house: CudaHouse, sick: Callable[[], None]) -> None:
        running = house.run()
        _ready(running, 1)
        sick()
        running.until("not well: ")
        time.sleep(2)
        assert house.launch()["state"] == "unwell"
        house.mood.unlink()
        running.until("well again after ")
        assert len(house.starts()) == 1
        assert running.end(signal.SIGTERM) == 130
        house.assert_clean()


def test_detached_it_comes_back_and_ends_with_a_word(house: CudaHouse) -> None:
    house.detach(*AGAIN, "--name", "chat")
    house.kill_runtime()
    wait_for(lambda: house.launch()["restarts"] == 1 and house.launch()["state"] == "ready", house.launch)
    house.behaves("--fault exit-while-loading")
    house.kill_runtime()
    wait_for(lambda: house.launch()["state"] == "failed", house.launch)
    end = house.launch()["end"]
    assert (end["exit_code"], end["message"]) == (7, "llama-server exited with status 1 before it was ready")
    logged = house.call("logs", "chat", "-n", "300").stdout
    assert "it has failed 8 times in a row: not started again" in logged
    assert house.call("stop", "chat").stderr == "cleared away chat\n"
    house.assert_clean()


def test_out_of_memory_while_it_serves_makes_the_next_plan_smaller(house: CudaHouse) -> None:
    house.has(24)
    running = house.run(*AGAIN)
    _ready(running, 1)
    with Path(house.launch()["log"]).open("a") as log:
        log.write("alloc_buffer: allocating 512.00 MiB on device 0: cudaMalloc failed: out of memory\n")
    house.kill_runtime()
    _ready(running, 2)
    assert [after(start["argv"], "--ctx-size") for start in house.starts()] == ["8192", "4096"], running.said
    assert "  planned anew: context 4096 instead of 8192, as no --ctx was given\n" in running.said
    house.kill_runtime()  # of something else
    _ready(running, 3)
    assert after(house.starts()[-1]["argv"], "--ctx-size") == "4096"  # it has not forgotten
    assert running.end(signal.SIGTERM) == 130
    house.assert_clean()


def test_out_of_memory_on_the_way_back_is_planned_around(house: CudaHouse) -> None:
    running = house.run(*AGAIN)
    _ready(running, 1)
    house.hide(0, 19)
    house.kill_runtime()
    _ready(running, 2)
    assert _in_a_row(running) == [1]
    assert "  planned anew (try 2 of 3): on GPU 1 instead of GPU 0\n" in running.said
    assert running.end(signal.SIGTERM) == 130
    house.assert_clean()


def test_what_it_may_be_restarted_for_is_said_in_help(house: CudaHouse) -> None:
    done = house.call("run", house.model, "--restart", "always")
    assert done.returncode == 2
    assert "on-failure" in done.stderr


@given(st.lists(st.floats(0, 2 * LONG_S), max_size=40))
def test_pauses_grow_and_end(lives: list[float]) -> None:
    restarts, before = Restarts(), 0.0
    for lived in lives:
        pause = restarts.failed(lived)
        if lived >= LONG_S:
            assert pause == PAUSES_S[0]
        elif pause is None:
            assert restarts.in_a_row > MOST
            return
        else:
            assert pause >= before
            assert pause in PAUSES_S
        assert restarts.in_a_row <= MOST
        before = pause or 0.0


def test_nobody_is_started_more_than_seven_times_in_two_minutes() -> None:
    restarts = Restarts()
    pauses = [restarts.failed(5.0) for _ in range(MOST + 1)]
    assert pauses == [1, 2, 4, 8, 15, 30, 60, None]
