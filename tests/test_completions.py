"""The completion scripts in the repository are those that mgpu prints, and they complete what a person expects."""

from __future__ import annotations

from pathlib import Path

import pytest

from conftest import Mgpu
from mgpu.cli import cli
from mgpu.shells import FILES, script

_FOLDER = Path(__file__).parents[1] / "completions"


@pytest.mark.parametrize("shell", FILES)
def test_committed_scripts_are_current(shell: str) -> None:
    assert (_FOLDER / FILES[shell]).read_text(encoding="utf-8") == script(shell, cli), "run `make docs`"


@pytest.mark.parametrize("shell", FILES)
def test_printed_by_the_command(mgpu: Mgpu, shell: str) -> None:
    done = mgpu("completions", shell)
    assert done.returncode == 0
    assert done.stdout == script(shell, cli)


@pytest.mark.parametrize(
    ("words", "found"),
    [
        pytest.param("mgpu run m.gguf --rig 2x30", "2x3090-nvlink", id="rig"),
        pytest.param("mgpu run m.gguf --runtime l", "llama.cpp", id="runtime"),
        pytest.param("mgpu rig use 4", "4060ti-16", id="rig use"),
        pytest.param("mgpu p", "plan", id="command"),
    ],
)
def test_dynamic(mgpu: Mgpu, words: str, found: str) -> None:
    env = {"_MGPU_COMPLETE": "bash_complete", "COMP_WORDS": words, "COMP_CWORD": str(len(words.split()) - 1)}
    assert f"plain,{found}" in mgpu(env=env).stdout.splitlines()
