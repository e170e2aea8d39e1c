"""`run --detach`, `ps`, `stop` and `logs` as a person types them: what is said, which exit code, and what is left."""

from __future__ import annotations

import os
import pty
import re
import signal
import stat
import sys
import termios
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Final

import pytest
from msgspec.structs import replace
from rich.console import Console

from launching import House, Started, wait_for
from mgpu.launch.logs import KEPT_LOGS
from mgpu.launch.records import Record
from mgpu.report.launches import launches_screen
from mgpu.units import MIB

NAME: Final = "qwen2.5-0.5b-instruct-q4_k_m"
KEY: Final = "sk-fedcba9876543210"
_SOON: Final = {"mgpu.decide.restarts.PAUSES_S": [1.2]}


def _lines(text: str) -> list[str]:
    """What is said, without what differs from one launch to the next."""
    text = re.sub(r"\d+\.\d s", "N s", text)
    text = re.sub(r"logs/\S+", "logs/LOG", text)
    return [re.sub(r"127\.0\.0\.1:\d+", "ADDRESS", line) for line in text.splitlines()]


def test_it_returns_once_it_is_ready_and_says_what_the_foreground_says(house: House) -> None:
    detached = house.detach()
    assert detached.stdout == ""
    foreground = house.run()
    foreground.until("Ctrl-C stops it")
    said = [line.replace("Ctrl-C", f"`mgpu stop {NAME}`") for line in _lines(foreground.said)]
    assert _lines(detached.stderr) == said
    assert house.call("stop", "--all").returncode == 0
    assert foreground.end() == 130
    house.assert_clean()


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        pytest.param(("--ctx", "nonsense"), 2, "'nonsense' is neither a number of tokens", id="usage"),
        pytest.param(("--split", "pipeline"), 3, "mgpu: ", id="a needless split"),
        pytest.param(("--ctx", "999999999"), 5, "mgpu: ", id="does not fit"),
        pytest.param(("--rig", "8x3090"), 8, "mgpu: ", id="another rig"),
        pytest.param(("--llama-server", "/nowhere/llama-server"), 6, "/nowhere/llama-server", id="no runtime"),
    ],
)
def test_exit_codes_pass_through(house: House, arguments: tuple[str, ...], code: int, words: str) -> None:
    done = house.call("run", house.model, "--detach", *arguments)
    assert (done.returncode, done.stdout) == (code, ""), done.stderr
    assert words in done.stderr
    assert "Traceback" not in done.stderr
    foreground = house.call("run", house.model, *arguments)
    assert (foreground.returncode, foreground.stderr) == (code, done.stderr)
    house.assert_clean()


def test_a_bad_model_is_exit_4(house: House) -> None:
    path = house.folder / "bad.gguf"
    path.write_bytes(b"GGUF" + bytes(20))
    assert house.call("run", str(path), "--detach").returncode == 4
    house.assert_clean()


@pytest.mark.parametrize("fault", ["exit-at-once", "exit-while-loading", "abort-at-first-token"])
def test_a_runtime_that_does_not_start_is_exit_7_and_leaves_its_log(house: House, fault: str) -> None:
    done = house.call("run", house.model, "--detach", env={"FAKE_SERVER": f"--fault {fault}"})
    assert done.returncode == 7
    assert "mgpu: llama-server " in done.stderr
    assert "Traceback" not in done.stderr
    assert house.launches() == []  # whoever typed it has seen it
    house.assert_clean()
    assert list((house.state / "logs").glob("*.log"))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP], ids=lambda one: one.name)
@pytest.mark.parametrize("when", ["deciding", "loading"])
def test_stopped_before_it_is_ready(house: House, number: signal.Signals, when: str) -> None:
    typed = _not_ready(house, when)
    assert typed.end(number) == 130
    assert "mgpu: stopped before it was ready" in typed.said
    house.slow.unlink(missing_ok=True)
    house.assert_clean()
    assert house.launches() == []


def test_the_typed_one_killed_while_it_loads_leaves_a_launch_to_stop(house: House) -> None:
    """Nobody has told the one that stays, and it is what was asked for."""
    typed = _not_ready(house, "loading", "--load-s 1")
    assert typed.end(signal.SIGKILL) == -signal.SIGKILL
    wait_for(lambda: house.launch()["state"] == "ready", "never ready")
    assert house.call("stop").returncode == 0
    house.assert_clean()


@pytest.mark.parametrize("when", ["deciding", "loading"])
def test_the_one_that_stays_killed_before_it_is_ready_is_said(house: House, when: str) -> None:
    typed = _not_ready(house, when)
    (staying,) = [pid for pid, line in house.processes().items() if "-P -m mgpu" in line]
    os.kill(staying, signal.SIGKILL)
    assert typed.end() == 7
    assert "mgpu: the launch was killed by SIGKILL (out of memory?) before it was ready" in typed.said
    house.slow.unlink(missing_ok=True)
    house.call("stop", "--all")
    house.assert_clean()


def _not_ready(house: House, when: str, server: str = "--load-s 60") -> Started:
    """A detached launch on its way."""
    if when == "deciding":
        house.slow.touch()
    typed = house.start("run", house.model, "--detach", env={"FAKE_SERVER": server})
    if when == "deciding":
        wait_for(lambda: any("--list-devices" in line for line in house.processes().values()), "never asked")
    else:
        wait_for(house.runtimes, "never started")
    return typed


def _ps(house: House, columns: int) -> str:
    """`mgpu ps` in a terminal of this width."""
    pid, terminal = _in_a_terminal(house, "ps", columns=columns)
    shown = "".join(_read(terminal))
    os.close(terminal)
    assert os.waitpid(pid, 0)[1] == 0
    return re.sub(r"\x1b\[[0-9;]*m", "", shown).replace("\r\n", "\n")


def test_ps_says_where_and_how_much(house: House) -> None:
    assert house.call("ps").stdout == "nothing is running (`mgpu run MODEL --detach` starts something)\n"
    house.detach("--name", "chat")
    wide = _ps(house, 200)
    (row,) = [line for line in wide.splitlines() if line.startswith("chat ")]
    assert re.match(r"chat +ready +llama\.cpp +[01]\.0 of 1\.0 GiB +\S+ +(-|0) of 1 +\d+ s *$", row), wide
    assert "GPU 0 (RTX 3090)" in wide
    assert house.launch()["endpoint"] in wide
    narrow = _ps(house, 80)
    assert max(map(len, narrow.splitlines())) <= 80
    assert re.match(r"chat +ready ", next(line for line in narrow.splitlines() if line.startswith("chat ")))
    piped = house.call("ps").stdout
    assert _ageless(piped) == _ageless(narrow)  # also where it is read by another program


def _ageless(shown: str) -> str:
    return re.sub(r"\d+ s *$", "N s", shown, flags=re.MULTILINE)


def test_ps_of_one_on_the_cpu_takes_no_part_of_what_is_resident() -> None:
    """It has libraries in it, and pages of the file that were only copied."""
    record = Record(name="chat", state="ready", ram_planned=273 * MIB, ram_held=395 * MIB)
    for one, words in (
        (record, ["395 MiB resident", "273 MiB planned"]),
        (replace(record, ram_held=0), ["273 MiB planned"]),
    ):
        table, _ = launches_screen([("chat", True, one)], time.time())
        out = Console(width=200)
        with out.capture() as captured:
            out.print(table)
        shown = captured.get()
        assert [word for word in ("395 MiB resident", "273 MiB planned") if word in shown] == words
        assert "MiB of" not in shown


def test_ps_for_scripts(house: House) -> None:
    house.detach("--name", "chat")
    launch = house.launch()
    assert (launch["name"], launch["alive"], launch["state"], launch["detached"]) == ("chat", True, "ready", True)
    assert (launch["path"], launch["placement"], launch["ctx"], launch["users"]) == (house.model, "single", 8192, 1)
    assert launch["runtime_pids"] == house.runtimes()
    assert {launch["pid"], *launch["runtime_pids"]} == set(house.processes())
    assert launch["endpoint"] == f"http://127.0.0.1:{launch['ports'][0]}/v1"
    assert [card["gpu"] for card in launch["cards"]] == [0]
    assert abs(launch["ready"] - time.time()) < 60


def test_stop_without_a_name_takes_no_guess(house: House) -> None:
    none = house.call("stop")
    assert (none.returncode, none.stderr.splitlines()[0]) == (2, "mgpu: nothing is running")
    house.detach("--name", "a")
    house.detach("--name", "b")
    two = house.call("stop")
    assert (two.returncode, two.stderr) == (2, "mgpu: there are 2 launches: say which\n      a, b\n")
    wrong = house.call("stop", "a", "c")
    assert (wrong.returncode, wrong.stderr) == (2, "mgpu: there is no launch 'c'\n      launches: a, b\n")
    assert len(house.launches()) == 2
    assert house.call("stop", "a", "--all").returncode == 2
    assert house.call("stop", "a").stderr == "stopped a\n"
    assert house.call("stop").stderr == "stopped b\n"
    house.assert_clean()


def test_stop_several_and_all(house: House) -> None:
    for name in "abcd":
        house.detach("--name", name)
    assert house.call("stop", "b", "a", "b").stderr.splitlines() == ["stopped b", "stopped a"]
    assert house.call("stop", "--all").stderr.splitlines() == ["stopped c", "stopped d"]
    assert house.call("stop", "--all").stderr == "nothing is running\n"
    house.assert_clean()


def test_a_runtime_deaf_to_sigterm_is_ended_all_the_same(house: House) -> None:
    house.detach(env={"FAKE_SERVER": "--fault ignore-sigterm"})
    assert house.call("stop").returncode == 0
    house.assert_clean()


def test_one_in_a_terminal_is_shown_and_stopped_like_any_other(house: House) -> None:
    pid, terminal = _in_a_terminal(house, "run", house.model, "--name", "here")
    said = _until(terminal, "Ctrl-C stops it")
    first, second = [line for line in _ps(house, 80).splitlines() if "terminal" in line or "ready" in line]
    assert re.match(r"here +ready ", first)
    assert re.match(r" +in a terminal ", second)
    assert house.call("stop", "here").stderr == "stopped here\n"
    said += "".join(_read(terminal))
    os.close(terminal)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 130, said
    house.assert_clean()


@pytest.mark.parametrize(("env", "words"), [({}, ""), ({"NOTIFY_SOCKET": "/nowhere"}, "as a unit")])
def test_one_in_no_terminal_is_not_said_to_be_in_one(house: House, env: dict[str, str], words: str) -> None:
    """nohup, a service manager."""
    running = house.run("--name", "here", env=env)
    running.until("Ctrl-C stops it")
    shown = _ps(house, 80)
    assert "in a terminal" not in shown
    assert ("as a unit" in shown) is bool(words)
    assert running.end(signal.SIGTERM) == 130


def test_a_failed_launch_is_told_until_it_is_cleared_away(house: House) -> None:
    house.detach("--name", "chat")
    os.kill(house.runtimes()[0], signal.SIGKILL)
    wait_for(lambda: house.launch()["state"] == "failed", "never failed")
    launch = house.launch()
    end = launch["end"]
    assert (launch["alive"], end["exit_code"]) == (False, 7)
    assert end["message"] == "llama-server was killed by SIGKILL (out of memory?) while it was serving"
    assert Path(end["report"]).read_text().startswith(f"# {end['message']}\n")
    shown = house.call("ps").stdout
    assert f"chat: {end['message']}" in shown
    assert f"report: {end['report']}" in shown
    assert "server is listening" in house.call("logs", "chat").stdout
    assert house.call("stop").stderr == "cleared away chat\n"
    assert house.launches() == []
    house.assert_clean()


def test_a_failed_one_does_not_stand_in_the_way(house: House) -> None:
    """Its name is free, and `stop` means the one that lives."""
    house.detach("--name", "chat")
    house.detach("--name", "other")
    os.kill(house.launches()[0]["runtime_pids"][0], signal.SIGKILL)
    wait_for(lambda: [one["alive"] for one in house.launches()] == [False, True], "never failed")
    assert house.call("stop").stderr == "stopped other\n"
    house.detach("--name", "chat")
    assert house.launch()["alive"]


def test_logs_show_the_end_of_it(house: House) -> None:
    house.detach("--name", "chat")
    whole = house.call("logs").stdout.splitlines()
    assert whole[-1] == "server is listening"
    assert house.call("logs", "chat", "-n", "1").stdout == "server is listening\n"
    assert house.call("logs", "chat", "-n", "0").returncode == 2
    assert house.call("logs", "nobody").stderr.splitlines()[0] == "mgpu: there is no launch 'nobody'"


def test_logs_follow_until_the_launch_ends(house: House) -> None:
    house.detach("--name", "chat")
    following = house.start("logs", "chat", "-f")
    following.until("server is listening")
    with Path(house.launch()["log"]).open("a") as log:
        log.write("a new line\n")
    following.until("a new line")
    assert house.call("stop").returncode == 0
    assert following.end() == 0
    assert "cleaning up before exit..." in following.said
    house.assert_clean()


def test_more_lines_than_64_kib(house: House) -> None:
    house.detach("--name", "chat")
    with Path(house.launch()["log"]).open("a") as log:
        log.writelines(f"a line that is about as long as those of a runtime: {number}\n" for number in range(6000))
    lines = house.call("logs", "-n", "5000").stdout.splitlines()
    assert lines[-5000:] == [f"a line that is about as long as those of a runtime: {n}" for n in range(1000, 6000)]


def test_logs_follow_to_the_log_of_the_next_try(house: House) -> None:
    house.detach("--name", "chat", "--restart", "on-failure", env=house.tuned(_SOON))
    following = house.start("logs", "chat", "-f")
    following.until("server is listening")
    first = house.launch()["log"]
    os.kill(house.runtimes()[0], signal.SIGKILL)
    wait_for(lambda: house.launch()["restarts"] == 1 and house.launch()["state"] == "ready", house.launch)
    second = house.launch()["log"]
    assert first != second
    with Path(second).open("a") as log:
        log.write("a line of the second try\n")
    following.until("a line of the second try")
    assert following.said.count("server is listening") == 2
    assert house.call("stop").returncode == 0
    assert following.end() == 0
    house.assert_clean()


def test_the_logs_of_replicas_are_all_kept_and_shown(house: House) -> None:
    house.detach("--name", "chat", "--users", "8", env={"MGPU_PROXY": "none"})
    launch = house.launch()
    assert launch["placement"] == "replicas"
    held = {str(Path(f"/proc/{pid}/fd/1").readlink()) for pid in house.runtimes()}
    assert len(held) == 2
    assert held <= set(launch["logs"])
    assert launch["log"] == launch["logs"][0]
    for number in range(KEPT_LOGS + 5):
        (house.state / "logs" / f"newer-{number}.log").touch()
    house.detach("--name", "other")
    assert all(Path(path).exists() for path in held)
    shown = house.call("logs", "chat", "-n", "3").stdout
    for path in held:
        assert f"==> {Path(path).name} <==\n" in shown
    assert shown.count("server is listening") == 2


def test_a_log_that_is_gone_is_said(house: House) -> None:
    house.detach("--name", "chat")
    launch = house.launch()
    Path(launch["log"]).unlink()
    some = house.call("logs")
    assert (some.returncode, some.stderr) == (0, f"mgpu: chat: its log is gone: {launch['log']}\n")
    Path(launch["own_log"]).unlink()
    for more in ((), ("-f",)):
        none = house.call("logs", *more)
        assert none.returncode == 7
        assert none.stderr.startswith("mgpu: chat: its log is gone: ")


def test_ctrl_c_ends_the_following_and_nothing_else(house: House) -> None:
    house.detach("--name", "chat")
    following = house.start("logs", "chat", "-f")
    following.until("server is listening")
    assert following.end(signal.SIGINT) == 130
    assert "Traceback" not in following.said
    assert house.launch()["alive"]


def test_a_name_in_use_is_refused_where_it_was_given_and_numbered_where_not(house: House) -> None:
    longest = "n" * 64
    house.detach("--name", longest)
    refused = house.call("run", house.model, "--detach", "--name", longest)
    assert refused.returncode == 2
    assert f"mgpu: there is a launch called {longest}\n" in refused.stderr
    house.detach()
    assert f"`mgpu stop {NAME}-2` stops it" in house.detach().stderr
    assert [launch["name"] for launch in house.launches()] == [longest, NAME, f"{NAME}-2"]
    assert house.call("stop", "--all").returncode == 0
    house.assert_clean()


@pytest.mark.parametrize("name", ["", "a b", "../x", "-x", "ä", "a" * 65, "x/y"])
def test_names_that_are_none(house: House, name: str) -> None:
    done = house.call("run", house.model, f"--name={name}", "--detach")
    assert done.returncode == 2
    assert f"mgpu: --name {name!r} is not a name\n      a letter or digit, then " in done.stderr


def _in_a_terminal(house: House, *args: str, columns: int = 80) -> tuple[int, int]:
    """mgpu in a terminal of its own: its pid, and the other end."""
    pid, terminal = pty.fork()
    if pid == 0:
        termios.tcsetwinsize(1, (24, columns))
        os.execve(sys.executable, [sys.executable, "-m", "mgpu", *args], house.env)
    return pid, terminal


def _read(terminal: int) -> Iterator[str]:
    with suppress(OSError):  # EIO: nobody has it open any more
        while piece := os.read(terminal, 4096):
            yield piece.decode("utf-8", "replace")


def _until(terminal: int, words: str) -> str:
    said = ""
    for piece in _read(terminal):
        said += piece
        if words in said:
            return said
    raise AssertionError(said)


def test_it_survives_its_terminal(house: House) -> None:
    pid, terminal = _in_a_terminal(house, "run", house.model, "--detach", "--name", "chat")
    said = "".join(_read(terminal))
    assert os.waitpid(pid, 0)[1] == 0, said
    os.close(terminal)
    launch = house.launch()
    assert launch["alive"]
    assert os.getsid(launch["pid"]) == launch["pid"]
    for process in house.processes():
        opened = {str(link.readlink()) for link in Path(f"/proc/{process}/fd").iterdir()}
        assert not [name for name in opened if name.startswith("/dev/pts/")]
    os.kill(launch["pid"], signal.SIGWINCH)
    assert house.launch()["alive"]
    assert house.call("stop").returncode == 0
    house.assert_clean()


def test_a_foreground_launch_goes_with_its_terminal(house: House) -> None:
    pid, terminal = _in_a_terminal(house, "run", house.model)
    _until(terminal, "Ctrl-C stops it")
    os.close(terminal)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 130
    house.assert_clean()


def test_the_key_is_in_no_command_line_of_what_stays(house: House) -> None:
    house.detach("--api-key", KEY)
    house.detach(f"--api-key={KEY}")
    launches = house.launches()
    assert len(launches) == 2
    for pid in house.processes():
        assert KEY.encode() not in Path(f"/proc/{pid}/cmdline").read_bytes()
    assert KEY not in house.call("ps", "--json").stdout
    for path in (house.state / "launches").iterdir():
        assert KEY not in path.read_text()
    assert house.call("stop", "--all").returncode == 0


def test_the_key_of_a_failed_one_is_not_in_its_report(house: House) -> None:
    house.detach("--api-key", KEY, "--name", "chat")
    with Path(house.launch()["log"]).open("a") as log:
        log.write(f"request with Authorization: Bearer {KEY}\n")
    os.kill(house.runtimes()[0], signal.SIGKILL)
    wait_for(lambda: house.launch()["state"] == "failed", "never failed")
    report = Path(house.launch()["end"]["report"])
    assert KEY not in report.read_text()
    assert stat.S_IMODE(report.stat().st_mode) == 0o600
    assert "server is listening" in report.read_text()


def test_a_state_directory_that_is_not_there_is_made_for_us_alone(house: House) -> None:
    assert not house.state.exists()
    house.detach()
    assert {stat.S_IMODE(path.stat().st_mode) for path in (house.state, *house.state.iterdir()) if path.is_dir()} == {
        0o700
    }
    assert {stat.S_IMODE(path.stat().st_mode) for path in house.state.rglob("*") if path.is_file()} == {0o600}


def test_started_again_when_it_dies_and_stopped_while_it_waits(house: House) -> None:
    settings = {"mgpu.decide.restarts.PAUSES_S": [0.1, 60.0]}
    done = house.call(
        "run", house.model, "--detach", "--restart", "on-failure", "--name", "chat", env=house.tuned(settings)
    )
    assert done.returncode == 0, done.stderr
    first = house.runtimes()[0]
    os.kill(first, signal.SIGKILL)
    wait_for(lambda: house.launch()["restarts"] == 1 and house.launch()["state"] == "ready", house.launch)
    assert first not in house.runtimes()
    assert "started again in 0 s (1 of 7 in a row)" in house.call("logs", "chat", "-n", "200").stdout
    os.kill(house.runtimes()[0], signal.SIGKILL)
    wait_for(lambda: house.launch()["state"] == "waiting", house.launch)
    assert house.launch()["restarts"] == 1  # not yet
    waits = "chat: waits to be started again; last: llama-server was killed by SIGKILL"
    assert waits in house.call("ps").stdout
    assert house.call("stop").stderr == "stopped chat\n"
    house.assert_clean()
