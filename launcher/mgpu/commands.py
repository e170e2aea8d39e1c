"""What the commands do, once their arguments are typed: gather, decide, then print or launch."""

from __future__ import annotations

import functools
import json
import os
import sys
from collections.abc import Collection, Iterable, Sequence
from typing import Any

import click
from msgspec import Struct
from msgspec.structs import replace

from mgpu.adapter import Command, Endpoint, Job, Projection
from mgpu.auto import Asking, pick
from mgpu.decide.choose import choose, room_for_ctx, speed_by_room
from mgpu.decide.claims import Claim
from mgpu.decide.consider import with_reserves
from mgpu.decide.replicas import Replica, commands_at, replicas_of
from mgpu.errors import DoesNotFitError, MgpuError, ProfileError, RefusedError, UsageError
from mgpu.gather import Facts, gather
from mgpu.inspect.source import read_model
from mgpu.model import Model
from mgpu.plan import Alternative, Plan, Shape
from mgpu.report.lines import joint_line, run_lines, shell_line, to_scrub
from mgpu.request import Request
from mgpu.rig import Rig
from mgpu.service import Attachment
from mgpu_adapters.registry import named_format, pick_adapter

#: The Ollama whose scheduler is predicted: of the era that splits what takes more than 80 % of one card.
_OLLAMA = "0.32.15"

#: The port of plans that open none.
_PLANNED_PORT = 8080


class Decided(Struct, frozen=True, kw_only=True):
    """One decision with the facts it rests on. `command` is None where the plan has a refusal.

    `commands`: of replicas, one each, without a proxy; `command` is the first. `attachment`: on a service that runs
    already; `command` is then what a person would type in its place.
    """

    model: Model
    request: Request
    facts: Facts
    job: Job
    plan: Plan
    command: Command | None
    commands: tuple[Command, ...] = ()
    attachment: Attachment | None = None
    replicas: tuple[Replica, ...] = ()
    named_rig: bool = False  # by --rig: nothing of this machine counts

    def command_at(self, port: int) -> Command:
        """The command that listens on `port`."""
        endpoint = Endpoint(host=self.request.host, port=port, api_key=self.request.api_key)
        return self.job.command(self.plan.layout, self.facts.rig, endpoint)


def decide(  # noqa: PLR0913 - all but the first two by keyword, from few places
    argument: str,
    request: Request,
    *,
    rig_name: str | None,
    launching: bool,
    explicit: str | None,
    explore: bool = False,
    claims: tuple[Claim, ...] = (),
) -> Decided:
    """Everything up to the decision. `explore`: for reading rather than running; how much more would fit, what else.

    `claims`: on this machine's memory, beside those of other launches.
    """
    if _is_url(argument) and not explore:
        raise UsageError(
            f"cannot run {argument}: it is not on this machine", hint="download it first; `mgpu plan` takes URLs"
        )
    request, notes = _guarded(request, here=rig_name is None or launching)
    model = _read(argument, request)
    asking = Asking(rig_name=rig_name, launching=launching, explicit=explicit, environ=os.environ, claims=claims)
    picked = pick(model, request, asking)
    decided = _decide(model, request, _noted(picked.facts, notes), rig_name=rig_name, explore=explore)
    return replace(decided, plan=picked.tell(decided.plan))


def redecide(decided: Decided, request: Request) -> Decided:
    """The decision for another request by the same facts."""
    return _decide(decided.model, request, decided.facts, rig_name=None, explore=False)


def decide_to_verify(argument: str, request: Request, *, rig_name: str | None, explicit: str | None) -> Decided:
    """As `decide`, for a plan that this machine's own runtime is then asked about.

    Raises `UsageError` for what it cannot be asked about: another machine, another runtime, a model that is not here.
    """
    from mgpu_profiles.store import user_store

    hint = "leave --verify out"
    if _is_url(argument):
        raise UsageError(f"--verify needs the file here, and {argument} is elsewhere", hint=f"download it, or {hint}")
    request, notes = _guarded(request, here=True)
    model = _read(argument, request)
    adapter = pick_adapter(request, model)
    if adapter.projector is None:
        raise UsageError(f"--verify asks llama.cpp, and this plan is for {adapter.name}", hint=hint)
    store = user_store()
    name = rig_name or store.default()
    if name is not None:
        store.load(name)  # so that what is wrong from here on is that it is not this machine
    try:
        facts = gather(adapter, rig_name=rig_name, launching=True, explicit=explicit, environ=os.environ)
    except ProfileError as error:
        raise UsageError(
            f"--verify asks this machine's llama.cpp: {error.message}", hint="leave --rig out, or --verify"
        ) from error
    return _decide(model, request, _noted(facts, notes), rig_name=rig_name, explore=True)


def _guarded(request: Request, *, here: bool) -> tuple[Request, tuple[str, ...]]:
    """The request with who may talk to what it starts, and what there is to say of that."""
    if request.host == Request().host and request.api_key is None:
        return request, ()  # as nearly always: nobody else reaches it
    from mgpu.launch.keys import guard

    guarded = guard(request, os.environ, here=here)
    return guarded.request, guarded.notes


def _noted(facts: Facts, notes: tuple[str, ...]) -> Facts:
    return replace(facts, notes=(*facts.notes, *notes))


def with_real_key(decided: Decided) -> Decided:
    """For a launch: with the key itself, which is made if need be. Raises as `mgpu.launch.keys.with_key` does."""
    if decided.request.api_key is None:
        return decided
    from mgpu.launch.keys import with_key

    return replace(decided, request=with_key(decided.request, os.environ))


def _decide(model: Model, request: Request, facts: Facts, *, rig_name: str | None, explore: bool) -> Decided:
    facts = replace(facts, rig=with_reserves(request, facts.rig))
    job = facts.adapter.job(_as_downloaded(model), request, facts.installed)
    plan = _planned(request, facts, job)
    if explore and not plan.attached:
        plan = _explored(model, request, facts, job, plan)
    job = job.at_ctx(plan.ctx)
    decided = Decided(model=model, request=request, facts=facts, job=job, plan=plan, command=None)
    if plan.refusal is not None:
        return decided
    replicas = replicas_of(plan, job, facts.rig)
    ports = _ports(request, max(len(replicas), 1), hypothetical=rig_name is not None)
    if not replicas:
        command = decided.command_at(ports[0])
        attachment = job.attachment(plan.layout, facts.rig)
        return replace(decided, command=command, commands=(command,), attachment=attachment)
    commands = commands_at(replicas, ports, host=request.host, api_key=request.api_key)
    named_rig = rig_name is not None
    return replace(decided, command=commands[0], commands=commands, replicas=replicas, named_rig=named_rig)


def _planned(request: Request, facts: Facts, job: Job) -> Plan:
    """The decision; of a service that places by itself, what is known of it."""
    if facts.adapter.abilities.machines:
        from mgpu.cluster import Remote
        from mgpu.decide.attach import attach_plan

        if isinstance(job, Remote):
            return attach_plan(request, facts.rig, job)
    return choose(request, facts.rig, job)


def _read(argument: str, request: Request) -> Model:
    """The model that `argument` names here; with a service on other machines, what is no path is a name there."""
    model_format = named_format(request.runtime)
    if model_format is None or os.path.exists(argument):  # noqa: PTH110 - a name need not be a path
        return read_model(argument)
    from mgpu.inspect.named import named_model

    return named_model(argument, model_format)


def _explored(model: Model, request: Request, facts: Facts, job: Job, plan: Plan) -> Plan:
    """The plan with what only a reader has time for: what more would fit, what else, and what would change it."""
    from mgpu.inspect.siblings import read_siblings
    from mgpu.whatif import Question, changes, more_quant

    question = Question(
        request=request,
        rig=facts.rig,
        job=job.at_ctx(plan.ctx),
        plan=plan,
        model=model,
        siblings=read_siblings(model),
        job_of=lambda other: facts.adapter.job(other, request, facts.installed),
    )
    larger = more_quant(question)
    return replace(
        plan,
        ctx_fits=room_for_ctx(request, facts.rig, job, plan),
        alternatives=(*plan.alternatives, *_ollama_would(model, facts.rig, plan, job)),
        rules=tuple(larger if verdict.id == larger.id else verdict for verdict in plan.rules),
        changes=changes(question),
    )


def _as_downloaded(model: Model) -> Model:
    """A model behind a URL goes by its file's name in the command, which is for when it has been fetched."""
    return replace(model, path=model.path.rpartition("/")[2]) if _is_url(model.path) else model


def _is_url(argument: str) -> bool:
    return argument.startswith(("http://", "https://"))


def project(decided: Decided) -> Projection | None:
    """What the runtime's own tool says of the plan; None where a refusal has left nothing to ask about."""
    from mgpu.launch.projection import project as ask

    command, adapter = decided.command, decided.facts.adapter
    if command is None or adapter.projector is None:
        return None
    job, plan = _one_runtime(decided)
    question = functools.partial(adapter.projector.question, job, plan.layout, decided.facts.rig, command)
    return ask(adapter, adapter.projector, question, command, os.environ)


def _one_runtime(decided: Decided) -> tuple[Job, Plan]:
    """What `command` starts: the whole plan, or the first of its replicas."""
    if not decided.replicas:
        return decided.job, decided.plan
    return decided.replicas[0].job, decided.replicas[0].plan


def print_dry_run(decided: Decided) -> None:
    """The explanation on stderr, the one pasteable line on stdout."""
    _tell(explain(decided))
    stop_if_refused(decided.plan)
    if _is_proxied(decided):
        from mgpu.launch.planned import proxy_name

        name = proxy_name(os.environ)
        if name is not None:
            click.echo(f"  note: `mgpu run` itself puts {name} in front of these: one address for all", err=True)
    # Bytes: a path need not be valid text, and the shell wants it as it is.
    click.echo(os.fsencode(_line(decided)))


def print_unit(decided: Decided, arguments: Sequence[str], valued: Collection[str], name: str | None) -> None:
    """The explanation on stderr, the unit on stdout. `valued`: options of `run` that take a value."""
    from mgpu.launch.store import name_for
    from mgpu.unit import unit

    _tell(explain(decided))
    stop_if_refused(decided.plan)
    click.echo(unit(arguments, valued, name or name_for(decided.model.name), os.environ), nl=False)


def print_plan(decided: Decided, svg: str | None, projection: Projection | None = None) -> None:
    """The full explanation on stdout; a refusal or a misfit is shown, then ends as such."""
    from mgpu.report.screen import console, plan_screen

    line = _line(decided) if decided.command is not None else None
    out = console(record=svg is not None)
    out.print(plan_screen(decided.model, decided.facts.rig, decided.plan, line, out.width))
    if projection is not None:
        from mgpu.report.verified import verified_screen

        out.print("", verified_screen(_one_runtime(decided)[1], projection))
    if svg is not None:
        _save_svg(out.export_svg(title=f"mgpu plan {os.path.basename(decided.model.path)}"), svg)  # noqa: PTH119 - not a path that exists
    _tell(_notes(decided))
    stop_if_refused(decided.plan)


def print_json(decided: Decided, projection: Projection | None = None) -> None:
    """One object on stdout; a refusal or a misfit has its own exit code all the same."""
    from mgpu.report.as_json import command_object, decision

    commands = _commands(decided)
    told = decision(decided.model, decided.facts.rig, decided.request, decided.plan)
    told["notes"] = list(decided.facts.notes)
    told_commands = [command_object(command, to_scrub(command, os.environ)) for command in commands]
    if told_commands:
        told["command"] = told_commands[0]
    if decided.replicas:
        told["commands"] = told_commands
    if projection is not None:
        from mgpu.report.verified import verified_object

        told["verify"] = verified_object(_one_runtime(decided)[1], projection)
    _print_object(told)
    refusal = decided.plan.refusal
    if refusal is not None:
        for line in (f"mgpu: {refusal.message}", f"      {refusal.hint}"):
            click.echo(line, err=True)
        sys.exit(refusal.exit_code)


def _is_proxied(decided: Decided) -> bool:
    """Whether a proxy, where one is installed, would stand in front; a rig named by hand has none that we know of."""
    return bool(decided.replicas) and not decided.named_rig


def _commands(decided: Decided) -> tuple[Command, ...]:
    """All that `mgpu run` would start, beginning with what people talk to; nothing where there is a refusal."""
    if not _is_proxied(decided):
        return decided.commands
    from mgpu.launch.planned import proxied_commands

    command_fors = tuple(replica.command for replica in decided.replicas)
    return proxied_commands(command_fors, decided.request, os.environ) or decided.commands


def print_failure(error: MgpuError) -> None:
    """An error that came before there was a plan, as the JSON object."""
    from mgpu.report.as_json import failure

    _print_object(failure(error))


def print_model(argument: str, *, as_json: bool) -> None:
    """What the file says."""
    model = read_model(argument)
    kv_bytes = _kv_bytes_per_token(model)
    if as_json:
        from mgpu.report.as_json import model_report

        _print_object(model_report(model, kv_bytes))
        return
    from mgpu.report.screen import console
    from mgpu.report.tables import model_screen

    console().print(model_screen(model, kv_bytes))


def _ollama_would(model: Model, rig: Rig, plan: Plan, job: Job) -> tuple[Alternative, ...]:
    """What Ollama's own scheduler would do with the same file here, where that differs: a prediction."""
    if model.format != "gguf" or plan.refusal is not None or len(rig.gpus) < 2 or not plan.devices:
        return ()
    from mgpu_adapters.ollama.predict import predict

    prediction = predict(model, rig, version=_OLLAMA, ctx=plan.ctx, parallel=plan.users)
    if not prediction.gpus or set(prediction.gpus) == set(plan.layout.gpus):
        return ()
    one = len(prediction.gpus) == 1
    return (
        Alternative(
            runtime="ollama",
            placement="single" if one else "pipeline",
            gpus=prediction.gpus,
            fits=True,
            short_bytes=0,
            tok_s=speed_by_room(job.at_ctx(plan.ctx), prediction.gpus, rig),
            why_not=prediction.reason,
            unasked=True,
        ),
    )


def _kv_bytes_per_token(model: Model) -> int:
    """What one more token of context takes, f16; sliding windows no longer grow at this length."""
    if model.format != "gguf":
        return _stated_kv_bytes_per_token(model)
    adapter = pick_adapter(Request(), model)
    short, long = (1 << 17, 1 << 18)
    job = adapter.job(model, Request(ctx=short), adapter.assumed())
    everything = Shape(n_devices=0, host_layers=job.n_units)
    grown = job.at_ctx(long).host(everything, ()).kv - job.host(everything, ()).kv
    return grown // (long - short)


def _stated_kv_bytes_per_token(model: Model) -> int:
    """As `_kv_bytes_per_token`, by the model's own numbers. A runtime may keep less for blocks with a window."""
    hyper = model.hyper
    n_head_kv = hyper.n_head_kv[: hyper.n_layer - hyper.n_layer_nextn]
    latent, rope = model.metadata.get("kv_lora_rank"), model.metadata.get("qk_rope_head_dim")
    if isinstance(latent, int) and isinstance(rope, int):  # MLA: one latent vector for all heads
        return 2 * sum(n > 0 for n in n_head_kv) * (latent + rope)
    return 2 * sum(n_head_kv) * (hyper.head_dim_k + hyper.head_dim_v)


def explain(decided: Decided) -> tuple[str, ...]:
    """The few lines that say what is going to happen, and why."""
    return (*run_lines(decided.model, decided.plan), *_notes(decided))


def _tell(lines: Iterable[str]) -> None:
    for line in lines:
        click.echo(line, err=True)


def _notes(decided: Decided) -> tuple[str, ...]:
    findings = (
        f"{finding.text}; {finding.hint}" if finding.hint else finding.text
        for finding in decided.facts.rig.findings
        if not finding.usual
    )
    return tuple(f"  note: {note}" for note in (*decided.facts.notes, *findings))


def stop_if_refused(plan: Plan) -> None:
    """Raises `RefusedError` or `DoesNotFitError` for a plan that is not to be launched."""
    refusal = plan.refusal
    if refusal is None:
        return
    kind = RefusedError if refusal.exit_code == RefusedError.exit_code else DoesNotFitError
    raise kind(refusal.message, hint=refusal.hint)


def _line(decided: Decided) -> str:
    command = decided.command
    assert command is not None  # noqa: S101 - callers have stopped at a refusal
    scrubbed = to_scrub(command, os.environ)
    key_file = decided.request.key_file
    if decided.replicas:
        return joint_line(decided.commands, scrubbed, key_file=key_file)
    return shell_line(command, scrubbed, key_file=key_file)


def _ports(request: Request, n: int, *, hypothetical: bool) -> tuple[int, ...]:
    """`n` ports, the one that was asked for first; free ones only where something is to listen here."""
    if hypothetical or (request.port is not None and n == 1):
        first = request.port or _PLANNED_PORT
        return tuple(range(first, first + n))
    from mgpu.launch.ports import choose_ports

    return choose_ports(request.host, request.port, n, proxied=False).members


def _print_object(told: dict[str, Any]) -> None:
    # The standard library's: ASCII alone, so that a path which is no valid text survives as the escapes of its bytes.
    click.echo(json.dumps(told, indent=2))


def _save_svg(text: str, path: str) -> None:
    from pathlib import Path

    try:
        Path(path).write_text(text, encoding="utf-8")
    except OSError as error:
        raise UsageError(
            f"cannot write {path}: {error.strerror}", hint="give --svg a file that can be written"
        ) from error
