"""The header of a GGUF behind a URL: as few bytes as it takes, by HTTP range where the server knows it."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable
from typing import Final
from urllib.parse import urlsplit

import requests
import urllib3

from mgpu.errors import BadModelError
from mgpu.inspect.foreign import check_magic, shown
from mgpu.inspect.gguf import MAX_HEADER_BYTES, Header, NeedMore, parse_header
from mgpu.model import ModelFile
from mgpu.units import MIB

_FIRST_BYTES: Final = MIB
_CHUNK: Final = 64 << 10
_MAX_REDIRECTS: Final = 5
_TIMEOUTS: Final = (10, 30)  # s: to connect, between two pieces
#: Seconds for the whole header: a server that sends a byte now and then must not hold us for ever.
DEADLINE: Final = 180
_GRACE: Final = 1.0  # more, for whoever looks at the clock to say how far it came
_CONTENT_RANGE: Final = re.compile(r"bytes ([0-9]{1,19})-[0-9]{1,19}/([0-9]{1,19})")
_BLOB: Final = re.compile(r"(https?://(?:www\.)?(?:huggingface\.co|hf\.co)/[^?]+)/blob/(.*)", re.DOTALL)
_Fetched = tuple[Header, ModelFile]

_HINTS: Final = {
    401: "the file needs a login or a token (a gated model?): download it with `hf download`, then give its path",
    403: "access is denied (a gated model, or an expired link?): download it with `hf download`, then give its path",
    404: "check the address; on huggingface.co it has the form https://huggingface.co/OWNER/NAME/resolve/main/FILE.gguf",
    429: "the server asks to wait: try again in a few minutes",
}


def read_header(url: str) -> tuple[Header, ModelFile]:
    """The header of the file at `url`, and the file, its path without what may be secret in the URL.

    Raises `BadModelError`, also for everything that the network does.
    """
    path = _without_secrets(url)
    origin = shown(path)
    if blob := _BLOB.fullmatch(url):
        raise BadModelError(
            f"{origin} is the page about the file, not the file",
            hint=f"use /resolve/ instead of /blob/: {shown(f'{blob[1]}/resolve/{blob[2]}')}",
        )
    return _in_time(lambda: _fetch(url, path), origin)


def _in_time(fetch: Callable[[], _Fetched], origin: str) -> _Fetched:
    """What `fetch` returns or raises. It works in a thread, which is left behind when its time is over.

    urllib3's time-outs are for one `recv`: who sends a byte of a status line now and then, or `100 Continue` for ever,
    would hold us between two looks at the clock.
    """
    done: list[_Fetched | Exception] = []

    def work() -> None:
        try:
            done.append(fetch())
        except Exception as error:  # noqa: BLE001 - raised again by whoever waits
            done.append(error)

    worker = threading.Thread(target=work, name="header", daemon=True)
    worker.start()
    worker.join(DEADLINE + _GRACE)
    if not done:
        raise _too_slow(origin, "no end of it")
    if isinstance(done[0], Exception):
        raise done[0]
    return done[0]


def _fetch(url: str, path: str) -> _Fetched:
    origin = shown(path)
    with requests.Session() as session:
        session.max_redirects = _MAX_REDIRECTS
        body = _Body(session, url, origin)
        try:
            return _read(body), ModelFile(path=path, n_bytes=body.size)
        except (requests.RequestException, urllib3.exceptions.HTTPError, OSError, ValueError) as error:
            raise _unreachable(origin, error) from error
        finally:
            body.close()


def _too_slow(origin: str, came: str) -> BadModelError:
    return BadModelError(
        f"{origin}: too slow: {came} of the header in {DEADLINE} s", hint="download the file, then give its path"
    )


def _read(body: _Body) -> Header:
    wanted = _FIRST_BYTES
    while True:
        body.grow(wanted)
        try:
            return parse_header(body.buffer, n_bytes_total=body.size, origin=body.origin)
        except NeedMore as more:
            wanted = min(max(2 * len(body.buffer), more.at_least), MAX_HEADER_BYTES)


class _Body:
    """The first bytes of a file behind a URL, more of them on demand. `size` is the whole file's, once known."""

    def __init__(self, session: requests.Session, url: str, origin: str) -> None:
        self.buffer = bytearray()
        self.size = 0
        self.origin = origin
        self._session = session
        self._url = url
        self._stream: requests.Response | None = None  # of a server that ignores ranges: read on where it stands
        self._deadline = time.monotonic() + DEADLINE

    def grow(self, wanted: int) -> None:
        """Have `wanted` bytes, or the whole file if it is shorter. A server may send less of a range than asked for."""
        while self.size == 0 or len(self.buffer) < min(wanted, self.size):
            before = len(self.buffer)
            if self._stream is not None:
                self._fill(self._stream, wanted)
            else:
                self._request(wanted)
            if len(self.buffer) == before:
                raise BadModelError(
                    f"{self.origin}: the connection ended after {before} of {min(wanted, self.size)} bytes",
                    hint="try again, or download the file and give its path",
                )

    def _request(self, wanted: int) -> None:
        start = len(self.buffer)
        response = self._session.get(
            self._url,
            headers={"Range": f"bytes={start}-{wanted - 1}", "Accept-Encoding": "identity"},
            stream=True,
            timeout=_TIMEOUTS,
        )
        if response.status_code == 200 and start == 0:
            self._stream = response
            self._fill(response, wanted)
            return
        with response:
            if response.status_code != 206:
                raise self._refused(response, start)
            self._fill(response, wanted)

    def close(self) -> None:
        if self._stream is not None:
            self._stream.close()

    def _fill(self, response: requests.Response, wanted: int) -> None:
        """Read until there are `wanted` bytes. `read1` returns what has come, so that the deadline is looked at."""
        start = len(self.buffer)
        read = getattr(response.raw, "read1", response.raw.read)
        n_bytes = self._total(response, start)
        while len(self.buffer) < (wanted if n_bytes is None else min(wanted, n_bytes)):
            if time.monotonic() > self._deadline:
                raise _too_slow(self.origin, f"{len(self.buffer)} bytes")
            try:
                chunk = read(min(_CHUNK, wanted - len(self.buffer)))
            except OverflowError as error:
                raise BadModelError(
                    f"{self.origin}: the server sends chunks of impossible lengths", hint="download it another way"
                ) from error
            if not chunk:
                break
            self.buffer += chunk
        self._settle(n_bytes)

    def _settle(self, n_bytes: int | None) -> None:
        """Take note of the file's size, unless it is unknown or another than before."""
        if self.buffer or n_bytes == 0:
            check_magic(bytes(self.buffer[:64]), self.origin)  # an error page deserves its own message
        if n_bytes is None:
            raise BadModelError(
                f"{self.origin}: the server does not say how large the file is",
                hint="download the file, then give its path",
            )
        if self.size not in {0, n_bytes}:
            raise BadModelError(
                f"{self.origin}: the file changed from {self.size} to {n_bytes} bytes while being read",
                hint="try again",
            )
        self.size = n_bytes

    def _total(self, response: requests.Response, start: int) -> int | None:
        """Bytes of the whole file, or None if the server does not say."""
        if response.status_code == 206:
            match = _CONTENT_RANGE.fullmatch(response.headers.get("Content-Range", ""))
            return int(match[2]) if match and int(match[1]) == start else None
        length = response.headers.get("Content-Length", "")
        return int(length) if re.fullmatch(r"[0-9]{1,19}", length) else None

    def _refused(self, response: requests.Response, start: int) -> BadModelError:
        status = response.status_code
        if status == 416 and start == 0:
            return BadModelError(f"{self.origin} is empty (0 bytes)", hint="check the address")
        reason = shown(response.reason or "")
        hint = _HINTS.get(status, "try again later" if status >= 500 else "check the address")
        return BadModelError(f"{self.origin}: the server answers {status} {reason}".rstrip(), hint=hint)


def _without_secrets(url: str) -> str:
    """The URL without user, password and query, which may hold tokens."""
    try:
        parts = urlsplit(url)
    except ValueError:  # "http://[::1": requests says so again
        return url.partition("?")[0]
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"


def _unreachable(origin: str, error: Exception) -> BadModelError:
    """What the network, the server or the address did, in one line."""
    hint = "check the address and the network, or download the file and give its path"
    if isinstance(error, requests.exceptions.TooManyRedirects):
        what = f"more than {_MAX_REDIRECTS} redirects"
    elif isinstance(error, requests.exceptions.InvalidSchema):
        what = "it redirects to something that is not http or https"
    elif isinstance(error, (requests.exceptions.InvalidURL, requests.exceptions.MissingSchema, UnicodeError)):
        what = "this is not a URL"
    elif not isinstance(error, (OSError, urllib3.exceptions.HTTPError)):  # urllib.parse's ValueError
        what = "it redirects to an address that is none"
    elif isinstance(error, (requests.exceptions.Timeout, urllib3.exceptions.TimeoutError, TimeoutError)):
        what = f"no answer within {_TIMEOUTS[1]} s"
    elif isinstance(error, requests.exceptions.SSLError):
        what = "no TLS connection (the certificate is not accepted, or the server speaks plain http)"
    elif "refused" in str(error):
        what = "the connection was refused"
    elif isinstance(error, requests.exceptions.ConnectionError):
        what = "the server cannot be reached"
    else:
        what = "the connection broke"
    return BadModelError(f"{origin}: {what}", hint=hint)
