"""What was simulated once, and what follows from it for other contexts.

A compute buffer is the largest of sums that each grow in proportion to the context (masks, scores, converted caches),
so it is convex in the context: where three contexts lie on a line, so do all between the outer two.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Callable, Hashable

Sizes = tuple[int, ...]


class Remembered:
    """Sizes by kind of question and context."""

    def __init__(self) -> None:
        self._points: dict[Hashable, list[tuple[int, Sizes]]] = {}

    def sizes(self, question: Hashable, n_ctx: int, simulate: Callable[[], Sizes]) -> Sizes:
        """Known, or read off a line through three known contexts, or simulated and kept."""
        points = self._points.setdefault(question, [])
        at = bisect_left(points, (n_ctx,))
        if at < len(points) and points[at][0] == n_ctx:
            return points[at][1]
        line = _line_through(points, n_ctx)
        if line is not None:
            return line
        sizes = simulate()
        insort(points, (n_ctx, sizes))
        return sizes


def _line_through(points: list[tuple[int, Sizes]], n_ctx: int) -> Sizes | None:
    """Sizes at `n_ctx`, if it lies between the outer two of three contexts on one line."""
    if len(points) < 3 or not points[0][0] < n_ctx < points[-1][0]:
        return None
    (first, low), (last, high) = points[0], points[-1]
    middle, known = points[len(points) // 2]
    if _between(first, low, last, high, middle) != known:
        return None
    return _between(first, low, last, high, n_ctx)


def _between(first: int, low: Sizes, last: int, high: Sizes, n_ctx: int) -> Sizes:
    share, whole = n_ctx - first, last - first
    return tuple(a + (b - a) * share // whole for a, b in zip(low, high, strict=True))
