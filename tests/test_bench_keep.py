"""Where measured figures go: which profile, beside what a person wrote there, and back to the right cards."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mgpu.bench.keep import NEW_NAME, Ground, find_ground, keep_measured, replaced
from mgpu.errors import ProfileError
from mgpu.rig import Gpu, Measured, Rig
from mgpu.units import GIB, MIB
from mgpu_profiles.match import as_profiled, merge
from mgpu_profiles.rigs import format_rig, parse_rig, with_measured
from mgpu_profiles.store import BUNDLED, Store


def gpu(index: int, model: str = "3090", **given: Any) -> Gpu:
    size = {"3090": 24576, "3060": 12288}[model] * MIB
    facts: dict[str, Any] = {"name": f"NVIDIA GeForce RTX {model}", "vendor": "nvidia", "uuid": f"GPU-{model}-{index}"}
    return Gpu(index=index, total_bytes=size, free_bytes=size - 300 * MIB, **(facts | given))


def machine(*gpus: Gpu) -> Rig:
    return Rig(name="this machine", source="detected", gpus=gpus, ram_bytes=64 * GIB, ram_free_bytes=60 * GIB)


def figure(*gpus: int, tok_s: float = 100.0, **given: Any) -> Measured:
    facts: dict[str, Any] = {
        "model": "Llama 3.1 8B Instruct",
        "architecture": "llama",
        "quantization": "Q4_K_M",
        "weights_bytes": 4912898304,
        "runtime": "llama.cpp",
        "version": "b11434",
        "mode": "pipeline",
        "counts": tuple(33 // len(gpus) for _ in gpus),
        "depth": 576,
        "date": "2026-11-23T17:33:41Z",
    }
    return Measured(gpus=gpus, tok_s=tok_s, **(facts | given))


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "config")


def ground_of(store: Store, here: Rig, **asked: Any) -> Ground:
    return find_ground(store, here, **({"rig_name": None, "save_as": None, "keep": True} | asked))


class TestWhichProfile:
    """Known, and refused if need be, before anything is measured."""

    def test_without_any_a_new_one_that_becomes_the_default(self, store: Store) -> None:
        ground = ground_of(store, machine(gpu(0), gpu(1)))
        assert ground.rig == machine(gpu(0), gpu(1))
        saved = keep_measured(store, ground, [figure(0), figure(0, 1)])
        assert saved.path == store.root / "rigs" / f"{NEW_NAME}.toml"
        assert store.default() == NEW_NAME
        assert store.load(NEW_NAME).measured == (figure(0), figure(0, 1))

    def test_the_default_one(self, store: Store) -> None:
        store.save(machine(gpu(0, reserve_bytes=512 * MIB)), "home")
        store.use("home")
        ground = ground_of(store, machine(gpu(0)))
        assert ground.rig.gpus[0].reserve_bytes == 512 * MIB
        keep_measured(store, ground, [figure(0)])
        assert store.load("home").measured == (figure(0),)
        assert store.default() == "home"
        assert [profile.name for profile in store.names() if profile.origin == "user"] == ["home"]

    def test_a_default_that_is_another_machine_is_left_alone(self, store: Store) -> None:
        store.save(machine(gpu(0), gpu(1)), "server")
        store.use("server")
        ground = ground_of(store, machine(gpu(5, "3060")))
        assert "'server' is not this machine" in ground.notes[0]
        keep_measured(store, ground, [figure(5)])
        assert store.load("server").measured == ()
        assert store.load(NEW_NAME).measured == (figure(0),)  # by position
        assert store.default() == NEW_NAME

    def test_a_named_one(self, store: Store) -> None:
        store.save(machine(gpu(0)), "home")
        keep_measured(store, ground_of(store, machine(gpu(0)), rig_name="home"), [figure(0)])
        assert store.load("home").measured == (figure(0),)
        assert store.default() is None

    def test_a_file(self, store: Store, tmp_path: Path) -> None:
        path = tmp_path / "mine.toml"
        path.write_text(f"# by hand\n{format_rig(msgspec.structs.replace(machine(gpu(0)), name='mine'))}")
        keep_measured(store, ground_of(store, machine(gpu(0)), rig_name=str(path)), [figure(0)])
        assert path.read_text().startswith("# by hand\n")
        assert store.load(str(path)).measured == (figure(0),)

    def test_a_bundled_one_becomes_the_users_with_its_comments(self, store: Store) -> None:
        here = machine(gpu(0), gpu(1))
        saved = keep_measured(store, ground_of(store, here, rig_name="2x3090"), [figure(0, 1)])
        assert "bundled" in saved.warnings[0]
        assert saved.path.read_text().startswith((BUNDLED / "2x3090.toml").read_text().splitlines()[0])
        assert store.load("2x3090").measured == (figure(0, 1),)

    @pytest.mark.parametrize("asked", [{"rig_name": "home"}, {"save_as": "home"}])
    def test_a_named_one_that_is_another_machine(self, store: Store, asked: dict[str, str]) -> None:
        store.save(machine(gpu(0), gpu(1)), "home")
        with pytest.raises(ProfileError, match="'home' is not this machine") as caught:
            ground_of(store, machine(gpu(0)), **asked)
        assert caught.value.exit_code == 8
        assert "--save NAME" in caught.value.hint

    def test_another_name(self, store: Store) -> None:
        store.save(machine(gpu(0, reserve_bytes=512 * MIB)), "home")
        ground = ground_of(store, machine(gpu(0)), rig_name="home", save_as="fast")
        keep_measured(store, ground, [figure(0)])
        assert store.load("home").measured == ()
        assert store.load("fast").measured == (figure(0),)
        assert store.load("fast").gpus[0].reserve_bytes == 512 * MIB
        assert store.default() == "fast"

    @pytest.mark.parametrize("name", ["../x", "", "x.toml"])
    def test_a_name_that_is_none(self, store: Store, name: str) -> None:
        with pytest.raises(ProfileError, match="not a profile name"):
            ground_of(store, machine(gpu(0)), save_as=name)

    @pytest.mark.parametrize("name", ["home", NEW_NAME])
    def test_never_one_that_cannot_be_read(self, store: Store, name: str) -> None:
        path = store.root / "rigs" / f"{name}.toml"
        path.parent.mkdir(parents=True)
        path.write_text("a newer version's\n")
        with pytest.raises(ProfileError):
            ground_of(store, machine(gpu(0)), save_as=name)
        with pytest.raises(ProfileError):
            ground_of(store, machine(gpu(0)), rig_name=name)
        assert path.read_text() == "a newer version's\n"

    def test_one_that_is_broken_while_we_measure(self, store: Store) -> None:
        saved = store.save(machine(gpu(0)), "home")
        ground = ground_of(store, machine(gpu(0)), rig_name="home")
        saved.path.write_text("half a line")
        with pytest.raises(ProfileError):
            keep_measured(store, ground, [figure(0)])
        assert saved.path.read_text() == "half a line"

    def test_none_at_all(self, store: Store) -> None:
        store.save(machine(gpu(0, reserve_bytes=512 * MIB)), "home")
        store.use("home")
        ground = ground_of(store, machine(gpu(0)), keep=False)
        assert ground.destination is None
        assert ground.rig.gpus[0].reserve_bytes == 512 * MIB


class TestAgain:
    def test_the_same_placement_once_more(self) -> None:
        other = figure(0, 1)
        older = (figure(0, tok_s=90, version="b9000", depth=100, date="2026-01-01"), other)
        assert replaced(older, [figure(0, tok_s=110)]) == (other, figure(0, tok_s=110))

    @pytest.mark.parametrize(
        "given",
        [
            {"model": "Qwen"},
            {"quantization": "Q8_0"},
            {"weights_bytes": 1},
            {"runtime": "vllm"},
            {"mode": "tensor"},
            {"counts": (32,)},
            {"host_layers": 1},
            {"host_experts": 1},
            {"kv_type": "q8_0"},
            {"depth": 4096},
        ],
    )
    def test_anything_else_is_another(self, given: dict[str, Any]) -> None:
        assert len(replaced([figure(0)], [figure(0, **given)])) == 2


orders = st.permutations(range(4))


@given(order=orders, used=st.lists(st.lists(st.integers(0, 3), unique=True, max_size=4).map(tuple), max_size=4))
def test_figures_follow_their_cards_into_a_profile_and_back(order: list[int], used: list[tuple[int, ...]]) -> None:
    """The profile has the machine's cards in another order."""
    here = machine(*(gpu(index) for index in range(4)))
    profile = machine(*(msgspec.structs.replace(here.gpus[place], index=at) for at, place in enumerate(order)))
    figures = tuple(figure(*cards, tok_s=float(n + 1)) for n, cards in enumerate(used))
    kept = as_profiled(profile, here, figures)
    for ours, theirs in zip(figures, kept, strict=True):
        assert [here.gpus[at].uuid for at in ours.gpus] == [profile.gpus[at].uuid for at in theirs.gpus]
    assert merge(msgspec.structs.replace(profile, measured=kept), here).measured == figures


def test_figures_of_a_card_that_has_gone_are_left_out() -> None:
    profile = machine(gpu(0), gpu(1, enabled=False))
    known = msgspec.structs.replace(profile, measured=(figure(0), figure(0, 1)))
    assert merge(known, machine(gpu(0))).measured == (figure(0),)


class TestText:
    """A profile is a person's file."""

    BY_HAND = """\
# My rig.
schema = 1
name = "home"   # the one under the desk
host = { ram_gib = 64 }

[[measured]]
model = "old"
architecture = "llama"
quantization = "Q4_0"
weights_bytes = 1
runtime = "llama.cpp"
version = "b1"
mode = "pipeline"
gpus = [0]
# before the new fan
counts = [33]
kv_type = "f16"
depth = 1
tok_s = 1
date = "2026-01-01"

# Mind the 12V cable.
[[gpu]]
name = "NVIDIA GeForce RTX 3090"
vram_mib = 24576
"""

    def test_all_that_is_not_measured_stays_as_written(self) -> None:
        text = with_measured(self.BY_HAND, (figure(0),), "home.toml")
        kept = [line for line in self.BY_HAND.splitlines() if line]
        block = slice(kept.index("[[measured]]"), kept.index("# Mind the 12V cable."))
        kept[block] = ["# before the new fan"]
        assert [line for line in text.splitlines() if line][: len(kept)] == kept
        assert parse_rig(text, "home.toml").measured == (figure(0),)

    def test_none_are_left_when_none_are_given(self) -> None:
        text = with_measured(self.BY_HAND, (), "home.toml")
        assert "measured" not in text
        assert parse_rig(text, "home.toml").measured == ()

    def test_what_is_written_in_another_way_is_not_lost(self) -> None:
        inline = self.BY_HAND.replace("[[measured]]", "[[was]]").split("[[was]]")[0]
        odd = inline + "measured = []\n" + self.BY_HAND[self.BY_HAND.index("# Mind") :]
        rig = parse_rig(odd, "home.toml")
        text = with_measured(odd, (figure(0),), "home.toml")
        assert parse_rig(text, "home.toml") == msgspec.structs.replace(rig, measured=(figure(0),))

    @given(n=st.integers(0, 5), times=st.integers(1, 3))
    def test_any_number_any_number_of_times(self, n: int, times: int) -> None:
        figures = tuple(figure(0, tok_s=i + 0.5, kv_type=f"t{i}") for i in range(n))
        text = self.BY_HAND
        for _ in range(times):
            text = with_measured(text, figures, "home.toml")
        assert parse_rig(text, "home.toml").measured == figures
        assert text.count("# Mind the 12V cable.") == 1

    @pytest.mark.parametrize(
        ("wrong", "key"),
        [
            ("counts = [20, 13]", "measured[0].counts"),
            ("counts = [-1]", "measured[0].counts[0]"),
            ("gpus = [1]", "measured[0].gpus"),
            ("gpus = [0, 0]", "measured[0].gpus"),
            ('tok_s = "1"', "measured[0].tok_s"),
            ("tok_s = 0", "measured[0].tok_s"),
            ('mode = "row"', "measured[0].mode"),
            ("date = 2026-01-01", "measured[0].date"),
            ('runtime = "ik_llama"', "measured[0].runtime"),
        ],
    )
    def test_a_wrong_value_is_named(self, wrong: str, key: str) -> None:
        field = wrong.partition(" = ")[0]
        line = next(line for line in self.BY_HAND.splitlines() if line.startswith(f"{field} = "))
        with pytest.raises(ProfileError) as caught:
            parse_rig(self.BY_HAND.replace(line, wrong), "home.toml")
        assert caught.value.message.startswith(f"home.toml: {key} = ")
        assert "\n" not in caught.value.message

    def test_an_unknown_key_is_named(self) -> None:
        with pytest.raises(ProfileError, match=r"unknown key measured\[0\]\.tok_sec \(did you mean tok_s\?\)"):
            parse_rig(self.BY_HAND.replace("tok_s = 1", "tok_sec = 1"), "home.toml")
