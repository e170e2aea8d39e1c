"""What is fuzzed: a parser behind a function of bytes, and what it may do with them."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Final

from msgspec import Struct

from mgpu.errors import MgpuError

CORPUS: Final = Path(__file__).with_name("corpus")

#: Characters of a message, at most: what is said must be one line that a person reads.
MOST_SAID: Final = 500
MIB: Final = 1 << 20


class Target(Struct, frozen=True, kw_only=True):
    """One parser. `check` gives it the bytes: it may take them, or raise one of `refuses`; all else is a finding.

    Inputs are made from the files of `corpus/NAME/` and from `seeds`, with `tokens` as words. `weight`: how many inputs
    it gets, against the cheap parsers' 1.0. A batch of `batch` inputs must end within `cpu_s` seconds of processor
    time, and each input alone within `alone_s`; address space may grow by `memory` bytes, files to `file_bytes`.
    """

    name: str
    check: Callable[[bytes], object]
    refuses: tuple[type[MgpuError], ...] = ()
    seeds: Callable[[], Iterable[bytes]] = tuple
    tokens: tuple[bytes, ...] = ()
    weight: float = 1.0
    most: int = 1 << 16
    batch: int = 2000
    cpu_s: int = 60
    alone_s: int = 2
    memory: int = 256 * MIB
    file_bytes: int = 16 * MIB

    @property
    def directory(self) -> Path:
        return CORPUS / self.name

    def pool(self) -> tuple[bytes, ...]:
        """What inputs are made from: the corpus in the order of its names, then the seeds."""
        return (*(path.read_bytes() for path in corpus_files(self)), *self.seeds()) or (b"",)

    def run(self, data: bytes) -> str:
        """What became of it: "taken", or the name of the refusal. Raises for a finding."""
        try:
            self.check(data)
        except self.refuses as refusal:
            check_said(refusal)
            return type(refusal).__name__
        return "taken"


def corpus_files(target: Target) -> list[Path]:
    return sorted(target.directory.iterdir()) if target.directory.is_dir() else []


def check_said(error: MgpuError) -> None:
    """One printable line of sane length, and a hint likewise."""
    assert 0 < len(error.message) < MOST_SAID, f"{len(error.message)} characters: {error.message[:80]!r}…"
    assert error.message.isprintable(), f"not printable: {error.message!r}"
    assert len(error.hint) < 2 * MOST_SAID, f"a hint of {len(error.hint)} characters: {error.hint[:80]!r}…"
    assert error.hint.isprintable(), f"hint not printable: {error.hint!r}"


def check_line(text: str, most: int = MOST_SAID) -> None:
    """For what is printed beside errors."""
    assert text.isprintable(), f"not printable: {text!r}"
    assert len(text) < most, f"{len(text)} characters: {text[:80]!r}…"


def scratch() -> Path:
    """An own directory of this process, for targets that need files."""
    return Path(os.environ["MGPU_FUZZ_SCRATCH"])
