"""How far predicted speeds are from what people measured: the error over public rows, by class of card.

    python benchmarks/speed_accuracy.py

Rows and their source: benchmarks/data. Cards by name from the bundled table; the model from its header.
"""

from __future__ import annotations

import csv
import re
import statistics
import sys
import tempfile
from collections import defaultdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from headers import write_model
from mgpu.adapter import Job
from mgpu.decide.place import by_room
from mgpu.decide.speed import forecast
from mgpu.inspect.source import read_model
from mgpu.model import Model
from mgpu.request import Request
from mgpu.rig import Gpu, Rig
from mgpu.units import GIB
from mgpu_adapters.llamacpp.adapter import LlamaCpp
from mgpu_profiles.gpus import find_spec

ROOT = Path(__file__).parents[1]

#: The same layers, widths and types; the 3.1 and 3.3 models differ from Llama 3 in their training alone.
MODELS = {"Llama-3-8B": "Llama-3.1-8B-Instruct-Q4_K_M", "Llama-3-70B": "Llama-3.3-70B-Instruct-Q4_K_M"}

#: The driver's names of cards that the source names otherwise.
NAMES = {"A100 PCIe 80GB": "A100 80GB PCIe", "A100 SXM 80GB": "A100-SXM4-80GB"}


def cards(text: str) -> list[Gpu]:
    """`"2x RTX 3090 24GB"` as two cards with the bandwidth of the table."""
    match = re.fullmatch(r"(?:(\d+)x )?(.+)", text)
    assert match is not None
    name = NAMES.get(match[2], match[2])
    spec = find_spec(name)
    if spec is None or spec.bandwidth_bytes_per_s is None:
        raise SystemExit(f"no card {name!r} in the table")
    return [
        Gpu(
            index=index, name=name, vendor="nvidia", total_bytes=80 * GIB, free_bytes=80 * GIB,
            bandwidth_bytes_per_s=spec.bandwidth_bytes_per_s,
        )
        for index in range(int(match[1] or 1))
    ]  # fmt: skip


def predicted(model: Model, ctx: int, gpus: list[Gpu]) -> float:
    adapter = LlamaCpp()
    job: Job = adapter.job(model, Request(ctx=ctx), adapter.assumed())
    rig = Rig(name="public", source="profile", gpus=tuple(gpus))
    speed = forecast(job, by_room(job, gpus), gpus, rig).tok_s
    assert speed is not None
    return speed.expected


def main() -> None:
    errors: dict[str, list[float]] = defaultdict(list)
    with tempfile.TemporaryDirectory() as directory:
        models = {name: read_model(str(write_model(of, Path(directory)))) for name, of in MODELS.items()}
        with (ROOT / "benchmarks" / "data" / "tok_s_public.csv").open(encoding="utf-8") as file:
            for row in csv.DictReader(file):
                gpus = cards(row["gpus"])
                error = predicted(models[row["model"]], int(row["ctx"]), gpus) / float(row["tok_s_gen"]) - 1
                kind = "HBM" if "A100" in gpus[0].name or "H100" in gpus[0].name else "GDDR"
                for name in (f"{kind}, one card" if len(gpus) == 1 else f"{kind}, several cards", "all"):
                    errors[name].append(error)
    print(f"{'rows of':22} {'n':>4} {'median':>8} {'90 %':>8} {'worst':>8}   (error of the prediction, without sign)")
    for name in sorted(errors):
        sizes = sorted(abs(error) for error in errors[name])
        nine_of_ten = sizes[int(0.9 * (len(sizes) - 1))]
        print(f"{name:22} {len(sizes):4} {statistics.median(sizes):8.1%} {nine_of_ten:8.1%} {sizes[-1]:8.1%}")


if __name__ == "__main__":
    main()
