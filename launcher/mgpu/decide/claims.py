"""Memory that is free now and will not be: promised to another launch, or found missing by the last try."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from msgspec import Struct
from msgspec.structs import replace

from mgpu.rig import Finding, Gpu, Rig
from mgpu.units import MIB, gib, gib_of

#: Claims on RAM have this for a card.
HOST: Final = "host"

#: Less than this is not worth a word: of a card, and of the RAM that is free.
_WORTH_A_WORD: Final = 64 * MIB
_WORTH_A_WORD_OF_RAM: Final = 0.05


class Claim(Struct, frozen=True, kw_only=True):
    """So many bytes of one card (`card_key`) or of `HOST`. `why`: "promised to qwen, which is loading".

    `leaves`: it claims all but `n_bytes`, however much there is.
    """

    key: str
    n_bytes: int
    why: str
    leaves: bool = False


def card_key(gpu: Gpu) -> str:
    """What a card is called by every mgpu on this machine, whichever of its cards that one sees."""
    return gpu.uuid or gpu.pci_bus_id or gpu.device or f"{gpu.index}:{gpu.name}"


def with_claims(rig: Rig, claims: Sequence[Claim]) -> Rig:
    """`rig` with what is left beside `claims`, and a finding for each that takes something."""
    if not claims:
        return rig
    findings = list(rig.findings)
    free = [_left(card_key(gpu), f"GPU {gpu.index}", gpu.free_bytes, claims, findings) for gpu in rig.gpus]
    gpus = tuple(
        gpu if left == gpu.free_bytes else replace(gpu, free_bytes=left)
        for gpu, left in zip(rig.gpus, free, strict=True)
    )
    ram = _left(HOST, "RAM", rig.ram_free_bytes, claims, findings)
    return replace(rig, gpus=gpus, ram_free_bytes=ram, findings=tuple(findings))


def _left(key: str, name: str, free: int, claims: Sequence[Claim], findings: list[Finding]) -> int:
    ours = [claim for claim in claims if claim.key == key and claim.n_bytes > 0]
    worth_a_word = max(_WORTH_A_WORD, _WORTH_A_WORD_OF_RAM * free if key == HOST else 0)
    for claim in ours:
        if not claim.leaves:
            free = max(free - claim.n_bytes, 0)
            if claim.n_bytes >= worth_a_word:
                findings.append(Finding(text=f"{name}: {gib(claim.n_bytes)} of it are {claim.why}"))
    limit = min((claim for claim in ours if claim.leaves), key=lambda claim: claim.n_bytes, default=None)
    if limit is None or limit.n_bytes >= free:
        return free
    findings.append(Finding(text=f"{name}: planned with {gib_of(limit.n_bytes, free)}, as {limit.why}"))
    return limit.n_bytes
