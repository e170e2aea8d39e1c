"""What systemd-logind does to the processes of a session that ends (logind.conf(5), systemd 257)."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Final

from mgpu.detect.sysfs import list_names, read_text

#: Of the same name, the file in the first of these counts.
_PLACES: Final = ("etc/systemd", "run/systemd", "usr/local/lib/systemd", "usr/lib/systemd")
_MOST_FILES: Final = 100
_MOST_BYTES: Final = 1 << 16
_YES: Final = frozenset({"1", "yes", "y", "true", "t", "on"})  # systemd's parse_boolean()


def kills_at_logout(root: Path, user: str | None = None) -> bool | None:
    """Whether `user` (default: this one) loses what runs in a session with it; None where there is no systemd."""
    if not (root / "run/systemd/system").is_dir():  # sd_booted(3)
        return None
    told: dict[str, str] = {}
    for path in _files(root):
        told |= _login(read_text(path, _MOST_BYTES))
    user = _name() if user is None else user
    only, excluded = told.get("KillOnlyUsers", "").split(), told.get("KillExcludeUsers", "root").split()
    concerned = user not in excluded and (not only or user in only)
    return concerned and told.get("KillUserProcesses", "no").lower() in _YES


def _files(root: Path) -> list[Path]:
    """The main one, then what changes it: by name, wherever it lies."""
    main = [path for place in _PLACES if (path := root / place / "logind.conf").exists()][:1]
    found: dict[str, Path] = {}
    for place in _PLACES:
        folder = root / place / "logind.conf.d"
        for name in list_names(folder)[:_MOST_FILES]:
            if name.endswith(".conf"):
                found.setdefault(name, folder / name)
    return [*main, *(found[name] for name in sorted(found))]


def _login(text: str) -> dict[str, str]:
    """The settings of its [Login] section; the last of a name counts."""
    told: dict[str, str] = {}
    section = ""
    for line in text.splitlines():
        stripped = line.strip()
        if heading := re.fullmatch(r"\[(.*)\]", stripped):
            section = heading[1]
        elif section == "Login" and "=" in stripped and not stripped.startswith(("#", ";")):
            key, _, value = stripped.partition("=")
            told[key.strip()] = value.strip()
    return told


def _name() -> str:
    import pwd

    try:
        return pwd.getpwuid(os.geteuid()).pw_name
    except KeyError:  # a user that the system has no name for
        return str(os.geteuid())
