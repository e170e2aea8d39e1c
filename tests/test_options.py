"""Placements weighed on rigs where one card is in the way of another: busy, slow, or in a slow slot."""

from __future__ import annotations

from collections.abc import Callable
from itertools import combinations
from pathlib import Path

import pytest
from msgspec.structs import replace

from mgpu.decide.choose import choose, speed_by_room
from mgpu.plan import Alternative, Plan
from mgpu.request import Request
from mgpu.rig import Gpu, Link, Pcie
from mgpu.units import GIB, MIB
from mgpu_adapters.llamacpp.adapter import LlamaCpp
from planning import card, decide, read, rig_named, rig_of, verdict

Header = Callable[[str], Path]

SMALL = "Llama-3.1-8B-Instruct-Q4_K_M"  # 4.6 GiB
MIDDLE = "Qwen2.5-32B-Instruct-Q4_K_M"  # 18.5 GiB
LARGE = "Llama-3.3-70B-Instruct-Q4_K_M"  # 39.6 GiB
MOE = "Qwen3-30B-A3B-Q4_K_M"


def busy(gpu: Gpu, free: int = 200 * MIB) -> Gpu:
    return replace(gpu, free_bytes=free)


def other(plan: Plan, *gpus: int) -> Alternative:
    return next(found for found in plan.alternatives if found.gpus == gpus)


class TestABusyCard:
    def test_does_not_keep_the_others_from_helping(self, header: Header) -> None:
        """The fastest card is full: the model goes to the next and the CPU, not to the CPU alone."""
        plan = decide(header(MIDDLE), rig_of(busy(card(0, 32, 1792)), card(1, 12, 360)))
        assert plan.placement == "offload"
        assert plan.layout.gpus == (1,)

    @pytest.mark.parametrize("faster", [1, 3, 10])
    def test_a_faster_full_card_changes_nothing(self, header: Header, faster: int) -> None:
        cards = (card(1, 12, 360), card(2, 12, 360))
        plans = [decide(header(MOE), rig_of(busy(card(0, 12, 360 * n)), *cards), users=4) for n in (1, faster)]
        assert plans[0].layout == plans[1].layout
        assert plans[0].refusal is None


def test_of_equally_fast_splits_the_one_without_a_slow_slot(header: Header) -> None:
    riser, fast = Pcie(gen=3, width=1), Pcie(gen=4, width=8)
    rig = rig_of(card(0, 24, 936, pcie=riser), card(1, 24, 936, pcie=fast), card(2, 24, 936, pcie=fast))
    assert decide(header(LARGE), rig).layout.gpus == (1, 2)
    ranks = decide(header(LARGE), rig, split="tensor")
    assert ranks.refusal is None
    assert ranks.layout.gpus == (1, 2)


def test_ranks_that_may_be_chosen_come_before_faster_ones_that_may_not(header: Header) -> None:
    """Two bridged cards hold it; that a third, not bridged, would be faster still must not hide them."""
    cards = tuple(card(i, 24, 300, pcie=Pcie(gen=4, width=16)) for i in range(3))
    bridged = replace(rig_of(*cards), links=(Link(gpus=(0, 1), kind="nvlink"),))
    for users in (1, 2):
        plan = decide(header(LARGE), bridged, users=users, ctx=2048)
        assert (plan.placement, plan.layout.gpus) == ("tensor", (0, 1))


def test_what_is_told_of_split_tensor_is_what_it_does(header: Header) -> None:
    told = decide(header(LARGE), "4x3090")
    asked = decide(header(LARGE), "4x3090", split="tensor")
    offered = next(found for found in told.alternatives if found.placement == "tensor")
    assert asked.layout.gpus == offered.gpus


class TestOneSlowCardHoldsIt:
    """Two RTX 4080 would be faster than the P40 that holds the model alone."""

    @pytest.fixture
    def plan(self, header: Header) -> Plan:
        return decide(header(MIDDLE), rig_of(card(0, 16, 717), card(1, 16, 717), card(2, 24, 346)))

    def test_it_is_said_and_not_called_needless(self, plan: Plan) -> None:
        assert plan.layout.gpus == (2,)
        said = verdict(plan, "fits-one-card")
        assert said is not None
        assert "would be faster" in said.text
        assert "--split pipeline --force" in said.text
        assert "needless" not in said.text + other(plan, 0, 1).why_not

    def test_a_split_that_cannot_be_is_not_told(self, header: Header) -> None:
        """The two fastest cards together have 16 GiB: what is compared is the split over all three."""
        plan = decide(header(MIDDLE), rig_of(card(0, 8, 717), card(1, 8, 717), card(2, 24, 346)))
        splits = [found.gpus for found in plan.alternatives if found.placement == "pipeline"]
        assert splits == [(0, 1, 2)]


class TestAfterTheDashes:
    def test_proportions_of_ranks_are_ranks(self, header: Header) -> None:
        plan = decide(header(LARGE), "2x3090", runtime_args=("-sm", "tensor", "-ts", "1,1"))
        assert plan.placement == "tensor"
        assert plan.tensor_split is None
        assert plan.devices == decide(header(LARGE), "2x3090", split="tensor").devices

    def test_a_needless_mode_wins_and_is_warned_of(self, header: Header) -> None:
        """Flags after `--` win; the rule they contradict is named. `--split tensor` itself is refused."""
        plan = decide(header(SMALL), "2x3090", runtime_args=("-sm", "tensor"))
        assert plan.refusal is None
        assert plan.placement == "tensor"
        assert any("fits-one-card" in warning for warning in plan.warnings)
        said = verdict(plan, "fits-one-card")
        assert said is not None
        assert said.verdict == "warns"
        assert decide(header(SMALL), "2x3090", split="tensor").refusal is not None

    def test_layers_left_to_the_cpu_are_not_said_to_fit_otherwise(self, header: Header) -> None:
        plan = decide(header(LARGE), "2x3090", runtime_args=("-ngl", "40"))
        said = verdict(plan, "cpu-offload-last")
        assert said is not None
        assert "41 of 80 layers" in said.text
        assert "on the GPUs alone" not in said.text

    def test_layers_by_hand_are_said_to_be(self, header: Header) -> None:
        said = verdict(decide(header(SMALL), "2x3090", runtime_args=("-ts", "3,1")), "split-by-layers")
        assert said is not None
        assert "demanded after `--`" in said.text
        assert "equal" not in said.text


class TestWhyNot:
    def test_by_request(self, header: Header) -> None:
        plan = decide(header(SMALL), "3090+3060", split="tensor", force=True)
        assert {found.why_not for found in plan.alternatives} == {"tensor ranks were asked for"}

    def test_unknown_speed(self, header: Header) -> None:
        plan = decide(header(SMALL), rig_of(card(0, 24, None), card(1, 12, 360)))
        assert plan.layout.gpus == (1,)
        assert other(plan, 0).why_not == "its speed is not known"

    def test_as_fast(self, header: Header) -> None:
        plan = decide(header(SMALL), rig_of(card(0, 12, 360), busy(card(1, 12, 360, name="Other"), 11 * GIB)))
        assert other(plan, 1).why_not == "as fast, less room"

    def test_two_splits_are_told_apart(self, header: Header) -> None:
        plan = decide(header(LARGE), rig_of(card(0, 30, 1000), card(1, 30, 500)))
        assert plan.layout.counts[0] > plan.layout.counts[1]
        even = next(found for found in plan.alternatives if "evenly timed" in found.why_not)
        first, second = (int(count) for count in even.why_not.partition(",")[0].split("+"))
        assert first + second == sum(plan.layout.counts)
        assert first < plan.layout.counts[0]


def test_what_does_not_fit_has_no_speed_by_room(header: Header) -> None:
    model, adapter = read(str(header(LARGE))), LlamaCpp()
    job = adapter.job(model, Request(), adapter.assumed())
    rig = rig_named("2x3090")
    assert speed_by_room(job, (0, 1), rig) is not None
    assert speed_by_room(job, (0,), rig) is None


def test_without_offers_the_decision_is_the_same(header: Header) -> None:
    model, adapter, rig = read(str(header(MIDDLE))), LlamaCpp(), rig_named("3060")
    for request in (Request(offload="never"), Request(offload="allow")):
        job = adapter.job(model, request, adapter.assumed())
        full, brief = (choose(request, rig, job, offering=offering) for offering in (True, False))
        assert (full.layout, full.devices, full.placement) == (brief.layout, brief.devices, brief.placement)
        assert (full.refusal is None) == (brief.refusal is None)


def test_no_card_of_any_rig_makes_a_refusal_of_a_plan(header: Header) -> None:
    """Whatever cards are added to one that holds the model: it still runs, and no slower than one card may be."""
    base = card(0, 24, 936)
    more = [busy(card(1, 32, 1792)), card(2, 8, None), card(3, 48, 300), card(4, 2, 50, display=True)]
    for n in range(len(more) + 1):
        for added in combinations(more, n):
            for model, users in ((MIDDLE, 1), (SMALL, 4)):
                plan = decide(header(model), rig_of(base, *added), users=users)
                assert plan.refusal is None
                assert plan.placement in {"single", "replicas"}


class TestLargestContext:
    @pytest.mark.parametrize(("rig", "users"), [("2x3090", 2), ("2x3090", 4), ("4x3060", 4), ("4x3060", 8)])
    def test_replicas_stay_replicas(self, header: Header, rig: str, users: int) -> None:
        """Each as large as its card holds, and no card more."""
        usual, most = decide(header(SMALL), rig, users=users), decide(header(SMALL), rig, users=users, ctx="max")
        assert usual.placement == most.placement == "replicas"
        assert usual.layout.gpus == most.layout.gpus
        assert most.ctx > usual.ctx
        more = decide(header(SMALL), rig, users=users, ctx=most.ctx + 256)
        assert most.ctx == 131072 or (more.placement, more.layout.gpus) != (most.placement, most.layout.gpus)
