"""What cards hold now, asked again and again: real `pynvml` above a fake driver, AMD's files in a fake /sys."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from fakenvml.fake import installed
from fakenvml.machine import Machine, a100, gb10, mig_instance, rtx_3090
from fakesys import MEMINFO_64, FakeSys, fdinfo, raphael, rx_7900_xtx
from mgpu.detect.amd import probe_amd
from mgpu.detect.live import CardNow, read_now
from mgpu.detect.nvidia import probe_nvidia
from mgpu.detect.sysfs import drm_cards
from mgpu.rig import Gpu
from mgpu.units import GIB, MIB

#: No /sys: the PCI addresses of the fakes are those of real devices on some machines.
NOWHERE = Path("/nonexistent")

TWO = Machine(rtx_3090(0), rtx_3090(1))


def cards_of(machine: Machine, root: Path = NOWHERE) -> tuple[Gpu, ...]:
    with installed(machine):
        return probe_nvidia(root).gpus


def now(gpus: tuple[Gpu, ...], machine: Machine, root: Path = NOWHERE) -> tuple[CardNow, ...]:
    with installed(machine) as fake:
        found = read_now(gpus, root)
    assert fake.opened == 0, "the driver was left open"
    return found


class TestNvidia:
    def test_what_is_held_and_by_whom(self) -> None:
        later = Machine(rtx_3090(0), rtx_3090(1, mem_used=5 * GIB, proc_pid=4242, proc_mem=4 * GIB))
        first, second = now(cards_of(TWO), later)
        assert (first.index, first.free_bytes, dict(first.by_pid)) == (0, 24 * GIB - 381_681_664, {})
        assert second.free_bytes == 19 * GIB - 381_681_664
        assert second.used_bytes == 5 * GIB + 381_681_664
        assert dict(second.by_pid) == {4242: 4 * GIB}
        assert second.lost is None
        assert second.blind is None

    def test_found_again_by_its_name_whatever_its_number(self) -> None:
        gpus = cards_of(TWO)
        swapped = Machine(rtx_3090(1, mem_used=GIB), rtx_3090(0))
        assert [card.used_bytes for card in now(gpus, swapped)] == [381_681_664, GIB + 381_681_664]

    @pytest.mark.parametrize("without", [{"uuid": None}, {"uuid": None, "pci_bus_id": None}])
    def test_without_a_name_by_its_place(self, without: dict[str, None]) -> None:
        gpus = tuple(replace(gpu, **without) for gpu in cards_of(TWO))
        assert [card.free_bytes for card in now(gpus, TWO)] == [24 * GIB - 381_681_664] * 2

    @pytest.mark.parametrize("code", [6, 15, 16, 28, 999])
    def test_one_that_is_lost_is_said_and_the_other_read(self, code: int) -> None:
        first, second = now(cards_of(TWO), Machine(rtx_3090(0, handle_error=code), rtx_3090(1)))
        assert first.lost is not None
        assert first.lost.text.startswith("GPU 0 (RTX 3090): ")
        assert first.lost.hint
        assert (first.free_bytes, first.blind) == (None, None)
        assert second.free_bytes

    def test_one_that_is_lost_once_it_is_open(self) -> None:
        first, _ = now(cards_of(TWO), Machine(rtx_3090(0, mem_total="!15"), rtx_3090(1)))
        assert first.lost is not None
        assert "fallen off the bus" in first.lost.text

    def test_one_that_the_driver_does_not_know_any_more(self) -> None:
        _, second = now(cards_of(TWO), Machine(rtx_3090(0)))
        assert second.lost is not None
        assert "knows it no longer" in second.lost.text

    def test_no_permission_is_no_loss(self) -> None:
        first, _ = now(cards_of(TWO), Machine(rtx_3090(0, handle_error=4), rtx_3090(1)))
        assert first.lost is None
        assert first.blind is not None

    @pytest.mark.parametrize("code", [12, 18, 999])
    def test_a_library_that_does_not_answer_says_nothing_of_the_cards(self, code: int) -> None:
        """An upgrade of the driver, or a container's devices taken away: what runs already may run on."""
        for card in now(cards_of(TWO), Machine(rtx_3090(0), rtx_3090(1), init_error=code)):
            assert card.lost is None
            assert card.blind is not None
            assert card.free_bytes is None

    def test_without_its_module_all_are_lost(self) -> None:
        assert all(card.lost is not None for card in now(cards_of(TWO), Machine(init_error=9)))

    def test_an_instance_by_its_own_name(self) -> None:
        machine = Machine(a100(mig_mode=1), migs=(mig_instance(0, 0), mig_instance(0, 1, mem_used=2 * GIB)))
        assert [card.used_bytes for card in now(cards_of(machine), machine)] == [0, 2 * GIB]

    def test_shared_memory_is_the_hosts(self, tmp_path: Path) -> None:
        FakeSys(tmp_path).write({"proc/meminfo": MEMINFO_64})
        (card,) = now(cards_of(Machine(gb10()), tmp_path), Machine(gb10()), tmp_path)
        assert card.free_bytes == 40 * GIB

    @given(st.integers(1, 1000), st.sampled_from(["handle_error", "init_error", "mem_total"]))
    def test_no_return_code_raises(self, code: int, where: str) -> None:
        sick = rtx_3090(0, handle_error=code) if where == "handle_error" else rtx_3090(0)
        sick = rtx_3090(0, mem_total=f"!{code}") if where == "mem_total" else sick
        machine = Machine(sick, rtx_3090(1), init_error=code if where == "init_error" else 0)
        found = now(cards_of(TWO), machine)
        assert [card.index for card in found] == [0, 1]

    def test_a_process_that_lives_on_sees_what_changes(self, fake_nvml: Path, tmp_path: Path, python_path: str) -> None:
        """Above the compiled FAKE library: a card is taken, is lost, and comes back after a reset."""
        config, uuid = tmp_path / "machine.toml", str(rtx_3090(0)["uuid"])
        code = (
            "import sys\n"
            "from mgpu.detect.live import read_now\n"
            "from mgpu.rig import Gpu\n"
            f"gpu = Gpu(index=0, name='RTX 3090', vendor='nvidia', total_bytes=1, free_bytes=1, uuid={uuid!r})\n"
            "for _ in sys.stdin:\n"
            "    (card,) = read_now([gpu])\n"
            "    said = card.lost or card.blind\n"
            "    print(said.text if said else card.used_bytes, flush=True)\n"
        )
        env = {**os.environ, "PYTHONPATH": python_path, "LD_LIBRARY_PATH": str(fake_nvml)}
        env["FAKE_NVML_CONFIG"] = str(config)
        argv, pipe = [sys.executable, "-c", code], subprocess.PIPE
        said: list[str] = []
        with subprocess.Popen(argv, env=env, text=True, stdin=pipe, stdout=pipe) as process:
            assert process.stdin is not None
            assert process.stdout is not None
            for machine in (
                Machine(rtx_3090(0, mem_used=GIB)),
                Machine(rtx_3090(0, handle_error=15)),
                Machine(rtx_3090(0), init_error=18),
                Machine(rtx_3090(0)),
            ):
                config.write_text(machine.toml())
                process.stdin.write("look\n")
                process.stdin.flush()
                said.append(process.stdout.readline().strip())
            process.stdin.close()
        reserved = 381_681_664
        assert said == [
            str(GIB + reserved),
            "GPU 0 (RTX 3090): it has fallen off the bus",
            "NVIDIA: driver and library versions differ",
            str(reserved),
        ]


class TestAmd:
    def test_what_is_held_and_by_whom(self, tmp_path: Path) -> None:
        sys = FakeSys(tmp_path)
        address = rx_7900_xtx(sys, "pci0000:00/0000:00:01.1", 0x03)
        (gpu,) = _amd(tmp_path)
        sys.write(
            {
                f"sys/bus/pci/devices/{address}/mem_info_vram_used": 9 * GIB,
                f"sys/bus/pci/devices/{address}/mem_info_gtt_used": 3 * GIB,
            }
        )
        sys.process(4242, "llama-server", fdinfo(address, 7, f"drm-memory-vram:\t{8 * GIB // 1024} KiB\n"))
        (card,) = read_now([gpu], tmp_path)
        assert card.used_bytes == 9 * GIB
        assert card.free_bytes == 24 * GIB - 16 * MIB - 9 * GIB
        assert card.gtt_used_bytes == 3 * GIB
        assert dict(card.by_pid) == {4242: 8 * GIB}

    def test_part_of_the_processor_counts_what_it_borrows(self, tmp_path: Path) -> None:
        sys = FakeSys(tmp_path)
        address = raphael(sys)
        (gpu,) = _amd(tmp_path)
        (before,) = read_now([gpu], tmp_path)
        sys.write({f"sys/bus/pci/devices/{address}/mem_info_gtt_used": 5 * GIB})
        (after,) = read_now([gpu], tmp_path)
        assert before.free_bytes is not None
        assert after.free_bytes == before.free_bytes - 4 * GIB

    def test_one_that_has_left_the_bus(self, tmp_path: Path) -> None:
        rx_7900_xtx(FakeSys(tmp_path), "pci0000:00/0000:00:01.1", 0x03)
        (card,) = read_now(_amd(tmp_path), NOWHERE)
        assert card.lost is not None
        assert "not on the bus" in card.lost.text

    def test_one_whose_driver_tells_nothing(self, tmp_path: Path) -> None:
        address = rx_7900_xtx(FakeSys(tmp_path), "pci0000:00/0000:00:01.1", 0x03)
        gpus = _amd(tmp_path)
        (tmp_path / f"sys/bus/pci/devices/{address}/mem_info_vram_total").unlink()
        assert read_now(gpus, tmp_path) == (CardNow(index=gpus[0].index),)


def test_others_tell_nothing_and_all_keep_their_order(tmp_path: Path) -> None:
    rx_7900_xtx(FakeSys(tmp_path), "pci0000:00/0000:00:01.1", 0x03)
    (amd,) = _amd(tmp_path)
    intel = Gpu(index=7, name="Arc", vendor="intel", total_bytes=GIB, free_bytes=GIB)
    gpus = (replace(amd, index=9), intel, *cards_of(TWO))
    assert [card.index for card in now(gpus, TWO, tmp_path)] == [9, 7, 0, 1]
    assert read_now([]) == ()


def test_two_thousand_looks_leave_nothing_behind(tmp_path: Path) -> None:
    """Eight hours' worth: no memory kept in each of four parts (Python's own tables grow in one), no descriptor."""
    rx_7900_xtx(FakeSys(tmp_path), "pci0000:00/0000:00:01.1", 0x03)
    gpus = (*cards_of(TWO), *(replace(gpu, index=2) for gpu in _amd(tmp_path)))
    machine = Machine(rtx_3090(0, proc_pid=1, proc_mem=GIB), rtx_3090(1, handle_error=15))
    with installed(machine) as fake:
        tracemalloc.start()
        try:
            _grown(gpus, tmp_path)  # caches fill
            files = _open_files()
            assert min(_grown(gpus, tmp_path) for _ in range(4)) < 4 * 1024
        finally:
            tracemalloc.stop()
        assert _open_files() == files
        assert fake.opened == 0


def _grown(gpus: tuple[Gpu, ...], root: Path, looks: int = 500) -> int:
    """By how many bytes so many looks let Python's memory grow."""
    gc.collect()
    before = tracemalloc.get_traced_memory()[0]
    for _ in range(looks):
        read_now(gpus, root)
    gc.collect()
    return tracemalloc.get_traced_memory()[0] - before


def _open_files() -> int:
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


def _amd(root: Path) -> tuple[Gpu, ...]:
    return probe_amd(drm_cards(root), 0, held=dict, root=root).gpus
