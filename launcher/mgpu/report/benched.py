"""`mgpu bench` as people see it: a bar while it measures, then a table of what was predicted and what is."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import Any, Final, Self, TextIO, cast

from msgspec import Struct, to_builtins
from rich.console import Group, RenderableType
from rich.file_proxy import FileProxy
from rich.padding import Padding
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from mgpu.plan import Layout, Speed
from mgpu.report.as_json import SCHEMA
from mgpu.report.screen import console
from mgpu.rig import Measured

#: Repetitions that differ by more than this share say that something else was going on.
_STEADY: Final = 0.1

#: A split that changes the speed by less than this is within what repetitions differ by.
_NOTHING: Final = 0.005


class Row(Struct, frozen=True, kw_only=True):
    """One placement: `measured`, or the `cause` why not. `samples`: tokens per second of each repetition.

    `depth`: tokens in the cache while generating, on average; `predicted` is for that depth, too.
    """

    name: str
    layout: Layout
    depth: int
    needless: bool
    predicted: Speed | None
    measured: Measured | None = None
    samples: tuple[float, ...] = ()
    cause: str = ""

    @property
    def error(self) -> float | None:
        """How far the prediction is off, as a share of what was measured: +0.1 is 10 % too fast."""
        if self.measured is None or self.predicted is None:
            return None
        return self.predicted.expected / self.measured.tok_s - 1

    @property
    def tok_s_words(self) -> str:
        """`"111.7 tok/s"`; empty where nothing was measured."""
        return "" if self.measured is None else f"{_figure(self.measured.tok_s)} tok/s"

    @property
    def cards(self) -> str:
        """`"GPU 0"`, `"GPU 0+1 (17+16)"`: with the layers on each, where they are split."""
        layout = self.layout
        if not layout.gpus:
            return "the CPU"
        text = f"GPU {_joined(layout.gpus)}"
        if layout.shape.mode == "pipeline" and len(layout.gpus) > 1:
            text += f" ({_joined(layout.counts)})"
        if layout.shape.host_layers:
            text += f", {layout.shape.host_layers} layers on the CPU"
        if layout.shape.host_experts:
            text += f", experts of {layout.shape.host_experts} on the CPU"
        return text


class Outcome(Struct, frozen=True, kw_only=True):
    """All that was measured of one model on one rig. `saved`: where it is kept; None where it is not."""

    model: str
    rig: str
    runtime: str
    version: str
    kv_type: str
    n_prompt: int
    n_gen: int
    rows: tuple[Row, ...]
    saved: str | None = None
    interrupted: bool = False


def benched_screen(outcome: Outcome) -> Group:
    """The table, what went wrong, and what a needless split costs."""
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim", pad_edge=False)
    for name in ("case", "cards"):
        table.add_column(name, overflow="fold")
    for name in ("predicted", "tok/s", "error", "prompt"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in outcome.rows:
        table.add_row(_name(row, outcome), row.cards, _predicted(row), _measured(row), _error(row), _prompt(row))
    how = f"{outcome.n_prompt} tokens read, {outcome.n_gen} generated, {outcome.kv_type} KV cache"
    head = Text(f"{outcome.model} on rig {outcome.rig}, {outcome.runtime} {outcome.version}", style="bold")
    parts: list[RenderableType] = [head, Text(how, style="dim"), Text(), Padding(table, (0, 0, 0, 2))]
    below = [Text(f"{row.name}, {row.cards}: {row.cause}", style="red") for row in outcome.rows if row.cause]
    below += [Text(line, style="yellow") for line in unsteady_lines(outcome.rows)]
    below += [Text(line) for line in needless_lines(outcome.rows)]
    return Group(*parts, *([Text(), *below] if below else []))


def unsteady_lines(rows: Sequence[Row]) -> tuple[str, ...]:
    """Where the repetitions disagree, so that the figure says less of the rig than of that moment."""
    return tuple(
        f"{row.name}, {row.cards}: from {_figure(min(row.samples))} to {_figure(max(row.samples))} tok/s, "
        "so something else was running; measure again when the machine is idle"
        for row in rows
        if row.samples and max(row.samples) > min(row.samples) * (1 + _STEADY)
    )


def needless_lines(rows: Sequence[Row]) -> tuple[str, ...]:
    """What each needless split by layers costs against the fastest card alone, on this rig."""
    return tuple(_needless(measured, alone) for measured, alone in _needless_splits(rows))


def benched_object(outcome: Outcome) -> dict[str, Any]:
    """The object of `bench --json`."""
    return {
        "schema": SCHEMA,
        "model": outcome.model,
        "rig": outcome.rig,
        "runtime": outcome.runtime,
        "version": outcome.version,
        "n_prompt": outcome.n_prompt,
        "n_gen": outcome.n_gen,
        "cases": [_case(row) for row in outcome.rows],
        "needless_splits": [
            {"gpus": list(split.gpus), "cost": 1 - split.tok_s / alone}
            for split, alone in _needless_splits(outcome.rows)
        ],
        "saved": outcome.saved,
        "interrupted": outcome.interrupted,
    }


class Bars:
    """How far the bench is, on `stream`: one line that rewrites itself, or a line for each result where that is a file.

    Nothing is drawn from a thread: runtimes are started meanwhile, and `fork` copies no threads. A terminal that goes
    away is no reason to stop.
    """

    def __init__(self, stream: TextIO, *, steps: int) -> None:
        self._console = console(stream)
        self._progress: Progress | None = None
        self._task = TaskID(0)
        if self._console.is_terminal:
            columns = (
                TextColumn("{task.description}"),
                BarColumn(bar_width=20),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
            )
            self._progress = Progress(
                *columns,
                console=self._console,
                auto_refresh=False,
                transient=True,
                redirect_stdout=False,
                redirect_stderr=False,
            )
            self._task = self._progress.add_task("", total=steps)

    def __enter__(self) -> Self:
        if self._progress is not None:
            with suppress(OSError, ValueError):
                self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._progress is not None:
            with suppress(OSError, ValueError):
                self._progress.stop()

    @property
    def stream(self) -> TextIO:
        """For lines of others: they appear above the bar."""
        return cast("TextIO", FileProxy(self._console, self._console.file))

    def tell(self, text: str) -> None:
        """What is going on now."""
        if self._progress is not None:
            with suppress(OSError, ValueError):
                self._progress.update(self._task, description=text, refresh=True)

    def advance(self, steps: int = 1) -> None:
        if self._progress is not None:
            with suppress(OSError, ValueError):
                self._progress.update(self._task, advance=steps, refresh=True)

    def say(self, line: str) -> None:
        """A result, to stay."""
        with suppress(OSError, ValueError):
            self._console.print(Text(line), soft_wrap=True)  # one line for each result, in a file too


def _joined(numbers: Sequence[int]) -> str:
    return "+".join(str(number) for number in numbers)


def _figure(tok_s: float) -> str:
    return f"{tok_s:.{1 if tok_s < 1000 else 0}f}"


def _name(row: Row, outcome: Outcome) -> str:
    """With the depth, where it is not that of all."""
    return row.name if row.depth == outcome.rows[0].depth else f"{row.name}, {row.depth} deep"


def _predicted(row: Row) -> str:
    if row.predicted is None:
        return "unknown"
    digits = 0 if row.predicted.expected >= 10 else 1
    return f"{row.predicted.low:.{digits}f}-{row.predicted.high:.{digits}f}"


def _measured(row: Row) -> Text:
    return Text("failed", style="red") if row.measured is None else Text(_figure(row.measured.tok_s), style="bold")


def _error(row: Row) -> str:
    return "" if row.error is None else f"{row.error:+.0%}"


def _prompt(row: Row) -> str:
    prompt = row.measured.prompt_tok_s if row.measured is not None else None
    return "" if prompt is None else _figure(prompt)


def _is_one_card(row: Row) -> bool:
    return len(row.layout.gpus) == 1 and not row.layout.shape.host_layers and not row.layout.shape.host_experts


def _needless_splits(rows: Sequence[Row]) -> Iterator[tuple[Measured, float]]:
    """Each needless split by layers, and the tokens per second of the fastest card alone, as deep."""
    for row in rows:
        others = (one for one in rows if _is_one_card(one) and one.depth == row.depth)
        alone = max((one.measured.tok_s for one in others if one.measured), default=None)
        if alone is not None and row.measured and row.needless and row.layout.shape.mode == "pipeline":
            yield row.measured, alone


def _needless(split: Measured, alone: float) -> str:
    cost = 1 - split.tok_s / alone
    figures = f"{_figure(split.tok_s)} instead of {_figure(alone)} tok/s"
    cards = f"a needless split over GPU {_joined(split.gpus)}"
    if abs(cost) < _NOTHING:
        return f"{cards} costs nothing here: {figures}"
    return f"{cards} {'costs' if cost > 0 else 'gains'} {abs(cost):.1%} here: {figures}"


def _case(row: Row) -> dict[str, Any]:
    measured = row.measured
    return {
        "case": row.name,
        "gpus": list(row.layout.gpus),
        "counts": list(row.layout.counts),
        "mode": row.layout.shape.mode,
        "host_layers": row.layout.shape.host_layers,
        "host_experts": row.layout.shape.host_experts,
        "needless": row.needless,
        "predicted": None if row.predicted is None else to_builtins(row.predicted),
        "tok_s": None if measured is None else measured.tok_s,
        "prompt_tok_s": None if measured is None else measured.prompt_tok_s,
        "depth": row.depth,
        "samples": list(row.samples),
        "error": row.error,
        "cause": row.cause or None,
    }
