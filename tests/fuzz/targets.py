"""All targets. A parser more is a line more in one of these modules' `TARGETS`."""

from __future__ import annotations

from typing import Final

from fuzz import answers, http, machine, models, profiles, texts
from fuzz.target import Target

TARGETS: Final[tuple[Target, ...]] = (
    *models.TARGETS, *profiles.TARGETS, *answers.TARGETS, *texts.TARGETS, *machine.TARGETS, *http.TARGETS,
)  # fmt: skip
