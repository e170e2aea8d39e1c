"""Real models' headers (tests/data/oracle), and files of the models' full length whose weights are a hole."""

from __future__ import annotations

import functools
import gzip
import math
import os
from pathlib import Path
from typing import Final

from msgspec.structs import replace

from mgpu.inspect.gguf import TYPES
from mgpu.model import Model

#: Elements of a block, and its bytes, by the type's name.
_BLOCKS: Final = {name: (elements, size) for name, elements, size in TYPES.values()}

_DATA: Final = Path(__file__).parent / "data" / "oracle"


@functools.cache
def sizes() -> dict[str, int]:
    """Bytes of each model's whole file, by the model's name."""
    lines = (_DATA / "sizes.csv").read_text(encoding="utf-8").splitlines()[1:]
    return {name: int(size) for name, size in (line.split(",") for line in lines)}


def content(name: str) -> bytes:
    """A model's header: its file up to the tensor data."""
    return gzip.decompress((_DATA / "headers" / f"{name}.gguf.header.gz").read_bytes())


def write_model(name: str, directory: Path) -> Path:
    """`NAME.gguf` in `directory`, sparse; as it is where it is there already."""
    path = directory / f"{name}.gguf"
    if not path.exists():
        path.write_bytes(content(name))
        os.truncate(path, sizes()[name])
    return path


def requantized(model: Model, type_name: str) -> Model:
    """The same model with every quantised or 16-bit matrix in another type, as its file would be read."""
    elements, block = _BLOCKS[type_name]
    tensors = tuple(
        replace(tensor, type=type_name, n_bytes=math.prod(tensor.shape) // elements * block)
        if len(tensor.shape) > 1 and tensor.type != "F32" and tensor.shape[0] % elements == 0
        else tensor
        for tensor in model.tensors
    )
    size = sum(tensor.n_bytes for tensor in tensors)
    file = replace(model.files[0], n_bytes=size)
    name = model.name.replace(model.quantization, type_name)
    return replace(model, tensors=tensors, quantization=type_name, name=name, files=(file,))
