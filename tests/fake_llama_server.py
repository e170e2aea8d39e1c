"""A FAKE llama-server, for tests only: no model, the documented HTTP behaviour, and the ways in which it can fail.

What it imitates (llama.cpp b11434, tools/server): the socket is bound before the model loads; while loading everything
is 503; then /health is 200; POST /completion and /v1/chat/completions answer, streamed or whole; signals end it by
their default action while loading and cleanly afterwards; "couldn't bind HTTP server socket" and exit 1 when the port
is taken.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import FrameType
from typing import Any, ClassVar

FAULTS = (
    "none",
    "exit-at-once",
    "exit-while-loading",
    "out-of-memory",
    "recovers-then-dies",
    "abort-at-first-token",
    "error-at-first-token",
    "no-token",
    "embeddings-only",
    "hang-in-health",
    "idle-for-ever",
    "late-bind",
    "garbage-log",
    "ignore-sigterm",
    "grandchild",
    "die-before-answering",
    "die-while-answering",
    "stall-while-answering",
    "no-chat-template",
    "no-answer-at-all",
    "error-while-answering",
    "reasoning",
    "reasoning-only",
)

ANSWER = ("The answer", " is ", "fünf.")


def log(text: str) -> None:
    with suppress(OSError):  # a full disk: the real one goes on, too
        sys.stderr.write(f"{text}\n")
        sys.stderr.flush()


class Handler(BaseHTTPRequestHandler):
    """One server's answers. `options` and `loaded` are set before it starts."""

    protocol_version = "HTTP/1.1"
    options: ClassVar[argparse.Namespace]
    loaded: ClassVar[threading.Event]
    reading: ClassVar[threading.Lock] = threading.Lock()

    def do_GET(self) -> None:
        if not self._is_well():
            return
        if self.options.fault == "hang-in-health":
            log("health: hanging")
            time.sleep(3600)
        elif not self.loaded.is_set():
            self._error(503, "Loading model")
        else:
            self._json(200, {"status": "ok"})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if not self._is_well():
            return
        if not self.loaded.is_set():
            self._error(503, "Loading model")
        elif self.options.api_key and self.headers["Authorization"] != f"Bearer {self.options.api_key}":
            self._error(401, "Invalid API Key")
        elif self.path == "/completion" and self.options.open_completions:
            self._error(404, "File Not Found")
        elif body.get("n_predict") == 1:
            self._first_token()
        elif self.path == "/completion" and isinstance(body["prompt"], list):
            self._timed(body["prompt"], body["n_predict"])
        elif self.path == "/completion":
            self._plain(body["prompt"])
        elif self.path == "/v1/completions" and self.options.open_completions:
            self._json(200, {"choices": [{"text": "Hi"}], "usage": {"completion_tokens": 1}})
        elif self.path == "/v1/chat/completions":
            self._chat()
        else:
            self._error(404, "File Not Found")

    def _is_well(self) -> bool:
        """Answers for `--mood`: the file says "hang", "slow" or "sick" for as long as it does; no file, no fault."""
        while (mood := self._mood()) == "hang":
            time.sleep(0.02)
        if mood == "slow":
            time.sleep(0.25)
        if mood == "sick":
            self._error(500, "Compute error.")
        return mood != "sick"

    def _mood(self) -> str:
        try:
            return self.options.mood.read_text().strip() if self.options.mood is not None else ""
        except FileNotFoundError:
            return ""

    def _first_token(self) -> None:
        fault = self.options.fault
        if fault == "abort-at-first-token":
            log("CUDA error: out of memory")
            os.abort()
        if fault == "error-at-first-token":
            self._error(500, "Compute error.")
        elif fault == "embeddings-only":
            self._error(501, "This server does not support completions. Start it without `--embeddings`")
        elif fault == "no-token":
            self._json(200, {"content": "", "tokens_predicted": 0})
        else:
            self._json(200, {"content": "", "tokens_predicted": 1})

    def _plain(self, prompt: str) -> None:
        if self.options.fault == "no-answer-at-all":
            self._error(500, "no answer")
        else:
            self._stream({"content": text, "stop": False} for text in ("plain: ", prompt))

    def _timed(self, tokens: list[int], n_predict: int) -> None:
        """An answer without words, and how fast: by `--tok-s`, for each request in turn, the last for the rest."""
        fault, speeds = self.options.fault, self.options.tok_s
        if fault == "die-while-answering":
            os.kill(os.getpid(), signal.SIGKILL)
        if fault == "no-answer-at-all":
            self._error(500, "no answer")
            return
        if fault == "stall-while-answering" and len(speeds) < 2:
            with self.reading:
                log("answer: stalling")
                self.connection.recv(1)  # until the client goes away
            return
        tok_s = speeds.pop(0) if len(speeds) > 1 else speeds[0]
        log(f"timed: {len(tokens)} tokens from {min(tokens)} to {max(tokens)}")
        answer: dict[str, Any] = {"content": "", "tokens_predicted": n_predict}
        if tok_s < 0:  # stopped by something
            answer["timings"] = {"predicted_n": 3, "predicted_ms": 1.0}
        elif tok_s:
            reading = {"prompt_n": len(tokens), "prompt_ms": 500 * len(tokens) / tok_s}
            answer["timings"] = reading | {"predicted_n": n_predict, "predicted_ms": 1000 * (n_predict - 1) / tok_s}
        self._json(200, answer)

    def _chat(self) -> None:
        fault = self.options.fault
        if fault == "die-before-answering":
            os.kill(os.getpid(), signal.SIGKILL)
        if fault in {"no-chat-template", "no-answer-at-all"}:
            self._error(400, "this model has no chat template")
            return
        self._stream(self._deltas())

    def _deltas(self) -> Iterator[dict[str, Any]]:
        fault = self.options.fault
        yield _delta({"role": "assistant", "content": None})
        if fault in {"reasoning", "reasoning-only"}:
            yield _delta({"reasoning_content": "Let me think."})
        if fault == "reasoning-only":
            return
        yield _delta({"content": ANSWER[0]})
        if fault == "die-while-answering":
            os.kill(os.getpid(), signal.SIGKILL)
        if fault == "stall-while-answering":
            with self.reading:
                log("answer: stalling")
                self.connection.recv(1)  # until the client goes away
            return
        if fault == "error-while-answering":
            yield {"error": {"code": 500, "message": "context is full", "type": "server_error"}}
            return
        for text in ANSWER[1:]:
            yield _delta({"content": text})

    def _stream(self, events: Iterator[dict[str, Any]]) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        for event in events:
            time.sleep(self.options.piece_s)
            self._chunk(f"data: {json.dumps(event, ensure_ascii=False)}\n\n".encode())
        self._chunk(b"data: [DONE]\n\n")
        self._chunk(b"")

    def end_headers(self) -> None:
        self.send_header("X-Served-By", str(self.options.port))
        super().end_headers()

    def _chunk(self, data: bytes) -> None:
        self.wfile.write(b"%x\r\n%s\r\n" % (len(data), data))
        self.wfile.flush()

    def _error(self, code: int, message: str) -> None:
        self._json(code, {"error": {"code": code, "message": message, "type": "fake"}})

    def _json(self, code: int, body: dict[str, Any]) -> None:
        data = json.dumps(body).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json; charset=utf-8")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002  # the base class's name
        """Silent: the log is for what llama-server says."""


class Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128
    allow_reuse_address = True

    def __init__(self, address: tuple[str, int]) -> None:
        if ":" in address[0]:
            self.address_family = socket.AF_INET6
        super().__init__(address, Handler)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that went away is nothing to report."""


def _delta(delta: dict[str, Any]) -> dict[str, Any]:
    return {"choices": [{"index": 0, "delta": delta}], "object": "chat.completion.chunk"}


def _bind(options: argparse.Namespace) -> Server:
    try:
        return Server((options.host, options.port))
    except OSError:
        log(f"E srv couldn't bind HTTP server socket, hostname: {options.host}, port: {options.port}")
        sys.exit(1)


def _before_binding(options: argparse.Namespace) -> None:
    fault = options.fault
    if fault == "exit-at-once":
        log("error: invalid argument: --nonsense")
        sys.exit(1)
    if fault == "garbage-log":
        sys.stderr.buffer.write(b"\xff\xfe\x00\x1b[31m" + bytes(range(256)) * 200 + b"\r\n")
    if fault == "late-bind":
        time.sleep(0.5)
    if fault == "ignore-sigterm":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if fault == "grandchild":
        for session in (False, True):  # one in our group, one that left it; both deaf to SIGTERM
            subprocess.Popen([sys.executable, "-c", _DEAF, "--marker", options.marker], start_new_session=session)


_DEAF = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(3600)"


def _load(options: argparse.Namespace) -> None:
    """What llama-server logs while it loads."""
    log("load_model: loading model")
    if options.fault == "out-of-memory":
        log("alloc_buffer: allocating 20480.00 MiB on device 0: cudaMalloc failed: out of memory")
        log("llama_model_load: error loading model: unable to allocate CUDA0 buffer")
        log("exiting due to model loading error")
        sys.exit(1)
    if options.fault == "recovers-then-dies":
        log("graph_reserve: cudaMalloc failed: out of memory")
        log("load_tensors: trying without pipeline parallelism")
        sys.exit(3)
    time.sleep(options.load_s)
    if options.fault == "exit-while-loading":
        log("exiting due to model loading error")
        sys.exit(1)
    if options.fault == "idle-for-ever":
        time.sleep(3600)
    log("load_tensors: CPU model buffer size = 12.00 MiB")
    log("llama_kv_cache: CPU KV buffer size = 3.00 MiB")


def _quit(_number: int, _frame: FrameType | None) -> None:
    log("cleaning up before exit...")
    with Handler.reading:  # as the real one: it does not end while somebody reads an answer
        os._exit(0)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--api-key", default=os.environ.get("LLAMA_API_KEY"))
    parser.add_argument("--marker", default="")
    parser.add_argument("--load-s", type=float, default=0.05)
    parser.add_argument("--piece-s", type=float, default=0.0, help="before each piece of an answer")
    parser.add_argument("--open-completions", action="store_true", help="OpenAI's completions alone, as vLLM")
    parser.add_argument("--fault", choices=FAULTS, default="none")
    parser.add_argument("--tok-s", type=lambda text: [float(word) for word in text.split(",")], default=[100.0])
    parser.add_argument("--mood", type=Path, help="a file that says how it is")
    parser.add_argument("--steal", type=Path, help="before binding, touch this file and wait for its removal")
    options = parser.parse_args()
    Handler.options, Handler.loaded = options, threading.Event()
    if options.steal is not None:
        options.steal.touch()
        while options.steal.exists():
            time.sleep(0.01)
    _before_binding(options)
    server = _bind(options)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    _load(options)
    if options.fault != "ignore-sigterm":
        signal.signal(signal.SIGTERM, _quit)
    signal.signal(signal.SIGINT, _quit)
    Handler.loaded.set()
    log("server is listening")
    threading.Event().wait()


if __name__ == "__main__":
    main()
