"""What every `vllm serve` has in common, on cards, on the CPU and in a container."""

from __future__ import annotations

import re
from typing import Final

from mgpu.adapter import Endpoint, Installed
from mgpu.request import Request
from mgpu_adapters.vllm.flags import Given

#: The newest version these modules know.
NEWEST: Final = (0, 32)

#: Of the caller's environment, what would contradict the plan.
SCRUB: Final = ("VLLM_PP_LAYER_PARTITION", "VLLM_API_KEY")

#: Shared memory by name: Python's own, PyTorch's between ranks on the CPU, NCCL's. What was there after SIGKILL.
LEAVES: Final = ("psm_*", "sem.mp-*", "vllm_dist_*", "nccl-*")


def version_of(installed: Installed) -> tuple[int, int]:
    """`"0.32.0"` as (0, 32); (0, 0) for what cannot be read. A checkout without tags is taken for the newest."""
    if installed.version.startswith("0.1.dev"):
        return NEWEST
    match = re.match(r"(\d+)\.(\d+)", installed.version)
    return (int(match[1]), int(match[2])) if match else (0, 0)


def addresses(endpoint: Endpoint) -> tuple[str, str]:
    """Where it says that it is up, and the base URL for clients."""
    base = f"http://{_authority(endpoint)}"
    return f"{base}/health", f"{base}/v1"


def metrics_of(base: str) -> str:
    """Where it tells how much it serves: beside the API, and open to whoever can reach it, with a key or without."""
    return f"{base.removesuffix('/v1')}/metrics"


def secret(endpoint: Endpoint) -> dict[str, str]:
    """The key as a variable: in argv every user of the machine could read it."""
    return {} if endpoint.api_key is None else {"VLLM_API_KEY": endpoint.api_key}


def half_open(request: Request) -> tuple[str, ...]:
    """What a key does not guard (vLLM 0.32.0 entrypoints/openai/server_utils.py: /v1, /v2 and /inference alone)."""
    if not request.exposed or request.no_auth:
        return ()
    reach = f"whoever reaches {request.host} can still generate by /invocations, and read /metrics"
    return (f"vLLM asks for the key below /v1 alone: {reach}; put a proxy in front that passes /v1 alone",)


def fingerprint_of(n_ranks: int, n_stages: int, given: Given) -> str:
    """`vllm-0.32.0-tp2-e7592f3b`, as in each answer (vLLM 0.32.0 entrypoints/serve/utils/fingerprint.py)."""
    if "fingerprint-mode" in given or "fingerprint-value" in given:
        return ""
    split = (f"-tp{n_ranks}" if n_ranks > 1 else "") + (f"-pp{n_stages}" if n_stages > 1 else "")
    return rf"^vllm-[^-]+{split}(-dp\d+)?(-ep)?-[0-9a-z]+$"


def _authority(endpoint: Endpoint) -> str:
    """Where a client on this machine reaches the server: a wildcard address is reached by loopback."""
    host = {"0.0.0.0": "127.0.0.1", "::": "::1", "": "127.0.0.1"}.get(endpoint.host, endpoint.host)  # noqa: S104 - compared, not bound
    return f"[{host}]:{endpoint.port}" if ":" in host else f"{host}:{endpoint.port}"
