"""A plan as TabbyAPI's command: its Python, its main.py, and a configuration that leaves it nothing to decide.

It starts in a directory of its own: TabbyAPI merges a `config.yml` of its working directory under the file it is given
(`common/tabby_config.py`), where a person's draft model or gpu_split would join the plan, and takes keys from there.
"""

from __future__ import annotations

from typing import Final

from mgpu.adapter import Command, Endpoint
from mgpu.errors import RefusedError
from mgpu.plan import Layout
from mgpu.rig import Gpu, Rig
from mgpu_adapters.exllama.cards import check_cards, has_nvlink, visibility
from mgpu_adapters.exllama.config import config_text, model_section, tokens_text
from mgpu_adapters.exllama.engines import Engine
from mgpu_adapters.exllama.flags import Given
from mgpu_adapters.exllama.tabby import Clone

_CONFIG: Final = "config.yml"
_TOKENS: Final = "api_tokens.yml"

#: Variables that TabbyAPI reads between the two files (TABBY_MODEL_GPU_SPLIT_AUTO), and one of ExLlamaV3's loader.
_SCRUB: Final = ("TABBY_", "EXL3_AUTOSPLIT_")
#: Its log is drawn for a terminal, and in a file would be broken off at 80 columns (`common/logger.py`).
_WIDTH: Final = ("TABBY_LOG_CONSOLE_WIDTH", "1000")


def build_command(
    engine: Engine, layout: Layout, rig: Rig, endpoint: Endpoint, *, clone: Clone, given: Given
) -> Command:
    """Raises `RefusedError` for cards it cannot use, `DoesNotFitError` where no list would hold it to the plan."""
    gpus = _gpus(layout, rig)
    check_cards(gpus, engine.title)
    version = 2 if engine.runtime == "exllamav2" else 3
    tensor = layout.shape.mode == "tensor"
    if tensor and (flaw := engine.flaw(len(gpus))):
        raise RefusedError(f"{engine.title} cannot run this as tensor ranks: {flaw}", hint="use --split pipeline")
    backend = _backend(gpus, rig, given) if version == 3 else ""
    section = model_section(
        engine.model.path, engine.settings, _split(engine, layout, gpus), tensor=tensor, backend=backend
    )
    files = {_CONFIG: config_text(section, endpoint, given)}
    if endpoint.api_key is not None:
        files[_TOKENS] = tokens_text(endpoint.api_key)
    base = f"http://{_authority(endpoint)}"
    return Command(
        argv=(clone.python, clone.executable, "--config", _CONFIG),
        name="TabbyAPI",
        devices=tuple(f"cuda:{place}" for place in range(len(layout.gpus))),
        env=visibility(gpus, rig, version) | dict([_WIDTH]),
        scrub=_SCRUB,
        files=files,
        ready_url=f"{base}/health",
        endpoint=f"{base}/v1",
    )


def _gpus(layout: Layout, rig: Rig) -> tuple[Gpu, ...]:
    """Those of the layout that hold something: another one would only be there to be filled."""
    by_index = {gpu.index: gpu for gpu in rig.gpus}
    return tuple(by_index[index] for index, count in zip(layout.gpus, layout.counts, strict=True) if count)


def _split(engine: Engine, layout: Layout, gpus: tuple[Gpu, ...]) -> tuple[float, ...]:
    """GiB for each card; nothing for one card, where TabbyAPI ignores the list."""
    if len(gpus) < 2:
        return ()
    usable = [gpu.usable_bytes for gpu in gpus]
    if layout.shape.mode == "tensor":
        return engine.rank_split(usable)
    return engine.gpu_split([count for count in layout.counts if count], usable)


def _backend(gpus: tuple[Gpu, ...], rig: Rig, given: Given) -> str:
    """How ranks exchange (config_sample.yml): its own way over PCIe, NCCL over NVLink."""
    return given.word("tensor-parallel-backend") or ("nccl" if has_nvlink(gpus, rig) else "native")


def _authority(endpoint: Endpoint) -> str:
    """Where a client on this machine reaches the server: a wildcard address is reached by loopback."""
    host = {"0.0.0.0": "127.0.0.1", "::": "::1", "": "127.0.0.1"}.get(endpoint.host, endpoint.host)  # noqa: S104 - compared, not bound
    return f"[{host}]:{endpoint.port}" if ":" in host else f"{host}:{endpoint.port}"
