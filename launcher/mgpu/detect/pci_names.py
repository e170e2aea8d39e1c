"""Names of AMD's and Intel's cards by PCI id, for cards whose specification is known (`mgpu_profiles.gpus`).

AMD: data/amdgpu.ids of Mesa's libdrm (MIT), 2026. Intel: include/pci_ids/ of Mesa (MIT) and the PCI ID repository.
Other AMD cards are named by the system's own copy of amdgpu.ids.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

from mgpu.detect.sysfs import DrmCard, read_text

#: By product and revision: one chip is sold under several names.
_AMD: Final = {
    (0x1586, 0xC1): "Radeon 8060S Graphics",
    (0x1586, 0xC2): "Radeon 8050S Graphics",
    (0x66A1, 0x02): "Instinct MI60 / MI50",
    (0x66A1, 0x06): "Radeon Pro VII",
    (0x66AF, 0xC1): "Radeon VII",
    (0x738C, 0x01): "Instinct MI100",
    (0x73A1, 0x00): "Radeon Pro V620",
    (0x73A3, 0x00): "Radeon Pro W6800",
    (0x73A5, 0xC0): "Radeon RX 6950 XT",
    (0x73AF, 0xC0): "Radeon RX 6900 XT",
    (0x73BF, 0xC0): "Radeon RX 6900 XT",
    (0x73BF, 0xC1): "Radeon RX 6800 XT",
    (0x73BF, 0xC3): "Radeon RX 6800",
    (0x73DF, 0xC1): "Radeon RX 6700 XT",
    (0x73DF, 0xC5): "Radeon RX 6700 XT",
    (0x7408, 0x00): "Instinct MI250X",
    (0x740C, 0x01): "Instinct MI250X / MI250",
    (0x740F, 0x02): "Instinct MI210",
    (0x7448, 0x00): "Radeon Pro W7900",
    (0x7449, 0x00): "Radeon Pro W7800 48GB",
    (0x744A, 0x00): "Radeon Pro W7900 Dual Slot",
    (0x744C, 0xC8): "Radeon RX 7900 XTX",
    (0x744C, 0xCC): "Radeon RX 7900 XT",
    (0x744C, 0xCE): "Radeon RX 7900 GRE",
    (0x744C, 0xCF): "Radeon RX 7900M",
    (0x745E, 0xCC): "Radeon Pro W7800",
    (0x747E, 0xC8): "Radeon RX 7800 XT",
    (0x747E, 0xFF): "Radeon RX 7700 XT",
    (0x7480, 0xC0): "Radeon RX 7600 XT",
    (0x7480, 0xCF): "Radeon RX 7600",
    (0x74A1, 0x00): "Instinct MI300X",
    (0x74A5, 0x00): "Instinct MI325X",
    (0x7550, 0xC0): "Radeon RX 9070 XT",
    (0x7550, 0xC3): "Radeon RX 9070",
    (0x7551, 0xC0): "Radeon AI PRO R9700",
    (0x7590, 0xC0): "Radeon RX 9060 XT",
    (0x75A0, 0x00): "Instinct MI350X",
    (0x75A3, 0x00): "Instinct MI355X",
}

_INTEL: Final = {
    0x5690: "Arc A770M",
    0x5691: "Arc A730M",
    0x5692: "Arc A550M",
    0x5693: "Arc A370M",
    0x5694: "Arc A350M",
    0x56A0: "Arc A770",
    0x56A1: "Arc A750",
    0x56A2: "Arc A580",
    0x56A5: "Arc A380",
    0x56A6: "Arc A310",
    0xE20B: "Arc B580",
    0xE20C: "Arc B570",
    0xE211: "Arc Pro B60",
    0xE212: "Arc Pro B50",
    0xE223: "Arc Pro B70",
}

_AMDGPU_IDS: Final = "usr/share/libdrm/amdgpu.ids"
_MOST: Final = 1 << 18


def amd_name(card: DrmCard, root: Path) -> str:
    """`"AMD Radeon RX 7900 XTX"`; where nobody knows the card, what it says of itself, or its PCI id."""
    known = _AMD.get((card.product, card.revision))
    if known:
        return f"AMD {known}"
    own = read_text(card.device / "product_name").partition("\n")[0]  # written into the board by its maker
    own = "".join(letter for letter in own if letter.isprintable()).strip()
    return _listed(card, root) or own or f"AMD GPU [{card.pci_id}]"


def _listed(card: DrmCard, root: Path) -> str:
    """The name in lines like `744C,\tC8,\tAMD Radeon RX 7900 XTX`."""
    wanted = [f"{card.product:04X}", f"{card.revision:02X}"]
    for line in read_text(root / _AMDGPU_IDS, _MOST).splitlines():
        parts = [part.strip() for part in line.split(",", 2)]
        if parts[:2] == wanted and len(parts) == 3:
            return parts[2]
    return ""


def intel_name(card: DrmCard) -> str:
    """`"Intel Arc A770"`, or its PCI id."""
    known = _INTEL.get(card.product)
    return f"Intel {known}" if known else f"Intel Graphics [{card.pci_id}]"
