from __future__ import annotations

from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mgpu.errors import ProfileError
from mgpu.rig import Gpu, Link, Pcie, Rig
from mgpu.units import GIB, MIB
from mgpu_profiles.match import Difference, check, merge
from mgpu_profiles.rigs import format_rig, parse_rig
from mgpu_profiles.store import BUNDLED


def card(index: int, model: str = "3090", **given: Any) -> Gpu:
    vram = {"3090": 24576, "3060": 12288, "4090": 24564}[model]
    facts: dict[str, Any] = {
        "index": index,
        "name": f"NVIDIA GeForce RTX {model}",
        "vendor": "nvidia",
        "total_bytes": vram * MIB,
        "free_bytes": 1000 * MIB,
        "uuid": f"GPU-{index}",
        "pci_bus_id": f"00000000:0{index}:00.0",
        "pcie": Pcie(gen=4, width=8),
        "processes": ("4242 python (3.1 GiB)",),
    }
    return Gpu(**(facts | given))


def machine(*gpus: Gpu, **given: Any) -> Rig:
    facts: dict[str, Any] = {
        "ram_bytes": 62 * GIB,
        "ram_free_bytes": 9 * GIB,
        "cpu_cores": 12,
        "driver": "NVIDIA 580.95",
    }
    return Rig(name="this machine", source="detected", gpus=gpus, **(facts | given))


def profile(*gpus: Gpu, **given: Any) -> Rig:
    bare = tuple(msgspec.structs.replace(gpu, uuid=None, free_bytes=gpu.total_bytes) for gpu in gpus)
    facts: dict[str, Any] = {"name": "home", "source": "profile", "gpus": bare, "ram_bytes": 64 * GIB}
    return Rig(**(facts | given))


def bundled(name: str) -> Rig:
    return parse_rig((BUNDLED / f"{name}.toml").read_text(encoding="utf-8"), name)


def ids(differences: tuple[Difference, ...]) -> list[tuple[str, str]]:
    return [(difference.severity, difference.id) for difference in differences]


class TestCheck:
    @given(
        st.lists(st.sampled_from(["3090", "3060", "4090"]), max_size=5).flatmap(
            lambda models: st.tuples(st.just(models), st.permutations(range(len(models))))
        )
    )
    def test_order_does_not_matter(self, drawn: tuple[list[str], list[int]]) -> None:
        models, order = drawn
        here = [card(index, model, pcie=Pcie(gen=4, width=2**index)) for index, model in enumerate(models)]
        assert (
            check(profile(*(card(at, models[i], pcie=here[i].pcie) for at, i in enumerate(order))), machine(*here))
            == ()
        )

    @given(st.lists(st.sampled_from(["3090", "3060", "4090"]), max_size=5))
    def test_a_saved_machine_matches_itself(self, models: list[str]) -> None:
        here = machine(*(card(index, model) for index, model in enumerate(models)))
        saved = parse_rig(format_rig(msgspec.structs.replace(here, name="home")), "home.toml")
        assert check(saved, here) == ()

    def test_a_missing_card(self) -> None:
        (difference,) = check(profile(card(0), card(1)), machine(card(0)))
        assert (difference.severity, difference.id) == ("error", "missing-card")
        assert "gpu[1], NVIDIA GeForce RTX 3090 (24.0 GiB)" in difference.text

    def test_a_missing_card_that_is_not_used(self) -> None:
        assert ids(check(profile(card(0), card(1, enabled=False)), machine(card(0)))) == [("note", "missing-card")]

    def test_an_extra_card(self) -> None:
        (difference,) = check(profile(card(0)), machine(card(0), card(1, "3060")))
        assert (difference.severity, difference.id) == ("note", "extra-card")
        assert "GPU 1, NVIDIA GeForce RTX 3060" in difference.text

    def test_another_card(self) -> None:
        found = ids(check(profile(card(0)), machine(card(0, "4090"))))
        assert found == [("error", "missing-card"), ("note", "extra-card")]

    def test_a_uuid_is_that_card_and_no_other(self) -> None:
        wanted = profile(card(0), gpus=(card(0, uuid="GPU-old"),))
        difference = check(wanted, machine(card(0)))[0]
        assert (difference.severity, difference.id) == ("error", "missing-card")
        assert "GPU-old" in difference.text

    def test_a_uuid_is_not_taken_by_a_card_without(self) -> None:
        bare, named = profile(card(0)).gpus[0], card(1, uuid="GPU-0")
        assert check(profile(gpus=(bare, named)), machine(card(0), card(1))) == ()

    @pytest.mark.parametrize(
        ("rig", "name"),
        [
            ("3090", "GeForce RTX 3090"),
            ("7900xtx", "Radeon(TM) RX 7900 XTX"),
            ("7900xtx", "AMD Radeon RX 7900 XTX (RADV NAVI31)"),
        ],
    )
    def test_drivers_write_a_name_in_several_ways(self, rig: str, name: str) -> None:
        wanted = bundled(rig)
        listed = msgspec.structs.replace(wanted.gpus[0], name=name, pcie=None)
        assert check(wanted, machine(listed)) == ()

    @pytest.mark.parametrize(
        ("vram", "expected"),
        [
            (24077, []),  # the same card as CUDA counts it
            (12288, [("error", "vram")]),
            (49140, [("note", "vram")]),  # a 48 GB 4090 is more than was asked for
        ],
    )
    def test_size(self, vram: int, expected: list[tuple[str, str]]) -> None:
        here = machine(card(0, "4090", total_bytes=vram * MIB))
        assert ids(check(profile(card(0, "4090")), here)) == expected

    def test_size_decides_between_namesakes(self) -> None:
        small, large = card(0, total_bytes=8 * GIB), card(1, total_bytes=16 * GIB)
        assert check(profile(large, small), machine(small, large)) == ()

    def test_slot(self) -> None:
        (difference,) = check(profile(card(0)), machine(card(0, pcie=Pcie(gen=3, width=4))))
        assert (difference.severity, difference.id) == ("note", "pcie")
        assert "3.0 x4" in difference.text
        assert "4.0 x8" in difference.text

    def test_an_unknown_slot_is_no_difference(self) -> None:
        assert check(profile(card(0)), machine(card(0, pcie=None))) == ()

    def test_a_bridge_that_is_not_there(self) -> None:
        (difference,) = check(bundled("2x3090-nvlink"), machine(card(0), card(1)))
        assert (difference.severity, difference.id) == ("note", "link")
        assert "joined by pcie; the profile says nvlink" in difference.text

    def test_a_bridge_that_the_profile_does_not_know(self) -> None:
        here = machine(card(3), card(5), links=(Link(gpus=(3, 5), kind="nvlink"),))
        (difference,) = check(bundled("2x3090"), here)
        assert difference.text == "GPUs 3 and 5 are joined by nvlink; the profile says pcie"

    @pytest.mark.parametrize(("ram", "expected"), [(62, []), (58, []), (32, [("note", "ram")])])
    def test_ram(self, ram: int, expected: list[tuple[str, str]]) -> None:
        assert ids(check(profile(), machine(ram_bytes=ram * GIB))) == expected

    def test_errors_come_first(self) -> None:
        found = check(profile(card(0), card(1, "3060")), machine(card(0, pcie=Pcie(gen=1, width=1))))
        assert ids(found) == [("error", "missing-card"), ("note", "pcie")]


class TestMerge:
    def test_live_from_the_machine_and_wishes_from_the_profile(self) -> None:
        wanted = profile(
            card(0, reserve_bytes=512 * MIB, bandwidth_bytes_per_s=900 * 10**9),
            card(1, enabled=False),
            links=(Link(gpus=(0, 1), kind="pcie-p2p"),),
            ram_bandwidth_bytes_per_s=51 * 10**9,
            cpu_cores=8,
            psu_watts=1200,
        )
        here = machine(card(4), card(7, display=True))
        rig = merge(wanted, here)
        assert rig == Rig(
            name="home",
            source="profile",
            gpus=(
                msgspec.structs.replace(here.gpus[0], reserve_bytes=512 * MIB, bandwidth_bytes_per_s=900 * 10**9),
                msgspec.structs.replace(here.gpus[1], enabled=False),
            ),
            links=(Link(gpus=(4, 7), kind="pcie-p2p"),),
            ram_bytes=62 * GIB,
            ram_free_bytes=9 * GIB,
            ram_bandwidth_bytes_per_s=51 * 10**9,
            cpu_cores=12,
            psu_watts=1200,
            driver="NVIDIA 580.95",
        )

    def test_links_keep_to_their_cards_in_another_order(self) -> None:
        bridge, crossed = Link(gpus=(1, 2), kind="nvlink", n_links=4), Link(gpus=(0, 1), kind="pcie-p2p")
        wanted = profile(card(0, "3060"), card(1), card(2), links=(bridge, crossed))
        rig = merge(wanted, machine(card(0), card(1), card(2, "3060")))
        assert rig.links == (Link(gpus=(0, 1), kind="nvlink", n_links=4), Link(gpus=(0, 2), kind="pcie-p2p"))

    def test_a_card_the_profile_does_not_name_is_left_out(self) -> None:
        rig = merge(bundled("3090"), machine(card(0, "3060"), card(1)))
        assert [(gpu.index, gpu.enabled) for gpu in rig.gpus] == [(0, False), (1, True)]

    def test_a_card_that_cannot_be_used_stays_so(self) -> None:
        rig = merge(bundled("3090"), machine(card(0, enabled=False)))
        assert not rig.gpus[0].enabled

    def test_what_the_machine_does_not_tell_comes_from_the_profile(self) -> None:
        rig = merge(bundled("3090"), machine(card(0, pcie=None, uuid=None), cpu_cores=None))
        assert rig.gpus[0].pcie == Pcie(gen=4, width=16)
        assert rig.gpus[0].power_limit_watts == 350
        assert rig.cpu_cores == bundled("3090").cpu_cores

    def test_links_of_missing_cards_are_dropped(self) -> None:
        wanted = profile(card(0), card(1, enabled=False), links=(Link(gpus=(0, 1), kind="nvlink"),))
        assert merge(wanted, machine(card(0))).links == ()

    def test_the_way_over_pcie_is_the_machines(self) -> None:
        here = machine(
            *(card(index) for index in range(3)),
            links=(Link(gpus=(0, 1), kind="nvlink", n_links=4, path="PHB"), Link(gpus=(0, 2), kind="pcie", path="SYS")),
        )
        wanted = profile(
            *(card(index) for index in range(3)),
            links=(Link(gpus=(0, 2), kind="pcie-p2p", path="PIX"), Link(gpus=(1, 2), kind="pcie", path="PXB")),
        )
        assert merge(wanted, here).links == (
            Link(gpus=(0, 1), kind="pcie", path="PHB"),  # the profile knows of no bridge
            Link(gpus=(0, 2), kind="pcie-p2p", path="SYS"),
            Link(gpus=(1, 2), kind="pcie", path="PXB"),
        )

    def test_a_profile_may_wake_the_processors_graphics(self) -> None:
        """If the runtime has a name for them; and only a profile that knows them."""
        resting = card(1, "3060", uuid=None, integrated=True, enabled=False)
        named = msgspec.structs.replace(resting, device="Vulkan1")
        asleep = msgspec.structs.replace(named, enabled=False)
        awake = msgspec.structs.replace(named, enabled=True)
        for wanted, here, enabled in ((awake, named, True), (asleep, named, False), (awake, resting, False)):
            assert merge(profile(card(0), wanted), machine(card(0), here)).gpus[1].enabled is enabled
        assert check(profile(card(0)), machine(card(0), named)) == ()
        assert not merge(profile(card(0)), machine(card(0), named)).gpus[1].enabled

    def test_no_match(self) -> None:
        with pytest.raises(ProfileError) as caught:
            merge(bundled("4x3090"), machine(card(0), card(1, "3060")))
        assert caught.value.message == (
            "profile '4x3090' is not this machine: "
            "gpu[1], NVIDIA GeForce RTX 3090 (24.0 GiB), is not in this machine (and 2 more)"
        )
        assert "mgpu rig check 4x3090" in caught.value.hint
