"""One model asked of Ollama: what it would take there, and how a server is held to the plan."""

from __future__ import annotations

from functools import cached_property
from typing import Final

from msgspec.structs import replace

from mgpu.adapter import Command, Endpoint, Installed, Job, Pinned, Work
from mgpu.errors import BadModelError, UsageError
from mgpu.model import Model
from mgpu.plan import DeviceBytes, HostBytes, Layout, Shape
from mgpu.request import Request
from mgpu.rig import Gpu, Rig
from mgpu_adapters.keyless import check_keyless
from mgpu_adapters.llamacpp.adapter import LlamaCpp
from mgpu_adapters.llamacpp.job import prepare as prepare_engine
from mgpu_adapters.ollama.attachment import OllamaAttachment
from mgpu_adapters.ollama.command import authority, by_hand, own_server
from mgpu_adapters.ollama.estimate import MINIMUM_MEMORY, Estimate
from mgpu_adapters.ollama.hold import Asked, Held, hold, layers_on_cards
from mgpu_adapters.ollama.names import Wish, name_of, stem_of
from mgpu_adapters.ollama.parameters import Given, Parameter, read_arguments
from mgpu_adapters.ollama.predict import ONE_SLOT
from mgpu_adapters.ollama.server import Found, Options, era_of, is_local

#: Tokens in one batch, said to the server and planned with: it would else take 512, 1024 or 2048 by the context.
NUM_BATCH: Final = 512

_KV_BEFORE: Final = ("f16", "q8_0", "q4_0")


class OllamaJob(Job):
    """Implements `mgpu.adapter.Job`. From 0.30 on Ollama runs llama-server, and takes what llama.cpp takes.

    Before, its own estimate of buffers comes on top of weights and cache: what it reckons with decides what it does.
    """

    runtime = "ollama"
    computes_on_cpu = True
    tensor_is_experimental = True

    def __init__(self, request: Request, found: Found, given: Given, engine: Job, model: Model) -> None:
        self._request = request
        self._found = found
        self._given = given
        self._engine = engine
        self._model = model
        self._era = era_of(found.version)

    @property
    def ctx_step(self) -> int:
        return self._engine.ctx_step

    @property
    def n_units(self) -> int:
        return self._engine.n_units

    @property
    def ctx(self) -> int:
        return self._engine.ctx

    @property
    def ctx_train(self) -> int:
        return self._engine.ctx_train

    @property
    def users(self) -> int:
        return self._engine.users

    @property
    def kv_type(self) -> str:
        return self._engine.kv_type

    @property
    def has_experts(self) -> bool:
        """Only a server of our own can be told so."""
        return self._era == ">=0.30" and self._found.startable and self._engine.has_experts

    @property
    def warnings(self) -> tuple[str, ...]:
        return (*self._engine.warnings, *self._own_warnings)

    @cached_property
    def _own_warnings(self) -> tuple[str, ...]:
        warnings: list[str] = []
        if self._request.users > self.users:
            warnings.append(
                f"Ollama answers one user at a time with {self._model.architecture} models: the others wait"
            )
        if self._found.url and not is_local(self._found.url):
            warnings.append(f"the Ollama at {self._found.url} is on another machine, and this plan is for the rig here")
        return tuple(warnings)

    @property
    def pinned(self) -> Pinned:
        return Pinned()

    def why_not_tensor(self, gpus: tuple[Gpu, ...]) -> str | None:
        if self._era != ">=0.30":
            return f"Ollama {self._found.version} has no tensor ranks: they come with 0.30"
        if not self._found.startable:
            return "an Ollama that runs already cannot be told to"
        return self._engine.why_not_tensor(gpus)

    def counts(self, tensor_split: tuple[float, ...], host_layers: int) -> tuple[int, ...]:
        return self._engine.counts(tensor_split, host_layers)

    def device(self, span: range, shape: Shape, gpu: Gpu) -> DeviceBytes:
        need = self._engine.device(span, shape, gpu)
        if self._estimate is None:
            return need
        graph = max(self._estimate.partial, self._estimate.full)
        return replace(need, compute=graph, overhead=MINIMUM_MEMORY + self._estimate.buffer)

    def stored(self, span: range, shape: Shape, gpu: Gpu) -> int:
        return self._engine.stored(span, shape, gpu)

    def host(self, shape: Shape, gpus: tuple[Gpu, ...]) -> HostBytes:
        return self._engine.host(shape, gpus)

    @cached_property
    def work(self) -> Work:
        return self._engine.work

    def at_ctx(self, ctx: int) -> OllamaJob:
        return self._with(self._engine.at_ctx(ctx))

    def at_users(self, users: int) -> OllamaJob:
        """As it is: mgpu starts no replicas of Ollama."""
        del users
        return self

    def at_kv_type(self, kv_type: str) -> OllamaJob:
        _check_kv_type(kv_type, self._found)
        return self._with(self._engine.at_kv_type(kv_type))

    def command(self, layout: Layout, rig: Rig, endpoint: Endpoint) -> Command:
        if self._uses_running(layout, rig):
            return by_hand(self._found.url, self._wish(layout, rig, hold(self._asked, layout, rig)))
        wish = self._wish(layout, rig, Held(num_gpu=self._own_num_gpu(layout)))
        attachment = OllamaAttachment(f"http://{authority(endpoint)}", wish, local=True)
        return own_server(self._found.executable, self._asked, layout, rig, endpoint, attachment=attachment, wish=wish)

    def attachment(self, layout: Layout, rig: Rig) -> OllamaAttachment | None:
        if not self._uses_running(layout, rig):
            return None
        wish = self._wish(layout, rig, hold(self._asked, layout, rig))
        return OllamaAttachment(self._found.url, wish, local=is_local(self._found.url))

    @property
    def _asked(self) -> Asked:
        request = self._request
        return Asked(
            model=self._model,
            version=self._found.version,
            era=self._era,
            ctx=self.ctx,
            users=self.users,
            kv_type=self.kv_type,
            apart=request.port is not None or request.host != Request().host,
        )

    def _uses_running(self, layout: Layout, rig: Rig) -> bool:
        """A running server that can be held to the plan, or that is all there is."""
        if not self._found.url:
            return False
        return not self._found.startable or not hold(self._asked, layout, rig).unheld

    def _own_num_gpu(self, layout: Layout) -> int | None:
        """Before 0.30, a number of layers is only said where some are to stay on the CPU: it spreads the others."""
        if self._era != ">=0.30" and layout.gpus and not layout.shape.host_layers:
            return None
        return layers_on_cards(layout) if layout.gpus else 0

    @cached_property
    def _estimate(self) -> Estimate | None:
        if self._era == ">=0.30":
            return None
        options = Options(num_batch=NUM_BATCH, kv_type=self.kv_type)
        measures = self._era != "<=0.11.4"
        return Estimate(self._model, self.ctx * self.users, self.users, options, measures=measures)

    def _wish(self, layout: Layout, rig: Rig, held: Held) -> Wish:
        by_index = {gpu.index: gpu for gpu in rig.gpus}
        pairs = zip(layout.spans(), layout.gpus, strict=True)
        needs = [self.device(span, layout.shape, by_index[index]) for span, index in pairs if span]
        parameters = self._parameters(held)
        return Wish(
            name=name_of(self._model, parameters),
            stem=stem_of(self._model),
            alias=self._model.alias,
            paths=tuple(file.path for file in self._model.files),
            file_bytes=self._model.file_bytes,
            parameters=parameters,
            ctx=self.ctx,
            card_bytes=sum(need.total - need.overhead for need in needs),
            on_cards=bool(needs) and not layout.shape.host_layers and not layout.shape.host_experts,
            copies=2 if self._era == ">=0.30" else 1,
            removes=self._given.removes,
            unheld=held.unheld,
        )

    def _parameters(self, held: Held) -> dict[str, Parameter]:
        ours: dict[str, Parameter] = {"num_ctx": self.ctx, "num_batch": NUM_BATCH}
        if held.num_gpu is not None:
            ours["num_gpu"] = held.num_gpu
        if held.main_gpu is not None:
            ours["main_gpu"] = held.main_gpu
        return {**self._given.parameters, **ours}

    def _with(self, engine: Job) -> OllamaJob:
        return OllamaJob(self._request, self._found, self._given, engine, self._model)


def prepare(model: Model, request: Request, installed: Installed) -> Job:
    """The job of `model` as asked for.

    Raises `UsageError` for what Ollama has no option for, `BadModelError` for what it does not read.
    """
    if model.format != "gguf":
        raise BadModelError(f"Ollama reads no {model.format}: {model.path}", hint="give a GGUF of the model")
    given = read_arguments(request.runtime_args)
    check_keyless(request, "Ollama")
    found = installed if isinstance(installed, Found) else Found.of(installed)
    _check_kv_type(request.kv_type, found)
    users = 1 if model.architecture in ONE_SLOT else request.users
    batch = ("--batch-size", str(NUM_BATCH), "--ubatch-size", str(NUM_BATCH))
    as_llama = replace(request, users=users, runtime_args=batch)
    engine = prepare_engine(model, as_llama, LlamaCpp().assumed())
    return OllamaJob(request, found, given, engine, model)


def _check_kv_type(kv_type: str, found: Found) -> None:
    if era_of(found.version) != ">=0.30" and kv_type not in _KV_BEFORE:
        raise UsageError(
            f"--kv-type {kv_type}: Ollama {found.version} has none but {', '.join(_KV_BEFORE)}",
            hint="choose one of these, or update Ollama",
        )
