"""`mgpu bench` on a machine with two RTX 3090: a FAKE NVML, and a FAKE llama-server with a clock that we set."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from conftest import Mgpu, write_program
from fake_build import SERVER, build_program
from fakenvml.machine import Machine, rtx_3090
from mgpu.inspect.source import read_model
from mgpu_profiles.store import Store
from safetensors_writer import small_config, small_tensors, write_model

Header = Callable[[str], Path]
Env = dict[str, str]

SMALL = "Llama-3.1-8B-Instruct-Q4_K_M"
LARGE = "Llama-3.3-70B-Instruct-Q4_K_M"

RTX_3060: dict[str, Any] = {
    "name": "NVIDIA GeForce RTX 3060",
    "mem_total": 12 << 30,
    "mem_bus_width": 192,
    "mem_clock_max_mhz": 7501,
    "power_limit_mw": 170_000,
}

#: Started with a model, it writes down its arguments and becomes the fake server, with the speed and the ways to fail
#: of a placement on so many cards.
_STARTED = """\
seen = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
with open({record!r}, "a") as out:
    print(json.dumps({{"argv": words, "cards": seen, "pid": os.getpid()}}), file=out)
behaviour = {behaviour!r}.get(str(len(seen)), {{}})
more = [word for name, value in behaviour.items() for word in ("--" + name, value)]
port = words[words.index("--port") + 1]
os.execv(sys.executable, [sys.executable, {fake!r}, "--port", port, *more])
"""


class Bench:
    """The machine: `env` to run on it, `started` for what has been launched."""

    def __init__(self, folder: Path, nvml: Path) -> None:
        self.record = folder / "started.jsonl"
        self._folder = folder
        self._nvml = nvml

    def env(self, behaviour: dict[str, dict[str, str]], cards: tuple[Any, ...] = ()) -> Env:
        """`behaviour`: options of the fake server, by the number of cards it is shown."""
        cards = cards or (rtx_3090(0), rtx_3090(1))
        config = self._folder / "machine.toml"
        config.write_text(Machine(*cards).toml(), encoding="utf-8")
        names = [f"  CUDA{i}: {card['name']} (24124 MiB, 23800 MiB free)" for i, card in enumerate(cards)]
        started = _STARTED.format(record=str(self.record), behaviour=behaviour, fake=SERVER)
        code = build_program(started, devices="\n".join(names), split_modes="none,layer,row")
        server = write_program(self._folder / "llama-server", code)
        return {"LD_LIBRARY_PATH": str(self._nvml), "FAKE_NVML_CONFIG": str(config), "MGPU_LLAMA_SERVER": str(server)}

    @property
    def started(self) -> list[dict[str, Any]]:
        if not self.record.exists():
            return []
        return [json.loads(line) for line in self.record.read_text().splitlines()]

    def check_nothing_runs(self) -> None:
        for launch in self.started:
            assert not psutil.pid_exists(launch["pid"])


@pytest.fixture
def machine(fake_nvml: Path, tmp_path: Path) -> Bench:
    return Bench(tmp_path, fake_nvml)


def store() -> Store:
    return Store(Path(os.environ["XDG_CONFIG_HOME"]) / "mgpu")


BOTH_WORK = {"1": {"tok-s": "50,112,111,130,95"}, "2": {"tok-s": "50,106"}}


class TestTable:
    def test_the_plan_and_the_needless_split(self, mgpu: Mgpu, header: Header, machine: Bench) -> None:
        done = mgpu("bench", str(header(SMALL)), "--ctx", "8192", env=machine.env(BOTH_WORK))
        assert done.returncode == 0, done.stderr
        lines = {line.split()[0]: line for line in done.stdout.splitlines() if line.startswith("  ")}
        assert "112.0" in lines["plan"]  # the median, and the warm-up is none of them
        assert "95.0" in lines["plan,"]
        assert "plan, 4096 deep" in lines["plan,"]
        assert "106.0" in lines["needless"]
        assert "GPU 0+1 (17+16)" in lines["needless"] or "GPU 0+1 (16+17)" in lines["needless"]
        assert "a needless split over GPU 0+1 costs 5.4% here: 106.0 instead of 112.0 tok/s" in done.stdout
        assert "from 111.0 to 130.0 tok/s, so something else was running" in " ".join(done.stdout.split())
        assert all(len(line) <= 80 for line in done.stdout.splitlines())
        assert "1/2 plan, GPU 0: 112.0 tok/s; 95.0 tok/s" in done.stderr
        machine.check_nothing_runs()

    def test_as_json(self, mgpu: Mgpu, header: Header, machine: Bench) -> None:
        asked = ("--ctx", "8192", "--json", "--n-gen", "64")
        done = mgpu("bench", str(header(SMALL)), *asked, env=machine.env(BOTH_WORK))
        told = json.loads(done.stdout)
        plan, deep, split = told["cases"]
        assert (deep["case"], deep["gpus"], deep["depth"], deep["tok_s"]) == ("plan", [0], 4096, 95.0)
        assert deep["predicted"]["expected"] < plan["predicted"]["expected"]
        assert (plan["tok_s"], plan["samples"], plan["depth"]) == (112.0, [112.0, 111.0, 130.0], 512 + 32)
        assert plan["prompt_tok_s"] == 224.0  # the fake reads twice as fast as it writes
        assert plan["error"] == pytest.approx(plan["predicted"]["expected"] / 112.0 - 1)
        assert plan["predicted"]["measured"] is False
        assert split["needless"] is True
        assert split["mode"] == "pipeline"
        assert sum(split["counts"]) == 33
        assert told["needless_splits"] == [{"gpus": [0, 1], "cost": pytest.approx(1 - 106 / 112)}]
        assert told["saved"].endswith("/rigs/this-machine.toml")
        assert told["interrupted"] is False

    def test_launched_as_run_launches_it(self, mgpu: Mgpu, header: Header, machine: Bench) -> None:
        env = machine.env(BOTH_WORK)
        assert mgpu("bench", str(header(SMALL)), "--ctx", "2048", "--kv-type", "q8_0", env=env).returncode == 0
        alone, split = (launch["argv"] for launch in machine.started)
        dry = mgpu("run", str(header(SMALL)), "--ctx", "2048", "--kv-type", "q8_0", "--dry-run", env=env).stdout
        assert " ".join(alone[: alone.index("--port")]) in dry
        assert split[split.index("--split-mode") + 1] == "layer"
        assert [len(launch["cards"]) for launch in machine.started] == [1, 2]

    def test_the_prompt_is_of_random_tokens_of_the_vocabulary(self, mgpu: Mgpu, header: Header, machine: Bench) -> None:
        """Llama 3 has 128,256 of them."""
        mgpu("bench", str(header(SMALL)), "--quick", "--n-prompt", "300", env=machine.env(BOTH_WORK))
        log = next((Path(os.environ["XDG_STATE_HOME"]) / "mgpu" / "logs").glob("bench-*.log")).read_text()
        said = [line for line in log.splitlines() if line.startswith("timed: ")]
        assert len(said) == 2 * (1 + 3)  # a length that was asked for is the only one
        assert len(set(said)) > 2  # no two prompts are alike
        for line in said:
            words = line.split()
            assert words[1] == "300"
            assert 0 <= int(words[4]) < 5000
            assert 123000 < int(words[6]) < 128256

    def test_two_kinds_of_cards(self, mgpu: Mgpu, header: Header, machine: Bench) -> None:
        env = machine.env(BOTH_WORK, cards=(rtx_3090(0), rtx_3090(1, **RTX_3060)))
        told = json.loads(mgpu("bench", str(header(SMALL)), "--json", env=env).stdout)
        assert [(case["case"], case["gpus"]) for case in told["cases"]] == [
            ("plan", [0]),
            ("needless split", [0, 1]),
            ("one card", [1]),
        ]

    def test_what_needs_both(self, mgpu: Mgpu, header: Header, machine: Bench) -> None:
        told = json.loads(mgpu("bench", str(header(LARGE)), "--json", env=machine.env(BOTH_WORK)).stdout)
        assert told["cases"][0]["gpus"] == [0, 1]
        assert told["needless_splits"] == []


class TestKept:
    def test_used_by_the_next_plan(self, mgpu: Mgpu, header: Header, machine: Bench) -> None:
        env = machine.env(BOTH_WORK)
        done = mgpu("bench", str(header(SMALL)), env=env)
        assert "kept in rig this-machine, now the default" in done.stderr
        plan, split = store().load("this-machine").measured
        assert (plan.tok_s, plan.gpus, plan.counts, plan.depth) == (112.0, (0,), (33,), 576)
        model = read_model(str(header(SMALL)))
        assert (plan.model, plan.quantization) == (model.name, model.quantization)
        assert (plan.architecture, plan.weights_bytes) == (model.architecture, model.weights_bytes)
        assert (plan.runtime, plan.version) == ("llama.cpp", "0.6.0-dev (build 11434)")
        assert plan.predicted is not None
        assert split.gpus == (0, 1)
        assert mgpu("rig", "check", env=env).returncode == 0
        told = json.loads(mgpu("plan", str(header(SMALL)), "--json", env=env).stdout)
        assert told["rig"]["name"] == "this-machine"
        assert told["plan"]["tok_s"]["expected"] == 112.0
        assert "measured" in mgpu("plan", str(header(SMALL)), env=env).stdout

    def test_a_long_context_is_measured_as_deep_as_it_is_planned(
        self, mgpu: Mgpu, header: Header, machine: Bench
    ) -> None:
        env = machine.env(BOTH_WORK)
        mgpu("bench", str(header(SMALL)), "--ctx", "16k", env=env)
        assert [one.depth for one in store().load("this-machine").measured] == [576, 8192, 576]
        told = json.loads(mgpu("plan", str(header(SMALL)), "--ctx", "16k", "--json", env=env).stdout)
        assert told["plan"]["tok_s"]["expected"] == 95.0

    def test_measured_again(self, mgpu: Mgpu, header: Header, machine: Bench) -> None:
        mgpu("bench", str(header(SMALL)), "--ctx", "8192", env=machine.env(BOTH_WORK))
        now = machine.env({"1": {"tok-s": "99"}, "2": {"tok-s": "98"}})
        mgpu("bench", str(header(SMALL)), "--quick", "--n-prompt", "100", env=now)
        mgpu("bench", str(header(SMALL)), "--quick", "--kv-type", "q8_0", env=machine.env(BOTH_WORK))
        figures = store().load("this-machine").measured
        assert [(one.kv_type, one.depth, one.tok_s) for one in figures] == [
            ("f16", 4096, 95.0),
            ("f16", 164, 99.0),
            ("f16", 164, 98.0),
            ("q8_0", 576, 112.0),
            ("q8_0", 576, 106.0),
        ]

    def test_in_the_profile_that_was_named(self, mgpu: Mgpu, header: Header, machine: Bench) -> None:
        env = machine.env(BOTH_WORK)
        mgpu("rig", "save", "home", env=env)
        mgpu("bench", str(header(SMALL)), "--rig", "home", "--quick", env=env)
        assert len(store().load("home").measured) == 2
        assert store().default() is None

    @pytest.mark.parametrize("rig", ["4x3090", "h200"])
    def test_not_in_another_machines(self, mgpu: Mgpu, header: Header, machine: Bench, rig: str) -> None:
        done = mgpu("bench", str(header(SMALL)), "--rig", rig, env=machine.env(BOTH_WORK))
        assert done.returncode == 8
        assert f"rig {rig!r} is not this machine" in done.stderr
        assert not machine.started

    def test_nowhere(self, mgpu: Mgpu, header: Header, machine: Bench) -> None:
        done = mgpu("bench", str(header(SMALL)), "--no-save", env=machine.env(BOTH_WORK))
        assert done.returncode == 0
        assert [profile for profile in store().names() if profile.origin == "user"] == []

    def test_a_profile_that_cannot_be_read_is_left_alone(self, mgpu: Mgpu, header: Header, machine: Bench) -> None:
        path = store().root / "rigs" / "this-machine.toml"
        path.parent.mkdir(parents=True)
        path.write_text("schema = 2\n")
        done = mgpu("bench", str(header(SMALL)), env=machine.env(BOTH_WORK))
        assert done.returncode == 8
        assert path.read_text() == "schema = 2\n"
        assert not machine.started

    def test_the_table_is_shown_although_it_cannot_be_kept(
        self, mgpu: Mgpu, header: Header, machine: Bench, tmp_path: Path
    ) -> None:
        (tmp_path / "file").touch()
        env = machine.env(BOTH_WORK) | {"XDG_CONFIG_HOME": str(tmp_path / "file")}
        done = mgpu("bench", str(header(SMALL)), "--quick", env=env)
        assert done.returncode == 8
        assert "112.0" in done.stdout
        assert "cannot write" in done.stderr


class TestFailing:
    @pytest.mark.parametrize(
        ("behaviour", "cause"),
        [
            ({"fault": "out-of-memory"}, "out of memory"),
            ({"fault": "die-while-answering"}, "was killed by SIGKILL"),
            ({"fault": "no-answer-at-all"}, "HTTP 500: no answer"),
            ({"tok-s": "0"}, "without timings"),
            ({"tok-s": "-1"}, "generated 3 of"),
        ],
    )
    def test_one_placement(
        self, mgpu: Mgpu, header: Header, machine: Bench, behaviour: dict[str, str], cause: str
    ) -> None:
        env = machine.env({"1": {"tok-s": "112"}, "2": behaviour})
        done = mgpu("bench", str(header(SMALL)), env=env)
        assert done.returncode == 0, done.stderr
        assert "failed" in done.stdout
        assert cause in " ".join(done.stdout.split())
        assert "112.0" in done.stdout
        assert [one.gpus for one in store().load("this-machine").measured] == [(0,)]
        machine.check_nothing_runs()

    def test_half_way(self, mgpu: Mgpu, header: Header, machine: Bench) -> None:
        """The plan is timed with a short prompt, then dies over a long one."""
        env = machine.env({"1": {"tok-s": "50,112,112,112,-1"}, "2": {"tok-s": "106"}})
        done = mgpu("bench", str(header(SMALL)), "--ctx", "8192", "--json", env=env)
        assert done.returncode == 0
        assert [(case["depth"], case["tok_s"]) for case in json.loads(done.stdout)["cases"]] == [
            (576, 112.0),
            (4096, None),
            (576, 106.0),
        ]
        assert [one.depth for one in store().load("this-machine").measured] == [576, 576]

    def test_the_first_of_two(self, mgpu: Mgpu, header: Header, machine: Bench) -> None:
        env = machine.env({"1": {"fault": "exit-while-loading"}, "2": {"tok-s": "106"}})
        done = mgpu("bench", str(header(SMALL)), env=env)
        assert done.returncode == 0
        assert [one.gpus for one in store().load("this-machine").measured] == [(0, 1)]

    @pytest.mark.parametrize("as_json", [False, True])
    def test_all(self, mgpu: Mgpu, header: Header, machine: Bench, as_json: bool) -> None:
        fault = {"fault": "out-of-memory"}
        arguments = ("--json",) if as_json else ()
        done = mgpu("bench", str(header(SMALL)), *arguments, env=machine.env({"1": fault, "2": fault}))
        assert done.returncode == 7
        assert "none of the placements could be measured" in done.stderr
        assert "Traceback" not in done.stderr
        assert [profile for profile in store().names() if profile.origin == "user"] == []
        if as_json:
            assert [case["tok_s"] for case in json.loads(done.stdout)["cases"]] == [None, None]


class TestRefused:
    """One line, and nothing is started."""

    @pytest.mark.parametrize(
        ("arguments", "code", "words"),
        [
            pytest.param(("--n-prompt", "9000"), 2, "a context of 8192 does not hold the 9128 tokens", id="too many"),
            pytest.param(("--ctx", "256", "--n-gen", "500"), 2, "a context of 256", id="too small"),
            pytest.param(("--save", "x", "--no-save"), 2, "contradict", id="contradiction"),
            pytest.param(("--save", "a/b"), 8, "not a profile name: 'a/b'", id="no name"),
            pytest.param(("--gpus", "7"), 2, "no GPU '7'", id="no such card"),
            pytest.param(("--runtime", "vllm"), 6, "reads no gguf", id="vllm reads none"),
            pytest.param(("--llama-server", "/nowhere"), 6, "/nowhere", id="no such server"),
            pytest.param(("--", "-ts", "1,1"), 2, "-ts", id="arguments for the runtime"),
        ],
    )
    def test_arguments(
        self, mgpu: Mgpu, header: Header, machine: Bench, arguments: tuple[str, ...], code: int, words: str
    ) -> None:
        done = mgpu("bench", str(header(SMALL)), *arguments, env=machine.env(BOTH_WORK))
        assert done.returncode == code, done.stderr
        assert words in done.stderr
        assert len([line for line in done.stderr.splitlines() if line.startswith("mgpu: ")]) == 1
        assert not machine.started

    def test_a_url(self, mgpu: Mgpu, machine: Bench) -> None:
        done = mgpu("bench", "https://example.org/m.gguf", env=machine.env(BOTH_WORK))
        assert done.returncode == 2
        assert "not on this machine" in done.stderr

    @pytest.mark.parametrize("arguments", [(), ("--runtime", "vllm")])
    def test_another_runtimes_model(
        self, mgpu: Mgpu, machine: Bench, tmp_path: Path, arguments: tuple[str, ...]
    ) -> None:
        folder = write_model(tmp_path / "hf", small_config(), small_tensors())
        done = mgpu("bench", str(folder), *arguments, env=machine.env(BOTH_WORK))
        assert done.returncode == 2
        assert f"bench measures llama.cpp, and {folder} is for vllm" in done.stderr

    def test_what_fits_nowhere(self, mgpu: Mgpu, header: Header, machine: Bench) -> None:
        done = mgpu("bench", str(header(LARGE)), "--gpus", "0", "--offload", "never", env=machine.env(BOTH_WORK))
        assert done.returncode == 5

    def test_a_short_context_gets_a_shorter_prompt(self, mgpu: Mgpu, header: Header, machine: Bench) -> None:
        told = mgpu("bench", str(header(SMALL)), "--ctx", "256", "--json", env=machine.env(BOTH_WORK))
        assert json.loads(told.stdout)["n_prompt"] == 128


Start = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def start(python_path: str) -> Iterator[Start]:
    """`start(*args, env=…)`: `mgpu` in the background; whatever the test does, nothing of it is left."""
    started: list[subprocess.Popen[str]] = []

    def call(*args: str, env: Env) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-m", "mgpu", *args],
            env={**os.environ, "PYTHONPATH": python_path, **env},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        started.append(process)
        return process

    yield call
    for process in started:
        if process.poll() is None:
            process.kill()
        process.communicate()


def until(condition: Callable[[], Any]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def log_text() -> str:
    return "".join(
        path.read_text() for path in (Path(os.environ["XDG_STATE_HOME"]) / "mgpu" / "logs").glob("bench-*.log")
    )


class TestInterrupted:
    @pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP], ids=lambda number: number.name)
    @pytest.mark.parametrize("as_json", [False, True])
    def test_what_was_measured_stays(
        self, start: Start, header: Header, machine: Bench, number: signal.Signals, as_json: bool
    ) -> None:
        """The second placement gives one repetition, then never answers again."""
        stalls = {"tok-s": "50,106,1", "fault": "stall-while-answering"}
        env = machine.env({"1": {"tok-s": "112"}, "2": stalls})
        process = start("bench", str(header(SMALL)), *(["--json"] if as_json else []), env=env)
        until(lambda: "answer: stalling" in log_text())
        process.send_signal(number)
        out, err = process.communicate(timeout=20)
        assert process.returncode == 130, err
        assert [(one.gpus, one.tok_s) for one in store().load("this-machine").measured] == [
            ((0,), 112.0),
            ((0, 1), 106.0),
        ]
        machine.check_nothing_runs()
        if as_json:
            told = json.loads(out)
            assert told["interrupted"] is True
            assert [case["samples"] for case in told["cases"]] == [[112.0] * 3, [106.0]]
        else:
            assert "106.0" in out
            assert "stopping" in err

    def test_before_anything_was(self, start: Start, header: Header, machine: Bench) -> None:
        env = machine.env({"1": {"fault": "idle-for-ever"}})
        process = start("bench", str(header(SMALL)), env=env)
        until(lambda: machine.started)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=20)
        assert process.returncode == 130, err
        assert out == ""
        assert [profile for profile in store().names() if profile.origin == "user"] == []
        machine.check_nothing_runs()

    def test_killed(self, start: Start, header: Header, machine: Bench) -> None:
        process = start("bench", str(header(SMALL)), env=machine.env({"1": {"fault": "stall-while-answering"}}))
        until(lambda: "answer: stalling" in log_text())
        process.kill()
        process.wait()
        until(lambda: not psutil.pid_exists(machine.started[0]["pid"]))
