"""The table of cards, by the names that drivers give them."""

from __future__ import annotations

import csv
import re
import typing
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import mgpu_profiles.gpus
from mgpu.rig import Vendor
from mgpu.units import GB, GIB
from mgpu_profiles.gpus import find_spec, plain_name

TABLE = Path(mgpu_profiles.gpus.__file__).with_name("gpus.csv")
with TABLE.open(encoding="utf-8", newline="") as lines:
    ROWS = tuple(csv.DictReader(lines))

#: Names as drivers print them, the memory in GiB they show, and the row that is right.
DRIVER_NAMES = [
    ("NVIDIA B200", 178, "B200"),
    ("NVIDIA GH200 480GB", 95.6, "GH200 96GB HBM3"),
    ("NVIDIA GH200 144G HBM3e", 140.4, "GH200 144GB HBM3e"),
    ("NVIDIA H200", 140.4, "H200 SXM"),
    ("NVIDIA H200 NVL", 140.4, "H200 NVL"),
    ("NVIDIA H100 NVL", 93.6, "H100 NVL"),
    ("NVIDIA H100 PCIe", 79.6, "H100 PCIe 80GB"),
    ("NVIDIA H100 80GB HBM3", 79.6, "H100 SXM 80GB (HBM3)"),
    ("NVIDIA A100-SXM4-80GB", 80, "A100 SXM4 80GB"),
    ("NVIDIA A100-SXM4-40GB", 40, "A100 SXM4 40GB"),
    ("A100-SXM4-40GB", 40, "A100 SXM4 40GB"),
    ("NVIDIA A100 80GB PCIe", 80, "A100 PCIe 80GB"),
    ("NVIDIA A100-PCIE-40GB", 40, "A100 PCIe 40GB"),
    ("NVIDIA A30", 24, "A30"),
    ("NVIDIA A40", 45, "A40"),
    ("NVIDIA A10G", 22.5, "A10G"),
    ("NVIDIA A10", 22.5, "A10"),
    ("NVIDIA A16", 15, "A16 (per GPU)"),
    ("NVIDIA A2", 15, "A2"),
    ("NVIDIA L40S", 45, "L40S"),
    ("NVIDIA L40", 45, "L40"),
    ("NVIDIA L4", 22.5, "L4"),
    ("Tesla T4", 15, "T4"),
    ("Tesla V100S-PCIE-32GB", 32, "V100S PCIe 32GB"),
    ("Tesla V100-SXM2-16GB", 16, "V100 SXM2 16GB"),
    ("Tesla V100-SXM2-32GB", 32, "V100 SXM2 32GB"),
    ("Tesla V100-PCIE-16GB", 16, "V100 PCIe 16GB"),
    ("Tesla V100-PCIE-32GB", 32, "V100 PCIe 32GB"),
    ("Tesla P100-SXM2-16GB", 16, "P100 SXM2 16GB"),
    ("Tesla P100-PCIE-12GB", 12, "P100 PCIe 12GB"),
    ("Tesla P100-PCIE-16GB", 16, "P100 PCIe 16GB"),
    ("Tesla P40", 22.5, "P40"),
    ("Tesla P4", 7.5, "P4"),
    ("Tesla M40 24GB", 22.5, "M40"),
    ("NVIDIA GB10", 119.6, "GB10 (DGX Spark)"),
    ("NVIDIA RTX PRO 6000 Blackwell Workstation Edition", 95.6, "RTX PRO 6000 Blackwell Workstation"),
    ("NVIDIA RTX PRO 6000 Blackwell Max-Q Workstation Edition", 95.6, "RTX PRO 6000 Blackwell Max-Q"),
    ("NVIDIA RTX PRO 6000 Blackwell Server Edition", 95.6, "RTX PRO 6000 Blackwell Server"),
    ("NVIDIA RTX PRO 5000 Blackwell", 47.8, "RTX PRO 5000 Blackwell"),
    ("NVIDIA RTX PRO 5000 72GB Blackwell", 71.6, "RTX PRO 5000 72GB Blackwell"),
    ("NVIDIA RTX PRO 4000 Blackwell SFF Edition", 24, "RTX PRO 4000 Blackwell SFF"),
    ("NVIDIA RTX PRO 4000 Blackwell", 24, "RTX PRO 4000 Blackwell"),
    ("NVIDIA RTX 6000 Ada Generation", 48, "RTX 6000 Ada Generation"),
    ("NVIDIA RTX 4000 SFF Ada Generation", 20, "RTX 4000 SFF Ada Generation"),
    ("NVIDIA RTX 4000 Ada Generation", 20, "RTX 4000 Ada Generation"),
    ("NVIDIA RTX A6000", 48, "RTX A6000"),
    ("NVIDIA RTX A4000", 16, "RTX A4000"),
    ("NVIDIA RTX A2000", 6, "RTX A2000 6GB"),
    ("NVIDIA RTX A2000 12GB", 12, "RTX A2000 12GB"),
    ("Quadro RTX 8000", 48, "Quadro RTX 8000"),
    ("Quadro P6000", 24, "Quadro P6000"),
    ("NVIDIA TITAN RTX", 24, "TITAN RTX"),
    ("NVIDIA TITAN V", 12, "TITAN V"),
    ("NVIDIA TITAN Xp", 12, "TITAN Xp"),
    ("NVIDIA TITAN X (Pascal)", 12, "TITAN X (Pascal)"),
    ("NVIDIA GeForce RTX 5090", 31.8, "GeForce RTX 5090"),
    ("NVIDIA GeForce RTX 5090 D", 31.8, "GeForce RTX 5090 D"),
    ("NVIDIA GeForce RTX 5090 D V2", 24, "GeForce RTX 5090 D V2"),
    ("NVIDIA GeForce RTX 5080", 16, "GeForce RTX 5080"),
    ("NVIDIA GeForce RTX 5070 Ti", 16, "GeForce RTX 5070 Ti"),
    ("NVIDIA GeForce RTX 5070", 12, "GeForce RTX 5070"),
    ("NVIDIA GeForce RTX 5060 Ti", 16, "GeForce RTX 5060 Ti 16GB"),
    ("NVIDIA GeForce RTX 5060 Ti", 8, "GeForce RTX 5060 Ti 8GB"),
    ("NVIDIA GeForce RTX 5060", 8, "GeForce RTX 5060"),
    ("NVIDIA GeForce RTX 4090", 24, "GeForce RTX 4090"),
    ("NVIDIA GeForce RTX 4090 D", 24, "GeForce RTX 4090 D"),
    ("NVIDIA GeForce RTX 4080 SUPER", 16, "GeForce RTX 4080 SUPER"),
    ("NVIDIA GeForce RTX 4080", 16, "GeForce RTX 4080"),
    ("NVIDIA GeForce RTX 4070 Ti SUPER", 16, "GeForce RTX 4070 Ti SUPER"),
    ("NVIDIA GeForce RTX 4070 Ti", 12, "GeForce RTX 4070 Ti"),
    ("NVIDIA GeForce RTX 4070 SUPER", 12, "GeForce RTX 4070 SUPER"),
    ("NVIDIA GeForce RTX 4070", 12, "GeForce RTX 4070"),
    ("NVIDIA GeForce RTX 4060 Ti", 15.996, "GeForce RTX 4060 Ti 16GB"),
    ("NVIDIA GeForce RTX 4060 Ti", 7.996, "GeForce RTX 4060 Ti 8GB"),
    ("NVIDIA GeForce RTX 4060", 8, "GeForce RTX 4060"),
    ("NVIDIA GeForce RTX 3090 Ti", 24, "GeForce RTX 3090 Ti"),
    ("NVIDIA GeForce RTX 3090", 24, "GeForce RTX 3090"),
    ("GeForce RTX 3090", 24, "GeForce RTX 3090"),
    ("NVIDIA GeForce RTX 3080 Ti", 12, "GeForce RTX 3080 Ti"),
    ("NVIDIA GeForce RTX 3080", 10, "GeForce RTX 3080 10GB"),
    ("NVIDIA GeForce RTX 3080", 12, "GeForce RTX 3080 12GB"),
    ("NVIDIA GeForce RTX 3060 Ti", 8, "GeForce RTX 3060 Ti"),
    ("NVIDIA GeForce RTX 3060", 12, "GeForce RTX 3060 12GB"),
    ("NVIDIA GeForce RTX 3060", 8, "GeForce RTX 3060 8GB"),
    ("NVIDIA GeForce RTX 3050", 6, "GeForce RTX 3050 6GB"),
    ("NVIDIA GeForce RTX 2080 Ti", 11, "GeForce RTX 2080 Ti"),
    ("NVIDIA GeForce RTX 2080 SUPER", 8, "GeForce RTX 2080 SUPER"),
    ("NVIDIA GeForce RTX 2070", 8, "GeForce RTX 2070"),
    ("NVIDIA GeForce RTX 2060", 12, "GeForce RTX 2060 12GB"),
    ("NVIDIA GeForce GTX 1080 Ti", 11, "GeForce GTX 1080 Ti"),
    ("NVIDIA GeForce GTX 1080", 8, "GeForce GTX 1080"),
    ("AMD Instinct MI300X", 192, "Instinct MI300X"),
    ("AMD Radeon RX 7900 XTX (RADV NAVI31)", 24, "Radeon RX 7900 XTX"),
    ("AMD Radeon RX 7900 XT (RADV NAVI31)", 20, "Radeon RX 7900 XT"),
    ("AMD Radeon RX 7900 GRE", 16, "Radeon RX 7900 GRE"),
    ("AMD Radeon RX 9070 XT", 16, "Radeon RX 9070 XT"),
    ("AMD Radeon RX 9070", 16, "Radeon RX 9070"),
    ("AMD Radeon RX 6800 XT", 16, "Radeon RX 6800 XT"),
    ("AMD Radeon RX 6800", 16, "Radeon RX 6800"),
    ("AMD Radeon VII", 16, "Radeon VII"),
    ("Radeon 8060S Graphics (RADV GFX1151)", 96, "Radeon 8060S (Ryzen AI Max+ 395)"),
    ("Intel(R) Arc(TM) A770 Graphics", 15.1, "Arc A770 16GB"),
    ("Intel(R) Arc(tm) A770 Graphics (DG2)", 8, "Arc A770 8GB"),
    ("Intel(R) Arc(tm) B580 Graphics (BMG G21)", 12, "Arc B580"),
    ("Apple M3 Max", 64, "Apple M3 Max (40-core GPU)"),
    ("Apple M3", 16, "Apple M3"),
    ("Apple M2 Ultra", 192, "Apple M2 Ultra"),
]

UNKNOWN_NAMES = [
    "NVIDIA GeForce RTX 4090 Laptop GPU",
    "NVIDIA GeForce RTX 3080 Ti Laptop GPU",
    "NVIDIA GeForce RTX 5070 Ti Laptop GPU",
    "NVIDIA GeForce RTX 2080 Super with Max-Q Design",
    "NVIDIA GeForce RTX 2060 with Max-Q Design",
    "NVIDIA GeForce GTX 1080 with Max-Q Design",
    "NVIDIA RTX A5000 Laptop GPU",
    "NVIDIA RTX 4000 Ada Generation Laptop GPU",
    "NVIDIA RTX PRO 5000 Blackwell Generation Laptop GPU",
    "NVIDIA GeForce GTX TITAN X",
    "NVIDIA GeForce GTX 970",
    "NVIDIA GeForce RTX 5080 SUPER",
    "NVIDIA T400 4GB",
    "Quadro M4000",
    "AMD Radeon RX 6800M",
    "AMD Radeon Graphics (RADV RENOIR)",
    "Intel(R) Arc(tm) A770M Graphics (DG2)",
    "Intel(R) UHD Graphics 770 (ADL-S GT1)",
    "llvmpipe (LLVM 15.0.6, 256 bits)",
    "",
]


@pytest.mark.parametrize(("name", "memory_gib", "row"), DRIVER_NAMES)
def test_driver_names(name: str, memory_gib: float, row: str) -> None:
    spec = find_spec(name, int(memory_gib * GIB))
    assert spec is not None
    assert spec.name == row


@pytest.mark.parametrize("name", UNKNOWN_NAMES)
def test_names_that_no_row_is_right_for(name: str) -> None:
    assert find_spec(name, 16 * GIB) is None


def test_figures_in_base_units() -> None:
    spec = find_spec("NVIDIA GeForce RTX 3090", 24 * GIB)
    assert spec is not None
    assert (spec.vendor, spec.vram_bytes, spec.bandwidth_bytes_per_s) == ("nvidia", 24 * GIB, 936 * GB)
    assert (spec.tdp_watts, spec.pcie_gen, spec.pcie_lanes, spec.compute_capability) == (350, 4, 16, "8.6")
    assert (spec.nvlink, spec.fp16_tflops, spec.unified) == (True, 71.2, False)


def test_unknown_figures_are_none() -> None:
    spec = find_spec("Apple M3 Max")
    assert spec is not None
    assert (spec.vendor, spec.vram_bytes, spec.pcie_gen, spec.compute_capability) == ("apple", None, None, None)
    assert (spec.nvlink, spec.unified) == (False, True)


def test_without_a_size_the_first_row_of_the_name() -> None:
    named = [row["name"] for row in ROWS if row["name"].startswith("GeForce RTX 3080 1")]
    spec = find_spec("NVIDIA GeForce RTX 3080")
    assert spec is not None
    assert spec.name == named[0]


def test_trade_marks_and_spaces() -> None:
    assert plain_name("  Intel(R)  Arc(tm)\tA770™ Graphics® ") == "Intel Arc A770 Graphics"
    assert find_spec("nvidia geforce(tm)  rtx  3090") == find_spec("NVIDIA GeForce RTX 3090")


def test_every_row_is_whole() -> None:
    assert {row["vendor"] for row in ROWS} <= set(typing.get_args(Vendor))
    assert all(float(row["bandwidth_gbs"]) > 0 for row in ROWS)
    assert all(row["nvlink"] in {"yes", "no"} for row in ROWS)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row["name"])
def test_every_row_can_be_found_by_its_own_name(row: dict[str, str]) -> None:
    """By the row's own name, or (where a vendor's name has no driver's words) by the words of its pattern."""
    total = round(float(row["vram_gb"] or 0) * GIB) or None
    words = re.sub(r"\(\?.*|\\b|\[- \]", " ", row["name_pattern"]).replace(".*", " ").split("|")[0]
    found = {spec.name for name in (row["name"], words) if (spec := find_spec(name, total))}
    same_pattern = {other["name"] for other in ROWS if other["name_pattern"] == row["name_pattern"]}
    assert found & (same_pattern if not row["vram_gb"] else {row["name"]})


def first_pattern(name: str) -> str | None:
    """The matching rule in its plainest form: top down, the first pattern that is found in the name."""
    return next((row["name_pattern"] for row in ROWS if re.search(row["name_pattern"], name, re.IGNORECASE)), None)


WORDS = st.sampled_from(
    sorted({word for row in ROWS for word in re.findall(r"\w+", row["name"])} | {"SUPER", "Ti", "GTX"})
)


@given(st.lists(WORDS, min_size=1, max_size=5).map(" ".join))
def test_looking_for_plain_words_first_changes_nothing(name: str) -> None:
    spec = find_spec(name)
    expected = {row["name"] for row in ROWS if row["name_pattern"] == first_pattern(name)}
    assert ({spec.name} <= expected) if spec else not expected
