"""`mgpu run` on a machine with two RTX 3090: a FAKE NVML and a FAKE llama-server, which records how it was started."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from conftest import Mgpu, write_program
from fake_build import CUDA, SERVER, build_program
from fakenvml.machine import Machine, rtx_3090

Header = Callable[[str], Path]
Rig = dict[str, str]

SMALL = "Llama-3.1-8B-Instruct-Q4_K_M"
LARGE = "Llama-3.3-70B-Instruct-Q4_K_M"

#: Started with a model, it writes down its arguments and environment and becomes the fake server.
_STARTED = """\
kept = {{name: os.environ[name] for name in os.environ if name.startswith(("CUDA", "LLAMA"))}}
with open({record!r}, "w") as out:
    json.dump({{"argv": words, "env": kept}}, out)
port = words[words.index("--port") + 1]
os.execv(sys.executable, [sys.executable, {fake!r}, "--port", port, "--fault", {fault!r}])
"""


@pytest.fixture
def machine(fake_nvml: Path, tmp_path: Path) -> Callable[..., Rig]:
    """`machine(devices=…, fault=…)`: the environment of a machine with two 3090 and a llama-server."""

    def make(devices: str = CUDA, fault: str = "none") -> Rig:
        config = tmp_path / "machine.toml"
        config.write_text(Machine(rtx_3090(0), rtx_3090(1)).toml(), encoding="utf-8")
        started = _STARTED.format(record=str(tmp_path / "record.json"), fault=fault, fake=SERVER)
        server = write_program(tmp_path / "llama-server", build_program(started, devices=devices))
        return {
            "LD_LIBRARY_PATH": str(fake_nvml),
            "FAKE_NVML_CONFIG": str(config),
            "MGPU_LLAMA_SERVER": str(server),
        }

    return make


def _recorded(tmp_path: Path) -> dict[str, Any]:
    recorded: dict[str, Any] = json.loads((tmp_path / "record.json").read_text())
    return recorded


def _after(words: list[str], flag: str) -> str:
    return words[words.index(flag) + 1]


def test_an_8b_is_shown_one_card_by_its_uuid(
    mgpu: Mgpu, header: Header, machine: Callable[..., Rig], tmp_path: Path
) -> None:
    env = machine() | {"LLAMA_ARG_TENSOR_SPLIT": "1,1"}
    done = mgpu("run", str(header(SMALL)), "--prompt", "Hello?", env=env)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "plain: Hello?"  # these headers have no chat template: the text is continued
    started = _recorded(tmp_path)
    assert started["env"] == {"CUDA_DEVICE_ORDER": "PCI_BUS_ID", "CUDA_VISIBLE_DEVICES": str(rtx_3090(0)["uuid"])}
    assert _after(started["argv"], "--device") == "CUDA0"
    assert _after(started["argv"], "--log-verbosity") == "4"
    assert "GPU 0 (RTX 3090)" in done.stderr
    assert "left free and hidden" in done.stderr


def test_a_70b_is_split_over_both(mgpu: Mgpu, header: Header, machine: Callable[..., Rig], tmp_path: Path) -> None:
    assert mgpu("run", str(header(LARGE)), "--prompt", "Hello?", env=machine()).returncode == 0
    started = _recorded(tmp_path)
    assert started["env"]["CUDA_VISIBLE_DEVICES"] == f"{rtx_3090(0)['uuid']},{rtx_3090(1)['uuid']}"
    assert sum(int(count) for count in _after(started["argv"], "--tensor-split").split(",")) == 81


def test_an_outer_restriction_is_respected(
    mgpu: Mgpu, header: Header, machine: Callable[..., Rig], tmp_path: Path
) -> None:
    env = machine() | {"CUDA_VISIBLE_DEVICES": "1", "CUDA_DEVICE_ORDER": "PCI_BUS_ID"}
    assert mgpu("run", str(header(SMALL)), "--prompt", "Hello?", env=env).returncode == 0
    assert _recorded(tmp_path)["env"]["CUDA_VISIBLE_DEVICES"] == rtx_3090(1)["uuid"]


def test_a_vulkan_build_is_given_its_own_names(
    mgpu: Mgpu, header: Header, machine: Callable[..., Rig], tmp_path: Path
) -> None:
    env = machine(devices=CUDA.replace("CUDA", "Vulkan"))
    assert mgpu("run", str(header(SMALL)), "--prompt", "Hello?", env=env).returncode == 0
    assert _after(_recorded(tmp_path)["argv"], "--device") == "Vulkan0"


def test_a_build_without_any_gpu_says_so_and_uses_the_cpu(
    mgpu: Mgpu, header: Header, machine: Callable[..., Rig], tmp_path: Path
) -> None:
    done = mgpu("run", str(header(SMALL)), "--prompt", "Hello?", "--offload", "allow", env=machine(devices="  (none)"))
    assert done.returncode == 0, done.stderr
    assert "cannot use GPU 0" in done.stderr
    assert _after(_recorded(tmp_path)["argv"], "--device") == "none"


def test_a_saved_rig_runs_here_with_its_reserve(mgpu: Mgpu, header: Header, machine: Callable[..., Rig]) -> None:
    env = machine()
    assert mgpu("rig", "save", "mine", env=env).returncode == 0
    assert mgpu("rig", "use", "mine", env=env).returncode == 0
    assert mgpu("rig", "check", env=env).returncode == 0
    told = json.loads(mgpu("plan", str(header(SMALL)), "--json", env=env).stdout)
    assert told["rig"]["name"] == "mine"
    assert told["rig"]["source"] == "profile"
    assert mgpu("run", str(header(SMALL)), "--rig", "2x3090", "--prompt", "Hello?", env=env).returncode == 0
    assert mgpu("run", str(header(SMALL)), "--rig", "4x3090", "--prompt", "Hello?", env=env).returncode == 8


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        pytest.param("out-of-memory", "out of memory", id="out of memory"),
        pytest.param("exit-at-once", "--nonsense", id="unknown flag"),
        pytest.param("abort-at-first-token", "before it was ready", id="dies at the first token"),
        pytest.param("exit-while-loading", "model loading error", id="gives up while loading"),
    ],
)
def test_a_runtime_that_fails_is_exit_7(
    mgpu: Mgpu, header: Header, machine: Callable[..., Rig], fault: str, words: str
) -> None:
    done = mgpu("run", str(header(SMALL)), "--prompt", "Hello?", env=machine(fault=fault))
    assert done.returncode == 7
    assert words in done.stderr
    assert "Traceback" not in done.stderr
