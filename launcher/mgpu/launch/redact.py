"""Secrets taken out of a text that people will paste elsewhere: a crash report, the last lines of a log.

Known secrets go wherever they stand, as they are and as programs write them (JSON, URLs, shell); then what looks like
one. Too much is taken rather than too little: a text without a word can still be read.
"""

from __future__ import annotations

import json
import os
import re
import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Final
from urllib.parse import quote, quote_plus

MASK: Final = "***"

#: Shorter values of variables ("1", "true") are settings rather than secrets, and stand everywhere in a log.
_SHORTEST: Final = 6
_ROUNDS: Final = 4

_WORD: Final = r"(?:token|api[_-]?key|key|secret|password|passwd|passphrase|credentials?)"
_VALUE: Final = r"""(?:"(?:[^"\\\n]|\\.)*"?|'[^'\n]*'?|[^\s"',;&)}\]]+)"""

#: Names of variables whose values are secrets.
_VARIABLE: Final = re.compile(r"(?i)token|key|secret|passw|passphrase|credential|auth|cookie")

#: Repetitions have bounds: a log may hold anything, and no line of it may keep us.
#: The first group is what is taken; without groups, all of it.
_PATTERNS: Final = tuple(
    re.compile(pattern)
    for pattern in (
        # Headers: all that follows. `Bearer x` anywhere.
        r"""(?i)\b(?:(?:proxy-)?authorization|x-(?:api-key|[a-z-]{0,32}token)|(?:set-)?cookie)["']?\s*[:=]\s*["']?([^\r\n"']+)""",
        r"(?i)\b(?:bearer|basic)\s+([A-Za-z0-9._~+/=-]{6,})",
        # NAME=value, name: value, "name": "value"; the name has several words, or is a word for a secret alone.
        rf"""(?i)(?<![a-z0-9])(?:[a-z0-9]{{1,32}}[_-]){{1,6}}{_WORD}(?![a-z_-])["']?\s*[:=]\s*({_VALUE})""",
        rf"""(?i)(?<![a-z0-9_-])(?:api[_-]?key|secret|password|passwd|passphrase)["']?\s*[:=]\s*({_VALUE})""",
        # --hf-token value, -hft value; not --api-key-file.
        rf"""(?i)(?<!\S)["']?--(?:[a-z0-9]{{1,32}}[_-]){{0,6}}{_WORD}["']?(?:\s+|,\s*)({_VALUE})""",
        rf"""(?<!\S)["']?-hft["']?(?:\s+|,\s*)({_VALUE})""",
        # TabbyAPI tells its keys at its start (common/auth.py).
        r"(?i)\b(?:api|admin) key is:\s*(\S.*)",
        # URLs: who asks, and what a query signs with.
        r"""(?i)\b[a-z][a-z0-9+.-]{0,30}://([^\s/?#"'<>]{1,1024})@""",
        r"""(?i)[?&;](?:[a-z0-9_.-]{0,64}(?:token|key|secret|password|sig|signature|credential|auth|code))=([^&#\s"'<>]+)""",
        # By their form: Hugging Face, GitHub, OpenAI and its like, AWS, JSON web tokens, private keys.
        r"\bhf_[A-Za-z0-9]{8,}",
        r"\b(?:gh[pousr]_|github_pat_)[A-Za-z0-9_]{16,}",
        r"\bsk-[A-Za-z0-9_-]{8,}",
        r"\bAKIA[0-9A-Z]{12,}",
        r"\beyJ[\w-]{8,2048}\.[\w-]{8,}(?:\.[\w-]*)?",
        r"-----BEGIN [A-Z ]{0,40}PRIVATE KEY-----[\s\S]*?(?:-----END [A-Z ]{0,40}PRIVATE KEY-----|\Z)",
    )
)

Span = tuple[int, int]


def redact(text: str, secrets: Iterable[str] = (), *, home: str | None = None) -> str:
    """`text` with `MASK` for secrets and `~` for the home directory. `secrets`: those that are known.

    `home`: None for that of whoever runs this. No secret is left, not even one that the replacing would have made up.
    """
    known = sorted({form for secret in secrets for form in _forms(secret)}, key=len, reverse=True)
    home = os.path.expanduser("~") if home is None else home  # noqa: PTH111 - no Path: it may raise
    for _ in range(_ROUNDS):
        text = _redact_once(text, known, home)
        if not any(secret in text for secret in known):
            return text
    return MASK


def redact_words(words: Sequence[str], secrets: Iterable[str] = ()) -> tuple[str, ...]:
    """A command line's words, each by itself, with `MASK` for what follows a flag whose value is a secret."""
    kept: list[str] = []
    secret_next = False
    for word in words:
        kept.append(MASK if secret_next else redact(word, secrets, home=""))
        secret_next = not secret_next and _SECRET_FLAG.fullmatch(word) is not None
    return tuple(kept)


_SECRET_FLAG: Final = re.compile(rf"(?i)--(?:[a-z0-9]{{1,32}}[_-]){{0,6}}{_WORD}|-hft")


def secrets_of(environ: Mapping[str, str], *more: str | None) -> tuple[str, ...]:
    """The values of variables whose names say that they are secret, and `more`."""
    named = (value for name, value in environ.items() if _VARIABLE.search(name) and len(value) >= _SHORTEST)
    return tuple(dict.fromkeys((*filter(None, more), *named)))


def _forms(secret: str) -> set[str]:
    """As it is, and as programs write it. Nothing for what hides nothing: an empty one, or stars."""
    if not secret.strip("*"):
        return set()
    raw = secret.encode("utf-8", "surrogateescape")
    forms = {
        secret,
        json.dumps(secret)[1:-1],
        json.dumps(secret, ensure_ascii=False)[1:-1],
        quote(raw, safe=""),
        quote(raw),
        quote_plus(raw),
        shlex.quote(secret),
        repr(secret)[1:-1],
    }
    return {form for form in forms if form.strip("*")}


def _redact_once(text: str, known: Sequence[str], home: str) -> str:
    spans = _merged([*_places(text, known), *_matches(text)])
    pieces: list[str] = []
    end = 0
    for start, stop in spans:
        pieces += [_shorten(text[end:start], home), MASK]
        end = stop
    return "".join((*pieces, _shorten(text[end:], home)))


def _places(text: str, known: Sequence[str]) -> Iterator[Span]:
    """Where known secrets stand, overlapping ones included: the rest of one would tell of the other."""
    for secret in known:
        at = text.find(secret)
        while at >= 0:
            yield at, at + len(secret)
            at = text.find(secret, at + 1)


def _matches(text: str) -> Iterator[Span]:
    for pattern in _PATTERNS:
        group = min(pattern.groups, 1)
        yield from (match.span(group) for match in pattern.finditer(text) if match[group] != MASK)


def _merged(spans: Iterable[Span]) -> list[Span]:
    merged: list[Span] = []
    for start, stop in sorted(spans):
        if merged and start < merged[-1][1]:
            merged[-1] = (merged[-1][0], max(stop, merged[-1][1]))
        else:
            merged.append((start, stop))
    return merged


def _shorten(text: str, home: str) -> str:
    """The home directory as a shell writes it. Not of those who have none ("/")."""
    home = home.rstrip("/")
    return re.sub(rf"{re.escape(home)}(?![\w.-])", "~", text) if home else text
