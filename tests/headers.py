"""Real models' headers (tests/data/oracle), and files of the models' full length whose weights are a hole."""

from __future__ import annotations

import functools
import gzip
import os
from pathlib import Path
from typing import Final

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
