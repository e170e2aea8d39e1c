"""What `mgpu rig …` does: the machine as detected, and the saved profiles."""

from __future__ import annotations

import json
import os

import click
from msgspec.structs import replace

from mgpu.errors import ProfileError
from mgpu.gather import detect
from mgpu.rig import Rig
from mgpu_profiles.match import check as compare
from mgpu_profiles.store import user_store


def show(name: str | None, *, as_json: bool) -> None:
    """This machine, or a profile."""
    rig = user_store().load(name) if name is not None else _machine()
    if as_json:
        from mgpu.report.as_json import rig_object

        click.echo(json.dumps({"schema": 1, "rig": rig_object(rig)}, indent=2))
        return
    from mgpu.report.screen import console
    from mgpu.report.tables import rig_screen

    out = console()
    out.print(rig_screen(rig, out.width))


def save(name: str, *, overwrite: bool) -> None:
    """This machine as a profile."""
    saved = user_store().save(replace(_machine(), name=name, source="profile"), name, overwrite=overwrite)
    for warning in saved.warnings:
        click.echo(f"  note: {warning}", err=True)
    click.echo(f"saved as {saved.path}")


def list_all() -> None:
    """Every profile, the default marked."""
    store = user_store()
    default = store.default()
    for profile in store.names():
        mark = "*" if profile.name == default else " "
        click.echo(f"{mark} {profile.name:<20} {profile.origin}")


def use(name: str | None) -> None:
    """Make a profile the default, or none."""
    user_store().use(name)
    click.echo("plans are for this machine as detected" if name is None else f"plans are for rig {name}")


def check(name: str | None) -> None:
    """Compare a profile with this machine; raises `ProfileError` where it does not match."""
    store = user_store()
    name = name or store.default()
    if name is None:
        raise ProfileError("there is no default profile to check", hint="name one: mgpu rig check NAME")
    differences = compare(store.load(name), _machine())
    for difference in differences:
        click.echo(f"{difference.severity}: {difference.text}")
    errors = [difference for difference in differences if difference.severity == "error"]
    if errors:
        raise ProfileError(
            f"rig {name!r} is not this machine: {len(errors)} of its facts differ",
            hint="`mgpu rig save` writes a profile of this machine",
        )
    click.echo(f"rig {name} matches this machine")


def remove(name: str) -> None:
    """Remove a saved profile."""
    for line in user_store().remove(name):
        click.echo(f"  note: {line}", err=True)
    click.echo(f"removed {name}")


def _machine() -> Rig:
    from mgpu_adapters.registry import load_adapter

    return detect(load_adapter("llama.cpp"), os.environ)
