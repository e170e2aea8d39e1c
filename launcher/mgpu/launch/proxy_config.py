"""What each proxy is told: one address for people, the least busy replica for each request. Pure texts.

What all four have in common: pieces of an answer pass at once, an answer may take a day, a request whose replica could
not take it goes to the next one (never after the first byte of an answer), and nothing is logged or written elsewhere.
Connections to the replicas end with their request: an idle one would occupy a thread of llama-server for 5 s
(llama.cpp b11434 vendor/cpp-httplib/httplib.h, CPPHTTPLIB_KEEPALIVE_TIMEOUT_SECOND).

Texts hold addresses and numbers alone: no path, no name, no key, so there is nothing to escape.
"""

from __future__ import annotations

import json
from ipaddress import ip_address
from typing import Any, Final

from msgspec import Struct

from mgpu.launch.ports import LOOPBACK

#: Seconds between two bytes of an answer, at most: a CPU reads a long prompt for hours.
_PATIENCE_S: Final = 86400
_CONNECT_S: Final = 5  # to a replica on this machine, which has answered before
_BODY_MIB: Final = 256  # of a request: pictures come as base64


class Front(Struct, frozen=True, kw_only=True):
    """Where the proxy listens (numbers of IPv4 and IPv6, no names), and the ports on 127.0.0.1 behind it."""

    addresses: tuple[str, ...]
    port: int
    replicas: tuple[int, ...]

    def __post_init__(self) -> None:
        for address in self.addresses:
            ip_address(address)  # ValueError: not a literal address, which is a bug of the caller


def nginx(front: Front) -> str:
    """For `nginx -p DIRECTORY`: all its files are relative to that. Since 1.9 (2015)."""
    listens = (
        f"        listen {_bracketed(address)}:{front.port}{' ipv6only=off' if _is_both(address) else ''};"
        for address in front.addresses
    )
    servers = (f"        server {LOOPBACK}:{port} max_fails=0;" for port in front.replicas)
    return _NGINX.format(
        listens="\n".join(listens).strip(),
        replicas="\n".join(servers).strip(),
        body=_BODY_MIB,
        connect=_CONNECT_S,
        patience=_PATIENCE_S,
    )


def haproxy(front: Front) -> str:
    """For `haproxy -db -f FILE`. Since 2.0 (2019)."""
    binds = (
        f"    bind {_bracketed(address)}:{front.port}{' v4v6' if _is_both(address) else ''}"
        for address in front.addresses
    )
    servers = (f"    server replica{place} {LOOPBACK}:{port}" for place, port in enumerate(front.replicas))
    return _HAPROXY.format(
        binds="\n".join(binds).strip(),
        servers="\n".join(servers).strip(),
        connect=_CONNECT_S,
        patience=_PATIENCE_S,
    )


def caddy(front: Front, *, since_2_7: bool) -> str:
    """For `caddy run --config FILE`: its JSON. Since 2.6 (2022); 2.7 renamed what keeps a question to ask it again.

    No `flush_interval`: event streams pass at once without it, and -1 has an answer made to its end for nobody.
    """
    kept = {"request_buffers": _BODY_MIB << 20} if since_2_7 else {"buffer_requests": True}
    proxy = {
        "handler": "reverse_proxy",
        **kept,
        "load_balancing": {"selection_policy": {"policy": "least_conn"}, "retries": len(front.replicas)},
        "health_checks": {"passive": {"fail_duration": "1s"}},  # so that the next try is not the same replica
        "transport": {
            "protocol": "http",
            "dial_timeout": f"{_CONNECT_S}s",
            "compression": False,
            "keep_alive": {"enabled": False},
        },
        "upstreams": [{"dial": f"{LOOPBACK}:{port}"} for port in front.replicas],
    }
    server = {
        "listen": [f"{_bracketed(address)}:{front.port}" for address in front.addresses],
        "protocols": ["h1"],
        "automatic_https": {"disable": True},
        "routes": [{"handle": [{"handler": "request_body", "max_size": _BODY_MIB << 20}, proxy]}],
    }
    return _text(
        {
            "admin": {"disabled": True, "config": {"persist": False}},
            "logging": {"logs": {"default": {"level": "WARN"}}},
            "apps": {"http": {"grace_period": "1s", "servers": {"people": server}}},
        }
    )


def litellm(front: Front, *, keyed: bool) -> str:
    """For `litellm --config FILE`: YAML, of which JSON is a part. Tried with 1.106 (2026).

    `keyed`: people and replicas share the key that is in $LITELLM_MASTER_KEY.
    """
    key = "os.environ/LITELLM_MASTER_KEY"
    models = [
        {
            "model_name": "*",
            "litellm_params": {
                "model": "openai/*",
                "api_base": f"http://{LOOPBACK}:{port}/v1",
                "api_key": key if keyed else "none",
                "timeout": _PATIENCE_S,
                "stream_timeout": _PATIENCE_S,
            },
        }
        for port in front.replicas
    ]
    return _text(
        {
            "model_list": models,
            "router_settings": {"routing_strategy": "least-busy", "num_retries": 1},
            "litellm_settings": {"telemetry": False},
            "general_settings": {"master_key": key} if keyed else {},
        }
    )


def _text(told: dict[str, Any]) -> str:
    return json.dumps(told, indent=1) + "\n"


def _bracketed(address: str) -> str:
    return f"[{address}]" if ":" in address else address


def _is_both(address: str) -> bool:
    """llama-server's "::" is IPv4 too (llama.cpp b11434 vendor/cpp-httplib): so is ours."""
    return address == "::"


_NGINX: Final = """\
# One process, in the foreground, as whoever started mgpu.
daemon off;
master_process off;
pid nginx.pid;
lock_file nginx.lock;
error_log stderr warn;

events {{
    worker_connections 1024;
}}

http {{
    access_log off;
    server_tokens off;
    client_body_temp_path body;
    proxy_temp_path proxy;
    fastcgi_temp_path fastcgi;
    uwsgi_temp_path uwsgi;
    scgi_temp_path scgi;

    upstream replicas {{
        least_conn;
        # None is ever set aside: mgpu watches the replicas, and ends when one does.
        {replicas}
    }}

    map $http_upgrade $connection_header {{
        default upgrade;
        ""      close;
    }}

    server {{
        {listens}

        client_max_body_size {body}m;
        client_body_buffer_size 1m;
        large_client_header_buffers 4 32k;
        underscores_in_headers on;
        merge_slashes off;
        send_timeout {patience}s;

        location / {{
            proxy_pass http://replicas;
            proxy_http_version 1.1;
            proxy_set_header Host $http_host;
            proxy_set_header Upgrade $http_upgrade;
            proxy_set_header Connection $connection_header;
            proxy_redirect off;
            proxy_buffering off;
            proxy_connect_timeout {connect}s;
            proxy_read_timeout {patience}s;
            proxy_send_timeout {patience}s;
            # A question can be asked twice: it changes nothing. nginx never does so once an answer has begun.
            proxy_next_upstream error timeout non_idempotent;
        }}
    }}
}}
"""

_HAPROXY: Final = """\
global
    nbthread 1

defaults
    mode http
    option http-no-delay
    option http-server-close
    option abortonclose
    option redispatch 1
    retries 3
    retry-on conn-failure empty-response
    http-reuse never
    timeout connect {connect}s
    timeout http-request 60s
    timeout http-keep-alive 75s
    timeout client {patience}s
    timeout server {patience}s
    timeout tunnel {patience}s

frontend people
    {binds}
    default_backend replicas

backend replicas
    balance leastconn
    {servers}
"""
