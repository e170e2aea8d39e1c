"""What vLLM's `/metrics` says. Format: vLLM 0.32.0 v1/metrics/loggers.py; the names since 0.10."""

from __future__ import annotations

from typing import Final

from mgpu.adapter import Stats
from mgpu_adapters.words import counts, whole

_RUNNING: Final = "vllm:num_requests_running"
_WAITING: Final = "vllm:num_requests_waiting"
_GENERATED: Final = "vllm:generation_tokens_total"

#: Of requests that are finished: from the first token to the last.
_DONE: Final = "vllm:request_generation_tokens_sum"
_DONE_SECONDS: Final = "vllm:request_decode_time_seconds_sum"


def read_metrics(text: str) -> Stats | None:
    """Of all engines together; None for a text that has none of its counters."""
    found = counts(text, frozenset({_RUNNING, _WAITING, _GENERATED, _DONE, _DONE_SECONDS}))
    if not found:
        return None
    return Stats(
        running=whole(found.get(_RUNNING)),
        waiting=whole(found.get(_WAITING)),
        generated=whole(found.get(_GENERATED)),
        generating_s=_seconds(found),
    )


def _seconds(found: dict[str, float]) -> float | None:
    """As long as all tokens took if those of unfinished requests are as fast as the others."""
    done = found.get(_DONE, 0.0)
    if not done or _GENERATED not in found:
        return None
    return found.get(_DONE_SECONDS, 0.0) * found[_GENERATED] / done
