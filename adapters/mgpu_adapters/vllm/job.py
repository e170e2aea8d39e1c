"""One model asked of vLLM: its settings, what it takes, and the command that starts it."""

from __future__ import annotations

from functools import cached_property
from typing import Final

from msgspec.structs import replace

from mgpu.adapter import TYPICAL_DEPTH, Command, Endpoint, Installed, Job, Pinned, Work
from mgpu.errors import RuntimeMissingError, UsageError
from mgpu.model import Model
from mgpu.plan import DeviceBytes, HostBytes, Layout, Shape
from mgpu.request import Request, RuntimeName
from mgpu.rig import Gpu, Rig
from mgpu_adapters.vllm.cache import BLOCK_SIZE, CPU_BLOCK_SIZE
from mgpu_adapters.vllm.checks import check_batch, check_context, check_model, has_pipeline, why_not_tensor
from mgpu_adapters.vllm.command import build_command
from mgpu_adapters.vllm.config import derived_max_len, layers_without_description
from mgpu_adapters.vllm.cpu import build_cpu_command, host_bytes, is_cpu_build, workers_of
from mgpu_adapters.vllm.flags import Given, read_flags
from mgpu_adapters.vllm.memory import Footprint
from mgpu_adapters.vllm.partition import proportional, to_units
from mgpu_adapters.vllm.serving import half_open
from mgpu_adapters.vllm.settings import Settings, kv_cache_dtype, settle
from mgpu_adapters.vllm.work import work_of

#: Flags that change what a plan says in ways that this version does not follow.
_UNPLANNED: Final = (
    "data-parallel-size", "cpu-offload-gb", "kv-cache-memory-bytes", "quantization", "block-size", "speculative-config",
    "config",
)  # fmt: skip


class VllmJob:
    """Implements `mgpu.adapter.Job`. Immutable: `at_ctx` and `at_kv_type` make new ones that share the tables.

    Layouts are pipelines, in which vLLM has no stage without layers, or tensor ranks.
    """

    runtime: RuntimeName = "vllm"
    ctx_step = BLOCK_SIZE
    has_experts = False  # vLLM keeps no experts on the host apart from their layers

    def __init__(self, request: Request, installed: Installed, given: Given, need: Footprint) -> None:
        self._request = request
        self.installed = installed
        self.given = given
        self.need = need
        self.n_units = need.n_units
        self.settings = need.settings
        self.computes_on_cpu = is_cpu_build(installed)
        self._ranks: dict[int, Footprint] = {}

    @property
    def model(self) -> Model:
        return self.need.model

    @property
    def ctx(self) -> int:
        return self.settings.max_model_len

    @property
    def ctx_train(self) -> int:
        return derived_max_len(self.model)

    @property
    def users(self) -> int:
        return self.settings.max_num_seqs

    @property
    def kv_type(self) -> str:
        return self.settings.kv_cache_dtype

    @property
    def pinned(self) -> Pinned:
        if self.computes_on_cpu:  # `-tp` and `-pp` are numbers of workers there, and there are no cards
            return Pinned()
        n_stages, n_ranks = self.settings.pipeline_parallel_size, self.settings.tensor_parallel_size
        if n_stages is not None and n_stages > 1:
            return Pinned(tensor_split=(1.0,) * n_stages, mode="pipeline")
        if n_ranks is not None and n_ranks > 1:
            return Pinned(mode="tensor")  # `why_not_tensor` holds to their number
        single = n_stages == 1 or not has_pipeline(self.model)
        return Pinned(single=single, mode="pipeline" if n_ranks == 1 else None)

    @property
    def warnings(self) -> tuple[str, ...]:
        warnings = _warnings(self.given, self.need, on_cpu=self.computes_on_cpu)
        return (*warnings, *half_open(self._request))

    def counts(self, tensor_split: tuple[float, ...], host_layers: int) -> tuple[int, ...]:
        """Proportions as whole layers. `host_layers` is 0: nothing can be left to the CPU."""
        del host_layers
        return to_units(proportional(tensor_split, self.n_units - 1))

    def device(self, span: range, shape: Shape, gpu: Gpu) -> DeviceBytes:
        return self._ranked(shape).device(span, shape, gpu)

    def stored(self, span: range, shape: Shape, gpu: Gpu) -> int:
        return self._ranked(shape).stored(span, shape, gpu)

    def host(self, shape: Shape, gpus: tuple[Gpu, ...]) -> HostBytes:
        del shape
        return host_bytes(self.need) if self.computes_on_cpu and not gpus else self.need.host(gpus)

    @cached_property
    def work(self) -> Work:
        half = max(self.ctx // 2, 1)
        asked = isinstance(self._request.ctx, int) or "max-model-len" in self.given
        return work_of(self.model, self.settings, half if asked else min(half, TYPICAL_DEPTH))

    def at_ctx(self, ctx: int) -> VllmJob:
        if "max-model-len" in self.given:
            return self
        return self._with(replace(self.settings, max_model_len=ctx))

    tensor_is_experimental = False

    def why_not_tensor(self, gpus: tuple[Gpu, ...]) -> str | None:
        return why_not_tensor(self.model, self.settings, gpus)

    def at_users(self, users: int) -> VllmJob:
        if "max-num-seqs" in self.given:
            return self
        return self._with(replace(self.settings, max_num_seqs=users))

    def at_kv_type(self, kv_type: str) -> VllmJob:
        return self._with(replace(self.settings, kv_cache_dtype=kv_cache_dtype(kv_type)))

    def command(self, layout: Layout, rig: Rig, endpoint: Endpoint) -> Command:
        command = self._command(layout, rig, endpoint)
        return replace(command, argv=(*command.argv, *self._request.runtime_args))

    def _command(self, layout: Layout, rig: Rig, endpoint: Endpoint) -> Command:
        installed = self.installed
        if not self.computes_on_cpu:
            return build_command(self.need, layout, rig, endpoint, installed=installed, given=self.given)
        if layout.gpus:
            raise RuntimeMissingError(
                f"{installed.executable} is vLLM {installed.version}, built for the CPU, and this is a plan for GPUs",
                hint="install vLLM for GPUs, `uv tool install vllm`, or use llama.cpp with a GGUF of the model",
            )
        return build_cpu_command(self.need, rig, endpoint, installed=installed, given=self.given)

    def _ranked(self, shape: Shape) -> Footprint:
        """What tensor ranks hold, made once for each number of them."""
        if shape.mode != "tensor":
            return self.need
        need = self._ranks.get(shape.n_devices)
        if need is None:
            need = self._ranks[shape.n_devices] = self.need.ranked(shape.n_devices)
        return need

    def attachment(self, layout: Layout, rig: Rig) -> None:
        """It is started, never attached to."""

    def _with(self, settings: Settings) -> VllmJob:
        return type(self)(self._request, self.installed, self.given, self.need.with_settings(settings))


def prepare(model: Model, request: Request, installed: Installed) -> Job:
    """The job of `model` as asked for. Raises as `prepare_as` does."""
    return prepare_as(VllmJob, model, request, installed)


def prepare_as(kind: type[VllmJob], model: Model, request: Request, installed: Installed) -> Job:
    """The job of `model` as asked for, of vLLM itself or of what starts one.

    Raises `BadModelError` for what vLLM does not load, `UsageError` for flags and sizes that have no meaning here.
    """
    check_model(model)
    given = read_flags(request.runtime_args)
    settings = settle(request, given, derived_max_len(model))
    check_context(model, settings)
    check_batch(settings)
    if (settings.pipeline_parallel_size or 1) > 1 and not has_pipeline(model):
        raise UsageError(
            f"--pipeline-parallel-size {settings.pipeline_parallel_size}: vLLM splits no model of this architecture",
            hint="leave it out",
        )
    block = CPU_BLOCK_SIZE if is_cpu_build(installed) else BLOCK_SIZE
    job = kind(request, installed, given, Footprint(model, settings, block=block))
    if job.computes_on_cpu:
        workers_of(job.need)  # raises what would else be raised after the plan
    return job


def _warnings(given: Given, need: Footprint, *, on_cpu: bool) -> list[str]:
    warnings: list[str] = []
    if on_cpu:
        warnings += _on_cpu(need)
    elif "pipeline-parallel-size" in given:
        warnings.append("--pipeline-parallel-size after `--` decides how many GPUs are used in mgpu's place")
    if "tensor-parallel-size" in given and not on_cpu:
        warnings.append("--tensor-parallel-size after `--` decides how many GPUs are used in mgpu's place")
    if "device-ids" in given:
        warnings.append("--device-ids after `--` may use other GPUs than the plan's")
    warnings += [f"--{name} after `--` is passed on, and not planned with" for name in _UNPLANNED if name in given]
    vague = layers_without_description(need.model)
    if vague:
        warnings.append(f"{vague} layers keep a state of unknown size, which the plan leaves out")
    return warnings


def _on_cpu(need: Footprint) -> list[str]:
    """What `-tp` and `-pp` mean where all workers share one machine."""
    workers = workers_of(need)
    if len(workers) == 1:
        return []
    if (need.settings.tensor_parallel_size or 1) > 1:
        return [f"{len(workers)} tensor ranks share the CPU: worth it across sockets only"]
    layers = " + ".join(str(len(worker.layers)) for worker in workers)
    return [f"{len(workers)} stages ({layers} layers) share the CPU, and for one user take turns"]
