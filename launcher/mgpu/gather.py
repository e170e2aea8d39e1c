"""Facts come in: the model, the runtime that is installed, and the rig to plan for. Nothing is decided here."""

from __future__ import annotations

import functools
from collections.abc import Mapping

from msgspec import Struct
from msgspec.structs import replace

from mgpu.adapter import Adapter, Installed, ListedDevice, Probe
from mgpu.decide.claims import Claim, with_claims
from mgpu.errors import ProfileError, RuntimeMissingError
from mgpu.rig import Rig
from mgpu.service import Service

#: Where no service is: port 9 is for discarding, and closed.
_NOWHERE = "127.0.0.1:9"


class Facts(Struct, frozen=True, kw_only=True):
    """A runtime and a rig that go together. `installed` may be assumed where nothing will be launched."""

    adapter: Adapter
    installed: Installed
    rig: Rig
    notes: tuple[str, ...] = ()


def gather(
    adapter: Adapter,
    *,
    rig_name: str | None,
    launching: bool,
    explicit: str | None,
    environ: Mapping[str, str],
    claims: tuple[Claim, ...] = (),
) -> Facts:
    """What a plan needs to know beside the model. `claims` on this machine's memory, beside those of other launches.

    `rig_name`: `--rig`; None: the default profile if there is one, else this machine as it is. A rig that was named is
    planned for as it stands, without asking anything of this machine, unless it is to be `launching` here.
    Raises `RuntimeMissingError` when `launching` without a runtime, `ProfileError` for a profile that does not match.
    """
    from mgpu_profiles.store import user_store

    store = user_store()
    name = rig_name or store.default()
    if rig_name is not None and not launching:
        installed = _installed(adapter, explicit, environ) if explicit else adapter.assumed()
        return Facts(adapter=adapter, installed=installed, rig=store.load(rig_name))
    here = _here(adapter, explicit=explicit, launching=launching, environ=environ, claims=claims)
    if name is None:
        return here
    profile = store.load(name)
    differences = _differences(profile, here.rig)
    if not differences:
        return _with_profile(here, profile)
    if launching:
        raise ProfileError(
            f"rig {name!r} is not this machine: {differences[0]}",
            hint="add --dry-run to plan for it all the same, or see `mgpu rig check`",
        )
    # The default profile names another machine: plan for that one, as if --rig had.
    note = f"planned for the default rig {name!r}, which is not this machine: {differences[0]}"
    return Facts(adapter=adapter, installed=here.installed, rig=profile, notes=(note,))


def detect(adapter: Adapter, environ: Mapping[str, str]) -> Rig:
    """This machine, as the installed runtime of `adapter` could use it; without a runtime, as its drivers tell."""
    return _here(adapter, explicit=None, launching=False, environ=environ).rig


def gather_here(adapter: Adapter, *, explicit: str | None, environ: Mapping[str, str]) -> Facts:
    """This machine and its runtime, whatever profiles say. Raises `RuntimeMissingError` without a runtime."""
    return _here(adapter, explicit=explicit, launching=True, environ=environ)


def find_installed(
    adapter: Adapter, explicit: str | None, environ: Mapping[str, str], *, timeout_s: float | None = None
) -> Installed | None:
    """The runtime as found, asked for its flags; or as it runs already; None when there is neither.

    `timeout_s`: for each question that a program is asked, where that is not to be the usual.
    Raises `RuntimeMissingError` for one that cannot be used, `UsageError` for an address that is none.
    """
    if adapter.service is not None:
        return _find_service(adapter, adapter.service, environ, timeout_s)
    probe = _probe(adapter, explicit, environ, timeout_s)
    return None if probe is None else adapter.installed(probe)


def _find_service(
    adapter: Adapter, service: Service, environ: Mapping[str, str], timeout_s: float | None
) -> Installed | None:
    """What runs, and what could be started beside it; an executable is asked of itself, not of what runs."""
    from mgpu.launch.services import find_service

    running = find_service(service, environ)
    try:
        probe = _beside(adapter, service, environ, timeout_s)
    except RuntimeMissingError:
        if running is None:
            raise
        probe = None  # a broken program does not matter where another one runs
    if running is None:
        return None if probe is None else adapter.installed(probe)
    if probe is None:
        probe = Probe(executable=running.url, origin=running.origin, outputs={})
    return adapter.installed(replace(probe, url=running.url, outputs={**probe.outputs, **running.outputs}))


def _beside(adapter: Adapter, service: Service, environ: Mapping[str, str], timeout_s: float | None) -> Probe | None:
    if not adapter.probes:
        return None
    return _probe(adapter, None, {**environ, service.variable: _NOWHERE}, timeout_s)


def _probe(adapter: Adapter, explicit: str | None, environ: Mapping[str, str], timeout_s: float | None) -> Probe | None:
    from mgpu.launch.find import find_runtime
    from mgpu.launch.probe import PROBE_TIMEOUT_S, probe_runtime

    found = find_runtime(adapter.search, explicit=explicit, environ=environ)
    if found is None:
        return None
    return probe_runtime(found, adapter.probes, environ=environ, timeout_s=timeout_s or PROBE_TIMEOUT_S)


def _installed(adapter: Adapter, explicit: str | None, environ: Mapping[str, str]) -> Installed:
    installed = find_installed(adapter, explicit, environ)
    if installed is None and adapter.service is not None:
        raise _not_running(adapter, adapter.service, environ)
    if installed is None:
        raise RuntimeMissingError(
            f"no {adapter.search.executables[0]} found {adapter.search.looked}",
            hint=f"install it: {adapter.search.install}",
        )
    return installed


def _not_running(adapter: Adapter, service: Service, environ: Mapping[str, str]) -> RuntimeMissingError:
    from mgpu.launch.services import service_url

    url, origin = service_url(service, environ)
    where = f"{url}{f' ({origin})' if origin.startswith('$') else ''}"
    if not adapter.probes:
        return RuntimeMissingError(
            f"no {adapter.name} answers at {where}", hint=service.start or f"install it: {adapter.search.install}"
        )
    return RuntimeMissingError(
        f"no {adapter.name} answers at {where}, and there is none on PATH or in ${adapter.search.variable}",
        hint=f"install it: {adapter.search.install}",
    )


def _here(
    adapter: Adapter,
    *,
    explicit: str | None,
    launching: bool,
    environ: Mapping[str, str],
    claims: tuple[Claim, ...] = (),
) -> Facts:
    """This machine and the runtime on it; where nothing is launched, a missing or broken runtime is only a note."""
    from mgpu.detect.machine import detect_rig
    from mgpu.launch.store import claims as promised

    claims = (*promised(), *claims)
    try:
        installed = _installed(adapter, explicit, environ)
        listed = functools.cache(lambda: list_devices(adapter, installed, environ))
        rig = detect_rig(environ, listed=listed)
        if rig.gpus:
            rig = adapter.bind(rig, listed())
        rig = with_claims(rig, claims)
    except RuntimeMissingError as error:
        if launching or explicit is not None:
            raise
        note = f"{error.message}; {error.hint}"
        rig = with_claims(detect_rig(environ), claims)
        return Facts(adapter=adapter, installed=adapter.assumed(), rig=rig, notes=(note,))
    return Facts(adapter=adapter, installed=installed, rig=rig)


def list_devices(
    adapter: Adapter, installed: Installed, environ: Mapping[str, str], *, timeout_s: float | None = None
) -> tuple[ListedDevice, ...]:
    """The runtime's own list of devices. It may open each of them, so it is asked once. `timeout_s` as above."""
    from mgpu.launch import probe
    from mgpu.launch.find import Found

    if adapter.device_probe is None:
        return ()
    found = Found(executable=installed.executable, origin=installed.origin, install=adapter.search.install)
    # The rig counts cards in PCI order; CUDA's own default is by speed.
    ordered = {**environ, "CUDA_DEVICE_ORDER": "PCI_BUS_ID"}
    text = probe.list_devices(found, adapter.device_probe, ordered, timeout_s=timeout_s or probe.DEVICES_TIMEOUT_S)
    return adapter.read_devices(text)


def _differences(profile: Rig, machine: Rig) -> tuple[str, ...]:
    from mgpu_profiles.match import check

    return tuple(difference.text for difference in check(profile, machine) if difference.severity == "error")


def _with_profile(here: Facts, profile: Rig) -> Facts:
    """Live memory and devices from the machine; reserves and what a person knows better from the profile."""
    from mgpu_profiles.match import merge

    return replace(here, rig=merge(profile, here.rig))
