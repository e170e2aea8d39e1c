"""Models, rigs and runtimes as people see them: `mgpu inspect`, `mgpu rig …`, `mgpu runtimes`."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence
from typing import Final

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from mgpu.model import Model
from mgpu.report.lines import size_words, title
from mgpu.rig import Finding, Gpu, Rig, short_name
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


def rig_screen(rig: Rig, width: int = 80) -> Group:
    """The machine: its cards, how they reach each other, its host, and what is wrong with it."""
    parts: list[RenderableType] = [Text(f"rig {rig.name} ({rig.source})", style="bold")]
    if rig.driver:
        parts.append(Text(rig.driver, style="dim"))
    parts += _cards(rig.gpus, width) if rig.gpus else [Text("no GPU")]
    cards = [gpu for gpu in rig.gpus if not gpu.integrated]
    if len(cards) > 1:
        parts += [Text(), *_matrix(rig, cards, width)]
    parts += [Text(), Text(_host(rig))]
    if rig.measured:
        parts.append(Text(f"{len(rig.measured)} speed{'s' if len(rig.measured) > 1 else ''} measured (mgpu bench)"))
    parts += [_finding(finding) for finding in rig.findings]
    return Group(*parts)


def _grid(columns: int) -> Table:
    table = Table.grid(padding=(0, 2))
    for _ in range(columns):
        table.add_column()
    return table


def _span(values: tuple[int, ...]) -> str:
    low, high = min(values), max(values)
    return str(low) if low == high else f"{low}-{high}"


_HEADINGS: Final = ("GPU", "name", "free", "bandwidth", "PCIe", "chip", "NUMA")
_NAME: Final = _HEADINGS.index("name")
_GAP: Final = "  "


def _cards(gpus: Sequence[Gpu], width: int) -> Iterator[Text]:
    """A row for each card, and below it what else is to be said of it."""
    rows = [_HEADINGS, *(_row(gpu) for gpu in gpus)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(_HEADINGS))]
    for column in range(len(_HEADINGS) - 1, 0, -1):
        if not any(row[column] for row in rows[1:]):
            widths[column] = -len(_GAP)  # a column in which nobody says anything takes no room
    others = sum(widths) - widths[_NAME] + len(_GAP) * (len(widths) - 1)
    widths[_NAME] = max(min(widths[_NAME], width - others), len("name"))
    yield Text(_aligned(rows[0], widths), style="dim")
    for gpu, row in zip(gpus, rows[1:], strict=True):
        yield Text(_aligned(row, widths), style="" if gpu.enabled else "dim")
        notes = [row[_NAME]] if len(row[_NAME]) > widths[_NAME] else []
        if notes := [*notes, *_notes(gpu)]:
            indent = " " * 5
            lines = textwrap.wrap(", ".join(notes), width, initial_indent=indent, subsequent_indent=indent)
            yield from (Text(line, style="dim") for line in lines)


def _row(gpu: Gpu) -> tuple[str, ...]:
    return (
        str(gpu.index),
        short_name(gpu.name),
        gib_of(gpu.free_bytes, gpu.total_bytes),
        "" if gpu.bandwidth_bytes_per_s is None else f"{gpu.bandwidth_bytes_per_s / GB:.0f} GB/s",
        "" if gpu.pcie is None else str(gpu.pcie),
        gpu.compute_capability or "",
        "" if gpu.numa_node is None else str(gpu.numa_node),
    )


def _aligned(row: Sequence[str], widths: Sequence[int]) -> str:
    cells = [
        _cut(cell, width).ljust(width) if column == _NAME else cell.rjust(width)
        for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        if width > 0
    ]
    return _GAP.join(cells).rstrip()


def _cut(text: str, width: int) -> str:
    return text if len(text) <= width else f"{text[: width - 1]}…"


def _notes(gpu: Gpu) -> Iterator[str]:
    if gpu.device is not None:
        yield f"{gpu.device} to the runtime"
    if gpu.integrated:
        yield "part of the processor"
    if gpu.unified:
        yield "uses the host's RAM"
    if gpu.display:
        yield "drives a display"
    if gpu.reserve_bytes:
        yield f"{gib(gpu.reserve_bytes)} kept free"
    yield from (f"in use by {process}" for process in gpu.processes)
    if not gpu.enabled:
        yield "not used"


#: What stands in the matrix of links, and what it means.
_WORDS: Final = {
    "NV": "NVLinks between the two",
    "xGMI": "AMD's bridge",
    "P2P": "reads the other's memory over PCIe",
    "PIX": "through one PCIe switch",
    "PXB": "through several switches",
    "PHB": "through the processor",
    "NODE": "between host bridges of one processor",
    "SYS": "between processors",
    "PCIe": "not known how",
}


def _matrix(rig: Rig, cards: Sequence[Gpu], width: int) -> Iterator[Text]:
    """How each card reaches each other, in as many blocks as the width needs; then what the words mean."""
    cells = {(a.index, b.index): _way(rig, a, b) for a in cards for b in cards}
    if set(cells.values()) == {"-", "PCIe"}:
        yield Text("links: PCIe, no more is known of them")
        return
    size = max(len(word) for word in (*cells.values(), *(f"GPU {gpu.index}" for gpu in cards)))
    a_block = max((width - len("links")) // (size + len(_GAP)), 1)
    for start in range(0, len(cards), a_block):
        columns = cards[start : start + a_block]
        yield Text("links" + "".join(f"{_GAP}{f'GPU {gpu.index}':>{size}}" for gpu in columns), style="dim")
        for row in cards:
            line = "".join(f"{_GAP}{cells[row.index, column.index]:>{size}}" for column in columns)
            yield Text(f"{row.index:>5}{line}")
    used = {word for cell in cells.values() for word in cell.split()}
    yield from (Text(f"  {word}: {_meaning(word)}", style="dim") for word in sorted(used) if word != "-")


def _way(rig: Rig, a: Gpu, b: Gpu) -> str:
    pair = (min(a.index, b.index), max(a.index, b.index))
    link = next((link for link in rig.links if link.gpus == pair), None)
    if a.index == b.index:
        return "-"
    if link is None:
        return "PCIe"
    if link.kind == "nvlink":
        return "xGMI" if {a.vendor, b.vendor} == {"amd"} else f"NV{link.n_links or ''}"
    words = ["P2P"] if link.kind == "pcie-p2p" else []
    return " ".join([*words, *([link.path] if link.path else [])]) or "PCIe"


def _meaning(word: str) -> str:
    known = _WORDS.get(word)
    if known:
        return known
    number = word.removeprefix("NV")
    return f"{number} {_WORDS['NV']}" if number else _WORDS["NV"]


def _host(rig: Rig) -> str:
    words = [f"host RAM {gib(rig.ram_bytes)}, {gib(rig.ram_free_bytes)} free"]
    words += [f"{rig.ram_bandwidth_bytes_per_s / GB:.0f} GB/s"] if rig.ram_bandwidth_bytes_per_s else []
    words += [f"{rig.cpu_cores} core{'s' if rig.cpu_cores > 1 else ''}"] if rig.cpu_cores else []
    words += [f"power supply {rig.psu_watts} W"] if rig.psu_watts else []
    return ", ".join(words)


def _finding(finding: Finding) -> Text:
    text = Text(f"! {finding.text}", style="yellow")
    return text.append(f": {finding.hint}") if finding.hint else text
