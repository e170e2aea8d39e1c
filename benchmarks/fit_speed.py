"""Finds the constants of `mgpu.decide.speed` from the public rows: each group by the rows that tell it.

    python benchmarks/fit_speed.py [--group NAME] [--without CARD]

A search along one constant after the other, in ever smaller steps, for the least mean error in size (of the logarithm,
so that outliers do not rule). It starts from the constants as they are and prints those it ends with; nothing is
written. Groups are fitted in this order, each with what came before held fixed.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from msgspec import Struct
from msgspec.structs import replace

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.public_rows import Row, read_rows

from mgpu.decide.speed import decode, families, links, pace
from mgpu.decide.speed.decode import decode_seconds, is_older

STEPS = (1.2, 1.08, 1.03, 1.01)


class Knob(Struct, frozen=True, kw_only=True):
    """One constant: where it lives. `field` "a.b": of a family's older builds; `names`: families that share it."""

    names: tuple[str, ...]
    field: str

    def get(self) -> float:
        family = getattr(families, self.names[0])
        if self.field.startswith("older."):
            return float(getattr(family.older, self.field.removeprefix("older.")))
        return float(getattr(family, self.field))

    def set(self, value: float) -> None:
        for name in self.names:
            family = getattr(families, name)
            if self.field.startswith("older."):
                older = replace(family.older, **{self.field.removeprefix("older."): value})
                setattr(families, name, replace(family, older=older))
            else:
                setattr(families, name, replace(family, **{self.field: value}))
        pace.pace_of.cache_clear()


class Figure(Struct, frozen=True, kw_only=True):
    """A constant of a module."""

    name: str

    def get(self) -> float:
        return float(getattr(families, self.name))

    def set(self, value: float) -> None:
        for module in (families, pace, decode, links):
            if hasattr(module, self.name):
                setattr(module, self.name, value)
        pace.pace_of.cache_clear()


PLAIN = ("GDDR", "TURING", "PASCAL")
NVIDIA = ("GDDR", "TURING", "PASCAL", "HBM", "HBM_BOARD")


class Group(Struct, frozen=True, kw_only=True):
    name: str
    knobs: tuple[Knob | Figure, ...]
    rows: Callable[[Row], bool]


def _vendor(row: Row) -> str:
    return row.gpus[0].vendor


def _is_older(row: Row) -> bool:
    return is_older(row.job.work, row.rig) and row.mode != "tensor"


GROUPS = (
    Group(
        name="nvidia, b2824-b2833",
        knobs=(
            Knob(names=NVIDIA, field="read"), Figure(name="ISSUE"), Figure(name="GEFORCE_CLOCK"),
            *(Knob(names=NVIDIA, field=f"older.{field}") for field in ("layer", "cell", "cell_clocks")),
            Knob(names=PLAIN, field="hop"), Knob(names=("HBM",), field="hop"), Knob(names=("HBM_BOARD",), field="hop"),
        ),
        rows=lambda row: _vendor(row) == "nvidia" and _is_older(row) and "Xiongjie" in row.source,
    ),
    Group(
        name="nvidia, 2025-2026",
        knobs=(
            Knob(names=("GDDR", "HBM", "HBM_BOARD"), field="layer"), Knob(names=("TURING", "PASCAL"), field="layer"),
            *(Knob(names=NVIDIA, field=field) for field in ("recurrent", "routed", "cache")),
        ),
        rows=lambda row: _vendor(row) == "nvidia" and not _is_older(row) and not row.gpus[0].unified
        and row.mode != "tensor" and not (row.gpus[0].device or ""),
    ),
    Group(
        name="nvidia, unified",
        knobs=tuple(Knob(names=("LPDDR",), field=field) for field in ("read", "layer", "recurrent", "routed", "cache")),
        rows=lambda row: _vendor(row) == "nvidia" and row.gpus[0].unified,
    ),
    Group(
        name="apple",
        knobs=(
            Knob(names=("APPLE",), field="read"), Knob(names=("APPLE",), field="older.layer"),
            Knob(names=("APPLE",), field="older.cell"), Knob(names=("APPLE",), field="older.cell_clocks"),
            Knob(names=("APPLE",), field="layer"), Knob(names=("APPLE",), field="recurrent"),
            Knob(names=("APPLE",), field="routed"), Figure(name="M1_K_QUANTS"),
        ),
        rows=lambda row: _vendor(row) == "apple",
    ),
    Group(
        name="amd",
        knobs=tuple(Knob(names=("RADEON",), field=field) for field in ("read", "layer", "recurrent", "routed", "hop")),
        rows=lambda row: _vendor(row) == "amd" and row.mode != "tensor",
    ),
)  # fmt: skip


def loss(rows: Sequence[Row]) -> float:
    """The mean size of the logarithm of predicted to measured."""
    total = 0.0
    for row in rows:
        older = is_older(row.job.work, row.rig)
        seconds = decode_seconds(row.job.work, row.layout, row.gpus, row.rig, older=older)
        total += abs(math.log(seconds * row.tok_s)) if seconds else 0.0
    return total / max(len(rows), 1)


def fit(group: Group, rows: Sequence[Row]) -> None:
    """Leaves the constants where no single step betters them."""
    best = loss(rows)
    for step in STEPS:
        better = True
        while better:
            better = False
            for knob in group.knobs:
                start = knob.get()
                for value in (start * step, start / step):
                    knob.set(value)
                    now = loss(rows)
                    if now < best - 1e-6:
                        best, better = now, True
                        break
                    knob.set(start)


@contextmanager
def refitted_without(card: str, rows: Sequence[Row]) -> Iterator[None]:
    """Constants as they are found without any row of `card`, for as long as the context lasts."""
    start = [(knob, knob.get()) for group in GROUPS for knob in group.knobs]
    try:
        for group in GROUPS:
            mine = [row for row in rows if group.rows(row)]
            others = [row for row in mine if card not in row.cards]
            if others and len(others) < len(mine):
                fit(group, others)
        yield
    finally:
        for knob, value in start:
            knob.set(value)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--group", default="")
    parser.add_argument("--without", default="", help="leave out the rows of cards with this in their name")
    asked = parser.parse_args()
    everything = [row for row in read_rows() if not asked.without or asked.without not in row.cards]
    for group in GROUPS:
        rows = [row for row in everything if group.rows(row)]
        if asked.group not in group.name or not rows:
            continue
        before = loss(rows)
        fit(group, rows)
        print(f"{group.name}: {len(rows)} rows, mean error {before:.2%} -> {loss(rows):.2%}")
        for knob in group.knobs:
            label = knob.name if isinstance(knob, Figure) else f"{'/'.join(knob.names)}.{knob.field}"
            print(f"    {label:40} {knob.get():.4g}")


if __name__ == "__main__":
    main()
