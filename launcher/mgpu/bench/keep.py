"""Where measured figures are kept: which rig profile, known before anything is measured, and how they get there."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from msgspec import Struct
from msgspec.structs import replace

from mgpu.errors import ProfileError
from mgpu.rig import Measured, Rig
from mgpu_profiles.match import as_profiled, check, merge
from mgpu_profiles.store import Saved, Store

#: The profile that is made where there is none of this machine.
NEW_NAME: Final = "this-machine"


#: Depths that differ by no more than this, in tokens, are one: the speed hardly changes in between.
NEAR: Final = 512


class Destination(Struct, frozen=True, kw_only=True):
    """The profile `name` (or file) takes the figures. `exists`: it is there already, and is this machine."""

    name: str
    exists: bool
    becomes_default: bool


class Ground(Struct, frozen=True, kw_only=True):
    """The rig to measure on, as its profile says, and the profile for the figures (None: none is to be kept)."""

    rig: Rig
    destination: Destination | None
    notes: tuple[str, ...] = ()


def find_ground(store: Store, machine: Rig, *, rig_name: str | None, save_as: str | None, keep: bool) -> Ground:
    """`rig_name`: `--rig`; else the default profile if it is this machine; else the machine as it is.

    Figures go to that profile, or to `save_as`, or to a new one. Raises `ProfileError` for a profile that cannot be
    read, or that was named and is not this machine.
    """
    profile, notes = _profile(store, machine, rig_name)
    if not keep:
        return Ground(rig=_used_as(profile, machine), destination=None, notes=notes)
    if profile is not None and save_as is None:
        name = rig_name or profile.name
        kept = Destination(name=name, exists=True, becomes_default=False)
        return Ground(rig=_used_as(profile, machine), destination=kept, notes=notes)
    name = _checked(NEW_NAME if save_as is None else save_as)
    there = _load_if_any(store, name)
    if there is not None:
        _must_match(there, machine)
    kept = Destination(name=name, exists=there is not None, becomes_default=store.default() != name)
    return Ground(rig=_used_as(profile or there, machine), destination=kept, notes=notes)


def keep_measured(store: Store, ground: Ground, measured: Sequence[Measured]) -> Saved:
    """Writes the figures, by rig index, where they belong, in place of older ones of the same. Raises `ProfileError`.

    A profile that exists is read once more: it may have been edited while we measured.
    """
    destination = ground.destination
    assert destination is not None  # noqa: S101 - callers keep only where there is a place
    name = destination.name
    if destination.exists:
        profile = store.load(name)
        newer = as_profiled(profile, ground.rig, tuple(measured))
        saved = store.record(name, replaced(profile.measured, newer))
    else:
        fresh = replace(ground.rig, name=name, source="profile")
        saved = store.save(replace(fresh, measured=replaced(fresh.measured, measured)), name)
    if destination.becomes_default:
        store.use(name)
    return saved


def replaced(older: Sequence[Measured], newer: Sequence[Measured]) -> tuple[Measured, ...]:
    """The older figures without those that were measured again, then the newer ones."""
    return (*(old for old in older if not any(_is_again(old, new) for new in newer)), *newer)


def _is_again(old: Measured, new: Measured) -> bool:
    return _what(old) == _what(new) and abs(old.depth - new.depth) <= NEAR


def _what(measured: Measured) -> Measured:
    """What was measured, but for the depth, without what came of it."""
    return replace(measured, version="", depth=0, tok_s=0.0, prompt_tok_s=None, predicted=None, date="")


def _profile(store: Store, machine: Rig, rig_name: str | None) -> tuple[Rig | None, tuple[str, ...]]:
    if rig_name is not None:
        profile = store.load(rig_name)
        _must_match(profile, machine)
        return profile, ()
    default = store.default()
    if default is None:
        return None, ()
    profile = store.load(default)
    difference = _difference(profile, machine)
    if difference is None:
        return profile, ()
    return None, (f"the default rig {default!r} is not this machine: {difference}",)


def _load_if_any(store: Store, name: str) -> Rig | None:
    return store.load(name) if any(profile.name == name for profile in store.names()) else None


def _must_match(profile: Rig, machine: Rig) -> None:
    difference = _difference(profile, machine)
    if difference is not None:
        raise ProfileError(
            f"rig {profile.name!r} is not this machine: {difference}",
            hint="bench measures the machine it runs on: leave --rig out, or --save NAME keeps it under another name",
        )


def _difference(profile: Rig, machine: Rig) -> str | None:
    return next((found.text for found in check(profile, machine) if found.severity == "error"), None)


def _used_as(profile: Rig | None, machine: Rig) -> Rig:
    return machine if profile is None else merge(profile, machine)


def _checked(name: str) -> str:
    from mgpu_profiles.document import check_name

    return check_name(name)
