"""What llama-server's `/metrics` says. Format: llama.cpp b11434 tools/server/server-task.cpp; the names since 2024.

Its counters have six digits: from a million on, small differences between two looks are rounded.
"""

from __future__ import annotations

from typing import Final

from mgpu.adapter import Stats
from mgpu_adapters.words import counts, whole

_RUNNING: Final = "llamacpp:requests_processing"
_WAITING: Final = "llamacpp:requests_deferred"
_GENERATED: Final = "llamacpp:tokens_predicted_total"
_SECONDS: Final = "llamacpp:tokens_predicted_seconds_total"


def read_metrics(text: str) -> Stats | None:
    """None for a text that has none of its counters."""
    found = counts(text, frozenset({_RUNNING, _WAITING, _GENERATED, _SECONDS}))
    if not found:
        return None
    return Stats(
        running=whole(found.get(_RUNNING)),
        waiting=whole(found.get(_WAITING)),
        generated=whole(found.get(_GENERATED)),
        generating_s=found.get(_SECONDS),
    )
