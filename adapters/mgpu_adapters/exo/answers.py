"""What the answers of Exo's API mean: a decoded body, a token, or a reason."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

from mgpu.errors import RuntimeFailedError
from mgpu.service import Answer
from mgpu_adapters.exo.state import decode

T = TypeVar("T")

_OK = 200


def body_of(answer: Answer, kind: type[T], what: str, url: str) -> T:
    """The body as `kind`. Raises `RuntimeFailedError` where there is none."""
    if answer.status == 0:
        raise RuntimeFailedError(
            f"lost the Exo cluster at {url}: {answer.body or 'no answer'}",
            hint="see whether Exo still runs on that machine",
        )
    if answer.status != _OK:
        raise RuntimeFailedError(f"Exo does not tell its {what}: {reason(answer)}", hint=f"look at {url}")
    try:
        return decode(answer.body, kind)
    except ValueError as error:
        raise RuntimeFailedError(
            f"Exo tells its {what} in a way that mgpu does not know: {error}", hint="update Exo, or mgpu"
        ) from error


def reason(answer: Answer) -> str:
    """Exo's own words for a refusal (`{"error": {"message": …}}`), at most 300 characters."""
    error = answer.body.get("error") if isinstance(answer.body, Mapping) else None
    message = error.get("message") if isinstance(error, Mapping) else error or answer.body
    return f"{message or f'HTTP {answer.status} without a word'}"[:300]


def has_error(answer: Answer) -> bool:
    """An event of a stream that breaks it off."""
    return isinstance(answer.body, Mapping) and bool(answer.body.get("error"))


def has_token(answer: Answer) -> bool:
    """An event of a streamed chat completion with text, thoughts, or the word that a token was generated."""
    if answer.status != _OK or not isinstance(answer.body, Mapping):
        return False
    usage = answer.body.get("usage")
    if isinstance(usage, Mapping) and usage.get("completion_tokens"):
        return True
    return any(_text_of(choice) for choice in answer.body.get("choices") or ())


def _text_of(choice: Any) -> bool:
    delta = choice.get("delta") if isinstance(choice, Mapping) else None
    return isinstance(delta, Mapping) and bool(delta.get("content") or delta.get("reasoning_content"))
