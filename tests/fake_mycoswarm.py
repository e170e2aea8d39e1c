"""A FAKE mycoSwarm daemon: an HTTP server that answers as mycoswarm 0.6.0 does, with peers made up on the command line.

    fake_mycoswarm.py --port-file FILE [--token TOKEN] [--own MODEL ...] [--peer NAME=MODEL ...] [--fault FAULT]

Shapes and behaviour after `api.py`, `router.py` and `worker.py`. A request for a peer's model is routed to that peer,
which is this same server: what is not on the node that was asked, is streamed by the peer's address alone.
"""

from __future__ import annotations

import argparse
import json
import os
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

FAULTS = (
    "none",
    "ollama-gone",  # the task fails on its node
    "no-token",
    "swaps",  # another model answers
    "no-node",  # 503
    "node-gone",  # 502
    "unreachable-peer",  # its address is not reachable from here: the daemon relays
    "breaks-off",
    "error-in-stream",
    "dies-after-ready",
    "model-goes",
    "not-mycoswarm",
    "never-ends",
)
TASK_S = 0.1


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    options: argparse.Namespace
    tasks: dict[str, dict[str, Any]]
    lock = threading.Lock()
    n_done = 0

    def do_GET(self) -> None:
        self._note()
        if self.options.fault == "not-mycoswarm":
            self._json(200, {"ok": True})
        elif self.path == "/health":
            told = {"node_id": "myco-0", "hostname": "desk", "status": "ok", "uptime_seconds": 1.0}
            self._json(200, told | {"peer_count": len(self.options.peer), "version": "0.6.0"})
        elif not self._allowed():
            self._json(403, {"detail": "Invalid or missing swarm token"})
        elif self.path == "/status":
            self._json(200, self._status())
        elif self.path == "/peers":
            self._json(200, [self._peer(*peer) for peer in self._peers()])
        elif self.path.endswith("/stream"):
            self._stream(self.path.split("/")[2])
        elif self.path.startswith("/task/"):
            self._outcome(self.path.split("/")[2])
        else:
            self._json(404, {"detail": "Not Found"})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self._note(body)
        if not self._allowed():
            self._json(403, {"detail": "Invalid or missing swarm token"})
        elif self.options.fault == "no-node":
            self._json(503, {"detail": "No node can handle: inference"})
        elif self.options.fault == "node-gone":
            self._json(502, {"detail": "Can't reach gpu-box: All connection attempts failed"})
        else:
            self._submit(body)

    def _submit(self, body: dict[str, Any]) -> None:
        model = body["payload"]["model"]
        host = next((name for name, has in self._peers() if has == model), None)
        self.tasks[body["task_id"]] = {"body": body, "at": time.monotonic()}
        told: dict[str, Any] = {"task_id": body["task_id"], "status": "pending", "message": "Queued (position 1)"}
        told |= {"target_ip": None, "target_port": None}
        if host is not None:
            port = 9 if self.options.fault == "unreachable-peer" else self.connection.getsockname()[1]
            told |= {"message": f"Routed to {host}", "target_ip": "127.0.0.1", "target_port": port}
        self._json(200, told)

    def _outcome(self, task_id: str) -> None:
        task = self.tasks.get(task_id)
        if task is None or time.monotonic() - task["at"] < TASK_S or self.options.fault == "never-ends":
            self._json(200, {"task_id": task_id, "status": "pending", "message": "Task is queued or in progress"})
            return
        told = {"task_id": task_id, "duration_seconds": TASK_S, "node_id": "myco-0", "result": None, "error": None}
        if self.options.fault == "ollama-gone":
            self._json(200, told | {"status": "failed", "error": "Cannot connect to Ollama — is it running?"})
            return
        result = {"model": self._model_of(task), "eval_count": 1, "response": self._answer_to(task)}
        if self.options.fault == "no-token":
            result |= {"eval_count": 0, "response": ""}
        self._json(200, told | {"status": "completed", "result": result})
        Handler.n_done += 1
        if self.options.fault == "dies-after-ready":
            threading.Timer(0.3, os._exit, (1,)).start()

    def _stream(self, task_id: str) -> None:
        task = self.tasks[task_id]
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream; charset=utf-8")
        self.send_header("Connection", "close")
        self.end_headers()
        fault = self.options.fault
        if fault == "error-in-stream":
            self._event({"error": "Ollama timed out after 300.0s", "done": True})
            return
        for word in self._answer_to(task).split(" "):
            self._event({"token": f"{word} ", "done": False})
            if fault == "breaks-off":
                return
        self._event({"done": True, "model": self._model_of(task), "tokens_per_second": 12.5, "truncated": False})

    def _event(self, told: dict[str, Any]) -> None:
        self.wfile.write(f"data: {json.dumps(told)}\n\n".encode())
        self.wfile.flush()

    def _model_of(self, task: dict[str, Any]) -> str:
        return "tinyllama:latest" if self.options.fault == "swaps" else str(task["body"]["payload"]["model"])

    def _answer_to(self, task: dict[str, Any]) -> str:
        return f"You said: {task['body']['payload']['messages'][0]['content']}"

    def _peers(self) -> list[tuple[str, str]]:
        if self.options.fault == "model-goes" and Handler.n_done:
            return []
        return [tuple(peer.rpartition("=")[::2]) for peer in self.options.peer]

    def _status(self) -> dict[str, Any]:
        gpu = {"gpu": None, "vram_total_mb": 0, "vram_free_mb": 0}
        own = {"node_id": "myco-0", "hostname": "desk", "version": "0.6.0", "node_tier": "light"}
        return own | gpu | {"capabilities": ["cpu_worker"], "ollama_models": self.options.own, "ip": "192.168.1.5"}

    def _peer(self, name: str, model: str) -> dict[str, Any]:
        peer = {"node_id": f"myco-{name}", "hostname": name, "ip": "192.168.1.7", "port": 7890, "version": "0.6.0"}
        gpu = {"node_tier": "executive", "gpu_name": "NVIDIA GeForce RTX 3090", "vram_total_mb": 24576}
        more = {"capabilities": ["gpu_inference"], "available_models": [model], "last_seen": time.time()}
        return peer | gpu | more

    def _allowed(self) -> bool:
        return self.options.token is None or self.headers["X-Swarm-Token"] == self.options.token

    def _note(self, body: Any = None) -> None:
        if self.options.record is not None:
            told = {"method": self.command, "path": self.path, "token": self.headers["X-Swarm-Token"], "body": body}
            with self.lock, self.options.record.open("a", encoding="utf-8") as file:
                file.write(f"{json.dumps(told)}\n")

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


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--port-file", type=Path, required=True)
    parser.add_argument("--token")
    parser.add_argument("--own", action="append", default=[], help="a model of the node that is asked")
    parser.add_argument("--peer", action="append", default=[], help="NAME=MODEL")
    parser.add_argument("--fault", choices=FAULTS, default="none")
    parser.add_argument("--record", type=Path)
    Handler.options, Handler.tasks = parser.parse_args(), {}
    server = Server(("127.0.0.1", 0), Handler)
    partial = Handler.options.port_file.with_suffix(".new")
    partial.write_text(str(server.server_address[1]))
    partial.rename(Handler.options.port_file)
    server.serve_forever()


if __name__ == "__main__":
    main()
