"""When what has died is started again: sooner at first, then later, and not for ever. Pure; time is given."""

from __future__ import annotations

from typing import Final

PAUSES_S: Final = (1.0, 2.0, 4.0, 8.0, 15.0, 30.0, 60.0)
MOST: Final = 7  # in a row

#: One that has lived this long starts counting anew.
LONG_S: Final = 600.0


class Restarts:
    """Failures in a row. `in_a_row`: so far."""

    def __init__(self) -> None:
        self.in_a_row = 0

    def failed(self, lived_s: float) -> float | None:
        """Seconds until it is to be started again; None: it is not. `lived_s`: how long it had been ready."""
        self.in_a_row = 1 if lived_s >= LONG_S else self.in_a_row + 1
        return None if self.in_a_row > MOST else PAUSES_S[min(self.in_a_row, len(PAUSES_S)) - 1]
