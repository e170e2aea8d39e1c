"""What a container's log says: Docker's own failures, then vLLM's lines."""

from __future__ import annotations

import re
from typing import Final

from mgpu.adapter import Cause, LogFact, Stage
from mgpu_adapters.aikit.docker import IMAGE, JOIN_GROUP, NO_DAEMON, NO_PERMISSION, START_DAEMON, TOOLKIT
from mgpu_adapters.vllm.log import read_line as read_vllm
from mgpu_adapters.words import clip, shortage_of_ram

_CAUSES: Final = (
    (r"could not select device driver .* capabilities: \[\[gpu\]\]", "Docker has no NVIDIA Container Toolkit", TOOLKIT),
    (r"nvidia-container-cli: (.+?)(?::? unknown\.?)?$", "NVIDIA's Container Toolkit failed: {0}",
     "try: docker run --rm --gpus all ubuntu nvidia-smi"),
    (r"failed to discover GPU vendor from CDI|unresolvable CDI devices (.+)", "Docker knows no such NVIDIA device",
     "make its list anew: sudo nvidia-ctk cdi generate --output=/etc/cdi/nvidia.yaml"),
    (r'The container name "/?([^"]+)" is already in use', "a container called {0} is left over",
     "remove it: docker rm --force {0}"),
    (r"port is already allocated|failed to bind host port", "the port is in use by another program",
     "leave --port out to get a free one"),
    (r"bind source path does not exist: (.+)", "the Docker daemon does not see {0}",
     "a daemon on another machine, or in a VM, has other files: use --runtime vllm"),
    (r"PermissionError: .*'(/models/[^']*)'", "the container may not read {0}",
     "its user is not you: chmod -R a+rX the model's directory"),
    (r"pull access denied|manifest for .* not found", f"Docker cannot fetch {IMAGE}", f"try: docker pull {IMAGE}"),
    (r'exec: "vllm": executable file not found', "this image has no vLLM on its path", f"docker pull {IMAGE}"),
)  # fmt: skip

#: Docker's and the kernel's words for a container that had more than its share of RAM.
_KILLED: Final = re.compile(r"\bOOMKilled\b|container init was OOM-killed|memory limit too low")

_STAGES: Final = (
    (r"Unable to find image '([^']+)' locally", "fetching the image"),
    (r"^[0-9a-f]{12}: Pull complete", "fetching the image"),
)


def read_line(line: str) -> LogFact | None:
    """The fact in one line of the log, or None."""
    line = clip(line)
    if _KILLED.search(line):
        return shortage_of_ram(0)
    if NO_PERMISSION.search(line):
        return Cause(text="this user may not use Docker", hint=JOIN_GROUP)
    if NO_DAEMON.search(line):
        return Cause(text="the Docker daemon does not answer", hint=START_DAEMON)
    for pattern, text, hint in _CAUSES:
        match = re.search(pattern, line)
        if match is not None:
            return Cause(text=text.format(*match.groups()), hint=hint.format(*match.groups()))
    for pattern, text in _STAGES:
        if re.search(pattern, line):
            return Stage(text=text)
    return read_vllm(line)
