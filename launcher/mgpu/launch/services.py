"""A service that runs already: whether it is there, and what it says of itself."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

import msgspec
from msgspec import Struct

from mgpu.errors import UsageError
from mgpu.launch.http import Caller
from mgpu.service import TOKEN, Answer, Call, Service

#: A service on this machine answers in milliseconds. One that has just been started listens before it answers.
_PROBE_S: Final = 5.0
_MAX_TOKEN: Final = 4096

_HOST: Final = re.compile(r"[A-Za-z0-9_.-]+|\[[0-9A-Fa-f:.]+\]")
_PORT: Final = re.compile(r"[0-9]{1,5}")
_LOOPBACK: Final = {"0.0.0.0": "127.0.0.1", "[::]": "[::1]", "": "127.0.0.1"}  # noqa: S104 - compared, not bound


class Running(Struct, frozen=True, kw_only=True):
    """A service that answered. `outputs`: what it said, by path; and its token file's text as `TOKEN`."""

    url: str
    origin: str  # "$OLLAMA_HOST", or "running"
    outputs: Mapping[str, str]


def find_service(service: Service, environ: Mapping[str, str]) -> Running | None:
    """The service where it should be; None when nobody answers there.

    Raises `UsageError` for an address that is none.
    """
    url, origin = service_url(service, environ)
    outputs = dict(_token(service))
    headers = {service.token_header: outputs[TOKEN]} if service.token_header and TOKEN in outputs else {}
    with closing(Caller()) as caller:
        for path in service.probe:
            answer = caller.ask(Call(method="GET", url=url + path, headers=headers, timeout_s=_PROBE_S))
            if answer.status == 0:
                return None
            if answer.status == 200:
                outputs[path] = _text(answer)
    return Running(url=url, origin=origin, outputs=outputs)


def service_url(service: Service, environ: Mapping[str, str]) -> tuple[str, str]:
    """Where it is, without a slash at the end, and who says so ("$OLLAMA_HOST" or "running").

    The variable may hold `host`, `host:port` or an address with http(s)://; a wildcard is reached by loopback
    (ollama envconfig/config.go, Host and ConnectableHost). Raises `UsageError` for anything else.
    """
    given = environ.get(service.variable, "").strip().strip("\"'")
    if not given:
        return service.url, "running"
    scheme, mark, rest = given.partition("://")
    if not mark:
        scheme, rest = "http", given
    authority, _, path = rest.partition("/")
    if authority.count(":") > 1 and not authority.startswith("["):
        authority = f"[{authority}]"  # a bare IPv6 address
    host, port = authority, ""
    if not authority.endswith("]") and ":" in authority:
        host, _, port = authority.rpartition(":")
    usual = {"http": 80, "https": 443}.get(scheme, 0) if mark else urlsplit(service.url).port
    good = (not host or _HOST.fullmatch(host)) and (not port or _PORT.fullmatch(port))
    if scheme not in {"http", "https"} or not good or int(port or 1) > 65535:
        raise UsageError(
            f"${service.variable} is {given!r}, which is no address", hint=f"write it like {service.url}, or unset it"
        )
    where = f"{scheme}://{_LOOPBACK.get(host, host)}:{port or usual}"
    return where + (f"/{path.rstrip('/')}" if path.rstrip("/") else ""), f"${service.variable}"


def _token(service: Service) -> Iterator[tuple[str, str]]:
    if not service.token_file:
        return
    try:
        file = Path(service.token_file).expanduser()
        if not file.is_file():  # opening a FIFO would wait for a writer
            return
        with file.open(encoding="utf-8") as opened:
            text = opened.read(_MAX_TOKEN).strip()
    except (OSError, UnicodeDecodeError, RuntimeError):  # none there, or nobody's home: asked without
        return
    if text and text.isprintable() and text.isascii():
        yield TOKEN, text


def _text(answer: Answer) -> str:
    body: Any = answer.body
    try:
        return body if isinstance(body, str) else msgspec.json.encode(body).decode()
    except (OverflowError, RecursionError):  # numbers beyond 64 bits, brackets without end
        return ""
