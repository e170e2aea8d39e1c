"""Loaded by an mgpu that a test starts with this folder on PYTHONPATH: shorter waits, and a clock that jumps.

MGPU_TUNED   JSON of dotted names to numbers: {"mgpu.launch.keeper.BEAT_S": 0.2}
MGPU_CLOCK   a file; the seconds in it are added to what the system says the time is, now and at each later look
"""

from __future__ import annotations

import json
import os
import sys
import time
from importlib import import_module
from pathlib import Path


def _tune(settings: dict[str, float]) -> None:
    for dotted, value in settings.items():
        module, _, name = dotted.rpartition(".")
        if not hasattr(import_module(module), name):
            sys.exit(f"tests/tuned: there is no {dotted}")
        setattr(import_module(module), name, value)


def _shift(clock: Path) -> None:
    real = time.time

    def shifted() -> float:
        return real() + float(clock.read_text() or 0)

    time.time = shifted


if "mgpu" in sys.orig_argv[:5]:
    if "MGPU_CLOCK" in os.environ:
        _shift(Path(os.environ["MGPU_CLOCK"]))
    _tune(json.loads(os.environ.get("MGPU_TUNED", "{}")))
