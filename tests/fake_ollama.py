"""A FAKE Ollama: `--version`, and `serve` with the API of its version, on the port of $OLLAMA_HOST. For tests.

What it answers follows ollama/ollama docs/api.md, server/routes.go, server/create.go at fb30760 (v0.33.0-rc2) and
v0.24.0, v0.9.0. It generates nothing, and needs no model: what it "loads" it keeps in a table.

$FAKE_OLLAMA_VERSION  what it says it is
$FAKE_OLLAMA_JOURNAL  a file to which each request, load and start is appended, one JSON object a line
$FAKE_OLLAMA_VRAM     bytes that a loaded model holds on cards (and in all, unless $FAKE_OLLAMA_SIZE says more)
$FAKE_OLLAMA_FAULT    what goes wrong: see the uses of `FAULT`
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Final

VERSION: Final = os.environ.get("FAKE_OLLAMA_VERSION", "0.33.0")
FAULT: Final = os.environ.get("FAKE_OLLAMA_FAULT", "")
ERA: Final = tuple(int(part) for part in VERSION.split("-")[0].split(".")[:2])

#: Options that have a model loaded anew when they change (api/types.go Runner), and others a model may have.
RUNNER: Final = ("num_ctx", "num_batch", "num_gpu", "main_gpu", "use_mmap", "num_thread")
OTHERS: Final = ("temperature", "top_k", "top_p", "seed", "stop", "num_predict", "repeat_penalty")

OUT_OF_MEMORY: Final = (
    "llama-server process has terminated: exit status 1: "
    "ggml_backend_cuda_buffer_type_alloc_buffer: allocating 9000.00 MiB on device 0: cudaMalloc failed: out of memory"
)
NOT_VALID: Final = "failed to validate GGUF with llama-quantize: unknown model architecture: 'strange'"


class Store:
    """Blobs, models and what is loaded. Models are made here, or found as manifests in $OLLAMA_MODELS."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.blobs: dict[str, int] = {}
        self.models: dict[str, dict[str, Any]] = {}
        self.loaded: dict[str, dict[str, Any]] = {}

    def has(self, name: str) -> bool:
        return full(name) in self.models or self.manifest(name).is_file()

    def manifest(self, name: str) -> Path:
        model, _, tag = full(name).partition(":")
        directory = Path(os.environ.get("OLLAMA_MODELS", "/nonexistent"))
        parts = model.split("/")
        parts = ["registry.ollama.ai", "library", *parts] if len(parts) == 1 else parts
        parts = ["registry.ollama.ai", *parts] if len(parts) == 2 else parts
        return directory.joinpath("manifests", *parts, tag)

    def load(self, name: str, options: dict[str, Any]) -> None:
        """As the scheduler: the options of the request over the model's; another set of them is another load."""
        parameters = self.models.get(full(name), {}).get("parameters", {}) | options
        runner = {key: parameters[key] for key in RUNNER if key in parameters}
        held = self.loaded.get(full(name))
        if held is not None and held["runner"] == runner:
            return
        if FAULT == "slow-load":
            time.sleep(60)
        vram = int(os.environ.get("FAKE_OLLAMA_VRAM", "0"))
        size = int(os.environ.get("FAKE_OLLAMA_SIZE", str(vram or 300 << 20)))
        self.loaded[full(name)] = {"runner": runner, "size": size, "size_vram": vram, "since": time.monotonic()}
        journal(event="load", model=full(name), runner=runner)


def full(name: str) -> str:
    return name if ":" in name.rpartition("/")[2] else f"{name}:latest"


def journal(**entry: Any) -> None:
    path = os.environ.get("FAKE_OLLAMA_JOURNAL")
    if path:
        with Path(path).open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")


STORE: Final = Store()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        """Says nothing: the journal has it."""

    def do_HEAD(self) -> None:
        self.take()

    def do_GET(self) -> None:
        self.take()

    def do_POST(self) -> None:
        self.take()

    def do_DELETE(self) -> None:
        self.take()

    def take(self) -> None:
        length = int(self.headers.get("Content-Length") or 0)
        raw = b"" if self.path.startswith("/api/blobs/") else self.rfile.read(length)
        self.asked = json.loads(raw) if raw else {}
        journal(event="request", method=self.command, path=self.path, body=self.asked)
        if FAULT == "silent":
            time.sleep(60)
        if FAULT == "redirect":
            self.say(302, b"", {"Location": "file:///etc/passwd"})
            return
        if FAULT == "no-ollama":
            self.say(200, b"<html>It works!</html>", {"Content-Type": "text/html"})
            return
        if self.path.startswith("/api/blobs/"):
            self.blob(length)
            return
        name = f"{self.command.lower()}{self.path.replace('/', '_')}"
        getattr(self, name, self.unknown)()

    def unknown(self) -> None:
        self.say(404, b"404 page not found", {"Content-Type": "text/plain"})

    def say(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for key, value in {"Content-Type": "application/json", **(headers or {})}.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def give(self, told: object, status: int = 200) -> None:
        self.say(status, json.dumps(told).encode())

    def fail(self, status: int, text: str) -> None:
        self.give({"error": text}, status)

    def stream(self, kind: str) -> None:
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()

    def chunk(self, text: str) -> None:
        data = text.encode()
        self.wfile.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")
        self.wfile.flush()

    def get_(self) -> None:
        self.say(200, b"Ollama is running", {"Content-Type": "text/plain"})

    def get_api_version(self) -> None:
        self.give({"version": VERSION})

    def get_api_tags(self) -> None:
        self.give({"models": [{"name": name, "model": name} for name in STORE.models]})

    def get_api_ps(self) -> None:
        rows = []
        for name, held in STORE.loaded.items():
            if FAULT == "evicted" and time.monotonic() - held["since"] > 1:
                continue
            row = {"name": name, "model": name, "size": held["size"], "size_vram": held["size_vram"]}
            if ERA >= (0, 30):
                row["context_length"] = held["runner"].get("num_ctx", 4096)
            rows.append(row)
        self.give({"models": rows})

    def post_api_show(self) -> None:
        if not STORE.has(self.asked["model"]):
            self.fail(404, f"model '{self.asked['model']}' not found")
        else:
            self.give({"modelfile": "", "details": {"format": "gguf"}})

    def blob(self, length: int) -> None:
        digest = self.path.rpartition("/")[2]
        if self.command == "HEAD":
            self.say(200 if digest in STORE.blobs else 404, b"")
            return
        found, left = hashlib.sha256(), length
        while left:
            block = self.rfile.read(min(left, 1 << 20))
            found.update(block)
            left -= len(block)
        if FAULT == "spoilt-upload" or f"sha256:{found.hexdigest()}" != digest:
            self.fail(400, "digest mismatch")
            return
        STORE.blobs[digest] = length
        self.say(201, b"")

    def post_api_create(self) -> None:
        asked = self.asked
        parameters = asked.get("parameters", {})
        source, files = asked.get("from"), asked.get("files", {})
        unknown = [key for key in parameters if key not in (*RUNNER, *OTHERS)]
        if unknown:
            self.fail(400, f"unknown parameter '{unknown[0]}'")
        elif source is not None and not STORE.has(source):
            self.fail(404, f"model '{source}' not found")  # a pull from the registry, which is not there
        elif any(digest not in STORE.blobs for digest in files.values()):
            self.fail(400, "blob not found")
        elif FAULT == "read-only":
            self.fail(500, "mkdir /usr/share/ollama/.ollama/models/manifests: permission denied")
        else:
            self.make(asked["model"], source, files, parameters)

    def make(self, name: str, source: str | None, files: dict[str, str], parameters: dict[str, Any]) -> None:
        self.stream("application/x-ndjson")
        if files:
            self.chunk('{"status":"parsing GGUF"}\n')
            if FAULT == "not-valid":
                self.chunk(json.dumps({"error": NOT_VALID}) + "\n")
                self.chunk("")
                return
            if ERA >= (0, 30):
                total = sum(STORE.blobs[digest] for digest in files.values())
                for part in (0, total // 2, total):
                    told = {"status": "validating GGUF model", "total": total, "completed": part}
                    self.chunk(json.dumps(told) + "\n")
        if FAULT == "create-breaks-off":
            self.close_connection = True
            return
        self.chunk('{"status":"using existing layer sha256:0123"}\n{"status":"writing ')
        self.chunk('manifest"}\n')
        with STORE.lock:
            base = STORE.models.get(full(source), {}) if source else {}
            STORE.models[full(name)] = {"parameters": base.get("parameters", {}) | parameters, "files": files}
        self.chunk('{"status":"success"}\n')
        self.wfile.write(b"0\r\n\r\n")

    def post_api_generate(self) -> None:
        name, asked = self.asked["model"], self.asked
        if not STORE.has(name):
            self.fail(404, f"model '{name}' not found")
        elif not asked.get("prompt") and asked.get("keep_alive") == 0:
            STORE.loaded.pop(full(name), None)
            self.give({"model": name, "done": True, "done_reason": "unload"})
        elif FAULT == "load-fails":
            self.fail(500, OUT_OF_MEMORY)
        elif FAULT == "busy":
            self.fail(503, "server busy, please try again.  maximum pending requests exceeded")
        elif FAULT == "dies-while-loading":
            os._exit(1)
        else:
            STORE.load(name, asked.get("options", {}))
            reason = "stop" if asked.get("prompt") else "load"
            self.give({"model": name, "response": "", "done": True, "done_reason": reason})
            if FAULT == "dies-later":
                threading.Timer(1.0, os._exit, (1,)).start()

    def post_v1_completions(self) -> None:
        if not self.is_known():
            return
        if FAULT == "embeddings":
            self.give({"error": {"message": f'"{self.asked["model"]}" does not support generate'}}, 400)
            return
        STORE.load(self.asked["model"], {})
        n = 0 if FAULT == "no-token" else 1
        self.give({"choices": [{"text": "!" * n, "index": 0}], "usage": {"completion_tokens": n}})

    def post_v1_chat_completions(self) -> None:
        if not self.is_known():
            return
        STORE.load(self.asked["model"], {})
        self.stream("text/event-stream")
        said = self.asked["messages"][-1]["content"]
        for delta in ({"reasoning": "Hm."}, {"content": f"You said: {said} "}, {"content": "Grüße!"}):
            self.chunk(f"data: {json.dumps({'choices': [{'index': 0, 'delta': delta}]})}\n\n")
        self.chunk("data: [DONE]\n\n")
        self.wfile.write(b"0\r\n\r\n")

    def is_known(self) -> bool:
        known = STORE.has(self.asked["model"])
        if not known:
            self.give({"error": {"message": f"model '{self.asked['model']}' not found"}}, 404)
        return known

    def delete_api_delete(self) -> None:
        if FAULT == "delete-fails":
            self.fail(500, "unlinkat: permission denied")
        elif STORE.models.pop(full(self.asked["model"]), None) is None:
            self.fail(404, f"model '{self.asked['model']}' not found")
        else:
            self.say(200, b"")


def serve() -> None:
    host, _, port = os.environ.get("OLLAMA_HOST", "127.0.0.1:11434").rpartition(":")
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
    if FAULT == "dies-at-start":
        sys.stderr.write("Error: listen tcp: something is wrong\n")
        sys.exit(1)
    server = ThreadingHTTPServer((host, int(port)), Handler)
    server.daemon_threads = True
    kept = ("OLLAMA_", "LLAMA_ARG_", "CUDA_", "ROCR_")
    journal(event="start", env={name: value for name, value in os.environ.items() if name.startswith(kept)})
    server.serve_forever()


if __name__ == "__main__":
    if sys.argv[1:] == ["--version"]:
        sys.stdout.write("Warning: could not connect to a running Ollama instance\n")
        sys.stdout.write(f"Warning: client version is {VERSION}\n")
    elif sys.argv[1:] == ["serve"]:
        serve()
    else:
        sys.exit(f"unknown command {sys.argv[1:]}")
