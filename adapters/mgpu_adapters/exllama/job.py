"""One model asked of ExLlama: its settings, what it takes, and the command that starts it."""

from __future__ import annotations

from functools import cached_property
from typing import Final

from msgspec.structs import replace

from mgpu.adapter import TYPICAL_DEPTH, Command, Endpoint, Job, Pinned, Work
from mgpu.model import Model
from mgpu.plan import DeviceBytes, HostBytes, Layout, Shape
from mgpu.request import Request, RuntimeName
from mgpu.rig import Gpu, Rig
from mgpu_adapters.exllama.command import build_command
from mgpu_adapters.exllama.engines import V2, V3, Engine
from mgpu_adapters.exllama.flags import Given, read_flags
from mgpu_adapters.exllama.memory import PAGE
from mgpu_adapters.exllama.modules import host_bytes
from mgpu_adapters.exllama.settings import Settings, settle
from mgpu_adapters.exllama.tabby import Clone

#: Options after `--` that take memory this version does not plan for.
_UNPLANNED: Final = ("vision", "draft-model-name", "cpu-moe-offload-layers")
_LOOPBACK: Final = frozenset({"127.0.0.1", "::1", "localhost"})


class ExLlamaJob(Job):
    """Implements `mgpu.adapter.Job` for both versions. Layouts are pipelines, tensor ranks or replicas."""

    ctx_step = PAGE
    computes_on_cpu = False

    def __init__(self, request: Request, clone: Clone, given: Given, engine: Engine) -> None:
        self._request = request
        self._clone = clone
        self._given = given
        self._engine = engine
        self._held: dict[tuple[int, int], DeviceBytes] = {}
        self._ranks: dict[int, DeviceBytes] = {}

    @property
    def runtime(self) -> RuntimeName:
        return self._engine.runtime

    @property
    def model(self) -> Model:
        return self._engine.model

    @property
    def ctx(self) -> int:
        return self._engine.settings.ctx

    @property
    def ctx_train(self) -> int:
        return self.model.hyper.n_ctx_train

    @property
    def users(self) -> int:
        return self._engine.settings.users

    @property
    def tensor_is_experimental(self) -> bool:
        """V2's release notes say it of theirs (0.1.9); it exchanges through host memory, whatever the link."""
        return self.runtime == "exllamav2"

    @property
    def kv_type(self) -> str:
        return self._engine.settings.cache_mode

    @property
    def n_units(self) -> int:
        return self._engine.n_units

    @property
    def pinned(self) -> Pinned:
        asked = self._engine.settings.tensor_parallel
        return Pinned() if asked is None else Pinned(mode="tensor" if asked else "pipeline")

    @property
    def warnings(self) -> tuple[str, ...]:
        return tuple(_warnings(self._request, self._given, self._engine))

    def why_not_tensor(self, gpus: tuple[Gpu, ...]) -> str | None:
        if len(gpus) < 2:
            return f"tensor ranks need two cards, not {len(gpus)}"
        if self._engine.settings.tensor_parallel is False:
            return "--tensor-parallel false after `--`"
        return self._engine.flaw(len(gpus))

    def counts(self, tensor_split: tuple[float, ...], host_layers: int) -> tuple[int, ...]:
        """Whole units by largest remainder: a `gpu_split` can be found for any of them. `host_layers` is 0."""
        del host_layers
        total = sum(tensor_split) or 1.0
        ideal = [self.n_units * share / total for share in tensor_split]
        counts = [int(each) for each in ideal]
        by_rest = sorted(range(len(ideal)), key=lambda place: (counts[place] - ideal[place], place))
        for place in by_rest[: self.n_units - sum(counts)]:
            counts[place] += 1
        return tuple(counts)

    def device(self, span: range, shape: Shape, gpu: Gpu) -> DeviceBytes:
        del gpu
        if shape.mode == "tensor":
            return self._rank(shape.n_devices)
        held = self._held.get((span.start, span.stop))
        if held is None:
            held = self._held[span.start, span.stop] = self._engine.span(span)
        return held

    def stored(self, span: range, shape: Shape, gpu: Gpu) -> int:
        held = self.device(span, shape, gpu)
        return held.weights + held.kv

    def host(self, shape: Shape, gpus: tuple[Gpu, ...]) -> HostBytes:
        del shape, gpus
        return host_bytes(self.model)

    @cached_property
    def work(self) -> Work:
        from mgpu_adapters.exllama.work import work_of

        half = max(self.ctx // 2, 1)
        asked = isinstance(self._request.ctx, int) or "max-seq-len" in self._given
        return work_of(self._engine, half if asked else min(half, TYPICAL_DEPTH))

    def at_ctx(self, ctx: int) -> Job:
        if "max-seq-len" in self._given:
            return self
        return self._with(replace(self._engine.settings, ctx=ctx))

    def at_users(self, users: int) -> Job:
        if "max-batch-size" in self._given:
            return self
        return self._with(replace(self._engine.settings, users=users))

    def at_kv_type(self, kv_type: str) -> Job:
        return self._with(replace(self._engine.settings, cache_mode=self._engine.cache_mode(kv_type)))

    def command(self, layout: Layout, rig: Rig, endpoint: Endpoint) -> Command:
        return build_command(self._engine, layout, rig, endpoint, clone=self._clone, given=self._given)

    def _rank(self, n_ranks: int) -> DeviceBytes:
        held = self._ranks.get(n_ranks)
        if held is None:
            held = self._ranks[n_ranks] = self._engine.rank(n_ranks)
        return held

    def _with(self, settings: Settings) -> ExLlamaJob:
        return ExLlamaJob(self._request, self._clone, self._given, self._engine.with_settings(settings))


def prepare(model: Model, request: Request, clone: Clone, version: int) -> ExLlamaJob:
    """The job of `model` as asked for. Raises `UsageError` for what TabbyAPI or ExLlama would not take."""
    given = read_flags(request.runtime_args)
    settings = settle(request, given, model.hyper.n_ctx_train, version=version)
    engine: Engine = V3(model, settings, clone.library) if version == 3 else V2(model, settings)
    return ExLlamaJob(request, clone, given, engine)


def _warnings(request: Request, given: Given, engine: Engine) -> list[str]:
    warnings = [f"--{name} after `--` is passed on, and not planned with" for name in _UNPLANNED if name in given]
    if "tabby_config.yml" in engine.model.beside and engine.runtime == "exllamav3":
        warnings.append(
            "tabby_config.yml in the model's directory overrides what TabbyAPI is told here: move it away, "
            "unless it says what you want"
        )
    settings, trained = engine.settings, engine.model.hyper.n_ctx_train
    if settings.ctx > trained:
        warnings.append(f"a context of {settings.ctx} is more than the {trained} that the model was trained for")
    if settings.cache_size is not None and settings.cache_size < settings.ctx * settings.users:
        warnings.append(
            f"--cache-size {settings.cache_size} holds less than {settings.users} whole contexts: users wait for room"
        )
    if request.host not in _LOOPBACK and request.api_key is None:
        warnings.append(
            f"--host {request.host} without --api-key: whoever reaches this machine can also unload the model, and "
            "have others downloaded"
        )
    return warnings
