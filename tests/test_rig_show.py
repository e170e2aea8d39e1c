"""`mgpu rig show`: the machine on a screen of 80 columns, and as JSON."""

from __future__ import annotations

import io
import itertools
import json

import pytest
from msgspec.structs import replace

from mgpu.report.as_json import rig_object
from mgpu.report.screen import console
from mgpu.report.tables import rig_screen
from mgpu.rig import Finding, Gpu, Link, LinkKind, Measured, Pcie, Rig, Vendor
from mgpu.units import GB, GIB


def card(index: int, name: str = "NVIDIA GeForce RTX 3090", vendor: Vendor = "nvidia") -> Gpu:
    return Gpu(
        index=index,
        name=name,
        vendor=vendor,
        total_bytes=24 * GIB,
        free_bytes=23 * GIB,
        bandwidth_bytes_per_s=936 * GB,
        pcie=Pcie(gen=4, width=16),
        compute_capability="8.6",
        numa_node=index // 2,
    )


GRAPHICS = Gpu(
    index=9,
    name="AMD Radeon Graphics [1002:164e]",
    vendor="amd",
    total_bytes=31 * GIB,
    free_bytes=20 * GIB,
    unified=True,
    integrated=True,
    display=True,
    enabled=False,
)


def rig_of(*gpus: Gpu, links: tuple[Link, ...] = ()) -> Rig:
    return Rig(
        name="this machine",
        source="detected",
        gpus=gpus,
        links=links,
        ram_bytes=128 * GIB,
        ram_free_bytes=100 * GIB,
        ram_bandwidth_bytes_per_s=205 * GB,
        cpu_cores=24,
        psu_watts=1600,
        driver="NVIDIA 580.95.05, CUDA 13.0; amdgpu",
        findings=(Finding(text="GPU 1 has fallen off the bus", hint="reboot"),),
    )


def shown(rig: Rig, width: int = 80) -> list[str]:
    text = io.StringIO()
    console(text, width=width).print(rig_screen(rig, width))
    return text.getvalue().splitlines()


def test_the_whole_screen() -> None:
    """What a person sees, letter by letter."""
    links = (
        Link(gpus=(0, 1), kind="nvlink", n_links=4, path="PHB"),
        Link(gpus=(0, 2), kind="pcie", path="SYS"),
        Link(gpus=(1, 2), kind="pcie-p2p", path="SYS"),
    )
    busy = replace(card(1), processes=("4242 python (3.1 GiB)",), reserve_bytes=GIB)
    assert shown(rig_of(card(0), busy, card(2), GRAPHICS, links=links)) == [
        "rig this machine (detected)",
        "NVIDIA 580.95.05, CUDA 13.0; amdgpu",
        "GPU  name                                   free  bandwidth     PCIe  chip  NUMA",
        "  0  RTX 3090                   23.0 of 24.0 GiB   936 GB/s  4.0 x16   8.6     0",
        "  1  RTX 3090                   23.0 of 24.0 GiB   936 GB/s  4.0 x16   8.6     0",
        "     1.0 GiB kept free, in use by 4242 python (3.1 GiB)",
        "  2  RTX 3090                   23.0 of 24.0 GiB   936 GB/s  4.0 x16   8.6     1",
        "  9  Radeon Graphics [1002:16…  20.0 of 31.0 GiB",
        "     Radeon Graphics [1002:164e], part of the processor, uses the host's RAM,",
        "     drives a display, not used",
        "",
        "links    GPU 0    GPU 1    GPU 2",
        "    0        -      NV4      SYS",
        "    1      NV4        -  P2P SYS",
        "    2      SYS  P2P SYS        -",
        "  NV4: 4 NVLinks between the two",
        "  P2P: reads the other's memory over PCIe",
        "  SYS: between processors",
        "",
        "host RAM 128.0 GiB, 100.0 GiB free, 205 GB/s, 24 cores, power supply 1600 W",
        "! GPU 1 has fallen off the bus: reboot",
    ]


def test_one_card_has_no_links() -> None:
    lines = shown(rig_of(card(0), GRAPHICS))
    assert not any(line.startswith("links") for line in lines)


def test_nobody_knows_how_they_are_joined() -> None:
    assert "links: PCIe, no more is known of them" in shown(rig_of(card(0), card(1)))


@pytest.mark.parametrize("n_cards", [2, 8, 16])
@pytest.mark.parametrize("kind", ["pcie", "pcie-p2p", "nvlink"])
def test_any_number_of_cards_stays_within_the_width(n_cards: int, kind: LinkKind) -> None:
    """Every pair is told, in as many blocks as it takes."""
    name = "NVIDIA RTX PRO 6000 Blackwell Max-Q Workstation Edition"
    pairs = tuple(itertools.combinations(range(n_cards), 2))
    links = tuple(Link(gpus=pair, kind=kind, n_links=18, path="NODE") for pair in pairs)
    lines = shown(rig_of(*(card(index, name) for index in range(n_cards)), links=links))
    assert max(map(len, lines)) <= 80
    assert all(line == line.rstrip() for line in lines)
    word = {"pcie": "NODE", "pcie-p2p": "P2P NODE", "nvlink": "NV18"}[kind]
    table = [line for line in lines if line[:5].strip().isdecimal() and ("-" in line.split() or word in line)]
    assert sum(line.count(word) for line in table) == 2 * len(pairs)
    assert sum(name.removeprefix("NVIDIA ") in line for line in lines) == n_cards


def test_amds_bridge_by_its_own_name() -> None:
    gpus = (card(0, "AMD Instinct MI210", "amd"), card(1, "AMD Instinct MI210", "amd"))
    assert "    0      -   xGMI" in shown(rig_of(*gpus, links=(Link(gpus=(0, 1), kind="nvlink", n_links=1),)))


def test_nothing_known_takes_no_room() -> None:
    bare = Gpu(index=0, name="Apple M4", vendor="apple", total_bytes=48 * GIB, free_bytes=40 * GIB, unified=True)
    lines = shown(Rig(name="m4", source="profile", gpus=(bare,), ram_bytes=64 * GIB, ram_free_bytes=60 * GIB))
    assert lines == [
        "rig m4 (profile)",
        "GPU  name                  free",
        "  0  Apple M4  40.0 of 48.0 GiB",
        "     uses the host's RAM",
        "",
        "host RAM 64.0 GiB, 60.0 GiB free",
    ]


def test_without_a_gpu() -> None:
    assert "no GPU" in shown(rig_of())


def test_nothing_is_lost_without_colour() -> None:
    """What is not used says so in words."""
    assert "not used" in "\n".join(shown(rig_of(card(0), replace(card(1), enabled=False))))


def test_measured_speeds_are_counted_and_told() -> None:
    measured = Measured(
        model="m",
        architecture="llama",
        quantization="Q4_K_M",
        weights_bytes=1,
        runtime="llama.cpp",
        version="b11434",
        mode="pipeline",
        gpus=(0,),
        counts=(33,),
        depth=64,
        tok_s=111.7,
        date="2026-11-23",
    )
    rig = replace(rig_of(card(0)), measured=(measured,))
    assert "1 speed measured (mgpu bench)" in shown(rig)
    (told,) = json.loads(json.dumps(rig_object(rig)))["measured"]
    assert (told["gpus"], told["tok_s"], told["depth"]) == ([0], 111.7, 64)


def test_json_has_all_of_it() -> None:
    link = Link(gpus=(0, 9), kind="nvlink", n_links=4, path="PHB")
    told = json.loads(json.dumps(rig_object(rig_of(replace(card(0), device="Vulkan1"), GRAPHICS, links=(link,)))))
    assert told["links"] == [{"gpus": [0, 9], "kind": "nvlink", "n_links": 4, "path": "PHB"}]
    assert (told["ram_bandwidth_bytes_per_s"], told["cpu_cores"], told["psu_watts"]) == (205 * GB, 24, 1600)
    first, second = told["gpus"]
    assert (first["numa_node"], first["device"], first["pcie_width"]) == (0, "Vulkan1", 16)
    assert (second["integrated"], second["unified"], second["enabled"]) == (True, True, False)
    assert told["findings"] == [{"text": "GPU 1 has fallen off the bus", "hint": "reboot"}]
