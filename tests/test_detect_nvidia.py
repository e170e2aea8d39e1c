"""What the driver says becomes cards, links and findings. The real `pynvml` runs, above a fake driver."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from pathlib import Path

import msgspec
import pynvml
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fakenvml.fake import FUNCTIONS, installed
from fakenvml.machine import Machine, Table, a100, gb10, h100, mig_instance, rtx_3090, tesla_p40
from mgpu.detect.host import read_memory
from mgpu.detect.nvidia import NvidiaProbe, probe_nvidia
from mgpu.rig import Gpu, Link, Pcie
from mgpu.units import GIB

ROOT = Path(__file__).parents[1]

NVLINK_STATE = "nvmlDeviceGetNvLinkState"
P2P_STATUS = "nvmlDeviceGetP2PStatus"
MEMORY_V2 = "nvmlDeviceGetMemoryInfo_v2"

EIGHT_LINKS: tuple[Table, ...] = tuple(
    {"a": a, "b": b, "p2p_nvlink": 0} for a, b in itertools.combinations(range(8), 2)
)

MACHINES = {
    "one card": Machine(rtx_3090()),
    "no card": Machine(),
    "no library": Machine(init_error=12),
    "no module": Machine(init_error=9),
    "mismatch": Machine(init_error=18),
    "init unknown": Machine(init_error=999),
    "count fails": Machine(rtx_3090(), fail={"nvmlDeviceGetCount_v2": 999}),
    "two": Machine(rtx_3090(0, idle_links=4), rtx_3090(1, idle_links=4)),  # a 3090 without its bridge
    "two nvlink": Machine(rtx_3090(0), rtx_3090(1), links=({"a": 0, "b": 1, "nvlinks": 4, "p2p": 0},)),
    "two p2p": Machine(rtx_3090(0), rtx_3090(1), links=({"a": 0, "b": 1, "p2p": 0},)),
    "bridge refused": Machine(rtx_3090(0), rtx_3090(1), links=({"a": 0, "b": 1, "nvlinks": 4, "p2p_nvlink": 4},)),
    "two, paths told": Machine(
        rtx_3090(0),
        rtx_3090(1),
        rtx_3090(2),
        links=(
            {"a": 0, "b": 1, "nvlinks": 4, "level": 30},
            {"a": 0, "b": 2, "p2p": 0, "level": 20},
            {"a": 1, "b": 2, "level": 50},
        ),
    ),
    "old board": Machine(rtx_3090(pcie_gen_max=3, pcie_gen_card=4, pcie_width=8)),
    "mixed": Machine(rtx_3090(0), tesla_p40(0)),
    "gb10": Machine(gb10()),
    "gb10 zero": Machine(gb10(mem_total=0)),
    "mig": Machine(rtx_3090(), a100(mig_mode=1), migs=(mig_instance(1, 0), mig_instance(1, 3))),
    "mig empty": Machine(a100(mig_mode=1)),
    "mig broken": Machine(a100(mig_mode=1), migs=(mig_instance(0, 0, mem_total="!3"), mig_instance(0, 1))),
    "lost": Machine(rtx_3090(0), rtx_3090(1, handle_error=15), rtx_3090(2)),
    "lost late": Machine(rtx_3090(0, mem_total="!15"), rtx_3090(1)),
    "no permission": Machine(rtx_3090(0, handle_error=4)),
    "riser": Machine(rtx_3090(pcie_width=4)),
    "wsl": Machine(rtx_3090(0, proc_pid=1), rtx_3090(1), fail={NVLINK_STATE: 3, P2P_STATUS: 3}),
    "bridge, no p2p report": Machine(
        rtx_3090(0), rtx_3090(1), links=({"a": 0, "b": 1, "nvlinks": 4},), fail={P2P_STATUS: 3}
    ),
    "nvswitch": Machine(*(h100(number) for number in range(8)), links=EIGHT_LINKS),
    "switch, some links down": Machine(h100(0), h100(1, idle_links=6), links=({"a": 0, "b": 1, "p2p_nvlink": 0},)),
    "bridge to nobody knows": Machine(
        rtx_3090(0),
        rtx_3090(1),
        links=({"a": 0, "b": 1, "nvlinks": 4},),
        fail={P2P_STATUS: 3, "nvmlDeviceGetNvLinkRemotePciInfo_v2": 999},
    ),
    "old driver": Machine(rtx_3090(mem_used=GIB), fail={MEMORY_V2: 13}),
}


#: No /sys: the PCI addresses of the fakes are those of real devices on some machines.
NOWHERE = Path("/nonexistent")


def probe(machine: Machine, root: Path = NOWHERE) -> NvidiaProbe:
    with installed(machine) as fake:
        result = probe_nvidia(root)
    assert fake.opened == 0, "the driver was left open"
    return result


def texts(result: NvidiaProbe) -> str:
    return "\n".join(f"{finding.text} | {finding.hint}" for finding in result.findings)


def test_one_card() -> None:
    result = probe(MACHINES["one card"])
    assert result == NvidiaProbe(
        state="ok",
        driver="NVIDIA 580.95.05, CUDA 13.0",
        count=1,
        gpus=(
            Gpu(
                index=0,
                name="NVIDIA GeForce RTX 3090",
                vendor="nvidia",
                total_bytes=24 * GIB,
                free_bytes=24 * GIB - 381_681_664,
                uuid="GPU-30900000-aaaa-bbbb-cccc-000000000001",
                bandwidth_bytes_per_s=936 * 10**9,
                pcie=Pcie(gen=4, width=16),  # it idles at generation 1
                compute_capability="8.6",
                pci_bus_id="00000000:01:00.0",
                power_limit_watts=350,
            ),
        ),
    )


@pytest.mark.parametrize(
    ("machine", "state", "words"),
    [
        ("no card", "no-gpu", ""),
        ("no library", "no-driver", "libnvidia-ml.so.1"),
        ("no module", "no-driver", "modprobe nvidia"),
        ("mismatch", "mismatch", "driver and library versions differ | reboot or reload"),
        ("init unknown", "error", "Unknown Error"),
        ("count fails", "error", "Unknown Error"),
    ],
)
def test_without_a_usable_driver(machine: str, state: str, words: str) -> None:
    result = probe(MACHINES[machine])
    assert (result.state, result.gpus, bool(result.findings)) == (state, (), bool(words))
    assert words in texts(result)


def test_a_code_without_a_name_is_said_as_it_is() -> None:
    assert "error 777" in texts(probe(Machine(init_error=777)))


@pytest.mark.parametrize(
    ("machine", "links"),
    [
        ("two", ()),
        ("two nvlink", (Link(gpus=(0, 1), kind="nvlink", n_links=4),)),
        ("two p2p", (Link(gpus=(0, 1), kind="pcie-p2p"),)),
        ("bridge refused", ()),
        ("bridge, no p2p report", (Link(gpus=(0, 1), kind="nvlink", n_links=4),)),
        ("bridge to nobody knows", ()),
        ("switch, some links down", (Link(gpus=(0, 1), kind="nvlink", n_links=12),)),
        ("wsl", ()),
        ("mixed", ()),
        (
            "two, paths told",
            (
                Link(gpus=(0, 1), kind="nvlink", n_links=4, path="PHB"),
                Link(gpus=(0, 2), kind="pcie-p2p", path="PXB"),
                Link(gpus=(1, 2), kind="pcie", path="SYS"),
            ),
        ),
    ],
)
def test_links(machine: str, links: tuple[Link, ...]) -> None:
    assert probe(MACHINES[machine]).links == links


def test_nvswitch_joins_every_pair() -> None:
    links = probe(MACHINES["nvswitch"]).links
    assert {link.gpus for link in links} == set(itertools.combinations(range(8), 2))
    assert {(link.kind, link.n_links) for link in links} == {("nvlink", 18)}


def test_mixed_cards_keep_their_own_figures() -> None:
    big, old = probe(MACHINES["mixed"]).gpus
    assert (old.name, old.compute_capability, old.pcie) == ("Tesla P40", "6.1", Pcie(gen=3, width=16))
    assert big.bandwidth_bytes_per_s == 936 * 10**9
    assert old.bandwidth_bytes_per_s == 347 * 10**9


@pytest.mark.parametrize("machine", ["gb10", "gb10 zero"])
def test_unified_memory_is_the_hosts(machine: str) -> None:
    (gpu,) = probe(MACHINES[machine]).gpus
    assert gpu.unified
    assert gpu.total_bytes == read_memory().total_bytes
    assert 0 < gpu.free_bytes <= gpu.total_bytes
    assert gpu.bandwidth_bytes_per_s == 273 * 10**9  # the table's: the driver gives neither clock nor bus
    assert (gpu.compute_capability, gpu.pcie, gpu.power_limit_watts) == ("12.1", None, None)


def test_mig_instances_stand_in_for_their_card() -> None:
    result = probe(MACHINES["mig"])
    assert [gpu.index for gpu in result.gpus] == [0, 2, 3]
    whole, first, second = result.gpus
    assert not (whole.uuid or "").startswith("MIG-")
    assert [first.uuid, second.uuid] == [mig["uuid"] for mig in MACHINES["mig"].migs]
    assert first.total_bytes == MACHINES["mig"].migs[0]["mem_total"]
    assert not first.unified
    share = (first.bandwidth_bytes_per_s or 0) / (1555 * 10**9)
    assert share == pytest.approx(first.total_bytes / (40 * GIB))
    assert "GPU 1 is divided by MIG: 2 instances" in texts(result)


def test_mig_without_instances() -> None:
    result = probe(MACHINES["mig empty"])
    assert (result.gpus, result.state) == ((), "error")
    assert "has no instances" in texts(result)


def test_a_mig_instance_without_memory_is_not_the_hosts() -> None:
    result = probe(MACHINES["mig broken"])
    assert [gpu.uuid for gpu in result.gpus] == [MACHINES["mig broken"].migs[1]["uuid"]]
    assert "a MIG instance of GPU 0" in texts(result)


@pytest.mark.parametrize(
    ("machine", "left", "words"),
    [
        ("lost", [0, 2], "GPU 1: it has fallen off the bus"),
        ("lost late", [1], "GPU 0: it has fallen off the bus"),
        ("no permission", [], "GPU 0: no permission to use it"),
    ],
)
def test_a_broken_card_is_a_finding_and_the_rest_stay(machine: str, left: list[int], words: str) -> None:
    result = probe(MACHINES[machine])
    assert [gpu.index for gpu in result.gpus] == left
    assert words in texts(result)
    assert result.state == ("ok" if left else "error")


def test_riser_shows_in_the_lanes() -> None:
    result = probe(MACHINES["riser"])
    assert result.gpus[0].pcie == Pcie(gen=4, width=4)
    assert "GPU 0 (RTX 3090) runs at PCIe 4.0 x4; the card can do 4.0 x16" in texts(result)


def test_a_board_of_an_older_generation() -> None:
    """NVML's other figures are of card and board together."""
    result = probe(MACHINES["old board"])
    assert result.gpus[0].pcie == Pcie(gen=3, width=8)
    assert "runs at PCIe 3.0 x8; the card can do 4.0 x16" in texts(result)
    assert texts(probe(Machine(rtx_3090(pcie_gen_max=3, pcie_gen_card=4)))) == ""


def test_lanes_of_the_card_itself_and_its_processor(tmp_path: Path) -> None:
    """NVML's maximum is the slot's where that is less; /sys has the card's own, and the socket."""
    device = tmp_path / "sys/bus/pci/devices/0000:01:00.0"
    device.mkdir(parents=True)
    (device / "max_link_width").write_text("16\n")
    (device / "numa_node").write_text("1\n")
    result = probe(Machine(rtx_3090(pcie_width=4, pcie_width_max=4)), tmp_path)
    assert result.gpus[0].numa_node == 1
    assert "the card can do 4.0 x16" in texts(result)
    (device / "numa_node").write_text("-1\n")
    assert probe(Machine(rtx_3090()), tmp_path).gpus[0].numa_node is None


@pytest.mark.parametrize(
    "name",
    ["NVIDIA GeForce RTX 4090 Laptop GPU", "NVIDIA GeForce RTX 2080 Super with Max-Q Design", "Quadro RTX 5000 Mobile"],
)
def test_laptop_parts_have_their_own_figures_or_none(name: str) -> None:
    (gpu,) = probe(Machine(rtx_3090(name=name, mem_clock_max_mhz=9001, mem_bus_width=256))).gpus
    assert gpu.bandwidth_bytes_per_s == 576_064_000_000
    (gpu,) = probe(Machine(rtx_3090(name=name, mem_clock_max_mhz="!3"))).gpus
    assert gpu.bandwidth_bytes_per_s is None


@pytest.mark.parametrize("code", [13, 25, 999, 3])
def test_memory_from_the_old_call_where_the_new_one_fails(code: int) -> None:
    (gpu,) = probe(Machine(rtx_3090(mem_used=GIB), fail={MEMORY_V2: code})).gpus
    assert (gpu.total_bytes, gpu.free_bytes, gpu.unified) == (24 * GIB, 23 * GIB - 381_681_664, False)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"mem_clock_max_mhz": 10_251}, 936_000_000_000),  # 5 % overclocked: the vendor's figure
        ({"mem_clock_max_mhz": 11_001}, 1_056_096_000_000),  # 13 %: the card's own
        ({"mem_clock_max_mhz": "!3"}, 936_000_000_000),
        ({"mem_bus_width": 0}, 936_000_000_000),
        (
            {"name": "NVIDIA GeForce RTX 3080 Laptop GPU", "mem_clock_max_mhz": 7001, "mem_bus_width": 256},
            448_064_000_000,
        ),
        ({"name": "NVIDIA GeForce RTX 3080 Laptop GPU", "mem_clock_max_mhz": "!3"}, None),
    ],
)
def test_bandwidth(changes: Table, expected: int | None) -> None:
    assert probe(Machine(rtx_3090(**changes))).gpus[0].bandwidth_bytes_per_s == expected


def test_processes_that_hold_memory() -> None:
    name = Path(f"/proc/{os.getpid()}/comm").read_text(encoding="utf-8").strip()
    (gpu,) = probe(Machine(rtx_3090(proc_pid=os.getpid(), proc_mem=3 * GIB + 100 * 2**20))).gpus
    assert gpu.processes == (f"{os.getpid()} {name} (3.1 GiB)",)


def test_processes_of_other_pid_namespaces_and_without_sizes() -> None:
    nobody = 2**30  # above any pid_max
    assert probe(Machine(rtx_3090(proc_pid=nobody, proc_mem=GIB))).gpus[0].processes == (f"{nobody} ? (1.0 GiB)",)
    assert probe(MACHINES["wsl"]).gpus[0].processes == ()


def test_display_is_told() -> None:
    assert probe(Machine(rtx_3090(display_active=1))).gpus[0].display


def test_bytes_from_early_bindings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pynvml, "nvmlDeviceGetName", lambda _handle: b"Tesla T4")
    monkeypatch.setattr(pynvml, "nvmlDeviceGetUUID", lambda _handle: b"GPU-1234")
    (gpu,) = probe(MACHINES["one card"]).gpus
    assert (gpu.name, gpu.uuid) == ("Tesla T4", "GPU-1234")


def test_what_the_binding_throws_beside_its_own_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    def mismatched(_handle: object) -> None:
        raise pynvml.NVMLLibraryMismatchError("unversioned")

    monkeypatch.setattr(pynvml, "nvmlDeviceGetUUID", mismatched)
    monkeypatch.delattr(pynvml, "nvmlDeviceGetDisplayActive")
    (gpu,) = probe(Machine(rtx_3090(name="RTX \xff"))).gpus  # not UTF-8: UnicodeDecodeError
    assert (gpu.name, gpu.uuid, gpu.display) == ("NVIDIA GPU", None, False)


def test_without_the_binding(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    result = probe_nvidia()
    assert (result.state, result.gpus) == ("error", ())
    assert "cannot import pynvml" in texts(result)


CODES = st.sampled_from([1, 2, 3, 4, 6, 7, 8, 9, 10, 13, 15, 16, 17, 18, 20, 25, 28, 999, 4711])


@given(
    fail=st.dictionaries(st.sampled_from(sorted({*FUNCTIONS} - {"nvmlShutdown"})), CODES),
    name=st.sampled_from(["mig", "two nvlink", "nvswitch", "gb10", "lost late"]),
)
def test_whatever_fails_there_is_an_answer(fail: dict[str, int], name: str) -> None:
    machine = MACHINES[name]
    result = probe(Machine(*machine.gpus, links=machine.links, migs=machine.migs, fail=fail))
    assert bool(result.gpus) == (result.state == "ok")
    assert result.gpus or result.findings
    assert len({gpu.index for gpu in result.gpus}) == len(result.gpus)
    assert {index for link in result.links for index in link.gpus} <= {gpu.index for gpu in result.gpus}


# The same driver as a real shared library, in a process of its own.

PROBE = """
import os, sys, msgspec
from mgpu.detect.nvidia import probe_nvidia
for path in sys.argv[1:]:
    os.environ["FAKE_NVML_CONFIG"] = path
    sys.stdout.write(msgspec.json.encode(probe_nvidia()).decode() + "\\n")
"""


def run_python(code: str, *args: Path, **environ: str) -> list[NvidiaProbe]:
    roots = os.pathsep.join(str(ROOT / name) for name in ("launcher", "adapters", "profiles"))
    path = os.pathsep.join(filter(None, (environ.pop("PYTHONPATH", ""), roots)))
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code, *args],
        env=os.environ | environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    return [msgspec.json.decode(line, type=NvidiaProbe) for line in done.stdout.splitlines()]


def without_live_memory(result: NvidiaProbe) -> NvidiaProbe:
    gpus = tuple(msgspec.structs.replace(gpu, free_bytes=0) if gpu.unified else gpu for gpu in result.gpus)
    return msgspec.structs.replace(result, gpus=gpus)


def test_the_library_and_the_python_fake_agree(fake_nvml: Path, tmp_path: Path) -> None:
    files = [tmp_path / f"{number}.toml" for number in range(len(MACHINES))]
    for file, machine in zip(files, MACHINES.values(), strict=True):
        file.write_text(machine.toml(), encoding="utf-8")
    results = run_python(PROBE, *files, LD_LIBRARY_PATH=str(fake_nvml))
    expected = [without_live_memory(probe(machine)) for machine in MACHINES.values()]
    assert [without_live_memory(result) for result in results] == expected


needs_no_driver = pytest.mark.skipif(
    Path("/proc/driver/nvidia/version").exists(), reason="this machine has a real NVIDIA driver"
)


@needs_no_driver
def test_without_the_library(tmp_path: Path) -> None:
    (result,) = run_python(PROBE, tmp_path)
    assert result.state == "no-driver"
    assert "libnvidia-ml.so.1" in texts(result)


@needs_no_driver
def test_wsl_finds_its_library(fake_nvml: Path, tmp_path: Path) -> None:
    """Only the path is known, and nothing that the loader searches leads there."""
    config = tmp_path / "rig.toml"
    config.write_text(MACHINES["one card"].toml(), encoding="utf-8")
    code = f"""
import os, types
import mgpu.detect.nvml as nvml
release = os.uname().release
os.uname = lambda: types.SimpleNamespace(release="6.6.87.2-microsoft-standard-WSL2")
nvml.WSL_LIBRARY = {str(fake_nvml / "libnvidia-ml.so.1")!r}
{PROBE}"""
    (result,) = run_python(code, config)
    assert [gpu.name for gpu in result.gpus] == ["NVIDIA GeForce RTX 3090"]


@pytest.fixture
def old_package(tmp_path: Path) -> Path:
    """PyPI's pynvml 11.5 as it lies over nvidia-ml-py: no version 2 of the memory call, and its own metadata."""
    folder = tmp_path / "site"
    folder.mkdir()
    source = Path(pynvml.__file__).read_text(encoding="utf-8")
    assert "\nnvmlMemory_v2 =" in source
    old = source.replace("\nnvmlMemory_v2 =", "\n_removed =").replace(
        "def nvmlDeviceGetMemoryInfo(handle, version=None):", "def nvmlDeviceGetMemoryInfo(handle):\n    version = None"
    )
    (folder / "pynvml.py").write_text(old, encoding="utf-8")
    metadata = folder / "pynvml-11.5.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: pynvml\nVersion: 11.5.0\n", encoding="utf-8")
    return folder


def test_an_old_package_in_the_way_is_named(fake_nvml: Path, tmp_path: Path, old_package: Path) -> None:
    config = tmp_path / "rig.toml"
    config.write_text(MACHINES["one card"].toml(), encoding="utf-8")
    (result,) = run_python(PROBE, config, LD_LIBRARY_PATH=str(fake_nvml), PYTHONPATH=str(old_package))
    assert "pynvml 11.5.0 hides nvidia-ml-py" in texts(result)
    assert [gpu.free_bytes for gpu in result.gpus] == [24 * GIB - 381_681_664]


def test_the_redirecting_package_does_not_warn_through_us(fake_nvml: Path, tmp_path: Path) -> None:
    """`run_python` turns warnings into errors; PyPI's pynvml 12+ makes importing the module warn."""
    site = tmp_path / "site"
    site.mkdir()
    source = Path(pynvml.__file__).read_text(encoding="utf-8")
    noisy = f"import warnings\nwarnings.warn('deprecated', FutureWarning)\n{source}"
    (site / "pynvml.py").write_text(noisy, encoding="utf-8")
    config = tmp_path / "rig.toml"
    config.write_text(MACHINES["one card"].toml(), encoding="utf-8")
    (result,) = run_python(PROBE, config, LD_LIBRARY_PATH=str(fake_nvml), PYTHONPATH=str(site))
    assert result.state == "ok"
