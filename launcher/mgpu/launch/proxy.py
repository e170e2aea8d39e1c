"""A proxy that people already run, in front of replicas: found, told its configuration, started like a runtime."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Final, Literal, get_args

from msgspec import Struct
from msgspec.structs import replace

from mgpu.adapter import Cause, Command, Endpoint, LogFact, Search
from mgpu.errors import RuntimeMissingError, UsageError
from mgpu.launch import proxy_config
from mgpu.launch.find import Found, find_runtime
from mgpu.launch.ports import literal_addresses
from mgpu.launch.proxy_config import Front

ProxyName = Literal["nginx", "haproxy", "caddy", "litellm"]

#: The first that is installed is taken.
PROXY_NAMES: Final[tuple[ProxyName, ...]] = get_args(ProxyName)

#: Which to take; "none" for none.
VARIABLE: Final = "MGPU_PROXY"

#: Debian keeps daemons where the PATH of people does not look.
_SBIN: Final = ("/usr/local/sbin", "/usr/sbin", "/sbin")

_INSTALL: Final[Mapping[ProxyName, str]] = {
    "nginx": "apt-get install nginx-light",
    "haproxy": "apt-get install haproxy",
    "caddy": "apt-get install caddy",
    "litellm": "uv tool install 'litellm[proxy]'",
}

#: LiteLLM needs to be told that a key of any kind, or none, is meant; and fetches prices at its start.
_LITELLM_ENV: Final[dict[str, str]] = {
    "LITELLM_DANGEROUSLY_PERMIT_WEAK_OR_UNSET_MASTER_KEY": "true",
    "LITELLM_LOCAL_MODEL_COST_MAP": "True",
    "LITELLM_MODE": "PRODUCTION",  # any other reads a .env file where mgpu was started
}

_NGINX_TOLD_WHERE: Final = (1, 19, 5)  # the first that can be told at its start where to complain (-e)
_CADDY_2_7: Final = (2, 7)
_VERSION_FLAGS: Final[Mapping[ProxyName, str]] = {"nginx": "-v", "caddy": "version"}


class Proxy(Struct, frozen=True, kw_only=True):
    """A proxy on this machine. `version` where it matters, as numbers."""

    name: ProxyName
    executable: str
    version: tuple[int, ...] = ()


def find_proxy(environ: Mapping[str, str]) -> Proxy | None:
    """What $MGPU_PROXY names, else the first one installed; None where it says "none", or there is none.

    Raises `UsageError` for a name that is none of ours, `RuntimeMissingError` for one that is not installed.
    """
    wanted = environ.get(VARIABLE, "").strip().lower()
    if wanted == "none":
        return None
    if wanted and wanted not in PROXY_NAMES:
        raise UsageError(
            f"${VARIABLE} {environ[VARIABLE]!r} is no proxy mgpu knows", hint=f"one of {', '.join(PROXY_NAMES)}, none"
        )
    found = next(filter(None, (_find(name, environ) for name in PROXY_NAMES if wanted in {"", name})), None)
    if found is None and wanted:
        install = next(install for name, install in _INSTALL.items() if name == wanted)
        raise RuntimeMissingError(
            f"${VARIABLE} names {wanted}, which is not on PATH", hint=f"install it: {install}; or unset ${VARIABLE}"
        )
    return found


def proxy_command(
    proxy: Proxy,
    command_for: Callable[[Endpoint], Command],
    endpoint: Endpoint,
    ports: tuple[int, ...],
    directory: Path,
) -> Command:
    """What starts `proxy` at `endpoint`, before replicas on `ports` of 127.0.0.1; its files are in `directory`.

    `command_for`: a replica's command, were it at this endpoint itself: the proxy answers at the same addresses.
    Raises `UsageError` for a host that nobody knows.
    """
    replica = command_for(endpoint)
    front = Front(addresses=literal_addresses(endpoint.host, endpoint.port), port=endpoint.port, replicas=ports)
    told = _told(proxy, front, directory, endpoint.api_key)
    ready_url = replica.ready_url
    if proxy.name == "litellm":
        base, _, _ = replica.endpoint.rstrip("/").rpartition("/")
        ready_url = f"{base}/health/liveliness"  # its /health asks every model for an answer
    return replace(
        replica,
        argv=(proxy.executable, *told.argv),
        watch_argv=(),
        devices=(),
        metrics_url="",
        env=told.env,
        scrub=("LITELLM_", "DATABASE_URL", "CADDY_", "NGINX"),
        files={told.file: told.text},
        ready_url=ready_url,
    )


@contextmanager
def private_directory() -> Iterator[Path]:
    """A new directory for this user alone, below the state directory if that can be written; removed at the end."""
    import tempfile  # 5 ms, and not before the replicas have started

    try:
        _state().mkdir(mode=0o700, parents=True, exist_ok=True)
        made = tempfile.mkdtemp(prefix="proxy-", dir=_state())
    except OSError:
        made = tempfile.mkdtemp(prefix="mgpu-proxy-")
    try:
        yield Path(made)
    finally:
        shutil.rmtree(made, ignore_errors=True)


def planned_directory(port: int) -> Path:
    """Where a person would keep the files of the proxy on `port`: a launch takes a new directory beside it."""
    from mgpu.launch.places import usual_state_dir  # with platformdirs: 4 ms

    return usual_state_dir() / f"proxy-{port}"


def _state() -> Path:
    from mgpu.launch.places import state_dir

    return state_dir()


class ProxyLog:
    """What the proxies say of why they end, as an adapter would read it."""

    def read_log(self, line: str) -> LogFact | None:
        match = _COMPLAINT.search(line)
        if match is None:
            return None
        if "in use" in line:
            return Cause(text=match[1], hint="choose another --port, or leave --port out to take a free one")
        return Cause(text=match[1], hint=f"{VARIABLE}=none starts the replicas without a proxy")


#: nginx's own log; HAProxy's; Caddy's last word; a Python program's.
_COMPLAINT: Final = re.compile(
    r"(?:\[(?:emerg|alert)\] (?:\d+#\d+: )?|\[ALERT\]\s+(?:\(\d+\) )?: |^Error: |^\w*(?:Error|Exception): )(.{1,300})"
)


class _Told(Struct, frozen=True, kw_only=True):
    """Arguments, variables, and the one file with its text."""

    argv: tuple[str, ...]
    env: Mapping[str, str] = {}
    file: str
    text: str


def _told(proxy: Proxy, front: Front, directory: Path, api_key: str | None) -> _Told:
    if proxy.name == "nginx":
        complaints = () if proxy.version < _NGINX_TOLD_WHERE else ("-e", "stderr")
        file = str(directory / "nginx.conf")
        argv: tuple[str, ...] = ("-p", f"{directory}/", *complaints, "-c", file)
        return _Told(argv=argv, file=file, text=proxy_config.nginx(front))
    if proxy.name == "haproxy":
        file = str(directory / "haproxy.cfg")
        return _Told(argv=("-db", "-f", file), file=file, text=proxy_config.haproxy(front))
    if proxy.name == "caddy":
        file = str(directory / "caddy.json")
        since_2_7 = not proxy.version or proxy.version >= _CADDY_2_7  # built from source, it does not say
        env = {"XDG_DATA_HOME": str(directory), "XDG_CONFIG_HOME": str(directory)}
        return _Told(
            argv=("run", "--config", file), env=env, file=file, text=proxy_config.caddy(front, since_2_7=since_2_7)
        )
    file = str(directory / "litellm.yaml")
    key = {} if api_key is None else {"LITELLM_MASTER_KEY": api_key}  # in argv every user could read it
    where = ("--host", front.addresses[0], "--port", str(front.port), "--num_workers", "1")
    text = proxy_config.litellm(front, keyed=api_key is not None)
    return _Told(argv=("--config", file, *where), env=_LITELLM_ENV | key, file=file, text=text)


def _find(name: ProxyName, environ: Mapping[str, str]) -> Proxy | None:
    path = os.pathsep.join((environ.get("PATH", os.defpath), *_SBIN))
    search = Search(variable="", executables=(name,), package_files=(), install=_INSTALL[name])
    found = find_runtime(search, explicit=None, environ={"PATH": path})
    if found is None:
        return None
    return Proxy(name=name, executable=found.executable, version=_version(name, found))


def _version(name: ProxyName, found: Found) -> tuple[int, ...]:
    """(1, 22, 1); empty where it does not matter or is not said."""
    from mgpu.launch.probe import probe_runtime

    flag = _VERSION_FLAGS.get(name)
    if flag is None:
        return ()
    try:
        said = probe_runtime(found, (flag,), environ=os.environ).outputs[flag]
    except RuntimeMissingError:
        return ()  # starting it will say what is wrong
    match = re.search(r"(\d+)\.(\d+)\.(\d+)", said)
    return tuple(int(part) for part in match.groups()) if match else ()
