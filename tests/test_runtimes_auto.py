"""`--runtime auto`: the best predicted plan among the runtimes that are here and read the format (`runtime-choice`)."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from conftest import Mgpu, write_program
from fakenvml.machine import Machine, rtx_3090
from headers import write_model
from mgpu.decide.runtime import Candidate, advice, beats, best, speed_of, told
from mgpu.plan import Forecast, Plan, Refusal, Speed
from planning import decide, verdict
from safetensors_writer import decoder, exl2, exl3, plain, read_config, stored
from safetensors_writer import write_model as write_directory

Header = Callable[[str], Path]

SMALL = "Llama-3.1-8B-Instruct-Q4_K_M"
REFUSED = Refusal(code="does-not-fit", exit_code=5, message="does not fit: short by 3.0 GiB", hint="a smaller one")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Plan:
    return decide(write_model(SMALL, tmp_path_factory.mktemp("models")), "2x3090")


def at(plan: Plan, runtime: str, tok_s: float | None, **changes: Any) -> Plan:
    speed = None if tok_s is None else Speed(expected=tok_s, low=tok_s * 0.9, high=tok_s * 1.1)
    return replace(plan, runtime=runtime, forecast=Forecast(tok_s=speed, total_tok_s=speed), **changes)


def candidate(plan: Plan | None, runtime: str = "", *, installed: bool = True, why_not: str = "") -> Candidate:
    name = runtime or (plan.runtime if plan is not None else "")
    return Candidate(runtime=name, installed=installed, install=f"get {name}", plan=plan, why_not=why_not)


class TestBest:
    def test_the_faster_is_taken(self, base: Plan) -> None:
        slow, fast = candidate(at(base, "vllm", 100)), candidate(at(base, "exllamav3", 120))
        assert best((slow, fast)) is fast

    def test_the_preferred_where_they_are_alike(self, base: Plan) -> None:
        preferred, alike = candidate(at(base, "vllm", 100)), candidate(at(base, "aikit", 104))
        assert best((preferred, alike)) is preferred

    def test_users_together_count(self, base: Plan) -> None:
        one = at(base, "vllm", 30, users=8)
        many = replace(one, forecast=replace(one.forecast, total_tok_s=Speed(expected=900, low=800, high=1000)))
        other = at(base, "exllamav3", 120, users=8)
        assert speed_of(many) == many.forecast.total_tok_s
        assert best((candidate(other), candidate(many))) == candidate(many)

    def test_what_runs_before_what_is_refused_and_cards_before_the_cpu(self, base: Plan) -> None:
        refused = candidate(at(base, "vllm", 900, refusal=REFUSED))
        helped = candidate(at(base, "llama.cpp", 8, placement="cpu"))
        cards = candidate(at(base, "ollama", 5))
        assert best((refused, helped)) is helped
        assert best((refused, helped, cards)) is cards

    def test_one_that_cannot_is_out(self, base: Plan) -> None:
        cannot = candidate(None, "vllm", why_not="no card of this rig is one it can use")
        refused = candidate(at(base, "aikit", None, refusal=REFUSED))
        assert best((cannot,)) is None
        assert best((cannot, refused)) is refused

    @given(
        speeds=st.lists(st.none() | st.floats(min_value=0.1, max_value=5000), min_size=1, max_size=6),
        refused=st.sets(st.integers(0, 5)),
    )
    def test_nothing_beats_the_best_by_much(self, base: Plan, speeds: list[float | None], refused: set[int]) -> None:
        candidates = [
            candidate(at(base, f"r{i}", speed, refusal=REFUSED if i in refused else None))
            for i, speed in enumerate(speeds)
        ]
        chosen = best(candidates)
        assert chosen is not None
        assert chosen.plan is not None
        later = candidates[candidates.index(chosen) :]
        assert not any(beats(other, chosen) for other in later)
        if set(range(len(speeds))) - refused:
            assert chosen.plan.refusal is None

    def test_nothing_to_choose_from(self) -> None:
        assert best(()) is None


class TestWords:
    def test_the_rule_names_every_other_with_its_figure(self, base: Plan) -> None:
        ours = at(base, "vllm", 120)
        others = (
            candidate(at(base, "exllamav3", 80)),
            candidate(at(base, "aikit", 120), installed=False),
            candidate(None, "exllamav2", why_not="it needs compute capability 8.0"),
        )
        plan = told(ours, (candidate(ours), *others))
        said = verdict(plan, "runtime-choice")
        assert said is not None
        assert said.verdict == "applies"
        for words in ("vllm, ~120 tok/s", "exllamav3 ~80", "aikit the same, not installed", "compute capability 8.0"):
            assert words in said.text
        assert [rule.id for rule in plan.rules] == [rule.id for rule in base.rules]
        runtimes = [other.runtime for other in plan.alternatives if other not in base.alternatives]
        assert runtimes == ["exllamav3", "aikit"]

    def test_what_is_not_installed_and_better_is_said_with_its_gain(self, base: Plan) -> None:
        ours = at(base, "exllamav3", 80)
        better = candidate(at(base, "vllm", 120), installed=False)
        text = advice(ours, (better, candidate(ours)))
        assert text == (
            "vllm is not installed, and would run it at ~120 tok/s instead of ~80 (predicted); install it: get vllm"
        )

    def test_no_word_where_it_would_gain_nothing(self, base: Plan) -> None:
        ours = at(base, "ollama", 100)
        assert advice(ours, (candidate(at(base, "llama.cpp", 102), installed=False), candidate(ours))) is None
        assert advice(ours, (candidate(at(base, "llama.cpp", 200)), candidate(ours))) is None  # it is here

    def test_one_that_would_run_what_does_not_here(self, base: Plan) -> None:
        ours = at(base, "vllm", 90, refusal=REFUSED)
        text = advice(ours, (candidate(ours), candidate(at(base, "exllamav3", 40), installed=False)))
        assert text is not None
        assert "would run it at ~40 tok/s (predicted)" in text

    def test_a_refused_one_is_an_alternative_that_does_not_fit(self, base: Plan) -> None:
        ours = at(base, "vllm", 90)
        other = told(ours, (candidate(ours), candidate(at(base, "aikit", None, refusal=REFUSED)))).alternatives[-1]
        assert (other.runtime, other.fits, other.why_not) == ("aikit", False, REFUSED.message)


_HELP = """--model FNAME
--device <dev1,dev2,..>
--tensor-split N0,N1,N2,...
--split-mode {none,layer,row,tensor}
--flash-attn [on|off|auto]
"""
_SERVER = """\
import sys
print({{"--version": "version: 0.6.0-dev (build 11434, commit 0123abc)", "--help": {help!r},
       "--list-devices": "Available devices:\\n{devices}"}}[sys.argv[1]])
"""
_CUDA = "\\n".join(f"  CUDA{i}: NVIDIA GeForce RTX 3090 (24124 MiB, 23800 MiB free)" for i in range(2))


class _Version(BaseHTTPRequestHandler):
    """An Ollama that says which it is, and remembers that it was asked."""

    asked: ClassVar[list[str]] = []

    def do_GET(self) -> None:
        self.asked.append(self.path)
        body = json.dumps({"version": "0.32.15"} if self.path == "/api/version" else {"models": []}).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the base class's name
        """Silent."""


@pytest.fixture
def ollama() -> Iterator[dict[str, str]]:
    """The environment in which an Ollama runs."""
    _Version.asked.clear()
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Version)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield {"OLLAMA_HOST": f"127.0.0.1:{server.server_address[1]}"}
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def machine(fake_nvml: Path, tmp_path: Path) -> Callable[..., dict[str, str]]:
    """`machine(devices)`: two 3090, and a llama-server that lists these devices; None: without one."""

    def make(devices: str | None = _CUDA) -> dict[str, str]:
        config = tmp_path / "machine.toml"
        config.write_text(Machine(rtx_3090(0), rtx_3090(1)).toml(), encoding="utf-8")
        env = {
            "LD_LIBRARY_PATH": str(fake_nvml), "FAKE_NVML_CONFIG": str(config), "PATH": os.defpath,
            "OLLAMA_HOST": "127.0.0.1:9",
        }  # fmt: skip
        if devices is not None:
            server = write_program(tmp_path / "llama-server", _SERVER.format(help=_HELP, devices=devices))
            env["MGPU_LLAMA_SERVER"] = str(server)
        return env

    return make


Rig = Callable[..., dict[str, str]]


def planned(mgpu: Mgpu, *args: str, env: dict[str, str] | None = None) -> dict[str, Any]:
    done = mgpu("plan", *args, "--json", env=env)
    told: dict[str, Any] = json.loads(done.stdout)
    return told


def choice(told: dict[str, Any]) -> str:
    return next(str(rule["text"]) for rule in told["plan"]["rules"] if rule["id"] == "runtime-choice")


class TestGguf:
    def test_llamacpp_where_it_is_and_nobody_else_is_asked(
        self, mgpu: Mgpu, header: Header, machine: Rig, ollama: dict[str, str]
    ) -> None:
        told = planned(mgpu, str(header(SMALL)), env=machine() | ollama)
        assert told["plan"]["runtime"] == "llama.cpp"
        assert _Version.asked == []

    def test_ollama_where_llamacpp_is_not(
        self, mgpu: Mgpu, header: Header, machine: Rig, ollama: dict[str, str]
    ) -> None:
        told = planned(mgpu, str(header(SMALL)), env=machine(None) | ollama)
        assert told["plan"]["runtime"] == "ollama"
        assert "llama.cpp" in choice(told)
        assert "not installed" in choice(told)

    def test_ollama_where_llamacpp_was_built_without_the_cards(
        self, mgpu: Mgpu, header: Header, machine: Rig, ollama: dict[str, str]
    ) -> None:
        told = planned(mgpu, str(header(SMALL)), env=machine("  (none)") | ollama)
        assert told["plan"]["runtime"] == "ollama"
        assert told["plan"]["placement"] == "single"

    def test_llamacpp_all_the_same_where_it_is_asked_for(
        self, mgpu: Mgpu, header: Header, machine: Rig, ollama: dict[str, str]
    ) -> None:
        told = planned(mgpu, str(header(SMALL)), "--runtime", "llama.cpp", env=machine("  (none)") | ollama)
        assert told["plan"]["runtime"] == "llama.cpp"
        assert _Version.asked == []

    def test_nothing_here_is_a_note_for_a_plan_and_exit_6_for_a_launch(
        self, mgpu: Mgpu, header: Header, machine: Rig
    ) -> None:
        told = planned(mgpu, str(header(SMALL)), env=machine(None))
        assert told["plan"]["runtime"] == "llama.cpp"
        assert "llama-server" in told["notes"][0]
        done = mgpu("run", str(header(SMALL)), env=machine(None))
        assert done.returncode == 6
        assert "llama-server" in done.stderr


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`directory("Llama-3.1-8B")`: a model directory, its header real and its weights a hole."""
    stores = {
        "Llama-3.1-8B": plain("BF16"),
        "Llama-3.1-8B-exl2-4.25bpw": exl2(4.25),
        "Llama-3.1-8B-exl3-4.0bpw": exl3(4),
    }

    def make(name: str) -> Path:
        config = read_config(name)
        return write_directory(tmp_path_factory.mktemp("hf") / name, config, stored(decoder(config), stores[name]))

    return make


class TestDirectories:
    def test_safetensors_go_to_vllm(self, mgpu: Mgpu, directory: Header) -> None:
        told = planned(mgpu, str(directory("Llama-3.1-8B")), "--rig", "2x3090", "--users", "8")
        assert told["plan"]["runtime"] == "vllm"
        assert "aikit the same" in choice(told)
        assert "aikit" in {other["runtime"] for other in told["plan"]["alternatives"]}

    @pytest.mark.parametrize(
        ("name", "runtime"),
        [("Llama-3.1-8B-exl2-4.25bpw", "exllamav2"), ("Llama-3.1-8B-exl3-4.0bpw", "exllamav3")],
    )
    def test_exllama_reads_its_own(self, mgpu: Mgpu, directory: Header, name: str, runtime: str) -> None:
        assert planned(mgpu, str(directory(name)), "--rig", "2x3090")["plan"]["runtime"] == runtime

    def test_cards_that_none_of_them_can_use(self, mgpu: Mgpu, directory: Header) -> None:
        done = mgpu("plan", str(directory("Llama-3.1-8B")), "--rig", "m3-max-64")
        assert done.returncode == 6
        assert "NVIDIA or AMD" in done.stderr
        assert "GGUF" in done.stderr

    def test_a_llama_server_is_of_no_use_to_them(self, mgpu: Mgpu, directory: Header) -> None:
        done = mgpu("plan", str(directory("Llama-3.1-8B")), "--rig", "2x3090", "--llama-server", "/bin/true")
        assert done.returncode == 2
        assert "--llama-server is for llama.cpp" in done.stderr

    def test_vllm_that_is_here(self, mgpu: Mgpu, directory: Header, machine: Rig, tmp_path: Path) -> None:
        vllm = write_program(tmp_path / "vllm", "print('0.32.0')")
        told = planned(mgpu, str(directory("Llama-3.1-8B")), env=machine(None) | {"MGPU_VLLM": str(vllm)})
        assert told["plan"]["runtime"] == "vllm"
        assert told["command"]["argv"][0] == str(vllm)
        assert "aikit" in choice(told)
        assert not any("is not installed" in note for note in told["notes"])
