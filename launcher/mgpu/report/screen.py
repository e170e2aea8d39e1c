"""`mgpu plan` as people see it: a bar for each device, the rules with their verdicts, what else was considered.

Glyphs as well as colours tell the parts of a bar apart, so nothing is lost without colour. Holds in 80 columns.
"""

from __future__ import annotations

from typing import IO, Final

from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from mgpu.errors import DoesNotFitError, RefusedError
from mgpu.model import Model
from mgpu.plan import Alternative, DevicePlan, HostPlan, Plan
from mgpu.report.lines import indices, layers_of, size_words, title
from mgpu.rig import Gpu, Rig, short_name
from mgpu.units import GIB, gib, gib_of

#: Cells of a bar, and what stands beside it: a name before, the figures after.
_BAR: Final = 36
_BESIDE_BAR: Final = 44
_PARTS: Final = (
    ("weights", "█", "blue"),
    ("kv", "▓", "cyan"),
    ("compute", "▒", "yellow"),
    ("overhead", "░", "magenta"),
)
_FREE: Final = "·"
_VERDICTS: Final = {
    "applies": ("●", "green"),
    "passes": ("○", "dim"),
    "warns": ("!", "yellow"),
    "refuses": ("✗", "red"),
}
_VERDICT_WORDS: Final = {0: "runs on ", RefusedError.exit_code: "refused: ", DoesNotFitError.exit_code: "not started: "}
_PLACEMENTS: Final = {
    "single": "one card",
    "pipeline": "split by layers",
    "tensor": "tensor ranks",
    "replicas": "a replica on each",
    "offload": "with the CPU's help",
    "cpu": "CPU alone",
}


class _Console(Console):
    def on_broken_pipe(self) -> None:
        """rich would end the program here, with 1."""
        raise BrokenPipeError


def console(file: IO[str] | None = None, *, record: bool = False, width: int | None = None) -> Console:
    """A console that is at most 100 columns wide, plain and 80 wide where there is no terminal. Honours NO_COLOR."""
    made = _Console(file=file, highlight=False, record=record, width=width, soft_wrap=False)
    if width is None:
        made.width = min(made.width, 100) if made.is_terminal else 80
    return made


def plan_screen(model: Model, rig: Rig, plan: Plan, command: str | None, width: int) -> Group:
    """Everything `mgpu plan` shows, `width` columns wide. `command`: the shell line, None with nothing to launch."""
    bar = max(min(_BAR, width - _BESIDE_BAR), 4)
    parts: list[RenderableType] = [_head(model, rig, plan), Text(), _devices(rig, plan, bar), _legend()]
    parts += [Text(), _rules(plan)]
    if plan.alternatives:
        parts += [Text(), _alternatives(plan)]
    if plan.changes:
        lines = [Padding(Text(change), (0, 0, 0, 2)) for change in plan.changes]
        parts += [Text(), Text("What would change the answer", style="bold"), *lines]
    if plan.warnings:
        parts += [Text(), *(Text(f"warning: {warning}", style="yellow") for warning in plan.warnings)]
    if command is not None:
        parts += [Text(), Text("Command", style="bold"), Padding(Text(command, overflow="fold"), (0, 0, 0, 2))]
    return Group(*parts)


def _head(model: Model, rig: Rig, plan: Plan) -> Group:
    first = Text(title(model), style="bold")
    second = Text(f"{size_words(model)}, trained for {model.hyper.n_ctx_train} tokens", style="dim")
    verdict = Text(_VERDICT_WORDS[plan.refusal.exit_code if plan.refusal else 0], style="bold")
    verdict.append(_place_words(plan), style="bold")
    if plan.tok_s is not None and plan.refusal is None:
        verdict.append(f", {plan.tok_s.words}")
    context = f"context {plan.ctx}" + (f" x {plan.users} users" if plan.users > 1 else "")
    context += f", {plan.kv_type} KV cache"
    if plan.ctx_fits is not None and plan.ctx_fits > plan.ctx:
        context += f"; up to {plan.ctx_fits} would fit"
    where = f"rig {rig.name}, {plan.runtime}"
    pace = Text(_pace_words(plan), style="dim")
    lines: list[RenderableType] = [first, second, Text(), verdict, *([pace] if pace else [])]
    return Group(*lines, Text(f"{context}; {where}", style="dim"))


def _pace_words(plan: Plan) -> str:
    """Prompts, the first token, and all users together: what is known of it."""
    forecast, words = plan.forecast, list[str]()
    if plan.refusal is not None:
        return ""
    if forecast.total_tok_s is not None:
        words.append(f"{plan.users} users together {forecast.total_tok_s.words}")
    if forecast.prompt_tok_s is not None:
        words.append(f"prompts {forecast.prompt_tok_s.words}")
    if forecast.first_token is not None:
        wait = forecast.first_token
        low, high = (f"{seconds:.2g}" for seconds in (wait.low, wait.high))
        words.append(f"first token of a {wait.prompt_tokens}-token prompt after {low}-{high} s")
    return "; ".join(words)


def _place_words(plan: Plan) -> str:
    if plan.placement == "cpu":
        return "the CPU"
    cards = " + ".join(f"GPU {device.gpu}" for device in plan.devices)
    return f"{cards} ({_PLACEMENTS.get(plan.placement, plan.placement)})"


def _devices(rig: Rig, plan: Plan, width: int) -> Table:
    table = Table.grid(padding=(0, 1))
    table.add_column(no_wrap=True, max_width=24)
    table.add_column(width=width)
    table.add_column()
    used = {device.gpu: device for device in plan.devices}
    largest = max((gpu.free_bytes for gpu in rig.gpus), default=1) or 1
    for gpu in rig.gpus:
        device = used.get(gpu.index)
        table.add_row(_card(gpu), _bar(gpu, device, largest, width), _numbers(gpu, device))
        if device is not None:
            table.add_row("", Text(_parts_words(device), style="dim", overflow="fold"), Text(layers_of(device), "dim"))
    table.add_row(Text("host RAM"), Text(_host_words(plan.host), style="dim"), gib(plan.host.memory.total))
    return table


def _card(gpu: Gpu) -> Text:
    return Text(f"GPU {gpu.index} {short_name(gpu.name)}", overflow="ellipsis")


def _bar(gpu: Gpu, device: DevicePlan | None, largest: int, width: int) -> Text:
    """One cell stands for the same number of bytes on every card; a part that is there gets at least one."""
    cells = max(round(width * gpu.free_bytes / largest), 1)
    bar = Text()
    if device is not None:
        for part, glyph, colour in _PARTS:
            size: int = getattr(device.memory, part)
            count = min(max(round(width * size / largest), 1 if size else 0), cells - len(bar))
            bar.append(glyph * count, style=colour)
    bar.append(_FREE * (cells - len(bar)), style="dim")
    return bar


def _numbers(gpu: Gpu, device: DevicePlan | None) -> Text:
    if not gpu.enabled:
        return Text("disabled", style="dim")
    if device is None:
        text = Text(f"{gib(gpu.usable_bytes)} left free", style="dim")
    else:
        text = Text(gib_of(device.memory.total, gpu.usable_bytes))
        if device.spare_bytes < 0:
            text.append(f", short by {gib(-device.spare_bytes)}", style="red")
    if gpu.reserve_bytes:
        text.append(f" ({gib(gpu.reserve_bytes)} reserved)", style="dim")
    return text


def _parts_words(device: DevicePlan) -> str:
    memory = device.memory
    parts = (memory.weights, memory.kv, memory.compute, memory.overhead)
    return " + ".join(f"{part / GIB:.2f}" for part in parts) + " GiB"


def _host_words(host: HostPlan) -> str:
    if host.blocks:
        return f"{len(host.blocks)} layers"
    if host.expert_blocks:
        return f"experts of {len(host.expert_blocks)} layers"
    return "token embedding, buffers"


def _legend() -> Text:
    legend = Text(style="dim")
    for part, glyph, colour in _PARTS:
        legend.append(f"{glyph} ", style=colour).append(f"{part}  ")
    return legend.append(f"{_FREE} free")


def _rules(plan: Plan) -> Group:
    table = Table.grid(padding=(0, 1))
    table.add_column(width=1)
    table.add_column(no_wrap=True)
    table.add_column()
    for rule in plan.rules:
        if rule.quiet:
            continue
        glyph, colour = _VERDICTS[rule.verdict]
        table.add_row(Text(glyph, style=colour), Text(rule.id, style=colour), Text(rule.text))
    return Group(Text("Rules", style="bold"), Padding(table, (0, 0, 0, 2)))


def _alternatives(plan: Plan) -> Group:
    table = Table.grid(padding=(0, 2))
    for _ in range(3):
        table.add_column()
    for alternative in plan.alternatives:
        told = alternative.tok_s if alternative.fits else None
        speed = "" if told is None else told.words.removesuffix(" predicted")
        if alternative.total_tok_s is not None and alternative.fits:
            speed += f" ({alternative.total_tok_s.expected:.0f} together)"
        table.add_row(
            _alternative_words(alternative, plan), Text(speed, style="dim"), Text(alternative.why_not, style="dim")
        )
    return Group(Text("Also considered (speeds predicted)", style="bold"), Padding(table, (0, 0, 0, 2)))


def _alternative_words(alternative: Alternative, plan: Plan) -> str:
    if not alternative.gpus:
        return "CPU alone"
    if alternative.runtime != plan.runtime:
        return f"{alternative.runtime.capitalize()} by itself: GPU {indices(alternative.gpus)}"
    return f"GPU {indices(alternative.gpus)}, {_PLACEMENTS.get(alternative.placement, alternative.placement)}"
