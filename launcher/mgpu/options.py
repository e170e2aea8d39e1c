"""The options of `run` and `plan`, once, and what they mean as a `Request`. The contract's table, in click's words."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from typing import Any, Final, Literal, TypeVar

import click
from click.shell_completion import CompletionItem

from mgpu.errors import UsageError
from mgpu.model import KV_TYPES
from mgpu.request import KEY_VARIABLE, OFFLOAD_CHOICES, RUNTIME_NAMES, SPLIT_CHOICES, Request
from mgpu.units import parse_size

Command = TypeVar("Command", bound=Callable[..., Any])

#: As `mgpu.launch.store` has it: a file's name.
_LAUNCH_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")

_MOST_USERS: Final = 256  # LLAMA_MAX_SEQ, llama.cpp b11434


def planning_options(command: Command) -> Command:
    """What shapes a plan: shared by `run` and `plan`."""
    for option in reversed(_PLANNING):
        command = option(command)
    return command


class ModelArgument(click.ParamType[str]):
    """MODEL: completed as a file."""

    name = "MODEL"

    def shell_complete(  # click's signature
        self, ctx: click.Context, param: click.Parameter, incomplete: str
    ) -> list[CompletionItem]:
        del ctx, param
        return [CompletionItem(incomplete, type="file")]


class RigName(click.ParamType[str]):
    """A profile's name, completed from the bundled and the saved ones."""

    name = "NAME"

    def shell_complete(  # click's signature
        self, ctx: click.Context, param: click.Parameter, incomplete: str
    ) -> list[CompletionItem]:
        del ctx, param
        from mgpu_profiles.store import user_store

        return [CompletionItem(rig.name) for rig in user_store().names() if rig.name.startswith(incomplete)]


class LaunchName(click.ParamType[str]):
    """The name of a launch, completed from those there are."""

    name = "NAME"

    def shell_complete(  # click's signature
        self, ctx: click.Context, param: click.Parameter, incomplete: str
    ) -> list[CompletionItem]:
        del ctx, param
        from mgpu.launch.store import launches

        return [CompletionItem(seen.name) for seen in launches() if seen.name.startswith(incomplete)]


class Context(click.ParamType[int | Literal["max"]]):
    """`--ctx`: tokens per user, or "max"."""

    name = "N|max"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int | Literal["max"]:
        text = str(value).lower()
        if text == "max":
            return "max"
        match = re.fullmatch(r"([0-9]{1,9})(k?)", text)
        number = int(match[1]) * (1024 if match[2] else 1) if match else 0
        if number < 1:
            self.fail(f"{value!r} is neither a number of tokens, like 8192 or 32k, nor max", param, ctx)
        return number


class Runtime(click.Choice[str]):
    """`--runtime`: one of ours, or what an adapter that another package brings is called."""

    def __init__(self) -> None:
        super().__init__(("auto", *RUNTIME_NAMES))

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        if value in self.choices:
            return str(value)
        from mgpu_adapters.registry import other_names

        others = other_names()
        if value not in others:
            names = ", ".join((*self.choices, *others))
            self.fail(f"there is no runtime {value!r}: it is one of {names}", param, ctx)
        return str(value)


_PLANNING: Final = (
    click.option("--runtime", type=Runtime(), default="auto", show_default=True, help="What serves it."),
    click.option("--ctx", type=Context(), metavar="N|max", help="Tokens of context per user [default: as trained, 8192 at most]."),
    click.option(
        "--users", type=click.IntRange(1, _MOST_USERS), default=1, show_default=True, help="How many at the same time."
    ),
    click.option("--kv-type", type=click.Choice(KV_TYPES), default="f16", show_default=True, help="KV-cache type."),
    click.option("--gpus", metavar="LIST", help="GPUs to consider: indices, names or UUIDs, with commas [default: all]."),
    click.option(
        "--split", type=click.Choice(SPLIT_CHOICES), default="auto", show_default=True, help="How to use several GPUs."
    ),
    click.option(
        "--offload",
        type=click.Choice(OFFLOAD_CHOICES),
        default="auto",
        show_default=True,
        help="Whether the CPU may help: auto, only if nothing else fits and it is usable.",
    ),
    click.option(
        "--reserve", metavar="SIZE", multiple=True, help="Keep this free on every GPU; GPU=SIZE for one. Repeatable."
    ),
    click.option("--rig", type=RigName(), metavar="NAME|FILE", help="Plan for a saved rig instead of this machine."),
    click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on."),
    click.option("--port", type=click.IntRange(1, 65535), help="Port to listen on [default: a free one from 8080 up]."),
    click.option(
        "--api-key", metavar="KEY", envvar=KEY_VARIABLE, show_envvar=True,
        help="Key that clients must send [default: none on this machine alone, else one that is kept].",
    ),
    click.option("--no-auth", is_flag=True, help="Ask no client for a key, whoever can reach --host."),
    click.option("--llama-server", metavar="PATH", help="The llama-server to use [default: found]."),
    click.option("--json", "as_json", is_flag=True, help="Print the decision as JSON; launch nothing."),
    click.option("--force", is_flag=True, help="Do it although a rule refuses, or the memory is short."),
)  # fmt: skip


_RUN: Final = (
    click.option("--dry-run", is_flag=True, help="Print the command that would be run, and stop."),
    click.option("--prompt", metavar="TEXT", help="Answer this one question on stdout, then stop."),
    click.option("--detach", is_flag=True, help="Once it is ready, leave it running; see ps, logs and stop."),
    click.option(
        "--restart", type=click.Choice(("no", "on-failure")), default="no", show_default=True,
        help="Start it again when it has died, after a pause, seven times in a row at most.",
    ),
    click.option("--name", metavar="NAME", help="What ps, logs and stop call it [default: the model's]."),
    click.option("--unit", is_flag=True, help="Print a systemd user unit that runs this, and stop."),
)  # fmt: skip


_BENCH: Final = (
    click.option(
        "--runtime", type=Runtime(), default="auto", show_default=True, help="What serves it: llama.cpp so far."
    ),
    click.option("--ctx", type=Context(), metavar="N|max", help="Tokens of context it is loaded with [default: as trained, 8192 at most]."),
    click.option("--kv-type", type=click.Choice(KV_TYPES), default="f16", show_default=True, help="KV-cache type."),
    click.option("--gpus", metavar="LIST", help="GPUs to measure: indices, names or UUIDs, with commas [default: all]."),
    click.option(
        "--offload",
        type=click.Choice(OFFLOAD_CHOICES),
        default="auto",
        show_default=True,
        help="Whether the CPU may help: auto, only if nothing else fits and it is usable.",
    ),
    click.option("--quick", is_flag=True, help="The plan's placement and one needless split only."),
    click.option("--n-prompt", type=click.IntRange(1), metavar="N", help="Tokens to read [default: 512]."),
    click.option("--n-gen", type=click.IntRange(2), metavar="N", default=128, show_default=True, help="Tokens to generate."),
    click.option(
        "-r", "--repetitions", type=click.IntRange(1), metavar="N", default=3, show_default=True,
        help="How often; the median counts. Fewer where a minute is over.",
    ),
    click.option("--rig", type=RigName(), metavar="NAME|FILE", help="The profile that is used, and keeps the figures; it must be this machine."),
    click.option("--save", "save_as", metavar="NAME", help="Keep the figures in this profile [default: --rig, the default rig, or this-machine]."),
    click.option("--no-save", is_flag=True, help="Keep no figures."),
    click.option("--llama-server", metavar="PATH", help="The llama-server to use [default: found]."),
    click.option("--json", "as_json", is_flag=True, help="Print the figures as JSON."),
)  # fmt: skip


def run_options(command: Command) -> Command:
    """How a plan is carried out: `run` alone."""
    for option in reversed(_RUN):
        command = option(command)
    return command


def valued(command: click.Command) -> frozenset[str]:
    """The options of `command` that take a value, as they are typed."""
    options = (one for one in command.params if isinstance(one, click.Option))
    return frozenset(name for one in options if not one.is_flag and not one.count for name in one.opts)


def check_run(options: dict[str, Any]) -> None:
    """Raises `UsageError` for options of `run` that contradict each other."""
    name = options["name"]
    if name is not None and not _LAUNCH_NAME.fullmatch(name):
        raise UsageError(
            f"--name {name!r} is not a name",
            hint="a letter or digit, then letters, digits, dots, dashes and underscores; 64 at most",
        )
    if options["prompt"] is None:
        return
    others = (("--detach", options["detach"]), ("--unit", options["unit"]), ("--restart", options["restart"] != "no"))
    for other, given in others:
        if given:
            raise UsageError(
                f"--prompt answers once and stops: {other} contradicts that", hint="leave one of the two out"
            )


def bench_options(command: Command) -> Command:
    """What `bench` can be asked."""
    for option in reversed(_BENCH):
        command = option(command)
    return command


def to_bench_request(options: dict[str, Any]) -> Request:
    """The typed request of `bench`, for one user. Raises `UsageError` for lists that have no meaning."""
    return Request(
        runtime=options["runtime"],
        ctx=options["ctx"],
        kv_type=options["kv_type"],
        gpus=_names(options["gpus"]),
        offload=options["offload"],
    )


def to_request(options: dict[str, Any], runtime_args: tuple[str, ...]) -> Request:
    """The typed request. Raises `UsageError` for sizes and lists that have no meaning."""
    for name in ("host", "api_key"):
        if options[name] == "":
            raise UsageError(f"--{name.replace('_', '-')} is empty", hint="give it a value, or leave it out")
    return Request(
        runtime=options["runtime"],
        ctx=options["ctx"],
        users=options["users"],
        kv_type=options["kv_type"],
        gpus=_names(options["gpus"]),
        split=options["split"],
        offload=options["offload"],
        reserve=tuple(_reserve(text) for text in options["reserve"]),
        force=options["force"],
        host=options["host"],
        port=options["port"],
        api_key=_key(options["api_key"], no_auth=options["no_auth"]),
        no_auth=options["no_auth"],
        runtime_args=runtime_args,
    )


def _key(given: str | None, *, no_auth: bool) -> str | None:
    """What clients must send. Raises `UsageError` for what is no key, and for a key beside --no-auth."""
    if given is None:
        return None
    from mgpu.launch.keys import check_key

    by_variable = given == os.environ.get(KEY_VARIABLE)
    if no_auth and by_variable:
        return None  # what is said on the command line counts
    if no_auth:
        raise UsageError("--api-key and --no-auth contradict each other", hint="leave one of the two out")
    return check_key(given, f"${KEY_VARIABLE}" if by_variable else "--api-key")


def _names(text: str | None) -> tuple[str, ...]:
    if text is None:
        return ()
    names = tuple(name.strip() for name in text.split(","))
    if not all(names):
        raise UsageError(f"--gpus {text!r} has an empty entry", hint="write it like 0,2 or 3090,GPU-1a2b")
    return names


def _reserve(text: str) -> tuple[str, int]:
    gpu, _, size = text.rpartition("=")
    return gpu.strip(), parse_size(size)
