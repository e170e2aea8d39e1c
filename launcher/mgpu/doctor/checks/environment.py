"""Environment variables that change what runtimes do, and that nobody remembers to have set."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Final

from msgspec import Struct

from mgpu.doctor.facts import Facts
from mgpu.doctor.finding import Finding, Severity, ok

_FALSE: Final = frozenset({"", "0", "false", "no", "off", "f", "n"})
_LOCAL: Final = frozenset({"localhost", "127.0.0.1", "*"})
_PROXIES: Final = ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY")
_SECRET: Final = re.compile(r"KEY|TOKEN|SECRET|PASS")
_OLLAMA: Final = "ollama fb30760 envconfig/config.go"


class Variable(Struct, frozen=True, kw_only=True):
    """One variable. `applies`: to a value, on this machine; `what` follows "NAME=VALUE: "."""

    name: str
    applies: Callable[[str, Facts], bool]
    severity: Severity
    what: str
    fix: str = ""
    source: str = ""


def _on(value: str, facts: Facts) -> bool:
    del facts
    return value.strip().lower() not in _FALSE


def _set(value: str, facts: Facts) -> bool:
    del facts
    return value != ""


def _any(value: str, facts: Facts) -> bool:
    del value, facts
    return True


def _with_own_memory(value: str, facts: Facts) -> bool:
    del value
    return any(gpu.vendor == "nvidia" and not gpu.unified for gpu in facts.cards.rig.gpus)


def _several(value: str, facts: Facts) -> bool:
    return _on(value, facts) and len([gpu for gpu in facts.cards.rig.gpus if not gpu.integrated]) > 1


def _with_links(value: str, facts: Facts) -> bool:
    return _on(value, facts) and any(link.kind != "pcie" for link in facts.cards.rig.links)


def _without_links(value: str, facts: Facts) -> bool:
    return _on(value, facts) and not _with_links(value, facts)


def _open(value: str, facts: Facts) -> bool:
    del facts
    return re.fullmatch(r"(?:\w+://)?(?:0\.0\.0\.0|\[::\]|::)(?::\d+)?/?", value.strip()) is not None


def _one_thread(value: str, facts: Facts) -> bool:
    return value.strip() == "1" and (facts.host.cpu_cores or 1) > 1


def _expandable_on_several(value: str, facts: Facts) -> bool:
    return "expandable_segments:true" in value.lower().replace(" ", "") and _several("1", facts)


def _one_of(*values: str) -> Callable[[str, Facts], bool]:
    return lambda value, _facts: value.strip().lower() in values


VARIABLES: Final = (
    Variable(
        name="CUDA_DEVICE_ORDER",
        applies=_one_of("fastest_first"),
        severity="note",
        what="CUDA numbers cards by speed, nvidia-smi by slot; mgpu sets PCI_BUS_ID for what it starts",
        fix="export CUDA_DEVICE_ORDER=PCI_BUS_ID",
    ),
    Variable(
        name="NVIDIA_VISIBLE_DEVICES",
        applies=_one_of("void", "none", ""),
        severity="error",
        what="the container was given no NVIDIA card",
        fix="start it with --gpus all",
        source="NVIDIA Container Toolkit documentation",
    ),
    Variable(
        name="GGML_CUDA_ENABLE_UNIFIED_MEMORY",
        applies=_with_own_memory,
        severity="warning",
        what="what does not fit a card goes to RAM and crawls, where llama.cpp would stop with an error",
        fix="unset GGML_CUDA_ENABLE_UNIFIED_MEMORY",
        source="llama.cpp b11434 ggml-cuda.cu",
    ),
    Variable(
        name="GGML_CUDA_DEVICES",
        applies=_set,
        severity="warning",
        what="llama.cpp divides the card into so many that do not exist",
        fix="unset GGML_CUDA_DEVICES",
        source="llama.cpp #25228",
    ),
    Variable(
        name="GGML_CUDA_NO_PINNED",
        applies=_any,
        severity="note",
        what="prompts and loading are slower without pinned memory",
        fix="unset GGML_CUDA_NO_PINNED",
    ),
    Variable(
        name="CUDA_LAUNCH_BLOCKING",
        applies=_on,
        severity="warning",
        what="every kernel is waited for: for debugging, and slow",
        fix="unset CUDA_LAUNCH_BLOCKING",
        source="CUDA C++ Programming Guide",
    ),
    Variable(
        name="HSA_OVERRIDE_GFX_VERSION",
        applies=_set,
        severity="warning",
        what="every AMD card is taken for that one, those too that it is wrong for; wrong kernels crash",
        fix="set HSA_OVERRIDE_GFX_VERSION_0, _1, … for single cards, or unset it where ROCm knows yours",
        source="ollama docs/gpu.mdx",
    ),
    Variable(
        name="NCCL_P2P_DISABLE",
        applies=_with_links,
        severity="warning",
        what="tensor ranks meet in RAM, though the cards could reach each other",
        fix="unset NCCL_P2P_DISABLE, unless ranks hang without it",
        source="NCCL user guide",
    ),
    Variable(
        name="NCCL_P2P_DISABLE",
        applies=_without_links,
        severity="note",
        what="changes nothing: these cards have no P2P",
    ),
    Variable(
        name="OLLAMA_SCHED_SPREAD",
        applies=_several,
        severity="warning",
        what="Ollama puts every model on all cards, also one that fits a single card",
        fix="unset it where `ollama serve` starts: systemctl edit ollama",
        source=f"{_OLLAMA}, server/sched.go",
    ),
    Variable(
        name="OLLAMA_GPU_OVERHEAD",
        applies=_on,
        severity="note",
        what="Ollama 0.30 and newer keeps nothing free by it",
        fix="LLAMA_ARG_FIT_TARGET (MiB) for `ollama serve`",
        source="ollama fb30760 server/sched.go",
    ),
    Variable(
        name="OLLAMA_LLM_LIBRARY",
        applies=_set,
        severity="warning",
        what="Ollama loads no other backend; one it does not have means the CPU",
        fix="unset OLLAMA_LLM_LIBRARY",
        source="ollama fb30760 discover/runner.go",
    ),
    Variable(
        name="OLLAMA_HOST",
        applies=_open,
        severity="warning",
        what="an Ollama started with it serves, and lets delete, to anybody who reaches this machine: it knows no keys",
        fix="OLLAMA_HOST=127.0.0.1:11434, or a firewall",
        source=_OLLAMA,
    ),
    Variable(
        name="PYTORCH_CUDA_ALLOC_CONF",
        applies=_expandable_on_several,
        severity="warning",
        what="vLLM's tensor ranks crash with it while they start",
        fix="unset PYTORCH_CUDA_ALLOC_CONF, or vLLM's --disable-custom-all-reduce",
        source="vllm #42609, #9046",
    ),
    Variable(
        name="HF_HUB_OFFLINE",
        applies=_on,
        severity="note",
        what="models that are not on this disk cannot be downloaded",
        fix="unset HF_HUB_OFFLINE to download one",
    ),
    Variable(
        name="VLLM_PP_LAYER_PARTITION",
        applies=_set,
        severity="warning",
        what="every vLLM started by hand splits its layers so, or stops where their number is another",
        fix="unset VLLM_PP_LAYER_PARTITION",
        source="vllm 0.32.0 distributed/utils.py",
    ),
    Variable(
        name="OMP_NUM_THREADS",
        applies=_one_thread,
        severity="warning",
        what="what PyTorch computes on the CPU has one thread",
        fix="unset OMP_NUM_THREADS",
    ),
    Variable(
        name="LD_PRELOAD",
        applies=_set,
        severity="note",
        what="is loaded into every runtime",
        fix="unset LD_PRELOAD if one crashes at its start",
    ),
)


def variables(facts: Facts) -> Iterator[Finding]:
    """Those of the table."""
    told = 0
    for variable in VARIABLES:
        value = facts.environ.get(variable.name)
        if value is None or not variable.applies(value, facts):
            continue
        told += 1
        yield Finding(
            severity=variable.severity,
            area="environment",
            id=variable.name,
            text=f"{variable.name}={_shown(variable.name, value)}: {variable.what}",
            fix=variable.fix,
            source=variable.source,
        )
    if not told:
        names = {variable.name for variable in VARIABLES}
        yield ok("environment", "variables", f"none of {len(names)} variables that get in the way is set")


def llama_arguments(facts: Facts) -> Iterator[Finding]:
    """Each flag of llama-server has a variable that it obeys without a word."""
    names = sorted(name for name in facts.environ if name.startswith("LLAMA_ARG_"))
    if not names:
        yield ok("environment", "llama-arg", "no LLAMA_ARG_… is set")
        return
    shown = ", ".join(f"{name}={_shown(name, facts.environ[name])}" for name in names[:3])
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    yield Finding(
        severity="warning",
        area="environment",
        id="llama-arg",
        text=f"{shown}{more}: llama-server obeys them silently, and Ollama's too; mgpu takes them away from its own",
        fix=f"unset {' '.join(names[:3])}{' …' if more else ''}",
        source="llama.cpp b11434 common/arg.cpp",
    )


def proxies(facts: Facts) -> Iterator[Finding]:
    """Requests to this very machine must not go through a proxy."""
    name = next((name for name in _PROXIES if facts.environ.get(name)), None)
    if name is None:
        return
    exceptions = facts.environ.get("no_proxy") or facts.environ.get("NO_PROXY") or ""
    if _LOCAL & {word.strip().lower() for word in exceptions.split(",")}:
        yield ok("environment", "proxy", f"{name} spares this machine")
        return
    yield Finding(
        severity="warning",
        area="environment",
        id="proxy",
        text=f"{name} is set, and no_proxy does not name localhost: clients ask the proxy for your own server",
        fix="export no_proxy=localhost,127.0.0.1,::1",
    )


def amd_and_cuda_lists(facts: Facts) -> Iterator[Finding]:
    """ROCm reads both."""
    hip, cuda = facts.environ.get("HIP_VISIBLE_DEVICES"), facts.environ.get("CUDA_VISIBLE_DEVICES")
    if hip and cuda and hip != cuda and any(gpu.vendor == "amd" for gpu in facts.cards.rig.gpus):
        yield Finding(
            severity="error",
            area="environment",
            id="visible-devices",
            text=f"HIP_VISIBLE_DEVICES={_shown('', hip)} and CUDA_VISIBLE_DEVICES={_shown('', cuda)} differ:"
            " vLLM for ROCm stops at that",
            fix="unset CUDA_VISIBLE_DEVICES",
            source="vllm 0.32.0 platforms/rocm.py",
        )


def home(facts: Facts) -> Iterator[Finding]:
    """Everything keeps its files there."""
    if "HOME" not in facts.environ and "XDG_STATE_HOME" not in facts.environ and facts.environ:
        yield Finding(
            severity="warning",
            area="environment",
            id="home",
            text="HOME is not set: runtimes do not find, or cannot keep, their models",
            fix="set it, also in systemd units and cron jobs",
        )


def _shown(name: str, value: str) -> str:
    """Short, on one line, and no secret."""
    if _SECRET.search(name):
        return "…"
    text = value if value.isprintable() else repr(value)
    return text if len(text) <= 40 else f"{text[:39]}…"


CHECKS: Final = (variables, llama_arguments, proxies, amd_and_cuda_lists, home)
