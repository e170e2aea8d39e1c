"""What Docker says of itself: its version, whether it may be used, whether it has the image and NVIDIA's toolkit.

Texts of Docker 18 to 29. Each thing that lacks is one `RuntimeMissingError`, with the command that brings it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any, Final

from mgpu.errors import RuntimeMissingError

IMAGE: Final = "razerofficial/aikit:latest"

#: What is asked; each answer goes by its question in `Probe.outputs`.
VERSION: Final = "version"
INFO: Final = "info"
IMAGE_INSPECT: Final = f"image inspect {IMAGE}"

TOOLKIT: Final = (
    "install nvidia-container-toolkit, then: sudo nvidia-ctk runtime configure --runtime=docker && "
    "sudo systemctl restart docker"
)
START_DAEMON: Final = "start it: sudo systemctl start docker; or use --runtime vllm, which needs no Docker"
JOIN_GROUP: Final = 'let this user: sudo usermod -aG docker "$USER", then log in again; or use --runtime vllm'

NO_PERMISSION: Final = re.compile(r"permission denied while trying to connect to the [Dd]ocker")
NO_DAEMON: Final = re.compile(
    r"Cannot connect to the Docker daemon|failed to connect to the docker API|Is the docker daemon running"
    r"|error during connect"
)
_ADDRESS: Final = re.compile(r"(?:at|API at) ((?:unix|tcp|npipe|ssh)://[^\s.;]+(?:\.sock)?[^\s.;]*)")
_SERVER: Final = re.compile(r"^Server:", re.MULTILINE)
_VERSION: Final = re.compile(r"^ +Version: +([\w.+~-]{1,60})", re.MULTILINE)
_NVIDIA: Final = re.compile(r"^ *Runtimes:.*\bnvidia\b|nvidia\.com/gpu", re.MULTILINE)


def docker_version(outputs: Mapping[str, str]) -> str:
    """Of the daemon. Raises `RuntimeMissingError` where it does not run, or this user may not ask it."""
    said = outputs.get(VERSION, "") + "\n" + outputs.get(INFO, "")
    if NO_PERMISSION.search(said):
        raise RuntimeMissingError("this user may not use Docker: permission denied on its socket", hint=JOIN_GROUP)
    if NO_DAEMON.search(said):
        address = _ADDRESS.search(said)
        where = f" at {address[1]}" if address else ""
        raise RuntimeMissingError(f"the Docker daemon does not answer{where}", hint=START_DAEMON)
    server = _SERVER.search(outputs.get(VERSION, ""))
    version = _VERSION.search(outputs[VERSION], server.end()) if server else None
    if version is None:
        last = next(
            (line.strip() for line in reversed(outputs.get(VERSION, "").splitlines()) if line.strip()), "nothing"
        )
        raise RuntimeMissingError(
            f"`docker version` says nothing of a daemon, but: {last[:200]}", hint="try it by hand: docker info"
        )
    return version[1]


def check_toolkit(outputs: Mapping[str, str]) -> None:
    """Raises `RuntimeMissingError` where Docker knows neither NVIDIA's runtime nor its devices (CDI)."""
    if _NVIDIA.search(outputs.get(INFO, "")) is None:
        raise RuntimeMissingError("Docker has no NVIDIA Container Toolkit: containers see no GPU", hint=TOOLKIT)


def check_image(outputs: Mapping[str, str]) -> None:
    """Raises `RuntimeMissingError` without the image, or with one of before it could start vLLM itself."""
    said = outputs.get(IMAGE_INSPECT, "")
    if "no such image" in said.lower():
        raise RuntimeMissingError(f"the image {IMAGE} is not on this machine", hint=f"fetch it: docker pull {IMAGE}")
    entrypoint = _entrypoint(said)
    if entrypoint is None:
        raise RuntimeMissingError(
            f"`docker {IMAGE_INSPECT}` says nothing of the image", hint=f"fetch it anew: docker pull {IMAGE}"
        )
    # `/usr/bin/env` starts what follows; before, a Conda environment had to be entered first (Dockerfile 2025).
    if entrypoint and entrypoint[-1].rpartition("/")[2] != "env":
        raise RuntimeMissingError(
            f"this image of {IMAGE} is too old: its entry point is {' '.join(entrypoint)}",
            hint=f"fetch it anew: docker pull {IMAGE}",
        )


def _entrypoint(text: str) -> list[str] | None:
    """Of `docker image inspect`; None where the text is no description of an image."""
    start = text.find("[")
    try:
        described: Any = json.JSONDecoder().raw_decode(text[start:])[0] if start >= 0 else None
    except (ValueError, RecursionError):
        return None
    if not isinstance(described, list) or not described or not isinstance(described[0], dict):
        return None
    config = described[0].get("Config")
    words = config.get("Entrypoint") if isinstance(config, dict) else None
    return [str(word) for word in words] if isinstance(words, list) else []
