"""`mgpu plan` as people see it: a bar for each device, the rules with their verdicts, what else was considered.

Glyphs as well as colours tell the parts of a bar apart, so nothing is lost without colour. Holds in 80 columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import IO, Final

from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from mgpu.errors import DoesNotFitError, RefusedError, one_line
from mgpu.model import Model
from mgpu.plan import Alternative, DevicePlan, HostPlan, Plan
from mgpu.report.lines import indices, layers_of, size_words, title
from mgpu.rig import Gpu, Rig, short_name
from mgpu.units import GIB, gib, gib_of

#: More cards than this are named as a range.
_NAMED: Final = 3

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
    parts: list[RenderableType] = [_head(model, rig, plan, width), Text()]
    if not plan.attached:
        parts += [_devices(rig, plan, bar), _legend(), Text()]
    parts += [_rules(plan)]
    if plan.alternatives:
        parts += [Text(), _alternatives(plan)]
    if plan.changes:
        lines = [Padding(Text(change), (0, 0, 0, 2)) for change in plan.changes]
        parts += [Text(), Text("What would change the answer", style="bold"), *lines]
    if plan.warnings:
        parts += [Text(), *(Text(f"warning: {warning}", style="yellow") for warning in plan.warnings)]
    if command is not None:
        command = one_line(command, 10 * len(command))  # to be read: a file's name is nothing to the terminal
        parts += [Text(), Text("Command", style="bold"), Padding(Text(command, overflow="fold"), (0, 0, 0, 2))]
    return Group(*parts)


def _head(model: Model, rig: Rig, plan: Plan, width: int) -> Group:
    first = Text(title(model), style="bold")
    trained = [f"trained for {model.hyper.n_ctx_train} tokens"] if model.hyper.n_ctx_train else []
    second = [Text(line, style="dim") for line in _filled([size_words(model), *trained], width)]
    verdict = Text(_VERDICT_WORDS[plan.refusal.exit_code if plan.refusal else 0], style="bold")
    verdict.append(_place_words(plan), style="bold")
    if plan.tok_s is not None and plan.refusal is None:
        verdict.append(f", {plan.tok_s.words}")
    context = f"context {plan.ctx}" + (f" x {plan.users} users" if plan.users > 1 else "")
    context += "" if plan.attached else f", {plan.kv_type} KV cache"
    if plan.ctx_fits is not None and plan.ctx_fits > plan.ctx:
        context += f"; up to {plan.ctx_fits} would fit"
    lines = [*_filled(_pace_words(plan), width), *_filled([context, f"rig {rig.name}, {plan.runtime}"], width)]
    return Group(first, *second, Text(), verdict, *(Text(line, style="dim") for line in lines))


def _pace_words(plan: Plan) -> list[str]:
    """All users together, prompts, and the wait for the first token: what is known of it."""
    forecast, words = plan.forecast, list[str]()
    if plan.refusal is not None:
        return words
    if forecast.total_tok_s is not None:
        words.append(f"{plan.users} users together {forecast.total_tok_s.words}")
    if forecast.prompt_tok_s is not None:
        words.append(f"prompts {forecast.prompt_tok_s.words}")
    if forecast.first_token is not None:
        wait = forecast.first_token
        words.append(f"first token of a {wait.prompt_tokens}-token prompt after {_seconds(wait.low, wait.high)}")
    return words


def _seconds(low: float, high: float) -> str:
    """`"0.47-0.96 s"`, `"1.2-3.1 s"`, `"150-310 s"`: both with the same decimals."""
    decimals = 2 if high < 1 else 1 if high < 10 else 0
    return f"{low:.{decimals}f}-{high:.{decimals}f} s"


def _filled(words: Sequence[str], width: int) -> list[str]:
    """As many on a line as have room, with semicolons; none is torn."""
    lines: list[str] = []
    for word in words:
        if lines and len(lines[-1]) + len(word) + 2 <= width:
            lines[-1] += f"; {word}"
        else:
            lines.append(word)
    return lines


def _place_words(plan: Plan) -> str:
    if plan.attached:
        return plan.attached
    if plan.placement == "cpu":
        return "the CPU alone"
    cards = " + ".join(f"GPU {device.gpu}" for device in plan.devices)
    if len(plan.devices) > _NAMED:
        cards = f"GPU {indices([device.gpu for device in plan.devices])}"
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
    elif device.spare_bytes < 0:
        text = Text(f"{gib(device.memory.total)}, ").append(f"short by {gib(-device.spare_bytes)}", style="red")
    else:
        text = Text(gib_of(device.memory.total, gpu.usable_bytes))
    if gpu.reserve_bytes:
        text.append(f" ({gib(gpu.reserve_bytes)} reserved)", style="dim")
    return text


def _parts_words(device: DevicePlan) -> str:
    memory = device.memory
    parts = (memory.weights, memory.kv, memory.compute, memory.overhead)
    return " + ".join(f"{part / GIB:.2f}" for part in parts) + " GiB"


def _host_words(host: HostPlan) -> str:
    experts = max(len(host.expert_blocks) - len(host.blocks), 0)
    words = [f"{len(host.blocks)} layers"] if host.blocks else []
    words += [f"experts of {experts} {'more' if words else 'layers'}"] if experts else []
    return ", ".join(words) or "token embedding, buffers"


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
    for no_wrap in (True, True, False):
        table.add_column(no_wrap=no_wrap)
    for alternative in plan.alternatives:
        speed = Text(_alternative_speed(alternative), style="dim")
        table.add_row(_alternative_words(alternative, plan), speed, Text(alternative.why_not, style="dim"))
    what = "tok/s predicted" + ("; of all users together" if plan.users > 1 else "")
    return Group(Text(f"Also considered ({what})", style="bold"), Padding(table, (0, 0, 0, 2)))


def _alternative_speed(alternative: Alternative) -> str:
    """`"96-130"`; for several users, `"96-130; 379"`; `"109-109 measured"`."""
    speed, total = alternative.tok_s, alternative.total_tok_s
    if speed is None or not alternative.fits:
        return ""
    words = speed.words.removesuffix(" predicted").replace(" tok/s", "")
    return words if total is None else f"{words}; {total.expected:.0f}"


def _alternative_words(alternative: Alternative, plan: Plan) -> str:
    if alternative.unasked and alternative.runtime != plan.runtime:
        return f"{alternative.runtime.capitalize()} by itself: GPU {indices(alternative.gpus)}"
    runtime = "" if alternative.runtime == plan.runtime else f"{alternative.runtime}: "
    if not alternative.gpus:
        return f"{runtime}CPU alone"
    return f"{runtime}GPU {indices(alternative.gpus)}, {_PLACEMENTS.get(alternative.placement, alternative.placement)}"
