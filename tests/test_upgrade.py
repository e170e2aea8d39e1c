"""What earlier versions have written is read, used and rewritten without loss (tests/data/state-*, real files)."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import pytest

from launching import House
from mgpu.launch.digests import sha256
from mgpu.launch.locks import Lock
from mgpu.launch.records import Record, from_text, to_text
from mgpu_profiles.rigs import format_rig, parse_rig
from mgpu_profiles.store import Store

STATES: Final = tuple(sorted((Path(__file__).parent / "data").glob("state-*")))
MODEL: Final = "Qwen2.5-0.5B-Instruct-Q4_K_M"


@pytest.fixture(params=STATES, ids=lambda path: str(path.name))
def old(request: pytest.FixtureRequest, house: House) -> House:
    """A house in which an earlier version has lived."""
    written: Path = request.param
    for name in ("cache", "config", "state"):
        shutil.copytree(written / name, house.folder / name)
    for path in _files(house):
        path.write_text(path.read_text(encoding="utf-8").replace("@HOUSE@", str(house.folder)), encoding="utf-8")
        path.chmod(0o600)
    return house


def _files(house: House) -> Iterator[Path]:
    for name in ("cache", "config", "state"):
        yield from (path for path in (house.folder / name).rglob("*") if path.is_file())


def _profile(house: House) -> Path:
    return house.folder / "config" / "mgpu" / "rigs" / "home.toml"


def test_there_is_a_state_to_read() -> None:
    assert STATES


def test_its_profile_is_the_default_and_its_figures_are_used(old: House) -> None:
    told = json.loads(old.call("plan", old.model, "--json").stdout)
    assert (told["rig"]["name"], told["rig"]["source"]) == ("home", "profile")
    assert told["plan"]["tok_s"]["expected"] == pytest.approx(310.0)
    assert "measured" in old.call("run", old.model, "--prompt", "Hello?").stderr
    assert old.call("rig", "check").returncode == 0


def test_its_profile_is_rewritten_to_the_byte(old: House) -> None:
    """And with it, can be read by the version that wrote it."""
    text = _profile(old).read_text(encoding="utf-8")
    rig = parse_rig(text, "home.toml")
    assert [measured.tok_s for measured in rig.measured] == [310.0, 310.0]
    assert format_rig(rig) == text
    assert Store(old.folder / "config" / "mgpu").load("home") == rig


def test_a_bench_keeps_what_was_measured_before(old: House) -> None:
    before = parse_rig(_profile(old).read_text(encoding="utf-8"), "home.toml")
    env = {"FAKE_SERVER": "--tok-s 250,240,240,240"}
    done = old.call("bench", old.model, "--quick", "-r", "1", "--kv-type", "q8_0", env=env)
    assert done.returncode == 0, done.stderr
    after = parse_rig(_profile(old).read_text(encoding="utf-8"), "home.toml")
    assert set(before.measured) < set(after.measured)
    assert {measured.kv_type for measured in set(after.measured) - set(before.measured)} == {"q8_0"}
    assert (after.gpus, after.ram_bytes) == (before.gpus, before.ram_bytes)


def test_its_reports_of_memory_go_on(old: House) -> None:
    path = old.state / "measured.jsonl"
    before = path.read_text().splitlines()
    assert old.call("run", old.model, "--prompt", "Hello?").returncode == 0
    after = path.read_text().splitlines()
    assert after[: len(before)] == before
    assert len(after) == len(before) + 1
    keys = [_keys(json.loads(line)) for line in after]
    assert keys[0] <= keys[-1]  # whoever reads them finds what was there


def _keys(told: Any, at: str = "") -> set[str]:
    if isinstance(told, dict):
        return {f"{at}.{key}" for key in told if at != ".devices.planned"} | {
            inner
            for key, value in told.items()
            if key not in {"planned", "reported"}
            for inner in _keys(value, f"{at}.{key}")
        }
    if isinstance(told, list):
        return {inner for value in told for inner in _keys(value, at)}
    return set()


def test_its_caches_are_kept_and_added_to(old: House) -> None:
    caches = old.folder / "cache" / "mgpu"
    probes, digests = (json.loads((caches / name).read_text()) for name in ("probes.json", "digests.json"))
    assert old.call("run", old.model, "--prompt", "Hello?").returncode == 0
    now = json.loads((caches / "probes.json").read_text())
    assert probes.items() < now.items()
    (identity, digest) = next(iter(digests.items()))
    path, _, rest = identity.partition("|")
    n_bytes, mtime_ns, inode = map(int, rest.split("|"))
    assert (n_bytes > 0, mtime_ns > 0, inode > 0, len(digest)) == (True, True, True, 64)
    assert path == str(old.folder / "machine.toml")
    sha256(Path(old.folder / "machine.toml"), told=lambda _done, _total: True, cache=caches / "digests.json")
    assert digests.items() < json.loads((caches / "digests.json").read_text()).items()


def test_its_logs_are_ours_to_keep_and_no_launches(old: House) -> None:
    logs = sorted((old.state / "logs").iterdir())
    assert old.launches() == []
    old.detach()
    assert set(logs) < set((old.state / "logs").iterdir())
    assert old.call("stop").returncode == 0
    old.assert_clean()


@pytest.mark.parametrize("mode", [0o755, 0o775])
def test_a_state_directory_that_others_could_use_is_used(old: House, mode: int) -> None:
    """As a umask of 022 or 002 had made it; others can write to it no more."""
    old.state.chmod(mode)
    old.detach("--name", "chat")
    assert old.launch()["state"] == "ready"
    assert old.state.stat().st_mode & 0o777 == 0o755
    assert (old.state / "launches").stat().st_mode & 0o777 == 0o700
    assert old.call("stop").returncode == 0


@pytest.mark.parametrize(
    "told",
    [
        pytest.param({"name": "chat"}, id="nothing but a name"),
        pytest.param({"name": "chat", "schema": 7, "moods": {"today": []}, "state": "ready"}, id="keys of a newer one"),
        pytest.param({"name": "chat", "state": "dreaming"}, id="a state of a newer one"),
        pytest.param({"name": "chat", "cards": 3}, id="nonsense"),
        pytest.param([], id="no object"),
    ],
)
def test_records_of_other_versions_are_shown_and_cleared_away(house: House, told: object) -> None:
    """Of one that lives, and when it has ended."""
    folder = house.state / "launches"
    folder.mkdir(parents=True, mode=0o700)
    (folder / "chat.json").write_text(json.dumps(told))
    lock = Lock.try_take(folder / "chat.lock")
    assert lock is not None
    lock.write(f"{os.getpid()} nobody\n")
    assert [(one["name"], one["alive"]) for one in house.launches()] == [("chat", True)]
    assert house.call("ps").stdout.splitlines()[2].startswith("chat ")
    refused = house.call("run", house.model, "--detach", "--name", "chat")
    assert (refused.returncode, "there is a launch called chat" in refused.stderr) == (2, True)
    lock.release()
    assert house.launches() == []
    house.assert_clean()


def test_what_a_newer_version_knows_survives_our_reading() -> None:
    """It is only ever written by the one that holds its lock."""
    text = json.dumps({**json.loads(to_text(Record(name="chat", model="m"))), "sparkles": 1}).encode()
    record = from_text(text)
    assert record is not None
    assert record.model == "m"
