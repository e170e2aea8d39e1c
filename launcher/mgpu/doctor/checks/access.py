"""Whether this user, here, may use the cards."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from mgpu.doctor.facts import Facts, Node
from mgpu.doctor.finding import Finding, ok

_CONTROL: Final = "/dev/nvidiactl"
_MEMORY: Final = "/dev/nvidia-uvm"
_ROCM: Final = "/dev/kfd"


def nvidia_files(facts: Facts) -> Iterator[Finding]:
    """CUDA opens both before anything else."""
    yield from (_said(node, _nvidia_fix(node, facts)) for node in _named(facts, _CONTROL, _MEMORY))


def rocm_file(facts: Facts) -> Iterator[Finding]:
    """Without it ROCm sees no card; Vulkan does without."""
    yield from (_said(node, _rocm_fix(node, facts)) for node in _named(facts, _ROCM))


def _named(facts: Facts, *paths: str) -> Iterator[Node]:
    return (node for node in facts.cards.nodes if node.path in paths)


def _said(node: Node, fix: str) -> Finding:
    name = f"device-{node.path.rpartition('/')[2]}"
    if node.allowed:
        return ok("access", name, f"{node.path} can be opened")
    whose = f" (group {node.group})" if node.group else ""
    text = f"no permission to open {node.path}{whose}" if node.exists else f"there is no {node.path}"
    severity: Final = "warning" if node.path == _ROCM else "error"
    return Finding(severity=severity, area="access", id=name, text=text, fix=fix)


def _nvidia_fix(node: Node, facts: Facts) -> str:
    if not node.exists and facts.host.container:
        return f"start {facts.host.container} with the GPUs: --gpus all, or --device nvidia.com/gpu=all"
    if not node.exists:
        return "sudo nvidia-modprobe -u -c=0" if node.path == _MEMORY else "sudo nvidia-modprobe -c=0"
    if facts.host.container:
        return "restart the container: one loses its devices at `systemctl daemon-reload`; or --group-add its group"
    return "sudo chmod 666 /dev/nvidia*, or see NVreg_DeviceFileMode in /etc/modprobe.d"


def _rocm_fix(node: Node, facts: Facts) -> str:
    if facts.host.container:
        return "start it with --device /dev/kfd --device /dev/dri --group-add render"
    if node.exists:
        return f"sudo usermod -aG {node.group or 'render'},video $USER, then log in again"
    return "install ROCm's driver, or use a build for Vulkan"


CHECKS: Final = (nvidia_files, rocm_file)
