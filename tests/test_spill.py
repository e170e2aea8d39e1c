"""What cards hold against what was planned, and the driver's silent retreat into system RAM."""

from __future__ import annotations

import mmap
import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mgpu.detect.live import CardNow
from mgpu.launch.spill import HostSeen, Place, judge
from mgpu.launch.tree import host_bytes
from mgpu.plan import DeviceBytes, DevicePlan, Forecast, HostBytes, HostPlan, Layout, Plan, Shape
from mgpu.rig import Gpu
from mgpu.units import GIB, MIB

OURS = 4242
OTHER = 99


def gpu(index: int, *, unified: bool = False) -> Gpu:
    return Gpu(
        index=index, name="NVIDIA GeForce RTX 3090", vendor="nvidia", total_bytes=24 * GIB, free_bytes=24 * GIB,
        unified=unified,
    )  # fmt: skip


def plan(*gpus: int, host: int = GIB) -> Plan:
    """On each card 16 GiB of weights, 2 of cache, 1 of the rest."""
    memory = DeviceBytes(weights=16 * GIB, kv=2 * GIB, compute=512 * MIB, overhead=512 * MIB)
    return Plan(
        placement="pipeline",
        runtime="llama.cpp",
        ctx=8192,
        users=1,
        kv_type="f16",
        layout=Layout(gpus=gpus, counts=(33,) * len(gpus), shape=Shape(n_devices=len(gpus))),
        devices=tuple(
            DevicePlan(
                gpu=index, name="RTX 3090", uuid=None, blocks=range(32), has_output=True, memory=memory,
                free_bytes=24 * GIB, reserve_bytes=0,
            )
            for index in gpus
        ),
        host=HostPlan(
            blocks=range(0),
            expert_blocks=range(0),
            memory=HostBytes(weights=host, kv=0, compute=0),
            free_bytes=64 * GIB,
        ),
        tensor_split=None,
        forecast=Forecast(),
        rules=(),
    )  # fmt: skip


def card(index: int, used: int, *, gtt: int | None = None, **by_pid: int) -> CardNow:
    held = {OURS if name == "ours" else OTHER: size for name, size in by_pid.items()}
    return CardNow(index=index, free_bytes=24 * GIB - used, used_bytes=used, by_pid=held, gtt_used_bytes=gtt)


def one(before: CardNow, after: CardNow, host: HostSeen, *, unified: bool = False) -> Place:
    (place,) = judge([plan(0)], [gpu(0, unified=unified)], before=[before], after=[after], host=host, pids={OURS})
    return place


NOTHING_SEEN = HostSeen(private_bytes=GIB, taken_bytes=GIB)


def test_as_planned() -> None:
    place = one(card(0, 0), card(0, 19 * GIB, ours=18 * GIB + 700 * MIB), NOTHING_SEEN)
    assert place == Place(gpu=0, name="RTX 3090", planned_bytes=19 * GIB, held_bytes=18 * GIB + 700 * MIB)


def test_less_overhead_than_planned_is_no_spill() -> None:
    place = one(card(0, 0), card(0, 17 * GIB, ours=17 * GIB), HostSeen(private_bytes=30 * GIB))
    assert not place.warning


def test_the_card_holds_less_and_the_processes_more() -> None:
    place = one(card(0, 0), card(0, 11 * GIB, ours=11 * GIB), HostSeen(private_bytes=8 * GIB, taken_bytes=2 * GIB))
    assert place.spilled_bytes == 7 * GIB
    assert place.warning == (
        "GPU 0 (RTX 3090) holds 11.0 GiB, 19.0 GiB was planned: 7.0 GiB is in system RAM, which is many times slower"
    )
    assert "--ctx" in place.hint


def test_memory_that_belongs_to_no_process_shows_in_what_is_free() -> None:
    """Managed memory is the driver's."""
    host = HostSeen(private_bytes=GIB, taken_bytes=8 * GIB, unified=True)
    assert "unset GGML_CUDA_ENABLE_UNIFIED_MEMORY" in one(card(0, 0), card(0, 11 * GIB, ours=11 * GIB), host).hint


def test_less_on_the_card_and_no_more_in_ram_is_a_plan_too_large() -> None:
    assert not one(card(0, 0), card(0, 11 * GIB, ours=11 * GIB), NOTHING_SEEN).warning


def test_unknown_ram_is_no_evidence() -> None:
    assert not one(card(0, 0), card(0, 11 * GIB, ours=11 * GIB), HostSeen()).warning


def test_windows_keeps_it_where_linux_cannot_see() -> None:
    place = one(card(0, 0), card(0, 11 * GIB), HostSeen(private_bytes=GIB, taken_bytes=0, wsl=True))
    assert "seems to be in system RAM" in place.warning
    assert "Sysmem Fallback" in place.hint


def test_amd_lends_ram() -> None:
    place = one(card(0, 0, gtt=GIB), card(0, 11 * GIB, gtt=8 * GIB, ours=11 * GIB), HostSeen())
    assert place.spilled_bytes == 7 * GIB
    assert "GTT" in place.hint


def test_memory_that_is_ram_anyway_cannot_spill() -> None:
    host = HostSeen(private_bytes=30 * GIB)
    assert not one(card(0, 0), card(0, 11 * GIB, ours=11 * GIB), host, unified=True).warning


class TestHeld:
    def test_without_names_it_is_what_has_gone(self) -> None:
        assert one(card(0, 2 * GIB), card(0, 21 * GIB), NOTHING_SEEN).held_bytes == 19 * GIB

    def test_names_of_another_namespace(self) -> None:
        """In a container the driver's pids are the host's: ours is new there, under another number."""
        before, after = card(0, 0), card(0, 19 * GIB, theirs=19 * GIB)
        assert one(before, after, NOTHING_SEEN).held_bytes == 19 * GIB

    def test_others_moved(self) -> None:
        before, after = card(0, 5 * GIB, other=5 * GIB), card(0, 20 * GIB, other=GIB)
        assert one(before, after, HostSeen(private_bytes=30 * GIB)).held_bytes is None

    def test_more_is_free_than_before(self) -> None:
        place = one(card(0, 5 * GIB), card(0, GIB), HostSeen(private_bytes=30 * GIB))
        assert (place.held_bytes, place.warning) == (None, "")

    @pytest.mark.parametrize("told", [(), (CardNow(index=0),)])
    def test_nobody_tells(self, told: tuple[CardNow, ...]) -> None:
        host = HostSeen(private_bytes=30 * GIB, wsl=True)
        (place,) = judge([plan(0)], [gpu(0)], before=told, after=told, host=host, pids={OURS})
        assert (place.held_bytes, place.warning) == (None, "")


def test_replicas_on_the_same_card_are_summed() -> None:
    (place,) = judge(
        [plan(0), plan(0)], [gpu(0)], before=[card(0, 0)], after=[card(0, 38 * GIB)], host=NOTHING_SEEN, pids={OURS}
    )
    assert (place.planned_bytes, place.held_bytes, place.warning) == (38 * GIB, 38 * GIB, "")


def test_only_the_card_that_lacks_is_warned_of() -> None:
    first, second = judge(
        [plan(0, 1)],
        [gpu(0), gpu(1)],
        before=[card(0, 0), card(1, 0)],
        after=[card(0, 19 * GIB, ours=19 * GIB), card(1, 9 * GIB, ours=9 * GIB)],
        host=HostSeen(private_bytes=10 * GIB),
        pids={OURS},
    )
    assert not first.warning
    assert second.spilled_bytes == 9 * GIB


sizes = st.integers(0, 30 * GIB)


@given(sizes, sizes, st.none() | sizes, st.none() | sizes, st.booleans())
def test_a_warning_always_has_its_reasons(
    was: int, now: int, private: int | None, taken: int | None, wsl: bool
) -> None:
    host = HostSeen(private_bytes=private, taken_bytes=taken, wsl=wsl)
    place = one(card(0, was), card(0, now), host)
    if place.warning:
        assert place.held_bytes is not None
        assert place.spilled_bytes == 18 * GIB - place.held_bytes > 1.8 * GIB - 1
        assert wsl or max(private or 0, taken or 0) - GIB >= place.spilled_bytes / 2
        assert place.hint
    else:
        assert (place.spilled_bytes, place.hint) == (0, "")


class TestHostBytes:
    def test_private_memory_counts_and_a_mapped_file_does_not(self) -> None:
        start = host_bytes(os.getpid())
        assert start is not None
        anonymous = mmap.mmap(-1, 64 * MIB, flags=mmap.MAP_PRIVATE)
        anonymous.write(b"x" * 64 * MIB)
        grown = host_bytes(os.getpid())
        anonymous.close()
        assert grown is not None
        assert 60 * MIB < grown - start < 200 * MIB

    def test_files_do_not(self, tmp_path: os.PathLike[str]) -> None:
        path = os.path.join(tmp_path, "weights")  # noqa: PTH118 - one path, for open()
        with open(path, "w+b") as file:  # noqa: PTH123 - as above
            file.write(b"x" * 64 * MIB)
            file.flush()
            start = host_bytes(os.getpid())
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
                assert sum(mapped[::4096]) > 0
                grown = host_bytes(os.getpid())
        assert start is not None
        assert grown is not None
        assert grown - start < 16 * MIB

    def test_nobody(self) -> None:
        assert host_bytes(2**22 - 3) is None
