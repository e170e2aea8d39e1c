"""The command line: parse, call, print, exit. No rule of its own.

Modules are imported where they are used: `mgpu run --dry-run` is meant to be done before a person looks up.
"""

from __future__ import annotations

import errno
import gc
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NoReturn

import click

from mgpu import __version__
from mgpu.errors import InterruptedLaunchError, MgpuError, RuntimeFailedError, UsageError
from mgpu.options import (
    LaunchName,
    ModelArgument,
    RigName,
    bench_options,
    check_run,
    planning_options,
    run_options,
    to_bench_request,
    to_request,
    valued,
)
from mgpu.request import Request

_CONTEXT = {"help_option_names": ["-h", "--help"], "max_content_width": 100}


class _GoneError(Exception):
    """Whoever read our output has gone. (click would end with 1, which is for bugs.)"""


@contextmanager
def _said_in_our_words() -> Iterator[None]:
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError as error:
        raise _GoneError from error


class _Group(click.Group):
    """Commands in the order people need them."""

    def make_context(self, *args: Any, **more: Any) -> click.Context:
        with _said_in_our_words():
            return super().make_context(*args, **more)

    def invoke(self, ctx: click.Context) -> Any:
        with _said_in_our_words():
            return super().invoke(ctx)

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002 - click's signature
        return list(self.commands)


class _Planning(click.Command):
    """A command whose arguments after `--` belong to the runtime, untouched by click."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        split = args.index("--") if "--" in args else len(args)
        ctx.meta[_RUNTIME_ARGS] = tuple(args[split + 1 :])
        return super().parse_args(ctx, args[:split])

    def collect_usage_pieces(self, ctx: click.Context) -> list[str]:
        return [*super().collect_usage_pieces(ctx), "[-- RUNTIME ARGS...]"]


_RUNTIME_ARGS = "mgpu.runtime_args"


@click.group(cls=_Group, context_settings=_CONTEXT)
@click.version_option(__version__, prog_name="mgpu")
def cli() -> None:
    """Run a local model on the right GPUs, and say why."""


@cli.command(cls=_Planning)
@click.argument("model", type=ModelArgument())
@planning_options
@run_options
@click.pass_context
def run(context: click.Context, /, model: str, **options: Any) -> None:
    """Inspect MODEL, plan, explain, launch, and stay until Ctrl-C.

    \b
    mgpu run model.gguf
    mgpu run model.gguf --ctx 32k --users 4
    mgpu run model.gguf --rig 2x3090 --dry-run
    mgpu run model.gguf --prompt "Why is the sky blue?"
    mgpu run model.gguf --detach --restart on-failure

    Everything after -- goes to the runtime unchanged.
    """
    request = to_request(options, context.meta[_RUNTIME_ARGS])
    check_run(options)
    if options["as_json"] or options["dry_run"] or options["unit"]:
        _print_run(model, request, options)
    else:
        _launch(model, request, options)


def _print_run(model: str, request: Request, options: dict[str, Any]) -> None:
    from mgpu import commands

    launching = options["unit"]
    decided = commands.decide(
        model, request, rig_name=options["rig"], launching=launching, explicit=options["llama_server"]
    )
    if options["as_json"]:
        commands.print_json(decided)
    elif options["unit"]:
        commands.print_unit(decided, sys.argv[1:], valued(run), options["name"])
    else:
        commands.print_dry_run(decided)


def _launch(model: str, request: Request, options: dict[str, Any]) -> None:
    from mgpu.launch.detached import Tether, detach

    tether = Tether.find(os.environ)
    if options["detach"] and tether is None:
        sys.exit(detach(sys.argv[1:], os.environ))
    from mgpu.running import Wish, run

    run(
        Wish(
            argument=model,
            request=request,
            rig_name=options["rig"],
            explicit=options["llama_server"],
            prompt=options["prompt"],
            name=options["name"],
            restarts=options["restart"] == "on-failure",
            tether=tether,
        )
    )


@cli.command(cls=_Planning)
@click.argument("model", type=ModelArgument())
@planning_options
@click.option("--svg", type=click.Path(dir_okay=False, writable=True), help="Save what is shown as an SVG picture.")
@click.option("--verify", is_flag=True, help="Ask llama-fit-params what would be allocated, and compare.")
@click.pass_context
def plan(context: click.Context, /, model: str, *, svg: str | None, verify: bool, **options: Any) -> None:
    """Show where MODEL would run, and why; launch nothing."""
    from mgpu import commands

    request = to_request(options, context.meta[_RUNTIME_ARGS])
    rig_name, explicit = options["rig"], options["llama_server"]
    if verify:
        decided = commands.decide_to_verify(model, request, rig_name=rig_name, explicit=explicit)
    else:
        decided = commands.decide(model, request, rig_name=rig_name, launching=False, explicit=explicit, explore=True)
    projection = commands.project(decided) if verify else None
    if options["as_json"]:
        commands.print_json(decided, projection)
    else:
        commands.print_plan(decided, svg, projection)


@cli.command()
@click.argument("model", type=ModelArgument())
@bench_options
def bench(model: str, **options: Any) -> None:
    """Measure how fast MODEL runs here, and keep it for later plans.

    \b
    mgpu bench model.gguf
    mgpu bench model.gguf --quick
    mgpu bench model.gguf --rig home --kv-type q8_0

    One placement after the other is loaded and timed: the plan's, each kind of card alone, and splits.
    """
    from mgpu.bench.command import Asked, measure

    if options["no_save"] and options["save_as"] is not None:
        raise UsageError("--save and --no-save contradict each other", hint="leave one of the two out")
    measure(
        model,
        Asked(
            request=to_bench_request(options),
            rig_name=options["rig"],
            save_as=options["save_as"],
            keep=not options["no_save"],
            quick=options["quick"],
            as_json=options["as_json"],
            explicit=options["llama_server"],
            n_prompt=options["n_prompt"],
            n_gen=options["n_gen"],
            repetitions=options["repetitions"],
        ),
    )


@cli.command()
@click.argument("model", type=ModelArgument())
@click.option("--json", "as_json", is_flag=True, help="Print it as JSON.")
def inspect(model: str, *, as_json: bool) -> None:
    """Show what the model file says."""
    from mgpu import commands

    commands.print_model(model, as_json=as_json)


@cli.group(cls=_Group)
def rig() -> None:
    """This machine, and saved rig profiles."""


@rig.command("show")
@click.argument("name", required=False, type=RigName())
@click.option("--json", "as_json", is_flag=True, help="Print it as JSON.")
def rig_show(name: str | None, *, as_json: bool) -> None:
    """Show this machine as detected, or the profile NAME."""
    from mgpu import rigs

    rigs.show(name, as_json=as_json)


@rig.command("save")
@click.argument("name")
@click.option("--force", is_flag=True, help="Replace a profile of this name.")
def rig_save(name: str, *, force: bool) -> None:
    """Save this machine as the profile NAME, to edit by hand."""
    from mgpu import rigs

    rigs.save(name, overwrite=force)


@rig.command("list")
def rig_list() -> None:
    """List the profiles, bundled and saved."""
    from mgpu import rigs

    rigs.list_all()


@rig.command("use")
@click.argument("name", required=False, type=RigName())
@click.option("--none", "forget", is_flag=True, help="Go back to this machine as detected.")
def rig_use(name: str | None, *, forget: bool) -> None:
    """Make the profile NAME the default."""
    from mgpu import rigs

    if (name is None) is not forget:
        raise UsageError("name a profile, or give --none", hint="`mgpu rig list` shows the profiles")
    rigs.use(name)


@rig.command("check")
@click.argument("name", required=False, type=RigName())
def rig_check(name: str | None) -> None:
    """Compare the profile NAME (or the default) with this machine."""
    from mgpu import rigs

    rigs.check(name)


@rig.command("remove")
@click.argument("name", type=RigName())
def rig_remove(name: str) -> None:
    """Remove the saved profile NAME."""
    from mgpu import rigs

    rigs.remove(name)


@cli.command()
@click.option("--json", "as_json", is_flag=True, help="Print it as JSON.")
def ps(*, as_json: bool) -> None:
    """Show what runs: where, with how much memory, how fast, for how many."""
    from mgpu import launches

    launches.show(as_json=as_json)


@cli.command()
@click.argument("names", metavar="[NAME]...", nargs=-1, type=LaunchName())
@click.option("--all", "everything", is_flag=True, help="All of them.")
def stop(names: tuple[str, ...], *, everything: bool) -> None:
    """Stop launches, and wait until they have given their memory back; clear failed ones away."""
    from mgpu import launches

    if everything and names:
        raise UsageError("--all and a name contradict each other", hint="leave one of the two out")
    launches.stop(names, everything=everything)


@cli.command()
@click.argument("name", required=False, type=LaunchName())
@click.option("-f", "--follow", is_flag=True, help="Go on as it says more, until it ends or Ctrl-C.")
@click.option("-n", "--lines", type=click.IntRange(1, 10_000), metavar="N", help="How many of the last [default: 40].")
def logs(name: str | None, *, follow: bool, lines: int | None) -> None:
    """Show the last lines of a launch's log."""
    from mgpu import launches

    launches.logs(name, follow=follow, lines=lines)


@cli.command("runtimes")
@click.option("--rig", "rig_name", type=RigName(), metavar="NAME|FILE", help="What they could do on this rig instead.")
@click.option("--json", "as_json", is_flag=True, help="Print it as JSON.")
def show_runtimes(rig_name: str | None, *, as_json: bool) -> None:
    """Show the runtimes: found or not, where, what they can do here, and how to install them."""
    from mgpu import runtimes

    runtimes.show(rig_name, as_json=as_json)


@cli.command()
@click.option("--json", "as_json", is_flag=True, help="Print it as JSON.")
def doctor(*, as_json: bool) -> None:
    """Look for what is wrong with this machine, and say how to put it right."""
    from mgpu.doctor.command import show

    sys.exit(show(as_json=as_json))


@cli.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completions(shell: str) -> None:
    """Print the completion script of a shell."""
    from mgpu.shells import script

    click.echo(script(shell, cli), nl=False)


def main() -> NoReturn:
    """The console script: every way to end has its exit code, and only a bug has a traceback."""
    gc.disable()  # a few MB live as long as the process: collecting them is 3 % of a dry run, and frees nothing
    _mend_streams()
    try:
        cli.main(prog_name="mgpu", standalone_mode=False)
        sys.stdout.flush()
    except MgpuError as error:
        _end(error)
    except click.exceptions.Exit as end:
        sys.exit(end.exit_code)
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.format_message())
        sys.exit(error.exit_code)
    except click.ClickException as error:
        _end(_as_usage(error))
    except (click.Abort, KeyboardInterrupt):
        _end(InterruptedLaunchError("interrupted"))
    except _GoneError:
        # Whoever read our output has gone; Python would complain once more while it closes stdout.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    except OSError as error:
        if error.errno not in {errno.ENOSPC, errno.EIO, errno.EBADF}:
            raise
        _end(UsageError(f"cannot write the output: {error.strerror}", hint="give it a place to write to"))
    sys.exit(0)


def _mend_streams() -> None:
    """A closed stream becomes the null device; and a path need not be valid text, nor a terminal UTF-8."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, Path(os.devnull).open("w", encoding="utf-8"))  # noqa: SIM115 - as long as the process lives
        elif hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def _as_usage(error: click.ClickException) -> UsageError:
    """click's own errors in our two lines."""
    context = getattr(error, "ctx", None)
    command = context.command_path if context is not None else "mgpu"
    return UsageError(error.format_message().replace("\n", " ").rstrip("."), hint=f"see {command} --help")


def _end(error: MgpuError) -> NoReturn:
    """Two lines on stderr, after the runtime's own last lines if it has said any; with --json, the object on stdout."""
    if isinstance(error, InterruptedLaunchError):
        from mgpu.launch.progress import takes

        if not takes(sys.stderr):  # a full pipe would keep us from ending, which was asked for
            os._exit(error.exit_code)
    with suppress(OSError):  # nobody to tell it to; the exit code still says it
        if "--json" in _our_arguments():
            from mgpu import commands

            commands.print_failure(error)
        if isinstance(error, RuntimeFailedError):
            from mgpu.launch.redact import redact, secrets_of

            for line in error.log_tail:
                click.echo(f"  | {redact(line, secrets_of(os.environ), home='')}", err=True)
        click.echo(f"mgpu: {error.message}", err=True)
        if error.hint:
            click.echo(f"      {error.hint}", err=True)
        if isinstance(error, RuntimeFailedError) and error.report:
            click.echo(f"      report, ready to paste into an issue: {error.report}", err=True)
        sys.stdout.flush()
        sys.stderr.flush()
    sys.exit(error.exit_code)


def _our_arguments() -> list[str]:
    arguments = sys.argv[1:]
    return arguments[: arguments.index("--")] if "--" in arguments else arguments
