"""Launches beside each other on FAKE cards: nobody is promised what somebody else has been promised already."""

from __future__ import annotations

import json
import os
import re
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

import pytest

from cuda_house import GIB, CudaHouse, after, uuid_of
from launching import Started, wait_for
from mgpu.adapter import Cause
from mgpu.launch.locks import Lock, is_held, unheld
from mgpu_adapters.llamacpp.log import read_line

NAME: Final = "llama-3.1-8b-instruct-q4_k_m"


@pytest.fixture
def house(tmp_path: Path, python_path: str, fake_nvml: Path, header: Callable[[str], Path]) -> Iterator[CudaHouse]:
    """Two cards of 24 GiB."""
    house = CudaHouse(tmp_path, python_path, fake_nvml, header)
    house.has(24, 24)
    yield house
    house.close()


def _end(house: CudaHouse, *running: Started) -> None:
    for one in running:
        one.process.send_signal(signal.SIGTERM)
    for one in running:
        one.end()
    house.assert_clean()


def _cards(house: CudaHouse) -> list[str]:
    """Of all starts: the card each was shown."""
    return [uuid for start in house.starts() for uuid in start["uuids"]]


def _card(house: CudaHouse) -> dict[str, Any]:
    (card,) = house.launch()["cards"]
    assert isinstance(card, dict)
    return card


def test_two_in_the_same_second_take_a_card_and_a_port_each(house: CudaHouse) -> None:
    house.close_gate("weights")  # neither has taken a byte when the other decides
    first, second = house.run(), house.run()
    house.started(2)
    assert sorted(_cards(house)) == [uuid_of(0), uuid_of(1)]
    assert len({after(start["argv"], "--port") for start in house.starts()}) == 2
    house.open_gate("weights")
    endpoints = {one.until("ready after").split()[4] for one in (first, second)}
    assert len(endpoints) == 2
    _end(house, first, second)


def test_on_one_card_the_second_is_refused_and_told_whose_it_is(house: CudaHouse) -> None:
    house.has(8)
    house.close_gate("weights")
    first = house.run("--name", "first")
    house.started(1)
    refused = house.call("run", house.model, "--offload", "never")
    assert refused.returncode == 5
    assert re.search(r"note: GPU 0: 5\.\d GiB of it are promised to first, which is loading", refused.stderr)
    assert "mgpu: does not fit: needs 5." in refused.stderr
    house.open_gate("weights")
    first.until("ready after")
    again = house.call("run", house.model, "--offload", "never")
    assert again.returncode == 5
    assert "promised" not in again.stderr  # it is taken by now
    _end(house, first)


def test_four_in_the_same_second_where_each_card_has_room_for_two(house: CudaHouse) -> None:
    house.has(14, 14)
    house.close_gate("weights")
    running = [house.run("--offload", "never") for _ in range(4)]
    house.started(4)
    assert sorted(_cards(house)) == [uuid_of(0), uuid_of(0), uuid_of(1), uuid_of(1)]
    assert len({after(start["argv"], "--port") for start in house.starts()}) == 4
    assert {one["name"] for one in house.launches()} == {NAME, f"{NAME}-2", f"{NAME}-3", f"{NAME}-4"}
    house.open_gate("weights")
    for one in running:
        one.until("ready after")
    _end(house, *running)


def test_a_fifth_that_finds_no_room_is_refused(house: CudaHouse) -> None:
    house.has(8, 8)
    house.close_gate("weights")
    running = [house.run("--offload", "never") for _ in range(5)]
    wait_for(lambda: sum(one.process.poll() is not None for one in running) == 3, "three that do not fit")
    assert sorted(_cards(house)) == [uuid_of(0), uuid_of(1)]
    refused = [one for one in running if one.process.poll() is not None]
    assert [one.process.returncode for one in refused] == [5, 5, 5]
    assert all("promised to" in one.said for one in refused)
    _end(house, *(one for one in running if one not in refused))


def test_the_promise_of_one_that_was_killed_is_void(house: CudaHouse) -> None:
    house.has(8)
    house.close_gate("weights")
    first = house.run()
    house.started(1)
    assert house.call("run", house.model, "--offload", "never").returncode == 5
    first.end(signal.SIGKILL)
    second = house.run()
    house.started(2)
    assert "promised" not in second.said
    house.open_gate("weights")
    second.until("ready after")
    _end(house, second)


def test_a_plan_beside_one_that_loads_says_what_is_promised(house: CudaHouse) -> None:
    house.close_gate("weights")
    first = house.run("--name", "first", "--gpus", "0")
    house.started(1)
    told = house.call("plan", house.model, "--json")
    rig = json.loads(told.stdout)["rig"]
    spare = rig["gpus"][1]["free_bytes"] - rig["gpus"][0]["free_bytes"]
    assert 5 * GIB < spare < 7 * GIB
    said = house.call("plan", house.model).stderr + house.call("plan", house.model).stdout
    assert re.search(r"GPU 0: 5\.\d GiB of it are promised to first, which is loading", said)
    other_rig = house.call("plan", house.model, "--rig", "2x3090")
    assert "promised" not in other_rig.stdout + other_rig.stderr  # another machine
    _end(house, first)


def test_the_promise_shrinks_as_the_memory_is_taken(house: CudaHouse) -> None:
    """What is promised and what is free together stay what they were: nothing counts twice for long."""
    house.close_gate("weights")
    house.close_gate("cache")
    house.close_gate("serve")
    first = house.run("--gpus", "0")
    house.started(1)
    planned = _card(house)["planned"]
    assert _card(house)["taken"] == 0
    house.open_gate("weights")
    wait_for(lambda: _card(house)["taken"] > 4 * GIB, "the weights are still promised")
    assert _card(house)["taken"] < 5 * GIB
    house.open_gate("cache")
    wait_for(lambda: _card(house)["taken"] > 5.4 * GIB, "the cache is still promised")
    told = json.loads(house.call("plan", house.model, "--json").stdout)["rig"]["gpus"]
    assert abs((told[1]["free_bytes"] - told[0]["free_bytes"]) - planned) < GIB
    house.open_gate("serve")
    first.until("ready after")
    assert _card(house)["taken"] == planned
    told = json.loads(house.call("plan", house.model, "--json").stdout)["rig"]["gpus"]
    assert told[1]["free_bytes"] - told[0]["free_bytes"] == house.taken(0)
    _end(house, first)


def test_ram_is_promised_as_well(house: CudaHouse) -> None:
    """Beside a launch on the CPU, whose weights are read only now, there is less RAM to plan with."""
    house.close_gate("serve")
    before = json.loads(house.call("plan", house.model, "--json").stdout)["rig"]["ram_free_bytes"]
    first = house.run("--name", "first", "--", "-ngl", "0", "-dev", "none")
    house.started(1)
    left = json.loads(house.call("plan", house.model, "--json").stdout)["rig"]["ram_free_bytes"]
    assert before - left > 4 * GIB
    said = house.call("plan", house.model)
    assert re.search(r"RAM: [5-9]\.\d GiB of it are promised to first, which is loading", said.stdout + said.stderr)
    house.open_gate("serve")
    first.until("ready after")
    _end(house, first)


def test_one_that_pauses_has_no_claim_to_a_card_but_keeps_its_port(house: CudaHouse) -> None:
    house.has(8)
    settings = {"mgpu.decide.restarts.PAUSES_S": [60.0]}
    first = house.run("--restart", "on-failure", "--name", "first", env=house.tuned(settings))
    first.until("ready after")
    house.kill_runtime()
    first.until("started again in 60 s")
    port = after(house.starts()[0]["argv"], "--port")
    second = house.run("--port", port)
    assert second.end() == 7
    assert f"port {port} belongs to the launch first" in second.said
    third = house.run("--offload", "never")
    third.until("ready after")
    _end(house, first, third)


def test_one_port_asked_for_twice_goes_to_the_first(house: CudaHouse) -> None:
    house.close_gate("weights")
    port = str(house.first_port + 7)
    both = {name: house.run("--port", port, "--name", name) for name in ("this", "that")}
    wait_for(lambda: any(one.process.poll() is not None for one in both.values()), "both live")
    house.started(1)
    (lost,) = (one for one in both.values() if one.process.poll() is not None)
    ((name, won),) = ((name, one) for name, one in both.items() if one is not lost)
    assert lost.process.returncode == 7
    assert lost.said.splitlines()[-2:] == [
        f"mgpu: port {port} belongs to the launch {name}",
        f"      `mgpu stop {name}` frees it; or choose another --port, or leave --port out",
    ]
    assert "report" not in lost.said
    assert len(house.starts()) == 1
    _end(house, won)


def test_a_stopped_mgpu_that_is_deciding_delays_others_for_a_while_and_is_named(house: CudaHouse) -> None:
    stopped = house.run()
    _stop_while_deciding(house, stopped)
    started = time.monotonic()
    other = house.run(env=house.tuned({"mgpu.launch.store._PLANNING_S": 1.0}))
    other.until("another mgpu is just deciding: waiting for it")
    line = other.until("note: waited 1 s")
    other.until("ready after")
    assert time.monotonic() - started < 15
    pid = stopped.pid
    assert line == (
        f"  note: waited 1 s for another mgpu (pid {pid}, which is stopped: `kill -CONT {pid}` lets it go on): "
        "going on without it"
    )
    os.kill(pid, signal.SIGCONT)
    stopped.until("ready after")
    _end(house, stopped, other)


def _stop_while_deciding(house: CudaHouse, one: Started) -> None:
    """Its lock says who has it."""
    lock = house.state / "launches" / "planning"
    wait_for(lambda: lock.exists() and lock.read_text() == f"{one.pid}\n", "it never decided")
    os.kill(one.pid, signal.SIGSTOP)
    assert not house.starts()


def test_waiting_for_another_that_decides_ends_at_once_when_asked_to(house: CudaHouse) -> None:
    """Ctrl-C while it waits for its turn."""
    stopped = house.run()
    _stop_while_deciding(house, stopped)
    other = house.run()
    other.until("waiting for it")
    started = time.monotonic()
    assert other.end(signal.SIGINT) == 130
    assert time.monotonic() - started < 5
    os.kill(stopped.pid, signal.SIGCONT)
    stopped.until("ready after")
    _end(house, stopped)


def test_a_detached_one_counts_too(house: CudaHouse) -> None:
    house.has(8, 8)
    house.detach("--name", "first")
    second = house.detach("--name", "second")
    assert "GPU 1" in second.stderr
    assert _cards(house) == [uuid_of(0), uuid_of(1)]
    assert house.call("run", house.model, "--offload", "never").returncode == 5
    assert house.call("stop", "first").returncode == 0
    third = house.detach("--name", "third")
    assert "on GPU 0" in third.stderr
    assert house.call("stop", "--all").returncode == 0
    house.assert_clean()


def test_replicas_leave_room_for_each_other(house: CudaHouse) -> None:
    """Replicas on both cards, then a single one beside them."""
    house.close_gate("weights")
    many = house.run("--users", "8", "--name", "many", env={"MGPU_PROXY": "none"})
    house.started(2)
    assert sorted(_cards(house)) == [uuid_of(0), uuid_of(1)]
    told = json.loads(house.call("plan", house.model, "--json").stdout)["rig"]["gpus"]
    assert all(gpu["free_bytes"] < 23 * GIB - 5 * GIB for gpu in told)
    single = house.run()
    house.started(3)
    ports = [after(start["argv"], "--port") for start in house.starts()]
    assert len(set(ports)) == 3
    house.open_gate("weights")
    for one in (many, single):
        one.until("ready after")
    _end(house, many, single)


def test_a_port_lost_to_somebody_who_has_gone_since_is_a_port_lost() -> None:
    """Whether it is free by the time we look says nothing: the runtime has said why it ended."""
    fact = read_line("0.00.1 E srv  start: couldn't bind HTTP server socket, hostname: 127.0.0.1, port: 8080")
    assert isinstance(fact, Cause)
    assert fact.port_taken


def test_who_removes_a_lock_holds_it(tmp_path: Path) -> None:
    """Else one that is just beginning could take it in between, and hold what is not there any more."""
    path = tmp_path / "lock"
    with unheld(path) as ours:
        assert ours
        assert Lock.try_take(path) is None
        path.unlink()
    lock = Lock.try_take(path)
    assert lock is not None
    with unheld(path) as ours:
        assert not ours
    lock.release()
    assert not is_held(path)
