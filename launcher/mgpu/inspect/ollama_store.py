"""Models by their names in Ollama's own store, read without a server.

A manifest, `manifests/<host>/<namespace>/<model>/<tag>`, names blobs by digest; the one of type `…image.model` is a
GGUF. Sources: ollama/ollama fb30760 (v0.33.0-rc2), types/model/name.go, manifest/paths.go, manifest/manifest.go.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Final

import msgspec
from msgspec import Struct

from mgpu.errors import UNREADABLE, BadModelError
from mgpu.inspect.foreign import shown

_HOST: Final = "registry.ollama.ai"
_NAMESPACE: Final = "library"
_TAG: Final = "latest"
_SERVICE_STORE: Final = Path("/usr/share/ollama/.ollama/models")  # of the installer's systemd unit

_PART: Final = r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,79}"
_NAME: Final = re.compile(
    rf"(?:(?:(?P<host>{_PART}(?::[0-9]{{1,5}})?)/)?(?P<namespace>[A-Za-z0-9_][A-Za-z0-9_-]{{0,79}})/)?"
    rf"(?P<model>{_PART})(?::(?P<tag>{_PART}))?"
)
_DIGEST: Final = re.compile(r"sha256[:-]([0-9a-f]{64})")
_MODEL: Final = "application/vnd.ollama.image.model"
_TENSOR: Final = "application/vnd.ollama.image.tensor"

_MAX_MANIFEST: Final = 4 << 20
_MAX_NAMES: Final = 5000  # looked at for close ones


class Stored(Struct, frozen=True, kw_only=True):
    """A model in a store: the name Ollama lists it by, and its GGUF."""

    name: str
    path: Path


class _Layer(Struct, frozen=True):
    mediaType: str = ""  # noqa: N815 - the manifest's own key
    digest: str = ""


class _Manifest(Struct, frozen=True):
    layers: tuple[_Layer, ...] = ()


def stores(environ: Mapping[str, str]) -> tuple[Path, ...]:
    """The stores on this machine: $OLLAMA_MODELS alone where it is set; else the person's own and the service's."""
    given = environ.get("OLLAMA_MODELS")
    try:
        places = (Path(given),) if given else (Path("~/.ollama/models").expanduser(), _SERVICE_STORE)
    except RuntimeError:  # nobody's home
        places = (_SERVICE_STORE,)
    return tuple(place for place in places if _is_directory(place / "manifests"))


def find_stored(name: str, directories: Sequence[Path]) -> Stored | None:
    """The model called `name` in the first of `directories` that has it; None where none has, or it is no name.

    Raises `BadModelError` for a model that has no GGUF, or whose GGUF is not there or not ours to read.
    """
    match = _NAME.fullmatch(name)
    if match is None:
        return None
    parts = (match["host"] or _HOST, match["namespace"] or _NAMESPACE, match["model"], match["tag"] or _TAG)
    for directory in directories:
        manifest = _manifest_of(directory / "manifests", parts)
        if manifest is not None:
            return _stored(directory, manifest)
    return None


def close_names(name: str, directories: Sequence[Path]) -> list[str]:
    """At most three names in the stores that are near to `name`, the nearest first."""
    known = [_name_of(directory / "manifests", path) for directory in directories for path in _manifests(directory)]
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.6)
    tags = [other for other in known if other.partition(":")[0] == name.partition(":")[0] and other not in near]
    return [*near, *tags][:3]


def _stored(directory: Path, manifest: Path) -> Stored:
    name = _name_of(directory / "manifests", manifest)
    layers = _read(name, manifest).layers
    digest = next((_DIGEST.fullmatch(layer.digest) for layer in layers if layer.mediaType == _MODEL), None)
    if digest is None:
        raise BadModelError(*_without_gguf(name, layers))
    for mark in "-:":  # ":" in very old stores
        blob = directory / "blobs" / f"sha256{mark}{digest[1]}"
        if _exists(blob, name):
            return Stored(name=name, path=blob.absolute())
    raise BadModelError(
        f"{shown(name)} is in Ollama's store, but its blob sha256-{digest[1][:12]}… is not",
        hint=f"fetch it again: ollama pull {name}",
    )


def _without_gguf(name: str, layers: Sequence[_Layer]) -> tuple[str]:
    if any(layer.mediaType == _TENSOR for layer in layers):
        return (f"{shown(name)} is in Ollama's store as safetensors for its MLX runner: mgpu needs a GGUF of it",)
    return (f"{shown(name)} has no weights in Ollama's store: it runs in Ollama's cloud",)


def _read(name: str, manifest: Path) -> _Manifest:
    try:
        with manifest.open("rb") as file:
            return msgspec.json.decode(file.read(_MAX_MANIFEST), type=_Manifest)
    except UNREADABLE as error:
        raise BadModelError(
            f"the manifest of {shown(name)} is damaged: {shown(str(manifest))}",
            hint=f"fetch it again: ollama pull {name}",
        ) from error
    except OSError as error:
        raise _unreadable(name, manifest, error) from error


def _manifest_of(root: Path, parts: tuple[str, ...]) -> Path | None:
    """The file at `parts` below `root`; names are the same in upper and lower case. None where we may not look."""
    here = root
    try:
        for part in parts:
            if not (here / part).exists():
                part = next((entry.name for entry in _entries(here) if entry.name.lower() == part.lower()), "")  # noqa: PLW2901 - the part as it is spelt on disk
                if not part:
                    return None
            here /= part
        return here if here.is_file() else None
    except OSError:  # a store of the service's own user
        return None


def _manifests(directory: Path) -> Iterator[Path]:
    try:
        yield from islice((path for path in (directory / "manifests").glob("*/*/*/*") if path.is_file()), _MAX_NAMES)
    except OSError:
        return


def _name_of(root: Path, manifest: Path) -> str:
    """As `ollama list` shows it: without the parts that go without saying."""
    host, namespace, model, tag = manifest.relative_to(root).parts
    if host != _HOST:
        return f"{host}/{namespace}/{model}:{tag}"
    return f"{model}:{tag}" if namespace == _NAMESPACE else f"{namespace}/{model}:{tag}"


def _entries(directory: Path) -> list[Path]:
    try:
        return sorted(islice(directory.iterdir(), _MAX_NAMES))
    except OSError:
        return []


def _exists(blob: Path, name: str) -> bool:
    try:
        blob.stat()
    except FileNotFoundError:
        return False
    except OSError as error:
        raise _unreadable(name, blob, error) from error
    return True


def _is_directory(path: Path) -> bool:
    try:
        return path.is_dir()
    except OSError:  # another person's home
        return False


def _unreadable(name: str, path: Path, error: OSError) -> BadModelError:
    return BadModelError(
        f"{shown(name)} is in Ollama's store, but {shown(str(path))} cannot be read: {error.strerror}",
        hint="join the group `ollama`, or run `ollama serve` as yourself with a store of your own",
    )
