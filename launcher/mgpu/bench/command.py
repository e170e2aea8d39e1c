"""The command: gather, plan, measure one placement after the other, keep the figures, show them."""

from __future__ import annotations

import gc
import json
import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from typing import Final

import click
from msgspec import Struct
from msgspec.structs import replace

from mgpu.adapter import Job
from mgpu.bench.keep import NEAR, Ground, find_ground, keep_measured
from mgpu.bench.run import Bench, measure_all
from mgpu.bench.trials import find_trials
from mgpu.decide.choose import choose
from mgpu.decide.consider import consider, with_reserves
from mgpu.errors import DoesNotFitError, InterruptedLaunchError, MgpuError, RuntimeFailedError, UsageError
from mgpu.gather import gather_here
from mgpu.inspect.source import read_model
from mgpu.launch.measure import Load
from mgpu.launch.signals import StopSignals
from mgpu.plan import Plan
from mgpu.report.benched import Bars, Outcome, Row, benched_object, benched_screen
from mgpu.report.lines import run_lines
from mgpu.report.screen import console
from mgpu.request import Request
from mgpu_adapters.registry import pick_adapter
from mgpu_profiles.store import user_store

#: Tokens read where nothing else is asked: what llama-bench reads by default.
N_PROMPT: Final = 512


class Asked(Struct, frozen=True, kw_only=True):
    """The options of `bench`. `n_prompt` None: 512, or what the context has room for."""

    request: Request
    rig_name: str | None
    save_as: str | None
    keep: bool
    quick: bool
    as_json: bool
    explicit: str | None  # --llama-server
    n_prompt: int | None
    n_gen: int
    repetitions: int


class Prepared(Struct, frozen=True, kw_only=True):
    """What is to be measured, the plan it starts from, and where the figures go."""

    bench: Bench
    plan: Plan
    ground: Ground


def measure(argument: str, asked: Asked) -> None:
    """All of it. Returns when something was measured; else, and when interrupted, ends with that."""
    gc.enable()  # many models are loaded one after the other: this may take hours
    prepared = _prepare(argument, asked)
    _announce(prepared)
    steps = sum(prepared.bench.steps_of(trial) for trial in prepared.bench.trials)
    trouble: MgpuError | None = None
    rows: list[Row] = []
    with StopSignals() as stop:  # a signal ends the measuring, and not the keeping of what was measured
        try:
            with Bars(sys.stderr, steps=steps) as bars:
                measure_all(prepared.bench, bars, stop, rows)
        except InterruptedLaunchError as error:
            trouble = error
        try:
            saved = _keep(prepared.ground, rows)
        except MgpuError as error:
            trouble, saved = trouble or error, None
    _show(_outcome(prepared, rows, saved, trouble), as_json=asked.as_json)
    trouble = trouble or _none_measured(rows)
    if trouble is not None:
        _end(trouble, as_json=asked.as_json)


def _prepare(argument: str, asked: Asked) -> Prepared:
    """Everything before the first launch: what cannot be measured, or not be kept, is refused here."""
    if argument.startswith(("http://", "https://")):
        raise UsageError(f"cannot measure {argument}: it is not on this machine", hint="download it first")
    request, model = asked.request, read_model(argument)
    adapter = pick_adapter(request, model)
    if adapter.name != "llama.cpp":
        raise UsageError(
            f"bench measures llama.cpp, and {argument} is for {adapter.name}",
            hint="give it a GGUF file, and leave --runtime out",
        )
    facts = gather_here(adapter, explicit=asked.explicit, environ=os.environ)
    ground = find_ground(user_store(), facts.rig, rig_name=asked.rig_name, save_as=asked.save_as, keep=asked.keep)
    rig = with_reserves(request, ground.rig)
    job = adapter.job(model, request, facts.installed)
    plan = choose(request, rig, job)
    if plan.refusal is not None:
        raise DoesNotFitError(plan.refusal.message, hint=plan.refusal.hint)
    job = job.at_ctx(plan.ctx)
    bench = Bench(
        model=model,
        adapter=adapter,
        installed=facts.installed,
        rig=rig,
        request=request,
        job=job,
        loads=_loads(asked, job, model.hyper.n_vocab),
        trials=find_trials(plan, job, rig, consider(request, rig), quick=asked.quick),
    )
    return Prepared(bench=bench, plan=plan, ground=ground)


def _loads(asked: Asked, job: Job, n_vocab: int) -> tuple[Load, ...]:
    """A short prompt, as others measure; and where the plan's own figure is for much more in the cache, one as deep.

    Raises `UsageError` for more tokens than the context holds.
    """
    room = job.ctx - asked.n_gen
    n_prompt = min(N_PROMPT, room) if asked.n_prompt is None else asked.n_prompt
    if not 1 <= n_prompt <= room:
        tokens = asked.n_gen + max(n_prompt, 1)
        raise UsageError(
            f"a context of {job.ctx} does not hold the {tokens} tokens to measure with",
            hint="ask for fewer with --n-prompt and --n-gen, or for more --ctx",
        )
    short = Load(n_prompt=n_prompt, n_gen=asked.n_gen, repetitions=asked.repetitions, n_vocab=n_vocab)
    deeper = job.work.depth - short.depth
    if asked.n_prompt is not None or deeper <= NEAR:
        return (short,)
    return (short, replace(short, n_prompt=short.n_prompt + deeper))


def _announce(prepared: Prepared) -> None:
    """What will be measured, on stderr."""
    bench, n = prepared.bench, len(prepared.bench.trials)
    load = bench.loads[0]
    how = f"{load.n_prompt} tokens read, {load.n_gen} generated, {load.repetitions} times each"
    if len(bench.loads) > 1:
        how += f"; the plan's also {bench.loads[1].depth} deep"
    for line in (
        *run_lines(bench.model, prepared.plan)[:2],
        *(f"  note: {note}" for note in prepared.ground.notes),
        f"  {n} placement{'s' if n > 1 else ''} to measure: {how}",
    ):
        click.echo(line, err=True)


def _keep(ground: Ground, rows: Sequence[Row]) -> str | None:
    """Where the figures are now; None where none are kept. Notes go to stderr. Raises `ProfileError`."""
    measured = [row.measured for row in rows if row.measured is not None]
    if ground.destination is None or not measured:
        return None
    saved = keep_measured(user_store(), ground, measured)
    default = "" if not ground.destination.becomes_default else ", now the default (see `mgpu rig use`)"
    lines = [f"  note: {warning}" for warning in saved.warnings]
    with suppress(OSError):  # a terminal that has gone: they are kept all the same
        for line in (*lines, f"  kept in rig {ground.destination.name}{default}: {saved.path}"):
            click.echo(line, err=True)
    return str(saved.path)


def _outcome(prepared: Prepared, rows: Sequence[Row], saved: str | None, trouble: MgpuError | None) -> Outcome:
    bench = prepared.bench
    return Outcome(
        model=bench.model.name,
        rig=bench.rig.name,
        runtime=bench.adapter.name,
        version=bench.installed.version,
        kv_type=bench.job.kv_type,
        n_prompt=bench.loads[0].n_prompt,
        n_gen=bench.loads[0].n_gen,
        rows=tuple(rows),
        saved=saved,
        interrupted=isinstance(trouble, InterruptedLaunchError),
    )


def _show(outcome: Outcome, *, as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps(benched_object(outcome), indent=2))
    elif outcome.rows:
        console().print(benched_screen(outcome))


def _none_measured(rows: Sequence[Row]) -> RuntimeFailedError | None:
    if any(row.measured is not None for row in rows):
        return None
    return RuntimeFailedError("none of the placements could be measured", hint=rows[0].cause if rows else "")


def _end(trouble: MgpuError, *, as_json: bool) -> None:
    """As `mgpu.cli` ends every command; with --json, whose one object is out, without another."""
    if not as_json:
        raise trouble
    with suppress(OSError):
        for line in (f"mgpu: {trouble.message}", f"      {trouble.hint}"):
            click.echo(line.rstrip(), err=True)
    sys.exit(trouble.exit_code)
