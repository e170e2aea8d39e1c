"""llama-fit-params: llama.cpp's own tool that loads a model and a context without allocating, and prints their sizes.

Source: llama.cpp b11434, tools/fit-params/fit-params.cpp, common/fit.cpp (common_fit_print).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Final

from msgspec.structs import replace

from mgpu.adapter import Command, Expected, Job, Projected, Question, Search
from mgpu.errors import RuntimeMissingError, UsageError
from mgpu.plan import Layout
from mgpu.rig import Rig
from mgpu.units import MIB, gib
from mgpu_adapters.llamacpp.compute import N_COPIES
from mgpu_adapters.llamacpp.job import LlamaJob
from mgpu_adapters.llamacpp.memory import Footprint, footprint
from mgpu_adapters.llamacpp.settings import Settings

_INSTALL: Final = "cmake --build build --target llama-fit-params (in the sources of the same llama.cpp)"

#: `CUDA0 4403 1024 290 `: model, context and compute in MiB; the host comes last.
_LINE: Final = re.compile(r"^(\S{1,100}) ([0-9]{1,9}) ([0-9]{1,9}) ([0-9]{1,9}) *$", re.MULTILINE)
#: The spellings at the beginning of an entry of `--help`.
_ENTRY: Final = re.compile(r"^(?:--?[A-Za-z][\w-]*(?:,\s*|\s|$))+", re.MULTILINE)
_FLAG: Final = re.compile(r"--?[A-Za-z][\w-]*")
_NUMBER: Final = re.compile(r"-[\d.]")

#: llama-server's alone, passed by mgpu itself: nothing to remark on when they are left out.
_SERVER: Final = frozenset({"--host", "--port", "--api-key-file", "--kv-unified", "-kvu", "--no-kv-unified", "-no-kvu"})
_SLOTS: Final = frozenset({"--parallel", "-np"})


class FitParams:
    """Implements `mgpu.adapter.Projector`."""

    search = Search(
        variable="MGPU_LLAMA_FIT_PARAMS", executables=("llama-fit-params",), package_files=(), install=_INSTALL
    )

    def question(self, job: Job, layout: Layout, rig: Rig, command: Command, help_text: str) -> Question:
        assert isinstance(job, LlamaJob)  # noqa: S101 - whoever has this projector has llama.cpp's jobs
        flags = frozenset(flag for entry in _ENTRY.findall(help_text) for flag in _FLAG.findall(entry))
        return ask(job, layout, rig, command, flags)

    def read(self, text: str) -> tuple[Projected, ...]:
        return tuple(
            Projected(device=name, weights=int(model) * MIB, kv=int(context) * MIB, compute=int(compute) * MIB)
            for name, model, context, compute in _LINE.findall(text)
        )


def ask(job: LlamaJob, layout: Layout, rig: Rig, command: Command, flags: frozenset[str]) -> Question:
    """The question for a tool that knows `flags`.

    Raises `RuntimeMissingError` when it cannot print a projection, `UsageError` for tensor ranks, which it never cuts:
    b11434 prints the whole model's sizes for them.
    """
    if layout.shape.mode == "tensor":
        raise UsageError(
            "--verify cannot ask about tensor ranks: llama-fit-params tells their sizes as if nothing were cut",
            hint="leave --verify out: a launch compares the plan with what llama-server reports",
        )
    if "--fit-print" not in flags:
        raise RuntimeMissingError(
            "this llama-fit-params is too old for --verify: its --help knows no --fit-print",
            hint=f"update it: {_INSTALL}",
        )
    settings = as_asked(job.settings)
    unknown = _SLOTS if job.settings.kv_unified else frozenset()
    kept, dropped = _divide(command.argv[1:], flags - unknown)
    if "--no-repack" in flags:
        kept.append("--no-repack")  # the tool leaves repacked weights out of its sums; their total is the same
    return Question(
        arguments=(*_rpc_first(kept), "--fit-print", "on"),
        expected=tuple(_expected(footprint(job.model, settings), layout, rig, command)),
        remarks=tuple(_remarks(job, settings, layout, [flag for flag in dropped if flag not in _SERVER | unknown])),
    )


def as_asked(settings: Settings) -> Settings:
    """What the tool projects in their place: logits for a whole batch; and, as it has no `--kv-unified`, one slot."""
    if settings.kv_unified:
        settings = replace(settings, n_parallel=1, kv_unified=False)
    return replace(settings, n_outputs=settings.u)


def _expected(need: Footprint, layout: Layout, rig: Rig, command: Command) -> Iterator[Expected]:
    by_index = {gpu.index: gpu for gpu in rig.gpus}
    gpus = tuple(by_index[index] for index in layout.gpus)
    shape = layout.shape
    for number, (gpu, span, name) in enumerate(zip(gpus, layout.spans(), command.devices, strict=True)):
        if span:
            memory = need.device(span, shape, gpu)
            sizes = (memory.weights, memory.kv, memory.compute)
        else:
            sizes = (0, 0, 0)
        yield _as_expected(name, sizes, _copies(need) if number else 0)
    host = need.host(shape, gpus)
    yield _as_expected("Host", (host.weights, host.kv, host.compute), 0)


def _as_expected(name: str, sizes: tuple[int, int, int], more: int) -> Expected:
    weights, kv, compute = sizes
    return Expected(device=name, weights=weights, kv=kv, compute=compute, compute_more=more)


def _copies(need: Footprint) -> int:
    """What the tool may count too much on each device but the first: one more input for each batch in flight.

    ggml_backend_sched_reserve_size resets the scheduler, and with it where llama.cpp had put a device's first norm.
    Of 5,945 buffers measured with b11434, 1,063 were off by exactly this, four (experts on the host) by something else.
    """
    return 4 * N_COPIES * need.model.hyper.n_embd * need.settings.u


def _divide(arguments: Sequence[str], flags: frozenset[str]) -> tuple[list[str], list[str]]:
    """The arguments the tool knows; and the flags that it does not, left out with their values."""
    kept: list[str] = []
    dropped: list[str] = []
    keeping = True
    for argument in arguments:
        if argument.startswith("-") and not _NUMBER.match(argument):
            keeping = (argument.replace("_", "-") if argument.startswith("--") else argument) in flags
            if not keeping:
                dropped.append(argument)
        if keeping:
            kept.append(argument)
    return kept, dropped


def _rpc_first(arguments: Sequence[str]) -> list[str]:
    """`--device` names remote devices only after `--rpc` has made them known."""
    if "--rpc" not in arguments[:-1]:
        return list(arguments)
    at = arguments.index("--rpc")
    return [*arguments[at : at + 2], *arguments[:at], *arguments[at + 2 :]]


def _remarks(job: LlamaJob, asked: Settings, layout: Layout, dropped: Sequence[str]) -> Iterator[str]:
    yield (
        "both are with logits for a whole batch, as llama-fit-params counts them; llama-server keeps one token's "
        "for each slot, and what is launched takes that much less"
    )
    if len(layout.gpus) > 1:
        copies = 4 * N_COPIES * job.model.hyper.n_embd * asked.u
        yield (
            f"with several devices it may count {gib(copies)} too much on each but the first "
            "(ggml_backend_sched_reserve_size, b11434)"
        )
    if job.settings.kv_unified:
        yield "it has no --kv-unified: plan and projection are both for one slot with the whole context"
    if dropped:
        yield f"it has no {', '.join(dropped)}: left out of what it was asked"
