"""What `mgpu doctor` does: gather, check, show."""

from __future__ import annotations

import json
import os

import click

from mgpu.doctor.checks.all import examine
from mgpu.doctor.gather import gather
from mgpu.errors import ProfileError
from mgpu.report.doctor import doctor_object, doctor_screen


def show(*, as_json: bool) -> int:
    """Print what was found; returns the exit code: 0, or that of rig problems where something does not work."""
    facts = gather(os.environ)
    found = examine(facts)
    if as_json:
        click.echo(json.dumps(doctor_object(found), indent=2))
    else:
        from mgpu.report.screen import console

        out = console()
        out.print(doctor_screen(found, facts.cards.rig, out.width))
    return ProfileError.exit_code if any(one.severity == "error" for one in found) else 0
