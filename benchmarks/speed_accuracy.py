"""How far predicted speeds are from what people measured: errors by class of card, splits, and the guide's figures.

    python benchmarks/speed_accuracy.py [--rows] [--loco] [--write docs/speed.md]

Rows and their sources: benchmarks/data. Cards by name from the bundled table; models from headers or published shapes.
`--rows` prints every row; `--loco` fits the constants without each card in turn, and counts that card's rows.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import re
import statistics
import sys
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.fit_speed import refitted_without
from benchmarks.public_rows import Row, read_rows
from benchmarks.speed_pairs import print_pairs

from mgpu.decide.speed import forecast

BEGIN, END = "<!-- speed_accuracy: begin -->", "<!-- speed_accuracy: end -->"


def error_of(row: Row) -> float | None:
    """Predicted over measured speed, less one."""
    speed = forecast(row.job, row.layout, row.gpus, row.rig).tok_s
    return None if speed is None else speed.expected / row.tok_s - 1


def print_table(errors: dict[str, list[float]]) -> None:
    print(f"{'rows of':28} {'n':>4} {'median':>8} {'90 %':>8} {'worst':>8} {'bias':>8}")
    for name in sorted(errors):
        print(f"{name:28} {summary(errors[name])}")


def summary(errors: Sequence[float]) -> str:
    sizes = sorted(abs(error) for error in errors)
    nine_of_ten = sizes[int(0.9 * (len(sizes) - 1))]
    bias = statistics.median(errors)
    return f"{len(sizes):4} {statistics.median(sizes):8.1%} {nine_of_ten:8.1%} {sizes[-1]:8.1%} {bias:+8.1%}"


def by_kind(rows: Iterable[Row], *, show: bool = False) -> dict[str, list[float]]:
    errors: dict[str, list[float]] = defaultdict(list)
    for row in rows:
        error = error_of(row)
        if error is None:
            continue
        mode = f"{row.kind}, tensor" if row.mode == "tensor" else row.kind
        for name in (mode, "all" if row.mode != "tensor" else "all, tensor"):
            errors[name].append(error)
        if show:
            print(
                f"{error:+7.1%}  {row.cards:34} {row.model:22} {row.quant:10} {row.mode:7} {row.ctx:6} {row.note[:50]}"
            )
    return errors


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", action="store_true")
    parser.add_argument("--loco", action="store_true")
    parser.add_argument("--write", type=Path, help="put all tables into this file, between its marks")
    asked = parser.parse_args()
    if asked.write is None:
        print_all(show=asked.rows, loco=asked.loco)
        return
    tables = io.StringIO()
    with contextlib.redirect_stdout(tables):
        print_all(loco=True)
    before, _, rest = asked.write.read_text(encoding="utf-8").partition(BEGIN)
    after = rest.partition(END)[2]
    text = f"{before}{BEGIN}\n```\n{tables.getvalue().strip()}\n```\n{END}{after}"
    asked.write.write_text(text, encoding="utf-8")


def print_all(*, show: bool = False, loco: bool = False) -> None:
    rows = list(read_rows())
    print_table(by_kind(rows, show=show))
    print_pairs()
    if loco:
        print_left_out(rows)


def print_left_out(rows: Sequence[Row]) -> None:
    """Each card's errors with constants that were fitted without any row of it."""
    names = sorted({re.sub(r"^\dx ", "", row.cards) for row in rows if " + " not in row.cards})
    errors: dict[str, list[float]] = defaultdict(list)
    print("\nLeft out while fitting")
    for name in names:
        mine = [row for row in rows if name in row.cards and row.mode != "tensor"]
        with refitted_without(name, rows):
            errors[name] += [error for row in mine if (error := error_of(row)) is not None]
    errors = {name: sizes for name, sizes in errors.items() if sizes}
    errors["all"] = [error for sizes in errors.values() for error in sizes]
    print_table(errors)


if __name__ == "__main__":
    main()
