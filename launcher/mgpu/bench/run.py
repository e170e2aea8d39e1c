"""One placement after the other: started, timed and stopped, with a row for each."""

from __future__ import annotations

import os
import statistics
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from msgspec import Struct
from msgspec.structs import replace

from mgpu.adapter import Adapter, Endpoint, Installed, Job
from mgpu.bench.trials import Trial, predict
from mgpu.errors import InterruptedLaunchError, RuntimeFailedError
from mgpu.launch.logs import new_log
from mgpu.launch.measure import Load, Timing, timing_task
from mgpu.launch.ready import Loading
from mgpu.launch.serve import Launch, serve
from mgpu.launch.signals import StopSignals
from mgpu.model import Model
from mgpu.report.benched import Bars, Row
from mgpu.request import Request
from mgpu.rig import Measured, Rig

_HOST = "127.0.0.1"


class Bench(Struct, frozen=True, kw_only=True):
    """What is measured, and how. `job` is at the plan's context; the first trial is the plan's.

    All trials are timed with the first of `loads`; the plan's also with the others.
    """

    model: Model
    adapter: Adapter
    installed: Installed
    rig: Rig
    request: Request
    job: Job
    loads: tuple[Load, ...]
    trials: tuple[Trial, ...]

    def loads_of(self, trial: Trial) -> tuple[Load, ...]:
        return self.loads if trial is self.trials[0] else self.loads[:1]

    def job_at(self, depth: int) -> Job:
        """The job whose speed is that with `depth` tokens in the cache: half of a context that is asked for."""
        return self.adapter.job(self.model, replace(self.request, ctx=2 * depth), self.installed)

    def steps_of(self, trial: Trial) -> int:
        """It is loaded, then timed."""
        return 1 + sum(load.repetitions for load in self.loads_of(trial))


def measure_all(bench: Bench, bars: Bars, stop: StopSignals, rows: list[Row]) -> None:
    """Adds rows to `rows`, one for each trial and load, as they are done. One that fails is a row, and others follow.

    Raises `InterruptedLaunchError` on a stop signal; what the trial under way has given until then is a row.
    """
    place = new_log(f"bench-{bench.model.name}")
    if place.note:
        bars.say(f"  note: {place.note}")
    for number, trial in enumerate(bench.trials, start=1):
        stop.check()
        empty = [_empty(bench, trial, load) for load in bench.loads_of(trial)]
        title = f"{number}/{len(bench.trials)} {trial.name}, {empty[0].cards}"
        telling = _Telling(bars, title, bench.steps_of(trial))
        try:
            _run(bench, trial, telling, place.path)
            found = _filled(bench, empty, telling.timings)
        except InterruptedLaunchError:
            rows += _filled(bench, empty, telling.timings)
            raise
        except RuntimeFailedError as error:
            done = {timing.load for timing in telling.timings if timing.last}
            found = _filled(bench, empty, [timing for timing in telling.timings if timing.load in done])
            cause = f"{error.message}; {error.hint}" if error.hint else error.message
            found += [replace(row, cause=cause) for row in empty[len(found) :][:1]]
        rows += found
        telling.finish(found)


class _Telling:
    """How far one trial is, told to the bar; and its timings so far."""

    def __init__(self, bars: Bars, title: str, steps: int) -> None:
        self.bars = bars
        self.timings: list[Timing] = []
        self._title = title
        self._left = steps

    def loading(self, loading: Loading) -> None:
        self.bars.tell(f"{self._title}: {loading.stage}")

    def ready(self) -> None:
        self._advance(1)

    def timing(self, timing: Timing) -> None:
        self.timings.append(timing)
        self._advance(1)

    def tick(self) -> None:
        said = f"{self.timings[-1].tok_s:.1f} tok/s" if self.timings else "warming up"
        self.bars.tell(f"{self._title}: {said}")

    def finish(self, rows: list[Row]) -> None:
        """The results; repetitions that were not needed any more are passed over."""
        self._advance(self._left)
        self.bars.say(f"  {self._title}: {'; '.join(row.cause or row.tok_s_words for row in rows)}")

    def _advance(self, steps: int) -> None:
        self._left -= steps
        self.bars.advance(steps)


def _run(bench: Bench, trial: Trial, telling: _Telling, log_path: Path) -> None:
    """Start the runtime as `mgpu run` does, time it, stop it."""
    launch = Launch(
        command_for=lambda port: bench.job.command(trial.layout, bench.rig, Endpoint(host=_HOST, port=port)),
        adapter=bench.adapter,
        environ=os.environ,
        log_path=log_path,
        host=_HOST,
        expected_bytes=bench.model.weights_bytes,
        task=timing_task(bench.loads_of(trial), on_timing=telling.timing, on_tick=telling.tick),
        on_loading=telling.loading,
    )
    serve(launch, on_ready=lambda _: telling.ready(), err=telling.bars.stream)


def _empty(bench: Bench, trial: Trial, load: Load) -> Row:
    """The row before anything is measured."""
    return Row(
        name=trial.name,
        layout=trial.layout,
        depth=load.depth,
        needless=trial.needless,
        predicted=predict(trial, bench.job_at(load.depth), bench.rig),
    )


def _filled(bench: Bench, rows: Sequence[Row], timings: Sequence[Timing]) -> list[Row]:
    """The rows that something was measured for, with it."""
    pairs = ((row, [timing for timing in timings if timing.load.depth == row.depth]) for row in rows)
    return [_with_figures(bench, row, own) for row, own in pairs if own]


def _with_figures(bench: Bench, row: Row, timings: Sequence[Timing]) -> Row:
    """The row with the median of its repetitions."""
    prompts = [timing.prompt_tok_s for timing in timings if timing.prompt_tok_s is not None]
    model, layout = bench.model, row.layout
    measured = Measured(
        model=_one_line(model.name),
        architecture=model.architecture,
        quantization=model.quantization,
        weights_bytes=model.weights_bytes,
        runtime=bench.adapter.name,
        version=bench.installed.version,
        mode="tensor" if layout.shape.mode == "tensor" else "pipeline",
        gpus=layout.gpus,
        counts=layout.counts,
        host_layers=layout.shape.host_layers,
        host_experts=layout.shape.host_experts,
        kv_type=bench.job.kv_type,
        depth=row.depth,
        tok_s=_rounded(statistics.median(timing.tok_s for timing in timings)),
        prompt_tok_s=_rounded(statistics.median(prompts)) if prompts else None,
        predicted=_rounded(row.predicted.expected) if row.predicted is not None else None,
        date=datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
    )
    return replace(row, measured=measured, samples=tuple(_rounded(timing.tok_s) for timing in timings))


def _rounded(tok_s: float) -> float:
    """Four digits: more are noise."""
    return float(f"{tok_s:.4g}")


def _one_line(name: str) -> str:
    """A model's name fit for a profile."""
    return " ".join("".join(c if c.isprintable() else " " for c in name).split()) or "unnamed"
