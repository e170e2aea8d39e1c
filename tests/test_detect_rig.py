"""Whole machines: cards of several makes as one rig, how they reach each other, and what is amiss."""

from __future__ import annotations

import itertools
import sys as python
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from fakenvml.fake import installed
from fakenvml.machine import Machine, gb10, rtx_3090
from fakesys import GEN4, FakeSys, amd_memory, arc, link_files, raphael, rx_7900_xtx, uhd
from mgpu.adapter import ListedDevice
from mgpu.detect import apple
from mgpu.detect.host import read_unified
from mgpu.detect.jetson import read_jetson
from mgpu.detect.machine import detect_rig
from mgpu.detect.topology import way
from mgpu.detect.unclaimed import unclaimed_cards
from mgpu.rig import Gpu, Link, Rig
from mgpu.units import GIB, MIB

NO_NVIDIA = Machine(init_error=12)
PORT = "pci0000:00/0000:00:01.1"
OTHER_PORT = "pci0000:00/0000:00:03.1"


@pytest.fixture
def sys(tmp_path: Path) -> FakeSys:
    return FakeSys(tmp_path)


def detect(
    sys: FakeSys,
    machine: Machine = NO_NVIDIA,
    environ: Mapping[str, str] | None = None,
    listed: Callable[[], tuple[ListedDevice, ...]] | None = None,
) -> Rig:
    with installed(machine):
        return detect_rig(environ or {}, listed=listed, root=sys.root)


def names(rig: Rig) -> list[tuple[int, str, bool]]:
    return [(gpu.index, gpu.name, gpu.enabled) for gpu in rig.gpus]


def said(rig: Rig) -> str:
    return "\n".join(f"{finding.text} | {finding.hint}" for finding in rig.findings)


def nvidia_in(sys: FakeSys, place: str) -> None:
    sys.pci(place, {"vendor": "0x10de", "device": "0x2204", "class": "0x030000", "numa_node": 0})
    sys.driver(place, "nvidia")


# --- several makes


def test_all_makes_in_one_machine(sys: FakeSys) -> None:
    nvidia_in(sys, "pci0000:00/0000:00:06.0/0000:01:00.0")
    raphael(sys)
    rx_7900_xtx(sys, OTHER_PORT, 3, numa_node=0)
    arc(sys, 0xE20B, 0x11, slot=link_files(GEN4, 8), files={"tile0/physical_vram_size_bytes": 12 * GIB})
    rig = detect(sys, Machine(rtx_3090()))
    assert names(rig) == [
        (0, "NVIDIA GeForce RTX 3090", True),
        (1, "AMD Radeon RX 7900 XTX", True),
        (2, "AMD Radeon Graphics [1002:164e]", False),
        (3, "Intel Arc B580", True),
    ]
    assert [gpu.vendor for gpu in rig.gpus] == ["nvidia", "amd", "amd", "intel"]
    assert rig.gpus[0].numa_node == 0
    assert rig.driver == "NVIDIA 580.95.05, CUDA 13.0; amdgpu, xe"
    assert [finding.text for finding in rig.findings] == [
        "GPU 2 (AMD Radeon Graphics [1002:164e]): part of the processor, left to the desktop"
    ]
    assert rig.links == tuple(Link(gpus=pair, kind="pcie", path="PHB") for pair in itertools.combinations((0, 1, 3), 2))


def test_numbers_do_not_move_when_a_card_is_lost(sys: FakeSys) -> None:
    rx_7900_xtx(sys, PORT, 1)
    rig = detect(sys, Machine(rtx_3090(0), rtx_3090(1, handle_error=15)))
    assert [gpu.index for gpu in rig.gpus] == [0, 2]


def test_hidden_cards_of_one_make_leave_those_of_the_other(sys: FakeSys) -> None:
    rx_7900_xtx(sys, PORT, 1)
    rx_7900_xtx(sys, OTHER_PORT, 5)
    two = Machine(rtx_3090(0), rtx_3090(1))
    assert [gpu.index for gpu in detect(sys, two, {"CUDA_VISIBLE_DEVICES": "1"}).gpus] == [1, 2, 3]
    rig = detect(sys, two, {"ROCR_VISIBLE_DEVICES": "1,0", "HIP_VISIBLE_DEVICES": "0"})
    assert [gpu.index for gpu in rig.gpus] == [0, 1, 3]
    assert "ROCR_VISIBLE_DEVICES=1,0 HIP_VISIBLE_DEVICES=0 leaves 1 of 2 AMD GPUs: GPU 3" in said(rig)


@pytest.mark.parametrize(
    ("environ", "left"),
    [
        ({"ROCR_VISIBLE_DEVICES": ""}, []),
        ({"HIP_VISIBLE_DEVICES": ""}, [0, 1]),
        ({"HIP_VISIBLE_DEVICES": "-1"}, []),
        ({"HIP_VISIBLE_DEVICES": "1"}, [1]),
        ({"ROCR_VISIBLE_DEVICES": "GPU-A1B2C3D4E5F60005"}, [1]),
        ({"ROCR_VISIBLE_DEVICES": "0,7,1"}, [0]),
        ({"ROCR_VISIBLE_DEVICES": "1", "HIP_VISIBLE_DEVICES": "1"}, []),
        ({"CUDA_VISIBLE_DEVICES": "1"}, [0, 1]),
    ],
)
def test_rocms_lists_of_visible_cards(sys: FakeSys, environ: dict[str, str], left: list[int]) -> None:
    rx_7900_xtx(sys, PORT, 1)
    rx_7900_xtx(sys, OTHER_PORT, 5)
    rig = detect(sys, environ=environ, listed=lambda: pytest.fail("asked the runtime"))
    assert [gpu.index for gpu in rig.gpus] == left
    assert bool(rig.findings) == (len(left) < 2)


def test_the_processors_graphics_alone_are_used(sys: FakeSys) -> None:
    uhd(sys, screen="DP-1")
    rig = detect(sys)
    assert names(rig) == [(0, "Intel Graphics [8086:4680]", True)]
    assert (rig.gpus[0].integrated, rig.gpus[0].unified, rig.findings) == (True, True, ())


def test_for_the_processors_graphics_the_runtime_knows_better(sys: FakeSys) -> None:
    uhd(sys)
    device = ListedDevice(
        device="Vulkan0", description="Intel(R) UHD Graphics 770 (ADL-S GT1)", total_bytes=30 * GIB, free_bytes=GIB
    )
    (gpu,) = detect(sys, listed=lambda: (device,)).gpus
    assert (gpu.device, gpu.total_bytes, gpu.integrated, gpu.enabled) == ("Vulkan0", 30 * GIB, True, True)
    assert [gpu.device for gpu in detect(sys, listed=tuple).gpus] == [None]


def test_the_runtime_is_not_asked_where_a_card_is_known(sys: FakeSys) -> None:
    rx_7900_xtx(sys, PORT, 1)
    assert len(detect(sys, listed=lambda: pytest.fail("asked")).gpus) == 1


def test_a_runtimes_list_with_both_kinds(sys: FakeSys) -> None:
    """Where /sys is not there to see: BSD, some containers."""
    listed = tuple(
        ListedDevice(device=f"Vulkan{number}", description=name, total_bytes=8 * GIB, free_bytes=8 * GIB)
        for number, name in enumerate(("AMD Radeon 780M Graphics (RADV PHOENIX)", "NVIDIA GeForce RTX 4070"))
    )
    rig = detect(sys, listed=lambda: listed)
    assert [gpu.enabled for gpu in rig.gpus] == [False, True]
    assert "left to the desktop" in said(rig)


def test_no_permission_to_compute(sys: FakeSys, monkeypatch: pytest.MonkeyPatch) -> None:
    rx_7900_xtx(sys, PORT, 1)
    rx_7900_xtx(sys, OTHER_PORT, 5)
    (sys.root / "dev/dri/renderD129").unlink()
    monkeypatch.setattr("os.access", lambda path, _mode: Path(path).name != "renderD128" and Path(path).exists())
    rig = detect(sys)
    assert [gpu.enabled for gpu in rig.gpus] == [False, False]
    assert "GPU 0 (Radeon RX 7900 XTX): no permission to use /dev/dri/renderD128 | sudo usermod -aG render" in said(rig)
    assert "GPU 1 (Radeon RX 7900 XTX) cannot be used here: there is no /dev/dri/renderD129 | start the cont" in said(
        rig
    )


def test_the_missing_driver_of_another_make_is_no_news(sys: FakeSys) -> None:
    rx_7900_xtx(sys, PORT, 1)
    assert detect(sys).findings == ()
    assert "Unknown Error" in said(detect(sys, Machine(init_error=999)))


@pytest.mark.parametrize(
    ("vendor", "driver", "words"),
    [
        ("0x10de", "", "NVIDIA GPU [10de:2204] at 0000:01:00.0 has no driver | install NVIDIA's driver"),
        ("0x10de", "nouveau", "NVIDIA GPU [10de:2204] at 0000:01:00.0 runs with nouveau, which cannot run models"),
        ("0x10de", "vfio-pci", "is set aside for virtual machines (vfio-pci)"),
        ("0x10de", "nvidia", "there is no libnvidia-ml.so.1 | start a container with --gpus all"),
        ("0x1002", "", "AMD GPU [1002:2204] at 0000:01:00.0 has no driver | load the driver: sudo modprobe amdgpu"),
        ("0x1002", "amdgpu", ""),
        ("0x1a03", "", ""),  # a server's own little screen
    ],
)
def test_cards_that_nobody_drives(sys: FakeSys, vendor: str, driver: str, words: str) -> None:
    place = "pci0000:00/0000:00:01.0/0000:01:00.0"
    sys.pci(place, {"vendor": vendor, "device": "0x2204", "class": "0x030000"})
    sys.pci("pci0000:00/0000:00:02.0", {"vendor": "0x8086", "device": "0x4680", "class": "0x030000"})
    sys.pci("pci0000:00/0000:00:1f.3", {"vendor": "0x10de", "device": "0x1aef", "class": "0x040300"})
    if driver:
        sys.driver(place, driver)
    findings = [f"{finding.text} | {finding.hint}" for finding in unclaimed_cards(sys.root, has_nvml=False)]
    assert len(findings) == bool(words)
    assert all(words in finding for finding in findings)
    rig = detect(sys)
    assert [
        finding.text for finding in rig.findings if "libnvidia-ml" in finding.text and "no driver found" in finding.text
    ] == ([] if words else ["NVIDIA: no driver found (libnvidia-ml.so.1)"])


# --- the ways between them


def places(sys: FakeSys, *paths: str) -> list[Path]:
    return [sys.pci(path, {"numa_node": -1}) for path in paths]


@pytest.mark.parametrize(
    ("a", "b", "words"),
    [
        ("pci0000:00/0000:00:01.0/0000:01:00.0", "pci0000:00/0000:00:01.1/0000:02:00.0", "PHB"),
        ("pci0000:00/0000:00:01.0/0000:01:00.0", "pci0000:40/0000:40:01.0/0000:41:00.0", "NODE"),
        # a switch below one port
        (
            "pci0000:00/0000:00:01.0/0000:01:00.0/0000:02:08.0/0000:03:00.0",
            "pci0000:00/0000:00:01.0/0000:01:00.0/0000:02:10.0/0000:04:00.0",
            "PIX",
        ),
        # a switch behind a switch
        (
            "pci0000:00/0000:00:01.0/0000:01:00.0/0000:02:08.0/0000:03:00.0",
            "pci0000:00/0000:00:01.0/0000:01:00.0/0000:02:10.0/0000:04:00.0/0000:05:00.0/0000:06:00.0",
            "PXB",
        ),
    ],
)
def test_ways_over_pcie(sys: FakeSys, a: str, b: str, words: str) -> None:
    one, other = places(sys, a, b)
    assert way(one, other) == way(other, one) == words


def test_between_processors(sys: FakeSys) -> None:
    a = sys.pci("pci0000:00/0000:00:01.0/0000:01:00.0", {"numa_node": 0})
    b = sys.pci("pci0000:80/0000:80:01.0/0000:81:00.0", {"numa_node": 1})
    assert way(a, b) == "SYS"


def test_bridges_on_the_card_are_no_switch(sys: FakeSys) -> None:
    """Two RX 7900 XTX behind one switch: each brings two bridges of its own."""
    switch = "pci0000:00/0000:00:01.0/0000:01:00.0"
    rx_7900_xtx(sys, f"{switch}/0000:02:08.0", 3)
    rx_7900_xtx(sys, f"{switch}/0000:02:10.0", 6)
    assert detect(sys).links == (Link(gpus=(0, 1), kind="pcie", path="PIX"),)


def test_sys_tells_the_way_where_nvml_does_not(sys: FakeSys) -> None:
    nvidia_in(sys, "pci0000:00/0000:00:01.0/0000:01:00.0")
    nvidia_in(sys, "pci0000:40/0000:40:01.0/0000:02:00.0")
    two = (rtx_3090(0), rtx_3090(1))
    bridged = detect(sys, Machine(*two, links=({"a": 0, "b": 1, "nvlinks": 4},)))
    assert bridged.links == (Link(gpus=(0, 1), kind="nvlink", n_links=4, path="NODE"),)
    told = detect(sys, Machine(*two, links=({"a": 0, "b": 1, "level": 50},)))
    assert told.links == (Link(gpus=(0, 1), kind="pcie", path="SYS"),)


# --- memory that is the host's


def test_huge_pages_take_the_place_of_free_memory(sys: FakeSys) -> None:
    assert read_unified(sys.root).available_bytes == 40 * GIB
    pages = "HugePages_Total: 4096\nHugePages_Free: 2048\nHugepagesize: 2048 kB"
    sys.write({"proc/meminfo": f"MemTotal: 125829120 kB\nMemAvailable: 104857600 kB\n{pages}"})
    (gpu,) = detect(sys, Machine(gb10())).gpus
    assert (gpu.unified, gpu.total_bytes, gpu.free_bytes) == (True, 120 * GIB, 4 * GIB)


@pytest.mark.parametrize(
    ("model", "name", "gbs", "target"),
    [
        ("AGX Orin Developer Kit", "AGX Orin", 204.8, "8.7"),
        ("Orin NX Engineering Reference Developer Kit", "Orin NX Engineering Reference", 102.4, "8.7"),
        ("Orin Nano Engineering Reference Developer Kit Super", "Orin Nano Engineering Reference", 102.4, "8.7"),
        ("Orin Nano Developer Kit", "Orin Nano", 68.3, "8.7"),
        ("TX2", "TX2", None, None),
    ],
)
def test_jetson(sys: FakeSys, model: str, name: str, gbs: float | None, target: str | None) -> None:
    sys.write({"proc/device-tree/model": f"NVIDIA Jetson {model}\0"})
    rig = detect(sys)
    assert rig.gpus == (
        Gpu(
            index=0,
            name=f"NVIDIA Jetson {name}",
            vendor="nvidia",
            total_bytes=64 * GIB,
            free_bytes=40 * GIB,
            bandwidth_bytes_per_s=None if gbs is None else round(gbs * 10**9),
            compute_capability=target,
            unified=True,
        ),
    )
    assert rig.findings == ()


def test_other_boards_are_no_jetson(sys: FakeSys) -> None:
    sys.write({"proc/device-tree/model": "Raspberry Pi 5 Model B Rev 1.0"})
    assert read_jetson(sys.root) is None
    sys.write({"etc/nv_tegra_release": "# R35 (release), REVISION: 4.1"})
    jetson = read_jetson(sys.root)
    assert jetson is not None
    assert jetson.vendor == "nvidia"


# --- Apple


def mac(chip: str, ram_gib: int, *, p_cores: int = 8, wired_mb: int | None = None) -> apple.Sysctl:
    """What `sysctlbyname` answers: numbers of 4 and 8 bytes, texts with a zero at their end."""
    known = {
        "machdep.cpu.brand_string": f"{chip}\0".encode(),
        "hw.memsize": (ram_gib * GIB).to_bytes(8, "little"),
        "hw.perflevel0.physicalcpu": p_cores.to_bytes(4, "little"),
    }
    if wired_mb is not None:
        known["iogpu.wired_limit_mb"] = wired_mb.to_bytes(4, "little")
    return lambda name: known.get(name, b"")


@pytest.mark.parametrize(
    ("ram_gib", "wired_mb", "mib"),
    [(16, None, 10922), (32, 0, 21845), (64, 0, 49152), (128, 0, 98304), (64, 60000, 60000), (16, 999999, 16384)],
)
def test_what_metal_may_use(ram_gib: int, wired_mb: int | None, mib: int) -> None:
    gpu = apple.read_apple(mac("Apple M4", ram_gib, wired_mb=wired_mb), 200 * GIB)
    assert gpu is not None
    assert gpu.total_bytes // MIB == mib
    assert gpu.free_bytes == gpu.total_bytes


@pytest.mark.parametrize(
    ("chip", "p_cores", "gbs"),
    [
        ("Apple M3 Max", 12, 400),
        ("Apple M3 Max", 10, 300),
        ("Apple M4 Max", 12, 546),
        ("Apple M4 Max", 10, 410),
        ("Apple M2 Ultra", 16, 800),
        ("Apple M1", 4, 68),
        ("Apple M99", 4, None),
    ],
)
def test_apples_chips(chip: str, p_cores: int, gbs: int | None) -> None:
    gpu = apple.read_apple(mac(chip, 64, p_cores=p_cores), 20 * GIB)
    assert gpu is not None
    assert (gpu.name, gpu.vendor, gpu.unified, gpu.free_bytes) == (chip, "apple", True, 20 * GIB)
    assert gpu.bandwidth_bytes_per_s == (gbs * 10**9 if gbs else None)


@pytest.mark.parametrize("answer", [b"", b"\xff\xfe\0", b"Intel(R) Core(TM) i9-9980HK CPU @ 2.40GHz\0"])
def test_other_macs_have_no_such_gpu(answer: bytes) -> None:
    assert apple.read_apple(lambda name: answer, GIB) is None


def test_there_are_no_such_variables_here() -> None:
    if python.platform != "darwin":
        assert apple.sysctl("hw.perflevel0.physicalcpu") == b""


def test_a_mac_with_and_without_a_runtime(sys: FakeSys, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(python, "platform", "darwin")
    monkeypatch.setattr(apple, "sysctl", mac("Apple M3 Max", 96, p_cores=10))
    (alone,) = detect(sys).gpus
    assert (alone.name, alone.total_bytes, alone.device) == ("Apple M3 Max", 72 * GIB, None)
    metal = ListedDevice(device="MTL0", description="Apple M3 Max", total_bytes=75 * GIB, free_bytes=75 * GIB)
    (listed,) = detect(sys, listed=lambda: (metal,)).gpus
    assert (listed.device, listed.total_bytes, listed.bandwidth_bytes_per_s) == ("MTL0", 75 * GIB, 300 * 10**9)


def test_large_and_small_machines_have_their_carve_outs(sys: FakeSys) -> None:
    """Strix Halo beside a card: both are used, for it is none of the slow ones."""
    memory = amd_memory(1, gtt=100 * GIB, revision="0xc1")
    sys.drm("pci0000:00/0000:00:08.1/0000:c5:00.0", 0x1002, 0x1586, memory)
    rx_7900_xtx(sys, PORT, 1)
    rig = detect(sys)
    assert [(gpu.name, gpu.enabled) for gpu in rig.gpus] == [
        ("AMD Radeon RX 7900 XTX", True),
        ("AMD Radeon 8060S Graphics", True),
    ]
