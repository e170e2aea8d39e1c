"""A fake TabbyAPI: reads its configuration as the real one does, "loads", and only then opens its port.

As TabbyAPI main e632af4 (2026-08-13): `config.yml` of the working directory, then TABBY_* variables, then `--config`,
merged; a busy port is silently the next one; keys in api_tokens.yml of the working directory. FAKE_TABBY_RECORD: where
to write down how it was started. FAKE_TABBY_FAULT: what goes wrong.
"""

from __future__ import annotations

import ast
import json
import os
import socket
import stat
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

#: What it says before it ends, by fault.
LAST_WORDS = {
    "insufficient": "RuntimeError: Insufficient VRAM in split for model and cache",
    "out-of-memory": "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 224.00 MiB.",
    "old-card": "RuntimeError: Unable to run ExllamaV3 because an unsupported GPU is found in this configuration.",
    "wrong-branch": "ValueError: Models quantized with 'exl2' require the exllamav2 backend, no longer supported.",
    "no-module": "ModuleNotFoundError: No module named 'fastapi'",
}


def say(text: str, level: str = "INFO") -> None:
    sys.stdout.write(f"2026-08-13 20:55:45.123 {level}:{' ' * (9 - len(level))}{text}\n")
    sys.stdout.flush()


def read_yaml(path: Path) -> dict[str, dict[str, Any]]:
    """Two levels of block mappings, as mgpu writes them; flow lists and plain or double-quoted scalars."""
    sections: dict[str, dict[str, Any]] = {}
    top: dict[str, Any] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        key, _, value = line.strip().partition(":")
        if not line.startswith(" ") and not value.strip():
            top = sections.setdefault(key, {})
        elif line.startswith("  "):
            top[key] = scalar(value.strip())
        else:
            sections[key] = scalar(value.strip())
    return sections


def scalar(text: str) -> Any:
    return {"true": True, "false": False}[text] if text in {"true", "false"} else ast.literal_eval(text)


def merged(named: Path) -> dict[str, dict[str, Any]]:
    config: dict[str, dict[str, Any]] = {}
    for path in (Path("config.yml"), named):
        if path.is_file():
            for name, values in read_yaml(path).items():
                config.setdefault(name, {}).update(values)
    for variable, value in os.environ.items():
        for name in ("network", "model"):
            prefix = f"TABBY_{name.upper()}_"
            if variable.startswith(prefix):
                config.setdefault(name, {}).setdefault(variable.removeprefix(prefix).lower(), value)
    return config


def is_busy(port: int) -> bool:
    with socket.socket() as test:
        return test.connect_ex(("127.0.0.1", port)) == 0


class Handler(BaseHTTPRequestHandler):
    """The documented endpoints."""

    config: ClassVar[dict[str, dict[str, Any]]] = {}
    keys: ClassVar[dict[str, Any] | None] = None
    asked: ClassVar[int] = 0

    def log_message(self, *_: object) -> None:
        """Nothing: the real one logs no requests."""

    def do_GET(self) -> None:
        if self.path == "/health":
            self.reply(200, {"status": "healthy", "issues": []})
        elif self.path == "/.well-known/serviceinfo":
            self.reply(200, {"version": 0.1, "software": {"name": "TabbyAPI"}})
        elif not self.allowed():
            return
        elif self.path in {"/v1/model", "/v1/models"}:
            model = self.config["model"]
            card = {
                "id": model["model_name"],
                "parameters": {key: model.get(key) for key in ("max_seq_len", "cache_size")},
            }
            self.reply(200, card if self.path == "/v1/model" else {"object": "list", "data": [card]})
        else:
            self.reply(404, {"detail": "Not Found"})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers.get("Content-Length", 0))) or b"{}")
        if self.path not in {"/v1/completions", "/v1/chat/completions"}:
            self.reply(404, {"detail": "Not Found"})
        elif self.allowed():
            self.answer(body)

    def allowed(self) -> bool:
        if self.keys is None:
            return True
        given = self.headers.get("x-api-key") or self.headers.get("Authorization", "").removeprefix("Bearer ")
        if given in {self.keys["api_key"], self.keys["admin_key"]}:
            return True
        self.reply(401, {"detail": "Please provide an API key" if not given else "Invalid API key"})
        return False

    def answer(self, body: dict[str, Any]) -> None:
        if fault() == "dies-later" and Handler.asked:
            say("Segmentation fault, more or less", "ERROR")
            os._exit(1)
        Handler.asked += 1
        chat = "messages" in body
        text = f"tabby: {body['messages'][-1]['content'] if chat else body['prompt']}"
        if not body.get("stream"):
            choice = {"index": 0, "text": text, "finish_reason": "length"}
            self.reply(
                200, {"id": "cmpl-1", "choices": [choice], "usage": {"prompt_tokens": 1, "completion_tokens": 1}}
            )
            return
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream; charset=utf-8")
        self.end_headers()
        for word in text.split(" "):
            piece = {"delta": {"role": "assistant", "content": f"{word} "}} if chat else {"text": f"{word} "}
            self.wfile.write(f"data: {json.dumps({'choices': [{'index': 0, **piece}]})}\r\n\r\n".encode())
        self.wfile.write(b": ping - 2026-08-13\r\n\r\ndata: [DONE]\r\n\r\n")

    def reply(self, status: int, body: Any) -> None:
        raw = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(raw)))
        self.end_headers()
        self.wfile.write(raw)


def fault() -> str:
    return os.environ.get("FAKE_TABBY_FAULT", "none")


def choose_port(port: int) -> int:
    """As main.py does: the next one where it is taken."""
    once = record_path().with_suffix(".once")
    if fault() == "taken" and not once.exists():
        once.touch()
        hold = f"import socket, time; s = socket.create_server(('127.0.0.1', {port})); print(1, flush=True); "
        hold += "time.sleep(60)"
        holder = subprocess.Popen([sys.executable, "-c", hold], stdout=subprocess.PIPE)
        assert holder.stdout is not None
        holder.stdout.readline()
    if not is_busy(port):
        return port
    say(f"Port {port} is currently in use. Switching to {port + 1}.", "WARNING")
    return port + 1


def load(config: dict[str, dict[str, Any]]) -> None:
    """Says what the real one says, and ends where it would."""
    model = config["model"]
    directory = Path(model["model_dir"], model["model_name"])
    if not (directory / "config.json").is_file():
        raise FileNotFoundError(directory)
    n_cards = len(os.environ["CUDA_VISIBLE_DEVICES"].split(","))
    if n_cards == 1:
        say("Disabling GPU split because one GPU is in use.")
    say(f"Loading model: {directory}")
    time.sleep(float(os.environ.get("FAKE_TABBY_SECONDS", "0.2")))
    if fault() in LAST_WORDS:
        sys.exit(f"Traceback (most recent call last):\n  …\n{LAST_WORDS[fault()]}")
    say("Model successfully loaded.")


def record_path() -> Path:
    return Path(os.environ["FAKE_TABBY_RECORD"])


def record(config: dict[str, dict[str, Any]]) -> None:
    names = ("CUDA_", "TABBY_", "EXL")
    told = {
        "argv": sys.argv,
        "cwd": str(Path.cwd()),
        "mode": stat.S_IMODE(Path.cwd().stat().st_mode),
        "files": {path.name: stat.S_IMODE(path.stat().st_mode) for path in Path.cwd().iterdir()},
        "env": {name: value for name, value in os.environ.items() if name.startswith(names)},
        "config": config,
    }
    record_path().write_text(json.dumps(told), encoding="utf-8")


def main() -> None:
    config = merged(Path(sys.argv[sys.argv.index("--config") + 1]))
    record(config)
    network = config["network"]
    port = choose_port(int(network["port"]))
    load(config)
    Handler.config = config
    if not network["disable_auth"]:
        lines = Path("api_tokens.yml").read_text(encoding="utf-8").splitlines()
        Handler.keys = {key: scalar(value) for key, _, value in (line.partition(": ") for line in lines)}
        say(f"Your API key is: {Handler.keys['api_key']}")
    server = ThreadingHTTPServer((network["host"], port), Handler)
    say("Starting OAI API")
    say(f"Uvicorn running on http://{network['host']}:{port} (Press CTRL+C to quit)")
    threading.Thread(target=server.serve_forever).start()


if __name__ == "__main__":
    main()
