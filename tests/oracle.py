"""What llama.cpp really reserves, per device: golden figures of one build, and the same questions put to mgpu.

See tests/data/oracle/README.md for where the figures come from.
"""

from __future__ import annotations

import csv
import functools
import gzip
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Final, Literal

from msgspec import Struct

from headers import content, sizes
from mgpu.inspect.gguf import parse_header
from mgpu.inspect.gguf_model import build_model
from mgpu.model import Model, ModelFile
from mgpu.plan import Shape
from mgpu.rig import Gpu
from mgpu_adapters.llamacpp.assign import assign
from mgpu_adapters.llamacpp.memory import Footprint, footprint
from mgpu_adapters.llamacpp.settings import Settings

_DATA: Final = Path(__file__).parent / "data" / "oracle"
_ROOMY: Final = 1 << 40

#: Which rules the figures were made with: plain ones (CPU devices over RPC), or those of CUDA.
Table = Literal["rpc", "cuda"]
TABLES: Final[tuple[Table, ...]] = ("rpc", "cuda")

Sizes = tuple[int, int, int]  # weights, KV cache and recurrent state, compute


class Golden(Struct, frozen=True, kw_only=True):
    """One configuration: what was asked, and the bytes reserved by device (those with no layer left out)."""

    table: Table
    model: str
    settings: Settings
    shape: Shape
    counts: tuple[int, ...]
    devices: tuple[Sizes | None, ...]
    host: Sizes

    def spans(self) -> Iterator[tuple[int, range]]:
        """Device and its units, of those that have any."""
        start = self.shape.host_layers
        for device, count in enumerate(self.counts):
            if count:
                yield device, range(start, start + count)
            start += count

    def gpus(self) -> tuple[Gpu, ...]:
        return tuple(gpu_of(self.table, device) for device in range(len(self.counts)))


class Logged(Struct, frozen=True, kw_only=True):
    """What a real llama-server wrote to its log for a small model, in MiB by device; None: not comparable."""

    model: str
    settings: Settings
    shape: Shape
    counts: tuple[int, ...]
    devices: tuple[tuple[float | None, float, float], ...]  # weights, cache and state, compute; the host last


class Answer(Struct, frozen=True, kw_only=True):
    """One device (None: the host) of a configuration: what mgpu says, and what llama.cpp reserves."""

    golden: Golden
    device: int | None
    predicted: Sizes
    real: Sizes

    @property
    def error(self) -> float:
        """Of the total, as a share of what is really reserved; negative when mgpu says less."""
        return (sum(self.predicted) - sum(self.real)) / max(sum(self.real), 1)


def gpu_of(table: Table, device: int = 0) -> Gpu:
    """A card with room for anything, driven as the table's devices were."""
    cuda = table == "cuda"
    return Gpu(
        index=device,
        name="card",
        vendor="nvidia" if cuda else "unknown",
        total_bytes=_ROOMY,
        free_bytes=_ROOMY,
        device=f"{'CUDA' if cuda else 'RPC'}{device}",
    )


def model_names() -> tuple[str, ...]:
    return tuple(sizes())


@functools.cache
def model_of(name: str) -> Model:
    return _model(content(name), name, sizes()[name])


def read_header(path: Path, n_bytes: int) -> Model:
    """The model whose header is in `path`, as a file of that size."""
    return _model(gzip.decompress(path.read_bytes()), path.name.removesuffix(".gguf.header.gz"), n_bytes)


def _model(content: bytes, name: str, n_bytes: int) -> Model:
    header = parse_header(content, n_bytes_total=n_bytes, origin=name)
    return build_model([header], (ModelFile(path=f"/models/{name}.gguf", n_bytes=n_bytes),))


@functools.cache
def footprint_of(name: str) -> Footprint:
    return footprint(model_of(name), Settings(n_ctx=4096))


@functools.cache
def goldens(table: Table) -> tuple[Golden, ...]:
    """Every configuration of a table."""
    with gzip.open(_DATA / f"{table}.csv.gz", "rt") as file:
        return tuple(_golden(table, rows) for rows in _groups(file))


def _groups(file: Iterable[str]) -> list[list[dict[str, str]]]:
    """Rows by configuration: one that names its model begins a new one."""
    groups: list[list[dict[str, str]]] = []
    for row in csv.DictReader(file):
        if row["model"]:
            groups.append([])
        groups[-1].append(row)
    return groups


def _golden(table: Table, rows: list[dict[str, str]]) -> Golden:
    first = rows[0]
    number = {key: int(first[key]) for key in ("ngl", "ctx", "ub", "b", "np", "n_cpu_moe", "n_dev")}
    n_units = model_of(first["model"]).hyper.n_layer + 1
    host_layers = max(n_units - number["ngl"], 0)
    split = [float(part) for part in first["ts"].split(",")] if first["ts"] else [1.0] * number["n_dev"]
    split += [0.0] * (number["n_dev"] - len(split))
    counts = assign(split, n_units, host_layers) if host_layers < n_units else (0,) * number["n_dev"]
    sizes = {row["device"]: (int(row["weights"]), int(row["kv"]), int(row["compute"])) for row in rows}
    return Golden(
        table=table,
        model=first["model"],
        settings=Settings(
            n_ctx=number["ctx"],
            n_parallel=number["np"],
            kv_unified=first["kvu"] == "1",
            n_batch=number["b"],
            n_ubatch=number["ub"],
            flash_attn=first["fa"] == "on",
            type_k=first["ctk"],
            type_v=first["ctv"],
            kv_offload=first["nkvo"] == "0",
            swa_full=first["swa_full"] == "1",
        ),
        shape=Shape(n_devices=number["n_dev"], host_layers=host_layers, host_experts=number["n_cpu_moe"]),
        counts=counts,
        devices=tuple(sizes.get(f"RPC{device}") for device in range(number["n_dev"])),
        host=sizes["Host"],
    )


@functools.cache
def small_model(name: str) -> Model:
    """A small model with made-up sizes, for its architecture's sake."""
    with (_DATA / "architectures.sizes.csv").open() as file:
        sizes = {row["model"]: int(row["file_bytes"]) for row in csv.DictReader(file)}
    return read_header(_DATA / "architectures" / f"{name}.gguf.header.gz", sizes[name])


@functools.cache
def logs() -> tuple[Logged, ...]:
    """Every load of a small model."""
    with gzip.open(_DATA / "architectures.csv.gz", "rt") as file:
        return tuple(_logged(rows) for rows in _groups(file))


def _logged(rows: list[dict[str, str]]) -> Logged:
    first = rows[0]
    n_units = small_model(first["model"]).hyper.n_layer + 1
    host_layers = max(n_units - int(first["ngl"]), 0)
    split = [float(part) for part in first["ts"].split(",")] if first["ts"] else [1.0]
    return Logged(
        model=first["model"],
        settings=Settings(
            n_ctx=int(first["ctx"]),
            n_parallel=int(first["np"]),
            n_ubatch=int(first["ub"]),
            flash_attn=first["fa"] == "on",
            type_k=first["kv"],
            type_v=first["kv"],
        ),
        shape=Shape(n_devices=len(split), host_layers=host_layers),
        counts=assign(split, n_units, host_layers),
        devices=tuple(
            (float(row["weights"]) if row["weights"] else None, float(row["kv_mib"]), float(row["compute"]))
            for row in rows
        ),
    )


def answers(golden: Golden) -> Iterator[Answer]:
    """mgpu's figures beside the real ones, for each device that has layers, and the host."""
    need = footprint_of(golden.model).with_settings(golden.settings)
    gpus = golden.gpus()
    for device, span in golden.spans():
        real = golden.devices[device]
        if real is not None:
            said = need.device(span, golden.shape, gpus[device])
            sizes = (said.weights, said.kv, said.compute)
            yield Answer(golden=golden, device=device, predicted=sizes, real=real)
    host = need.host(golden.shape, gpus)
    sizes = (host.weights, host.kv, host.compute)
    yield Answer(golden=golden, device=None, predicted=sizes, real=golden.host)
