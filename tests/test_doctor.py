"""`mgpu doctor`: the facts from fake trees and drivers, the screen, the command, and what never answers."""

from __future__ import annotations

import io
import json
import os
import time
from pathlib import Path
from typing import Final

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from conftest import Mgpu, write_program
from fakenvml.fake import installed
from fakenvml.machine import Machine, a100, rtx_3090
from fakesys import GEN4, FakeSys, link_files, rx_7900_xtx
from mgpu.doctor.ask import Silence, ask_all
from mgpu.doctor.checks.all import examine
from mgpu.doctor.facts import CardFacts, Facts, HostFacts
from mgpu.doctor.finding import Finding, ok
from mgpu.doctor.gather import gather
from mgpu.doctor.sources.cards import look_at_cards
from mgpu.doctor.sources.disks import look_at_disk
from mgpu.doctor.sources.host import look_at_host, look_at_limits
from mgpu.doctor.sources.logind import kills_at_logout
from mgpu.doctor.sources.own import leftovers, look_at_own
from mgpu.report.doctor import doctor_object, doctor_screen, summary
from mgpu.report.screen import console
from mgpu.rig import Rig
from mgpu.units import GIB, MIB
from mgpu_profiles.store import user_store

NVIDIA_SMI: Final = (
    "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.95.05  Release Build  (root@x)\nGCC version: 14.2.0"
)


# --- the cards


def nvidia_tree(tmp_path: Path) -> FakeSys:
    """Two cards behind one host bridge, with their driver."""
    tree = FakeSys(tmp_path)
    for number in (1, 2):
        place = f"pci0000:00/0000:00:0{number}.0/0000:0{number}:00.0"
        tree.pci(place, {"vendor": "0x10de", "device": "0x2204", "class": "0x030000", **link_files(GEN4, 16)})
        tree.driver(place, "nvidia")
    tree.write({"proc/driver/nvidia/version": NVIDIA_SMI, "usr/lib64/libnvidia-ml.so.580.95.05": ""})
    return tree


def test_how_nvidia_cards_are_kept(tmp_path: Path) -> None:
    tree = nvidia_tree(tmp_path)
    tree.write({"dev/nvidiactl": ""})
    kept = {"persistence": 1, "power_default_mw": 350_000, "bar1_total": 256 * MIB, "slowed": 0x40, "ecc": 0}
    worn = {"ecc_errors": 2, "rows_pending": 1, "rows_failed": 1, "idle_links": 4}
    machine = Machine(rtx_3090(0, **kept), rtx_3090(1, **worn), links=({"a": 0, "b": 1, "level": 30, "p2p": 1},))
    with installed(machine):
        facts = look_at_cards({}, tmp_path)
    assert facts.nvidia is not None
    assert (facts.nvidia.driver, facts.nvidia.cuda) == ("580.95.05", (13, 0))
    first, second = facts.nvidia.cards
    assert (first.persistence, first.ecc, first.slowed) == (True, False, 0x40)
    assert (first.power_limit_watts, first.power_default_watts) == (350, 350)
    assert (first.bar1_bytes, first.total_bytes, first.compute_capability) == (256 * MIB, 24 * GIB, (8, 6))
    assert first.address == "0000:01:00.0"
    assert (second.persistence, second.uncorrected, second.repair) == (None, 2, (True, True))
    assert second.nvlinks == (False,) * 4
    assert [(pair.gpus, pair.read, pair.nvlink) for pair in facts.nvidia.pairs] == [((0, 1), 1, 5)]
    assert (facts.module, facts.libraries) == ("580.95.05", ("580.95.05",))
    assert [(node.path, node.exists) for node in facts.nodes] == [("/dev/nvidiactl", True), ("/dev/nvidia-uvm", False)]
    assert [(card.vendor, card.driver) for card in facts.graphics] == [("nvidia", "nvidia")] * 2
    ids = {one.id for one in examine(Facts(cards=facts)) if one.severity in {"error", "warning"}}
    assert ids >= {"held-back", "memory-errors", "device-nvidia-uvm"}


def test_nvlink_to_a_switch_is_active(tmp_path: Path) -> None:
    with installed(Machine(a100(0, switch_links=12), a100(1, switch_links=12))):
        facts = look_at_cards({}, tmp_path)
    assert facts.nvidia is not None
    assert facts.nvidia.cards[0].nvlinks == (True,) * 12


def test_old_module_after_an_upgrade(tmp_path: Path) -> None:
    tree = nvidia_tree(tmp_path)
    tree.write({"proc/driver/nvidia/version": NVIDIA_SMI.replace("580.95.05", "570.86.10"), "dev/nvidiactl": ""})
    with installed(Machine(init_error=18)):
        facts = look_at_cards({}, tmp_path)
    assert facts.nvidia is None
    found = examine(Facts(cards=facts))
    errors = [one.text for one in found if one.severity == "error"]
    assert any("570.86.10" in text and "580.95.05" in text for text in errors)
    assert any("versions differ" in text for text in errors)


def test_lost_card_does_not_hide_the_other(tmp_path: Path) -> None:
    with installed(Machine(rtx_3090(0), rtx_3090(1, handle_error=15))):
        facts = look_at_cards({}, tmp_path)
    assert facts.nvidia is not None
    assert [card.index for card in facts.nvidia.cards] == [0]
    assert any("fallen off the bus" in one.text for one in examine(Facts(cards=facts)))


def test_amd_behind_an_iommu_with_a_small_bar(tmp_path: Path) -> None:
    tree = FakeSys(tmp_path)
    for number, bus in ((1, 3), (2, 6)):
        port = f"pci0000:00/0000:00:0{number}.1"
        address = rx_7900_xtx(tree, port, bus, mem_info_vis_vram_total=256 * MIB)
        device = (tmp_path / "sys/bus/pci/devices" / address).resolve()
        tree.write({f"{device.relative_to(tmp_path)}/iommu_group/type": "DMA-FQ"})
    tree.write({"dev/kfd": ""})
    with installed(Machine(init_error=12)):
        facts = look_at_cards({}, tmp_path)
    assert [(card.vendor, card.translated, card.visible) for card in facts.graphics] == [("amd", True, 256 * MIB)] * 2
    assert [node.path for node in facts.nodes] == ["/dev/kfd"]
    assert {"iommu", "large-bar"} <= {one.id for one in examine(Facts(cards=facts)) if one.severity == "note"}


# --- the host


def test_host_from_a_tree(tmp_path: Path) -> None:
    tree = FakeSys(tmp_path)
    tree.write(
        {
            "proc/meminfo": "MemTotal: 67108864 kB\nMemAvailable: 41943040 kB\n"
            "SwapTotal: 8388608 kB\nSwapFree: 4194304 kB\nCommitLimit: 41943040 kB\n"
            "HugePages_Total: 1024\nHugePages_Free: 1024\nHugepagesize: 2048 kB",
            "proc/swaps": "Filename\tType\tSize\tUsed\tPriority\n/dev/zram0 partition 8388608 0 100\n/swap file 1 0 -2",
            "proc/sys/vm/swappiness": 180,
            "proc/sys/vm/overcommit_memory": 2,
            "proc/sys/kernel/numa_balancing": 1,
            "proc/sys/kernel/osrelease": "5.15.167.4-microsoft-standard-WSL2",
            "proc/self/cgroup": "0::/user.slice/app.scope",
            "sys/fs/cgroup/user.slice/cpu.max": "max 100000",
            "sys/fs/cgroup/user.slice/app.scope/cpu.max": "150000 100000",
            "sys/devices/system/cpu/cpu0/cpufreq/scaling_governor": "powersave",
            "sys/devices/system/cpu/cpu0/cpufreq/scaling_driver": "acpi-cpufreq",
            "sys/devices/system/node/node0/meminfo": "",
            "sys/devices/system/node/node1/meminfo": "",
            "proc/cpuinfo": "processor : 0\nflags\t\t: fpu avx2 amx_tile\n\nprocessor : 1",
            "run/.containerenv": "",
        }
    )
    facts = look_at_host({}, tmp_path)
    assert (facts.container, facts.wsl, facts.numa_nodes, facts.numa_balancing) == ("Podman", True, 2, 1)
    assert (facts.swap, facts.swap_free, facts.swaps) == (8 * GIB, 4 * GIB, ("/dev/zram0", "/swap"))
    assert (facts.swappiness, facts.overcommit, facts.commit_limit) == (180, 2, 40 * GIB)
    assert (facts.set_aside, facts.cpu_quota) == (2 * GIB, 1.5)
    assert (facts.governors, facts.governor_driver) == (frozenset({"powersave"}), "acpi-cpufreq")
    assert facts.cpu_flags == {"fpu", "avx2", "amx_tile"}
    assert facts.shared_memory is None


def test_quota_of_version_1(tmp_path: Path) -> None:
    tree = FakeSys(tmp_path)
    group = "sys/fs/cgroup/cpu/docker/abc"
    tree.write({"proc/self/cgroup": "4:memory:/x\n3:cpu,cpuacct:/docker/abc", f"{group}/cpu.cfs_period_us": 100_000})
    tree.write({f"{group}/cpu.cfs_quota_us": -1})
    assert look_at_host({}, tmp_path).cpu_quota is None
    tree.write({f"{group}/cpu.cfs_quota_us": 250_000})
    assert look_at_host({}, tmp_path).cpu_quota == 2.5


def test_an_empty_tree_tells_nothing_that_speaks_up(tmp_path: Path) -> None:
    facts = look_at_host({}, tmp_path)
    assert (facts.swap, facts.cpu_quota, facts.governors) == (None, None, frozenset())
    found = examine(Facts(cards=CardFacts(rig=Rig(name="this machine", source="detected", gpus=())), host=facts))
    assert not [one for one in found if one.severity in {"error", "warning"}]


_FILES: Final = ("proc/meminfo", "proc/swaps", "proc/self/cgroup", "proc/self/mountinfo", "proc/driver/nvidia/version")


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=150)
@given(st.dictionaries(st.sampled_from(_FILES), st.binary(max_size=300)))
def test_any_bytes_in_proc(tmp_path: Path, files: dict[str, bytes]) -> None:
    for name in _FILES:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(files.get(name, b""))
    if b"MemTotal" in files.get("proc/meminfo", b""):
        return
    look_at_limits(tmp_path)
    look_at_disk("models", tmp_path, ours=False, root=tmp_path)
    assert isinstance(look_at_host({}, tmp_path), HostFacts)


_LOGIND: Final = "etc/systemd/logind.conf"
_KILL: Final = "[Login]\nKillUserProcesses=yes\n"


@pytest.mark.parametrize(
    ("files", "kills"),
    [
        ({}, False),
        ({_LOGIND: "[Login]\n#KillUserProcesses=yes\n"}, False),
        ({_LOGIND: "[Login]\nKillUserProcesses = yes\n"}, True),
        ({_LOGIND: "[Other]\nKillUserProcesses=yes\n"}, False),
        ({_LOGIND: f"{_KILL}KillUserProcesses=no"}, False),
        ({_LOGIND: _KILL, f"{_LOGIND}.d/x.conf": "[Login]\nKillUserProcesses=0"}, False),
        ({f"usr/lib/{_LOGIND[4:]}.d/x.conf": _KILL}, True),
        ({f"usr/lib/{_LOGIND[4:]}.d/x.conf": _KILL, f"{_LOGIND}.d/x.conf": ""}, False),
        ({f"{_LOGIND}.d/x.conf.bak": _KILL}, False),
        ({_LOGIND: f"{_KILL}KillExcludeUsers=root ada\n"}, False),
        ({_LOGIND: f"{_KILL}KillOnlyUsers=eve\n"}, False),
        ({_LOGIND: f"{_KILL}KillOnlyUsers=eve ada\n"}, True),
    ],
)
def test_what_a_logout_ends(tmp_path: Path, files: dict[str, str | int], *, kills: bool) -> None:
    FakeSys(tmp_path).write(files)
    assert kills_at_logout(tmp_path, "ada") is None  # no systemd
    (tmp_path / "run/systemd/system").mkdir(parents=True)
    assert kills_at_logout(tmp_path, "ada") is kills
    assert look_at_host({}, tmp_path).kills_at_logout in {True, False}


def test_root_keeps_what_it_has_started(tmp_path: Path) -> None:
    FakeSys(tmp_path).write({_LOGIND: _KILL, "run/systemd/system/x": ""})
    assert kills_at_logout(tmp_path, "root") is False
    assert kills_at_logout(tmp_path, "ada") is True


# --- disks


def test_mounts(tmp_path: Path) -> None:
    models = tmp_path / "my models"
    models.mkdir()
    mounts = (
        "22 1 8:1 / / rw,relatime shared:1 - ext4 /dev/sda1 rw\n"
        f"30 22 0:40 / {tmp_path}/my\\040models ro,relatime - nfs4 nas:/x rw\nnonsense\n"
    )
    FakeSys(tmp_path).write({"proc/self/mountinfo": mounts})
    disk = look_at_disk("models", models / "not" / "there", ours=False, root=tmp_path)
    assert (disk.kind, disk.read_only, disk.exists) == ("nfs4", True, False)
    assert disk.free == pytest.approx(os.statvfs(models).f_bavail * os.statvfs(models).f_frsize, abs=GIB)
    assert look_at_disk("models", tmp_path, ours=False, root=tmp_path).kind == "ext4"


@pytest.mark.parametrize(("model", "spinning"), [("ST4000DM004", True), ("QEMU HARDDISK", False)])
def test_hard_disks(tmp_path: Path, model: str, spinning: bool) -> None:
    device = tmp_path.stat().st_dev
    disk = "sys/devices/pci0000:00/block/sda"
    tree = FakeSys(tmp_path)
    tree.write({f"{disk}/queue/rotational": 1, f"{disk}/device/model": model, f"{disk}/sda1/partition": 1})
    link = tmp_path / f"sys/dev/block/{os.major(device)}:{os.minor(device)}"
    link.parent.mkdir(parents=True)
    link.symlink_to(tmp_path / disk / "sda1")
    assert look_at_disk("models", tmp_path, ours=False, root=tmp_path).spinning is spinning


# --- our own


def test_own_directories() -> None:
    facts = look_at_own()
    assert [folder.used for folder in facts.folders] == [True, False]
    assert facts.folders[0].exists
    assert (facts.profile, facts.default, facts.flaw) == ("", None, "")


def test_default_profiles() -> None:
    user_store().use("2x3090")
    assert look_at_own().default is not None
    user_store().save(Rig(name="mine", source="profile", gpus=()), "mine")
    user_store().use("mine")
    next(profile for profile in user_store().names() if profile.name == "mine").path.write_text("[[[")
    facts = look_at_own()
    assert (facts.profile, facts.default) == ("mine", None)
    assert facts.flaw


def test_leftovers() -> None:
    state = Path(look_at_own().folders[0].path)
    names = ("run-old", "proxy-old", "run-new", "run-used", "run-live", "launches", "notes")
    for name in names:
        (state / name).mkdir()
    yesterday = time.time() - 90_000
    for name in names:
        if name != "run-new":
            os.utime(state / name, (yesterday, yesterday))
    before = Path.cwd()
    os.chdir(state / "run-used")
    try:
        found = leftovers(live=lambda: frozenset({str(state / "run-live")}))
    finally:
        os.chdir(before)
    assert [Path(path).name for path in found] == ["proxy-old", "run-old"]


# --- nobody is waited for


def test_what_hangs_or_breaks_hides_nothing() -> None:
    def broken() -> object:
        raise ZeroDivisionError("oh")

    answers = ask_all({"good": lambda: 42, "broken": broken, "hanging": lambda: time.sleep(3)}, 0.3)
    assert answers["good"] == 42
    assert answers["broken"] == Silence("cannot be looked at: ZeroDivisionError: oh")
    assert answers["hanging"] == Silence("gave no answer within 0 s")


def test_a_driver_that_hangs_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def hang(*_: object) -> CardFacts:
        time.sleep(5)
        raise AssertionError

    monkeypatch.setattr("mgpu.doctor.gather.look_at_cards", hang)
    facts = gather({"HOME": str(tmp_path), "PATH": ""}, root=tmp_path, patience_s=1.5)
    assert [part for part, _ in facts.silent] == ["the cards"]
    worst = examine(facts)[0]
    assert (worst.severity, worst.id) == ("error", "no-answer")
    assert any(one.area == "mgpu" and one.severity == "ok" for one in examine(facts))


# --- the screen and the command

FOUND: Final = (
    Finding(severity="error", area="driver", id="a", text="the driver " + "is broken " * 12, fix="reboot", source="x"),
    Finding(severity="warning", area="limits", id="b", text="few files", fix="ulimit -n 4096"),
    Finding(severity="note", area="links", id="c", text="no P2P"),
    ok("memory", "d", "64 GiB of RAM"),
    ok("memory", "e", "swap"),
)


def shown(found: tuple[Finding, ...], width: int = 80) -> str:
    out = io.StringIO()
    console(out, width=width).print(doctor_screen(found, Rig(name="this machine", source="detected", gpus=()), width))
    return out.getvalue()


def test_screen() -> None:
    text = shown(FOUND)
    assert max(map(len, text.splitlines())) <= 80
    assert text.index("✗ driver") < text.index("! limits") < text.index("· links") < text.index("○ memory")
    assert "fix: ulimit -n 4096" in text
    assert "○ memory: 64 GiB of RAM; swap" in text
    assert text.rstrip().endswith("5 checks: 1 error, 1 warning, 1 note, 2 fine")


def test_summary_of_one() -> None:
    assert summary(FOUND[:1]) == "1 check: 1 error"


def test_object() -> None:
    told = doctor_object(FOUND)
    assert told["schema"] == 1
    assert told["checks"] == 5
    assert told["findings"][1] == {
        "severity": "warning",
        "area": "limits",
        "id": "b",
        "text": "few files",
        "fix": "ulimit -n 4096",
        "source": "",
    }


def test_command(mgpu: Mgpu, tmp_path: Path) -> None:
    """On this very machine, with a llama-server that can be found: nothing is an error that is not."""
    server = write_program(tmp_path / "llama-server", "print('usage: --n-gpu-layers --tensor-split --device --fit')")
    env = {"MGPU_LLAMA_SERVER": str(server), "LLAMA_ARG_DEVICE": "none", "PATH": ""}
    begun = time.monotonic()
    done = mgpu("doctor", "--json", env=env)
    assert time.monotonic() - begun < 30
    told = json.loads(done.stdout)
    assert told["checks"] == len(told["findings"]) > 10
    errors = [one for one in told["findings"] if one["severity"] == "error"]
    assert done.returncode == (8 if errors else 0), done.stderr
    assert "llama-arg" in {one["id"] for one in told["findings"]}
    assert done.stderr == ""


def test_command_with_an_error(mgpu: Mgpu, tmp_path: Path) -> None:
    done = mgpu("doctor", env={"PATH": str(tmp_path), "PYTHONSAFEPATH": "1", "NVIDIA_VISIBLE_DEVICES": "void"})
    assert done.returncode == 8
    assert "✗ environment: NVIDIA_VISIBLE_DEVICES=void" in done.stdout
    assert "Traceback" not in done.stderr


def test_a_runtime_that_hangs_is_bounded(mgpu: Mgpu, tmp_path: Path) -> None:
    server = write_program(tmp_path / "llama-server", "import time; time.sleep(300)")
    begun = time.monotonic()
    done = mgpu("doctor", "--json", env={"MGPU_LLAMA_SERVER": str(server), "PATH": "/usr/bin:/bin"})
    assert time.monotonic() - begun < 40
    told = json.loads(done.stdout)
    assert any("gave no end" in one["text"] for one in told["findings"])
    assert "cannot be looked at" not in done.stdout


def test_with_a_fake_driver(mgpu: Mgpu, fake_nvml: Path, tmp_path: Path) -> None:
    config = tmp_path / "machine.toml"
    config.write_text(Machine(rtx_3090(0), rtx_3090(1)).toml())
    env = {"LD_LIBRARY_PATH": str(fake_nvml), "FAKE_NVML_CONFIG": str(config), "PATH": "/usr/bin:/bin"}
    told = json.loads(mgpu("doctor", "--json", env=env).stdout)
    texts = {one["id"]: one["text"] for one in told["findings"]}
    assert texts["driver-cuda"] == "NVIDIA driver 580.95.05 (CUDA 13.0)"
    assert texts["as-detected"] == "GPU 0 NVIDIA GeForce RTX 3090, GPU 1 NVIDIA GeForce RTX 3090"
