"""A port that the runtime can really bind, now."""

from __future__ import annotations

import errno
import socket
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from typing import Final

from msgspec import Struct

from mgpu.errors import RuntimeFailedError, UsageError

FIRST_PORT: Final = 8080  # llama.cpp's own until b11434 (it is 9931 from b11549 on: common/common.h)
#: Replicas behind a proxy are for it alone, wherever it listens itself.
LOOPBACK: Final = "127.0.0.1"
_TRIES: Final = 1000
_NONE: Final[Mapping[int, str]] = {}
_LAST_PORT: Final = 65535


class Ports(Struct, frozen=True, kw_only=True):
    """`front`: where people go. `members`: the replicas', which are others unless the first is in front itself."""

    front: int
    members: tuple[int, ...]


def free_port(
    host: str, *, wanted: int | None = None, start: int = FIRST_PORT, taken: Mapping[int, str] = _NONE
) -> int:
    """`wanted` if it can be bound on `host` now; without a wish, the first port from `start` up that can.

    `taken`: ports of other launches, by name, though nothing may listen there yet.
    Raises `UsageError` for a host that is not this machine's and for a port that is none or not permitted,
    `RuntimeFailedError` for a wanted port in use, naming its holder where that can be seen.
    """
    if wanted is None:
        last = min(start + _TRIES - 1, _LAST_PORT)
        for port in range(start, last + 1):
            if port not in taken and is_free(host, port):
                return port
        raise RuntimeFailedError(f"no free port on {host} from {start} to {last}", hint="choose one with --port")
    if not 1 <= wanted <= _LAST_PORT:
        raise UsageError(f"--port {wanted} is not a port", hint=f"give one from 1 to {_LAST_PORT}, or leave it out")
    if wanted in taken:
        raise RuntimeFailedError(
            f"port {wanted} belongs to the launch {taken[wanted]}",
            hint=f"`mgpu stop {taken[wanted]}` frees it; or choose another --port, or leave --port out",
        )
    if not is_free(host, wanted):
        from mgpu.launch.tree import holder  # psutil: 12 ms, for an error

        by = holder(wanted)
        raise RuntimeFailedError(
            f"port {wanted} on {host} is in use{f' by {by}' if by else ''}",
            hint="stop what listens there, choose another --port, or leave --port out to take a free one",
        )
    return wanted


def choose_ports(
    host: str,
    wanted: int | None,
    n_members: int,
    *,
    proxied: bool,
    start: int = FIRST_PORT,
    taken: Mapping[int, str] = _NONE,
) -> Ports:
    """Free ones: `wanted` (or one from `start` up) in front, then the next. Behind a proxy, replicas are on 127.0.0.1.

    Raises as `free_port` does.
    """
    front = free_port(host, wanted=wanted, start=start, taken=taken)
    after = max(front + 1, start) if front + _TRIES <= _LAST_PORT else FIRST_PORT
    members = [] if proxied else [front]
    while len(members) < n_members:
        port = free_port(LOOPBACK if proxied else host, start=after, taken=taken)
        after = port + 1
        if port != front:
            members.append(port)
    return Ports(front=front, members=tuple(members))


def is_free(host: str, port: int) -> bool:
    """Whether every address of `host` can be bound at `port`. Raises `UsageError` when none of them ever could."""
    bound = 0
    for family, address in _addresses(host, port):
        try:
            _bind(family, address)
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                return False
            if error.errno == errno.EACCES:
                raise UsageError(
                    f"port {port} on {host} needs privileges", hint="choose a --port from 1024 up"
                ) from error
        else:
            bound += 1
    if not bound:
        raise UsageError(
            f"--host {host} is not an address of this machine", hint="use 127.0.0.1, or 0.0.0.0 to be seen from outside"
        )
    return True


@contextmanager
def held(host: str, port: int) -> Iterator[ExitStack]:
    """Keep `port` from other programs without answering there, until the stack yielded is closed, or at the end.

    Bound without SO_REUSEADDR, and not listening: nobody else can bind it, and clients are refused as before.
    Where that cannot be done (a connection in TIME_WAIT), the port is left as it is.
    """
    with ExitStack() as stack:
        for family, address in _addresses(host, port):
            server = stack.enter_context(socket.socket(family, socket.SOCK_STREAM))
            with suppress(OSError):
                if family is socket.AF_INET6:
                    server.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
                server.bind(address)
        yield stack


def literal_addresses(host: str, port: int) -> tuple[str, ...]:
    """What `host` stands for, as the numbers of IPv4 and IPv6. Raises `UsageError` for a name nobody knows."""
    return tuple(str(address[0]) for _, address in _addresses(host, port))


def _addresses(host: str, port: int) -> list[tuple[socket.AddressFamily, tuple[str, int]]]:
    """What `host` stands for, once each. Raises `UsageError` for a name nobody knows."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (socket.gaierror, UnicodeError) as error:
        raise UsageError(f"--host {host!r} is not a known name or address", hint="use 127.0.0.1 or 0.0.0.0") from error
    return list(dict.fromkeys((family, address) for family, _, _, _, address in found))  # type: ignore[misc]  # IP only


def _bind(family: socket.AddressFamily, address: tuple[str, int]) -> None:
    """Bind and listen as llama-server does (tools/server/server-http.cpp, b11434), then let go."""
    with socket.socket(family, socket.SOCK_STREAM) as server:
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # connections in TIME_WAIT are no obstacle
        if family is socket.AF_INET6:
            server.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)  # "::" is IPv4 too, as in cpp-httplib
        server.bind(address)
        server.listen(1)
