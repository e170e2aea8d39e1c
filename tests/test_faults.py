"""What can go wrong around a launch, with real processes: each test is a row of docs/faults.md.

The runtime is a FAKE llama-server, and the driver a FAKE NVML; those marked `runtime` take the real llama-server.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

import pytest

from fakenvml.machine import Machine, rtx_3090
from launching import FAST, House, Started, ask, descriptors, free_port, listening, wait_for

_KILLED_SERVING: Final = "llama-server was killed by SIGKILL (out of memory?) while it was serving"
_OURSELVES: Final = "mgpu itself was killed, or the machine went down; llama.cpp was ended, too"

GPU_IS_LOST: Final = 15
MISMATCH: Final = 18


def _serving(house: House, *more: str, **env: str) -> Started:
    """A launch in the foreground that is ready, its looks a tenth of a second apart."""
    running = house.run(*more, env=house.tuned(FAST, **env))
    running.until("Ctrl-C stops it")
    return running


# --- killed ----------------------------------------------------------------------------------------------------------


def test_mgpu_killed_while_serving(house: House) -> None:
    running = _serving(house)
    assert running.end(signal.SIGKILL) == -signal.SIGKILL
    wait_for(lambda: not house.runtimes(), "the runtime lives on")
    assert house.launches() == []
    house.assert_clean()


def test_mgpu_killed_while_serving_detached(house: House) -> None:
    house.detach("--name", "chat")
    os.kill(house.launch()["pid"], signal.SIGKILL)
    wait_for(lambda: not house.runtimes(), "the runtime lives on")
    launch = house.launch()
    assert (launch["alive"], launch["state"], launch["end"]["message"]) == (False, "failed", _OURSELVES)
    assert f"chat: {_OURSELVES}" in house.call("ps").stdout
    assert house.call("stop").stderr == "cleared away chat\n"
    house.assert_clean()


def test_mgpu_killed_with_a_runtime_deaf_to_sigterm(house: House) -> None:
    """The kernel's SIGTERM does nothing: whoever lists, launches or stops next ends it."""
    house.detach("--name", "chat", env={"FAKE_SERVER": "--fault ignore-sigterm"})
    (runtime,) = house.runtimes()
    os.kill(house.launch()["pid"], signal.SIGKILL)
    time.sleep(0.3)
    assert house.runtimes() == [runtime]
    assert house.launch()["state"] == "failed"
    assert house.runtimes() == []
    assert house.call("stop").returncode == 0
    house.assert_clean()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL], ids=lambda one: one.name)
def test_mgpu_ended_when_its_runtime_has_children(house: House, number: signal.Signals) -> None:
    """One in the runtime's group, one that left it, both deaf to SIGTERM: they outlive the runtime, and are known."""
    running = _serving_with_children(house)
    assert running.end(number) == (130 if number == signal.SIGTERM else -number)
    if number == signal.SIGKILL:
        wait_for(lambda: len(house.processes()) == 2, "the runtime lives on")
        assert house.launches() == []
    house.assert_clean()


def test_the_runtime_killed_when_it_has_children(house: House) -> None:
    running = _serving_with_children(house)
    os.kill(house.launch()["runtime_pids"][0], signal.SIGKILL)
    assert running.end() == 7
    house.assert_clean()


def _serving_with_children(house: House) -> Started:
    """Ready, and looked at once: on a port of its own, as children of a try that has failed are not known."""
    running = _serving(house, "--port", str(free_port()), FAKE_SERVER="--fault grandchild --marker here")
    (path,) = (house.state / "launches").glob("*.json")
    wait_for(lambda: len(json.loads(path.read_text())["members"]) == 2, "its children are not known")
    assert len([line for line in house.processes().values() if line.endswith("--marker here")]) == 3
    return running


def test_the_runtime_killed_while_serving(house: House) -> None:
    running = _serving(house)
    os.kill(house.runtimes()[0], signal.SIGKILL)
    assert running.end() == 7
    assert f"mgpu: {_KILLED_SERVING}\n" in running.said
    report = Path(running.said.partition("ready to paste into an issue: ")[2].splitlines()[0])
    assert "server is listening" in report.read_text()
    house.assert_clean()


def test_the_runtime_killed_while_serving_detached(house: House) -> None:
    house.detach("--name", "chat")
    os.kill(house.runtimes()[0], signal.SIGKILL)
    wait_for(lambda: not house.launch()["alive"], "lives on")
    assert house.launch()["end"]["message"] == _KILLED_SERVING
    assert house.call("stop").stderr == "cleared away chat\n"
    house.assert_clean()


def test_both_killed(house: House) -> None:
    house.detach("--name", "chat")
    launch = house.launch()
    for pid in (launch["pid"], *launch["runtime_pids"]):
        os.kill(pid, signal.SIGKILL)
    wait_for(lambda: not house.processes(), "lives on")
    assert house.launch()["end"]["message"] == _OURSELVES
    house.detach("--name", "chat")  # its name is free
    assert house.launch()["alive"]
    assert house.call("stop").returncode == 0
    house.assert_clean()


def test_mgpu_killed_while_loading(house: House) -> None:
    running = house.run(env={"FAKE_SERVER": "--load-s 60"})
    wait_for(house.runtimes, "never started")
    assert house.launch()["state"] == "loading"
    running.end(signal.SIGKILL)
    wait_for(lambda: not house.runtimes(), "the runtime lives on")
    assert house.launches() == []
    house.assert_clean()


def test_the_runtime_killed_while_loading(house: House) -> None:
    running = house.run(env={"FAKE_SERVER": "--load-s 60"})
    wait_for(house.runtimes, "never started")
    os.kill(house.runtimes()[0], signal.SIGKILL)
    assert running.end() == 7
    assert "mgpu: llama-server was killed by SIGKILL (out of memory?) before it was ready\n" in running.said
    house.assert_clean()


def test_mgpu_killed_while_deciding(house: House) -> None:
    """The program that was asked for its devices goes with it, and others may decide at once."""
    house.slow.touch()
    running = house.run()
    wait_for(lambda: any("--list-devices" in line for line in house.processes().values()), "never asked")
    running.end(signal.SIGKILL)
    wait_for(lambda: not house.processes(), house.processes)
    house.slow.unlink()
    started = time.monotonic()
    assert "another mgpu is just deciding" not in house.detach().stderr
    assert time.monotonic() - started < 10
    assert house.call("stop").returncode == 0
    house.assert_clean()


def test_killed_while_the_record_is_written(house: House) -> None:
    """Half a draft, and a record that is no JSON: neither is an error to anybody, and both go."""
    launches = house.state / "launches"
    launches.mkdir(parents=True, mode=0o700)
    (launches / ".chat.4194301").write_text('{"name": "ch')
    (launches / "chat.json").write_text('{"name": "chat", "cards": [')
    (launches / "other.lock").write_text("")
    assert house.launches() == []
    house.assert_clean()


# --- stopped and slow ------------------------------------------------------------------------------------------------


def test_mgpu_stopped_and_continued(house: House) -> None:
    """It is asleep, its runtime is not: clients, `ps` and other launches do not notice."""
    running = _serving(house, "--name", "chat")
    running.process.send_signal(signal.SIGSTOP)
    launch = house.launch()
    assert (launch["alive"], ask(launch["endpoint"])) == (True, 200)
    house.detach("--name", "second")
    assert house.call("stop", "second").returncode == 0
    running.process.send_signal(signal.SIGCONT)
    time.sleep(0.5)
    assert running.process.poll() is None
    running.process.send_signal(signal.SIGSTOP)
    assert house.call("stop", "chat").stderr == "stopped chat\n"
    assert running.end() == 130
    assert "not well" not in running.said
    house.assert_clean()


def test_mgpu_stopped_while_deciding(house: House) -> None:
    """Others wait for it for a while, say so, and then decide without it."""
    house.slow.touch()
    first = house.run()
    wait_for(lambda: any("--list-devices" in line for line in house.processes().values()), "never asked")
    first.process.send_signal(signal.SIGSTOP)
    house.slow.unlink()
    second = house.detach("--name", "second", env=house.tuned({"mgpu.launch.store._PLANNING_S": 0.5}))
    assert "  another mgpu is just deciding: waiting for it\n" in second.stderr
    first.process.send_signal(signal.SIGCONT)
    first.until("Ctrl-C stops it")
    assert first.end(signal.SIGINT) == 130
    assert house.call("stop").returncode == 0
    house.assert_clean()


def test_the_runtime_stopped_and_continued(house: House) -> None:
    running = _serving(house, "--name", "chat")
    (runtime,) = house.runtimes()
    os.kill(runtime, signal.SIGSTOP)
    assert re.search(r"\d not well: llama-server: ", running.until("not well: "))
    wait_for(lambda: house.launch()["state"] == "unwell", house.launch)
    assert "not well: llama-server: " in house.call("ps").stdout
    os.kill(runtime, signal.SIGCONT)
    assert re.search(r"well again after \d+ s$", running.until("well again"))
    wait_for(lambda: house.launch()["state"] == "ready", house.launch)
    os.kill(runtime, signal.SIGSTOP)
    assert running.end(signal.SIGTERM) == 130  # a stopped process hears no SIGTERM
    house.assert_clean()


@pytest.mark.parametrize(("mood", "how"), [("hang", "no answer within "), ("sick", "answers HTTP 500")])
def test_health_that_hangs_or_fails(house: House, mood: str, how: str) -> None:
    running = _serving(house, "--name", "chat")
    house.mood.write_text(mood)
    assert running.until("not well: ").partition(" not well: llama-server: ")[2].startswith(how)
    wait_for(lambda: house.launch()["state"] == "unwell", house.launch)
    assert running.process.poll() is None
    house.mood.unlink()
    running.until("well again after ")
    wait_for(lambda: house.launch()["state"] == "ready", house.launch)
    house.mood.write_text(mood)
    assert house.call("stop").returncode == 0
    house.assert_clean()


def test_health_that_is_slow(house: House) -> None:
    """An answer that comes is an answer."""
    running = _serving(house)
    house.mood.write_text("slow")
    before = descriptors(running.pid)
    time.sleep(3)
    assert "not well" not in running.said
    assert descriptors(running.pid) <= before + 4  # of the look under way
    assert running.end(signal.SIGTERM) == 130
    house.assert_clean()


def test_health_that_hangs_ends_a_launch_that_may_start_again(house: House) -> None:
    settings = {**FAST, "mgpu.launch.keeper._STUCK_S": 0.5, "mgpu.decide.restarts.PAUSES_S": [0.1]}
    house.detach("--name", "chat", "--restart", "on-failure", env=house.tuned(settings))
    first = house.launch()["runtime_pids"]
    house.mood.write_text("hang")
    wait_for(lambda: house.launch()["restarts"] == 1, house.launch)
    house.mood.unlink()
    wait_for(lambda: house.launch()["state"] == "ready", house.launch)
    assert house.launch()["runtime_pids"] != first
    assert "mgpu: not well for " in house.call("logs", "-n", "200").stdout
    assert house.call("stop").returncode == 0
    house.assert_clean()


# --- ports -----------------------------------------------------------------------------------------------------------


def test_the_port_stolen_between_check_and_bind(house: House) -> None:
    """Without --port it takes the next one."""
    flag = house.folder / "steal"
    running = house.run(env={"FAKE_SERVER": f"--steal {shlex.quote(str(flag))}"})
    wait_for(flag.exists, "never started")
    (port,) = house.launch()["ports"]
    with socket.create_server(("127.0.0.1", port)):
        flag.unlink()
        wait_for(lambda: flag.exists() or running.process.poll() is not None, running.said)
        flag.unlink()
        assert f":{port}/" not in running.until("ready after")
        assert house.launch()["ports"] != [port]
        assert running.end(signal.SIGINT) == 130
    house.assert_clean()


def test_the_port_that_was_asked_for_stolen(house: House) -> None:
    port = free_port()
    flag = house.folder / "steal"
    running = house.run("--port", str(port), env={"FAKE_SERVER": f"--steal {shlex.quote(str(flag))}"})
    wait_for(flag.exists, "never started")
    with socket.create_server(("127.0.0.1", port)):
        flag.unlink()
        assert running.end() == 7
    assert "mgpu: llama-server " in running.said
    assert str(port) in running.said
    house.assert_clean()


# --- the driver ------------------------------------------------------------------------------------------------------


def test_the_card_falls_off_the_bus(house: House) -> None:
    running = _serving(house)
    house.machine(Machine(rtx_3090(0, handle_error=GPU_IS_LOST), rtx_3090(1)))
    assert running.end() == 7
    assert "mgpu: GPU 0 (RTX 3090): " in running.said
    assert "Traceback" not in running.said
    house.assert_clean()


def test_another_card_falls_off_the_bus(house: House) -> None:
    """It is none of ours."""
    running = _serving(house)
    house.machine(Machine(rtx_3090(0), rtx_3090(1, handle_error=GPU_IS_LOST)))
    time.sleep(1)
    assert running.process.poll() is None
    assert running.said.endswith("Ctrl-C stops it\n")
    assert running.end(signal.SIGTERM) == 130


def test_the_driver_is_upgraded_meanwhile(house: House) -> None:
    """Its library does not match the module any more: nobody can look, and what runs runs on."""
    running = _serving(house, "--name", "chat")
    house.machine(Machine(rtx_3090(0), rtx_3090(1), init_error=MISMATCH))
    line = running.until("cannot see the cards any more: ")
    assert "NVIDIA" in line
    time.sleep(1)
    assert running.said.count("cannot see the cards") == 1
    launch = house.launch()
    assert (launch["state"], ask(launch["endpoint"])) == ("ready", 200)
    assert house.call("stop").returncode == 0
    house.assert_clean()


# --- time ------------------------------------------------------------------------------------------------------------

_YEAR_S: Final = 365 * 86400.0


@pytest.mark.parametrize("years", [-9.0, 9.0])
def test_the_clock_jumps(house: House, years: float) -> None:
    clock = house.folder / "clock"
    clock.write_text("0")
    running = _serving(house, "--name", "chat", MGPU_CLOCK=str(clock))
    house.detach("--name", "failed")
    os.kill(house.launches()[1]["runtime_pids"][0], signal.SIGKILL)
    wait_for(lambda: not house.launches()[1]["alive"], "lives on")
    clock.write_text(str(years * _YEAR_S))
    time.sleep(0.5)
    assert "not well" not in running.said
    there = house.tuned(MGPU_CLOCK=str(clock))
    (chat,) = [launch for launch in house.launches(there) if launch["name"] == "chat"]
    assert (chat["alive"], chat["state"], ask(chat["endpoint"])) == (True, "ready", 200)
    assert house.call("ps", env=there).returncode == 0
    house.detach("--name", "second", env=there)
    assert house.call("stop", "--all", env=there).returncode == 0
    assert running.end() == 130
    house.assert_clean()


def test_files_from_the_future(house: House) -> None:
    """Of many logs and reports the newest are kept; those of this launch stay, whatever the clock said before."""
    for folder, ending, kept in (("logs", "log", 20), ("reports", "md", 10)):
        (house.state / folder).mkdir(parents=True, mode=0o700)
        for number in range(kept):
            path = house.state / folder / f"old-{number}.{ending}"
            path.touch()
            os.utime(path, (time.time() + _YEAR_S, time.time() + _YEAR_S))
    house.detach("--name", "chat")
    os.kill(house.runtimes()[0], signal.SIGKILL)
    wait_for(lambda: not house.launch()["alive"], "lives on")
    launch = house.launch()
    for path in (launch["log"], launch["own_log"], launch["end"]["report"]):
        assert Path(path).read_text()


def test_a_reboot(house: House) -> None:
    """The records of another boot, with pids that mean others now."""
    house.detach("--name", "chat")
    launch = house.launch()
    record = house.state / "launches" / "chat.json"
    bystander = subprocess.Popen(["sleep", "60"], start_new_session=True)
    try:
        told = json.loads(record.read_text())
        assert house.call("stop").returncode == 0
        start = told["runtimes"][0]["start"]
        other_boot = "00000000-0000-0000-0000-000000000000" + start[36:]
        told["runtimes"] = [{"pid": bystander.pid, "start": other_boot}]
        record.write_text(json.dumps(told))
        (house.state / "launches" / "chat.lock").write_text(f"{bystander.pid} {other_boot}\n")
        assert house.launch()["end"]["message"] == _OURSELVES
        assert bystander.poll() is None
        assert house.call("stop").stderr == "cleared away chat\n"
        assert bystander.poll() is None
        assert launch["pid"] not in house.processes()
    finally:
        bystander.kill()
        bystander.wait()
    house.assert_clean()


# --- disks -----------------------------------------------------------------------------------------------------------

#: Mounts, then holds its namespace open. Without `mount` there is none to be had.
_HOLD: Final = "{mounts} && echo ready && exec sleep 600"


@pytest.fixture
def namespace() -> Iterator[Callable[[str], tuple[str, ...]]]:
    """`namespace(mounts)`: what starts a program where these are mounted, or a skip that says why not."""
    holders: list[subprocess.Popen[str]] = []

    def make(mounts: str) -> tuple[str, ...]:
        if sys.platform != "linux" or not all(map(shutil.which, ("unshare", "nsenter", "mount"))):
            pytest.skip("no unshare, nsenter or mount here")
        unshare = ("unshare", "--map-root-user", "--mount", "sh", "-c", _HOLD.format(mounts=mounts))
        holder = subprocess.Popen(unshare, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        holders.append(holder)
        assert holder.stdout is not None
        first = holder.stdout.readline().strip()
        if first != "ready":
            pytest.skip(f"no mounts in a namespace here: {first or 'unshare failed'}")
        own = f"--wd={Path.cwd()}"
        return ("nsenter", "--target", str(holder.pid), "--user", "--mount", "--preserve-credentials", own)

    yield make
    for holder in holders:
        holder.kill()
        holder.wait()
        if holder.stdout is not None:
            holder.stdout.close()


Namespace = Callable[[str], tuple[str, ...]]


def _tmpfs(house: House, size: str = "256k") -> str:
    """Where the state is, a disk of this size."""
    house.state.mkdir(parents=True, mode=0o700)
    return f"mount -t tmpfs -o mode=0700,size={size} tmpfs {shlex.quote(str(house.state))}"


def _fill(house: House, inside: tuple[str, ...]) -> None:
    path = shlex.quote(str(house.state / "ballast"))
    subprocess.run((*inside, "sh", "-c", f"cat /dev/zero > {path}"), stderr=subprocess.DEVNULL, check=False)


def test_the_disk_is_full_before(house: House, namespace: Namespace) -> None:
    """It cannot be kept, and is launched all the same."""
    inside = namespace(_tmpfs(house))
    _fill(house, inside)
    running = house.run("--name", "chat", "--port", str(free_port()), env=house.tuned(), inside=inside)
    running.until("Ctrl-C stops it")
    assert "No space left on device: `mgpu ps` may not show it as it is\n" in running.said
    listed = house.call("ps", inside=inside)
    assert listed.returncode == 0
    assert "chat" in listed.stdout
    assert "its record is" in listed.stdout
    assert running.end(signal.SIGTERM) == 130
    assert "Traceback" not in running.said
    wait_for(lambda: not house.processes(), "left")


def test_the_disk_is_full_and_it_is_stopped_by_its_name(house: House, namespace: Namespace) -> None:
    inside = namespace(_tmpfs(house))
    _fill(house, inside)
    running = house.run("--name", "chat", "--port", str(free_port()), env=house.tuned(), inside=inside)
    running.until("Ctrl-C stops it")
    assert house.call("stop", "chat", inside=inside).stderr == "stopped chat\n"
    assert running.end() == 130
    wait_for(lambda: not house.processes(), "left")


def test_the_disk_fills_up_while_serving(house: House, namespace: Namespace) -> None:
    """The record stays as it was; log and report are what they can be; how it ends is said."""
    inside = namespace(_tmpfs(house))
    running = house.run("--name", "chat", "--port", str(free_port()), env=house.tuned(), inside=inside)
    running.until("Ctrl-C stops it")
    _fill(house, inside)
    house.mood.write_text("sick")
    running.until("not well")
    running.until("cannot keep the launch in ")
    (launch,) = json.loads(house.call("ps", "--json", inside=inside).stdout)["launches"]
    assert (launch["state"], launch["alive"]) == ("ready", True)
    os.kill(house.runtimes()[0], signal.SIGKILL)
    assert running.end() == 7
    assert f"mgpu: {_KILLED_SERVING}\n" in running.said
    assert "Traceback" not in running.said
    assert json.loads(house.call("ps", "--json", inside=inside).stdout)["launches"] == []
    wait_for(lambda: not house.processes(), "left")


def test_the_disk_fills_up_under_a_detached_launch(house: House, namespace: Namespace) -> None:
    """Its own log is lost, and with it nothing else: it is started again, and stopped."""
    inside = namespace(_tmpfs(house))
    settings = {**FAST, "mgpu.decide.restarts.PAUSES_S": [0.1]}
    arguments = (
        "run",
        house.model,
        "--detach",
        "--name",
        "chat",
        "--restart",
        "on-failure",
        "--port",
        str(free_port()),
    )
    done = house.call(*arguments, env=house.tuned(settings), inside=inside)
    assert done.returncode == 0, done.stderr
    (first,) = house.runtimes()
    _fill(house, inside)
    os.kill(first, signal.SIGKILL)
    wait_for(lambda: house.runtimes() not in ([], [first]), lambda: str(house.processes()))
    time.sleep(0.5)
    assert house.call("stop", "chat", inside=inside).stderr == "stopped chat\n"
    wait_for(lambda: not house.processes(), "left")


def test_a_read_only_home(house: House, namespace: Namespace) -> None:
    """State and logs are kept among the temporary files, where `ps` finds them."""
    house.state.mkdir(parents=True, mode=0o700)
    state = shlex.quote(str(house.state))
    inside = namespace(f"mount -t tmpfs -o mode=0700,ro tmpfs {state}")
    running = house.run("--name", "chat", "--port", str(free_port()), env=house.tuned(), inside=inside)
    running.until("Ctrl-C stops it")
    assert (
        f"  note: cannot write to {house.state}: logs and launches are kept in {house.temporary}/mgpu-" in running.said
    )
    assert house.call("logs", inside=inside).stdout.splitlines()[-1] == "server is listening"
    assert house.call("stop", inside=inside).stderr == "stopped chat\n"
    assert running.end() == 130
    wait_for(lambda: not house.processes(), "left")


def test_nothing_can_be_written_anywhere(house: House, namespace: Namespace) -> None:
    """As in a container with a read-only file system: it serves, without a log."""
    places = "/tmp /var/tmp /dev/shm " + shlex.quote(str(house.folder))
    read_only = f"for at in {places}; do mount --bind $at $at && mount -o remount,ro,bind $at || exit 1; done; cd /proc"
    inside = namespace(read_only)
    running = Started(
        (
            *inside,
            "sh",
            "-c",
            'cd /proc; exec "$@"',
            "-",
            sys.executable,
            "-m",
            "mgpu",
            "run",
            house.model,
            "--port",
            str(free_port()),
        ),
        {**house.env, **house.tuned()},
    )
    house.keep(running)
    running.until("Ctrl-C stops it")
    assert "(Read-only file system), nor elsewhere: there is no log\n" in running.said
    assert running.end(signal.SIGTERM) == 130
    assert "Traceback" not in running.said
    listed = house.call("ps", inside=(*inside, "sh", "-c", 'cd /proc; exec "$@"', "-"))
    assert (listed.returncode, listed.stderr) == (0, "")
    house.assert_clean()


def test_a_log_of_months_is_shortened(house: House) -> None:
    """Only its end stays; who follows it, and who counts its requests, goes on where they were."""
    house.detach("--name", "chat", env=house.tuned())
    log = Path(house.launch()["log"])
    os.truncate(log, 64 << 20)
    with log.open("rb+") as file:
        file.seek(-(9 << 20), os.SEEK_END)
        lines = b"".join(b"line %d\n" % number for number in range(1 << 20))[: 9 << 20]
        file.write(lines[: -len(b"\na line of before\n")] + b"\na line of before\n")
    following = house.start("logs", "chat", "-f")
    following.until("a line of before")
    with log.open("a") as file:
        file.write("one too many\n")
    wait_for(lambda: log.stat().st_size < 10 << 20, "never shortened")
    wait_for(lambda: log.read_bytes().endswith(b"\na line of before\none too many\n"), "not all of its end is there")
    assert log.read_bytes().startswith(b"(what was here before has been removed: the log was longer than 64 MiB)\n")
    with log.open("a") as file:
        file.write("a line of now\n")
    following.until("a line of now")
    assert following.said.count("a line of before") == 1
    assert house.call("stop").returncode == 0
    assert following.end() == 0
    house.assert_clean()


# --- many ------------------------------------------------------------------------------------------------------------


def test_two_hundred_launches_and_stops(house: House) -> None:
    """Detached and in the foreground, stopped and killed, four at a time."""
    before, shared = listening(), set(os.listdir("/dev/shm"))  # noqa: PTH208 - names
    house.detach()  # its probes are kept from here on
    assert house.call("stop").returncode == 0
    flaws: list[str] = []

    def go(worker: int) -> None:
        for number in range(worker, 200, 4):
            try:
                _one(house, f"n{number}", number // 4 % 4)
            except AssertionError as error:
                flaws.append(f"{number}: {error}")

    workers = [threading.Thread(target=go, args=(worker,)) for worker in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not flaws, "\n".join(flaws)
    assert house.launches() == []
    house.assert_clean()
    # Whoever else began to listen meanwhile is somebody, and none of ours.
    assert [address for address, pid in listening().items() if address not in before and pid is None] == []
    assert set(os.listdir("/dev/shm")) - shared == set()  # noqa: PTH208 - names
    assert len(list((house.state / "logs").iterdir())) <= 20 + 8
    assert list(house.temporary.iterdir()) == []


def _one(house: House, name: str, way: int) -> None:
    """One launch and its end."""
    if way == 0:
        done = house.call("run", house.model, "--detach", "--name", name)
        assert done.returncode == 0, done.stderr
        assert house.call("stop", name).stderr == f"stopped {name}\n"
        return
    running = house.run("--name", name)
    running.until("ready after")
    number = (signal.SIGINT, signal.SIGTERM, signal.SIGKILL)[way - 1]
    assert running.end(number) == (-number if number == signal.SIGKILL else 130), running.said


# --- with the real llama-server --------------------------------------------------------------------------------------


@pytest.fixture
def real(house: House, real_gguf: Path, llama_server: str) -> House:
    """The house, with what is real: the model, the runtime, and no cards."""
    house.model = str(real_gguf)
    house.env["MGPU_LLAMA_SERVER"] = llama_server
    house.machine(Machine())
    return house


def _llama_servers(house: House) -> list[int]:
    return [pid for pid, line in house.processes().items() if "--port" in line and "mgpu run" not in line]


@pytest.mark.runtime
def test_the_real_one_killed_while_serving(real: House) -> None:
    real.detach("--name", "chat")
    (server,) = _llama_servers(real)
    os.kill(server, signal.SIGKILL)
    wait_for(lambda: not real.launch()["alive"], "lives on")
    assert real.launch()["end"]["message"] == _KILLED_SERVING
    assert real.call("stop").returncode == 0
    real.assert_clean()


@pytest.mark.runtime
def test_the_real_one_when_mgpu_is_killed(real: House) -> None:
    real.detach("--name", "chat")
    os.kill(real.launch()["pid"], signal.SIGKILL)
    wait_for(lambda: not _llama_servers(real), "lives on")
    assert real.launch()["end"]["message"] == _OURSELVES
    assert real.call("stop").returncode == 0
    real.assert_clean()


@pytest.mark.runtime
def test_the_real_one_stopped_and_continued(real: House) -> None:
    running = _serving(real)
    (server,) = _llama_servers(real)
    os.kill(server, signal.SIGSTOP)
    running.until("not well: llama-server: no answer within ")
    os.kill(server, signal.SIGCONT)
    running.until("well again after ")
    assert running.end(signal.SIGTERM) == 130
    real.assert_clean()


# --- the document ----------------------------------------------------------------------------------------------------


_FILES = ("faults", "detached", "watching", "out_of_memory", "two_at_once", "restart", "early_and_mute")


def test_every_fault_has_its_row() -> None:
    """And every row its test."""
    root = Path(__file__).parents[1]
    document = (root / "docs" / "faults.md").read_text(encoding="utf-8")
    named = set(re.findall(r"`(test_\w+)`", document))
    files = [root / "tests" / f"test_{name}.py" for name in _FILES]
    there = {
        file.name: set(re.findall(r"^def (test_\w+)", file.read_text(encoding="utf-8"), re.MULTILINE)) for file in files
    }
    assert named <= set().union(*there.values())
    assert there["test_faults.py"] - {"test_every_fault_has_its_row"} <= named
