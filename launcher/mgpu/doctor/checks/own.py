"""mgpu's own directories, what dead launches left, the default profile."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from mgpu.doctor.facts import Facts, Folder
from mgpu.doctor.finding import Finding, ok
from mgpu_profiles.match import check

_OTHERS_MAY_WRITE: Final = 0o022


def state_directory(facts: Facts) -> Iterator[Finding]:
    """Where launches are kept: what lies in it says what to stop."""
    used = next((folder for folder in facts.own.folders if folder.used), None)
    if used is None:
        return
    flaws = {folder.path: _flaw(folder) for folder in facts.own.folders}
    usual = facts.own.folders[0]
    if flaws[used.path]:
        text = f"launches cannot be kept: {used.path} {flaws[used.path]}"
        fix = _fix(used)
        yield Finding(severity="error", area="mgpu", id="state-directory", text=text, fix=fix)
    elif used is not usual:
        text = f"launches are kept in {used.path}, as {usual.path} {flaws[usual.path] or 'cannot be made'}"
        yield Finding(severity="warning", area="mgpu", id="state-directory", text=text, fix=_fix(usual))
    else:
        yield ok("mgpu", "state-directory", f"launches are kept in {used.path}")


def leftovers(facts: Facts) -> Iterator[Finding]:
    """Of launches that were killed."""
    left = facts.own.leftovers
    if not left:
        yield ok("mgpu", "leftovers", "nothing is left of dead launches")
        return
    more = f" and {len(left) - 2} more" if len(left) > 2 else ""
    yield Finding(
        severity="note",
        area="mgpu",
        id="leftovers",
        text=f"dead launches left {', '.join(left[:2])}{more}",
        fix="mgpu ps cleans up",
    )


def default_profile(facts: Facts) -> Iterator[Finding]:
    """What plans rest on, beside the machine as it is."""
    own = facts.own
    if own.flaw:
        yield Finding(severity="error", area="mgpu", id="profile", text=own.flaw, fix=own.flaw_hint)
        return
    if own.default is None:
        return
    differences = check(own.default, facts.cards.rig)
    errors = [difference for difference in differences if difference.severity == "error"]
    if errors:
        more = f" (and {len(errors) - 1} more)" if len(errors) > 1 else ""
        yield Finding(
            severity="error",
            area="mgpu",
            id="profile",
            text=f"the default profile {own.profile!r} is not this machine: {errors[0].text}{more}",
            fix="mgpu rig use --none, or write a new one: mgpu rig save NAME; mgpu rig use NAME",
        )
        return
    yield from (
        Finding(
            severity="note",
            area="mgpu",
            id="profile",
            text=f"default profile {own.profile!r}: {difference.text}",
            fix=f"mgpu rig check {own.profile}",
        )
        for difference in differences
    )
    if not differences:
        yield ok("mgpu", "profile", f"the default profile {own.profile!r} is this machine")


def _flaw(folder: Folder) -> str:
    if not folder.exists:
        return "cannot be made"
    if not folder.owned:
        return "belongs to somebody else"
    if folder.mode & _OTHERS_MAY_WRITE:
        return f"can be written by others (mode {folder.mode:o})"
    return "" if folder.writable else "cannot be written"


def _fix(folder: Folder) -> str:
    if not folder.exists:
        return (
            "see that the directories above it are yours, and their disk not full or read-only; or set XDG_STATE_HOME"
        )
    if not folder.owned:
        return f"sudo chown -R $USER {folder.path} (mgpu once ran as root?)"
    return f"chmod 700 {folder.path}"


CHECKS: Final = (state_directory, leftovers, default_profile)
