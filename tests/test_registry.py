"""The adapters by name: ours, lazily; and other packages', by entry point, with the ways in which they can be wrong."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

import pytest

from conftest import Mgpu, write_program
from fakenvml.machine import Machine, rtx_3090
from mgpu.adapter import Adapter
from mgpu.errors import RuntimeMissingError, UsageError
from mgpu.request import RUNTIME_NAMES
from mgpu_adapters.aikit.adapter import AIKit
from mgpu_adapters.exllama.adapter import ExLlamaV2, ExLlamaV3
from mgpu_adapters.exo.adapter import Exo
from mgpu_adapters.llamacpp.adapter import LlamaCpp
from mgpu_adapters.mycoswarm.adapter import MycoSwarm
from mgpu_adapters.ollama.adapter import Ollama
from mgpu_adapters.registry import ADAPTER_NAMES, GROUP, load_adapter, names_for, other_names
from mgpu_adapters.vllm.adapter import Vllm

Header = Callable[[str], Path]

EXAMPLE: Final = Path(__file__).parents[1] / "examples" / "mgpu-adapter-echo"
SMALL: Final = "Llama-3.1-8B-Instruct-Q4_K_M"
LARGE: Final = "Llama-3.3-70B-Instruct-Q4_K_M"
#: Named one by one, so that mypy holds each to the protocol: the registry knows their classes by name alone.
OURS: Final[tuple[Adapter, ...]] = (
    LlamaCpp(), Ollama(), Vllm(), ExLlamaV3(), ExLlamaV2(), AIKit(), Exo(), MycoSwarm(),
)  # fmt: skip
MEMBERS: Final = [name for name in vars(Adapter) if not name.startswith("_")]


class TestOurs:
    def test_every_runtime_of_the_guide_has_one(self) -> None:
        assert set(ADAPTER_NAMES) == set(RUNTIME_NAMES)
        assert [type(load_adapter(name)) for name in ADAPTER_NAMES] == [type(adapter) for adapter in OURS]

    @pytest.mark.parametrize("name", ADAPTER_NAMES)
    def test_has_all_an_adapter_must_have(self, name: str) -> None:
        adapter = load_adapter(name)
        assert [member for member in MEMBERS if not hasattr(adapter, member)] == []
        assert adapter.name == name
        assert adapter.assumed().runtime == name
        assert adapter.search.install
        assert set(adapter.abilities.mixed) <= set(adapter.abilities.modes)

    @pytest.mark.parametrize("name", ADAPTER_NAMES)
    def test_auto_looks_no_further_than_its_formats(self, name: str) -> None:
        """What the registry says without importing the adapter is what the adapter says."""
        adapter = load_adapter(name)
        offered = {form for form in ("gguf", "safetensors", "exl2", "exl3") if name in names_for(form)}
        assert offered <= adapter.formats
        if not adapter.abilities.machines:
            assert offered == adapter.formats

    def test_gguf_never_goes_to_vllm(self) -> None:
        assert names_for("gguf")[0] == "llama.cpp"
        assert not {"vllm", "aikit"} & set(names_for("gguf"))

    def test_other_machines_are_never_taken_unasked(self) -> None:
        for form in ("gguf", "safetensors", "exl2", "exl3"):
            assert not {"exo", "mycoswarm"} & set(names_for(form))


def test_a_dry_run_imports_no_other_adapter_and_no_metadata(header: Header, python_path: str) -> None:
    code = (
        "import sys; from mgpu.cli import cli\n"
        f"cli(['run', {str(header(SMALL))!r}, '--rig', '2x3090', '--dry-run'], standalone_mode=False)\n"
        "names = [name for name in sys.modules if name.startswith('mgpu_adapters.')]\n"
        "print({name.split('.')[1] for name in names} - {'registry', 'llamacpp', 'words', 'keyless'} or 'none')\n"
        "print('importlib.metadata' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": python_path}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout.splitlines()[-2:] == ["none", "False"]


@pytest.fixture
def others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """`others(package, code, points)`: a package with a module of this code and entry points, as pip leaves it."""
    monkeypatch.syspath_prepend(tmp_path)

    def add(package: str, code: str, **points: str) -> None:
        module = package.replace("-", "_")
        (tmp_path / f"{module}.py").write_text(code)
        write_dist_info(tmp_path, package, "1.0", points)

    return add


def write_dist_info(site: Path, package: str, version: str, points: dict[str, str]) -> None:
    """What makes a folder on `sys.path` hold an installed package."""
    info = site / f"{package.replace('-', '_')}-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: {version}\n")
    lines = "".join(f"{name} = {value}\n" for name, value in points.items())
    (info / "entry_points.txt").write_text(f"[{GROUP}]\n{lines}")


class TestOthers:
    def test_one_that_there_is_not(self) -> None:
        with pytest.raises(RuntimeMissingError) as caught:
            load_adapter("nonsense")
        assert "nonsense" in caught.value.message
        assert "llama.cpp" in caught.value.hint

    def test_one_that_cannot_be_imported(self, others: Callable[..., None]) -> None:
        others("mgpu-broken", "import nothing_of_this_name", broken="mgpu_broken:Broken")
        assert "broken" in other_names()
        with pytest.raises(RuntimeMissingError) as caught:
            load_adapter("broken")
        assert "mgpu-broken 1.0" in caught.value.message
        assert "nothing_of_this_name" in caught.value.message

    def test_one_that_lacks_something(self, others: Callable[..., None]) -> None:
        others("mgpu-half", "class Half:\n    name = 'half'\n    formats = frozenset()\n", half="mgpu_half:Half")
        with pytest.raises(RuntimeMissingError, match=r"has no .*\bassumed\b.*\bread_log\b"):
            load_adapter("half")

    def test_one_under_another_name(self, others: Callable[..., None]) -> None:
        code = f"class Mask:\n    name = 'ollama'\n    {'; '.join(f'{m} = None' for m in MEMBERS if m != 'name')}\n"
        others("mgpu-mask", code, mask="mgpu_mask:Mask")
        with pytest.raises(RuntimeMissingError, match="calls itself 'ollama'"):
            load_adapter("mask")

    def test_two_of_one_name(self, others: Callable[..., None]) -> None:
        others("mgpu-one", "", same="mgpu_one:X")
        others("mgpu-two", "", same="mgpu_two:X")
        with pytest.raises(UsageError, match=r"mgpu-(one|two) 1\.0 and mgpu-(one|two) 1\.0"):
            load_adapter("same")

    def test_ours_cannot_be_replaced(self, others: Callable[..., None]) -> None:
        others("mgpu-evil", "raise SystemExit", **{"llama.cpp": "mgpu_evil:Evil"})
        assert load_adapter("llama.cpp").formats == {"gguf"}
        assert "llama.cpp" not in other_names()


@pytest.fixture
def site(tmp_path: Path, python_path: str) -> dict[str, str]:
    """The example, installed beside mgpu: the environment in which it is."""
    folder = tmp_path / "site"
    folder.mkdir()
    project = tomllib.loads((EXAMPLE / "pyproject.toml").read_text())["project"]
    for module in EXAMPLE.glob("*.py"):
        (folder / module.name).write_text(module.read_text())
    write_dist_info(folder, project["name"], project["version"], project["entry-points"][GROUP])
    module, function = project["scripts"]["echo-server"].split(":")
    code = f"import sys; sys.path.insert(0, {str(folder)!r})\nfrom {module} import {function}; {function}()"
    programs = tmp_path / "bin"
    programs.mkdir()
    write_program(programs / "echo-server", code)
    path = os.pathsep.join((str(programs), os.defpath))
    return {"PYTHONPATH": os.pathsep.join((python_path, str(folder))), "PATH": path}


@pytest.fixture
def two_3090(fake_nvml: Path, tmp_path: Path) -> dict[str, str]:
    config = tmp_path / "machine.toml"
    config.write_text(Machine(rtx_3090(0), rtx_3090(1)).toml(), encoding="utf-8")
    return {"LD_LIBRARY_PATH": str(fake_nvml), "FAKE_NVML_CONFIG": str(config)}


class TestExample:
    """examples/mgpu-adapter-echo, as docs/adapters.md tells people to do it."""

    def test_runs_to_its_answer(
        self, mgpu: Mgpu, header: Header, site: dict[str, str], two_3090: dict[str, str]
    ) -> None:
        done = mgpu("run", str(header(SMALL)), "--runtime", "echo", "--prompt", "Hello?", env=site | two_3090)
        assert done.returncode == 0, done.stderr
        assert done.stdout == "Hello?\n"
        assert "on GPU 0 (RTX 3090)" in done.stderr

    def test_is_planned_for(self, mgpu: Mgpu, header: Header, site: dict[str, str]) -> None:
        done = mgpu("run", str(header(LARGE)), "--runtime", "echo", "--rig", "3090+3060", "--dry-run", env=site)
        assert done.returncode == 5  # 40 GiB on 36
        done = mgpu("run", str(header(LARGE)), "--runtime", "echo", "--rig", "2x3090", "--dry-run", env=site)
        assert done.returncode == 0, done.stderr
        words = done.stdout.split()
        assert "CUDA_VISIBLE_DEVICES=0,1" in words
        assert sum(int(layers) for layers in words[words.index("--layers") + 1].split(",")) == 81

    def test_what_comes_after_the_dashes_is_its_own(
        self, mgpu: Mgpu, header: Header, site: dict[str, str], two_3090: dict[str, str]
    ) -> None:
        """Here: to fail, with the cause that the adapter reads from the log."""
        line = ("run", str(header(SMALL)), "--runtime", "echo", "--prompt", "Hello?", "--", "--hoarse")
        done = mgpu(*line, env=site | two_3090)
        assert done.returncode == 7
        assert "it has lost its voice" in done.stderr
        assert "start it without --hoarse" in done.stderr

    def test_is_listed(self, mgpu: Mgpu, site: dict[str, str]) -> None:
        told = json.loads(mgpu("runtimes", "--json", "--rig", "3090+3060", env=site).stdout)
        row = next(row for row in told["runtimes"] if row["runtime"] == "echo")
        assert (row["found"], row["version"], row["origin"]) == (True, "1.0", "PATH")
        assert row["here"]["modes"] == ["pipeline", "replicas"]

    def test_without_its_runtime(self, mgpu: Mgpu, header: Header, site: dict[str, str]) -> None:
        done = mgpu("run", str(header(SMALL)), "--runtime", "echo", env=site | {"PATH": os.defpath})
        assert done.returncode == 6
        assert "pip install mgpu-adapter-echo" in done.stderr

    def test_without_its_package(self, mgpu: Mgpu, header: Header, site: dict[str, str]) -> None:
        plain = {name: value for name, value in site.items() if name != "PYTHONPATH"}
        done = mgpu("run", str(header(SMALL)), "--runtime", "echo", env=plain)
        assert done.returncode == 2
        assert "there is no runtime 'echo'" in done.stderr
        done = mgpu("run", str(header(SMALL)), "--runtime", "eco", env=site)
        assert done.stderr.splitlines()[0].endswith(", echo")

    def test_is_never_taken_unasked(self, mgpu: Mgpu, header: Header, site: dict[str, str]) -> None:
        done = mgpu("plan", str(header(SMALL)), "--json", env=site)
        assert json.loads(done.stdout)["plan"]["runtime"] == "llama.cpp"


@pytest.mark.skipif(
    importlib.util.find_spec("hatchling") is None, reason="hatchling, which builds it, is not installed"
)
def test_the_examples_wheel_holds_what_it_needs(tmp_path: Path) -> None:
    code = f"import hatchling.build; print(hatchling.build.build_wheel({str(tmp_path)!r}))"
    done = subprocess.run([sys.executable, "-c", code], cwd=EXAMPLE, capture_output=True, text=True, check=True)
    with zipfile.ZipFile(tmp_path / done.stdout.splitlines()[-1]) as wheel:
        names = set(wheel.namelist())
        points = wheel.read("mgpu_adapter_echo-1.0.dist-info/entry_points.txt").decode()
    assert {"mgpu_adapter_echo.py", "echo_server.py"} <= names
    assert f"[{GROUP}]\necho = mgpu_adapter_echo:Echo" in points


@pytest.fixture(autouse=True)
def _forgotten() -> Iterator[None]:
    """Modules of packages that were only there for one test."""
    before = set(sys.modules)
    yield
    for name in set(sys.modules) - before:
        if name.startswith("mgpu_") and not name.startswith(("mgpu_adapters", "mgpu_profiles")):
            del sys.modules[name]
