"""A directory in Hugging Face's format (config.json, *.safetensors) to `Model`. EXL2 and EXL3 too."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Final

from mgpu.errors import BadModelError
from mgpu.inspect.foreign import shown
from mgpu.inspect.hf_config import Config, read_object
from mgpu.inspect.hf_files import read_weights
from mgpu.inspect.hf_hyper import read_hyper
from mgpu.inspect.hf_names import classify, place
from mgpu.inspect.hf_quant import count_parameters, read_quantization, stated_method, with_own_file
from mgpu.inspect.safetensors import TensorInfo, unreadable
from mgpu.model import Model, Tensor, TensorClass

_CONFIG: Final = "config.json"

#: Settings that TabbyAPI takes from a model's directory, before those it is given.
_OBEYED: Final = ("tabby_config.yml",)


def read_directory(path: str | Path) -> Model:
    """The model in the directory `path`: its headers and JSON files are read, no weights. Raises `BadModelError`."""
    directory = Path(path).absolute()
    try:
        names = sorted(entry.name for entry in directory.iterdir())
    except OSError as error:
        raise unreadable(directory, error) from error
    config = with_own_file(_read_config(directory, names), directory, names)
    weights = read_weights(directory, names, stated_method(config))
    tensors = _tensors(weights.tensors)
    hyper = read_hyper(config, tensors)
    quantization = read_quantization(config, weights.tensors)
    return Model(
        path=str(directory),
        files=weights.files,
        format=quantization.format,
        architecture=_architecture(config),
        name=_name(directory),
        quantization=quantization.label,
        parameters=count_parameters(weights.tensors, quantization),
        hyper=hyper,
        tensors=tensors,
        metadata=config.metadata(),
        beside=tuple(name for name in names if name in _OBEYED),
    )


def _read_config(directory: Path, names: Iterable[str]) -> Config:
    names = frozenset(names)
    if _CONFIG in names:
        return Config(read_object(directory / _CONFIG), str(directory / _CONFIG))
    where = shown(str(directory))
    if "adapter_config.json" in names or "adapter_model.safetensors" in names or "params.json" in names:
        what = "Meta's or Mistral's own format (params.json)" if "params.json" in names else "a LoRA adapter"
        hint = f"give the directory of the model in Hugging Face's format, with {_CONFIG} and *.safetensors"
        raise BadModelError(f"{where} has no {_CONFIG}: it holds {what}", hint=hint)
    raise BadModelError(
        f"{where} has no {_CONFIG}, which says what the weights are",
        hint=f"download {_CONFIG} into it, from the same place as the weights",
    )


def _tensors(infos: Iterable[TensorInfo]) -> tuple[Tensor, ...]:
    """All tensors, with their block and class."""
    kinds: dict[tuple[bool, str], TensorClass] = {}
    tensors: list[Tensor] = []
    for info in infos:
        layer, rest = place(info.name)
        key = (layer is not None, rest)
        kind = kinds.get(key)
        if kind is None:
            kind = kinds[key] = classify(rest, in_block=layer is not None)
        tensors.append(
            Tensor(name=info.name, shape=info.shape, type=info.type, n_bytes=info.n_bytes, layer=layer, kind=kind)
        )
    return tuple(tensors)


def _architecture(config: Config) -> str:
    """`model_type`; in its absence the model's class."""
    name = config.text("model_type", "architectures")
    if (
        not 0 < len(name) <= 64
        or not name.isascii()
        or not all(letter.isalnum() or letter in "._+-" for letter in name)
    ):
        raise config.bad(f"model_type is {shown(repr(name))}, not the name of an architecture")
    return name


def _name(directory: Path) -> str:
    """The directory's name; in the hub's cache, the repository's: `models--ORG--NAME/snapshots/COMMIT`."""
    repository = directory.parent.parent.name
    if directory.parent.name == "snapshots" and repository.startswith("models--"):
        return shown(repository.rpartition("--")[2])
    return shown(directory.name or str(directory))
