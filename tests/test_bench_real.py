"""`mgpu bench` with a real llama-server and a real model: what is measured is kept, and the next plan says it."""

from __future__ import annotations

import json
import os
from pathlib import Path

import psutil
import pytest

from conftest import Mgpu
from mgpu_profiles.store import Store

_FEW = ("--n-prompt", "64", "--n-gen", "16", "--repetitions", "2")


def _store() -> Store:
    return Store(Path(os.environ["XDG_CONFIG_HOME"]) / "mgpu")


@pytest.mark.runtime
def test_on_the_cpu_then_planned_as_measured(mgpu: Mgpu, real_gguf: Path, llama_server: str, tmp_path: Path) -> None:
    model = tmp_path / "a model of this test.gguf"
    model.symlink_to(real_gguf)
    env = {"MGPU_LLAMA_SERVER": llama_server}
    done = mgpu("bench", str(model), *_FEW, "--json", env=env, timeout=300)
    assert done.returncode == 0, done.stderr
    (case,) = json.loads(done.stdout)["cases"]
    assert case["gpus"] == []
    assert len(case["samples"]) == 2
    assert case["prompt_tok_s"] > case["tok_s"] > 0
    (kept,) = _store().load("this-machine").measured
    assert (kept.tok_s, kept.depth) == (case["tok_s"], 72)
    planned = json.loads(mgpu("plan", str(model), "--json", env=env).stdout)
    assert planned["plan"]["tok_s"]["expected"] == pytest.approx(case["tok_s"], rel=0.01)
    assert "tok/s measured" in mgpu("plan", str(model), env=env).stdout
    assert not [p for p in psutil.process_iter(["cmdline"]) if str(model) in (p.info["cmdline"] or [])]
