"""Out of memory, for real: FAKE cards with less than their driver says, and the plans that follow."""

from __future__ import annotations

import re
import shlex
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

import pytest

from conftest import Mgpu
from cuda_house import CudaHouse, after, uuid_of
from exllama_machine import write_clone
from exllama_models import exl_model
from fakenvml.machine import Machine, rtx_3090
from tiny_llama import write_tiny

FAKE_VLLM: Final = Path(__file__).parent / "fake_vllm.py"

DIED: Final = r"mgpu: llama-server exited with status 1 before it was ready: out of memory on CUDA0 \(asked for [^)]+\)"


@pytest.fixture
def house(tmp_path: Path, python_path: str, fake_nvml: Path, header: Callable[[str], Path]) -> Iterator[CudaHouse]:
    """One card of 24 GiB."""
    house = CudaHouse(tmp_path, python_path, fake_nvml, header)
    house.has(24)
    yield house
    house.close()


def _anew(said: str) -> list[str]:
    """What was said of each further plan."""
    return re.findall(r"^  planned anew (.*)$", said, re.MULTILINE)


def _ctx(house: CudaHouse) -> list[str]:
    return [after(start["argv"], "--ctx-size") for start in house.starts()]


def _n_layers(house: CudaHouse) -> list[int]:
    return [int(after(start["argv"], "--n-gpu-layers")) for start in house.starts()]


def test_a_smaller_context_where_none_was_asked_for(house: CudaHouse) -> None:
    house.hide(0, 24 - 0.36 - 5.7)  # 5.7 GiB are there; the plan is for 5.9
    done = house.call("run", house.model, "--prompt", "Hello?")
    assert done.returncode == 0, done.stderr
    assert "plain: Hello?" in done.stdout
    assert _ctx(house) == ["8192", "4096"]
    assert re.search(rf"^{DIED}$", done.stderr, re.MULTILINE), done.stderr
    assert _anew(done.stderr) == ["(try 2 of 3): context 4096 instead of 8192, as no --ctx was given"]
    assert re.search(r"note: GPU 0: planned with 5\.\d of 23\.6 GiB, as it ran out of memory with more", done.stderr)
    assert "|" not in done.stderr  # its last words are for failures
    house.assert_clean()


def test_another_card_that_is_as_good_comes_before_a_smaller_context(house: CudaHouse) -> None:
    house.has(24, 24)
    house.hide(0, 19)
    done = house.call("run", house.model, "--prompt", "Hello?")
    assert done.returncode == 0, done.stderr
    assert _anew(done.stderr) == ["(try 2 of 3): on GPU 1 instead of GPU 0"]
    assert [start["uuids"] for start in house.starts()] == [[uuid_of(0)], [uuid_of(1)]]
    assert _ctx(house) == ["8192", "8192"]


def test_a_context_that_was_asked_for_stays_and_layers_go_to_the_cpu(house: CudaHouse) -> None:
    house.hide(0, 19)
    done = house.call("run", house.model, "--ctx", "8192", "--offload", "allow", "--prompt", "Hello?")
    assert done.returncode == 0, done.stderr
    assert set(_ctx(house)) == {"8192"}
    layers = _n_layers(house)
    assert layers == sorted(layers, reverse=True)
    assert layers[-1] < layers[0]
    assert _anew(done.stderr)[0] == "(try 2 of 3): with the CPU's help"


def test_a_context_that_was_asked_for_goes_over_two_cards_that_have_the_room(house: CudaHouse) -> None:
    house.has(7, 6)
    house.hide(0, 2)
    done = house.call("run", house.model, "--ctx", "8192", "--prompt", "Hello?")
    assert done.returncode == 0, done.stderr
    assert _anew(done.stderr) == ["(try 2 of 3): over GPU 1+0 instead of GPU 0 alone"], done.stderr
    assert house.starts()[-1]["uuids"] == [uuid_of(1), uuid_of(0)]
    assert set(_ctx(house)) == {"8192"}


def test_what_was_asked_for_and_forbidden_leaves_nothing_else(house: CudaHouse) -> None:
    house.hide(0, 19)
    done = house.call("run", house.model, "--ctx", "8192", "--offload", "never")
    assert done.returncode == 7
    assert len(house.starts()) == 1
    assert _anew(done.stderr) == []
    assert re.search(r"^  no other plan will do: does not fit: needs 5\.\d GiB on GPU 0", done.stderr, re.MULTILINE)
    *_, cause, advice, report = done.stderr.splitlines()
    assert re.fullmatch(DIED, cause)
    assert advice.strip().startswith("use a smaller --ctx")
    assert report.strip().startswith("report, ready to paste into an issue: ")
    house.assert_clean()


def test_never_more_than_three_plans(house: CudaHouse) -> None:
    house.hide(0, 23.6)  # there is nothing at all
    done = house.call("run", house.model)
    assert done.returncode == 7
    assert len(house.starts()) == 3
    assert [words[:13] for words in _anew(done.stderr)] == ["(try 2 of 3):", "(try 3 of 3):"]
    assert "no other plan" not in done.stderr
    assert len(re.findall(DIED, done.stderr)) == 3
    assert len(list((house.state / "reports").iterdir())) == 1
    house.assert_clean()


def test_a_forced_plan_is_not_made_anew(house: CudaHouse) -> None:
    """Whoever forces a plan that does not fit wants that one."""
    house.has(5)
    done = house.call("run", house.model, "--offload", "never", "--force")
    assert done.returncode == 7, done.stderr
    assert len(house.starts()) == 1
    assert _anew(done.stderr) == []
    assert "  --force: not planned anew\n" in done.stderr


def test_what_was_pinned_for_the_runtime_stays(house: CudaHouse) -> None:
    house.hide(0, 18)
    done = house.call("run", house.model, "--offload", "allow", "--prompt", "Hello?", "--", "-c", "8192")
    assert {after(start["argv"], "-c") for start in house.starts()} == {"8192"}
    assert "--ctx was given" not in done.stderr
    assert "with the CPU's help" in done.stderr
    layers = house.call("run", house.model, "--prompt", "Hello?", "--", "-ngl", "33", "-c", "8192")
    assert layers.returncode == 7
    assert after(house.starts()[-1]["argv"], "-ngl") == "33"


def test_a_runtime_that_wants_more_than_was_planned_gets_a_smaller_plan(house: CudaHouse) -> None:
    house.has(8)
    house.wants(0, 2)
    done = house.call("run", house.model, "--prompt", "Hello?")
    assert len(house.starts()) >= 2
    assert int(_ctx(house)[1]) < 8192 or _n_layers(house)[1] < 33
    assert done.returncode in {0, 7}


def test_another_program_took_it_meanwhile(house: CudaHouse) -> None:
    """What is free is looked at again: the plan is for what is left."""
    house.has(24, 24)
    house.close_gate("weights")
    running = house.run()
    house.started(1)
    house.hold(0, 20)
    house.open_gate("weights")
    house.started(2)
    running.until("ready after")
    assert house.starts()[1]["uuids"] == [uuid_of(1)]
    assert "on GPU 1 (RTX 3090) 5.9 of 23.6 GiB" in running.said
    assert running.end(signal.SIGTERM) == 130
    house.assert_clean()


def test_the_promise_of_the_first_plan_is_given_up_for_the_second(house: CudaHouse) -> None:
    house.has(24, 24)
    house.hide(0, 19)
    running = house.run("--name", "first")
    running.until("ready after")
    (card,) = house.launch()["cards"]
    assert (card["gpu"], card["taken"]) == (1, card["planned"])
    assert house.launch()["ctx"] == 8192
    running.end(signal.SIGTERM)


def test_detached_it_is_told_on_the_terminal(house: CudaHouse) -> None:
    house.has(24, 24)
    house.hide(0, 19)
    done = house.call("run", house.model, "--detach", "--name", "chat")
    assert done.returncode == 0, done.stderr
    assert _anew(done.stderr) == ["(try 2 of 3): on GPU 1 instead of GPU 0"]
    assert "`mgpu stop chat` stops it" in done.stderr
    launch = house.launch()
    assert (launch["state"], launch["restarts"]) == ("ready", 0)
    assert Path(launch["log"]).exists()
    assert house.call("stop").returncode == 0
    house.assert_clean()


def test_detached_and_in_vain_it_ends_as_in_the_foreground(house: CudaHouse) -> None:
    house.hide(0, 23.6)
    done = house.call("run", house.model, "--detach")
    assert done.returncode == 7
    assert len(house.starts()) == 3
    assert house.launches() == []
    house.assert_clean()


def test_one_replica_that_finds_too_little_makes_all_smaller(house: CudaHouse) -> None:
    house.has(8, 8)
    house.hide(1, 8 - 0.36 - 5.9)
    env = {"MGPU_PROXY": "none"}
    running = house.run("--users", "2", "--offload", "never", env=env)
    running.until("planned anew")
    running.until("ready after")
    assert "llama-server on GPU 1" in running.said
    assert running.end(signal.SIGTERM) == 130
    house.assert_clean()


def test_while_it_serves_it_is_a_failure_like_any_other(house: CudaHouse) -> None:
    """Memory that runs out later is no reason to start anew unasked."""
    running = house.run("--restart", "no")
    running.until("ready after")
    log = Path(house.launch()["log"])
    with log.open("a") as out:
        out.write("alloc_buffer: allocating 512.00 MiB on device 0: cudaMalloc failed: out of memory\n")
    house.kill_runtime(signal.SIGKILL)
    assert running.end() == 7
    assert "planned anew" not in running.said
    house.assert_clean()


class TestOtherRuntimes:
    """Their own words, through their fakes."""

    @pytest.fixture
    def cards(self, fake_nvml: Path, tmp_path: Path) -> dict[str, str]:
        config = tmp_path / "machine.toml"
        config.write_text(Machine(rtx_3090(0), rtx_3090(1)).toml(), encoding="utf-8")
        return {"LD_LIBRARY_PATH": str(fake_nvml), "FAKE_NVML_CONFIG": str(config)}

    def test_vllm(self, mgpu: Mgpu, tmp_path: Path, cards: dict[str, str]) -> None:
        program = tmp_path / "venv" / "bin" / "vllm"
        program.parent.mkdir(parents=True)
        site = tmp_path / "venv" / "lib" / "python3.11" / "site-packages"
        (site / "vllm-0.32.0.dist-info").mkdir(parents=True)
        words = f"{shlex.quote(sys.executable)} {shlex.quote(str(FAKE_VLLM))}"
        program.write_text(f'#!/bin/sh\nexec {words} "$@"\n')
        program.chmod(0o755)
        env = cards | {"MGPU_VLLM": str(program), "FAKE_VLLM": "oom"}
        done = mgpu("run", str(write_tiny(tmp_path / "tiny")), "--runtime", "vllm", env=env)
        assert done.returncode == 7
        assert 1 <= len(_anew(done.stderr)) <= 2, done.stderr
        assert done.stderr.splitlines()[-3].startswith("mgpu: vllm exited with status 1 before it was ready: out of")
        assert "Traceback" not in done.stderr

    def test_tabbyapi(self, mgpu: Mgpu, tmp_path: Path, cards: dict[str, str]) -> None:
        env = cards | {
            "MGPU_TABBYAPI": str(write_clone(tmp_path / "tabby", "main")),
            "FAKE_TABBY_FAULT": "insufficient",
            "FAKE_TABBY_RECORD": str(tmp_path / "record.json"),
        }
        done = mgpu("run", str(exl_model(tmp_path, "exl3", "8B")), env=env)
        assert done.returncode == 7
        assert 1 <= len(_anew(done.stderr)) <= 2, done.stderr
        assert done.stderr.splitlines()[-3].startswith(
            "mgpu: TabbyAPI exited with status 1 before it was ready: the cards"
        )
        assert "context 4096 instead of 8192, as no --ctx was given" in _anew(done.stderr)[-1]
