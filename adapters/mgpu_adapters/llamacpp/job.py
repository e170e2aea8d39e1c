"""One model asked of llama-server: its settings, what it takes, and the command that starts it."""

from __future__ import annotations

from functools import cached_property
from typing import Final

from msgspec.structs import replace

from mgpu.adapter import TYPICAL_DEPTH, Command, Endpoint, Installed, Job, Pinned, Work
from mgpu.errors import UsageError
from mgpu.model import KV_TYPES, Model
from mgpu.plan import DeviceBytes, HostBytes, Layout, Mode, Shape
from mgpu.request import DEFAULT_CTX, Request, RuntimeName
from mgpu.rig import Gpu, Rig
from mgpu_adapters.llamacpp.assign import assign
from mgpu_adapters.llamacpp.command import build_command
from mgpu_adapters.llamacpp.flags import Given, read_flags
from mgpu_adapters.llamacpp.memory import Footprint, footprint
from mgpu_adapters.llamacpp.refusals import why_not_tensor
from mgpu_adapters.llamacpp.scheduler import can_attend
from mgpu_adapters.llamacpp.settings import Settings
from mgpu_adapters.llamacpp.work import build_number

#: llama-server's own defaults (llama.cpp b11434 common/common.h, tools/server/server.cpp).
_N_BATCH: Final = 2048
_N_UBATCH: Final = 512
_AUTO_SLOTS: Final = 4
_MOST_SLOTS: Final = 256  # LLAMA_MAX_SEQ

_QUANTISED: Final = frozenset(KV_TYPES) - {"f32", "f16", "bf16"}
_QUANT_BLOCK: Final = 32  # elements in one block of every quantised cache type


class LlamaJob:
    """Implements `mgpu.adapter.Job`. Immutable: `at_ctx` and `at_kv_type` make new ones that share the tables."""

    runtime: RuntimeName = "llama.cpp"
    computes_on_cpu = True
    ctx_step = 256  # llama_context pads every sequence to this (llama.cpp b11434 src/llama-context.cpp)

    def __init__(self, request: Request, installed: Installed, given: Given, need: Footprint) -> None:
        self._request = request
        self._installed = installed
        self._given = given
        self._need = need
        self.n_units = need.n_units
        self.settings = need.settings

    @property
    def model(self) -> Model:
        return self._need.model

    @property
    def ctx(self) -> int:
        return self.settings.n_ctx_seq

    @property
    def ctx_train(self) -> int:
        return self.model.hyper.n_ctx_train

    @property
    def users(self) -> int:
        return self.settings.n_parallel

    @property
    def kv_type(self) -> str:
        k, v = self.settings.type_k, self.settings.type_v
        return k if k == v else f"{k}/{v}"

    @property
    def has_experts(self) -> bool:
        return self.model.is_moe

    @property
    def pinned(self) -> Pinned:
        settings = self.settings
        layers, single = settings.n_gpu_layers, settings.split_mode == "none"
        modes: dict[str | None, Mode] = {"layer": "pipeline", "tensor": "tensor"}
        return Pinned(
            tensor_split=None if single else settings.tensor_split,  # llama.cpp ignores it there, too
            host_layers=None if layers is None or layers < 0 else max(self.n_units - layers, 0),
            host_experts=min(settings.n_cpu_moe, self.n_units - 1) or None,
            single=single,
            mode=modes.get(settings.split_mode),
        )

    @property
    def warnings(self) -> tuple[str, ...]:
        return tuple(_warnings(self._given, self))

    def counts(self, tensor_split: tuple[float, ...], host_layers: int) -> tuple[int, ...]:
        return assign(tensor_split, self.n_units, host_layers)

    def device(self, span: range, shape: Shape, gpu: Gpu) -> DeviceBytes:
        return self._need.device(span, shape, gpu)

    def stored(self, span: range, shape: Shape, gpu: Gpu) -> int:
        return self._need.stored(span, shape, gpu)

    def host(self, shape: Shape, gpus: tuple[Gpu, ...]) -> HostBytes:
        return self._need.host(shape, gpus)

    @cached_property
    def work(self) -> Work:
        half = self.ctx // 2
        asked = isinstance(self._request.ctx, int) or "ctx-size" in self._given
        return self._need.work(half if asked else min(half, TYPICAL_DEPTH), build_number(self._installed.version))

    def at_ctx(self, ctx: int) -> LlamaJob:
        if "ctx-size" in self._given:
            return self
        settings = self.settings
        n_ctx = ctx if settings.kv_unified else ctx * settings.n_parallel
        return self._with(replace(settings, n_ctx=n_ctx))

    tensor_is_experimental = True

    def why_not_tensor(self, gpus: tuple[Gpu, ...]) -> str | None:
        return why_not_tensor(self._need, gpus, self._installed, self._given)

    def at_users(self, users: int) -> LlamaJob:
        settings = self.settings
        if "parallel" in self._given or users == settings.n_parallel:
            return self
        # `-c` after `--` is what all slots of a server share.
        shared = settings.kv_unified or "ctx-size" in self._given
        n_ctx = settings.n_ctx if shared else settings.n_ctx_seq * users
        return self._with(replace(settings, n_parallel=users, n_ctx=n_ctx))

    def at_kv_type(self, kv_type: str) -> LlamaJob:
        settings = replace(self.settings, type_k=kv_type, type_v=kv_type)
        check_cache_types(settings, self.model)
        return self._with(settings)

    def command(self, layout: Layout, rig: Rig, endpoint: Endpoint) -> Command:
        return build_command(
            self.model,
            self.settings,
            layout,
            rig,
            endpoint,
            installed=self._installed,
            arguments=self._request.runtime_args,
            given=self._given,
            key_file=self._request.key_file,
        )

    def attachment(self, layout: Layout, rig: Rig) -> None:
        """It is started, never attached to."""

    def _with(self, settings: Settings) -> LlamaJob:
        return LlamaJob(self._request, self._installed, self._given, self._need.with_settings(settings))


def prepare(model: Model, request: Request, installed: Installed) -> Job:
    """The job of `model` as asked for. Raises `UsageError` for flags and types that have no meaning here."""
    given = read_flags(request.runtime_args)
    settings = settle(model, request, given)
    check_cache_types(settings, model)
    return LlamaJob(request, installed, given, footprint(model, settings))


def settle(model: Model, request: Request, given: Given) -> Settings:
    """What llama-server will use: the request, overruled by the flags after `--`, over the server's defaults."""
    slots = given.integer("parallel", least=-1)
    auto_slots = slots is not None and slots < 1
    n_parallel = _AUTO_SLOTS if auto_slots else slots or request.users
    if n_parallel > _MOST_SLOTS:
        raise UsageError(f"--parallel {n_parallel} is more than llama.cpp's {_MOST_SLOTS} slots", hint="ask for fewer")
    unified = ("kv-unified" in given or auto_slots) and "no-kv-unified" not in given
    n_ctx = given.integer("ctx-size", least=0)
    if n_ctx is None:
        per_user = request.ctx if isinstance(request.ctx, int) else min(model.hyper.n_ctx_train, DEFAULT_CTX)
        n_ctx = per_user if unified else per_user * n_parallel
    _check_split_mode(given)
    return Settings(
        n_ctx=n_ctx or model.hyper.n_ctx_train,
        n_parallel=n_parallel,
        kv_unified=unified,
        n_batch=given.integer("batch-size", least=1) or _N_BATCH,
        n_ubatch=given.integer("ubatch-size", least=1) or _N_UBATCH,
        flash_attn=_flash_attention(model, given),
        type_k=given.kv_type("cache-type-k", request.kv_type),
        type_v=given.kv_type("cache-type-v", request.kv_type),
        kv_offload="no-kv-offload" not in given,
        swa_full="swa-full" in given,
        n_cpu_moe=model.hyper.n_layer if "cpu-moe" in given else given.integer("n-cpu-moe", least=0) or 0,
        n_gpu_layers=given.gpu_layers(),
        tensor_split=given.tensor_split(),
        split_mode=given.split_mode(),
        override_tensor=given.overrides(),
    )


def _check_split_mode(given: Given) -> None:
    """Raises `UsageError` for the mode that is gone."""
    if given.values.get("split-mode") == "row":
        raise UsageError(
            "--split-mode row: llama.cpp removed it for CUDA and ROCm in b9890",
            hint="use tensor in its place, or layer",
        )


def check_cache_types(settings: Settings, model: Model) -> None:
    """llama.cpp refuses these at load; better said before. Raises `UsageError`."""
    for name, kv_type, width in (
        ("K", settings.type_k, model.hyper.head_dim_k),
        ("V", settings.type_v, model.hyper.head_dim_v),
    ):
        if kv_type not in KV_TYPES:
            raise UsageError(f"unknown KV-cache type {kv_type!r}", hint="one of " + ", ".join(KV_TYPES))
        if kv_type in _QUANTISED and width % _QUANT_BLOCK:
            raise UsageError(
                f"{kv_type} cannot hold this model's {name} cache: {width} elements a head is no multiple of 32",
                hint="use --kv-type f16",
            )
    if settings.type_v in _QUANTISED and not settings.flash_attn:
        raise UsageError(
            f"a {settings.type_v} V cache needs flash attention, which this model or your flags leave off",
            hint="use --kv-type f16",
        )


def _flash_attention(model: Model, given: Given) -> bool:
    asked = given.choice("flash-attn", ("on", "off", "auto", "1", "0", "-1"))
    if asked in {"on", "1"}:
        return True
    # Heads that CUDA has no kernel for would fall to the CPU, at a cost of gigabytes; other backends take all of these.
    return asked not in {"off", "0"} and can_attend(model.hyper.head_dim_k, model.hyper.head_dim_v)


def _warnings(given: Given, job: LlamaJob) -> list[str]:
    warnings: list[str] = []
    if job.ctx > job.ctx_train:
        warnings.append(f"a context of {job.ctx} is more than the {job.ctx_train} the model was trained for")
    if job.settings.kv_unified and job.users > 1:
        warnings.append(f"the {job.users} slots share one context of {job.ctx} tokens (--kv-unified)")
    if "tensor-split" in given or "gpu-layers" in given or "split-mode" in given:
        named = [flag for flag in ("tensor-split", "gpu-layers", "split-mode") if flag in given]
        text = ", ".join("--" + flag for flag in named)
        warnings.append(
            f"{text} after `--` decides the placement in mgpu's place (rules fits-one-card, split-by-layers)"
        )
    if "device" in given or "main-gpu" in given:
        warnings.append("--device or --main-gpu after `--` may use other cards than the plan's")
    if job.settings.split_mode == "tensor" and len(set(job.settings.tensor_split or ())) > 1:
        warnings.append("--tensor-split with --split-mode tensor: every card is planned with what the fullest holds")
    if given.values.get("fit") == "on":
        warnings.append("--fit on after `--` lets llama.cpp change what was planned")
    if "api-key-file" in given:
        warnings.append("--api-key-file after `--` is passed on: without a key from it mgpu cannot ask for a token")
    if "override-tensor" in given:
        warnings.append("--override-tensor turns pipeline parallelism off, and is planned for where it says CPU")
    return warnings
