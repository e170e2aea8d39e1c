"""The decision table: rigs, models and wishes, and what mgpu answers, as text that a person can read and agree with.

`make docs` writes tests/data/decisions.md, `test_decisions.py` holds every row of it. Speeds are predictions, rounded:
a change of the speed model changes them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from msgspec import Struct

from headers import requantized, write_model
from mgpu.decide.choose import choose
from mgpu.decide.consider import with_reserves
from mgpu.errors import MgpuError
from mgpu.inspect.source import read_model
from mgpu.plan import Plan
from mgpu.report.lines import indices
from mgpu.request import Request
from mgpu.rig import Rig
from mgpu_adapters.registry import load_adapter
from mgpu_profiles.rigs import parse_rig
from mgpu_profiles.store import BUNDLED, Store

#: Rigs beside the bundled ones: cards, RAM in GiB, and lines more. `2 x NAME:GiB @SLOT`.
RIGS: dict[str, tuple[str, int, str]] = {
    "3090+2x3060": ("1 x RTX 3090:24, 2 x RTX 3060:12", 64, ""),
    "4090+3090": ("1 x RTX 4090:24, 1 x RTX 3090:24", 64, ""),
    "5090+3080": ("1 x RTX 5090:32, 1 x RTX 3080:10", 64, ""),
    "rtx8000+p40": ("1 x Quadro RTX 8000:48, 1 x Tesla P40:24", 64, ""),
    "p40+3060ti": ("1 x Tesla P40:24, 1 x RTX 3060 Ti:8", 64, ""),
    "2x5060ti-16": ("2 x RTX 5060 Ti:16 @5.0 x8", 64, ""),
    "2x5060ti-16-gen3": ("2 x RTX 5060 Ti:16 @3.0 x8", 64, ""),
    "2x3090-x1": ("1 x RTX 3090:24, 1 x RTX 3090:24 @3.0 x1", 64, ""),
    "2x3090-psu750": ("2 x RTX 3090:24", 64, "psu_watts = 750"),
    "2x3090-psu1200": ("2 x RTX 3090:24", 64, "psu_watts = 1200"),
    "3x3090-riser": ("1 x RTX 3090:24 @3.0 x1, 2 x RTX 3090:24 @4.0 x8", 64, ""),
    "4x4090": ("4 x RTX 4090:24", 128, ""),
    "4xa100-nvlink": ("4 x NVIDIA A100-SXM4-80GB:80", 512, "nvlink"),
    "8xh100-nvlink": ("8 x NVIDIA H100 80GB HBM3:80", 1024, "nvlink"),
    "2x7900xtx": ("2 x AMD Radeon RX 7900 XTX:24", 64, ""),
    "8-mixed": (
        "1 x RTX 5090:32, 1 x RTX 4090:24, 2 x RTX 3090:24, 1 x RTX 4080:16, 1 x RTX 5060 Ti:16, 2 x RTX 3060:12",
        256,
        "",
    ),
    "4090-server": ("1 x RTX 4090:24", 256, "ram_bandwidth_gbs = 250"),
}

SMALL, MIDDLE, LARGE = "Llama-3.1-8B-Instruct-Q4_K_M", "Qwen2.5-32B-Instruct-Q4_K_M", "Llama-3.3-70B-Instruct-Q4_K_M"
MOE, BIG_MOE, HUGE_MOE = "Qwen3-30B-A3B-Q4_K_M", "GLM-4.5-Air-Q4_K_M", "Kimi-K2-Instruct-Q3_K_M"
GEMMA, OSS = "gemma-3-27b-it-Q4_K_M", "gpt-oss-20b-MXFP4"


class Case(Struct, frozen=True, kw_only=True):
    """One row: a rig, a model (with another quantisation, where one is named), and what is asked."""

    rig: str
    model: str
    quant: str = ""
    asked: dict[str, Any] = {}


def case(rig: str, model: str, quant: str = "", **asked: Any) -> Case:
    return Case(rig=rig, model=model, quant=quant, asked=asked)


SECTIONS: dict[str, tuple[Case, ...]] = {
    "The guide: when several cards make sense": (
        case("cpu-only", LARGE),
        case("cpu-only", LARGE, offload="allow"),
        case("2x3090", LARGE),
        case("3090", MIDDLE, "Q8_0"),
        case("2x3090", MIDDLE, "Q8_0"),
        case("8x3090", SMALL, users=50),
        case("4x3090", SMALL, users=4),
        case("3090+3060", LARGE, "Q3_K"),
        case("3090", LARGE, "Q3_K", offload="allow"),
    ),
    "The guide: when they do not": (
        case("3090", SMALL),
        case("2x3090", SMALL),
        case("4x3090", SMALL),
        case("2x3090", SMALL, split="pipeline"),
        case("4x3090", SMALL, split="pipeline", force=True, gpus=("0", "1", "2", "3")),
        case("3090", MIDDLE),
        case("2x3060", MIDDLE, ctx=2048),
        case("4090", MIDDLE),
        case("4060ti-16", MIDDLE),
        case("4060ti-16", MIDDLE, "Q3_K", ctx=2048),
        case("4090", LARGE),
        case("4090", LARGE, offload="allow"),
        case("4x3060", LARGE),
        case("2x4090", LARGE),
    ),
    "One card, and which": (
        case("4090+3090", SMALL),
        case("4090+3090", MIDDLE),
        case("5090+3080", MIDDLE),
        case("rtx8000+p40", MIDDLE),
        case("p40+3060ti", MIDDLE, ctx=4096),
        case("3090+2x3060", SMALL),
        case("8-mixed", SMALL),
        case("8-mixed", MIDDLE),
        case("2x3090", MIDDLE, ctx=32768),
        case("2x3090", MIDDLE, ctx=32768, kv_type="q8_0"),
        case("2x3090", MIDDLE, reserve=(("0", 3 << 30),)),
        case("h200", LARGE),
        case("m3-max-64", LARGE),
        case("7900xtx", MIDDLE),
    ),
    "A split over mixed cards": (
        case("3090+2x3060", MIDDLE, "Q8_0"),
        case("3090+2x3060", LARGE),
        case("3090+2x3060", GEMMA, "Q8_0"),
        case("rtx8000+p40", LARGE),
        case("rtx8000+p40", LARGE, users=8),
        case("4090+3090", LARGE),
        case("8-mixed", LARGE),
        case("8-mixed", BIG_MOE),
        case("8-mixed", HUGE_MOE, offload="allow"),
        case("4090+3090", LARGE, split="tensor"),
        case("3090+2x3060", LARGE, ctx=65536, kv_type="q8_0", offload="allow"),
    ),
    "By layers or as tensor ranks": (
        case("2x3090-nvlink", LARGE),
        case("2x3090-nvlink", SMALL, split="tensor"),
        case("2x3090-nvlink", SMALL, split="tensor", force=True),
        case("2x3090", LARGE, split="tensor"),
        case("2x5060ti-16", MIDDLE),
        case("2x5060ti-16-gen3", MIDDLE),
        case("2x5060ti-16-gen3", MIDDLE, split="tensor"),
        case("2x3090-x1", LARGE),
        case("2x3090-x1", LARGE, split="tensor"),
        case("3x3090-riser", LARGE),
        case("3x3090-riser", LARGE, split="tensor"),
        case("2x3090", SMALL, runtime_args=("-sm", "tensor")),
        case("4x4090", LARGE),
        case("4xa100-nvlink", LARGE, "F16"),
        case("8xh100-nvlink", LARGE, "F16"),
        case("2x7900xtx", LARGE),
    ),
    "Several users": (
        case("2x3090", SMALL, users=2),
        case("2x3090", MIDDLE, users=2),
        case("2x3090", MIDDLE, users=8),
        case("4x3090", MIDDLE, users=4),
        case("2x4090", LARGE, users=2),
        case("8xh100-nvlink", LARGE, users=16),
        case("3090+3060", SMALL, users=4),
        case("3090", SMALL, users=16),
        case("8-mixed", SMALL, users=12),
    ),
    "Mixtures of experts, and the CPU": (
        case("3090", MOE),
        case("4060ti-16", MOE),
        case("3060", MOE),
        case("3060", OSS),
        case("4060ti-16", OSS),
        case("4090-server", BIG_MOE),
        case("4090-server", LARGE),
        case("4090", BIG_MOE),
        case("cpu-only", MOE),
        case("2x3090", BIG_MOE),
        case("3060", LARGE),
        case("3060", MIDDLE, offload="never"),
    ),
    "The machine": (
        case("2x3090-psu750", LARGE),
        case("2x3090-psu1200", LARGE),
        case("2x3090-psu750", SMALL),
    ),
}


def rig(name: str) -> Rig:
    """A bundled rig, or one of `RIGS`."""
    if name not in RIGS:
        return Store(BUNDLED).load(name)
    cards, ram, more = RIGS[name]
    nvlink = more == "nvlink"
    lines = ["schema = 1", f'name = "{name}"', "[host]", f"ram_gib = {ram}", "" if nvlink else more]
    count = 0
    for group in cards.split(", "):
        times, _, card = group.partition(" x ")
        told, _, slot = card.partition(" @")
        model, _, size = told.rpartition(":")
        vendor = "" if model.startswith(("NVIDIA", "AMD")) else "NVIDIA " + ("GeForce " if model[:3] == "RTX" else "")
        for _ in range(int(times)):
            lines += ["[[gpu]]", f'name = "{vendor}{model}"', f"vram_mib = {int(size) * 1024}"]
            lines += [f'pcie = "{slot}"'] if slot else []
            count += 1
    for a in range(count if nvlink else 0):
        for b in range(a + 1, count):
            lines += ["[[link]]", f"gpus = [{a}, {b}]", 'kind = "nvlink"']
    return parse_rig("\n".join(lines), name)


def decide(one: Case, directory: Path) -> Plan:
    """The plan of a row. Raises `MgpuError` where there is none."""
    model = read_model(str(write_model(one.model, directory)))
    if one.quant:
        model = requantized(model, one.quant)
    request, adapter = Request(**one.asked), load_adapter("llama.cpp")
    return choose(request, with_reserves(request, rig(one.rig)), adapter.job(model, request, adapter.assumed()))


def row(one: Case, directory: Path) -> str:
    """One line of the table."""
    name = one.model.rpartition("-")[0] + f"-{one.quant}" if one.quant else one.model
    asked = " ".join(f"--{key.replace('_', '-')} {_shown(value)}" for key, value in one.asked.items())
    try:
        answer, speed, why = _told(decide(one, directory))
    except MgpuError as error:
        answer, speed, why = f"exit {error.exit_code}: {error.message}", "", ""
    return f"| {one.rig} | {name} | {asked} | {answer} | {speed} | {why} |"


def _told(plan: Plan) -> tuple[str, str, str]:
    """(where it runs or why not, at what speed, which rules spoke)."""
    if plan.refusal is not None:
        answer = f"exit {plan.refusal.exit_code}: {plan.refusal.message}"
    elif plan.placement == "cpu":
        answer = "CPU"
    else:
        answer = f"{plan.placement} on {indices(plan.layout.gpus)}"
        counts = plan.layout.counts
        answer += f", layers {'+'.join(map(str, counts))}" if plan.tensor_split or plan.placement == "offload" else ""
        shape = plan.layout.shape
        answer += f", {shape.host_layers} on the CPU" if shape.host_layers else ""
        answer += f", experts of {shape.host_experts} on the CPU" if shape.host_experts else ""
    speed = "" if plan.tok_s is None or plan.refusal is not None else f"{plan.tok_s.expected:.{_digits(plan)}f}"
    together = plan.forecast.total_tok_s
    speed += f" ({together.expected:.0f} together)" if speed and together else ""
    marks = {"applies": "", "warns": "!", "refuses": "x "}
    spoke = [f"{marks[rule.verdict]}{rule.id}" for rule in plan.rules if not rule.quiet and rule.verdict != "passes"]
    return answer, speed, ", ".join(spoke)


def _digits(plan: Plan) -> int:
    return 0 if plan.tok_s is None or plan.tok_s.expected >= 10 else 1


def _shown(value: Any) -> str:
    if isinstance(value, tuple):
        return ",".join("=".join(map(str, item)) if isinstance(item, tuple) else str(item) for item in value)
    return str(value).lower() if isinstance(value, bool) else str(value)


def table(directory: Path) -> str:
    """The whole document."""
    lines = [
        "# What mgpu decides",
        "",
        "Each row is one decision, for llama.cpp: a rig, a model, what was asked beside, and the answer: placement,",
        "cards, layers on each; tokens per second for one user (all together), predicted; the rules that had a",
        "say (`!` warns, `x` refuses). Made by `make docs`, held by `tests/test_decisions.py`.",
    ]
    for title, cases in SECTIONS.items():
        lines += ["", f"## {title}", "", "| rig | model | asked | answer | tok/s | rules |"]
        lines.append("|---|---|---|---|---|---|")
        lines += [row(one, directory) for one in cases]
    return "\n".join(lines) + "\n"
