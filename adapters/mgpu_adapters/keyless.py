"""Runtimes that answer whoever reaches them."""

from __future__ import annotations

from mgpu.errors import RefusedError, UsageError
from mgpu.request import KEY_VARIABLE, Request


def check_keyless(request: Request, runtime: str) -> None:
    """Raises `RefusedError` for a host that needs a key, `UsageError` for a key that nobody would be asked for.

    `runtime`: as people call it.
    """
    if request.key_file:
        check_unexposed(request, runtime)
    if request.api_key is not None:
        raise UsageError(
            f"--api-key: {runtime} asks nobody for a key",
            hint=f"leave it out (--no-auth if it comes by ${KEY_VARIABLE}), or put a proxy in front that asks",
        )


def check_unexposed(request: Request, runtime: str) -> None:
    """Raises `RefusedError` for a host that other machines reach, unless --no-auth was said."""
    if request.exposed and not request.no_auth:
        raise RefusedError(
            f"--host {request.host} needs a key, and {runtime} asks nobody for one",
            hint="leave --host out and go through `ssh -L` or a proxy that asks for a key, "
            "or add --no-auth to open it to whoever reaches it",
        )
