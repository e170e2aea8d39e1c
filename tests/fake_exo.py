"""A FAKE Exo cluster: an HTTP server that answers as exo 0.3.70 (b5375f8) does, with nodes made up on the command line.

    fake_exo.py --port-file FILE [--node NAME=FREE_GIB ...] [--model ID=SIZE_GIB ...] [--fault FAULT] [--record FILE]

Shapes after `src/exo/shared/types/state.py`, `src/exo/api/types/api.py` (camel case; a union's member as an object with
its class's name as the key); behaviour after `src/exo/api/main.py` and `src/exo/master/placement.py`: an instance comes
a moment after it is asked for, its runners go from idle to ready, and it goes a moment after it is deleted.
"""

from __future__ import annotations

import argparse
import json
import os
import threading
import time
import uuid
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import combinations
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

FAULTS = (
    "none",
    "refuses-instance",  # 400 at POST /instance, as when memory went meanwhile
    "never-appears",  # the master drops the command
    "runner-fails",  # for good, and the instance goes
    "download-fails",
    "downloads",  # the nodes fetch the model first
    "error-instead-of-token",
    "no-token",
    "dies-while-loading",
    "dies-after-ready",
    "instance-goes",  # a node drops out while it is used
    "not-exo",
    "no-nodes",
    "slow-load",
    "reasoning",
)
GIB = 1 << 30
STEP_S = 0.15  # from one state of a runner to the next; longer where one is to be seen on the way
SLOW_S = 0.4
STAGES: tuple[dict[str, Any], ...] = (
    {"RunnerIdle": {}},
    {"RunnerConnecting": {}},
    {"RunnerLoading": {"layersLoaded": 3, "totalLayers": 16}},
    {"RunnerLoading": {"layersLoaded": 16, "totalLayers": 16}},
    {"RunnerWarmingUp": {}},
    {"RunnerReady": {"prefillServerPort": None}},
)


class Cluster:
    """Nodes, models and instances. An instance's age decides how far its runners are."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.nodes = {f"node-{name}-0001": (name, float(gib)) for name, gib in options.node}
        self.models = {name: float(gib) for name, gib in options.model}
        self.fault: str = options.fault
        self.step_s = SLOW_S if self.fault in {"downloads", "slow-load"} else STEP_S
        self.instances: dict[str, tuple[dict[str, Any], float]] = {}
        self.deleted: dict[str, float] = {}
        self.lock = threading.Lock()

    def previews(self, model_id: str) -> list[dict[str, Any]]:
        """As the API does: each sharding and link with 1 … n nodes, each kind of refusal once."""
        found: dict[tuple[str, str, int], dict[str, Any]] = {}
        for sharding in ("Pipeline", "Tensor"):
            for meta in ("MlxRing", "MlxJaccl"):
                for min_nodes in range(1, len(self.nodes) + 1):
                    preview = self._preview(model_id, sharding, meta, min_nodes)
                    found.setdefault((sharding, meta, _n_nodes(preview)), preview)
        return list(found.values())

    def _preview(self, model_id: str, sharding: str, meta: str, min_nodes: int) -> dict[str, Any]:
        preview = {"model_id": model_id, "sharding": sharding, "instance_meta": meta}
        empty = {"instance": None, "memory_delta_by_node": None}
        cycle = self._smallest(self.models[model_id], min_nodes)
        if cycle is None:
            return preview | empty | {"error": "No cycles found with sufficient memory"}
        if meta == "MlxJaccl":
            return preview | empty | {"error": "Requested RDMA (MlxJaccl) but no RDMA-connected cycles available"}
        if len(cycle) == 1:
            sharding = "Pipeline"
        return preview | {"instance": self._instance(model_id, sharding, cycle), "error": None}

    def _smallest(self, gib: float, min_nodes: int) -> tuple[str, ...] | None:
        for n in range(min_nodes, len(self.nodes) + 1):
            fitting = [c for c in combinations(self.nodes, n) if sum(self.nodes[node][1] for node in c) >= gib]
            if fitting:
                return max(fitting, key=lambda cycle: sum(self.nodes[node][1] for node in cycle))
        return None

    def _instance(self, model_id: str, sharding: str, cycle: tuple[str, ...]) -> dict[str, Any]:
        runners = {node: str(uuid.uuid4()) for node in cycle}
        shards, start = {}, 0
        for rank, node in enumerate(cycle):
            end = 16 if rank == len(cycle) - 1 else start + 16 // len(cycle)
            span = (start, end) if sharding == "Pipeline" else (0, 16)
            shards[runners[node]] = {f"{sharding}ShardMetadata": self._shard(model_id, rank, len(cycle), span)}
            start = end
        assignments = {"modelId": model_id, "runnerToShard": shards, "nodeToRunner": runners}
        ring = {"hostsByNode": {node: [] for node in cycle}, "ephemeralPort": 50000}
        return {"MlxRingInstance": {"instanceId": str(uuid.uuid4()), "shardAssignments": assignments} | ring}

    def _shard(self, model_id: str, rank: int, world: int, span: tuple[int, int]) -> dict[str, Any]:
        card = {"modelId": model_id, "storageSize": {"inBytes": int(self.models[model_id] * GIB)}, "nLayers": 16}
        layers = {"startLayer": span[0], "endLayer": span[1], "nLayers": 16}
        return {"modelCard": card, "deviceRank": rank, "worldSize": world} | layers

    def state(self) -> dict[str, Any]:
        with self.lock:
            now = time.monotonic()
            for instance_id, at in list(self.deleted.items()):
                if now - at > self.step_s:
                    self.instances.pop(instance_id, None)
            ages = {key: now - made for key, (_, made) in self.instances.items()}
            if self.fault == "instance-goes":
                ages = {key: age for key, age in ages.items() if age < self.step_s * len(STAGES) + 1.0}
            shown = {key: self.instances[key][0] for key, age in ages.items() if age > self.step_s}
        names = {} if self.fault == "no-nodes" else self.nodes
        memory = {"swapTotal": {"inBytes": 0}, "swapAvailable": {"inBytes": 0}}
        return {
            "instances": {} if self.fault == "never-appears" else shown,
            "runners": {runner: self._runner(ages[key]) for key, one in shown.items() for runner in _runners(one)},
            "downloads": self._downloads(shown, ages),
            "tasks": {},
            "lastSeen": {},
            "topology": {"nodes": list(names), "connections": {}},
            "lastEventAppliedIdx": 7,
            "nodeIdentities": {
                node: {"modelId": "Mac", "chipId": "Apple M3 Ultra", "friendlyName": name, "osVersion": "26.2"}
                for node, (name, _) in names.items()
            },
            "nodeMemory": {
                node: memory | {"ramTotal": {"inBytes": 96 * GIB}, "ramAvailable": {"inBytes": int(gib * GIB)}}
                for node, (_, gib) in names.items()
            },
            "nodeBackends": {node: ["MlxMetal"] for node in names},
        }

    def _runner(self, age: float) -> dict[str, Any]:
        step = int(age / self.step_s) - 1
        if self.fault == "runner-fails" and step >= 2:
            return {"RunnerFailed": {"errorMessage": "[metal::malloc] out of memory", "diagnostics": []}}
        if self.fault in {"downloads", "download-fails"}:
            step -= 3
        if self.fault in {"slow-load", "download-fails"}:
            step = min(step, 2)
        if self.fault == "dies-while-loading" and step >= 2:
            os._exit(1)
        return STAGES[max(0, min(step, len(STAGES) - 1))]

    def _downloads(self, shown: dict[str, Any], ages: dict[str, float]) -> dict[str, Any]:
        if self.fault not in {"downloads", "download-fails"}:
            return {}
        downloads: dict[str, Any] = {}
        for key, instance in shown.items():
            assignments = instance["MlxRingInstance"]["shardAssignments"]
            for node, runner in assignments["nodeToRunner"].items():
                body = {"nodeId": node, "shardMetadata": assignments["runnerToShard"][runner]}
                progress = {"total": {"inBytes": 8 * GIB}, "downloaded": {"inBytes": int(ages[key] * GIB)}, "files": {}}
                failed = {"errorMessage": "401 Client Error: Unauthorized"}
                ongoing = {"DownloadOngoing": body | {"downloadProgress": progress}}
                done = {"DownloadCompleted": body | {"total": {"inBytes": 8 * GIB}}}
                over = ages[key] > 4 * self.step_s
                failing = self.fault == "download-fails"
                downloads[node] = [{"DownloadFailed": body | failed} if failing else done if over else ongoing]
        return downloads


def _n_nodes(preview: dict[str, Any]) -> int:
    return len(_runners(preview["instance"])) if preview["instance"] else 0


def _runners(instance: dict[str, Any]) -> list[str]:
    return list(instance["MlxRingInstance"]["shardAssignments"]["nodeToRunner"].values())


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    cluster: Cluster
    record: Path | None

    def do_GET(self) -> None:
        parts = urlsplit(self.path)
        self._note()
        if self.cluster.fault == "not-exo":
            self._json(200, {"topology": "something else"})
        elif parts.path == "/node_id":
            self._json(200, next(iter(self.cluster.nodes), "node-0"))
        elif parts.path == "/state":
            self._json(200, self.cluster.state())
        elif parts.path in {"/models", "/v1/models"}:
            self._json(200, {"object": "list", "data": [_card(*model) for model in self.cluster.models.items()]})
        elif parts.path == "/instance/previews":
            self._previews(parse_qs(parts.query)["model_id"][0])
        else:
            self._error(404, "Not Found")

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self._note(body)
        if self.path == "/instance":
            self._create(body["instance"])
        elif self.path == "/v1/chat/completions":
            self._chat(body)
        else:
            self._error(404, "Not Found")

    def do_DELETE(self) -> None:
        self._note()
        instance_id = unquote(self.path.removeprefix("/instance/"))
        if instance_id not in self.cluster.instances:
            self._error(404, "Instance not found")
            return
        self.cluster.deleted[instance_id] = time.monotonic()
        told = {"message": "Command received.", "command_id": str(uuid.uuid4()), "instance_id": instance_id}
        self._json(200, told)

    def _previews(self, model_id: str) -> None:
        if model_id not in self.cluster.models:
            self._error(400, f"Failed to load model card: 404 Client Error: Repository Not Found: {model_id}")
        else:
            self._json(200, {"previews": self.cluster.previews(model_id)})

    def _create(self, instance: dict[str, Any]) -> None:
        if self.cluster.fault == "refuses-instance":
            self._error(400, "Insufficient memory to create instance. Required: 40.0GB, Available: 12.0GB")
            return
        self.cluster.instances[instance["MlxRingInstance"]["instanceId"]] = (instance, time.monotonic())
        self._json(200, {"message": "Command received.", "command_id": str(uuid.uuid4()), "model_card": {}})

    def _chat(self, body: dict[str, Any]) -> None:
        model, fault = body["model"], self.cluster.fault
        if not any(model == _model_of(instance) for instance, _ in self.cluster.instances.values()):
            self._error(404, f"No instance found for model {model}")
            return
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Connection", "close")
        self.end_headers()
        question = body["messages"][0]["content"]
        texts = ["Hi"] if body.get("max_tokens") == 1 else ["It ", "said: ", question]
        self._event(": prefill_progress {}")
        if fault == "error-instead-of-token":
            self._event('data: {"error": {"message": "[metal::malloc] out of memory", "type": "X", "code": 500}}')
        elif fault == "no-token":
            self._event(f"data: {json.dumps(_chunk({'role': 'assistant'}))}")
        else:
            for text in texts:
                thinks = fault == "reasoning" and body.get("max_tokens") == 1
                self._event(f"data: {json.dumps(_chunk({'reasoning_content' if thinks else 'content': text}))}")
        self._event("data: [DONE]")
        if fault == "dies-after-ready":
            threading.Timer(0.3, os._exit, (1,)).start()

    def _event(self, line: str) -> None:
        self.wfile.write(f"{line}\n\n".encode())
        self.wfile.flush()

    def _note(self, body: Any = None) -> None:
        if self.record is not None and self.path != "/state":
            line = json.dumps({"method": self.command, "path": self.path, "body": body})
            with self.cluster.lock, self.record.open("a", encoding="utf-8") as file:
                file.write(f"{line}\n")

    def _error(self, code: int, message: str) -> None:
        self._json(code, {"error": {"message": message, "type": HTTPStatus(code).phrase, "param": None, "code": code}})

    def _json(self, code: int, body: Any) -> None:
        data = json.dumps(body).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002  # the base class's name
        """Silent."""


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that went away is nothing to report."""


def _card(model_id: str, gib: float) -> dict[str, Any]:
    sizes = {"storage_size_megabytes": round(gib * 1024), "context_length": 131072}
    return {
        "id": model_id,
        "object": "model",
        "owned_by": "exo",
        "supports_tensor": True,
        "quantization": "4bit",
    } | sizes


def _chunk(delta: dict[str, Any]) -> dict[str, Any]:
    return {"object": "chat.completion.chunk", "choices": [{"index": 0, "delta": delta, "finish_reason": None}]}


def _model_of(instance: dict[str, Any]) -> str:
    return str(instance["MlxRingInstance"]["shardAssignments"]["modelId"])


def _pair(text: str) -> tuple[str, str]:
    name, _, size = text.rpartition("=")
    return name, size


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--port-file", type=Path, required=True)
    parser.add_argument("--node", type=_pair, action="append", default=[])
    parser.add_argument("--model", type=_pair, action="append", default=[])
    parser.add_argument("--fault", choices=FAULTS, default="none")
    parser.add_argument("--running", help="a model that somebody else has placed already")
    parser.add_argument("--record", type=Path)
    options = parser.parse_args()
    Handler.cluster, Handler.record = Cluster(options), options.record
    if options.running:
        preview = next(one for one in Handler.cluster.previews(options.running) if one["instance"])
        instance = preview["instance"]
        Handler.cluster.instances[instance["MlxRingInstance"]["instanceId"]] = (instance, 0.0)
    server = Server(("127.0.0.1", 0), Handler)
    partial = options.port_file.with_suffix(".new")
    partial.write_text(str(server.server_address[1]))
    partial.rename(options.port_file)
    server.serve_forever()


if __name__ == "__main__":
    main()
