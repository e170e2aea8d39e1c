"""Each rule of the guide on a rig where it fires and on one where it does not, with the figures in its words."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from decision_cases import rig
from headers import requantized
from mgpu.decide.choose import choose
from mgpu.decide.consider import with_reserves
from mgpu.decide.rules import RULES
from mgpu.inspect.siblings import read_siblings
from mgpu.plan import Plan, RuleVerdict
from mgpu.report.as_json import plan_object
from mgpu.request import Request
from mgpu.rig import Pcie, Rig
from mgpu.whatif import Question, changes, more_quant
from mgpu_adapters.llamacpp.adapter import LlamaCpp
from planning import card, decide, read, rig_of

Header = Callable[[str], Path]

SMALL = "Llama-3.1-8B-Instruct-Q4_K_M"
MIDDLE = "Qwen2.5-32B-Instruct-Q4_K_M"
LARGE = "Llama-3.3-70B-Instruct-Q4_K_M"
MOE = "Qwen3-30B-A3B-Q4_K_M"


def said(plan: Plan, rule: str) -> RuleVerdict:
    return next(verdict for verdict in plan.rules if verdict.id == rule)


@pytest.fixture
def plan_on(header: Header) -> Callable[..., Plan]:
    def plan(where: str | Rig, model: str = LARGE, **asked: Any) -> Plan:
        return decide(header(model), rig(where) if isinstance(where, str) else where, **asked)

    return plan


PlanOn = Callable[..., Plan]


def test_every_rule_speaks_in_every_plan(plan_on: PlanOn) -> None:
    """With an id, a verdict, a text and a source, also in the JSON."""
    ids = [
        "fits-one-card", "fastest-card", "fewest-cards", "use-what-you-own", "mixed-is-pipeline", "tensor-when-matched",
        "split-by-layers", "many-users", "cpu-offload-last", "more-quant", "two-cheap-cards", "runtime-choice",
        "slow-slot", "display-card", "psu", "network-last",
    ]  # fmt: skip
    assert len(RULES) == len(ids) == 16
    for where, model in (("2x3090", SMALL), ("3090+3060", LARGE), ("cpu-only", LARGE), ("8-mixed", MIDDLE)):
        plan = plan_on(where, model)
        assert [verdict.id for verdict in plan.rules] == ids
        assert all(verdict.text and verdict.source for verdict in plan.rules)
        told = plan_object(plan)["rules"]
        assert [rule["id"] for rule in told] == ids


@pytest.mark.parametrize(
    ("rule", "fires", "does_not"),
    [
        ("fits-one-card", {"where": "2x3090", "model": SMALL}, {"where": "2x3090"}),
        ("fewest-cards", {"where": "4x3090"}, {"where": "2x3090"}),
        ("use-what-you-own", {"where": "3090+2x3060"}, {"where": "2x3090"}),
        ("mixed-is-pipeline", {"where": "3090+2x3060"}, {"where": "2x3090"}),
        ("split-by-layers", {"where": "2x3090"}, {"where": "2x3090", "model": SMALL}),
        ("many-users", {"where": "4x3090", "model": SMALL, "users": 4}, {"where": "4x3090", "model": SMALL}),
        ("cpu-offload-last", {"where": "3090+3060"}, {"where": "2x3090"}),
        ("two-cheap-cards", {"where": "2x3060", "model": MIDDLE, "ctx": 2048}, {"where": "2x3090"}),
        ("runtime-choice", {"where": "3090+2x3060"}, {"where": "2x3090"}),
        ("slow-slot", {"where": "2x3090-x1"}, {"where": "2x3090"}),
        ("psu", {"where": "2x3090-psu750"}, {"where": "2x3090-psu1200"}),
    ],
)
def test_fires_and_does_not(plan_on: PlanOn, rule: str, fires: dict[str, Any], does_not: dict[str, Any]) -> None:
    loud = said(plan_on(**fires), rule)
    assert loud.verdict in {"applies", "warns"}
    assert not loud.quiet
    assert re.search(r"\d", loud.text), f"no figure in {loud.text!r}"
    silent = said(plan_on(**does_not), rule)
    assert silent.verdict == "passes", silent.text


class TestFastestCard:
    def test_fires_where_the_roomiest_is_slower(self, plan_on: PlanOn) -> None:
        verdict = said(plan_on("rtx8000+p40", SMALL, reserve=(("0", 40 << 30),)), "fastest-card")
        assert verdict.verdict == "applies"
        assert "more room" in verdict.text

    def test_passes_where_it_is_the_roomiest_too(self, plan_on: PlanOn) -> None:
        assert said(plan_on("rtx8000+p40", SMALL), "fastest-card").verdict == "passes"


class TestDisplayCard:
    def test_keeps_more_free(self, plan_on: PlanOn) -> None:
        machine = rig("2x3090")
        shown = replace(machine, gpus=tuple(replace(gpu, display=True) for gpu in machine.gpus))
        verdict = said(plan_on(shown), "display-card")
        assert verdict.verdict == "applies"
        assert "512 MiB" in verdict.text
        assert said(plan_on(machine), "display-card").quiet


class TestMixedIsPipeline:
    def test_refuses_tensor_ranks(self, plan_on: PlanOn) -> None:
        plan = plan_on("4090+3090", split="tensor")
        assert plan.refusal is not None
        assert plan.refusal.exit_code == 3
        assert said(plan, "mixed-is-pipeline").verdict == "refuses"

    def test_force_overrides(self, plan_on: PlanOn) -> None:
        plan = plan_on("4090+3090", split="tensor", force=True)
        assert plan.refusal is None
        assert plan.placement == "tensor"
        assert said(plan, "mixed-is-pipeline").verdict == "warns"

    def test_forced_ranks_are_not_called_layers_nor_matched(self, plan_on: PlanOn) -> None:
        plan = plan_on("3090+3060", SMALL, split="tensor", force=True)
        assert "by layers" not in said(plan, "mixed-is-pipeline").text
        assert "matched" not in said(plan, "tensor-when-matched").text
        assert said(plan, "use-what-you-own").quiet


class TestWhereOneCardHoldsIt:
    """A split by request: rules that argue for a split have nothing to say."""

    @pytest.fixture
    def plan(self, plan_on: PlanOn) -> Plan:
        return plan_on("2x3060", SMALL, split="pipeline", force=True)

    def test_no_card_is_recommended(self, plan: Plan) -> None:
        assert said(plan, "two-cheap-cards").quiet

    def test_why_there_are_no_ranks(self, plan: Plan) -> None:
        assert said(plan, "tensor-when-matched").text.endswith("one card holds it")


def test_a_card_is_recommended_only_if_it_holds_the_model(plan_on: PlanOn) -> None:
    """Two 12 GB cards and the CPU share 25 GiB of weights: a card of 24 GB would not do."""
    text = said(plan_on("2x3060", "Qwen3-32B-Q6_K"), "two-cheap-cards").text
    assert "RTX 5090 (32 GB)" in text
    assert "RTX 3090 (24 GB)" in said(plan_on("2x3060", MIDDLE, ctx=2048), "two-cheap-cards").text


class TestCpuOffload:
    def test_the_threshold_is_named_where_it_refuses(self, plan_on: PlanOn) -> None:
        assert "below 3 tok/s" in said(plan_on("cpu-only"), "cpu-offload-last").text

    def test_never_is_named_where_it_refuses(self, plan_on: PlanOn) -> None:
        verdict = said(plan_on("3090+3060", offload="never"), "cpu-offload-last")
        assert verdict.verdict == "refuses"
        assert "--offload never" in verdict.text

    def test_layers_are_counted_where_experts_were_asked_for(self, plan_on: PlanOn) -> None:
        """One layer's experts by hand are not enough: whole layers follow, and they are said."""
        plan = plan_on("3060", MOE, runtime_args=("-ncmoe", "1"))
        assert f"{len(plan.host.blocks)} of 48 layers on the CPU" in said(plan, "cpu-offload-last").text

    def test_layers_and_the_experts_of_more(self, plan_on: PlanOn) -> None:
        plan = plan_on("3060", MOE, runtime_args=("-ngl", "40", "-ncmoe", "30"))
        assert "9 of 48 layers and the experts of 21 more on the CPU" in said(plan, "cpu-offload-last").text


def test_what_does_not_fit_keeps_nothing_off_the_cpu(plan_on: PlanOn) -> None:
    plan = plan_on("3090+3060", offload="never")
    assert plan.refusal is not None
    assert said(plan, "use-what-you-own").quiet
    assert said(plan, "fewest-cards").quiet


def test_an_unknown_link_is_not_called_slow(plan_on: PlanOn) -> None:
    plan = plan_on(rig_of(card(0, 24, 936), card(1, 24, 936)))
    text = said(plan, "tensor-when-matched").text
    assert "unknown width" in text
    assert "too slow" not in text


class TestTensor:
    def test_needless_is_refused_with_both_speeds(self, plan_on: PlanOn) -> None:
        plan = plan_on("2x3090-nvlink", SMALL, split="tensor")
        assert plan.refusal is not None
        assert plan.refusal.exit_code == 3
        assert "instead of" in plan.refusal.message
        assert said(plan, "fits-one-card").verdict == "refuses"

    def test_by_request_on_matched_cards(self, plan_on: PlanOn) -> None:
        plan = plan_on("2x3090-nvlink", split="tensor")
        assert plan.refusal is None
        assert plan.placement == "tensor"
        assert plan.tensor_split is None
        verdict = said(plan, "tensor-when-matched")
        assert verdict.verdict == "warns"
        assert "experimental" in verdict.text
        assert "NVLink" in verdict.text

    def test_a_slow_slot_rules_it_out(self, plan_on: PlanOn) -> None:
        plan = plan_on("2x3090-x1", split="tensor")
        assert plan.refusal is not None
        assert said(plan, "slow-slot").verdict == "refuses"

    @pytest.mark.parametrize(("gen", "width", "pays"), [(4, 8, True), (3, 16, True), (3, 8, False), (4, 4, False)])
    def test_the_link_must_pay_to_be_chosen_unasked(self, plan_on: PlanOn, gen: int, width: int, *, pays: bool) -> None:
        machine = rig("2x3090")
        slot = Pcie(gen=gen, width=width)
        plan = plan_on(replace(machine, gpus=tuple(replace(gpu, pcie=slot) for gpu in machine.gpus)))
        weighed = plan.placement == "tensor" or any(other.placement == "tensor" for other in plan.alternatives)
        assert weighed is pays


class TestManyUsers:
    def test_a_replica_on_each(self, plan_on: PlanOn) -> None:
        plan = plan_on("4x3090", SMALL, users=4)
        assert plan.placement == "replicas"
        assert plan.layout.gpus == (0, 1, 2, 3)
        assert plan.users_each == 1
        assert plan.forecast.total_tok_s is not None
        assert plan.tok_s is not None
        assert plan.forecast.total_tok_s.expected > 3 * plan.tok_s.expected

    def test_each_replica_holds_its_share_of_the_users(self, plan_on: PlanOn) -> None:
        plan = plan_on("2x3090", SMALL, users=8)
        assert plan.users_each == 4
        alone = plan_on("3090", SMALL, users=4)
        assert plan.devices[0].memory == alone.devices[0].memory

    def test_one_user_has_one(self, plan_on: PlanOn) -> None:
        assert plan_on("4x3090", SMALL).placement == "single"

    def test_split_none_means_one_card(self, plan_on: PlanOn) -> None:
        assert plan_on("4x3090", SMALL, users=4, split="none").placement == "single"

    def test_slots_given_by_hand_are_not_divided(self, plan_on: PlanOn) -> None:
        assert plan_on("4x3090", SMALL, users=4, runtime_args=("-np", "4")).placement == "single"


def test_who_is_in_the_way_is_named(plan_on: PlanOn) -> None:
    """Of two cards, one is held by somebody; without them, one card would do."""
    machine = rig("3090")
    gpu = machine.gpus[0]
    held = replace(gpu, free_bytes=gpu.free_bytes - (14 << 30), processes=("4242 python (14.0 GiB)",))
    plan = plan_on(replace(machine, gpus=(held,)), MIDDLE, offload="never")
    assert plan.refusal is not None
    assert "it would fit but for GPU 0: 4242 python (14.0 GiB)" in plan.refusal.hint
    far_too_large = plan_on(replace(machine, gpus=(held,)), LARGE, offload="never")
    assert far_too_large.refusal is not None
    assert "but for" not in far_too_large.refusal.hint
    two = plan_on(replace(machine, gpus=(held, replace(held, index=1))), MIDDLE)
    assert "one would, but for GPU 0: 4242 python" in said(two, "fits-one-card").text


def test_power_limits_that_would_do(plan_on: PlanOn) -> None:
    text = said(plan_on("2x3090-psu750"), "psu").text
    assert "350 + 350" in text
    assert "nvidia-smi -i 0,1 -pl 300" in text


def test_balanced_stages_for_many_users(plan_on: PlanOn) -> None:
    """On unequal cards: one user gets the fast card filled first, many get stages that take equally long."""
    machine = rig_of(card(0, 40, 1000), card(1, 40, 500))
    one, many = plan_on(machine, ctx=2048), plan_on(machine, ctx=2048, users=4)
    assert one.layout.counts[0] > many.layout.counts[0]
    ratio = many.layout.counts[0] / many.layout.counts[1]
    assert 1.8 <= ratio <= 2.2


class TestWhatIf:
    def question(self, path: Path, where: Rig, tmp_path: Path, **asked: Any) -> Question:
        del tmp_path
        model, adapter, request = read(str(path)), LlamaCpp(), Request(**asked)
        machine = with_reserves(request, where)
        job = adapter.job(model, request, adapter.assumed())
        return Question(
            request=request, rig=machine, job=job, plan=choose(request, machine, job), model=model,
            siblings=(requantized(model, "Q3_K"), requantized(model, "Q8_0")),
            job_of=lambda other: adapter.job(other, request, adapter.assumed()),
        )  # fmt: skip

    def test_a_cache_that_fits_one_card(self, header: Header, tmp_path: Path) -> None:
        lines = changes(self.question(header(MIDDLE), rig("2x3090"), tmp_path, ctx=32768))
        assert any(line.startswith("--kv-type q8_0: GPU 0 alone") for line in lines)
        assert any(line.startswith("--ctx 16384: GPU 0 alone") for line in lines)

    def test_the_next_quant_down_and_one_more_card(self, header: Header, tmp_path: Path) -> None:
        lines = changes(self.question(header(LARGE), rig("3090+3060"), tmp_path))
        assert any(line.startswith("one more RTX 3090: 2 cards by layers") for line in lines)
        assert any("beside it: GPU 0+1 by layers" in line for line in lines)

    def test_a_faster_split_than_the_card_that_holds_it(self, header: Header, tmp_path: Path) -> None:
        cards = rig_of(card(0, 16, 717), card(1, 16, 717), card(2, 24, 346))
        lines = changes(self.question(header(MIDDLE), cards, tmp_path))
        assert any(line.startswith("--split pipeline --force: GPU 0+1 by layers") for line in lines)
        assert not any("--split" in line for line in changes(self.question(header(MIDDLE), rig("2x3090"), tmp_path)))

    def test_cards_that_are_busy(self, header: Header, tmp_path: Path) -> None:
        busy = rig_of(replace(card(0, 32, 1792), free_bytes=200 << 20), card(1, 12, 360))
        lines = changes(self.question(header(MIDDLE), busy, tmp_path))
        assert any(line.startswith("with GPU 0 idle: GPU 0 alone") for line in lines)
        idle = rig_of(card(0, 32, 1792), card(1, 12, 360))
        assert not any("idle" in line for line in changes(self.question(header(MIDDLE), idle, tmp_path)))

    def test_nothing_to_better(self, header: Header, tmp_path: Path) -> None:
        assert changes(self.question(header(SMALL), rig("2x3090"), tmp_path)) == ()

    def test_more_quant_fires_where_it_fits(self, header: Header, tmp_path: Path) -> None:
        verdict = more_quant(self.question(header(MIDDLE), rig("2x3090"), tmp_path))
        assert verdict.verdict == "applies"
        assert "Q8_0" in verdict.text
        verdict = more_quant(self.question(header(MIDDLE), rig("3090"), tmp_path))
        assert verdict.verdict == "passes"


def test_siblings_are_other_quants_of_the_same_model(header: Header, tmp_path: Path) -> None:
    """Not other models, not copies, not what cannot be read."""
    path = header(SMALL)
    beside = tmp_path / "folder"
    beside.mkdir()
    (beside / path.name).symlink_to(path)
    (beside / "copy.gguf").symlink_to(path)
    (beside / "other.gguf").symlink_to(header("Qwen3-8B-Q4_K_M"))
    (beside / "broken.gguf").write_bytes(b"GGUF")
    assert read_siblings(read(str(beside / path.name))) == ()
