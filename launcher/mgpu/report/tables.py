"""Models, rigs and runtimes as people see them: `mgpu inspect`, `mgpu rig …`, `mgpu runtimes`."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from mgpu.model import Model
from mgpu.report.lines import size_words, title
from mgpu.rig import Finding, Gpu, Rig
from mgpu.units import GB, gib, gib_of


def model_screen(model: Model, kv_bytes_per_token: int) -> Group:
    """What the file says. `kv_bytes_per_token`: what one more token of context takes (f16)."""
    hyper = model.hyper
    rows = [
        ("format", f"{model.format}, {len(model.files)} file{'s' if len(model.files) > 1 else ''}"),
        ("architecture", model.architecture),
        ("quantisation", model.quantization),
        ("size", size_words(model)),
        ("context", f"trained for {hyper.n_ctx_train} tokens"),
        ("heads", f"{_span(hyper.n_head)} of {hyper.head_dim_k}, {_span(hyper.n_head_kv)} for keys and values"),
        ("vocabulary", f"{hyper.n_vocab} tokens"),
    ]
    if model.is_moe:
        rows.append(("experts", f"{hyper.n_expert_used} of {hyper.n_expert} work on a token"))
    rows.append(("KV cache", f"{kv_bytes_per_token:,} bytes for each token of context (f16)"))
    table = _grid(2)
    for name, value in rows:
        table.add_row(Text(name, style="dim"), value)
    parts: list[RenderableType] = [Text(title(model), style="bold"), table, Text()]
    weights = _grid(3)
    for kind, size in model.bytes_by_class().items():
        weights.add_row(kind.replace("_", " "), gib(size), Text(f"{size / model.weights_bytes:.1%}", style="dim"))
    return Group(*parts, Text("Weights", style="bold"), weights)


def rig_screen(rig: Rig) -> Group:
    """The machine: its cards, how they reach each other, its memory, and what is wrong with it."""
    parts: list[RenderableType] = [Text(f"rig {rig.name} ({rig.source})", style="bold")]
    if rig.driver:
        parts.append(Text(rig.driver, style="dim"))
    if rig.gpus:
        table = _grid(5)
        for gpu in rig.gpus:
            table.add_row(f"GPU {gpu.index}", gpu.name, _memory(gpu), _bandwidth(gpu), _notes(gpu))
        parts.append(table)
    else:
        parts.append(Text("no GPU"))
    parts += [Text(f"GPU {a} - GPU {b}: {kind}") for a, b, kind in _links(rig)]
    parts.append(Text(f"host RAM {gib(rig.ram_bytes)}, {gib(rig.ram_free_bytes)} available"))
    parts += [_finding(finding) for finding in rig.findings]
    return Group(*parts)


def rows_screen(rows: Sequence[Sequence[str]]) -> Table:
    """Plain rows in columns."""
    table = _grid(max((len(row) for row in rows), default=1))
    for row in rows:
        table.add_row(*row)
    return table


def _grid(columns: int) -> Table:
    table = Table.grid(padding=(0, 2))
    for _ in range(columns):
        table.add_column()
    return table


def _span(values: tuple[int, ...]) -> str:
    low, high = min(values), max(values)
    return str(low) if low == high else f"{low}-{high}"


def _memory(gpu: Gpu) -> str:
    return f"{gib_of(gpu.free_bytes, gpu.total_bytes)} free"


def _bandwidth(gpu: Gpu) -> str:
    return "" if gpu.bandwidth_bytes_per_s is None else f"{gpu.bandwidth_bytes_per_s / GB:.0f} GB/s"


def _notes(gpu: Gpu) -> Text:
    notes = [f"PCIe {gpu.pcie}"] if gpu.pcie else []
    notes += ["display"] if gpu.display else []
    notes += ["unified memory"] if gpu.unified else []
    notes += [f"reserve {gib(gpu.reserve_bytes)}"] if gpu.reserve_bytes else []
    notes += [] if gpu.enabled else ["disabled"]
    notes += [f"in use by {process}" for process in gpu.processes]
    return Text(", ".join(notes), style="dim")


def _links(rig: Rig) -> list[tuple[int, int, str]]:
    return [
        (*link.gpus, f"NVLink x{link.n_links}" if link.kind == "nvlink" and link.n_links else link.kind)
        for link in rig.links
        if link.kind != "pcie"
    ]


def _finding(finding: Finding) -> Text:
    text = Text(f"! {finding.text}", style="yellow")
    return text.append(f": {finding.hint}") if finding.hint else text
