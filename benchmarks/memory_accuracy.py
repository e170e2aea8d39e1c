"""How far mgpu's memory figures are from what llama.cpp reserves, by architecture, over all golden configurations.

    python benchmarks/memory_accuracy.py [--every N] [--markdown] [--write docs/memory.md]

Errors are shares of what is really reserved on a device (or on the host), negative where mgpu says less. Figures and
their source: tests/data/oracle. Times are given as ratios to reading the models' headers in the same run.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

from msgspec import Struct

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from mgpu.plan import Shape
from mgpu.rig import Gpu
from mgpu.units import GIB
from oracle import TABLES, Answer, Table, answers, footprint_of, goldens, model_names, model_of

PARTS: Final = ("weights", "kv", "compute", "total")

TITLES: Final = {
    "rpc": "As reserved on devices without rules of their own (CPU behind `ggml-rpc-server`)",
    "cuda": "As reserved under CUDA's rules of allocation (read from its source, not measured on a GPU)",
}


class Errors(Struct, frozen=True, kw_only=True):
    """Shares of the real size: of sizes without sign the median, what 95 % stay within, the worst; the worst below."""

    median: float
    most: float
    worst: float
    under: float

    def __str__(self) -> str:
        if not self.worst:
            return "exact"
        return " / ".join(f"{100 * share:.2f}" for share in (self.median, self.most, self.worst, self.under))


class Row(Struct, frozen=True, kw_only=True):
    """The devices and hosts of one architecture, or of all. `exact`: the share with every part right to the byte."""

    architecture: str
    n: int
    errors: tuple[Errors, ...]  # by part
    exact: float

    def cells(self) -> tuple[str, ...]:
        return (self.architecture, str(self.n), *map(str, self.errors), f"{self.exact:.2%}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--every", type=int, default=1, metavar="N", help="only every n-th configuration")
    parser.add_argument("--markdown", action="store_true", help="tables for docs/memory.md")
    parser.add_argument("--write", type=Path, metavar="FILE", help="put those tables into FILE, between its markers")
    asked = parser.parse_args()
    tables = {table: rows(sample(table, asked.every)) for table in TABLES}
    if asked.write or asked.markdown:
        text = "\n".join(line for table in TABLES for line in markdown(table, tables[table]))
        if asked.write:
            write_section(asked.write, "memory_accuracy", text)
        else:
            print(text)
        return
    for table in TABLES:
        print(f"\n{TITLES[table]}; errors in per cent as median / 95 % / worst / worst under")
        print(f"{'':14}{'n':>6}" + "".join(f"{part:>28}" for part in PARTS) + f"{'exact':>9}")
        for row in tables[table]:
            architecture, n, *cells, exact = row.cells()
            print(f"{architecture:14}{n:>6}" + "".join(f"{cell:>28}" for cell in cells) + f"{exact:>9}")
    print_times()


def sample(table: Table, every: int) -> list[Answer]:
    """mgpu's answers, and the real ones, for every n-th configuration."""
    return [answer for golden in goldens(table)[::every] for answer in answers(golden)]


def rows(all_answers: Sequence[Answer]) -> list[Row]:
    """Architecture by architecture, then all."""
    by_architecture: dict[str, list[Answer]] = defaultdict(list)
    for answer in all_answers:
        by_architecture[model_of(answer.golden.model).architecture].append(answer)
    return [
        Row(
            architecture=architecture,
            n=len(group),
            errors=tuple(_errors(group, part) for part in range(len(PARTS))),
            exact=sum(answer.predicted == answer.real for answer in group) / len(group),
        )
        for architecture, group in [*sorted(by_architecture.items()), ("all", list(all_answers))]
    ]


def _errors(group: Sequence[Answer], part: int) -> Errors:
    if PARTS[part] == "total":
        errors = [answer.error for answer in group]
    else:
        pairs = ((answer.predicted[part], answer.real[part]) for answer in group)
        errors = [(said - real) / max(real, 1) for said, real in pairs if said or real]
    sizes = sorted(abs(error) for error in errors) or [0.0]
    return Errors(
        median=statistics.median(sizes),
        most=sizes[int(len(sizes) * 0.95)],
        worst=sizes[-1],
        under=min(0.0, *errors, 0.0),
    )


def markdown(table: Table, table_rows: Sequence[Row]) -> Iterator[str]:
    """One table, for docs/memory.md."""
    yield from ("", f"### {TITLES[table]}", "")
    yield "| architecture | devices and hosts | weights | KV cache and state | compute | total | exact to the byte |"
    yield "|---|--:|---|---|---|---|--:|"
    for row in table_rows:
        yield f"| {' | '.join(row.cells())} |"


def write_section(path: Path, name: str, text: str) -> None:
    """Puts `text` in the place of what stands between `<!-- name: begin -->` and `<!-- name: end -->`."""
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    old = path.read_text(encoding="utf-8")
    if old.count(begin) != 1 or old.count(end) != 1:
        raise SystemExit(f"{path} has not both {begin} and {end}")
    before, after = old[: old.index(begin) + len(begin)], old[old.index(end) :]
    path.write_text(f"{before}\n{text.strip()}\n{after}", encoding="utf-8")


def print_times() -> None:
    """What a search pays: the first time a kind of share is asked about, and every further time."""
    card = Gpu(index=0, name="card", vendor="nvidia", total_bytes=24 * GIB, free_bytes=24 * GIB)
    shape = Shape(n_devices=4)
    first, again, parsing, n = 0.0, 0.0, 0.0, 0
    for name in model_names():
        model_of.cache_clear()
        start = time.process_time()
        model_of(name)
        parsing += time.process_time() - start
        need = footprint_of(name).with_settings(footprint_of(name).settings)
        spans = [range(at, at + need.n_units // 4) for at in range(need.n_units - need.n_units // 4)]
        for passed in range(2):
            start = time.process_time()
            for span in spans:
                need.device(span, shape, card)
            spent = time.process_time() - start
            first, again = (first + spent, again) if not passed else (first, again + spent)
        n += len(spans)
    header = parsing / len(model_names())
    first, again = first / n / header, again / n / header
    print(f"\none answer: {first:.3f} headers read when first asked, {again:.4f} when asked again")


if __name__ == "__main__":
    main()
