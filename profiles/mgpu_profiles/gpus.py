"""What a card can do, by the name its driver gives it.

`gpus.csv`: one row a card, from the vendors' datasheets, cross-checked with a public specification database (2026-11).
Where a vendor's figure and the database differ, the vendor's stands; "unsure" in a `note` says what has no good source.
`fp16_tensor_tflops_dense` counts FP32 accumulation; cards without tensor cores give their plain FP16 rate.
`fp32_tflops` is the datasheets' vector rate at boost clock (units x 2 x clock; RDNA 3 and later count dual issue).
Rows are in matching order: a pattern may rely on narrower ones above it.
"""

from __future__ import annotations

import csv
import functools
import re
from pathlib import Path
from typing import Final, cast

from msgspec import Struct

from mgpu.rig import Vendor
from mgpu.units import GB, GIB

_TABLE: Final = Path(__file__).with_name("gpus.csv")
_MARKS: Final = re.compile(r"\((?:R|TM)\)|[®™]", re.IGNORECASE)

#: Laptop parts carry the desktop card's name and a fraction of its bandwidth: no row is better than a wrong one.
_LAPTOP: Final = re.compile(r"\bLaptop\b|with Max-Q|\bMobile\b|\bRX \d{4}[MS]\b|\bArc A\d{3}M\b", re.IGNORECASE)

#: The plain text a pattern starts with, after assertions: without it in the name, the pattern need not be compiled.
_STEM: Final = re.compile(r"(?:\\b|\(\?<![^)]*\))*([\w ]+)")


class GpuSpec(Struct, frozen=True, kw_only=True):
    """One card as its vendor specifies it. None: not specified, or unknown.

    `vram_bytes` is the nominal size (drivers show a little less), `bandwidth_bytes_per_s` the theoretical one,
    `compute_capability` CUDA's ("8.6") or AMD's target ("gfx1100"), `fp16_tflops` dense with FP32 accumulation.
    """

    name: str
    vendor: Vendor
    vram_bytes: int | None
    bandwidth_bytes_per_s: int | None
    tdp_watts: int | None
    pcie_gen: int | None
    pcie_lanes: int | None
    compute_capability: str | None
    nvlink: bool
    fp32_tflops: float | None
    fp16_tflops: float | None
    unified: bool


def plain_name(name: str) -> str:
    """`"Intel(R)  Arc(tm) A770"` as `"Intel Arc A770"`: no trade marks, single spaces."""
    return " ".join(_MARKS.sub(" ", name).split())


def find_spec(name: str, total_bytes: int | None = None) -> GpuSpec | None:
    """The card called `name` by its driver, or None for one the table does not know (every laptop part).

    Where one name was sold with several memory sizes, the one nearest to `total_bytes`; without it, the first listed.
    """
    plain = plain_name(name)
    if _LAPTOP.search(plain):
        return None
    folded = plain.lower()
    for pattern, (stems, rows) in _patterns().items():
        if any(stem in folded for stem in stems) and re.search(pattern, plain, re.IGNORECASE):
            return _spec(min(rows, key=lambda row: _distance(row, total_bytes)))
    return None


@functools.cache
def _patterns() -> dict[str, tuple[tuple[str, ...], tuple[dict[str, str], ...]]]:
    """Name pattern -> (its stems, lower case; the rows that share it), in the table's order."""
    rows: dict[str, list[dict[str, str]]] = {}
    with _TABLE.open(encoding="utf-8", newline="") as lines:
        for row in csv.DictReader(lines):
            rows.setdefault(row["name_pattern"], []).append(row)
    return {pattern: (_stems(pattern), tuple(group)) for pattern, group in rows.items()}


def _stems(pattern: str) -> tuple[str, ...]:
    """What a name must contain for `pattern` to match: one of these. Alternatives are only ever at the top level
    or within a look-ahead that follows the stem."""
    choices = [pattern] if "(" in pattern else pattern.split("|")
    return tuple(match[1].lower() for match in map(_STEM.match, choices) if match)


def _distance(row: dict[str, str], total_bytes: int | None) -> float:
    vram = _number(row["vram_gb"])
    return 0.0 if vram is None or total_bytes is None else abs(vram * GIB - total_bytes)


def _number(text: str) -> float | None:
    return float(text) if text else None


def _whole(text: str, unit: int = 1) -> int | None:
    return round(float(text) * unit) if text else None


def _spec(row: dict[str, str]) -> GpuSpec:
    return GpuSpec(
        name=row["name"],
        vendor=cast("Vendor", row["vendor"]),
        vram_bytes=_whole(row["vram_gb"], GIB),
        bandwidth_bytes_per_s=_whole(row["bandwidth_gbs"], GB),
        tdp_watts=_whole(row["tdp_w"]),
        pcie_gen=_whole(row["pcie_gen"]),
        pcie_lanes=_whole(row["pcie_lanes"]),
        compute_capability=row["compute_capability"] or None,
        nvlink=row["nvlink"] == "yes",
        fp32_tflops=_number(row["fp32_tflops"]),
        fp16_tflops=_number(row["fp16_tensor_tflops_dense"]),
        unified=row["note"].startswith("unified"),
    )
