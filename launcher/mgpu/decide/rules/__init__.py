"""The guide's rules as verdicts: each a pure function of what was weighed, with the figures it used in its text."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from msgspec.structs import replace

from mgpu.decide.rules.cards import (
    display_card,
    fastest_card,
    fewest_cards,
    fits_one_card,
    two_cheap_cards,
    use_what_you_own,
)
from mgpu.decide.rules.machine import cpu_offload_last, more_quant, network_last, psu, runtime_choice, slow_slot
from mgpu.decide.rules.modes import many_users, mixed_is_pipeline, split_by_layers, tensor_when_matched
from mgpu.decide.rules.ruling import MIN_TOK_S, Ruling, label
from mgpu.plan import RuleVerdict

__all__ = ["MIN_TOK_S", "RULES", "Ruling", "label", "verdicts"]

#: In the order in which they are shown: which cards, how they share, what the machine has to say.
RULES: Final[tuple[Callable[[Ruling], RuleVerdict], ...]] = (
    fits_one_card,
    fastest_card,
    fewest_cards,
    use_what_you_own,
    mixed_is_pipeline,
    tensor_when_matched,
    split_by_layers,
    many_users,
    cpu_offload_last,
    more_quant,
    two_cheap_cards,
    runtime_choice,
    slow_slot,
    display_card,
    psu,
    network_last,
)


def verdicts(ruling: Ruling) -> tuple[RuleVerdict, ...]:
    """What each rule says, in order; the one that refuses the plan says so."""
    said = (rule(ruling) for rule in RULES)
    return tuple(
        replace(verdict, verdict="refuses", quiet=False) if verdict.id == ruling.refused_by else verdict
        for verdict in said
    )
