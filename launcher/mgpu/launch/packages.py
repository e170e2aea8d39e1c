"""The version of an installed Python program, from the metadata of its package: without starting it or its Python."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Final

from msgspec import Struct

_HEAD: Final = 1024  # bytes of a program in which its interpreter is named
_SITES: Final = ("lib/python3*/site-packages", "lib64/python3*/site-packages", "lib/python3*/dist-packages")
#: What pip writes where the path of the interpreter is too long for a `#!` line, or holds a space.
_LONG: Final = re.compile(r"'''exec' (.+?) \"\$0\"")


class Distribution(Struct, frozen=True, kw_only=True):
    """A package as its metadata name it: `vllm`, `0.32.0+cpu`."""

    name: str
    version: str

    def __str__(self) -> str:
        return f"{self.name} {self.version}"


def find_distribution(executable: str, names: Sequence[str]) -> Distribution | None:
    """The first of `names` that is installed in the environment of `executable`; None where that cannot be told.

    The environment is that of the program's directory (`bin` beside `lib`), then that of the interpreter it names.
    """
    for prefix in dict.fromkeys(_prefixes(Path(executable))):
        for name in names:
            version = _version(prefix, name)
            if version is not None:
                return Distribution(name=name, version=version)
    return None


def _prefixes(executable: Path) -> Iterator[Path]:
    yield executable.absolute().parent.parent
    yield executable.resolve().parent.parent  # a link in ~/.local/bin to a tool's own environment
    interpreter = _interpreter(executable)
    if interpreter is not None:
        yield interpreter.parent.parent


def _interpreter(executable: Path) -> Path | None:
    """What stands behind `#!`, if it is a path."""
    try:
        with executable.open("rb") as file:
            lines = file.read(_HEAD).decode("utf-8", "replace").splitlines()
    except OSError:
        return None
    if not lines or not lines[0].startswith("#!"):
        return None
    named = lines[0].removeprefix("#!").strip()
    long = _LONG.match(lines[1]) if len(lines) > 1 else None
    try:
        words = shlex.split(long[1] if long else named)
    except ValueError:
        return None
    return Path(words[0]) if words and words[0].startswith("/") else None


def _version(prefix: Path, name: str) -> str | None:
    """By the name of the metadata's directory, `vllm-0.32.0+cpu.dist-info`; of several, the newest file."""
    stem = re.sub(r"[-_.]+", "_", name).lower()
    found: list[tuple[float, str]] = []
    with suppress(OSError):  # removed meanwhile; or what stands behind `#!` cannot be a path
        for site in _SITES:
            found += ((path.stat().st_mtime, path.name) for path in prefix.glob(f"{site}/{stem}-*.dist-info"))
    return max(found)[1].removeprefix(f"{stem}-").removesuffix(".dist-info") if found else None
