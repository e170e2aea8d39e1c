"""The runtimes that are installed or running, each asked in bounded time."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from mgpu.adapter import Adapter, Installed, ListedDevice
from mgpu.doctor.facts import Program
from mgpu.errors import MgpuError
from mgpu.gather import find_installed, list_devices
from mgpu_adapters.registry import ADAPTER_NAMES, load_adapter, other_names

_QUESTION_S: Final = 6.0
_DEVICES_S: Final = 15.0  # opens every GPU


def program_names() -> tuple[str, ...]:
    """Ours, then other packages'."""
    return (*ADAPTER_NAMES, *other_names())


def look_at_program(name: str, environ: Mapping[str, str]) -> Program:
    """One runtime as it is here."""
    try:
        adapter = load_adapter(name)
    except MgpuError as error:
        return Program(runtime=name, missing=error.message, hint=error.hint)
    try:
        installed = find_installed(adapter, None, environ, timeout_s=_QUESTION_S)
    except MgpuError as error:  # broken, too old, an address that is none
        return Program(runtime=name, adapter=adapter, missing=error.message, hint=error.hint)
    if installed is None or adapter.device_probe is None:
        return Program(runtime=name, adapter=adapter, installed=installed)
    return _with_devices(name, adapter, installed, environ)


def _with_devices(name: str, adapter: Adapter, installed: Installed, environ: Mapping[str, str]) -> Program:
    try:
        listed: tuple[ListedDevice, ...] = list_devices(adapter, installed, environ, timeout_s=_DEVICES_S)
    except MgpuError as error:
        return Program(runtime=name, adapter=adapter, installed=installed, missing=error.message, hint=error.hint)
    return Program(runtime=name, adapter=adapter, installed=installed, listed=listed)
