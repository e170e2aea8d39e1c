"""`mgpu plan` as text: 80 columns, nothing torn that belongs together, the figures of the plan."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from decision_cases import rig
from mgpu.plan import Plan, Speed, Wait
from mgpu.report.screen import console, plan_screen
from mgpu.rig import Rig
from planning import card, decide, read, rig_of

Header = Callable[[str], Path]
Show = Callable[..., list[str]]

SMALL = "Llama-3.1-8B-Instruct-Q4_K_M"
MIDDLE = "Qwen2.5-32B-Instruct-Q4_K_M"
LARGE = "Llama-3.3-70B-Instruct-Q4_K_M"
MOE = "Qwen3-30B-A3B-Q4_K_M"
HUGE = "Kimi-K2-Instruct-Q3_K_M"


def shown(path: Path, machine: Rig, plan: Plan, width: int = 80) -> list[str]:
    stream = io.StringIO()
    console(stream, width=width).print(plan_screen(read(str(path)), machine, plan, None, width))
    return [line.rstrip() for line in stream.getvalue().splitlines()]


@pytest.fixture
def show(header: Header) -> Show:
    def lines(where: str | Rig, model: str, **asked: Any) -> list[str]:
        machine = rig(where) if isinstance(where, str) else where
        return shown(header(model), machine, decide(header(model), machine, **asked))

    return lines


@pytest.mark.parametrize(
    ("where", "model", "asked"),
    [
        ("2x3090", SMALL, {}),
        ("2x3090", SMALL, {"users": 16}),
        ("8-mixed", LARGE, {"users": 8}),
        ("8-mixed", HUGE, {}),
        ("8x3090", HUGE, {"offload": "never"}),
        ("4x3060", LARGE, {"users": 3, "ctx": 2048}),
        ("3090+2x3060", LARGE, {"ctx": 65536, "offload": "allow"}),
        ("2x3090-psu750", LARGE, {"split": "tensor"}),
        ("cpu-only", LARGE, {"offload": "allow"}),
        ("3060", MOE, {"users": 4}),
    ],
)
def test_nothing_is_wider_than_the_screen(show: Show, where: str, model: str, asked: dict[str, Any]) -> None:
    lines = show(where, model, **asked)
    assert max(map(len, lines)) <= 80
    told = [line for line in lines[1 : lines.index("Rules") - 1] if line and not line.startswith((" ", "GPU", "host"))]
    for line in told[:-1]:  # the last is the legend
        assert not line.endswith((",", "after", "x", "context", ";")), f"{line!r} is torn apart"
        assert len(line.split()) > 1, f"{line!r} is left over from the line above"


def test_many_cards_are_named_as_a_range(show: Show) -> None:
    lines = show("8-mixed", "GLM-4.5-Air-Q4_K_M")
    assert any(line.startswith("runs on GPU 0 + GPU 1 + GPU 2 (split by layers)") for line in lines)
    assert any(line.startswith("not started: GPU 0-7 (split by layers)") for line in show("8x3090", HUGE))


def test_what_lacks_stands_beside_its_card(show: Show) -> None:
    cards = [line for line in show("2x3090", LARGE, ctx=65536, offload="never") if line.startswith("GPU ")]
    assert len(cards) == 2
    assert all("short by" in line and line.endswith("GiB") for line in cards)


@pytest.mark.parametrize(
    ("low", "high", "words"),
    [(0.466, 0.957, "0.47-0.96 s"), (0.42, 1.23, "0.4-1.2 s"), (8.6, 18.2, "9-18 s"), (150.4, 312.8, "150-313 s")],
)
def test_waits_in_plain_seconds(header: Header, low: float, high: float, words: str) -> None:
    machine = rig("3090")
    plan = decide(header(SMALL), machine)
    wait = Wait(prompt_tokens=2048, expected=low, low=low, high=high)
    plan = replace(plan, forecast=replace(plan.forecast, first_token=wait))
    assert any(line.endswith(f"first token of a 2048-token prompt after {words}") for line in shown_small(header, plan))


def shown_small(header: Header, plan: Plan) -> list[str]:
    return shown(header(SMALL), rig("3090"), plan)


def test_alternatives_have_figures_in_one_piece(show: Show) -> None:
    lines = show("4x3060", MIDDLE, users=8)
    assert "Also considered (tok/s predicted; of all users together)" in lines
    row = next(line for line in lines if line.startswith("  GPU 0-3, tensor ranks"))
    speed, total = row.split("tensor ranks")[1].split("  experimental")[0].strip().split("; ")
    assert all(figure.replace(".", "").isdigit() for figure in (*speed.split("-"), total))


def test_the_host_s_layers_and_the_experts_of_more(show: Show) -> None:
    lines = show("3060", MOE, runtime_args=("-ngl", "40", "-ncmoe", "30"))
    assert any(line.startswith("host RAM") and "9 layers, experts of 21 more" in line for line in lines)


def test_no_speed_is_shown_where_none_is_known(show: Show) -> None:
    lines = show(rig_of(card(0, 24, None)), SMALL)
    verdict = next(line for line in lines if line.startswith("runs on"))
    assert verdict == "runs on GPU 0 (one card)"
    assert not any("tok/s" in line for line in lines[:6])


@pytest.mark.parametrize(
    ("expected", "words"),
    [(109.3, "98-120 tok/s predicted"), (3.52, "3.2-3.9 tok/s predicted"), (0.043, "0.04-0.05 tok/s predicted")],
)
def test_decimals_where_they_matter(expected: float, words: str) -> None:
    assert Speed(expected=expected, low=0.9 * expected, high=1.1 * expected).words == words
