"""Plans, models and rigs as the JSON of the contract, schema 1. All sizes are bytes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import msgspec

from mgpu.adapter import Command
from mgpu.errors import MgpuError
from mgpu.model import Model
from mgpu.plan import Alternative, DevicePlan, Plan, Speed, Wait
from mgpu.request import Request
from mgpu.rig import Gpu, Rig

SCHEMA: Final = 1


def decision(model: Model, rig: Rig, request: Request, plan: Plan) -> dict[str, Any]:
    """The object of `plan --json` and `run --json`, without `command`; a refusal or a misfit has `error` instead."""
    told: dict[str, Any] = {
        "schema": SCHEMA,
        "model": model_object(model),
        "rig": rig_object(rig),
        "request": request_object(request),
        "plan": plan_object(plan),
    }
    if plan.refusal is not None:
        refusal = plan.refusal
        told["error"] = {"code": refusal.code, "message": refusal.message, "hint": refusal.hint}
    return told


def failure(error: MgpuError) -> dict[str, Any]:
    """The object where there is not even a plan: a bad file, a missing runtime."""
    return {"schema": SCHEMA, "error": {"code": error.code, "message": error.message, "hint": error.hint}}


def model_object(model: Model) -> dict[str, Any]:
    return {
        "path": model.path,
        "format": model.format,
        "architecture": model.architecture,
        "name": model.name,
        "quantization": model.quantization,
        "parameters": model.parameters,
        "layers": model.hyper.n_layer,
        "weights_bytes": model.weights_bytes,
        "context_train": model.hyper.n_ctx_train,
        "experts": model.hyper.n_expert,
    }


def rig_object(rig: Rig) -> dict[str, Any]:
    return {
        "name": rig.name,
        "source": rig.source,
        "gpus": [_gpu(gpu) for gpu in rig.gpus],
        "links": [
            {"gpus": list(link.gpus), "kind": link.kind, "n_links": link.n_links, "path": link.path}
            for link in rig.links
        ],
        "ram_bytes": rig.ram_bytes,
        "ram_free_bytes": rig.ram_free_bytes,
        "ram_bandwidth_bytes_per_s": rig.ram_bandwidth_bytes_per_s,
        "cpu_cores": rig.cpu_cores,
        "psu_watts": rig.psu_watts,
        "driver": rig.driver,
        "findings": [{"text": finding.text, "hint": finding.hint} for finding in rig.findings],
        "measured": [msgspec.to_builtins(measured) for measured in rig.measured],
    }


def request_object(request: Request) -> dict[str, Any]:
    return {
        "runtime": request.runtime,
        "ctx": request.ctx,
        "users": request.users,
        "kv_type": request.kv_type,
        "gpus": list(request.gpus),
        "split": request.split,
        "offload": request.offload,
        "force": request.force,
        "runtime_args": list(request.runtime_args),
    }


def plan_object(plan: Plan) -> dict[str, Any]:
    host = plan.host
    return {
        "placement": plan.placement,
        "runtime": plan.runtime,
        "ctx": plan.ctx,
        "ctx_fits": plan.ctx_fits,
        "users": plan.users,
        "kv_type": plan.kv_type,
        "devices": [_device(device) for device in plan.devices],
        "host": {
            "layers": len(host.blocks),
            "expert_layers": len(host.expert_blocks),
            "weights_bytes": host.memory.weights,
            "kv_bytes": host.memory.kv,
            "compute_bytes": host.memory.compute,
            "total_bytes": host.memory.total,
            "free_bytes": host.free_bytes,
        },
        "tensor_split": None if plan.tensor_split is None else list(plan.tensor_split),
        "tok_s": _speed(plan.tok_s),
        "prompt_tok_s": _speed(plan.forecast.prompt_tok_s),
        "first_token_s": _wait(plan.forecast.first_token),
        "total_tok_s": _speed(plan.forecast.total_tok_s),
        "users_each": plan.users_each,
        "rules": [
            {"id": rule.id, "verdict": rule.verdict, "text": rule.text, "source": rule.source} for rule in plan.rules
        ],
        "alternatives": [_alternative(alternative) for alternative in plan.alternatives],
        "changes": list(plan.changes),
        "attached": plan.attached or None,
        "warnings": list(plan.warnings),
    }


def command_object(command: Command, unset: Sequence[str]) -> dict[str, Any]:
    """`unset`: the caller's variables that are to be taken away."""
    return {
        "argv": list(command.argv),
        "env": dict(command.env),
        "files": dict(command.files),
        "ready_url": command.ready_url,
        "endpoint": command.endpoint,
        "unset": list(unset),
    }


def _gpu(gpu: Gpu) -> dict[str, Any]:
    return {
        "index": gpu.index,
        "name": gpu.name,
        "uuid": gpu.uuid,
        "vendor": gpu.vendor,
        "total_bytes": gpu.total_bytes,
        "free_bytes": gpu.free_bytes,
        "bandwidth_bytes_per_s": gpu.bandwidth_bytes_per_s,
        "pcie_gen": gpu.pcie.gen if gpu.pcie else None,
        "pcie_width": gpu.pcie.width if gpu.pcie else None,
        "compute_capability": gpu.compute_capability,
        "enabled": gpu.enabled,
        "unified": gpu.unified,
        "integrated": gpu.integrated,
        "display": gpu.display,
        "numa_node": gpu.numa_node,
        "pci_bus_id": gpu.pci_bus_id,
        "device": gpu.device,
        "power_limit_watts": gpu.power_limit_watts,
        "max_tensor_bytes": gpu.max_tensor_bytes,
        "reserve_bytes": gpu.reserve_bytes,
        "processes": list(gpu.processes),
    }


def _device(device: DevicePlan) -> dict[str, Any]:
    memory = device.memory
    return {
        "gpu": device.gpu,
        "name": device.name,
        "uuid": device.uuid,
        "layers": len(device.blocks),
        "has_output": device.has_output,
        "weights_bytes": memory.weights,
        "kv_bytes": memory.kv,
        "compute_bytes": memory.compute,
        "overhead_bytes": memory.overhead,
        "total_bytes": memory.total,
        "free_bytes": device.free_bytes,
        "reserve_bytes": device.reserve_bytes,
    }


def _alternative(alternative: Alternative) -> dict[str, Any]:
    return {
        "runtime": alternative.runtime,
        "placement": alternative.placement,
        "gpus": list(alternative.gpus),
        "fits": alternative.fits,
        "short_bytes": alternative.short_bytes,
        "tok_s": _speed(alternative.tok_s),
        "total_tok_s": _speed(alternative.total_tok_s),
        "why_not": alternative.why_not,
    }


def _speed(speed: Speed | None) -> dict[str, float | bool] | None:
    if speed is None:
        return None
    return {
        "expected": round(speed.expected, 2),
        "low": round(speed.low, 2),
        "high": round(speed.high, 2),
        "measured": speed.measured,
    }


def _wait(wait: Wait | None) -> dict[str, float | int] | None:
    if wait is None:
        return None
    figures = {"expected": wait.expected, "low": wait.low, "high": wait.high}
    return {"prompt_tokens": wait.prompt_tokens} | {name: round(value, 3) for name, value in figures.items()}


def model_report(model: Model, kv_bytes_per_token: int) -> dict[str, Any]:
    """The object of `inspect --json`: the model's own, and what a planner would want to know."""
    hyper = model.hyper
    return {
        "schema": SCHEMA,
        "model": model_object(model)
        | {
            "files": [{"path": file.path, "bytes": file.n_bytes} for file in model.files],
            "embedding": hyper.n_embd,
            "vocabulary": hyper.n_vocab,
            "heads": list(hyper.n_head),
            "heads_kv": list(hyper.n_head_kv),
            "head_dim_k": hyper.head_dim_k,
            "head_dim_v": hyper.head_dim_v,
            "experts_used": hyper.n_expert_used,
            "kv_bytes_per_token": kv_bytes_per_token,
            "bytes_by_class": dict(model.bytes_by_class()),
            "bytes_by_layer": _by_layer(model),
        },
    }


def _by_layer(model: Model) -> list[dict[str, int]]:
    """Stored bytes of each block, by tensor class."""
    layers: list[dict[str, int]] = [{} for _ in range(model.hyper.n_layer)]
    for tensor in model.tensors:
        if tensor.layer is not None and tensor.layer < len(layers):
            sums = layers[tensor.layer]
            sums[tensor.kind] = sums.get(tensor.kind, 0) + tensor.n_bytes
    return layers
