"""The ways between the cards, and between them and the processor."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from mgpu.detect.nvidia_state import NvidiaState, PairState
from mgpu.doctor.facts import Facts
from mgpu.doctor.finding import Finding, ok
from mgpu.units import gib, gib_of

_OK: Final = 0  # nvmlGpuP2PStatus_t
_WHY: Final = {
    1: "the chipset does not support it",
    2: "the card does not support it",
    3: "the cards hang on different I/O hubs",
    4: "it is turned off in the driver's settings",
    5: "the driver does not allow it",
}
_SWITCHED_OFF: Final = 4
_NCCL: Final = "NCCL user guide, Troubleshooting: PCI Access Control Services"

#: GeForce cards have had large BARs since Ampere.
_FIRST_REBAR: Final = (8, 0)


def p2p(facts: Facts) -> Iterator[Finding]:
    """Whether cards read each other's memory without going through RAM."""
    state = facts.cards.nvidia
    if state is None or not state.pairs:
        return
    without = [pair for pair in state.pairs if _OK not in {pair.read, pair.nvlink} and pair.read is not None]
    if not without:
        if any(pair.read == _OK for pair in state.pairs):
            yield ok("links", "p2p", "the cards reach each other's memory")
        return
    geforce = all("GeForce" in card.name for card in state.cards)
    why = _WHY.get(without[0].read or 0, "the driver does not say why")
    text = f"no P2P between {_pair_words(without)}: {why}"
    if geforce:
        text += ", as usual for GeForce; tensor ranks meet in RAM"
        fix = "nothing: a split by layers does without it"
    elif without[0].read == _SWITCHED_OFF:
        fix = "look for NVreg_RegistryDwords in /etc/modprobe.d"
    else:
        fix = "turn the IOMMU or ACS off in the firmware, and put the cards below one processor: nvidia-smi topo -m"
    yield Finding(severity="note" if geforce else "warning", area="links", id="p2p", text=text, fix=fix, source=_NCCL)


def patched_driver(facts: Facts) -> Iterator[Finding]:
    """GeForce cards with P2P over PCIe: NVIDIA's own driver does not give it to them."""
    state = facts.cards.nvidia
    if state is None or not all("GeForce" in card.name for card in state.cards):
        return
    odd = [pair for pair in state.pairs if pair.read == _OK and pair.nvlink != _OK]
    if odd:
        yield Finding(
            severity="note",
            area="links",
            id="patched-driver",
            text=f"P2P over PCIe between {_pair_words(odd)}: on GeForce cards only a patched driver gives that",
            fix="if answers are gibberish or ranks hang: NCCL_P2P_DISABLE=1, EXLLAMA_NO_P2P_COPY=1",
            source="exllamav3 #333, vllm #8087",
        )


def iommu(facts: Facts) -> Iterator[Finding]:
    """It sends P2P over the processor, where it is slow, or gets lost."""
    cards = [card for card in facts.cards.graphics if card.vendor in {"nvidia", "amd"}]
    if len(cards) < 2:
        return
    behind = [card for card in cards if card.translated]
    if not behind:
        yield ok("links", "iommu", "no IOMMU between the cards")
        return
    peers = any(link.kind == "pcie-p2p" for link in facts.cards.rig.links)
    yield Finding(
        severity="warning" if peers else "note",
        area="links",
        id="iommu",
        text=f"the IOMMU translates for {len(behind)} cards: P2P over PCIe is slow then, or hangs",
        fix="add iommu=pt to the kernel's command line, or turn VT-d / AMD-Vi and ACS off in the firmware",
        source=_NCCL,
    )


def nvlink(facts: Facts) -> Iterator[Finding]:
    """Links that the cards have and that nothing uses."""
    state = facts.cards.nvidia
    linked = [card for card in state.cards if card.nvlinks] if state else []
    if state is None or len(linked) < 2:
        return
    for card in linked:
        active = sum(card.nvlinks)
        if 0 < active < len(card.nvlinks):
            yield Finding(
                severity="warning",
                area="links",
                id="nvlink",
                text=f"{active} of {len(card.nvlinks)} NVLinks of GPU {card.index} ({card.name}) are active",
                fix="reseat the bridge with the power off; nvidia-smi nvlink --status, and -e for errors",
            )
    if not any(any(card.nvlinks) for card in linked):
        names = ", ".join(f"GPU {card.index}" for card in linked)
        yield Finding(
            severity="note",
            area="links",
            id="nvlink",
            text=f"{names} could be joined by NVLink, and no link is active: no bridge, or one that has no contact",
            fix="a bridge pays for tensor ranks and fast prompts; if there is one, reseat it",
        )
    elif all(all(card.nvlinks) for card in linked):
        yield ok("links", "nvlink", "every NVLink is active" + _unused_nvlink(state))


def large_bar(facts: Facts) -> Iterator[Finding]:
    """Resizable BAR: the processor, and other cards, reach all of a card's memory."""
    small = [*_small_nvidia(facts.cards.nvidia), *_small_amd(facts)]
    if small:
        yield Finding(
            severity="note",
            area="links",
            id="large-bar",
            text=f"only {', '.join(small)} can be reached at a time: Resizable BAR is off; loading is slower, no P2P",
            fix="turn on Above 4G Decoding and Resizable BAR in the firmware (and CSM off)",
        )
    elif any(card.visible for card in facts.cards.graphics) or _bars(facts.cards.nvidia):
        yield ok("links", "large-bar", "the cards' whole memory can be reached")


def _unused_nvlink(state: NvidiaState) -> str:
    return "" if any(pair.nvlink == _OK for pair in state.pairs) else ", and used for no pair"


def _small_nvidia(state: NvidiaState | None) -> Iterator[str]:
    for card in state.cards if state else ():
        known = card.bar1_bytes and card.total_bytes and (card.compute_capability or (0, 0)) >= _FIRST_REBAR
        if known and 2 * (card.bar1_bytes or 0) < (card.total_bytes or 0):
            yield f"{gib(card.bar1_bytes or 0)} of GPU {card.index}'s {gib(card.total_bytes or 0)}"


def _small_amd(facts: Facts) -> Iterator[str]:
    numbers = {gpu.pci_bus_id: gpu.index for gpu in facts.cards.rig.gpus if not gpu.integrated}
    for card in facts.cards.graphics:
        if card.address in numbers and card.visible and card.vram and 2 * card.visible < card.vram:
            yield f"{gib_of(card.visible, card.vram)} of GPU {numbers[card.address]}"


def _bars(state: NvidiaState | None) -> bool:
    return any(card.bar1_bytes for card in state.cards) if state else False


def _pair_words(pairs: list[PairState]) -> str:
    words = [f"GPU {pair.gpus[0]} and {pair.gpus[1]}" for pair in pairs[:3]]
    return ", ".join(words) + (f" and {len(pairs) - 3} other pairs" if len(pairs) > 3 else "")


CHECKS: Final = (p2p, patched_driver, iommu, nvlink, large_bar)
