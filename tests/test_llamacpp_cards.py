"""Cards by llama.cpp's names, and the environment that hides the others."""

from __future__ import annotations

from msgspec.structs import replace

from mgpu.adapter import ListedDevice
from mgpu.rig import Gpu, Rig, Vendor
from mgpu.units import GIB, MIB
from mgpu_adapters.llamacpp.cards import bind, device_names, read_devices, visibility


def _gpu(index: int, name: str = "NVIDIA GeForce RTX 3090", vendor: Vendor = "nvidia", uuid: str | None = None) -> Gpu:
    return Gpu(index=index, name=name, vendor=vendor, uuid=uuid, total_bytes=24 * GIB, free_bytes=24 * GIB)


def _rig(*gpus: Gpu) -> Rig:
    return Rig(name="test", source="detected", gpus=gpus)


def test_list_of_devices_as_printed() -> None:
    text = (
        "ggml_vulkan: Found 2 Vulkan devices:\n"
        "Available devices:\n"
        "  CUDA0: NVIDIA GeForce RTX 4090 (24077 MiB, 23600 MiB free)\n"
        "  Vulkan1: llvmpipe (LLVM 15.0.6, 256 bits) (2048 MiB, 2047 MiB free)\n"
    )
    assert read_devices(text) == (
        ListedDevice(
            device="CUDA0", description="NVIDIA GeForce RTX 4090", total_bytes=24077 * MIB, free_bytes=23600 * MIB
        ),
        ListedDevice(
            device="Vulkan1",
            description="llvmpipe (LLVM 15.0.6, 256 bits)",
            total_bytes=2048 * MIB,
            free_bytes=2047 * MIB,
        ),
    )
    assert read_devices("Available devices:\n  (none)\n") == ()


def test_cuda_numbers_follow_the_order_of_the_visible_cards() -> None:
    a, b, c = _gpu(0, uuid="GPU-a"), _gpu(1, uuid="GPU-b"), _gpu(2, uuid="GPU-c")
    assert device_names((c, a)) == ("CUDA0", "CUDA1")
    assert visibility((c, a), _rig(a, b, c)) == {
        "CUDA_DEVICE_ORDER": "PCI_BUS_ID",
        "CUDA_VISIBLE_DEVICES": "GPU-c,GPU-a",
    }


def test_without_uuids_indices_select() -> None:
    assert visibility((_gpu(1),), _rig(_gpu(0), _gpu(1)))["CUDA_VISIBLE_DEVICES"] == "1"


def test_no_card_used_is_no_card_seen() -> None:
    assert visibility((), _rig(_gpu(0)))["CUDA_VISIBLE_DEVICES"] == ""


def test_mixed_vendors_are_numbered_each_by_their_own() -> None:
    amd = _gpu(1, "AMD Radeon RX 7900 XTX", "amd")
    assert device_names((_gpu(0), amd)) == ("CUDA0", "ROCm0")
    assert visibility((amd,), _rig(_gpu(0), amd)) == {
        "CUDA_DEVICE_ORDER": "PCI_BUS_ID",
        "CUDA_VISIBLE_DEVICES": "",
        "HIP_VISIBLE_DEVICES": "0",  # the first of AMD's own
    }


def _listed(device: str, description: str) -> ListedDevice:
    return ListedDevice(device=device, description=description, total_bytes=24 * GIB, free_bytes=23 * GIB)


def test_a_cuda_build_needs_no_names() -> None:
    rig = _rig(_gpu(0), _gpu(1))
    assert bind(rig, (_listed("CUDA0", "NVIDIA GeForce RTX 3090"),)) == rig


def test_a_vulkan_build_names_the_nvidia_cards_in_its_own_order() -> None:
    rig = _rig(_gpu(0, "NVIDIA GeForce RTX 3060"), _gpu(1), _gpu(2))
    listed = tuple(
        _listed(f"Vulkan{i}", f"NVIDIA GeForce RTX {model}") for i, model in enumerate(("3090", "3090", "3060"))
    )
    assert [gpu.device for gpu in bind(rig, listed).gpus] == ["Vulkan2", "Vulkan0", "Vulkan1"]


def test_a_name_within_another_name_is_not_it() -> None:
    rig = _rig(_gpu(0, "NVIDIA GeForce RTX 3060"), _gpu(1, "NVIDIA GeForce RTX 3060 Ti"))
    listed = (_listed("Vulkan0", "NVIDIA GeForce RTX 3060 Ti"), _listed("Vulkan1", "NVIDIA GeForce RTX 3060"))
    assert [gpu.device for gpu in bind(rig, listed).gpus] == ["Vulkan1", "Vulkan0"]


def test_a_build_without_the_backend_cannot_use_the_card_and_says_so() -> None:
    bound = bind(_rig(_gpu(0)), ())
    assert not bound.gpus[0].enabled
    assert "GPU 0 (NVIDIA GeForce RTX 3090)" in bound.findings[0].text


def test_cards_found_by_the_list_itself_keep_their_names() -> None:
    rig = _rig(replace(_gpu(0, "llvmpipe", "unknown"), device="Vulkan0"))
    assert bind(rig, ()) == rig
    assert visibility(rig.gpus, rig) == {}
