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
        "ROCR_VISIBLE_DEVICES": "0",  # the first of AMD's own
        "HIP_VISIBLE_DEVICES": "0",  # and the first of what that leaves
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


def test_amds_cards_by_uuid_and_then_by_number() -> None:
    """HIP counts what ROCR leaves, and would take CUDA's list if it had none of its own."""
    rig = _rig(*(_gpu(number, "AMD Radeon RX 7900 XTX", "amd", uuid=f"GPU-{number}") for number in range(3)))
    assert visibility((rig.gpus[2], rig.gpus[0]), rig) == {
        "ROCR_VISIBLE_DEVICES": "GPU-2,GPU-0",
        "HIP_VISIBLE_DEVICES": "0,1",
    }
    assert visibility((), rig) == {"ROCR_VISIBLE_DEVICES": "", "HIP_VISIBLE_DEVICES": "-1"}


def test_intels_variable_selects_and_does_not_reorder() -> None:
    rig = _rig(*(_gpu(number, "Intel Arc A770", "intel") for number in range(3)))
    chosen = (rig.gpus[2], rig.gpus[1])
    assert device_names(chosen) == ("SYCL1", "SYCL0")
    assert visibility(chosen, rig) == {
        "ZE_ENABLE_PCI_ID_DEVICE_ORDER": "1",
        "ONEAPI_DEVICE_SELECTOR": "level_zero:1,2",
    }
    assert visibility((), rig) == {}


def _mixed() -> Rig:
    graphics = replace(_gpu(2, "AMD Radeon Graphics [1002:164e]", "amd"), integrated=True, enabled=False)
    return _rig(_gpu(0), _gpu(1, "AMD Radeon RX 7900 XTX", "amd"), graphics)


def test_a_cuda_build_leaves_amds_cards_and_says_so() -> None:
    bound = bind(_mixed(), (_listed("CUDA0", "NVIDIA GeForce RTX 3090"),))
    assert [gpu.enabled for gpu in bound.gpus] == [True, False, False]
    (finding,) = bound.findings  # nobody misses the processor's graphics
    assert "cannot use GPU 1 (AMD Radeon RX 7900 XTX): its build" in finding.text
    assert "Vulkan, which lists the cards of every vendor" in finding.hint


def test_a_vulkan_build_has_them_all() -> None:
    names = (
        "AMD Radeon Graphics (RADV RAPHAEL_MENDOCINO)",
        "NVIDIA GeForce RTX 3090",
        "AMD Radeon RX 7900 XTX (RADV NAVI31)",
    )
    bound = bind(_mixed(), tuple(_listed(f"Vulkan{number}", name) for number, name in enumerate(names)))
    assert [(gpu.device, gpu.enabled) for gpu in bound.gpus] == [
        ("Vulkan1", True),
        ("Vulkan2", True),
        ("Vulkan0", False),
    ]
    assert bound.findings == ()
    assert visibility(bound.gpus[:2], bound) == {}


def test_a_build_with_two_backends_takes_each_cards_own() -> None:
    """Vulkan lists NVIDIA's card again: it stays CUDA's, and CUDA's variables alone hide it."""
    listed = (
        _listed("CUDA0", "NVIDIA GeForce RTX 3090"),
        _listed("Vulkan0", "NVIDIA GeForce RTX 3090"),
        _listed("Vulkan1", "AMD Radeon RX 7900 XTX (RADV NAVI31)"),
    )
    bound = bind(_mixed(), listed)
    assert device_names(bound.gpus[:2]) == ("CUDA0", "Vulkan1")
    assert set(visibility(bound.gpus[:2], bound)) == {"CUDA_DEVICE_ORDER", "CUDA_VISIBLE_DEVICES"}


def test_a_card_without_a_name_is_found_by_its_make_and_memory() -> None:
    cards = (
        _gpu(0),
        _gpu(1, "AMD GPU [1002:1234]", "amd"),
        replace(_gpu(2, "AMD GPU [1002:9999]", "amd"), total_bytes=8 * GIB),
    )
    listed = (
        replace(_listed("Vulkan0", "AMD Radeon RX 9999 (RADV GFX1300)"), total_bytes=8 * GIB),
        _listed("Vulkan1", "NVIDIA GeForce RTX 3090"),
        _listed("Vulkan2", "AMD Radeon RX 7900 XTX (RADV NAVI31)"),
    )
    bound = bind(_rig(*cards), listed)
    assert [gpu.device for gpu in bound.gpus] == ["Vulkan1", "Vulkan2", "Vulkan0"]
    assert bound.gpus[1].name == "AMD Radeon RX 7900 XTX (RADV NAVI31)"
    assert bound.gpus[1].bandwidth_bytes_per_s == 960 * 10**9
    assert not bound.findings


def test_intels_cards_by_name_and_their_memory_from_the_list() -> None:
    """Their numbers are Level Zero's, which sorts as it likes."""
    rig = _rig(_gpu(0, "Intel Arc A770", "intel"), _gpu(1, "Intel Arc B580", "intel"))
    listed = (_listed("SYCL0", "Intel(R) Arc(TM) B580 Graphics"), _listed("SYCL1", "Intel(R) Arc(TM) A770 Graphics"))
    bound = bind(rig, listed)
    assert [gpu.device for gpu in bound.gpus] == ["SYCL1", "SYCL0"]
    assert {gpu.free_bytes for gpu in bound.gpus} == {23 * GIB}
    assert visibility(bound.gpus, bound) == {}


def test_another_makes_card_of_the_same_size_is_not_it() -> None:
    """NVIDIA's is hidden by the caller's CUDA_VISIBLE_DEVICES, and Vulkan lists it all the same."""
    bound = bind(_rig(_gpu(0, "AMD GPU [1002:1234]", "amd")), (_listed("Vulkan0", "NVIDIA GeForce RTX 3090"),))
    assert (bound.gpus[0].device, bound.gpus[0].enabled) == (None, False)
