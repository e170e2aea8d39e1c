"""Which files of a model directory are the model: shards, their index, and what only lies beside them.

For plain and vLLM's formats the index decides, as in vLLM 0.32.0 (`model_loader/weight_utils.py`
filter_duplicate_safetensors_files): files it names must be there, others do not count. EXL2 and EXL3 loaders read every
*.safetensors and no index; that of an EXL2 model is a copy of the original model's
(ExLlamaV2 0.3.2 `conversion/compile.py`, ExLlamaV3 1.4.1 `loader/safetensors.py`).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Final

import msgspec

from mgpu.errors import UNREADABLE, BadModelError
from mgpu.inspect.foreign import listed_names, shown
from mgpu.inspect.hf_config import read_bounded, read_object
from mgpu.inspect.safetensors import MAX_HEADER_BYTES, TensorInfo, read_header
from mgpu.model import ModelFile

SUFFIX: Final = ".safetensors"
#: More tensors in one model are refused. The largest known (one trillion weights, quantised) has near 300,000.
MAX_TENSORS: Final = 1 << 20
_MAX_FILES: Final = 4096
_INDEX: Final = "model.safetensors.index.json"
_MISTRAL_INDEX: Final = "consolidated.safetensors.index.json"
#: Starts of names of files that lie beside a model: Mistral's own copy of the weights, adapters, a trainer's state.
_BESIDE: Final = ("consolidated", "adapter", "optimizer", "training_args", "scheduler", "mmproj", "lora")
_SHARD: Final = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.safetensors", re.ASCII | re.DOTALL)
_PYTORCH: Final = (".bin", ".pt", ".pth", ".ckpt")
_AGAIN: Final = "download the model again, all of its files (hf download resumes)"


class Weights(msgspec.Struct, frozen=True, kw_only=True):
    """The model's files in order, and all their tensors in that order."""

    files: tuple[ModelFile, ...]
    tensors: tuple[TensorInfo, ...]


class _Index(msgspec.Struct):
    weight_map: Annotated[dict[str, str], msgspec.Meta(min_length=1)]


def read_weights(directory: Path, names: Sequence[str], method: str) -> Weights:
    """The headers of all files of the model in `directory`, whose entries are `names`. `method`: `quant_method`."""
    candidates, index_name = _candidates(names)
    without_index = method in {"exl2", "exl3"} or index_name not in names
    if without_index:
        if not candidates:
            raise _no_weights(directory, names)
        _check_numbers(directory, candidates)
        return _gather(directory, candidates)
    listed = _read_index(directory / index_name)
    in_index = sorted(set(listed.values()))
    missing = [name for name in in_index if name not in names]
    if missing:
        none_there = len(missing) == len(in_index) and bool(candidates)
        weights = _gather(directory, candidates) if none_there else None
        if weights is not None and _is_exllama(weights.tensors):  # an EXL2 model that does not say so
            return weights
        raise _missing(directory, index_name, missing, len(in_index), none_there=none_there)
    weights = _gather(directory, in_index)
    _check_index(directory / index_name, listed, weights.tensors)
    return weights


def _candidates(names: Sequence[str]) -> tuple[list[str], str]:
    """The files that may be the model, and the name of their index. Mistral's own copy, if there is nothing else.

    (Where both are there, vLLM takes Mistral's copy. It is the same model.)
    """
    all_files = [name for name in names if name.endswith(SUFFIX)]
    files = [name for name in all_files if not name.startswith(_BESIDE)]
    if files or _INDEX in names:
        return files, _INDEX
    return [name for name in all_files if name.startswith("consolidated")], _MISTRAL_INDEX


def _gather(directory: Path, names: Sequence[str]) -> Weights:
    """All tensors of these files. Raises for a tensor in two files."""
    where = shown(str(directory))
    if len(names) > _MAX_FILES:
        raise BadModelError(f"{where} holds {len(names)} *.safetensors files", hint=_AGAIN)
    home: dict[str, str] = {}
    tensors: list[TensorInfo] = []
    files: list[ModelFile] = []
    for name in names:
        header = read_header(directory / name)
        files.append(ModelFile(path=str(directory / name), n_bytes=header.n_bytes))
        for tensor in header.tensors:
            other = home.setdefault(tensor.name, name)
            if other != name:
                raise BadModelError(
                    f"{where}: the tensor {shown(tensor.name)} is in {shown(other)} and in {shown(name)}",
                    hint="one of the files is left over from another download: move it out of the directory",
                )
        tensors += header.tensors
        if len(tensors) > MAX_TENSORS:
            raise BadModelError(f"{where} has more than {MAX_TENSORS} tensors", hint=_AGAIN)
    return Weights(files=tuple(files), tensors=tuple(tensors))


def _check_numbers(directory: Path, names: Sequence[str]) -> None:
    """Without an index, the numbers in the names tell whether a shard is missing."""
    for name in names:
        match = _SHARD.fullmatch(name)
        if match is None or int(match[3]) > _MAX_FILES:
            continue
        whole = [f"{match[1]}-{number:05d}-of-{match[3]}{SUFFIX}" for number in range(1, int(match[3]) + 1)]
        missing = sorted(set(whole) - set(names))
        if missing:
            raise _shards_missing(directory, missing, len(whole))


def _is_exllama(tensors: Iterable[TensorInfo]) -> bool:
    return any(tensor.name.endswith((".q_weight", ".trellis")) for tensor in tensors)


def _read_index(path: Path) -> Mapping[str, str]:
    """`weight_map`: tensor -> file."""
    origin = shown(str(path))
    raw = read_bounded(path, MAX_HEADER_BYTES)
    if raw.count(b":") > 2 * MAX_TENSORS:  # known before anything is built
        raise BadModelError(f"{origin} names more than {MAX_TENSORS} tensors", hint=_AGAIN)
    try:
        weight_map = msgspec.json.decode(raw, type=_Index).weight_map
    except UNREADABLE as error:
        what = "has no sound weight_map, an object of tensors and their files"
        raise BadModelError(f"{origin} {what}: {shown(str(error))}", hint=_AGAIN) from None
    for name in sorted(set(weight_map.values())):
        if "/" in name or "\0" in name or name in {"", ".", ".."}:
            raise BadModelError(f"{origin} names the file {shown(repr(name))}, which cannot be one", hint=_AGAIN)
    return weight_map


def _check_index(path: Path, listed: Mapping[str, str], tensors: Iterable[TensorInfo]) -> None:
    """Every tensor the index names must be in one of its files; which one does not matter to vLLM."""
    lost = sorted(set(listed) - {tensor.name for tensor in tensors})
    if lost:
        raise BadModelError(
            f"{shown(str(path))} names {len(lost)} tensors that are in none of its files: {listed_names(lost)}",
            hint="the index is of another version of the model: download it again with the weights, or remove it if "
            "the *.safetensors files are the whole model",
        )


def _missing(
    directory: Path, index_name: str, missing: Sequence[str], n_files: int, *, none_there: bool
) -> BadModelError:
    if not none_there:
        return _shards_missing(directory, missing, n_files)
    return BadModelError(
        f"{shown(str(directory))}: none of the files that {index_name} names is there ({listed_names(missing)})",
        hint=f"if the *{SUFFIX} files that are there are the whole model, remove {index_name}, which is then of "
        "another version",
    )


def _shards_missing(directory: Path, missing: Sequence[str], n_files: int) -> BadModelError:
    return BadModelError(
        f"{len(missing)} of {n_files} shards are missing in {shown(str(directory))}: {listed_names(missing)}",
        hint="download the missing shards into the same directory (hf download resumes)",
    )


def _no_weights(directory: Path, names: Sequence[str]) -> BadModelError:
    """There is a configuration, or files of another format, but no *.safetensors of a model."""
    where = shown(str(directory))
    if "adapter_config.json" in names or any(name.startswith("adapter_model.") for name in names):
        return _adapter(directory, names)
    pytorch = [name for name in names if name.endswith(_PYTORCH)]
    if pytorch:
        return BadModelError(
            f"{where} has no *.safetensors file; it holds PyTorch weights: {listed_names(pytorch)}",
            hint="download the model's *.safetensors files, or convert it: transformers' save_pretrained writes them",
        )
    below = sorted({path.parent.name for path in directory.glob("*/*" + SUFFIX)})
    if below:
        return BadModelError(
            f"{where} has no *.safetensors file, but these directories in it do: {listed_names(below)}",
            hint="give the path of one of them",
        )
    return BadModelError(
        f"{where} has no *.safetensors file; it holds {listed_names(names)}",
        hint="download the model's *.safetensors files into it",
    )


def _adapter(directory: Path, names: Sequence[str]) -> BadModelError:
    base = ""
    if "adapter_config.json" in names:
        try:
            stated = read_object(directory / "adapter_config.json").get("base_model_name_or_path")
            base = stated if isinstance(stated, str) else ""
        except BadModelError:
            base = ""  # what it is made for is only a kindness here
    which = f", {shown(base)}" if base else ""
    return BadModelError(
        f"{shown(str(directory))} holds a LoRA adapter, not a model",
        hint=f"give the directory of the model it was made for{which}; after --, pass the adapter to the runtime",
    )
