"""AMD and Intel GPUs as Linux describes them, on machines built as directories."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fakesys import (
    GEN3,
    GEN4,
    GEN5,
    FakeSys,
    Files,
    amd_memory,
    arc,
    fdinfo,
    link_files,
    raphael,
    rx_7900_xtx,
    uhd,
)
from mgpu.detect.amd import probe_amd
from mgpu.detect.holders import read_holders
from mgpu.detect.intel import probe_intel
from mgpu.detect.kfd import kfd_nodes
from mgpu.detect.sysfs import SysfsProbe, drm_cards, order, plain_address, read_number, read_text
from mgpu.rig import Gpu, Link, Pcie
from mgpu.units import GIB, MIB

PORT = "pci0000:00/0000:00:01.1"


@pytest.fixture
def sys(tmp_path: Path) -> FakeSys:
    return FakeSys(tmp_path)


def amd(sys: FakeSys) -> SysfsProbe:
    return probe_amd(drm_cards(sys.root), 0, held=lambda: read_holders(sys.root), root=sys.root)


def intel(sys: FakeSys) -> SysfsProbe:
    return probe_intel(drm_cards(sys.root), 0, held=lambda: read_holders(sys.root), root=sys.root)


def said(probe: SysfsProbe) -> str:
    return "\n".join(f"{finding.text} | {finding.hint}" for finding in probe.findings)


# --- AMD


def test_one_card(sys: FakeSys) -> None:
    rx_7900_xtx(sys, PORT, 1, screen="DP-1", numa_node=0)
    sys.kfd(1, 51545, 128, 110000)
    assert amd(sys) == SysfsProbe(
        gpus=(
            Gpu(
                index=0,
                name="AMD Radeon RX 7900 XTX",
                vendor="amd",
                total_bytes=24 * GIB - 16 * MIB,
                free_bytes=24 * GIB - 116 * MIB,
                uuid="GPU-a1b2c3d4e5f60001",
                bandwidth_bytes_per_s=960 * 10**9,
                pcie=Pcie(gen=4, width=16),
                compute_capability="gfx1100",
                display=True,
                numa_node=0,
                pci_bus_id="0000:03:00.0",
                power_limit_watts=339,
            ),
        )
    )


def test_the_slowest_link_on_the_way_counts(sys: FakeSys) -> None:
    """The chip's own link is x16 for ever: it ends on the card."""
    rx_7900_xtx(sys, PORT, 1, slot=link_files(GEN3, 4, most=16))
    probe = amd(sys)
    assert probe.gpus[0].pcie == Pcie(gen=3, width=4)
    assert "GPU 0 (Radeon RX 7900 XTX) runs at PCIe 3.0 x4; the card can do 4.0 x16" in said(probe)


def test_half_of_the_lanes_is_how_boards_are_made(sys: FakeSys) -> None:
    rx_7900_xtx(sys, PORT, 1, slot=link_files(GEN4, 8, most=16))
    probe = amd(sys)
    assert (probe.gpus[0].pcie, probe.findings) == (Pcie(gen=4, width=8), ())


def test_a_card_with_few_lanes_has_them_all(sys: FakeSys) -> None:
    """An RX 6400 has four. The chip's own link, which ends at the card's upper bridge, would make it sixteen."""
    up = f"{PORT}/0000:01:00.0"
    sys.pci(up, {"vendor": "0x1002", "device": "0x1478", **link_files(GEN4, 4)})
    place = f"{up}/0000:02:00.0/0000:03:00.0"
    sys.drm(place, 0x1002, 0x743F, amd_memory(4, board_info="type : cem") | link_files(GEN4, 16))
    probe = amd(sys)
    assert (probe.gpus[0].pcie, probe.findings) == (Pcie(gen=4, width=4), ())


def test_a_card_nobody_has_heard_of(sys: FakeSys) -> None:
    """Linux 6.9 and newer tell that it is one, whatever else is missing."""
    sys.drm(f"{PORT}/0000:01:00.0", 0x1002, 0xFFFF, amd_memory(32, board_info="type : cem"))
    assert not amd(sys).gpus[0].integrated


def test_an_old_card_without_bridges_of_its_own(sys: FakeSys) -> None:
    files: Files = {**amd_memory(8), **link_files(GEN3, 16), "revision": "0xe7", "mem_info_vram_vendor": "samsung"}
    sys.pci(PORT, {"vendor": "0x1022", **link_files(GEN3, 16)})
    sys.drm(f"{PORT}/0000:01:00.0", 0x1002, 0x67DF, files)
    (gpu,) = amd(sys).gpus
    assert (gpu.name, gpu.pcie, gpu.uuid) == ("AMD GPU [1002:67df]", Pcie(gen=3, width=16), None)
    assert (gpu.integrated, gpu.unified, gpu.bandwidth_bytes_per_s, gpu.compute_capability) == (
        False,
        False,
        None,
        None,
    )


def test_names_from_the_systems_own_list_and_from_the_board(sys: FakeSys) -> None:
    sys.write({"usr/share/libdrm/amdgpu.ids": "# a list\n1.0.0\n67DF,\tE7,\tAMD Radeon RX 580 Series\n67DF,\tXX"})
    boards: tuple[tuple[int, Files], ...] = (
        (1, {"revision": "0xe7"}),
        (2, {"product_name": "AMD PRO 42\nmore"}),
        (3, {}),
    )
    for bus, files in boards:
        sys.drm(f"{PORT}/0000:{bus:02x}:00.0", 0x1002, 0x67DF, amd_memory(8, mem_info_vram_vendor="x") | files)
    assert [gpu.name for gpu in amd(sys).gpus] == ["AMD Radeon RX 580 Series", "AMD PRO 42", "AMD GPU [1002:67df]"]


def test_the_processors_graphics_are_told_apart(sys: FakeSys) -> None:
    """Without `board_info` (before Linux 6.9) and without a name: by what its memory lacks."""
    rx_7900_xtx(sys, PORT, 1)
    raphael(sys, screen="HDMI-A-1")
    card, graphics = amd(sys).gpus
    assert (card.integrated, card.unified) == (False, False)
    assert (graphics.integrated, graphics.unified, graphics.display, graphics.pcie) == (True, True, True, None)
    assert graphics.total_bytes == 512 * MIB + 31 * GIB
    assert graphics.free_bytes == 472 * MIB + 30 * GIB


@pytest.mark.parametrize(
    ("name", "integrated"),
    [
        ("AMD Radeon 780M Graphics", True),
        ("AMD Radeon 610M", True),
        ("AMD Radeon Vega 8 Graphics", True),
        ("AMD Radeon R7 Graphics", True),
        ("AMD Radeon Graphics", True),
        ("AMD Custom GPU 0932", True),
        ("AMD Radeon R7 M260", False),
        ("AMD Radeon RX 6700M", False),
        ("AMD Radeon RX Vega", False),
        ("AMD Radeon 530 Series", False),
        ("AMD Radeon RX 480 Graphics", False),
        ("AMD Radeon Vega Frontier Edition", False),
    ],
)
def test_names_tell_before_linux_6_9(sys: FakeSys, name: str, integrated: bool) -> None:
    sys.write({"usr/share/libdrm/amdgpu.ids": f"1234,\t01,\t{name}"})
    files = amd_memory(2, revision="0x01", mem_info_vram_vendor="micron")
    sys.drm(f"{PORT}/0000:01:00.0", 0x1002, 0x1234, files)
    assert amd(sys).gpus[0].integrated is integrated


def test_what_it_may_borrow_is_no_more_than_there_is(sys: FakeSys) -> None:
    sys.write({"proc/meminfo": "MemTotal: 33554432 kB\nMemAvailable: 4194304 kB"})
    raphael(sys)
    (graphics,) = amd(sys).gpus
    assert graphics.free_bytes == 472 * MIB + 4 * GIB


@pytest.mark.parametrize("revision", ["0xc1", "0xc2", "0xd5"])
def test_strix_halo_is_as_good_as_a_card(sys: FakeSys, revision: str) -> None:
    """Part of the processor, but with a card's memory bus: not put to rest beside one."""
    memory: Files = {"mem_info_vram_total": 512 * MIB, "mem_info_gtt_total": 110 * GIB}
    sys.write({"proc/meminfo": "MemTotal: 130000000 kB\nMemAvailable: 120000000 kB"})
    sys.drm("pci0000:00/0000:00:08.1/0000:c5:00.0", 0x1002, 0x1586, {"revision": revision, **memory})
    sys.kfd(1, 7, 128, 110501)
    (gpu,) = amd(sys).gpus
    assert (gpu.unified, gpu.integrated, gpu.bandwidth_bytes_per_s) == (True, False, 256 * 10**9)
    assert (gpu.total_bytes, gpu.compute_capability) == (512 * MIB + 110 * GIB, "gfx1151")
    assert gpu.free_bytes == gpu.total_bytes


def test_a_large_carve_out_is_memory_of_its_own(sys: FakeSys) -> None:
    """Firmware that gives 96 of 128 GiB to the GPU: the system has 32 left, and does not count the others."""
    memory: Files = {"mem_info_vram_total": 96 * GIB, "mem_info_vram_used": GIB, "mem_info_gtt_total": 15 * GIB}
    sys.drm("pci0000:00/0000:00:08.1/0000:c5:00.0", 0x1002, 0x1586, {"revision": "0xc1", **memory})
    (gpu,) = amd(sys).gpus
    assert (gpu.unified, gpu.integrated, gpu.total_bytes, gpu.free_bytes) == (False, False, 96 * GIB, 95 * GIB)


def instinct(sys: FakeSys, number: int) -> str:
    """One of eight MI300X, four to a processor."""
    bridge = f"pci0000:{number:02x}/0000:{number * 16:02x}:01.0"
    place = f"{bridge}/0000:{number * 16 + 1:02x}:00.0"
    memory = amd_memory(192, board_info="type : oam", numa_node=number // 4, unique_id=f"{number + 1:016x}")
    sys.drm(place, 0x1002, 0x74A1, memory | link_files(GEN5, 16))
    sys.kfd(number + 2, 1000 + number, 128 + number, 90402)
    return place


def test_eight_accelerators_joined_by_xgmi(sys: FakeSys) -> None:
    for number in range(8):
        instinct(sys, number)
    sys.write({"sys/class/kfd/kfd/topology/nodes/0/properties": "cpu_cores_count 64\nsimd_count 0"})
    for a in range(2, 10):
        sys.kfd_link(a, 0, 2)  # to the processor
        for b in range(a + 1, 10):
            sys.kfd_link(a, b, 11)
    probe = amd(sys)
    assert {(gpu.compute_capability, gpu.bandwidth_bytes_per_s) for gpu in probe.gpus} == {("gfx942", 5300 * 10**9)}
    assert [gpu.numa_node for gpu in probe.gpus] == [0, 0, 0, 0, 1, 1, 1, 1]
    assert len(probe.links) == 28
    assert {(link.kind, link.n_links) for link in probe.links} == {("nvlink", 1)}


def test_peers_over_pcie(sys: FakeSys) -> None:
    rx_7900_xtx(sys, PORT, 1)
    rx_7900_xtx(sys, "pci0000:00/0000:00:03.1", 5)
    for number in range(2):
        sys.kfd(number + 1, number, 128 + number, 110000)
    sys.kfd_link(1, 2, 2, "p2p_links")
    assert amd(sys).links == (Link(gpus=(0, 1), kind="pcie-p2p"),)


def test_half_of_a_double_card(sys: FakeSys) -> None:
    sys.drm(f"{PORT}/0000:01:00.0", 0x1002, 0x7408, amd_memory(64, board_info="type : oam"))
    (gpu,) = amd(sys).gpus
    assert gpu.bandwidth_bytes_per_s == pytest.approx(1638 * 10**9, rel=0.01)


def test_who_holds_memory(sys: FakeSys) -> None:
    """ROCm's programs by KFD, whoever's they are; others by their open files, each client once."""
    address = rx_7900_xtx(sys, PORT, 1, mem_info_vram_used=9 * GIB)
    sys.kfd(1, 51545, 128, 110000)
    sys.write({"sys/class/kfd/kfd/proc/4242/vram_51545": 6 * GIB, "sys/class/kfd/kfd/proc/77/vram_51545": 0})
    sys.process(4242, "python", fdinfo(address, 5, f"drm-memory-vram:\t{5 * GIB // 1024} KiB"))
    sys.write({"sys/class/kfd/kfd/proc/5151/vram_51545": GIB})
    sys.process(5151, "llama-server", fdinfo(address, 6, f"drm-memory-vram:\t{2 * GIB // 1024} KiB"))
    one = fdinfo(address, 1, "drm-total-vram:\t9999999 KiB\ndrm-resident-vram:\t2048 MiB")
    sys.process(900, "game", one, one, fdinfo(address, 2, "drm-memory-vram:\t1048576 KiB"))
    sys.process(901, "sh", fdinfo("0000:99:00.0", 3, "drm-memory-vram:\t1048576 KiB"))
    sys.process(902, "bar", fdinfo(address, 4, "drm-memory-vram:\t4096 KiB"), "no card at all", "")
    assert amd(sys).gpus[0].processes == (
        "4242 python (6.0 GiB)",
        "900 game (3.0 GiB)",
        "5151 llama-server (2.0 GiB)",
    )


def test_kernels_that_do_not_number_the_clients(sys: FakeSys) -> None:
    address = rx_7900_xtx(sys, PORT, 1, mem_info_vram_used=9 * GIB)
    for pid, name in ((900, "game"), (901, "editor")):
        sys.process(pid, name, f"drm-pdev:\t{address}\ndrm-memory-vram:\t1048576 KiB")
    assert amd(sys).gpus[0].processes == ("900 game (1.0 GiB)", "901 editor (1.0 GiB)")


def test_nobody_is_looked_for_where_nothing_is_held(sys: FakeSys) -> None:
    rx_7900_xtx(sys, PORT, 1)
    probe = probe_amd(drm_cards(sys.root), 0, held=lambda: pytest.fail("looked"), root=sys.root)
    assert probe.gpus[0].processes == ()


def test_a_driver_that_does_not_tell_the_memory(sys: FakeSys) -> None:
    sys.drm(f"{PORT}/0000:01:00.0", 0x1002, 0x6798, {})
    probe = amd(sys)
    assert probe.gpus == ()
    assert "AMD GPU [1002:6798] at 0000:01:00.0: its driver does not tell its memory | models need the amdgpu" in said(
        probe
    )


# --- Intel


def test_arc_beside_the_processors_graphics(sys: FakeSys) -> None:
    uhd(sys, screen="HDMI-A-1")
    memory: Files = {"tile0/physical_vram_size_bytes": 17_079_205_888, "numa_node": 0}
    address = arc(sys, 0x56A0, 3, slot=link_files(GEN4, 16), files=memory)
    sys.process(900, "game", fdinfo(address, 1, "drm-total-vram0:\t3 GiB\ndrm-resident-vram0:\t2097152 KiB"))
    graphics, card = intel(sys).gpus
    assert graphics == Gpu(
        index=0,
        name="Intel Graphics [8086:4680]",
        vendor="intel",
        total_bytes=48 * GIB,
        free_bytes=40 * GIB,
        display=True,
        unified=True,
        integrated=True,
        pci_bus_id="0000:00:02.0",
    )
    assert card == Gpu(
        index=1,
        name="Intel Arc A770",
        vendor="intel",
        total_bytes=17_079_205_888,
        free_bytes=17_079_205_888 - 2 * GIB,
        bandwidth_bytes_per_s=560 * 10**9,
        pcie=Pcie(gen=4, width=16),  # not the 1.0 x1 of the link within the card
        numa_node=0,
        pci_bus_id="0000:05:00.0",
        power_limit_watts=225,
        processes=("900 game (2.0 GiB)",),
    )


def test_two_tiles_are_one_card(sys: FakeSys) -> None:
    tiles: Files = {f"tile{number}/physical_vram_size_bytes": 64 * GIB for number in range(2)}
    arc(sys, 0x0BD5, 3, slot=link_files(GEN4, 16), files=tiles)
    assert intel(sys).gpus[0].total_bytes == 128 * GIB


def test_the_older_driver_and_its_silence(sys: FakeSys) -> None:
    """i915 may tell the memory beside the card's node; where it does not, the card's name does."""
    told = arc(sys, 0x56A1, 3, slot=link_files(GEN4, 16), files={})
    silent = arc(sys, 0xE20B, 7, slot=link_files(GEN4, 16), files={})
    unknown = arc(sys, 0xFFFF, 11, slot=link_files(GEN4, 16), files={})
    sys.write({"sys/class/drm/card0/lmem_total_bytes": 8 * GIB - 4096})
    probe = intel(sys)
    assert [(gpu.pci_bus_id, gpu.total_bytes) for gpu in probe.gpus] == [(told, 8 * GIB - 4096), (silent, 12 * GIB)]
    assert f"Intel Graphics [8086:ffff] at {unknown}: its driver does not tell its memory" in said(probe)


def test_arc_in_a_narrow_slot(sys: FakeSys) -> None:
    arc(sys, 0x56A0, 3, slot=link_files(GEN3, 4), files={"tile0/physical_vram_size_bytes": 16 * GIB})
    probe = intel(sys)
    assert probe.gpus[0].pcie == Pcie(gen=3, width=4)
    assert "runs at PCIe 3.0 x4; the card can do 4.0 x16" in said(probe)


def test_a_laptop_part_has_no_desktop_cards_figures(sys: FakeSys) -> None:
    arc(sys, 0x5690, 3, slot=link_files(GEN4, 8), files={"tile0/physical_vram_size_bytes": 16 * GIB})
    rx: Files = {"revision": "0xcf", **amd_memory(16, board_info="type : cem")}
    sys.drm(f"{PORT}/0000:21:00.0", 0x1002, 0x744C, rx)
    for gpu, name in ((intel(sys).gpus[0], "Intel Arc A770M"), (amd(sys).gpus[0], "AMD Radeon RX 7900M")):
        assert (gpu.name, gpu.bandwidth_bytes_per_s) == (name, None)


# --- the files themselves


def test_addresses() -> None:
    assert order("0000:0a:1f.7") == (0, 10, 31, 7)
    assert sorted(["10000:00:00.0", "0000:ff:00.0"], key=order) == ["0000:ff:00.0", "10000:00:00.0"]
    assert plain_address("0000000F:01:00.0") == "000f:01:00.0"
    assert plain_address("card0") == ""


@pytest.mark.parametrize(
    ("text", "number"),
    [("42\n", 42), ("0x1002\n", 0x1002), ("007\n", 7), ("-1\n", None), ("1e9\n", None), ("", None), ("9" * 5000, None)],
)
def test_numbers(tmp_path: Path, text: str, number: int | None) -> None:
    (tmp_path / "file").write_text(text)
    assert read_number(tmp_path / "file") == number


def test_files_that_are_none(tmp_path: Path) -> None:
    """Nothing waits, nothing is read without end, nothing raises."""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "bytes").write_bytes(b"\xff\xfe\0")
    (tmp_path / "endless").symlink_to("/dev/zero")
    (tmp_path / "locked").write_text("1")
    (tmp_path / "locked").chmod(0)
    for name in ("pipe", "loop", "endless", "missing", ".", "a\0b"):
        assert read_text(tmp_path / name) == ""
    assert read_text(tmp_path / "bytes") == "\ufffd\ufffd"
    assert read_text(tmp_path / "locked") in {"", "1"}  # root reads it


def test_what_is_no_pci_card_is_left_out(sys: FakeSys) -> None:
    rx_7900_xtx(sys, PORT, 1)
    drm = sys.root / "sys/class/drm"
    sys.write({"sys/class/drm/version": "drm 1.1.0", "sys/devices/platform/gpu/vendor": "0x1002"})
    sys.write({"sys/devices/platform/gpu/device": "0x744c"})
    (drm / "card5").symlink_to("nowhere")
    (drm / "card6").mkdir()
    (drm / "card6/device").symlink_to("../../../devices/platform/gpu")
    (drm / "cardX").mkdir()
    (drm / "renderD128").mkdir()
    assert [card.address for card in drm_cards(sys.root)] == ["0000:03:00.0"]


def _files_of(root: Path) -> list[Path]:
    return sorted(path for path in root.rglob("*") if path.is_file() and not path.is_symlink())


@settings(deadline=None, max_examples=60)  # each example builds a machine on the disk
@given(st.data())
def test_whatever_the_files_say_there_is_an_answer(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    sys = FakeSys(tmp_path_factory.mktemp("sys"))
    address = rx_7900_xtx(sys, PORT, 1, mem_info_vram_used=9 * GIB)
    raphael(sys)
    arc(sys, 0x56A0, 0x21, slot=link_files(GEN4, 16), files={"tile0/physical_vram_size_bytes": 16 * GIB})
    sys.kfd(1, 51545, 128, 110000)
    sys.kfd_link(1, 2, 11)
    sys.write({"sys/class/kfd/kfd/proc/4242/vram_51545": 6 * GIB})
    sys.process(900, "game", fdinfo(address, 1, "drm-memory-vram:\t1048576 KiB"))
    files = _files_of(sys.root)
    for path in data.draw(st.lists(st.sampled_from(files), max_size=8, unique=True)):
        garbage = data.draw(
            st.one_of(st.binary(max_size=40), st.sampled_from([None, b"-1", b"0", b"99999999999999999999"]))
        )
        if garbage is None:
            path.unlink()
        else:
            path.write_bytes(garbage)
    for gpu in (*amd(sys).gpus, *intel(sys).gpus):
        assert 0 <= gpu.free_bytes <= gpu.total_bytes
        assert gpu.name
        assert gpu.pcie is None or (1 <= gpu.pcie.gen <= 6 and gpu.pcie.width <= 32)


def test_compute_nodes_by_rocms_own_count(sys: FakeSys) -> None:
    sys.kfd(10, 5, 129, 90010)
    sys.kfd(2, 6, 128, 100306)
    sys.write({"sys/class/kfd/kfd/topology/nodes/0/properties": "simd_count 0"})
    assert [(node.number, node.target) for node in kfd_nodes(sys.root)] == [(2, "gfx1036"), (10, "gfx90a")]


def test_it_takes_milliseconds(sys: FakeSys) -> None:
    """Eight cards and four hundred programs, of which some hold memory."""
    for number in range(8):
        instinct(sys, number)
    for pid in range(1000, 1400):
        sys.process(pid, "idle")
        (sys.root / f"proc/{pid}/fd").mkdir(parents=True, exist_ok=True)
        for number in range(8):
            (sys.root / f"proc/{pid}/fd/{number}").symlink_to("/dev/null")
    amd(sys)  # the specifications' table is read once
    start = time.perf_counter()
    amd(sys)
    alone = time.perf_counter() - start
    start = time.perf_counter()
    read_holders(sys.root)
    assert alone < 0.1  # 4 ms on the machine this was written on
    assert time.perf_counter() - start < 0.5  # 13 ms there
