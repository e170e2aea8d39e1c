"""What `mgpu runtimes` does: each runtime as it is here, and what it can do on this rig or on another."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping

import click
from msgspec import Struct

from mgpu.adapter import Adapter, Installed, ListedDevice
from mgpu.decide.abilities import abilities_on
from mgpu.errors import MgpuError, RuntimeMissingError, UsageError
from mgpu.gather import find_installed, list_devices
from mgpu.report.runtimes import Row, runtime_object, runtimes_screen
from mgpu.rig import Rig
from mgpu_adapters.registry import ADAPTER_NAMES, load_adapter, other_names


def show(rig_name: str | None, *, as_json: bool) -> None:
    """The table. `rig_name`: what they could do on that rig; else on this machine as it is."""
    from mgpu_profiles.store import user_store

    adapters = tuple(_adapters())
    found = {adapter.name: _find(adapter, os.environ) for adapter in adapters}
    rig = user_store().load(rig_name) if rig_name is not None else _machine(adapters, found, os.environ)
    rows = tuple(_row(adapter, found[adapter.name], rig, named=rig_name is not None) for adapter in adapters)
    if as_json:
        told = {"schema": 1, "rig": rig.name, "runtimes": [runtime_object(row) for row in rows]}
        click.echo(json.dumps(told, indent=2))
        return
    from mgpu.report.screen import console

    out = console()
    out.print(runtimes_screen(rows, rig, out.width))


def _adapters() -> Iterator[Adapter]:
    """Ours, then other packages'; one that cannot be loaded is said, and left out."""
    for name in (*ADAPTER_NAMES, *other_names()):
        try:
            yield load_adapter(name)
        except (RuntimeMissingError, UsageError) as error:
            click.echo(f"  note: {error.message}; {error.hint}", err=True)


class _Found(Struct, frozen=True, kw_only=True):
    """A runtime with the devices it lists; `missing`: what is wrong with one that cannot be used."""

    installed: Installed | None = None
    listed: tuple[ListedDevice, ...] = ()
    missing: str = ""


def _find(adapter: Adapter, environ: Mapping[str, str]) -> _Found:
    try:
        installed = find_installed(adapter, None, environ)
        listed = () if installed is None else list_devices(adapter, installed, environ)
    except MgpuError as error:  # broken, too old, not answering: a row like any other
        return _Found(missing=error.message)
    return _Found(installed=installed, listed=listed)


def _machine(adapters: tuple[Adapter, ...], found: Mapping[str, _Found], environ: Mapping[str, str]) -> Rig:
    """This machine by its drivers; where they tell nothing, by the first runtime's list that has devices."""
    from mgpu.detect.machine import detect_rig

    lists = [found[adapter.name].listed for adapter in adapters]
    return detect_rig(environ, listed=lambda: next((listed for listed in lists if listed), ()))


def _row(adapter: Adapter, found: _Found, rig: Rig, *, named: bool) -> Row:
    """`named`: a rig that is not this machine, of whose devices the runtime here knows nothing."""
    bind = found.installed is not None and adapter.device_probe is not None and not named
    listed = found.listed or (found.installed.devices if found.installed else None) or ()
    return Row(
        runtime=adapter.name,
        formats=tuple(sorted(adapter.formats)),
        abilities=adapter.abilities,
        installed=found.installed,
        missing=found.missing,
        install=adapter.search.install,
        here=abilities_on(
            adapter,
            rig,
            adapter.bind(rig, found.listed) if bind else None,
            cpu_build=found.installed is not None and found.installed.cpu_build,
        ),
        devices=tuple(f"{device.device} {device.description}".strip() for device in listed),
    )
