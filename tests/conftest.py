"""Shared by all tests: a home of their own, real parts where there are any, and models from committed headers."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest

from headers import write_model
from launching import House

_ROOT = Path(__file__).parents[1]

#: Variables of the person who runs the tests that would change what is tested.
_FOREIGN = (
    "CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER", "GGML_VK_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "NO_COLOR",
    "ROCR_VISIBLE_DEVICES", "ONEAPI_DEVICE_SELECTOR",
)  # fmt: skip


#: Of the person who runs the tests: compiling llvmpipe's shaders anew takes a minute and a half.
_SHADERS = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")


@pytest.fixture(autouse=True)
def _own_home(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests write profiles, logs and caches below a directory of their own."""
    home = tmp_path_factory.mktemp("home")
    for variable, name in (
        ("HOME", ""),
        ("XDG_CONFIG_HOME", "config"),
        ("XDG_STATE_HOME", "state"),
        ("XDG_CACHE_HOME", "cache"),
    ):
        monkeypatch.setenv(variable, str(home / name))
    for variable in _FOREIGN:
        monkeypatch.delenv(variable, raising=False)
    for variable in [name for name in os.environ if name.startswith("LLAMA_ARG_")]:
        monkeypatch.delenv(variable)


def write_program(path: Path, code: str) -> Path:
    """An executable `path` that runs `code` with this Python, whose own path may hold a space: hence the shell."""
    script = path.with_name(f"{path.name}.py")
    script.write_text(code)
    path.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} {shlex.quote(str(script))} "$@"\n')
    path.chmod(0o755)
    return path


Mgpu = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture(scope="session")
def python_path() -> str:
    """The source roots, for processes that tests start."""
    return os.pathsep.join(str(_ROOT / root) for root in ("launcher", "adapters", "profiles"))


@pytest.fixture
def mgpu(python_path: str) -> Mgpu:
    """`mgpu(*args, env=…)`: the program as a person runs it, in a process of its own."""

    def call(*args: str, env: Mapping[str, str] | None = None, timeout: float = 60) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "mgpu", *args],
            env={**os.environ, "PYTHONPATH": python_path, **(env or {})},
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )

    return call


@pytest.fixture(scope="session")
def header(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`header("Llama-3.1-8B…")`: a GGUF of the model's full length, its header real and its weights a hole."""
    directory = tmp_path_factory.mktemp("models")
    return lambda name: write_model(name, directory)


@pytest.fixture(scope="session")
def fake_nvml(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the compiled FAKE libnvidia-ml.so.1, for LD_LIBRARY_PATH; it reads $FAKE_NVML_CONFIG."""
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler (cc) to build the fake libnvidia-ml.so.1")
    source = Path(__file__).parent / "fakenvml" / "fakenvml.c"
    built = tmp_path_factory.mktemp("fakenvml") / "libnvidia-ml.so.1"
    flags = ["-O1", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC", "-fvisibility=hidden"]
    subprocess.run([compiler, *flags, f"-Wl,-soname,{built.name}", "-o", built, source], check=True)
    return built.parent


@pytest.fixture
def house(tmp_path: Path, python_path: str, fake_nvml: Path, header: Callable[[str], Path]) -> Iterator[House]:
    """Launches from outside, and nothing of them afterwards."""
    house = House(tmp_path, python_path, fake_nvml, header("Qwen2.5-0.5B-Instruct-Q4_K_M"))
    yield house
    house.close()


@pytest.fixture(scope="session")
def real_gguf() -> Path:
    """The real 253 MB model, or a skip that says how to get it."""
    given = os.environ.get("MGPU_TEST_GGUF")
    if given and Path(given).is_file():
        return Path(given).absolute()
    pytest.skip("no real model: set MGPU_TEST_GGUF, or run `make test-runtime`")


@pytest.fixture(scope="session")
def llama_server() -> str:
    """A real llama-server, or a skip that says how to get it."""
    from mgpu.launch.find import find_runtime
    from mgpu_adapters.llamacpp.adapter import LlamaCpp

    found = find_runtime(LlamaCpp.search, explicit=None, environ=os.environ)
    if found is None:
        pytest.skip("no llama-server: set MGPU_LLAMA_SERVER, or run `make test-runtime`")
    return found.executable


@pytest.fixture
def two_vulkan_devices(llama_server: str) -> dict[str, str]:
    """The environment in which llama-server has two software Vulkan devices, or a skip."""
    env = {"GGML_VK_VISIBLE_DEVICES": "0,0", "MESA_SHADER_CACHE_DIR": str(_SHADERS)}
    listed = subprocess.run(
        [llama_server, "--list-devices"], env={**os.environ, **env}, capture_output=True, text=True, check=False
    )
    if "Vulkan1: llvmpipe" not in listed.stdout:
        pytest.skip("no software Vulkan: apt-get install mesa-vulkan-drivers")
    return env
