"""What is MODEL? A path, a directory, one shard of several, a URL, or a mistake that deserves a good answer."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import BinaryIO, Final

from msgspec.structs import replace

from mgpu.errors import BadModelError
from mgpu.inspect.foreign import check_magic, listed_names, shown
from mgpu.inspect.gguf import DAMAGED, Header, parse_header
from mgpu.inspect.gguf_model import build_model
from mgpu.model import Model, ModelFile

_PIECE: Final = 256 << 10  # bytes of a header that are read at a time
_GGUF: Final = ".gguf"
_SAFETENSORS: Final = ".safetensors"
#: What tells that a directory is meant to be a model in Hugging Face's format, whole or not.
_HF_FILES: Final = frozenset({"config.json", "adapter_config.json", "params.json"})
_HF_SUFFIXES: Final = (_SAFETENSORS, ".safetensors.index.json", ".bin", ".pt", ".pth")

ReadHeader = Callable[[str], tuple[Header, ModelFile]]


def read_model(argument: str) -> Model:
    """The model that `argument` names. Raises `BadModelError` for everything that cannot be one."""
    scheme, colon, _ = argument.partition("://")
    if not colon:
        path, alias = _find(argument)
        model = _read_path(path)
        return model if alias is None else replace(model, alias=alias)
    if scheme.lower() in {"http", "https"}:
        from mgpu.inspect.remote import read_header

        return _assemble(argument, read_header)
    raise BadModelError(
        f"{shown(argument)}: {shown(scheme)}:// is not supported",
        hint="give the path of a .gguf file or of a model's directory, or the http(s) URL of a .gguf",
    )


def _read_path(path: Path) -> Model:
    """The model of a GGUF file, or of a directory in Hugging Face's format, as `_find` gives them."""
    if path.is_dir():
        from mgpu.inspect.hf_model import read_directory

        return read_directory(path)
    if path.name.endswith(_SAFETENSORS):
        raise BadModelError(
            f"{shown(str(path))} is one file of a model that is a directory",
            hint=f"give the directory: {shown(str(path.parent))}",
        )
    return _assemble(str(path), _read_file)


def _assemble(path: str, read: ReadHeader) -> Model:
    """The model of which `path` is the file, or any shard."""
    header, file = read(path)
    n_shards = _n_shards(header, file.path)
    if n_shards <= 1:
        return build_model((header,), (file,))
    paths = _shard_paths(path, n_shards)
    if read is _read_file:
        _check_present(paths)
    shards = [(header, file) if shard == path else read(shard) for shard in paths]
    headers, files = zip(*shards, strict=True)
    _check_shards(headers, [file.path for file in files])
    return build_model(headers, files)


def _n_shards(header: Header, path: str) -> int:
    count = header.metadata.get("split.count", 1)
    if not isinstance(count, int) or not 0 <= count <= 0xFFFF:  # u16
        raise BadModelError(f"{shown(path)}: split.count is {shown(str(count))}, not a number of shards", hint=DAMAGED)
    return count


def _shard_paths(path: str, n_shards: int) -> tuple[str, ...]:
    """All shards, by llama.cpp's naming, `PREFIX-00001-of-00003.gguf`; a URL's query goes with each."""
    base, mark, query = path.partition("?") if "://" in path else (path, "", "")
    ending = f"-of-{n_shards:05d}{_GGUF}"
    stem = base.removesuffix(ending)
    prefix, number = stem[:-6], stem[-5:]
    if stem == base or stem[-6:-5] != "-" or not (number.isdecimal() and number.isascii()):
        raise BadModelError(
            f"{shown(base)} is one of {n_shards} shards (split.count), but its name does not say which",
            hint=f"give the shards their published names back: NAME-00001{ending}",
        )
    return tuple(f"{prefix}-{no:05d}{ending}{mark}{query}" for no in range(1, n_shards + 1))


def _check_present(paths: Sequence[str]) -> None:
    missing = [Path(path).name for path in paths if not Path(path).exists()]
    if missing:
        directory = shown(str(Path(paths[0]).parent))
        raise BadModelError(
            f"{len(missing)} of {len(paths)} shards are missing in {directory}: {listed_names(missing)}",
            hint="download the missing shards into the same directory",
        )


def _check_shards(headers: Sequence[Header], paths: Sequence[str]) -> None:
    """Numbers, counts and tensors must agree (`src/llama-model-loader.cpp` of llama.cpp b11434)."""
    home: dict[str, str] = {}
    for index, (header, path) in enumerate(zip(headers, paths, strict=True)):
        number, count = header.metadata.get("split.no"), header.metadata.get("split.count")
        if (number, count) != (index, len(paths)):
            raise BadModelError(
                f"{shown(path)}: split.no and split.count are {shown(str(number))} and {shown(str(count))}, "
                f"they must be {index} and {len(paths)}",
                hint="the shard was renamed, or is of another model: download it again",
            )
        for tensor in header.tensors:
            other = home.setdefault(tensor.name, path)
            if other != path:
                raise BadModelError(
                    f"{shown(path)}: the tensor {shown(tensor.name)} is also in {shown(other)}", hint=DAMAGED
                )
    expected = headers[0].metadata.get("split.tensors.count")
    if expected != len(home):
        raise BadModelError(
            f"{shown(paths[0])}: the shards hold {len(home)} tensors, split.tensors.count is {shown(str(expected))}",
            hint="a shard is of another model: download the shards again",
        )


def _read_file(path: str) -> tuple[Header, ModelFile]:
    """The header of a regular file."""
    try:
        if not stat.S_ISREG(Path(path).stat().st_mode):  # opening a FIFO would wait for a writer
            raise BadModelError(f"{shown(path)} is not a regular file", hint="give the path of a .gguf file")
        with Path(path).open("rb") as file:
            n_bytes = file.seek(0, 2)
            if n_bytes == 0:
                check_magic(b"", path)  # raises; some of /proc has no size, and keeps whoever reads it waiting
            header = _read_header(file, n_bytes, path)
    except OSError as error:
        raise _unreadable(path, error) from error
    return header, ModelFile(path=path, n_bytes=n_bytes)


def _read_header(file: BinaryIO, n_bytes: int, path: str) -> Header:
    """Read, not mapped: of a map, a file that is cut off meanwhile (a download begun anew) would leave a SIGBUS."""

    def read(at: int, end: int) -> bytes:
        file.seek(at)
        more = file.read(max(end - at, _PIECE))
        if at + len(more) < min(end, n_bytes):
            raise BadModelError(
                f"{shown(path)} became shorter while it was read: {at + len(more)} of {n_bytes} bytes are left",
                hint="wait until its download is over",
            )
        return more

    return parse_header(bytearray(read(0, 0)), n_bytes_total=n_bytes, origin=path, read=read)


def _find(argument: str) -> tuple[Path, str | None]:
    """The GGUF file that a path or directory means, or the directory itself: absolute, links not resolved.

    What is neither may be a name in Ollama's store: then its file there, and the name.
    """
    if not argument or "\0" in argument:
        raise BadModelError(f"not a path: {argument!r}", hint="give the path of a .gguf file")
    path = Path(argument).absolute()
    try:
        return (_find_in_directory(path) if stat.S_ISDIR(path.stat().st_mode) else path), None
    except (FileNotFoundError, NotADirectoryError):
        from mgpu.inspect.missing import explain_missing
        from mgpu.inspect.ollama_store import find_stored, stores

        directories = stores(os.environ)
        stored = None if path.is_symlink() else find_stored(argument, directories)
        if stored is not None:
            return stored.path, stored.name
        raise explain_missing(argument, path, directories) from None
    except OSError as error:
        raise _unreadable(argument, error) from error


def _unreadable(path: str, error: OSError) -> BadModelError:
    hint = "check who may read it: ls -l" if isinstance(error, PermissionError) else "check the path, and its disk"
    return BadModelError(f"{shown(path)} cannot be read: {error.strerror or error}", hint=hint)


def _find_in_directory(directory: Path) -> Path:
    """The one model in it: a file, or the first shard of a set. Projectors (mmproj) do not count beside a model.

    The directory itself if it is a model in Hugging Face's format; any GGUF in it can be named by its own path.
    """
    names = sorted(entry.name for entry in directory.iterdir())
    if "config.json" in names and any(name.endswith(_SAFETENSORS) for name in names):
        return directory
    ggufs = [name for name in names if name.lower().endswith(_GGUF) and not (directory / name).is_dir()]
    models = [name for name in ggufs if "mmproj" not in name.lower()] or ggufs
    firsts = sorted({_first_shard(name) for name in models})
    if len(firsts) == 1:
        # a set whose first shard is missing is named by one that is there: the complaint lists the others
        return directory / (firsts[0] if firsts[0] in models else models[0])
    if firsts:
        raise BadModelError(
            f"{shown(str(directory))} holds {len(firsts)} models: {listed_names(firsts)}",
            hint="give the path of one of them",
        )
    if any(name in _HF_FILES or name.endswith(_HF_SUFFIXES) for name in names):
        return directory  # what is missing there, is best said there
    raise _no_model(directory, names)


def _first_shard(name: str) -> str:
    """`"m-00002-of-00003.gguf"` as `"m-00001-of-00003.gguf"`; other names as they are."""
    parts = name.rsplit("-", 3)
    if len(parts) == 4 and parts[2] == "of" and parts[1].isdecimal() and len(parts[1]) == 5:
        return "-".join((parts[0], "00001", "of", parts[3]))
    return name


def _no_model(directory: Path, names: Sequence[str]) -> BadModelError:
    hint = "give the path of a .gguf file, or of a directory with config.json and *.safetensors"
    below = {path.parent.name for suffix in (_GGUF, _SAFETENSORS) for path in directory.glob("*/*" + suffix)}
    if snapshots := sorted(path.parent for path in directory.glob("snapshots/*/config.json")):
        what = "snapshots of a repository"  # the hub's cache: models--ORG--NAME
        hint = f"give the path of a snapshot: {shown(str(snapshots[0]))}"
    elif below:
        what = f"directories with some: {listed_names(sorted(below))}"
        hint = "give the path of one of them"
    else:
        what = listed_names(names) if names else "nothing"
    return BadModelError(
        f"{shown(str(directory))} has no .gguf and no *.safetensors file; it holds {what}",
        hint=hint,
    )
