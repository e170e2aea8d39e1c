"""Figures that were measured on the rig: in the place of predictions, or correcting them."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from headers import write_model
from mgpu.adapter import Job
from mgpu.decide.place import by_room, on_each, on_one
from mgpu.decide.speed import complete, forecast
from mgpu.inspect.source import read_model
from mgpu.model import Model
from mgpu.plan import Layout, Speed
from mgpu.request import Request
from mgpu.rig import Gpu, Measured, Rig
from mgpu_adapters.llamacpp.adapter import LlamaCpp
from planning import card, rig_of

GPUS = (
    card(0, 24, 936, name="NVIDIA GeForce RTX 3090"),
    card(1, 24, 936, name="NVIDIA GeForce RTX 3090"),
    card(2, 12, 360, name="NVIDIA GeForce RTX 3060"),
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return read_model(str(write_model("Qwen3-8B-Q4_K_M", tmp_path_factory.mktemp("models"))))


def job_of(model: Model, **asked: Any) -> Job:
    adapter = LlamaCpp()
    return adapter.job(model, Request(**({"ctx": 2048} | asked)), adapter.assumed())


def figure(model: Model, layout: Layout, **more: Any) -> Measured:
    """What `mgpu bench` would keep of this layout: 100 tokens a second, where 50 were predicted."""
    shape = layout.shape
    fields: dict[str, Any] = {
        "model": model.name,
        "architecture": model.architecture,
        "quantization": model.quantization,
        "weights_bytes": model.weights_bytes,
        "runtime": "llama.cpp",
        "version": "b10434",
        "mode": "tensor" if shape.mode == "tensor" else "pipeline",
        "gpus": layout.gpus,
        "counts": layout.counts,
        "host_layers": shape.host_layers,
        "host_experts": shape.host_experts,
        "depth": 1024,
        "tok_s": 100.0,
        "predicted": 50.0,
        "date": "2026-11-01T00:00:00Z",
    }
    return Measured(**(fields | more))


def rig_with(*figures: Measured) -> Rig:
    return replace(rig_of(*GPUS), measured=figures)


def said(job: Job, layout: Layout, rig: Rig) -> Speed:
    by_index: dict[int, Gpu] = {gpu.index: gpu for gpu in GPUS}
    speed = forecast(job, layout, [by_index[index] for index in layout.gpus], rig).tok_s
    assert speed is not None
    return speed


def test_the_very_placement_is_what_was_measured(model: Model) -> None:
    job = job_of(model)
    layout = on_one(job, GPUS[0])
    speed = said(job, layout, rig_with(figure(model, layout)))
    assert speed.measured
    assert speed.expected == 100.0
    assert 95 < speed.low < 100 < speed.high < 105


def test_the_latest_figure_counts(model: Model) -> None:
    job = job_of(model)
    layout = on_one(job, GPUS[0])
    old, new = figure(model, layout), figure(model, layout, tok_s=110.0, date="2026-11-02T00:00:00Z")
    assert said(job, layout, rig_with(new, old)).expected == 110.0


@pytest.mark.parametrize(
    "other",
    [
        {"weights_bytes": 1}, {"quantization": "Q8_0"}, {"architecture": "llama"}, {"runtime": "vllm"},
        {"kv_type": "q8_0"}, {"depth": 9000}, {"host_layers": 3}, {"mode": "tensor"},
    ],
    ids=str,
)  # fmt: skip
def test_what_is_not_the_same_is_still_a_prediction(model: Model, other: dict[str, Any]) -> None:
    job = job_of(model)
    layout = on_one(job, GPUS[0])
    assert not said(job, layout, rig_with(figure(model, layout, **other))).measured


def test_figures_of_the_same_cards_correct_others(model: Model) -> None:
    job = job_of(model)
    layout = on_one(job, GPUS[0])
    plain = said(job, layout, rig_with())
    scaled = said(job, layout, rig_with(figure(model, layout, weights_bytes=1, tok_s=60.0)))
    assert not scaled.measured
    assert scaled.expected == pytest.approx(1.2 * plain.expected)
    assert scaled.high / scaled.low < plain.high / plain.low


def test_the_median_corrects(model: Model) -> None:
    job = job_of(model)
    layout = on_one(job, GPUS[0])
    plain = said(job, layout, rig_with())
    figures = [figure(model, layout, weights_bytes=i, tok_s=tok_s) for i, tok_s in enumerate((55.0, 60.0, 110.0))]
    assert said(job, layout, rig_with(*figures)).expected == pytest.approx(1.2 * plain.expected)


@pytest.mark.parametrize(
    "useless", [{"predicted": None}, {"runtime": "vllm"}, {"gpus": (2,)}, {"gpus": (0, 2)}, {"tok_s": 1.0}], ids=str
)
def test_figures_that_say_nothing_of_these_cards(model: Model, useless: dict[str, Any]) -> None:
    job = job_of(model)
    layout = on_one(job, GPUS[0])
    other = figure(model, layout, **({"weights_bytes": 1} | useless))
    assert said(job, layout, rig_with(other)) == said(job, layout, rig_with())


def test_equal_cards_may_share_the_layers_otherwise(model: Model) -> None:
    job = job_of(model)
    layout = by_room(job, GPUS[:2])
    moved = replace(layout, counts=(layout.counts[0] + 3, layout.counts[1] - 3))
    assert said(job, moved, rig_with(figure(model, layout))).measured


def test_unequal_cards_may_not(model: Model) -> None:
    job = job_of(model)
    layout = by_room(job, (GPUS[0], GPUS[2]))
    moved = replace(layout, counts=(layout.counts[0] + 3, layout.counts[1] - 3))
    rig = rig_with(figure(model, layout))
    assert said(job, layout, rig).measured
    assert not said(job, moved, rig).measured


def test_a_replica_is_what_one_card_was_measured_at(model: Model) -> None:
    job = job_of(model, users=2)
    alone = figure(model, on_one(job, GPUS[0]))
    assert said(job, on_each(job, GPUS[:2], "replicas"), rig_with(alone)).measured


def test_ranks_are_found_as_ranks(model: Model) -> None:
    job = job_of(model)
    ranks = on_each(job, GPUS[:2], "tensor")
    rig = rig_with(figure(model, ranks))
    assert said(job, ranks, rig).measured
    assert not said(job, by_room(job, GPUS[:2]), rig).measured


def test_prompts_that_were_measured_are_told(model: Model) -> None:
    job = job_of(model)
    layout = on_one(job, GPUS[0])
    rig = rig_with(figure(model, layout, prompt_tok_s=4000.0))
    found = complete(forecast(job, layout, GPUS[:1], rig), job, layout, GPUS[:1], rig)
    assert found.prompt_tok_s is not None
    assert (found.prompt_tok_s.expected, found.prompt_tok_s.measured) == (4000.0, True)
    assert found.first_token is not None
    assert found.first_token.expected == pytest.approx(1024 / 4000 + 1 / 100)


@given(tok_s=st.floats(1, 1000), predicted=st.floats(1, 1000))
def test_a_correction_is_never_wild(model: Model, tok_s: float, predicted: float) -> None:
    job = job_of(model)
    layout = on_one(job, GPUS[0])
    plain = said(job, layout, rig_with())
    other = figure(model, layout, weights_bytes=1, tok_s=tok_s, predicted=predicted)
    assert 0.39 < said(job, layout, rig_with(other)).expected / plain.expected < 2.51


def test_a_figure_holds_for_cards_of_the_same_kind(model: Model) -> None:
    """Else a slow figure of one card would move the model to its twin, about which nothing is known."""
    job = job_of(model)
    rig = rig_with(figure(model, on_one(job, GPUS[0])))
    assert said(job, on_one(job, GPUS[1]), rig).measured
    assert not said(job, on_one(job, GPUS[2]), rig).measured


def test_a_figure_of_the_very_card_comes_first(model: Model) -> None:
    job = job_of(model)
    twins = (figure(model, on_one(job, GPUS[0])), figure(model, on_one(job, GPUS[1]), tok_s=90.0))
    assert said(job, on_one(job, GPUS[0]), rig_with(*twins)).expected == 100.0
    assert said(job, on_one(job, GPUS[1]), rig_with(*twins)).expected == 90.0
