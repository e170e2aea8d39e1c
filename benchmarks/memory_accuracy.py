"""How far mgpu's memory figures are from what llama.cpp reserves, by architecture, over all golden configurations.

    python benchmarks/memory_accuracy.py [--every N]

Errors are shares of what is really reserved on a device (or on the host), negative where mgpu says less. Figures and
their source: tests/data/oracle. Times are given as ratios to reading the models' headers in the same run.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from mgpu.plan import Shape
from mgpu.rig import Gpu
from mgpu.units import GIB
from oracle import TABLES, Answer, Table, answers, footprint_of, goldens, model_names, model_of

PARTS = ("weights", "kv", "compute", "total")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--every", type=int, default=1, metavar="N", help="only every n-th configuration")
    every = parser.parse_args().every
    for table in TABLES:
        print_table(table, [answer for golden in goldens(table)[::every] for answer in answers(golden)])
    print_times()


def print_table(table: Table, all_answers: Sequence[Answer]) -> None:
    """Errors by architecture and part: median, what 95 % stay within, the worst, the worst below."""
    by_architecture: dict[str, list[Answer]] = defaultdict(list)
    for answer in all_answers:
        by_architecture[model_of(answer.golden.model).architecture].append(answer)
    print(f"\n{table}: {len(all_answers)} devices and hosts; errors in per cent as median / 95 % / worst / worst under")
    print(f"{'':14}{'n':>6}" + "".join(f"{part:>28}" for part in PARTS) + f"{'exact':>9}")
    for architecture, group in [*sorted(by_architecture.items()), ("all", list(all_answers))]:
        cells = (_cell(_errors(group, part)) for part in PARTS)
        exact = sum(answer.predicted == answer.real for answer in group) / len(group)
        print(f"{architecture:14}{len(group):>6}" + "".join(cells) + f"{exact:>9.2%}")


def _errors(group: Sequence[Answer], part: str) -> list[float]:
    index = PARTS.index(part)
    if part == "total":
        return [answer.error for answer in group]
    return [
        (answer.predicted[index] - answer.real[index]) / max(answer.real[index], 1)
        for answer in group
        if answer.real[index] or answer.predicted[index]
    ]


def _cell(errors: list[float]) -> str:
    if not errors:
        return f"{'-':>28}"
    sizes = sorted(abs(error) for error in errors)
    figures = (statistics.median(sizes), sizes[int(len(sizes) * 0.95)], sizes[-1], min(0.0, *errors, 0.0))
    return f"{' / '.join(f'{100 * figure:.2f}' for figure in figures):>28}"


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
