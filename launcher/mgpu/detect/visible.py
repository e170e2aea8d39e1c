"""`CUDA_VISIBLE_DEVICES`, `ROCR_VISIBLE_DEVICES` and `HIP_VISIBLE_DEVICES` of the caller: which of the machine's cards
a program started from here may use.

Semantics of the CUDA C++ Programming Guide, "CUDA Environment Variables", and of ROCm's "GPU isolation techniques".
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping
from typing import Final

from mgpu.errors import one_line
from mgpu.rig import Finding, Gpu

_NUMBER: Final = re.compile(r"[0-9]{1,9}")
_SHOWN: Final = 120  # characters of a variable's value


def apply_cuda_visible(
    value: str | None, gpus: tuple[Gpu, ...], *, device_order: str | None = None
) -> tuple[tuple[Gpu, ...], tuple[Finding, ...]]:
    """The cards that `value` leaves, in the rig's order, and what a person should know about it.

    `value` is a list of numbers and of UUIDs (a unique beginning is enough); the first entry that names no card ends
    the list, as in CUDA; None is no restriction, "" and "-1" leave nothing. `device_order` is `CUDA_DEVICE_ORDER`.
    Numbers count the cards given, which is CUDA's order under PCI_BUS_ID and where all cards are of one kind.
    """
    if value is None or not gpus:
        return gpus, ()
    entries = [entry.strip() for entry in value.split(",")]
    chosen: list[Gpu] = []
    ended_by: str | None = None
    for entry in entries:
        gpu = _find(entry, gpus)
        if gpu is None:
            ended_by = entry
            break
        chosen.append(gpu)
    visible = tuple(gpu for gpu in gpus if gpu in chosen)
    return visible, tuple(_findings(value, ended_by, gpus, visible, device_order))


def apply_rocm_visible(
    environ: Mapping[str, str], gpus: tuple[Gpu, ...]
) -> tuple[tuple[Gpu, ...], tuple[Finding, ...]]:
    """The AMD GPUs that the caller's variables leave, in the rig's order. HIP's numbers count what ROCR's has left, in
    its order. HIP takes an empty value for none; ROCR takes it for no GPU at all."""
    left, settings = gpus, []
    if (value := environ.get("ROCR_VISIBLE_DEVICES")) is not None:
        left = _listed(value, left)
        settings.append(f"ROCR_VISIBLE_DEVICES={one_line(value, _SHOWN)}")
    if value := environ.get("HIP_VISIBLE_DEVICES"):
        left = _listed(value, left)
        settings.append(f"HIP_VISIBLE_DEVICES={one_line(value, _SHOWN)}")
    if len(left) == len(gpus):
        return gpus, ()
    names = ", ".join(f"GPU {gpu.index}" for gpu in sorted(left, key=lambda gpu: gpu.index)) or "none"
    text = f"{' '.join(settings)} leaves {len(left)} of {len(gpus)} AMD GPUs: {names}"
    hint = f"unset {' and '.join(setting.partition('=')[0] for setting in settings)} to use them all"
    return tuple(gpu for gpu in gpus if gpu in left), (Finding(text=text, hint=hint),)


def _listed(value: str, gpus: tuple[Gpu, ...]) -> tuple[Gpu, ...]:
    """The cards a list names, in its order, up to the first entry that names none."""
    found = (_find(entry.strip(), gpus) for entry in value.split(","))
    return tuple(dict.fromkeys(gpu for gpu in itertools.takewhile(lambda gpu: gpu is not None, found) if gpu))


def _find(entry: str, gpus: tuple[Gpu, ...]) -> Gpu | None:
    if _NUMBER.fullmatch(entry):
        return gpus[int(entry)] if int(entry) < len(gpus) else None
    if not entry.startswith(("GPU-", "MIG-")):
        return None
    matches = [gpu for gpu in gpus if (gpu.uuid or "").lower().startswith(entry.lower())]
    return matches[0] if len(matches) == 1 else None


def _findings(
    value: str, ended_by: str | None, gpus: tuple[Gpu, ...], visible: tuple[Gpu, ...], device_order: str | None
) -> list[Finding]:
    setting = f"CUDA_VISIBLE_DEVICES={one_line(value, _SHOWN)}"
    findings: list[Finding] = []
    if len(visible) < len(gpus):
        left = ", ".join(f"GPU {gpu.index}" for gpu in visible) or "none"
        findings.append(
            Finding(
                text=f"{setting} leaves {len(visible)} of {len(gpus)} NVIDIA GPUs: {left}",
                hint="unset CUDA_VISIBLE_DEVICES to use them all",
            )
        )
    named = one_line(repr(ended_by), _SHOWN)
    if ended_by not in {None, "", "-1"}:
        findings.append(
            Finding(
                text=f"{setting}: {named} names no single GPU here, so CUDA ignores it and what follows",
                hint="name cards by number or by UUID (nvidia-smi -L)",
            )
        )
    by_number = any(entry.strip().isdecimal() for entry in value.split(","))
    if by_number and device_order != "PCI_BUS_ID" and len({gpu.name for gpu in gpus}) > 1:
        findings.append(
            Finding(
                text=f"{setting} is read in nvidia-smi's order; CUDA itself may number these mixed cards otherwise",
                hint="export CUDA_DEVICE_ORDER=PCI_BUS_ID, or name cards by UUID (nvidia-smi -L)",
            )
        )
    return findings
