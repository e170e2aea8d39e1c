"""What the processes of a launch are, and what of the cards is theirs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Final

from msgspec.structs import replace

from mgpu.detect.live import CardNow
from mgpu.launch.care import Started
from mgpu.launch.identity import Identity, identify
from mgpu.launch.records import Card
from mgpu.launch.verify import Reported

_MOST_MEMBERS: Final = 256


def members_of(pids: Iterable[int], started: Sequence[Started]) -> tuple[Identity, ...]:
    """What the runtimes have started: some of it may outlive them, in groups and sessions of its own."""
    roots = {watch.child.pid for watch, _ in started}
    found = (identify(pid) for pid in sorted(set(pids) - roots)[:_MOST_MEMBERS])
    return tuple(identity for identity in found if identity is not None)


def with_reported(card: Card, told: Reported | None) -> Card:
    return card if told is None else replace(card, reported=told.n_bytes, reported_planned=told.planned)


def with_taken(card: Card, n_bytes: int) -> Card:
    n_bytes = min(n_bytes, card.planned)
    return card if n_bytes == card.taken else replace(card, taken=n_bytes)


def pids_of(started: Sequence[Started]) -> set[int]:
    return {pid for watch, _ in started for pid in watch.child.family()}


def held_by(cards: Iterable[CardNow], pids: set[int]) -> dict[int, int]:
    """Bytes of each card (by rig index) that these processes hold; without those whose driver names none of them."""
    by_card = {card.index: [size for pid, size in card.by_pid.items() if pid in pids] for card in cards}
    return {index: sum(own) for index, own in by_card.items() if own}
