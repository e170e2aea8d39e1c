"""Public rows as what the planner is asked: a job, a layout, cards and a rig. Sources: benchmarks/data/README.md."""

from __future__ import annotations

import csv
import functools
import re
import sys
from collections.abc import Iterator
from pathlib import Path

from msgspec import Struct
from msgspec.structs import replace

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.public_models import model_named

from mgpu.adapter import Job
from mgpu.decide.place import by_room, on_each
from mgpu.plan import Layout
from mgpu.request import Request
from mgpu.rig import Gpu, Pcie, Rig
from mgpu.units import GIB
from mgpu_adapters.llamacpp.adapter import LlamaCpp
from mgpu_profiles.gpus import find_spec

DATA = Path(__file__).parent / "data"

#: The driver's names of cards that a source names otherwise.
NAMES = {"A100 PCIe": "A100 80GB PCIe", "A100 SXM": "A100-SXM4-80GB", "A100": "A100-SXM4-80GB"}

#: Sources whose `ctx` is the window that was set, and not what was in it: a short conversation.
_WINDOW_ONLY = re.compile(r"probe\.py|Ollama 0\.32|IPEX")
_AT_DEPTH = re.compile(r"decode at depth|at depth \d+$")
#: Not plain decode by today's means: row split is gone, and a fork's graph split is another program.
_OTHER_MODES = frozenset({"row", "row/tensor-split 1,1", "tensor-parallel", "graph (tensor-parallel)", "see note", ""})
#: Of a model's first build, of a card whose power was limited or raised, of a file with another output, and what no
#: memory can do (BF16 at 15 tok/s over 448 GB/s: it guessed ahead): not what a prediction is about.
_SET_ASIDE = re.compile(r"day-one build|275 W limit|overclocked|-Q4_K_M-fp16|Ollama|PCIe gen3 x8/x8/x4")
#: What answers of llmfit's include: seconds from the request to the first token, by card, fitted with the rest.
_ANSWERS = re.compile(r"; (\d+) tokens over (\d+) ms")
_FIRST_TOKEN = {"amd": 0.10, "nvidia": 0.014, "apple": 0.028}
#: Builds with flash attention and fused kernels.
_NEWER = re.compile(r"\bb(?:[6-9]\d{3}|1\d{4})\b|202[56]|llama-bench (?:Metal|CUDA|Vulkan|,)|Framework Desktop|3e12fbd")
_BACKENDS = {"Vulkan": "Vulkan", "ROCm": "ROCm"}


def _metal_bytes(gpu: Gpu) -> float:
    """What macOS gives to the GPU."""
    return gpu.total_bytes * (2 / 3 if gpu.total_bytes <= 36 * GIB else 3 / 4)


class Row(Struct, frozen=True, kw_only=True):
    """One measurement, and what is predicted for it with."""

    source: str
    model: str
    quant: str
    cards: str
    mode: str
    ctx: int
    tok_s: float
    prompt_tok_s: float | None
    note: str
    job: Job
    layout: Layout
    gpus: tuple[Gpu, ...]
    rig: Rig

    @property
    def kind(self) -> str:
        """The class of card it is counted under."""
        names = {_kind(gpu) for gpu in self.gpus}
        kind = names.pop() if len(names) == 1 else "mixed"
        return kind if len(self.gpus) == 1 else f"{kind}, several"


def read_rows(*names: str) -> Iterator[Row]:
    """All rows of plain decode under llama.cpp that can be planned for: known shapes, known cards, fitting memory."""
    for name in names or ("tok_s_public.csv", "tok_s_gathered.csv"):
        with (DATA / name).open(encoding="utf-8", newline="") as lines:
            for fields in csv.DictReader(lines):
                row = _row(fields)
                if row is not None:
                    yield row


def _row(fields: dict[str, str]) -> Row | None:
    note, mode = fields["note"], fields["split_mode"].partition(" (")[0]
    if fields["split_mode"] in _OTHER_MODES or _SET_ASIDE.search(note) or not fields["ctx"].isdigit():
        return None
    try:
        model = model_named(fields["model"], fields["quant"])
        gpus = cards(fields["gpus"])
    except SystemExit:
        return None
    if any(gpu.vendor == "apple" and model.weights_bytes + 2 * GIB > _metal_bytes(gpu) for gpu in gpus):
        return None  # it swapped
    ctx = 1024 if _WINDOW_ONLY.search(note) else int(fields["ctx"])
    ctx = max(2 * ctx if _AT_DEPTH.search(note) and "decode" in note else ctx, 256)
    newer = _NEWER.search(note) is not None
    job = job_of(fields["model"], fields["quant"], ctx, newer=newer)
    backend = next((name for word, name in _BACKENDS.items() if word in note), None)
    gpus = tuple(replace(gpu, device=f"{backend}{gpu.index}" if backend else None) for gpu in gpus)
    layout = on_each(job, gpus, "tensor") if mode == "tensor" else by_room(job, gpus)
    rig = Rig(name="public", source="detected" if newer else "profile", gpus=gpus)
    return Row(
        source=fields["source"], model=fields["model"], quant=fields["quant"], cards=fields["gpus"], mode=mode, ctx=ctx,
        tok_s=_generated(float(fields["tok_s_gen"]), note, gpus[0]),
        prompt_tok_s=float(fields["tok_s_prompt"] or 0) or None, note=note, job=job, layout=layout, gpus=gpus, rig=rig,
    )  # fmt: skip


def _generated(tok_s: float, note: str, gpu: Gpu) -> float:
    """Without the wait for the first token, where it was timed together with the rest."""
    match = _ANSWERS.search(note)
    if match is None:
        return tok_s
    tokens, seconds = int(match[1]), int(match[2]) / 1000
    return tok_s * seconds / (seconds - _FIRST_TOKEN.get(gpu.vendor, 0.0)) if tokens else tok_s


@functools.cache
def job_of(model: str, quant: str, ctx: int, *, newer: bool = False) -> Job:
    """`newer`: of a build known to have flash attention and fused kernels."""
    adapter = LlamaCpp()
    installed = replace(adapter.assumed(), version="b10000") if newer else adapter.assumed()
    return adapter.job(model_named(model, quant), Request(ctx=ctx), installed)


def cards(text: str) -> tuple[Gpu, ...]:
    """`"2x RTX 3090 24GB + 1x RTX 3060 12GB"` as cards with the figures of the table."""
    found: list[Gpu] = []
    for part in text.split(" + "):
        match = re.fullmatch(r"(?:(\d+)x )?(.+?)(?: (\d+)GB)?", part)
        if match is None:
            raise SystemExit(f"no cards: {part!r}")
        found += [card(match[2], int(match[3] or 24), len(found) + i) for i in range(int(match[1] or 1))]
    return tuple(found)


def card(name: str, gib: int, index: int = 0) -> Gpu:
    """A card by a public name; raises `SystemExit` for one that the table does not know."""
    name = NAMES.get(name, name)
    name = f"Apple {name}" if re.match(r"M\d", name) else name
    spec = find_spec(name, gib * GIB)
    if spec is None or spec.bandwidth_bytes_per_s is None:
        raise SystemExit(f"no card {name!r} in the table")
    return Gpu(
        index=index, name=name, vendor=spec.vendor, total_bytes=gib * GIB, free_bytes=gib * GIB,
        bandwidth_bytes_per_s=spec.bandwidth_bytes_per_s, compute_capability=spec.compute_capability,
        unified=spec.unified, pcie=None if spec.pcie_gen is None else Pcie(gen=spec.pcie_gen, width=8),
    )  # fmt: skip


def _kind(gpu: Gpu) -> str:
    from mgpu.decide.speed.pace import family_of_device

    family = family_of_device(gpu).name
    generations = {"8.6": "Ampere", "8.9": "Ada", "12.0": "Blackwell"}
    return generations.get(gpu.compute_capability or "", family) if family == "NVIDIA GDDR" else family
