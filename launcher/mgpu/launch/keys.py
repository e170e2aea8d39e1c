"""The key that clients must send: who needs one, where it comes from, where it is kept.

A runtime that only this machine reaches asks for none. Any other host needs one: given by --api-key or $MGPU_API_KEY,
or made up once and kept in the state directory, so that clients go on working after the next launch; --no-auth opens it
to everybody.
Until something is really launched, `KEY_PLACEHOLDER` stands for a key that is nothing to print.
"""

from __future__ import annotations

import os
import secrets
import socket
import stat
from collections.abc import Mapping
from contextlib import suppress
from ipaddress import IPv6Address, ip_address
from pathlib import Path
from typing import Final

from msgspec import Struct
from msgspec.structs import replace

from mgpu.errors import RefusedError, UsageError
from mgpu.launch.places import spare_state_dir, state_dirs, usual_state_dir
from mgpu.launch.private import draft_of, make_directory, new_file
from mgpu.launch.redact import redact, secrets_of
from mgpu.request import KEY_PLACEHOLDER, KEY_VARIABLE, Request

__all__ = ["Guarded", "check_key", "guard", "is_exposed", "kept_key", "redact", "secrets_of", "with_key"]

_NAME: Final = "api-key"
_BYTES: Final = 32  # of randomness
_LONGEST: Final = 4096  # bytes of a key: servers take headers of 8 KiB
_OTHERS: Final = stat.S_IRWXG | stat.S_IRWXO


class Guarded(Struct, frozen=True, kw_only=True):
    """A request that says who may talk to what it starts, and what a person should know of that."""

    request: Request
    notes: tuple[str, ...] = ()


def guard(request: Request, environ: Mapping[str, str], *, here: bool) -> Guarded:
    """`request` with a key if its host needs one. Nothing is made, and nothing secret is in the result.

    `here`: it is for this machine, which knows what names mean.
    """
    request = replace(request, exposed=is_exposed(request.host, here=here))
    if request.no_auth:
        open_to = f"no key is asked for (--no-auth): whoever reaches {request.host} can use it"
        return Guarded(request=request, notes=(open_to,) if request.exposed else ())
    if request.api_key is not None:
        if request.api_key != environ.get(KEY_VARIABLE):
            return Guarded(request=request)
        return Guarded(request=replace(request, api_key=KEY_PLACEHOLDER), notes=(f"key: in ${KEY_VARIABLE}",))
    if not request.exposed:
        return Guarded(request=request)
    path = _place()
    later = "" if os.path.lexists(path) else ", which the launch makes"
    request = replace(request, api_key=KEY_PLACEHOLDER, key_file=str(path))
    return Guarded(request=request, notes=(f"key: in {path}{later}",))


def with_key(request: Request, environ: Mapping[str, str]) -> Request:
    """`request`, guarded before, with the real key: for a launch alone. Makes the file of a key that is made up.

    Raises `RefusedError` where that file cannot be made, or others could have read it.
    """
    if request.api_key != KEY_PLACEHOLDER:
        return request
    if request.key_file:
        return replace(request, api_key=kept_key(Path(request.key_file)))
    return replace(request, api_key=environ[KEY_VARIABLE])


def check_key(key: str, origin: str) -> str:
    """A key that a client can send in an HTTP header. Raises `UsageError`, which does not tell it."""
    flaw = _flaw(key)
    if flaw is not None:
        raise UsageError(
            f"the key in {origin} {flaw}", hint="use letters, digits and signs, like `openssl rand -hex 24`"
        )
    return key


def is_exposed(host: str, *, here: bool) -> bool:
    """Whether other machines may reach what listens on `host`: for any of its addresses that is not loopback.

    A name that nobody knows counts as reachable. `here`: ask this machine what a name means.
    """
    addresses = [host]
    if here and not _is_address(host):
        try:
            addresses = [str(found[4][0]) for found in socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)]
        except (OSError, UnicodeError):
            return True  # choosing a port will say that nobody knows it
    elif host == "localhost":
        return False
    return not all(_is_loopback(address) for address in addresses)


def kept_key(path: Path) -> str:
    """The key in `path`, made up if there is none. Two launches at once get the same one.

    Raises `RefusedError` for a file that is not this user's alone, or cannot be read or made.
    """
    try:
        make_directory(path.parent)
        with suppress(FileExistsError):
            if not os.path.lexists(path):
                _make(path)
        return _read(path)
    except (OSError, RuntimeError) as error:
        what = getattr(error, "strerror", None) or str(error)
        raise RefusedError(
            f"cannot keep a key in {path}: {what}",
            hint=f"give one by ${KEY_VARIABLE} or --api-key, or set XDG_STATE_HOME to a writable directory",
        ) from error


def _place() -> Path:
    """Where a key is kept, or would be. Makes nothing."""
    usual = usual_state_dir()
    ours = state_dirs()
    if usual in ours:
        return usual / _NAME
    above = next((directory for directory in usual.parents if directory.exists()), Path("/"))
    writable = not usual.exists() and above.is_dir() and os.access(above, os.W_OK | os.X_OK)
    return (usual if writable else spare_state_dir()) / _NAME


def _make(path: Path) -> None:
    """A new key, all of it at once. Raises OSError, FileExistsError where another launch was first."""
    draft = draft_of(path)
    try:
        key = secrets.token_urlsafe(_BYTES).replace("-", "_")  # in front it would be an option to many a client
        new_file(draft, f"{key}\n".encode("ascii"))
        try:
            os.link(draft, path, follow_symlinks=False)
        except FileExistsError:
            raise
        except OSError:  # a file system without hard links
            if not os.path.lexists(path):
                draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)


def _read(path: Path) -> str:
    """Raises OSError, `RefusedError`."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW)
    except OSError:
        if path.is_symlink():
            raise _refused(path, "it is a link, and may lead anywhere") from None
        raise
    with os.fdopen(descriptor, "rb") as file:
        _check_status(path, os.fstat(descriptor))
        content = file.read(_LONGEST + 1)
    key = content.decode("latin-1").removesuffix("\n").removesuffix("\r")
    flaw = _flaw(key)
    if flaw is not None:
        raise _refused(path, f"what is in it {flaw}")
    return key


def _check_status(path: Path, status: os.stat_result) -> None:
    if not stat.S_ISREG(status.st_mode):
        raise _refused(path, "it is no regular file")
    if status.st_uid != os.geteuid():
        raise _refused(path, f"it belongs to another user (uid {status.st_uid})")
    if status.st_mode & _OTHERS:
        raise _refused(path, f"others can read it (mode {stat.S_IMODE(status.st_mode):04o})")


def _refused(path: Path, why: str) -> RefusedError:
    return RefusedError(
        f"not using the key in {path}: {why}", hint=f"remove it, and the next launch makes a new one: rm {path}"
    )


def _flaw(key: str) -> str | None:
    """Why it is no key, without telling it."""
    if not key:
        return "is empty"
    if key == KEY_PLACEHOLDER:
        return "is what mgpu prints in place of one"
    if len(key) > _LONGEST:
        return f"is longer than {_LONGEST} characters"
    if key != key.strip() or not key.isprintable() or any(ord(letter) > 0xFF for letter in key):
        return "has signs that no HTTP header can carry"
    return None


def _is_address(host: str) -> bool:
    try:
        ip_address(host)
    except ValueError:
        return False
    return True


def _is_loopback(host: str) -> bool:
    try:
        address = ip_address(host)
    except ValueError:
        return False
    if isinstance(address, IPv6Address) and address.ipv4_mapped is not None:
        return address.ipv4_mapped.is_loopback
    return address.is_loopback
