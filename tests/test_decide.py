"""The rules, each on a rig where it fires and one where it does not; and what every plan must hold."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from mgpu.errors import ProfileError, UsageError
from mgpu.rig import Gpu, Rig
from mgpu.units import GIB
from planning import card, decide, rig_named, rig_of, verdict

Header = Callable[[str], Path]

SMALL = "Llama-3.1-8B-Instruct-Q4_K_M"  # 4.6 GiB
MIDDLE = "Qwen2.5-32B-Instruct-Q4_K_M"  # 18.5 GiB
LARGE = "Llama-3.3-70B-Instruct-Q4_K_M"  # 39.6 GiB
MOE = "Qwen3-30B-A3B-Q4_K_M"  # 17.3 GiB, 3 of 30 billion parameters at work


class TestFitsOneCard:
    def test_one_of_two_with_both_speeds(self, header: Header) -> None:
        plan = decide(header(SMALL), "2x3090")
        assert plan.placement == "single"
        assert plan.layout.gpus == (0,)
        said = verdict(plan, "fits-one-card")
        assert said is not None
        assert said.verdict == "applies"
        assert "instead of" in said.text
        assert plan.tensor_split is None

    def test_silent_on_need_of_a_split(self, header: Header) -> None:
        said = verdict(decide(header(LARGE), "2x3090"), "fits-one-card")
        assert said is not None
        assert said.verdict == "passes"

    def test_forced_split_is_refused_with_both_speeds(self, header: Header) -> None:
        plan = decide(header(SMALL), "2x3090", split="pipeline")
        assert plan.refusal is not None
        assert plan.refusal.exit_code == 3
        assert "fits-one-card" in plan.refusal.message
        assert "instead of" in plan.refusal.message

    def test_force_overrides_and_evens_equal_cards(self, header: Header) -> None:
        plan = decide(header(SMALL), "2x3090", split="pipeline", force=True)
        assert plan.refusal is None
        assert plan.placement == "pipeline"
        assert plan.tensor_split is not None
        assert abs(plan.tensor_split[0] - plan.tensor_split[1]) <= 3

    def test_several_gpus_named_are_considered_not_demanded(self, header: Header) -> None:
        plan = decide(header(SMALL), "2x3090", gpus=("0", "1"))
        assert plan.placement == "single"

    def test_forced_over_exactly_the_gpus_named(self, header: Header) -> None:
        plan = decide(header(SMALL), "4x3090", split="pipeline", force=True, gpus=("1", "2", "3"))
        assert plan.layout.gpus == (1, 2, 3)


class TestFastestCard:
    def test_speed_beats_room(self, header: Header) -> None:
        rig = rig_of(card(0, 24, 360), card(1, 16, 1008))
        plan = decide(header(SMALL), rig)
        assert plan.layout.gpus == (1,)
        said = verdict(plan, "fastest-card")
        assert said is not None
        assert said.verdict == "applies"

    def test_of_equal_cards_the_freest_then_the_one_without_a_desktop(self, header: Header) -> None:
        assert decide(header(SMALL), rig_of(card(0, 20, 900), card(1, 23, 900))).layout.gpus == (1,)
        rig = rig_of(card(0, 24, 900, display=True), card(1, 24, 900))
        assert decide(header(SMALL), rig).layout.gpus == (1,)

    def test_silent_where_only_one_holds_it(self, header: Header) -> None:
        assert verdict(decide(header(MIDDLE), "3090+3060"), "fastest-card") is None


class TestFewestCards:
    def test_two_of_four(self, header: Header) -> None:
        plan = decide(header(LARGE), "4x3090")
        assert len(plan.layout.gpus) == 2
        said = verdict(plan, "fewest-cards")
        assert said is not None
        assert said.verdict == "applies"
        assert "GPU 2" in said.text
        assert "GPU 3" in said.text

    def test_all_when_all_are_needed(self, header: Header) -> None:
        said = verdict(decide(header(LARGE), "2x3090"), "fewest-cards")
        assert said is not None
        assert said.verdict == "passes"

    def test_the_fastest_pair_of_a_mixed_rig(self, header: Header) -> None:
        rig = rig_of(card(0, 24, 400), card(1, 24, 900), card(2, 24, 900))
        assert set(decide(header(LARGE), rig).layout.gpus) == {1, 2}


class TestSplitByLayers:
    def test_fastest_card_is_filled_first(self, header: Header) -> None:
        plan = decide(header(LARGE), rig_of(card(0, 24, 360), card(1, 40, 936)))
        assert plan.layout.gpus == (1, 0)
        first, second = plan.devices
        assert first.spare_bytes < 2 * GIB  # less than a layer and its cache would need
        assert len(first.blocks) > len(second.blocks)

    def test_counts_are_whole_layers_that_add_up(self, header: Header) -> None:
        plan = decide(header(LARGE), "2x3090")
        assert plan.tensor_split is not None
        assert sum(plan.tensor_split) == 81
        assert sum(len(device.blocks) for device in plan.devices) == 80
        assert [device.has_output for device in plan.devices] == [False, True]

    def test_silent_on_one_card(self, header: Header) -> None:
        assert verdict(decide(header(SMALL), "2x3090"), "split-by-layers") is None


class TestCpuOffloadLast:
    def test_passes_when_the_gpus_hold_it(self, header: Header) -> None:
        said = verdict(decide(header(SMALL), "3090"), "cpu-offload-last")
        assert said is not None
        assert said.verdict == "passes"

    def test_too_slow_stops_and_says_what_would_fit(self, header: Header) -> None:
        plan = decide(header(LARGE), rig_of(card(0, 12, 360)))
        assert plan.refusal is not None
        assert plan.refusal.exit_code == 5
        assert "tok/s" in plan.refusal.message
        assert "--offload allow" in plan.refusal.hint

    def test_allowed_it_runs_as_slow_as_it_is(self, header: Header) -> None:
        plan = decide(header(LARGE), rig_of(card(0, 12, 360)), offload="allow")
        assert plan.refusal is None
        assert plan.placement == "offload"
        assert plan.tok_s is not None
        assert plan.tok_s.expected < 3
        assert len(plan.host.blocks) + len(plan.devices[0].blocks) == 80

    def test_experts_go_first_and_whole_layers_stay(self, header: Header) -> None:
        plan = decide(header(MOE), "3060")
        assert plan.refusal is None
        assert plan.placement == "offload"
        assert len(plan.host.blocks) == 0
        assert 0 < len(plan.host.expert_blocks) < 48
        assert plan.tok_s is not None
        assert plan.tok_s.expected > 10

    def test_never_means_never(self, header: Header) -> None:
        plan = decide(header(MOE), "3060", offload="never")
        assert plan.refusal is not None
        assert plan.refusal.exit_code == 5

    def test_an_unequal_second_card_is_used_before_the_cpu(self, header: Header) -> None:
        plan = decide(header(MIDDLE), "3090+3060", ctx=32768)
        assert plan.placement == "pipeline"
        assert plan.layout.gpus == (0, 1)

    def test_no_gpu_is_a_rig_too(self, header: Header) -> None:
        plan = decide(header(SMALL), "cpu-only")
        assert plan.refusal is None
        assert plan.placement == "cpu"
        assert plan.devices == ()

    def test_a_cpu_too_slow_is_not_started_unasked(self, header: Header) -> None:
        plan = decide(header(LARGE), "cpu-only")
        assert plan.refusal is not None
        assert plan.refusal.exit_code == 5
        assert "too slow" in plan.refusal.message
        assert decide(header(LARGE), "cpu-only", offload="allow").refusal is None

    def test_ram_can_lack_as_well(self, header: Header) -> None:
        plan = decide(header(LARGE), rig_of(ram_gib=16), offload="allow")
        assert plan.refusal is not None
        assert plan.refusal.exit_code == 5
        assert "RAM" in plan.refusal.message


class TestMisfit:
    def test_says_by_how_much_and_what_would(self, header: Header) -> None:
        plan = decide(header(MIDDLE), "3090", ctx=32768, offload="never")
        assert plan.refusal is not None
        assert "short by" in plan.refusal.message
        assert "--ctx" in plan.refusal.hint
        assert "q8_0" in plan.refusal.hint

    def test_the_offered_context_fits(self, header: Header) -> None:
        refused = decide(header(MIDDLE), "3090", ctx=32768, offload="never")
        assert refused.refusal is not None
        ctx = int(refused.refusal.hint.split("--ctx ")[1].split()[0])
        assert decide(header(MIDDLE), "3090", ctx=ctx, offload="never").refusal is None
        assert decide(header(MIDDLE), "3090", ctx=ctx + 256, offload="never").refusal is not None


class TestContext:
    def test_default_is_the_trained_one_at_most_8192(self, header: Header) -> None:
        assert decide(header(SMALL), "3090").ctx == 8192

    @pytest.mark.parametrize(
        ("model", "rig", "asked"),
        [
            pytest.param(MIDDLE, "3090", {}, id="one card"),
            pytest.param(MIDDLE, "3090", {"users": 2}, id="two users"),
            pytest.param(MIDDLE, "3090", {"users": 2, "kv_type": "q8_0"}, id="q8_0 cache"),
            pytest.param(LARGE, "2x3090", {}, id="two cards"),
            pytest.param(LARGE, "2x3090", {"users": 2}, id="two cards, two users"),
        ],
    )
    def test_max_fits_and_one_step_more_does_not(
        self, header: Header, model: str, rig: str, asked: dict[str, Any]
    ) -> None:
        plan = decide(header(model), rig, ctx="max", **asked)
        assert plan.refusal is None
        assert all(device.spare_bytes >= 0 for device in plan.devices)
        assert plan.placement == ("single" if rig == "3090" else "pipeline")
        assert plan.ctx < 131072
        assert decide(header(model), rig, ctx=plan.ctx, offload="never", **asked).refusal is None
        assert decide(header(model), rig, ctx=plan.ctx + 256, offload="never", **asked).refusal is not None

    def test_max_is_no_reason_to_split(self, header: Header) -> None:
        assert decide(header(MIDDLE), "2x3090", ctx="max").placement == "single"

    def test_users_have_one_each(self, header: Header) -> None:
        one = decide(header(SMALL), "3090", ctx=4096)
        four = decide(header(SMALL), "3090", ctx=4096, users=4)
        assert (four.ctx, four.users) == (4096, 4)
        assert four.devices[0].memory.kv == 4 * one.devices[0].memory.kv


class TestConsider:
    def test_only_the_named(self, header: Header) -> None:
        assert decide(header(SMALL), "3090+3060", gpus=("3060",)).layout.gpus == (1,)

    def test_reserve_is_kept(self, header: Header) -> None:
        free = decide(header(SMALL), "3090").devices[0]
        kept = decide(header(SMALL), "3090", reserve=(("", 4 * GIB),)).devices[0]
        assert kept.spare_bytes == free.spare_bytes - 4 * GIB
        plan = decide(header(SMALL), "2x3090", reserve=(("0", 22 * GIB),))
        assert plan.layout.gpus == (1,)

    def test_a_name_means_all_cards_of_it(self, header: Header) -> None:
        assert decide(
            header(LARGE), rig_of(card(0, 24, 900), card(1, 24, 900), card(2, 48, 300, name="Other")), gpus=("24g",)
        ).layout.gpus == (0, 1)

    def test_unknown_name(self, header: Header) -> None:
        with pytest.raises(UsageError, match="no GPU '7'"):
            decide(header(SMALL), "2x3090", gpus=("7",))

    def test_disabled_cards_are_left_alone(self, header: Header) -> None:
        rig = rig_of(card(0, 24, 900, enabled=False), card(1, 24, 300))
        assert decide(header(SMALL), rig).layout.gpus == (1,)
        with pytest.raises(ProfileError, match="disabled"):
            decide(header(SMALL), rig, gpus=("0",))


class TestFlagsAfterDashes:
    def test_tensor_split_is_planned_as_llama_cpp_maps_it(self, header: Header) -> None:
        plan = decide(header(SMALL), "2x3090", runtime_args=("-ts", "3,1"))
        assert [len(device.blocks) for device in plan.devices] == [25, 7]
        assert any("tensor-split" in warning for warning in plan.warnings)

    def test_gpu_layers(self, header: Header) -> None:
        plan = decide(header(SMALL), "3090", runtime_args=("-ngl", "20"))
        assert len(plan.host.blocks) == 13
        assert len(plan.devices[0].blocks) == 19
        assert plan.devices[0].has_output

    def test_context_and_slots(self, header: Header) -> None:
        plan = decide(header(SMALL), "3090", runtime_args=("-c", "16384", "-np", "4"))
        assert (plan.ctx, plan.users) == (4096, 4)

    def test_a_layout_by_hand_that_does_not_fit_is_said(self, header: Header) -> None:
        plan = decide(header(LARGE), "2x3090", runtime_args=("-ts", "1,0"))
        assert plan.refusal is not None
        assert "GPU 0" in plan.refusal.message


class TestByHandIsKeptOrRefused:
    """What flags after `--` demand is planned as it stands, or is said not to fit: never swapped for something else."""

    def test_all_layers_demanded_of_a_card_too_small(self, header: Header) -> None:
        plan = decide(header(LARGE), "3090", runtime_args=("-ngl", "99"))
        assert plan.refusal is not None
        assert plan.refusal.exit_code == 5

    def test_experts_demanded_stay_that_many(self, header: Header) -> None:
        plan = decide(header(MOE), "3060", runtime_args=("-ncmoe", "30"))
        assert len(plan.host.expert_blocks) == 30
        few = decide(header(MOE), "3060", runtime_args=("-ncmoe", "3"), offload="never")
        assert few.refusal is not None

    def test_one_device_demanded(self, header: Header) -> None:
        plan = decide(header(SMALL), "2x3090", runtime_args=("-sm", "none", "-ts", "1,1"))
        assert plan.placement == "single"
        with pytest.raises(UsageError, match="--split none"):
            decide(header(SMALL), "2x3090", runtime_args=("-ts", "1,1"), split="none")

    def test_a_card_without_a_share_is_not_in_the_plan(self, header: Header) -> None:
        plan = decide(header(SMALL), "2x3090", runtime_args=("-ts", "1,0"))
        assert plan.layout.gpus == (0,)
        assert plan.placement == "single"

    def test_no_layer_on_a_gpu(self, header: Header) -> None:
        plan = decide(header(SMALL), "3090", runtime_args=("-ngl", "0"))
        assert plan.placement == "cpu"
        assert len(plan.host.blocks) == 32


class TestOffloadPicks:
    def test_the_cards_that_make_it_fastest(self, header: Header) -> None:
        strong, weak = card(0, 24, 1008), card(1, 2, 48)
        alone = decide(header(LARGE), rig_of(strong), offload="allow")
        both = decide(header(LARGE), rig_of(strong, weak), offload="allow")
        assert both.layout.gpus == (0,)
        assert both.tok_s == alone.tok_s

    def test_no_card_of_unknown_speed_where_others_do(self, header: Header) -> None:
        plan = decide(header(LARGE), rig_of(card(0, 24, 1008), card(1, 4, None)), offload="allow")
        assert plan.layout.gpus == (0,)
        assert plan.tok_s is not None

    def test_the_best_of_the_cards_when_it_is_to_be_one(self, header: Header) -> None:
        rig = rig_of(card(0, 8, 448), card(1, 12, 360))
        one = decide(header(MIDDLE), rig, split="none", offload="allow")
        assert one.layout.gpus == (1,)

    def test_the_cpu_alone_where_that_is_faster(self, header: Header) -> None:
        rig = replace(rig_of(card(0, 4, 60)), ram_bandwidth_bytes_per_s=400 * 10**9)
        assert decide(header(MIDDLE), rig, offload="allow").placement == "cpu"

    def test_it_says_what_the_gpus_alone_would_hold(self, header: Header) -> None:
        said = verdict(decide(header(MIDDLE), "3090", ctx=24000), "cpu-offload-last")
        assert said is not None
        assert "--ctx" in said.text
        assert "q8_0" in said.text


def test_unified_memory_is_counted_once(header: Header) -> None:
    rig = replace(rig_of(card(0, 16, 273, unified=True), ram_gib=16), ram_free_bytes=12 * GIB)
    plan = decide(header(SMALL), rig, ctx="max")
    assert plan.refusal is None
    assert plan.devices[0].memory.total + plan.host.memory.total <= 12 * GIB


def test_force_starts_what_does_not_fit(header: Header) -> None:
    assert decide(header(LARGE), "3090", offload="never", force=True).refusal is None


def test_max_context_may_be_less_than_the_usual_one(header: Header) -> None:
    plan = decide(header(MIDDLE), "3090", ctx="max", users=3)
    assert plan.placement == "single"
    assert plan.ctx < 8192
    assert decide(header(MIDDLE), "3090", ctx=plan.ctx + 256, users=3, offload="never").refusal is not None


def test_max_context_on_the_cpu_is_bounded_by_ram(header: Header) -> None:
    assert decide(header(SMALL), "cpu-only", ctx="max").ctx == 131072
    assert 8192 < decide(header(SMALL), rig_of(ram_gib=12), ctx="max").ctx < 131072


CARDS = st.lists(st.tuples(st.floats(1, 80), st.sampled_from([None, 200, 360, 936, 1792])), min_size=0, max_size=6).map(
    lambda cards: tuple(card(index, gib, gbs) for index, (gib, gbs) in enumerate(cards))
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    gpus=CARDS,
    model=st.sampled_from([SMALL, MIDDLE, LARGE, MOE]),
    ctx=st.integers(256, 40000),
    users=st.integers(1, 8),
)
def test_what_every_plan_must_hold(header: Header, gpus: tuple[Gpu, ...], model: str, ctx: int, users: int) -> None:
    rig: Rig = rig_of(*gpus)
    plan = decide(header(model), rig, ctx=ctx, users=users)
    n_units = 81 if model == LARGE else 33 if model == SMALL else 65 if model == MIDDLE else 49
    layout = plan.layout
    if layout.gpus:
        if layout.shape.mode == "pipeline":
            assert layout.shape.host_layers + sum(layout.counts) == n_units
        else:
            assert layout.counts == (n_units,) * len(layout.gpus)
        assert len(set(layout.gpus)) == len(layout.gpus)
    if plan.refusal is not None:
        assert plan.refusal.exit_code == 5
        return
    assert all(device.spare_bytes >= 0 for device in plan.devices)
    fits_alone = any(other.fits and other.placement == "single" for other in plan.alternatives)
    assert not (fits_alone and plan.placement in {"pipeline", "offload", "cpu"})
    if plan.placement == "pipeline":
        smaller = [other for other in plan.alternatives if other.fits and len(other.gpus) < len(layout.gpus)]
        assert not [other for other in smaller if other.placement == "pipeline"]


def test_same_inputs_same_plan(header: Header) -> None:
    assert decide(header(LARGE), rig_named("8x3090")) == decide(header(LARGE), rig_named("8x3090"))
