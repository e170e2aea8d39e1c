"""A plan as one `docker run`: vLLM straight in Razer AIKit's image, in the foreground.

Not through the image's own `rzr-aikit model run`: that loads the model twice or more, leaves vLLM detached, reports
failures with status 0 and has no API key (rzr_aikit/model/run.py). The newest image has vLLM 0.20 (Dockerfile).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Final

from mgpu.adapter import Command, Endpoint, Installed
from mgpu.errors import RefusedError, UsageError
from mgpu.plan import Layout
from mgpu.rig import Gpu, Rig, short_name
from mgpu_adapters.aikit.docker import IMAGE
from mgpu_adapters.vllm.command import FULL_UUID, serving
from mgpu_adapters.vllm.flags import Given
from mgpu_adapters.vllm.memory import Footprint
from mgpu_adapters.vllm.serving import SCRUB, addresses, fingerprint_of, metrics_of, secret, version_of

#: Where vLLM listens inside; outside it is at the plan's address.
_INSIDE: Final = Endpoint(host="0.0.0.0", port=8000)  # noqa: S104 - of a container, which is published on one address

#: Shared memory of the container's own, gone with it; `--ipc host` would leave it on the machine. vLLM 0.32 took 0.7 GB
#: for two ranks; its own scripts give 10.24 GB (examples/ray_serving/run_cluster.sh).
_SHARED_MEMORY: Final = "10.24g"

#: A directory of the Hugging Face cache holds links into `blobs` beside it.
_SNAPSHOT: Final = re.compile(r"(.*)/(snapshots/[^/]+)")


def build_container(
    need: Footprint, layout: Layout, rig: Rig, endpoint: Endpoint, *, installed: Installed, given: Given
) -> Command:
    """`docker run …` for `layout`, without the flags after `--`.

    Raises `RefusedError` for cards that are not NVIDIA's, `UsageError` for a host that is no address, and as `serving`.
    """
    source, inside = mounted(need.model.path)
    served = serving(need.at(inside), layout, rig, _INSIDE, version=version_of(installed), given=given)
    _check_nvidia(served.gpus)
    name = f"mgpu-aikit-{endpoint.port}"
    docker = installed.executable
    variables = {"HF_HUB_OFFLINE": "1", **visible(served.gpus), **served.env}
    argv = [docker, "run", "--rm", "--init", "--name", name, "--gpus", devices(served.gpus, rig)]
    argv += ["--shm-size", _SHARED_MEMORY, "--publish", f"{_published(endpoint.host)}:{endpoint.port}:{_INSIDE.port}"]
    argv += ["--mount", f"type=bind,{_csv(f'source={source[0]}')},{_csv(f'target={source[1]}')},readonly"]
    argv += [word for pair in variables.items() for word in ("--env", "=".join(pair))]
    key = secret(endpoint)
    argv += [word for variable in key for word in ("--env", variable)]  # its value from our own environment
    ready_url, base = addresses(endpoint)
    return Command(
        argv=(*argv, IMAGE, "vllm", *served.arguments),
        devices=tuple(f"cuda:{place}" for place in range(len(layout.gpus))),
        env=key,
        scrub=SCRUB,
        files={},
        ready_url=ready_url,
        endpoint=base,
        fingerprint=fingerprint_of(served.n_ranks, served.n_stages, given),
        after=(docker, "rm", "--force", name),
        elsewhere=True,
        metrics_url=metrics_of(base),
    )


def mounted(path: str) -> tuple[tuple[str, str], str]:
    """(what is mounted, where), and the model's directory inside."""
    snapshot = _SNAPSHOT.fullmatch(path.rstrip("/"))
    source, rest = (snapshot[1], f"/{snapshot[2]}") if snapshot else (path.rstrip("/") or "/", "")
    target = f"/models/{source.rpartition('/')[2] or 'model'}"
    return (source, target), target + rest


def devices(gpus: Sequence[Gpu], rig: Rig) -> str:
    """For `--gpus`, which reads it as CSV: hence the quotes. By UUID where all are known, else by index."""
    uuids = [gpu.uuid for gpu in gpus if gpu.uuid is not None and FULL_UUID.fullmatch(gpu.uuid)]
    ours = [gpu.index for gpu in rig.gpus if gpu.vendor == "nvidia"]
    named = uuids if len(uuids) == len(gpus) else [str(ours.index(gpu.index)) for gpu in gpus]
    return f'"device={",".join(named)}"'


def visible(gpus: Sequence[Gpu]) -> dict[str, str]:
    """Inside, the container's cards are numbered anew, in PCI order; the plan's order is said in those numbers."""
    inside = sorted(gpu.index for gpu in gpus)
    order = ",".join(str(inside.index(gpu.index)) for gpu in gpus)
    return {"CUDA_DEVICE_ORDER": "PCI_BUS_ID", "CUDA_VISIBLE_DEVICES": order}


def _check_nvidia(gpus: Sequence[Gpu]) -> None:
    for gpu in gpus:
        if gpu.vendor != "nvidia":
            raise RefusedError(
                f"Razer AIKit drives NVIDIA cards only, and GPU {gpu.index} is a {short_name(gpu.name)}",
                hint="use --runtime vllm, or leave it out of --gpus",
            )


def _published(host: str) -> str:
    """For `--publish`, which takes addresses only."""
    if host == "localhost":
        return "127.0.0.1"
    if ":" in host:
        return f"[{host}]"
    if not re.fullmatch(r"\d+(\.\d+){3}", host):
        raise UsageError(f"--host {host}: a container is published at an address", hint="give the IP address of it")
    return host


def _csv(field: str) -> str:
    """A path may hold commas and quotes."""
    return '"' + field.replace('"', '""') + '"' if any(sign in field for sign in ',"\n') else field
