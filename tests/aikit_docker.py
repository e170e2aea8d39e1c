"""What Docker prints, for tests of the AIKit adapter: of a machine where all is there, and of those where it is not."""

from __future__ import annotations

import json

from mgpu_adapters.aikit.docker import IMAGE

#: Docker 29.4 (nvidia-container-toolkit issue 1743), shortened.
VERSION = """\
Client:
 Version:           29.4.0
 API version:       1.54
 OS/Arch:           linux/amd64
 Context:           default

Server:
 Engine:
  Version:          29.4.0
  API version:      1.54 (minimum version 1.40)
 containerd:
  Version:          v2.2.2
"""
CLIENT = VERSION.partition("\n\n")[0] + "\n"

INFO = """\
Client:
 Version:    29.4.0
 Context:    default

Server:
 Containers: 14
 Server Version: 29.4.0
 Runtimes: io.containerd.runc.v2 nvidia runc
 Default Runtime: runc
"""
WITHOUT_TOOLKIT = INFO.replace(" nvidia", "")
WITH_CDI = WITHOUT_TOOLKIT + " Discovered Devices:\n  cdi: nvidia.com/gpu=0\n  cdi: nvidia.com/gpu=all\n"

NO_DAEMON = "Cannot connect to the Docker daemon at unix:///var/run/docker.sock. Is the docker daemon running?\n"
NO_DAEMON_NOW = (
    "failed to connect to the docker API at unix:///var/run/docker.sock; check if the path is correct and if the "
    "daemon is running: dial unix /var/run/docker.sock: connect: no such file or directory\n"
)
NO_PERMISSION = (
    "permission denied while trying to connect to the Docker daemon socket at unix:///var/run/docker.sock: "
    'Get "http://%2Fvar%2Frun%2Fdocker.sock/v1.47/version": dial unix /var/run/docker.sock: connect: '
    "permission denied\n"
)
NO_PERMISSION_NOW = (
    "permission denied while trying to connect to the docker API at unix:///var/run/docker.sock\n"  # Docker 29
)
NO_IMAGE = f"[]\nError response from daemon: No such image: {IMAGE}\n"


def image(entrypoint: list[str] | None) -> str:
    """`docker image inspect`, shortened."""
    return json.dumps([{"RepoTags": [IMAGE], "Config": {"Entrypoint": entrypoint, "Cmd": ["bash", "-l"]}}], indent=4)


IMAGE_NOW = image(["/usr/bin/env"])
