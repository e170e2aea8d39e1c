"""mgpu's memory figures beside what real CUDA and Metal cards were given, in the builds of their day.

    python benchmarks/memory_real_cuda.py [--write docs/memory.md]

Rows and their source: benchmarks/data. Weights and cache have not changed since and must agree to the digit printed;
compute buffers have: mgpu's are those of llama.cpp b11434, without flash attention (as measured) and with it (default).
"""

from __future__ import annotations

import argparse
import csv
import re
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from msgspec import Struct
from msgspec.structs import replace

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from benchmarks.memory_accuracy import write_section

from mgpu.model import Model
from mgpu.plan import Shape
from mgpu.rig import Gpu
from mgpu.units import GIB, MIB
from mgpu_adapters.llamacpp.assign import assign
from mgpu_adapters.llamacpp.memory import footprint
from mgpu_adapters.llamacpp.settings import Settings
from oracle import model_of

ROWS: Final = Path(__file__).parent / "data" / "memory_real_cuda.csv"

#: The same layers, widths and types. Llama 3.1 and 3.3 have a tensor more than Llama 3, of 256 bytes: `rope_freqs`.
MODELS: Final = {
    "Llama-3-8B": "Llama-3.1-8B-Instruct-Q4_K_M",
    "Llama-3.1-8B": "Llama-3.1-8B-Instruct-Q4_K_M",
    "Llama-3.3-70B": "Llama-3.3-70B-Instruct-Q4_K_M",
}

COLUMNS: Final = ("weights_mib", "kv_mib", "compute_mib")

#: The quantiser counts blocks in the order of the file, for which of them get more bits. Llama 3 was converted from
#: shards with their tensors by name: "9" after "20". The header has them by number.
WRITTEN: Final = (*range(9), *range(10, 21), 9, *range(21, 32))

#: Weights and cache must be this near, in MiB: logs have two decimals, and Metal's buffers whole pages of 16 KiB.
DIGIT: Final = {"CUDA": 0.0051, "Metal": 16 / 1024}

#: Projections are in whole MiB, rounded down.
WHOLE: Final = 1.0

#: llama.cpp has several batches in flight only on devices that can wait for each other: not on simulated ones. This
#: turns them off in mgpu's figures as well: it names no tensor, and any override of tensors does.
NO_COPIES: Final = (("no tensor", "CPU"),)

Parts = tuple[float | None, float | None, float | None]  # weights, cache, compute, in MiB; None: not told


class Setup(Struct, frozen=True, kw_only=True):
    """What was asked of which devices."""

    model: str
    ctx: int
    n_devices: int
    backend: str  # CUDA, Metal, or simulated devices in a projection

    @property
    def projected(self) -> bool:
        return self.backend == "simulated"

    def said(self, *, flash_attn: bool) -> dict[str, Parts]:
        """mgpu's figures by device, `host` last."""
        copies_off = NO_COPIES if self.projected else ()
        settings = Settings(n_ctx=self.ctx, flash_attn=flash_attn, override_tensor=copies_off)
        need = footprint(_model(self.model), settings)
        shape = Shape(n_devices=self.n_devices)
        names = {"CUDA": "CUDA", "Metal": "MTL", "simulated": "CUDA"}
        card = Gpu(index=0, name="card", vendor="unknown", total_bytes=80 * GIB, free_bytes=80 * GIB)
        gpus = [replace(card, device=f"{names[self.backend]}{number}") for number in range(self.n_devices)]
        parts: dict[str, Parts] = {}
        start = 0
        for number, count in enumerate(assign([1.0] * self.n_devices, need.n_units, 0)):
            device = need.device(range(start, start + count), shape, gpus[number])
            parts[str(number)] = (device.weights / MIB, device.kv / MIB, device.compute / MIB)
            start += count
        host = need.host(shape, tuple(gpus))
        return parts | {"host": (host.weights / MIB, host.kv / MIB, host.compute / MIB)}


class Line(Struct, frozen=True, kw_only=True):
    """One device, or the host: what `n` logs tell alike, and what mgpu says."""

    setup: Setup
    device: str
    n: int
    real: Parts
    without: Parts  # flash attention
    default: Parts

    @property
    def stored_agree(self) -> bool:
        """Whether weights and cache, where told, are the planned ones."""
        pairs = [(real, said or 0) for real, said in zip(self.real[:2], self.default, strict=False) if real is not None]
        if self.setup.projected:
            return all(real <= said < real + WHOLE for real, said in pairs)
        return all(abs(real - said) <= DIGIT[self.setup.backend] for real, said in pairs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", type=Path, metavar="FILE", help="put the tables into FILE, between its markers")
    asked = parser.parse_args()
    text = "\n".join(markdown(list(lines())))
    if asked.write:
        write_section(asked.write, "memory_real_cuda", text)
    else:
        print(text)


def lines() -> Iterator[Line]:
    """Every kind of device once."""
    for setup, counted in logged().items():
        without, default = setup.said(flash_attn=False), setup.said(flash_attn=True)
        for (device, real), n in counted.items():
            yield Line(
                setup=setup, device=device, n=n, real=real, without=without[device], default=default[device]
            )  # fmt: skip


def logged() -> dict[Setup, Counter[tuple[str, Parts]]]:
    """How many logs tell the same of a device, by setup. Of the host, weights and compute are rows of their own."""
    counted: dict[Setup, Counter[tuple[str, Parts]]] = defaultdict(Counter)
    with ROWS.open(encoding="utf-8") as file:
        for row in csv.DictReader(file):
            setup = Setup(
                model=row["model"], ctx=int(row["ctx"]), n_devices=int(row["n_gpus"]), backend=_backend(row["gpus"])
            )
            weights, kv, compute = (float(row[key]) if row[key] else None for key in COLUMNS)
            device = row["device"]
            name = "host" if device in {"CPU", "CUDA_Host"} else re.findall(r"\d*$", device)[0] or "0"
            counted[setup][name, (weights, kv, compute)] += 1
    return counted


def _backend(gpus: str) -> str:
    if "simulated" in gpus:
        return "simulated"
    return "Metal" if re.match(r"M\d ", gpus) else "CUDA"


def _model(name: str) -> Model:
    """The model by its header. Of Llama-3-8B only a relative's is at hand, which differs as said at the constants."""
    model = model_of(MODELS[name])
    if name != "Llama-3-8B":
        return model
    types = {tensor.name: (tensor.type, tensor.n_bytes) for tensor in model.tensors}
    tensors = []
    for tensor in model.tensors:
        if tensor.layer is not None:
            position = WRITTEN.index(tensor.layer)
            kind, size = types[tensor.name.replace(f"blk.{tensor.layer}.", f"blk.{position}.")]
            tensors.append(replace(tensor, type=kind, n_bytes=size))
        elif tensor.name != "rope_freqs.weight":
            tensors.append(tensor)
    return replace(model, tensors=tuple(tensors))


HEAD: Final = """| MiB | logs | weights | mgpu | KV cache | mgpu | compute | mgpu, `-fa off` | mgpu, default |
|---|--:|--:|--:|--:|--:|--:|--:|--:|"""


def markdown(found: list[Line]) -> Iterator[str]:
    """Whether weights and cache agree, and a table, of what was measured; then of what was projected."""
    for projected, title in ((False, "Measured"), (True, "Projected by `--fit` of b10434")):
        told = [line for line in found if line.setup.projected is projected]
        stored = [line for line in told if line.real[:2] != (None, None)]
        agree, n = sum(line.n for line in stored if line.stored_agree), sum(line.n for line in stored)
        yield f"{title}: weights and KV cache agree in {agree} of {n} rows."
        yield from ("", HEAD)
        for line in told:
            setup = line.setup
            where = "host" if line.device == "host" else f"device {line.device}"
            label = f"{setup.model}, {setup.ctx} tokens, {setup.n_devices} {setup.backend}: {where}"
            yield f"| {label} | {line.n} | {' | '.join(_cells(line))} |"
        yield ""


def _cells(line: Line) -> Iterator[str]:
    for part in (0, 1):
        yield from _shown(line.real[part], line.default[part])
    without = None if line.setup.projected else line.without[2]
    yield from _shown(line.real[2], without, line.default[2])


def _shown(real: float | None, *said: float | None) -> Iterator[str]:
    """The figures; nothing where the log tells nothing."""
    for figure in (real, *said):
        yield "" if real is None or figure is None else f"{figure:.2f}"


if __name__ == "__main__":
    main()
