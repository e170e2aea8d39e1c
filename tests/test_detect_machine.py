"""The host, the caller's CUDA_VISIBLE_DEVICES, and what becomes of both and the drivers' answers: the rig."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fakenvml.fake import installed
from fakenvml.machine import Machine, a100, mig_instance, rtx_3090, tesla_p40
from mgpu.adapter import ListedDevice
from mgpu.detect.host import Host, Memory, process_name, read_host, read_memory
from mgpu.detect.machine import detect_rig, rig_from_listed
from mgpu.detect.visible import apply_cuda_visible
from mgpu.rig import Gpu, Link, Rig
from mgpu.units import GIB, MIB

# --- the host


def test_this_host_as_psutil_sees_it() -> None:
    memory = psutil.virtual_memory()
    assert read_memory().total_bytes == memory.total
    assert read_memory().available_bytes == pytest.approx(memory.available, abs=512 * MIB)
    host = read_host()
    assert 0 < host.memory.available_bytes <= host.memory.total_bytes <= memory.total
    assert host.cpu_cores is not None
    assert 1 <= host.cpu_cores <= (os.cpu_count() or 1)


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < (os.cpu_count() or 1), reason="this process is pinned to some CPUs")
def test_all_physical_cores_where_nothing_is_pinned() -> None:
    assert read_host().cpu_cores == psutil.cpu_count(logical=False)


MEMINFO = "MemTotal:       67108864 kB\nMemFree:         1048576 kB\nMemAvailable:   41943040 kB\n"  # 64, 1, 40 GiB


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return root


def cores(*siblings: str) -> dict[str, str]:
    folder = "sys/devices/system/cpu"
    return {f"{folder}/cpu{cpu}/topology/thread_siblings_list": f"{text}\n" for cpu, text in enumerate(siblings)}


def test_plain_host(tmp_path: Path) -> None:
    cpuinfo = "processor\t: 0\nmodel name\t: AMD Ryzen 9 7950X 16-Core Processor\nflags\t\t: fpu\n"
    root = write(tmp_path, {"proc/meminfo": MEMINFO, "proc/cpuinfo": cpuinfo})
    assert read_host(root) == Host(
        memory=Memory(total_bytes=64 * GIB, available_bytes=40 * GIB),
        cpu_cores=None,
        cpu_name="AMD Ryzen 9 7950X 16-Core Processor",
    )


def test_threads_of_one_core_count_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = write(tmp_path, {"proc/meminfo": MEMINFO, **cores("0,4", "1,5", "2,6", "3,7", "0,4", "1,5", "2,6", "3,7")})
    monkeypatch.setattr(os, "sched_getaffinity", lambda _pid: set(range(8)))
    assert read_host(root).cpu_cores == 4
    monkeypatch.setattr(os, "sched_getaffinity", lambda _pid: {1, 5, 6})  # a container's cpuset
    assert read_host(root).cpu_cores == 2


V2 = "0::/user.slice/app.scope\n"
V1 = "12:cpuset:/\n4:cpu,memory:/docker/abc\n1:name=systemd:/docker/abc\n0::/\n"
V2_GROUP = "sys/fs/cgroup/user.slice/app.scope"


@pytest.mark.parametrize(
    ("files", "total", "available"),
    [
        pytest.param({"proc/self/cgroup": V2, f"{V2_GROUP}/memory.max": "max\n"}, 64, 40, id="v2 without a limit"),
        pytest.param(
            {
                "proc/self/cgroup": V2,
                f"{V2_GROUP}/memory.max": f"{8 * GIB}\n",
                f"{V2_GROUP}/memory.current": f"{5 * GIB}\n",
                f"{V2_GROUP}/memory.stat": f"anon {2 * GIB}\ninactive_file {3 * GIB}\n",
            },
            8,
            6,
            id="v2, idle page cache is not used memory",
        ),
        pytest.param(
            {
                "proc/self/cgroup": V2,
                f"{V2_GROUP}/memory.max": f"{32 * GIB}\n",
                "sys/fs/cgroup/user.slice/memory.max": f"{16 * GIB}\n",
                "sys/fs/cgroup/user.slice/memory.current": f"{4 * GIB}\n",
            },
            16,
            12,
            id="v2, the parent's limit is tighter",
        ),
        pytest.param(
            {
                "proc/self/cgroup": "0::/\n",
                "sys/fs/cgroup/memory.max": f"{8 * GIB}\n",
                "sys/fs/cgroup/memory.current": f"{9 * GIB}\n",
            },
            8,
            0,
            id="v2, a namespace's root, over its limit",
        ),
        pytest.param(
            {
                "proc/self/cgroup": "0::/../../other\n",
                "sys/fs/cgroup/memory.max": f"{8 * GIB}\n",
            },
            8,
            8,
            id="v2, a path outside of the namespace",
        ),
        pytest.param(
            {
                "proc/self/cgroup": V1,
                "sys/fs/cgroup/memory/memory.limit_in_bytes": f"{8 * GIB}\n",
                "sys/fs/cgroup/memory/memory.usage_in_bytes": f"{3 * GIB}\n",
                "sys/fs/cgroup/memory/memory.stat": f"inactive_file 1\ntotal_inactive_file {GIB}\n",
            },
            8,
            6,
            id="v1 in a container: the host's path is not there",
        ),
        pytest.param(
            {"proc/self/cgroup": V1, "sys/fs/cgroup/memory/docker/abc/memory.limit_in_bytes": "9223372036854771712\n"},
            64,
            40,
            id="v1 without a limit",
        ),
        pytest.param(
            {"proc/self/cgroup": V2, f"{V2_GROUP}/memory.max": f"{128 * GIB}\n"}, 64, 40, id="more than there is"
        ),
    ],
)
def test_container_limits(tmp_path: Path, files: dict[str, str], total: int, available: int) -> None:
    root = write(tmp_path, {"proc/meminfo": MEMINFO, **files})
    assert read_host(root).memory == Memory(total_bytes=total * GIB, available_bytes=available * GIB)
    assert read_memory(root) == Memory(total_bytes=64 * GIB, available_bytes=40 * GIB)


def test_without_proc_psutil_answers(tmp_path: Path) -> None:
    assert read_host(tmp_path).memory.total_bytes == psutil.virtual_memory().total
    assert read_host(tmp_path).cpu_cores == psutil.cpu_count(logical=False)
    assert process_name(os.getpid(), tmp_path) == psutil.Process().name()
    assert process_name(2**30, tmp_path) is None


# --- CUDA_VISIBLE_DEVICES


def card(index: int, *, name: str = "NVIDIA GeForce RTX 3090", uuid: str | None = None) -> Gpu:
    uuid = uuid or f"GPU-{index:08d}-aaaa"
    return Gpu(index=index, name=name, vendor="nvidia", total_bytes=24 * GIB, free_bytes=23 * GIB, uuid=uuid)


THREE = (card(0, uuid="GPU-aaaa1111-x"), card(1, uuid="GPU-aaaa2222-x"), card(2, uuid="GPU-bbbb3333-x"))


@pytest.mark.parametrize(
    ("value", "left"),
    [
        (None, [0, 1, 2]),
        ("0,1,2", [0, 1, 2]),
        ("2,0", [0, 2]),
        (" 1 , 2 ", [1, 2]),
        ("", []),
        ("-1", []),
        ("NoDevFiles", []),
        ("0,2,-1,1", [0, 2]),
        ("0,7,1", [0]),
        ("GPU-aaaa2222-x", [1]),
        ("GPU-b", [2]),
        ("GPU-bbbb,0", [0, 2]),
        ("GPU-aaaa,2", []),  # two cards begin like this
        ("1,GPU-zzzz,2", [1]),
        ("bbbb3333", []),
    ],
)
def test_cuda_visible_devices(value: str | None, left: list[int]) -> None:
    gpus, findings = apply_cuda_visible(value, THREE)
    assert [gpu.index for gpu in gpus] == left
    assert (len(left) < 3) == any(f"leaves {len(left)} of 3" in finding.text for finding in findings)


def test_the_entry_that_ends_the_list_is_named() -> None:
    _, findings = apply_cuda_visible("0,7,1", THREE)
    assert "'7' names no single GPU" in findings[-1].text


@pytest.mark.parametrize("value", ["", "-1", "0,1,-1"])
def test_the_usual_ways_to_end_the_list_are_no_mistake(value: str) -> None:
    assert not any("names no single" in finding.text for finding in apply_cuda_visible(value, THREE)[1])


@pytest.mark.parametrize(
    ("value", "names", "order", "said"),
    [
        ("0", ("Tesla P40", "NVIDIA GeForce RTX 3090"), None, True),
        ("0", ("Tesla P40", "NVIDIA GeForce RTX 3090"), "FASTEST_FIRST", True),
        ("0", ("Tesla P40", "NVIDIA GeForce RTX 3090"), "PCI_BUS_ID", False),
        ("GPU-00000001", ("Tesla P40", "NVIDIA GeForce RTX 3090"), None, False),
        ("0", ("Tesla P40", "Tesla P40"), None, False),
    ],
)
def test_numbers_of_mixed_cards_are_uncertain(
    value: str, names: tuple[str, str], order: str | None, said: bool
) -> None:
    gpus = tuple(card(index, name=name) for index, name in enumerate(names))
    _, findings = apply_cuda_visible(value, gpus, device_order=order)
    assert any("CUDA_DEVICE_ORDER=PCI_BUS_ID" in finding.hint for finding in findings) is said


@given(st.lists(st.integers(0, 7), max_size=10), st.booleans())
def test_any_list_of_cards_leaves_just_those_in_driver_order(numbers: list[int], by_uuid: bool) -> None:
    gpus = tuple(card(index) for index in range(8))
    value = ",".join((gpus[number].uuid or "") if by_uuid else str(number) for number in numbers)
    visible, _ = apply_cuda_visible(value, gpus)
    assert [gpu.index for gpu in visible] == sorted(set(numbers))


@given(st.text(), st.integers(0, 3))
def test_any_text_is_read(value: str, count: int) -> None:
    visible, _ = apply_cuda_visible(value, THREE[:count])
    assert set(visible) <= set(THREE[:count])


# --- the rig


#: No /sys: what GPUs the machine has on which the tests run is not their business.
NOWHERE = Path("/nonexistent")


def detect(machine: Machine, environ: dict[str, str] | None = None, *listed: ListedDevice) -> Rig:
    with installed(machine):
        return detect_rig(environ or {}, listed=lambda: listed, root=NOWHERE)


def device(name: str, description: str, total: int = 16 * GIB) -> ListedDevice:
    return ListedDevice(device=name, description=description, total_bytes=total, free_bytes=total - GIB)


NVLINKED = Machine(rtx_3090(0), tesla_p40(0), rtx_3090(1), links=({"a": 0, "b": 2, "nvlinks": 4},))
LLVMPIPE = device("Vulkan0", "llvmpipe (LLVM 15.0.6, 256 bits)")


def test_cards_of_the_driver_and_the_host() -> None:
    rig = detect(NVLINKED)
    assert (rig.name, rig.source, rig.driver) == ("this machine", "detected", "NVIDIA 580.95.05, CUDA 13.0")
    assert [gpu.index for gpu in rig.gpus] == [0, 1, 2]
    assert rig.link(2, 0) == "nvlink"
    assert rig.findings == ()
    host = read_host(NOWHERE)
    assert (rig.ram_bytes, rig.cpu_cores) == (host.memory.total_bytes, host.cpu_cores)
    assert rig.ram_free_bytes == pytest.approx(host.memory.available_bytes, abs=512 * MIB)
    assert rig.ram_bandwidth_bytes_per_s is None


def test_hidden_cards_take_their_links_along() -> None:
    rig = detect(NVLINKED, {"CUDA_VISIBLE_DEVICES": "1,2", "CUDA_DEVICE_ORDER": "PCI_BUS_ID"})
    assert [gpu.index for gpu in rig.gpus] == [1, 2]
    assert rig.links == ()
    assert [finding.text for finding in rig.findings] == [
        "CUDA_VISIBLE_DEVICES=1,2 leaves 2 of 3 NVIDIA GPUs: GPU 1, GPU 2"
    ]


def test_one_mig_instance_by_its_uuid() -> None:
    machine = Machine(a100(mig_mode=1), migs=(mig_instance(0, 0), mig_instance(0, 1)))
    rig = detect(machine, {"CUDA_VISIBLE_DEVICES": str(machine.migs[1]["uuid"])})
    assert [gpu.uuid for gpu in rig.gpus] == [machine.migs[1]["uuid"]]


@pytest.mark.parametrize("environ", [{}, {"CUDA_VISIBLE_DEVICES": ""}])
def test_the_runtime_is_not_asked_where_the_driver_has_cards(environ: dict[str, str]) -> None:
    """Neither where the person hid them: the runtime may list the same cards by another way (Vulkan)."""

    def listed() -> tuple[ListedDevice, ...]:
        pytest.fail("asked the runtime")

    with installed(NVLINKED):
        rig = detect_rig(environ, listed=listed, root=NOWHERE)
    assert rig.gpus == (() if environ else detect(NVLINKED).gpus)
    assert rig.links == tuple(Link(gpus=(0, 2), kind="nvlink", n_links=4) for _ in rig.gpus[:1])


def test_no_gpu_at_all_is_a_rig_that_says_why() -> None:
    with installed(Machine(init_error=12)):
        rig = detect_rig({}, root=NOWHERE)
    assert rig.gpus == ()
    assert [finding.text for finding in rig.findings] == ["NVIDIA: no driver found (libnvidia-ml.so.1)"]


@pytest.mark.parametrize(("code", "said"), [(12, False), (9, False), (18, True), (999, True)])
def test_the_runtimes_devices_where_the_driver_has_none(code: int, said: bool) -> None:
    """No NVIDIA driver is no news on a machine with other GPUs; a broken one is."""
    rig = detect(Machine(init_error=code), {"CUDA_VISIBLE_DEVICES": "3"}, LLVMPIPE)
    assert [gpu.device for gpu in rig.gpus] == ["Vulkan0"]
    assert bool(rig.findings) is said


def test_two_entries_are_two_devices() -> None:
    again = ListedDevice(device="Vulkan1", description=LLVMPIPE.description, total_bytes=2 * GIB, free_bytes=GIB)
    rig = rig_from_listed((LLVMPIPE, again), read_host())
    assert [(gpu.index, gpu.device, gpu.total_bytes, gpu.free_bytes) for gpu in rig.gpus] == [
        (0, "Vulkan0", 16 * GIB, 15 * GIB),
        (1, "Vulkan1", 2 * GIB, GIB),
    ]
    assert {gpu.max_tensor_bytes for gpu in rig.gpus} == {128 * MIB}
    assert rig.driver == "devices as the runtime lists them"


@pytest.mark.parametrize(
    ("listed", "vendor", "bandwidth_gbs", "unified"),
    [
        (device("Vulkan0", "llvmpipe (LLVM 15.0.6, 256 bits)"), "unknown", None, False),
        (device("Vulkan0", "AMD Radeon RX 7900 XTX (RADV NAVI31)", 24 * GIB), "amd", 960, False),
        (device("ROCm0", "AMD Radeon Graphics", 32 * GIB), "amd", None, False),
        (device("ROCm0", "gfx1030"), "amd", None, False),
        (device("Vulkan0", "AMD Radeon 780M Graphics (RADV PHOENIX)"), "amd", None, True),
        (device("Vulkan0", "Radeon 8060S Graphics (RADV GFX1151)", 96 * GIB), "amd", 256, True),
        (device("Vulkan0", "Intel(R) Arc(tm) A770 Graphics (DG2)"), "intel", 560, False),
        (device("Vulkan0", "Intel(R) Arc(tm) Graphics (MTL)"), "intel", None, True),
        (device("Vulkan0", "Intel(R) UHD Graphics 770 (ADL-S GT1)"), "intel", None, True),
        (device("Vulkan0", "Intel(R) Iris(R) Xe Graphics (TGL GT2)"), "intel", None, True),
        (device("MTL0", "Apple M3 Max", 48 * GIB), "apple", 400, True),
        (device("MTL0", "Apple Paravirtual device"), "apple", None, True),
        (device("CUDA0", "Orin"), "nvidia", None, True),
        (device("CUDA0", "NVIDIA Thor"), "nvidia", None, True),
        (device("Vulkan0", "AMD Radeon Graphics (RADV RAPHAEL_MENDOCINO)"), "amd", None, True),
        (device("Vulkan0", "NVIDIA GeForce RTX 3090", 24 * GIB), "nvidia", 936, False),
        (device("Vulkan0", "Turnip Adreno (TM) 740"), "unknown", None, False),
    ],
)
def test_what_a_description_tells(listed: ListedDevice, vendor: str, bandwidth_gbs: int | None, unified: bool) -> None:
    (gpu,) = rig_from_listed((listed,), read_host()).gpus
    assert (gpu.vendor, gpu.unified) == (vendor, unified)
    assert gpu.bandwidth_bytes_per_s == (bandwidth_gbs * 10**9 if bandwidth_gbs else None)
    assert (gpu.max_tensor_bytes is None) == (not listed.description.startswith("llvmpipe"))


def test_a_mac_is_not_asked_for_nvidia_cards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    rig = detect(NVLINKED, {}, device("MTL0", "Apple M3 Max", 48 * GIB))
    assert [gpu.device for gpu in rig.gpus] == ["MTL0"]
    assert rig.findings == ()
