"""Which sets of matched cards are looked at: the best linked of each size, and none in a slow slot if it can be."""

from __future__ import annotations

import time
from itertools import combinations

import pytest
from msgspec.structs import replace

from mgpu.decide.matched import matched_sets
from mgpu.rig import Link, LinkKind, Pcie
from planning import card, rig_of

FAST, RISER = Pcie(gen=4, width=8), Pcie(gen=3, width=1)


def link(a: int, b: int, kind: LinkKind = "nvlink") -> Link:
    return Link(gpus=(a, b), kind=kind)


def test_a_card_on_a_riser_is_left_out() -> None:
    gpus = (card(0, 24, 936, pcie=RISER), card(1, 24, 936, pcie=FAST), card(2, 24, 936, pcie=FAST))
    sets = [tuple(gpu.index for gpu in cards) for cards in matched_sets(gpus, rig_of(*gpus))]
    assert sets == [(1, 2)]


@pytest.mark.parametrize("n", [4, 12])
def test_bridged_pairs_come_first(n: int) -> None:
    """Bridges between 1 and 3 only; with many cards not every set is looked at, and this one is found all the same."""
    gpus = tuple(card(i, 24, 936, pcie=FAST) for i in range(n))
    first = next(iter(matched_sets(gpus, replace(rig_of(*gpus), links=(link(1, 3),)))))
    assert [gpu.index for gpu in first] == [1, 3]


def test_every_size_once_and_in_order() -> None:
    gpus = tuple(card(i, 24, 936, pcie=FAST) for i in range(5))
    assert [len(cards) for cards in matched_sets(gpus, rig_of(*gpus))] == [2, 3, 4, 5]


def test_sixteen_cards_take_no_time() -> None:
    """All sets of sixteen cards would be 65 thousand."""
    gpus = tuple(card(i, 24, 936, pcie=FAST) for i in range(16))
    links = tuple(link(a, b, "pcie-p2p") for a, b in combinations(range(16), 2))
    rig = replace(rig_of(*gpus), links=links)
    start = time.perf_counter()
    assert len(list(matched_sets(gpus, rig))) == 15
    assert time.perf_counter() - start < 1
