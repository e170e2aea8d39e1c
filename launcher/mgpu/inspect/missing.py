"""MODEL names nothing on this machine: what was probably meant."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Final

from mgpu.errors import BadModelError
from mgpu.inspect.foreign import shown

_MAX_ENTRIES: Final = 2000  # of a directory, looked at for close names
_HOSTS: Final = ("huggingface.co/", "www.huggingface.co/", "hf.co/", "modelscope.cn/")
_OLLAMA: Final = re.compile(r"[A-Za-z0-9][\w.-]*(?:/[\w.-]+){0,2}:[\w.-]+", re.ASCII)
_REPOSITORY: Final = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+", re.ASCII)


def explain_missing(argument: str, path: Path, stores: Sequence[Path] = ()) -> BadModelError:
    """The error for `argument`, which is no file, nor a name in Ollama's `stores`; `path` is its absolute form."""
    what = f"no such file: {shown(argument)}"
    if path.is_symlink():
        return BadModelError(
            f"{shown(argument)} is a link to {shown(str(path.readlink()))}, which does not exist",
            hint="restore the file it points to, or give another path",
        )
    close = [str(Path(argument).parent / name) for name in _close_names(path)]
    if close:
        return BadModelError(what, hint="did you mean " + " or ".join(shown(name) for name in close) + "?")
    if _is_ollama_name(argument):
        return _unknown_to_ollama(argument, stores)
    return BadModelError(what, hint=_hint(argument, path))


def _is_ollama_name(argument: str) -> bool:
    if argument.lower().endswith(".gguf") or (argument.startswith(_HOSTS) and ".gguf" in argument):
        return False
    return re.fullmatch(r"[\w.-]+", argument, re.ASCII) is not None or _OLLAMA.fullmatch(argument) is not None


def _unknown_to_ollama(argument: str, stores: Sequence[Path]) -> BadModelError:
    """A name without a file: perhaps of a model that Ollama has, under another name or in another place."""
    from mgpu.inspect.ollama_store import close_names

    if not stores:
        return BadModelError(
            f"no such file: {shown(argument)}, and no Ollama store here to look for a model of that name",
            hint="give the path of a .gguf file; or name Ollama's store with OLLAMA_MODELS",
        )
    where = " or ".join(shown(str(store)) for store in stores)
    what = f"no such file: {shown(argument)}, and no model of that name in Ollama's store ({where})"
    close = close_names(argument, stores)
    if close:
        return BadModelError(what, hint="did you mean " + " or ".join(shown(name) for name in close) + "?")
    return BadModelError(what, hint=f"`ollama pull {argument}` fetches it; `ollama list` shows what is there")


def _close_names(path: Path) -> list[str]:
    """Models and directories beside `path` whose names are near."""
    try:
        names = [
            entry.name
            for entry in islice(path.parent.iterdir(), _MAX_ENTRIES)
            if entry.name.lower().endswith(".gguf") or entry.is_dir()
        ]
    except OSError:
        return []
    return difflib.get_close_matches(path.name, names, n=3, cutoff=0.6)


def _hint(argument: str, path: Path) -> str:
    if argument.startswith(_HOSTS) and ".gguf" in argument:
        return f"for a URL, put https:// before it: https://{shown(argument)}"
    if argument.startswith("~"):
        return "the shell did not expand the ~: write the path without quotes"
    if argument.lower().endswith(".gguf"):
        return "check the path" if path.parent.is_dir() else f"there is no directory {shown(str(path.parent))}"
    if _REPOSITORY.fullmatch(argument):
        return (
            "a path of a .gguf file is needed; for a Hugging Face repository, give the URL of one file: "
            f"https://huggingface.co/{argument}/resolve/main/FILE.gguf"
        )
    return "give the path of a .gguf file, or its http(s) URL"
