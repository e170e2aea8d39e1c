"""The contract, from outside: commands, exit codes, what goes to stdout and what to stderr."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from conftest import Mgpu

Header = Callable[[str], Path]

SMALL = "Llama-3.1-8B-Instruct-Q4_K_M"
LARGE = "Llama-3.3-70B-Instruct-Q4_K_M"


def _flag(argv: list[str], flag: str) -> str:
    return argv[argv.index(flag) + 1]


class TestDryRun:
    def test_one_pasteable_line_that_names_one_gpu(self, mgpu: Mgpu, header: Header) -> None:
        done = mgpu("run", str(header(SMALL)), "--rig", "2x3090", "--dry-run")
        assert done.returncode == 0
        assert done.stdout.count("\n") == 1
        words = shlex.split(done.stdout)
        assert words[:2] == ["CUDA_DEVICE_ORDER=PCI_BUS_ID", "CUDA_VISIBLE_DEVICES=0"]
        assert words[2] == "llama-server"
        assert _flag(words, "--device") == "CUDA0"
        assert "--tensor-split" not in words
        assert _flag(words, "--fit") == "off"
        assert "GPU 0" in done.stderr

    def test_two_with_a_whole_layer_split(self, mgpu: Mgpu, header: Header) -> None:
        words = shlex.split(mgpu("run", str(header(LARGE)), "--rig", "2x3090", "--dry-run").stdout)
        assert "CUDA_VISIBLE_DEVICES=0,1" in words
        counts = [int(part) for part in _flag(words, "--tensor-split").split(",")]
        assert sum(counts) == 81
        assert _flag(words, "--n-gpu-layers") == "81"

    def test_needs_neither_runtime_nor_gpu(self, mgpu: Mgpu, header: Header) -> None:
        done = mgpu("run", str(header(SMALL)), "--rig", "3090", "--dry-run", env={"PATH": "", "MGPU_LLAMA_SERVER": ""})
        assert done.returncode == 0

    def test_arguments_for_the_runtime_win(self, mgpu: Mgpu, header: Header) -> None:
        done = mgpu(
            "run", str(header(SMALL)), "--rig", "3090", "--dry-run", "--", "-c", "4096", "--temp", "0", "-ub", "256"
        )
        words = shlex.split(done.stdout)
        assert words[-6:] == ["-c", "4096", "--temp", "0", "-ub", "256"]
        assert "--ctx-size" not in words
        assert "--ubatch-size" not in words

    def test_odd_paths_survive_the_shell(self, mgpu: Mgpu, header: Header, tmp_path: Path) -> None:
        odd = tmp_path / 'it\'s a "model" $HOME\n.gguf'
        odd.symlink_to(header(SMALL))
        done = mgpu("run", str(odd), "--rig", "3090", "--dry-run")
        assert str(odd) in shlex.split(done.stdout)

    def test_a_path_that_is_no_text_is_printed_as_it_is(self, header: Header, python_path: str, tmp_path: Path) -> None:
        odd = os.fsencode(tmp_path) + b"/m\xff.gguf"
        Path(os.fsdecode(odd)).symlink_to(header(SMALL))
        done = subprocess.run(
            [sys.executable, "-m", "mgpu", "run", odd, "--rig", "3090", "--dry-run"],
            env={**os.environ, "PYTHONPATH": python_path}, capture_output=True, check=False,
        )  # fmt: skip
        assert odd in done.stdout
        told = subprocess.run(
            [sys.executable, "-m", "mgpu", "plan", odd, "--rig", "3090", "--json"],
            env={**os.environ, "PYTHONPATH": python_path}, capture_output=True, check=False,
        )  # fmt: skip
        assert os.fsencode(json.loads(told.stdout)["model"]["path"]) == odd

    def test_key_stays_out_of_argv(self, mgpu: Mgpu, header: Header) -> None:
        words = shlex.split(mgpu("run", str(header(SMALL)), "--rig", "3090", "--dry-run", "--api-key", "s e").stdout)
        assert "LLAMA_API_KEY=s e" in words[: words.index("llama-server")]

    def test_variables_that_would_change_the_plan_are_unset(self, mgpu: Mgpu, header: Header) -> None:
        done = mgpu(
            "run", str(header(SMALL)), "--rig", "3090", "--dry-run", env={"LLAMA_ARG_TENSOR_SPLIT": "1,9", "OTHER": "1"}
        )
        assert done.stdout.startswith("env -u LLAMA_ARG_TENSOR_SPLIT CUDA_DEVICE_ORDER=PCI_BUS_ID")


class TestJson:
    def _told(self, mgpu: Mgpu, *args: str, code: int = 0) -> dict[str, Any]:
        done = mgpu(*args, "--json")
        assert done.returncode == code, done.stderr
        told: dict[str, Any] = json.loads(done.stdout)
        return told

    def test_schema_1(self, mgpu: Mgpu, header: Header) -> None:
        told = self._told(mgpu, "plan", str(header(LARGE)), "--rig", "2x3090")
        assert set(told) == {"schema", "model", "rig", "request", "plan", "command", "notes"}
        assert told["schema"] == 1
        assert set(told["model"]) >= {
            "path", "format", "architecture", "name", "quantization", "parameters", "layers", "weights_bytes",
            "context_train", "experts",
        }  # fmt: skip
        assert set(told["rig"]) >= {"name", "source", "gpus", "links", "ram_bytes", "ram_free_bytes"}
        assert set(told["rig"]["gpus"][0]) >= {
            "index", "name", "uuid", "vendor", "total_bytes", "free_bytes", "bandwidth_bytes_per_s", "pcie_gen",
            "pcie_width", "compute_capability",
        }  # fmt: skip
        plan = told["plan"]
        assert plan["placement"] == "pipeline"
        for device in plan["devices"]:
            parts = ("weights_bytes", "kv_bytes", "compute_bytes", "overhead_bytes")
            assert device["total_bytes"] == sum(device[part] for part in parts)
            assert device["total_bytes"] <= device["free_bytes"]
        assert sum(device["layers"] for device in plan["devices"]) == told["model"]["layers"]
        assert plan["tok_s"]["low"] < plan["tok_s"]["expected"] < plan["tok_s"]["high"]
        assert {rule["id"] for rule in plan["rules"]} >= {"fits-one-card", "fewest-cards", "split-by-layers"}
        assert all(rule["source"] for rule in plan["rules"])
        assert set(told["command"]) >= {"argv", "env", "files", "ready_url", "endpoint"}
        assert told["command"]["argv"][0] == "llama-server"

    def test_run_launches_nothing(self, mgpu: Mgpu, header: Header) -> None:
        assert self._told(mgpu, "run", str(header(SMALL)), "--rig", "2x3090")["plan"]["placement"] == "single"

    def test_a_refusal_has_a_plan_and_an_error(self, mgpu: Mgpu, header: Header) -> None:
        told = self._told(mgpu, "plan", str(header(SMALL)), "--rig", "2x3090", "--split", "pipeline", code=3)
        assert set(told["error"]) == {"code", "message", "hint"}
        assert "command" not in told
        assert told["plan"]["placement"] == "pipeline"

    def test_a_misfit_too(self, mgpu: Mgpu, header: Header) -> None:
        told = self._told(mgpu, "plan", str(header(LARGE)), "--rig", "3060", code=5)
        assert told["error"]["code"] == "does-not-fit"

    def test_errors_before_a_plan(self, mgpu: Mgpu) -> None:
        assert self._told(mgpu, "plan", "/nowhere.gguf", code=4)["error"]["code"] == "bad-model"


class TestExitCodes:
    """One line that says what is wrong, one that says what to do; never a traceback."""

    @pytest.mark.parametrize(
        ("args", "code", "words"),
        [
            pytest.param(("run", "{small}", "--ctx", "many"), 2, "'many'", id="ctx"),
            pytest.param(("run", "{small}", "--ctx", "8kk"), 2, "'8kk'", id="ctx kk"),
            pytest.param(("run", "{small}", "--ctx", "²"), 2, "'²'", id="ctx squared"),
            pytest.param(("run", "{small}", "--host", ""), 2, "--host", id="host"),
            pytest.param(("run", "{small}", "--api-key", ""), 2, "--api-key", id="key"),
            pytest.param(("run", "{small}", "--rig", "3090", "--reserve", "5iB"), 2, "'5iB'", id="size"),
            pytest.param(("run", "{small}", "--rig", "2x3090", "--dry-run", "--gpus", "3"), 2, "'3'", id="no index 3"),
            pytest.param(
                ("run", "{small}", "--rig", "3090", "--dry-run", "--", "-ot", "(=CPU"), 2, "(=CPU", id="regex"
            ),
            pytest.param(("run", "{small}", "--rig", "3090", "--dry-run", "--", "-np", "300"), 2, "300", id="slots"),
            pytest.param(("run", "{small}", "--users", "0"), 2, "--users", id="users"),
            pytest.param(("run", "{small}", "--nonsense"), 2, "--nonsense", id="option"),
            pytest.param(("run", "{small}", "extra"), 2, "extra", id="a second model"),
            pytest.param(("run", "{small}", "--rig", "2x3090", "--reserve", "lots"), 2, "'lots'", id="reserve"),
            pytest.param(("run", "{small}", "--rig", "2x3090", "--gpus", "5", "--dry-run"), 2, "'5'", id="gpus"),
            pytest.param(("run", "{small}", "--rig", "2x3090", "--gpus", "0,,1"), 2, "empty", id="gpus empty"),
            pytest.param(
                ("run", "{small}", "--rig", "3090", "--split", "pipeline", "--dry-run"), 2, "two", id="one card"
            ),
            pytest.param(("run", "{small}", "--rig", "3090", "--dry-run", "--", "--port", "1"), 2, "--port", id="port"),
            pytest.param(("run", "{small}", "--rig", "2x3090", "--split", "pipeline", "--dry-run"), 3, "fits", id="3"),
            pytest.param(("run", "https://127.0.0.1:1/m.gguf"), 2, "download", id="url"),
            pytest.param(("run", "/nowhere/model.gguf"), 4, "/nowhere/model.gguf", id="no file"),
            pytest.param(("inspect", "{text}"), 4, "notes.gguf", id="no gguf"),
            pytest.param(("run", "{large}", "--rig", "3060", "--dry-run"), 5, "short by", id="5"),
            pytest.param(("run", "{small}", "--llama-server", "/nowhere/llama-server"), 6, "/nowhere", id="6"),
            pytest.param(("run", "{small}", "--runtime", "exo", "--rig", "3090", "--dry-run"), 6, "exo", id="runtime"),
            pytest.param(("run", "{small}", "--rig", "nosuch", "--dry-run"), 8, "nosuch", id="8"),
            pytest.param(("rig", "use", "nosuch"), 8, "nosuch", id="rig use"),
            pytest.param(("rig", "remove", "3090"), 8, "3090", id="rig remove"),
        ],
    )
    def test_each(
        self, mgpu: Mgpu, header: Header, tmp_path: Path, args: tuple[str, ...], code: int, words: str
    ) -> None:
        text = tmp_path / "notes.gguf"
        text.write_text("not a model")
        names = {"small": header(SMALL), "large": header(LARGE), "text": text}
        done = mgpu(*(arg.format(**names) if "{" in arg else arg for arg in args))
        assert done.returncode == code, done.stderr
        assert words in done.stderr
        assert "Traceback" not in done.stderr
        assert done.stdout == ""

    def test_another_rig_is_not_launched_here(self, mgpu: Mgpu, header: Header, llama_server: str) -> None:
        done = mgpu("run", str(header(SMALL)), "--rig", "8x3090", env={"MGPU_LLAMA_SERVER": llama_server})
        assert done.returncode == 8
        assert "8x3090" in done.stderr

    def test_a_broken_runtime_is_said_with_its_own_words(self, mgpu: Mgpu, header: Header, tmp_path: Path) -> None:
        broken = tmp_path / "llama-server"
        broken.write_text("#!/bin/sh\necho 'libfoo.so.1: cannot open shared object file' >&2\nexit 127\n")
        broken.chmod(0o755)
        done = mgpu("run", str(header(SMALL)), env={"MGPU_LLAMA_SERVER": str(broken)})
        assert done.returncode == 6
        assert "libfoo.so.1" in done.stderr

    def test_an_old_runtime_is_too_old(self, mgpu: Mgpu, header: Header, tmp_path: Path) -> None:
        old = tmp_path / "llama-server"
        old.write_text("#!/bin/sh\necho '-m,  --model FNAME'\necho '-ts,  --tensor-split N0,N1'\n")
        old.chmod(0o755)
        done = mgpu("run", str(header(SMALL)), env={"MGPU_LLAMA_SERVER": str(old)})
        assert done.returncode == 6
        assert "too old" in done.stderr
        assert "--device" in done.stderr


class TestPlan:
    def test_the_screen_holds_in_80_columns(self, mgpu: Mgpu, header: Header) -> None:
        for model, rig in ((SMALL, "2x3090"), (LARGE, "2x3090-nvlink"), (LARGE, "8x3090"), (SMALL, "cpu-only")):
            done = mgpu("plan", str(header(model)), "--rig", rig)
            text = done.stdout
            assert "\x1b[" not in text
            assert max(len(line.rstrip()) for line in text.splitlines()) <= 80

    def test_says_what_and_why(self, mgpu: Mgpu, header: Header) -> None:
        text = mgpu("plan", str(header(SMALL)), "--rig", "2x3090").stdout
        for words in ("GPU 0", "left free", "weights", "fits-one-card", "CUDA_VISIBLE_DEVICES=0", "would fit", "tok/s"):
            assert words in text

    def test_colour_only_where_wanted(self, mgpu: Mgpu, header: Header) -> None:
        forced = mgpu("plan", str(header(SMALL)), "--rig", "2x3090", env={"FORCE_COLOR": "1", "TERM": "xterm-256color"})
        assert "\x1b[" in forced.stdout
        plain = mgpu("plan", str(header(SMALL)), "--rig", "2x3090", env={"NO_COLOR": "1", "TERM": "xterm-256color"})
        assert "\x1b[" not in plain.stdout

    def test_a_terminal_that_knows_no_blocks(self, mgpu: Mgpu, header: Header) -> None:
        done = mgpu("plan", str(header(SMALL)), "--rig", "2x3090", env={"PYTHONIOENCODING": "ascii", "LC_ALL": "C"})
        assert done.returncode == 0
        assert "Traceback" not in done.stderr

    def test_svg(self, mgpu: Mgpu, header: Header, tmp_path: Path) -> None:
        picture = tmp_path / "plan.svg"
        assert mgpu("plan", str(header(SMALL)), "--rig", "2x3090", "--svg", str(picture)).returncode == 0
        text = picture.read_text()
        assert text.startswith("<svg")
        assert "fits-one-card" in text
        nowhere = mgpu("plan", str(header(SMALL)), "--rig", "2x3090", "--svg", "/nowhere/plan.svg")
        assert nowhere.returncode == 2
        assert "/nowhere/plan.svg" in nowhere.stderr


class TestRig:
    def test_save_use_check_and_remove(self, mgpu: Mgpu, header: Header) -> None:
        assert mgpu("rig", "save", "mine").returncode == 0
        assert mgpu("rig", "check", "mine").returncode == 0
        assert mgpu("rig", "use", "mine").returncode == 0
        assert "* mine" in mgpu("rig", "list").stdout
        told = json.loads(mgpu("plan", str(header(SMALL)), "--json", "--offload", "allow").stdout)
        assert told["rig"]["name"] == "mine"
        assert mgpu("rig", "save", "mine").returncode == 8
        assert mgpu("rig", "save", "mine", "--force").returncode == 0
        assert mgpu("rig", "remove", "mine").returncode == 0
        assert "mine" not in mgpu("rig", "list").stdout

    def test_another_machine_as_default_is_planned_for_and_said(self, mgpu: Mgpu, header: Header) -> None:
        assert mgpu("rig", "use", "2x3090").returncode == 0
        done = mgpu("plan", str(header(SMALL)))
        assert done.returncode == 0
        assert "rig 2x3090" in done.stdout
        assert "not this machine" in done.stderr
        assert mgpu("rig", "check").returncode == 8

    def test_show(self, mgpu: Mgpu) -> None:
        assert "NVLink" in mgpu("rig", "show", "2x3090-nvlink").stdout
        here = json.loads(mgpu("rig", "show", "--json").stdout)
        assert here["rig"]["source"] == "detected"
        assert here["rig"]["ram_bytes"] > 0

    def test_a_file_by_hand(self, mgpu: Mgpu, header: Header, tmp_path: Path) -> None:
        profile = tmp_path / "mine.toml"
        profile.write_text('schema = 1\nname = "x"\n[host]\nram_gib = 64\n[[gpu]]\nname = "RTX 9090"\nvram_mb = 1\n')
        done = mgpu("run", str(header(SMALL)), "--rig", str(profile), "--dry-run")
        assert done.returncode == 8
        assert "mine.toml" in done.stderr
        assert "vram_mb" in done.stderr
        assert "vram_mib" in done.stderr


def test_help_names_every_command(mgpu: Mgpu) -> None:
    text = mgpu("--help").stdout
    assert mgpu().stdout == text
    for command in ("run", "plan", "inspect", "rig", "runtimes", "completions"):
        assert f"\n  {command} " in text


def test_inspect(mgpu: Mgpu, header: Header) -> None:
    told = json.loads(mgpu("inspect", str(header(SMALL)), "--json").stdout)["model"]
    assert told["kv_bytes_per_token"] == 32 * 8 * 2 * 128 * 2  # layers, KV heads, K and V, head size, f16
    assert sum(told["bytes_by_class"].values()) == told["weights_bytes"] == 4912898304
    assert len(told["bytes_by_layer"]) == 32
    assert "131072" in mgpu("inspect", str(header(SMALL))).stdout


def test_runtimes(mgpu: Mgpu) -> None:
    told = json.loads(mgpu("runtimes", "--json", env={"PATH": os.defpath}).stdout)
    row = next(row for row in told["runtimes"] if row["runtime"] == "llama.cpp")
    assert row["found"] or row["install"]


@pytest.mark.parametrize("command", ["plan {model} --rig 8x3090", "plan {model} --rig 3090 --json", "--help"])
def test_a_reader_that_goes_away_is_no_error(header: Header, python_path: str, command: str) -> None:
    line = f"{shlex.quote(sys.executable)} -m mgpu {command.format(model=shlex.quote(str(header(SMALL))))}"
    done = subprocess.run(
        ["bash", "-c", f"{line} | true; exit ${{PIPESTATUS[0]}}"],
        env={**os.environ, "PYTHONPATH": python_path}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    ("redirection", "code"),
    [
        pytest.param(">&-", 0, id="stdout closed"),
        pytest.param("2>&-", 0, id="stderr closed"),
        pytest.param(">/dev/full", 2, id="disk full"),
    ],
)
def test_streams_that_cannot_be_written(header: Header, python_path: str, redirection: str, code: int) -> None:
    line = f"{shlex.quote(sys.executable)} -m mgpu run {shlex.quote(str(header(SMALL)))} --rig 3090 --dry-run"
    done = subprocess.run(
        ["sh", "-c", f"{line} {redirection}"],
        env={**os.environ, "PYTHONPATH": python_path}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == code
    assert "Traceback" not in done.stderr


def test_usage_errors_are_two_lines_and_json_where_wanted(mgpu: Mgpu, header: Header) -> None:
    done = mgpu("plan", str(header(SMALL)), "--users", "0", "--json")
    assert done.returncode == 2
    assert len(done.stderr.strip().splitlines()) == 2
    assert json.loads(done.stdout)["error"]["code"] == "usage"


def test_an_empty_config_home_is_none(mgpu: Mgpu, tmp_path: Path) -> None:
    env = {"XDG_CONFIG_HOME": "", "HOME": str(tmp_path)}
    assert mgpu("rig", "save", "mine", env=env).returncode == 0
    assert (tmp_path / ".config" / "mgpu" / "rigs" / "mine.toml").exists()


def test_a_home_that_is_no_folder(mgpu: Mgpu, header: Header) -> None:
    env = {"XDG_CONFIG_HOME": "", "HOME": "/dev/null"}
    assert mgpu("run", str(header(SMALL)), "--rig", "3090", "--dry-run", env=env).returncode == 0
    assert mgpu("rig", "save", "mine", env=env).returncode == 8
