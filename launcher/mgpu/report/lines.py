"""The few calm lines of `mgpu run`, as plain strings: what runs where, and why. Without rich: start-up."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Mapping, Sequence

from msgspec.structs import replace

from mgpu.adapter import Command
from mgpu.model import Model
from mgpu.plan import DevicePlan, Plan, RuleVerdict, Speed
from mgpu.request import KEY_PLACEHOLDER, KEY_VARIABLE
from mgpu.rig import short_name
from mgpu.units import gib, gib_of

#: Rules whose verdicts `run` shows in its few lines; `plan` shows all.
_TELLING = ("fits-one-card", "fastest-card", "fewest-cards", "split-by-layers", "many-users", "cpu-offload-last")


_PARTS = re.compile(f"({re.escape(KEY_PLACEHOLDER)})")


def run_lines(model: Model, plan: Plan) -> tuple[str, ...]:
    """What `run` says before it launches."""
    lines = [f"{title(model)}: {size_words(model)}", f"  {where(plan)}{at_speed(plan.tok_s)}"]
    lines += [f"  {verdict.text}" for verdict in plan.rules if _tells(verdict, plan)]
    lines += [f"  warning: {warning}" for warning in plan.warnings]
    return tuple(lines)


def title(model: Model) -> str:
    """`"Llama 3.1 8B Instruct Q4_K_M"`: the name, and the quantisation unless the name says it."""
    return model.name if model.quantization in model.name else f"{model.name} {model.quantization}"


def size_words(model: Model) -> str:
    """`"8.0 B parameters, 32 layers, 4.6 GiB"`."""
    if not model.tensors:
        return "known by name, to a service that has it"
    billions = model.parameters / 10**9
    parameters = f"{billions:.1f} B" if billions >= 1 else f"{model.parameters / 10**6:.0f} M"
    experts = f", {model.hyper.n_expert} experts" if model.is_moe else ""
    return f"{parameters} parameters, {model.hyper.n_layer} layers{experts}, {gib(model.weights_bytes)}"


def where(plan: Plan) -> str:
    """`"on GPU 0 (RTX 3090), 5.9 of 23.5 GiB, context 8192"`."""
    context = f"context {plan.ctx}" + (f" x {plan.users} users" if plan.users > 1 else "")
    if plan.attached:
        return f"on {plan.attached}, {context}"
    if not plan.devices:
        return f"on the CPU, {gib(plan.host.memory.total)} of RAM, {context}"
    parts = [f"{name_of(device)} {_share(device, plan)}" for device in plan.devices]
    return f"on {' + '.join(parts)}, {context}"


def indices(gpus: Sequence[int]) -> str:
    """`"0+2"`, `"0-7"`: rig indices, in order; a run of three and more as a range."""
    runs: list[list[int]] = []
    for gpu in gpus:
        if runs and gpu == runs[-1][-1] + 1:
            runs[-1].append(gpu)
        else:
            runs.append([gpu])
    words = (f"{run[0]}-{run[-1]}" if len(run) > 2 else "+".join(map(str, run)) for run in runs)
    return "+".join(words)


def name_of(device: DevicePlan) -> str:
    """`"GPU 0 (RTX 3090)"`."""
    return f"GPU {device.gpu} ({short_name(device.name)})"


def layers_of(device: DevicePlan) -> str:
    """`"32 layers + output"`, or `"output alone"`."""
    count = len(device.blocks)
    if not count:
        return "output alone" if device.has_output else "nothing"
    return f"{count} layer{'s' if count > 1 else ''}" + (" + output" if device.has_output else "")


def at_speed(speed: Speed | None) -> str:
    """`", 95-128 tok/s predicted"`; empty when unknown."""
    return "" if speed is None else f", {speed.words}"


def shell_line(command: Command, scrubbed: tuple[str, ...] = (), *, key_file: str = "") -> str:
    """One line to paste into a shell: assignments first. `scrubbed` variables are in the caller's environment.

    A runtime with files of its own is given a new directory for them: then a subshell goes there first. One that has
    no model of itself is awaited and given it, as mgpu would. Instead of a key that is nothing to print there is where
    the shell reads it: from `key_file`, or from our variable; without it, nothing is started.
    """
    if command.then:
        return _served(command, scrubbed)
    own = {name: text for name, text in command.files.items() if not os.path.isabs(name)}  # noqa: PTH117 - a name, no Path yet
    steps: list[str] = []
    if key_file and any(KEY_PLACEHOLDER in text for text in (*command.env.values(), *own.values())):
        steps.append(f'key="$(cat {shlex.quote(key_file)})"')
    if own:
        steps += ['cd "$(mktemp -d)"', _written(own, in_file=bool(key_file))]
    assignments = [f"{name}={_quoted(value, in_file=bool(key_file))}" for name, value in command.env.items()]
    unset = [word for name in scrubbed for word in ("-u", shlex.quote(name))]
    line = " ".join([*unset, *assignments, shlex.join(command.argv)])
    if steps:
        return f"( {' && '.join(steps)} && exec env {line} )"
    return f"env {line}" if scrubbed else line


def _quoted(text: str, *, in_file: bool) -> str:
    """For a shell, as it is but for a key: that is read when the line is run."""
    if KEY_PLACEHOLDER not in text:
        return shlex.quote(text)
    key = '"$key"' if in_file else f'"${{{KEY_VARIABLE}:?}}"'
    return "".join(key if part == KEY_PLACEHOLDER else shlex.quote(part) for part in _PARTS.split(text) if part)


def _served(command: Command, scrubbed: tuple[str, ...]) -> str:
    start = f"{shell_line(replace(command, then=()), scrubbed)} & p=$!;"
    await_it = f"until curl -fs {shlex.quote(command.ready_url)} >/dev/null; do kill -0 $p || exit 7; sleep 1; done;"
    return f"( {_ends('$p')} {start} {await_it} {' && '.join(command.then)} && wait )"


def _ends(processes: str) -> str:
    """Whatever ends the subshell ends these, too."""
    return f"trap 'kill {processes} 2>/dev/null; wait' EXIT; trap 'exit 130' INT TERM HUP;"


def _written(files: Mapping[str, str], *, in_file: bool) -> str:
    """What writes the files in the current directory: an argument for each line, so that the whole stays one line."""
    lines = (" ".join(_quoted(line, in_file=in_file) for line in text.splitlines()) for text in files.values())
    return " && ".join(f"printf '%s\\n' {line} > {shlex.quote(name)}" for name, line in zip(files, lines, strict=True))


def joint_line(commands: Sequence[Command], scrubbed: tuple[str, ...] = (), *, key_file: str = "") -> str:
    """One line that runs several commands at once, and ends them all on Ctrl-C: for sh, bash and zsh.

    By their process ids, not by group: in a script, the group is the caller's own.
    """
    lines = [
        f"{shell_line(command, scrubbed, key_file=key_file)} & p{place}=$!;" for place, command in enumerate(commands)
    ]
    everyone = " ".join(f"$p{place}" for place in range(len(commands)))
    return f"( {_ends(everyone)} {' '.join(lines)} wait )"


def to_scrub(command: Command, environ: Mapping[str, str]) -> tuple[str, ...]:
    """The caller's variables that would change the runtime's mind behind the plan's back."""
    return tuple(sorted(name for name in environ if name.startswith(command.scrub) or name == KEY_VARIABLE))


def _share(device: DevicePlan, plan: Plan) -> str:
    memory = gib_of(device.memory.total, max(device.free_bytes - device.reserve_bytes, 0))
    return memory if len(plan.devices) == 1 else f"{layers_of(device)}, {memory}"


def _tells(verdict: RuleVerdict, plan: Plan) -> bool:
    """What passes goes without saying, and so does where a plan for the CPU alone runs: the line above has it."""
    if verdict.quiet or verdict.verdict == "passes":
        return False
    if verdict.verdict == "warns" and verdict.id != "cpu-offload-last":
        return True
    if verdict.id == "runtime-choice":
        return plan.runtime != "llama.cpp"
    return verdict.id in _TELLING and plan.placement != "cpu"
