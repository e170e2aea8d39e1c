"""What a launch of replicas would start on this machine, for those who only want to read it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from mgpu.adapter import Command, Endpoint
from mgpu.launch.ports import LOOPBACK, choose_ports
from mgpu.launch.proxy import find_proxy, planned_directory, proxy_command
from mgpu.request import Request


def proxy_name(environ: Mapping[str, str]) -> str | None:
    """The proxy that would stand in front; None without one. Raises as `find_proxy` does."""
    proxy = find_proxy(environ)
    return None if proxy is None else proxy.name


def proxied_commands(
    command_fors: Sequence[Callable[[Endpoint], Command]], request: Request, environ: Mapping[str, str]
) -> tuple[Command, ...]:
    """The proxy's command, then the replicas'; nothing without a proxy. Raises as `find_proxy` and `free_port` do."""
    proxy = find_proxy(environ)
    if proxy is None:
        return ()
    ports = choose_ports(request.host, request.port, len(command_fors), proxied=True)
    endpoint = Endpoint(host=request.host, port=ports.front, api_key=request.api_key)
    front = proxy_command(proxy, command_fors[0], endpoint, ports.members, planned_directory(ports.front))
    own = (Endpoint(host=LOOPBACK, port=port, api_key=request.api_key) for port in ports.members)
    pairs = zip(command_fors, own, strict=True)
    return (front, *(command_for(endpoint) for command_for, endpoint in pairs))
