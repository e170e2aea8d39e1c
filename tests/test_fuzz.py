"""A short run of every fuzzing target, its corpus first; `make fuzz` is the long one. See docs/fuzzing.md."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from random import Random
from typing import Any, Final

import pytest

from fuzz.mutate import mutate
from fuzz.run import replay
from fuzz.target import CORPUS, Target
from fuzz.targets import TARGETS

ROOT: Final = Path(__file__).parents[1]
PATHS: Final = os.pathsep.join(str(ROOT / name) for name in ("tests", "launcher", "adapters", "profiles"))
INPUTS: Final = 200  # for a cheap parser
MOST_CORPUS: Final = 400_000


@pytest.fixture(scope="session")
def outcomes() -> dict[str, dict[str, Any]]:
    """Of one process without threads, which forks: the children of pytest itself would be no good ones."""
    done = subprocess.run(
        [sys.executable, "-m", "fuzz", "--json", "-n", str(INPUTS), "--seed", "suite"],
        env={**os.environ, "PYTHONPATH": PATHS},
        capture_output=True,
        encoding="utf-8",
        timeout=300,
        check=False,
    )
    assert done.returncode in {0, 1}, done.stderr
    return {told["target"]: told for told in map(json.loads, done.stdout.splitlines())}


@pytest.mark.parametrize("name", [target.name for target in TARGETS])
def test_nothing_is_found(name: str, outcomes: dict[str, dict[str, Any]]) -> None:
    told = outcomes[name]
    assert told["found"] == []
    assert told["n"] >= 3


def test_every_target_meets_inputs_that_it_takes_and_that_it_refuses(outcomes: dict[str, dict[str, Any]]) -> None:
    """Else it would only knock on the door. (Real answers are rare among what is sent over HTTP.)"""
    untaken = {name for name, told in outcomes.items() if not told["kinds"].get("taken")}
    assert untaken <= {"argument", "http-remote", "gguf-set", "http-measure"}
    refusing = [target.name for target in TARGETS if target.refuses]
    assert [name for name in refusing if set(outcomes[name]["kinds"]) <= {"taken"}] == []


def test_the_corpus_is_small_and_each_part_has_a_target() -> None:
    files = [path for path in CORPUS.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < MOST_CORPUS
    assert {path.parent.name for path in files} <= {target.name for target in TARGETS}
    assert len({target.name for target in TARGETS}) == len(TARGETS)


# The runner itself: what it is to find, it finds.


def _flawed(data: bytes) -> None:
    if data == b"raises":
        raise KeyError(data)
    if data == b"spins":
        while True:
            pass
    if data == b"eats":
        bytearray(1 << 34)
    if data == b"dies":
        os.kill(os.getpid(), 11)
    if data == b"writes":
        with Path("large").open("wb") as file:
            file.truncate(1 << 30)


INPUTS_OF_ALL_KINDS: Final = (b"fine", b"raises", b"fine", b"eats", b"writes", b"dies", b"fine", b"spins", b"fine")


def test_the_runner_finds_what_there_is() -> None:
    target = Target(name="flawed", check=_flawed, batch=4, cpu_s=1, alone_s=1)
    outcome = replay(target, INPUTS_OF_ALL_KINDS)
    found = {finding.data: finding.place for finding in outcome.findings.values()}
    assert set(found) == {b"raises", b"eats", b"writes", b"dies", b"spins"}
    assert found[b"raises"].startswith("KeyError at test_fuzz.py")
    assert found[b"eats"].startswith("MemoryError")
    assert found[b"writes"].startswith("OSError")
    assert found[b"dies"] == "SIGSEGV"
    assert "too long" in found[b"spins"]


def test_the_same_seed_makes_the_same_inputs() -> None:
    seen: list[list[bytes]] = []
    for _ in range(2):
        heard: list[bytes] = []
        heard += (mutate(Random(f"x {number}"), (b"a word, 12 and a 7",), (), 100) for number in range(50))
        seen.append(heard)
    assert seen[0] == seen[1]
    assert len(set(seen[0])) > 30
