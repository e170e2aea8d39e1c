"""Where rig profiles are kept: the user's in the configuration folder, the bundled ones beside this file.

A name means the user's profile before a bundled one. Every write is atomic: a reader meanwhile, or a crash half-way,
sees the old profile or the new one, whole. All trouble with files is a `ProfileError`.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final, Literal

import msgspec
from msgspec import Struct

from mgpu.errors import ProfileError
from mgpu.rig import Measured, Rig

BUNDLED: Final = Path(__file__).with_name("rigs")

#: No profile is near this size: a larger file is something else (a model, a device).
MAX_BYTES: Final = 1 << 20

Origin = Literal["user", "bundled"]


class ProfileName(Struct, frozen=True, kw_only=True):
    """A profile that `Store.load` finds by its name. Whether it can be read is not known yet."""

    name: str
    origin: Origin
    path: Path


class Saved(Struct, frozen=True, kw_only=True):
    """What `Store.save` did, and what a person should know of it."""

    path: Path
    warnings: tuple[str, ...] = ()


class Store(Struct, frozen=True):
    """The profiles under one configuration folder: `rigs/NAME.toml`, and in `default-rig` the name of the default."""

    root: Path

    def load(self, name_or_path: str) -> Rig:
        """The rig in a file, when the text ends in `.toml` or has a `/`; else of that name. Raises `ProfileError`."""
        if _is_path(name_or_path):
            return _load(Path(name_or_path))
        found = self._find(name_or_path)
        return msgspec.structs.replace(_load(found.path), name=found.name)  # a copied file goes by its new name

    def names(self) -> tuple[ProfileName, ...]:
        """Every profile that has a name, the user's first. A bundled one behind a user's of that name is left out."""
        own = _list(self.root / "rigs", "user")
        taken = {profile.name for profile in own}
        return own + tuple(profile for profile in _list(BUNDLED, "bundled") if profile.name not in taken)

    def save(self, rig: Rig, name: str, *, overwrite: bool = False) -> Saved:
        """Writes the rig as the user's profile `name`. Raises `ProfileError`, and then nothing has changed.

        What is there already goes only with `overwrite`, and only if it can be read: else it may be a person's work,
        or a newer version's.
        """
        from mgpu_profiles.document import check_name
        from mgpu_profiles.rigs import format_rig, parse_rig

        path = self._path(check_name(name))
        text = format_rig(msgspec.structs.replace(rig, name=name))
        parse_rig(text, f"profile {name!r}, not saved")  # a profile that could not be read again helps nobody
        if _is_readable(path) and not overwrite:
            hint = f"choose another name, or replace it: `mgpu rig save {name} --force`"
            raise ProfileError(f"there is a profile {name!r} already: {path}", hint=hint)
        _write(path, text)
        return Saved(path=path, warnings=(_shadowed(name, path),) if _is_bundled(name) else ())

    def record(self, name_or_path: str, measured: tuple[Measured, ...]) -> Saved:
        """Writes these as the measured figures of a profile, by its own numbers of cards; the rest stays as it is.

        A bundled profile becomes the user's. Raises `ProfileError`, and then nothing has changed.
        """
        from mgpu_profiles.rigs import with_measured

        if _is_path(name_or_path):
            found = ProfileName(name=name_or_path, origin="user", path=Path(name_or_path))
        else:
            found = self._find(name_or_path)
        try:
            text = with_measured(_read(found.path), measured, str(found.path))
        except FileNotFoundError:
            raise _missing(found.path) from None
        if found.origin == "user":
            _write(found.path, text)
            return Saved(path=found.path)
        path = self._path(found.name)
        _write(path, text)
        return Saved(path=path, warnings=(_shadowed(found.name, path),))

    def remove(self, name: str) -> tuple[str, ...]:
        """Removes the user's profile, and a default that named it. Returns warnings. Raises `ProfileError`."""
        found = self._find(name)
        if found.origin == "bundled":
            raise ProfileError(f"{name!r} is a bundled profile and cannot be removed", hint=_LIST)
        _unlink(found.path)
        if self._pointer() != name or _is_bundled(name):
            return ()
        self.use(None)
        return (f"{name!r} was the default: runs plan for the machine as detected again",)

    def use(self, name: str | None) -> None:
        """Makes a profile the default; None: no default. Raises `ProfileError`, also for one that cannot be read."""
        if name is None:
            _unlink(self._default_path)
            return
        if _is_path(name):
            hint = f"copy it to {self.root / 'rigs'} and use the name it has there"
            raise ProfileError(f"the default is a profile's name, not a file: {name!r}", hint=hint)
        _load(self._find(name).path)
        _write(self._default_path, f"{name}\n")

    def default(self) -> str | None:
        """The name of the default profile, if there is one. Raises `ProfileError` when that profile has vanished."""
        name = self._pointer()
        if name is None:
            return None
        try:
            return self._find(name).name
        except ProfileError:
            hint = f"choose another, `mgpu rig use NAME`, or none, `mgpu rig use --none`; {_LIST}"
            raise ProfileError(f"the default profile {name!r} is gone ({self._default_path})", hint=hint) from None

    @property
    def _default_path(self) -> Path:
        return self.root / "default-rig"

    def _path(self, name: str) -> Path:
        return self.root / "rigs" / f"{name}.toml"

    def _pointer(self) -> str | None:
        try:
            return _read(self._default_path).strip() or None
        except FileNotFoundError:
            return None

    def _find(self, name: str) -> ProfileName:
        """The profile that `name` means. Raises `ProfileError` with what it may have meant."""
        names = self.names()
        for profile in names:
            if profile.name == name:
                return profile
        import difflib

        close = difflib.get_close_matches(name, [profile.name for profile in names], n=3)
        hint = f"did you mean {' or '.join(close)}? {_LIST}" if close else _LIST
        raise ProfileError(f"no rig profile is called {name!r}", hint=hint)


_LIST: Final = "`mgpu rig list` shows them all"


def user_store() -> Store:
    """The store in the configuration folder of this user (Linux: `$XDG_CONFIG_HOME/mgpu` or `~/.config/mgpu`)."""
    import click  # the same folders as platformdirs, and it is loaded already: 6 ms of start-up

    root = Path(click.get_app_dir("mgpu"))
    # $XDG_CONFIG_HOME empty or relative counts as not set (XDG Base Directory Specification).
    return Store(root if root.is_absolute() else Path.home() / ".config" / "mgpu")


def _list(folder: Path, origin: Origin) -> tuple[ProfileName, ...]:
    try:
        files = [path for path in folder.iterdir() if path.suffix == ".toml" and not path.name.startswith(".")]
    except OSError as error:
        if isinstance(error, FileNotFoundError | NotADirectoryError) and not folder.exists():
            return ()  # also below a home that is no folder
        raise _unreadable(folder, error) from None
    return tuple(ProfileName(name=path.stem, origin=origin, path=path) for path in sorted(files, key=_stem))


def _stem(path: Path) -> str:
    return path.stem  # "2x3090" before "2x3090-nvlink", which their whole names would not give


def _is_bundled(name: str) -> bool:
    return (BUNDLED / f"{name}.toml").exists()


def _is_path(name_or_path: str) -> bool:
    return name_or_path.endswith(".toml") or "/" in name_or_path


def _load(path: Path) -> Rig:
    try:
        return _parse(path)
    except FileNotFoundError:
        raise _missing(path) from None


def _missing(path: Path) -> ProfileError:
    return ProfileError(f"no such profile file: {str(path)!r}", hint=f"a name alone also does: {_LIST}")


def _shadowed(name: str, path: Path) -> str:
    return f"{name!r} is a bundled profile too: from now on the name means yours, {path}"


def _parse(path: Path) -> Rig:
    """Raises `FileNotFoundError`, and `ProfileError` for all else."""
    from mgpu_profiles.rigs import parse_rig

    return parse_rig(_read(path), str(path))


def _is_readable(path: Path) -> bool:
    """True: a profile; False: nothing there, free to write. Raises `ProfileError` for anything else."""
    try:
        _parse(path)
    except FileNotFoundError:
        return False
    except ProfileError as error:
        hint = f"correct it, or move it away: {path}"
        raise ProfileError(f"not overwriting a profile that cannot be read: {error.message}", hint=hint) from None
    return True


def _read(path: Path) -> str:
    """Raises `FileNotFoundError`, and `ProfileError` for all else."""
    try:
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
    except FileNotFoundError:
        raise
    except NotADirectoryError as error:  # a home that is no folder holds no profiles
        raise FileNotFoundError(*error.args) from error
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        raise _unreadable(path, error) from None
    if len(content) > MAX_BYTES:
        raise ProfileError(f"{path}: larger than 1 MiB, so no profile", hint="give the TOML file of a rig profile")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        what = f"byte {error.start} (0x{content[error.start]:02x}) is not UTF-8"
        raise ProfileError(f"{path}: {what}", hint="save the file as UTF-8 text") from None


def _unreadable(path: Path, error: Exception) -> ProfileError:
    what = getattr(error, "strerror", None) or str(error)
    return ProfileError(f"cannot read {path}: {what}", hint="give yourself the right to read it, or move it away")


def _unlink(path: Path) -> None:
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        raise ProfileError(f"cannot remove {path}: {error.strerror}", hint=f"make {path.parent} writable") from None


def _write(path: Path, text: str) -> None:
    """All of `text` or nothing, through a file beside it. A symbolic link stays one: what it points to is written."""
    try:
        target = path.resolve()
        target.parent.mkdir(parents=True, exist_ok=True)
        _replace(target, text)
    except (OSError, RuntimeError) as error:  # RuntimeError: a link that leads to itself (Python < 3.13)
        what = getattr(error, "strerror", None) or str(error)
        hint = f"see that {path.parent} is writable and its disk not full; XDG_CONFIG_HOME moves it elsewhere"
        raise ProfileError(f"cannot write {path}: {what}", hint=hint) from None


def _replace(target: Path, text: str) -> None:
    import tempfile

    descriptor, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
    temporary = Path(name)
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            os.fchmod(descriptor, 0o644)
            file.write(text)
            file.flush()
            os.fsync(descriptor)  # the content is on the disk before the name is
        temporary.replace(target)
    except BaseException:  # also Ctrl-C: leave nothing behind
        temporary.unlink(missing_ok=True)
        raise
    _sync(target.parent)


def _sync(folder: Path) -> None:
    """The new name on the disk as well. Not every file system can, and the profile is whole either way."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError:
        pass
    finally:
        os.close(descriptor)
